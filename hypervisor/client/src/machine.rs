//! A machine as its owner describes it: the same as [`MachineConfig`] on the wire, but with the descriptors themselves
//! in the places where the wire has their numbers. [`Machine::into_packet`] is the only place that numbers them, so an
//! index that points at the wrong descriptor, or at none, cannot be written.

use std::os::fd::OwnedFd;

use caisson_protos::{
    guest::Slot,
    monitor::{
        AllowedSources, ConsoleConfig, DescriptorIndex, DiskConfig, MAX_DESCRIPTORS, MachineConfig, MemoryConfig,
        NetworkConfig, RateLimit, ShareConfig, VsockConfig, network_slots_begin,
    },
};

/// A whole machine; each field means what the field of that name in [`MachineConfig`] means.
#[derive(Debug)]
pub struct Machine {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory.
    pub memory: Memory,
    /// The kernel, an ELF vmlinux.
    pub kernel: OwnedFd,
    /// The initramfs.
    pub initramfs: Option<OwnedFd>,
    /// The kernel's command line.
    pub command_line: String,
    /// The debug console.
    pub console: Option<Console>,
    /// Stream sockets.
    pub vsock: Option<Vsock>,
    /// Block devices, vda first.
    pub disks: Vec<Disk>,
    /// Shared directories.
    pub shares: Vec<Share>,
    /// Network devices.
    pub networks: Vec<Network>,
    /// Room for network devices that are attached later.
    pub empty_network_slots: u8,
}

/// Guest memory, see [`MemoryConfig`].
#[derive(Debug)]
pub struct Memory {
    /// Bytes.
    pub size: u64,
    /// What backs it; anonymous memory if nothing does.
    pub file: Option<OwnedFd>,
    /// Copy on write.
    pub private: bool,
}

/// The debug console, see [`ConsoleConfig`].
#[derive(Debug)]
pub struct Console {
    /// Where the guest's output goes.
    pub output: OwnedFd,
    /// From the first instruction of the kernel on.
    pub early: bool,
}

/// The vsock device, see [`VsockConfig`].
#[derive(Debug)]
pub struct Vsock {
    /// The guest's context id.
    pub guest_cid: u64,
    /// The listening Unix socket for streams to the guest.
    pub listener: OwnedFd,
    /// The monitor's end of the socket that announces streams from the guest.
    pub guest_streams: OwnedFd,
}

/// One block device, see [`DiskConfig`].
#[derive(Debug)]
pub struct Disk {
    /// The serial number that the guest sees.
    pub serial: String,
    /// The raw image.
    pub file: OwnedFd,
    /// Refuse writes.
    pub read_only: bool,
}

/// One shared directory, see [`ShareConfig`].
#[derive(Debug)]
pub struct Share {
    /// The tag to mount it by.
    pub tag: String,
    /// The monitor's end of the socket to the file server.
    pub server: OwnedFd,
}

/// One network device, see [`NetworkConfig`].
#[derive(Debug)]
pub struct Network {
    /// The queues of its tap.
    pub taps: Vec<OwnedFd>,
    /// The guest's address on it.
    pub mac: [u8; 6],
    /// The greatest MTU.
    pub mtu: u16,
    /// What the guest may send.
    pub send_limit: RateLimit,
    /// What the guest may receive.
    pub receive_limit: RateLimit,
    /// From which addresses the guest may send.
    pub sources: Option<AllowedSources>,
}

impl Network {
    /// The wire's form, and the descriptors to attach, in order.
    ///
    /// # Errors
    /// If there are more descriptors than a packet takes.
    pub fn into_packet(self) -> Result<(NetworkConfig, Vec<OwnedFd>), TooManyDescriptors> {
        let mut fds = Attachments::default();
        let config = self.into_config(&mut fds);
        fds.finish().map(|fds| (config, fds))
    }

    fn into_config(self, fds: &mut Attachments) -> NetworkConfig {
        NetworkConfig {
            taps: self.taps.into_iter().map(|tap| fds.attach(tap)).collect(),
            mac: self.mac,
            mtu: self.mtu,
            send_limit: self.send_limit,
            receive_limit: self.receive_limit,
            sources: self.sources,
        }
    }
}

/// More descriptors than one packet carries.
#[derive(Debug, thiserror::Error)]
#[error(
    "the machine needs {0} descriptors, a control packet carries at most {MAX_DESCRIPTORS}: use fewer disks, shares or \
     queues of network devices"
)]
pub struct TooManyDescriptors(usize);

/// Collects descriptors in the order in which they will be attached.
#[derive(Default)]
struct Attachments(Vec<OwnedFd>);

impl Attachments {
    fn attach(&mut self, descriptor: OwnedFd) -> DescriptorIndex {
        // Saturates far beyond what `into_packet` lets pass.
        let index = DescriptorIndex(u8::try_from(self.0.len()).unwrap_or(u8::MAX));
        self.0.push(descriptor);
        index
    }

    fn finish(self) -> Result<Vec<OwnedFd>, TooManyDescriptors> {
        if self.0.len() > MAX_DESCRIPTORS { Err(TooManyDescriptors(self.0.len())) } else { Ok(self.0) }
    }
}

impl Machine {
    /// The slots of [`Self::networks`], in order. Those of the empty ones follow.
    pub fn network_slots(&self) -> impl Iterator<Item = Slot> + use<> {
        let begin = network_slots_begin(self.vsock.is_some(), self.disks.len(), self.shares.len());
        (begin..=u8::MAX).map(Slot).take(self.networks.len())
    }

    /// The wire's form, and the descriptors to attach, in order.
    ///
    /// # Errors
    /// If there are more descriptors than a packet takes.
    pub fn into_packet(self) -> Result<(MachineConfig, Vec<OwnedFd>), TooManyDescriptors> {
        let mut fds = Attachments::default();
        let config = MachineConfig {
            vcpus: self.vcpus,
            invariant_tsc: host_clock_is_tsc(),
            memory: MemoryConfig {
                size: self.memory.size,
                file: self.memory.file.map(|file| fds.attach(file)),
                private: self.memory.private,
            },
            kernel: fds.attach(self.kernel),
            initramfs: self.initramfs.map(|file| fds.attach(file)),
            command_line: self.command_line,
            console: self
                .console
                .map(|console| ConsoleConfig { output: fds.attach(console.output), early: console.early }),
            vsock: self.vsock.map(|vsock| VsockConfig {
                guest_cid: vsock.guest_cid,
                listener: fds.attach(vsock.listener),
                guest_streams: fds.attach(vsock.guest_streams),
            }),
            disks: (self.disks.into_iter())
                .map(|disk| DiskConfig { serial: disk.serial, file: fds.attach(disk.file), read_only: disk.read_only })
                .collect(),
            shares: (self.shares.into_iter())
                .map(|share| ShareConfig { tag: share.tag, server: fds.attach(share.server) })
                .collect(),
            networks: self.networks.into_iter().map(|network| network.into_config(&mut fds)).collect(),
            empty_network_slots: self.empty_network_slots,
        };
        fds.finish().map(|fds| (config, fds))
    }
}

/// Whether the host's clock source is the TSC. Linux turns to another one when it has found the TSC to be unstable, whatever the
/// processor says of itself. Without an answer the TSC is not trusted.
fn host_clock_is_tsc() -> bool {
    std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        .is_ok_and(|name| name.trim_end() == "tsc")
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd};

    use proptest::prelude::*;

    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn network(queues: usize) -> Network {
        Network {
            taps: (0..queues).map(|_| null()).collect(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            send_limit: RateLimit::default(),
            receive_limit: RateLimit::default(),
            sources: None,
        }
    }

    fn machine(disks: usize, shares: usize, file: bool, initramfs: bool) -> Machine {
        Machine {
            vcpus: 1,
            memory: Memory { size: 1 << 20, file: file.then(null), private: false },
            kernel: null(),
            initramfs: initramfs.then(null),
            command_line: String::new(),
            console: None,
            vsock: Some(Vsock { guest_cid: 3, listener: null(), guest_streams: null() }),
            disks: (0..disks).map(|n| Disk { serial: n.to_string(), file: null(), read_only: true }).collect(),
            shares: (0..shares).map(|n| Share { tag: n.to_string(), server: null() }).collect(),
            networks: (1..shares).map(network).collect(),
            empty_network_slots: 2,
        }
    }

    proptest! {
        #[test]
        fn every_index_names_the_descriptor_that_stood_in_its_place(
            disks in 0usize..9, shares in 0usize..5, file: bool, initramfs: bool,
        ) {
            let machine = machine(disks, shares, file, initramfs);
            let kernel = machine.kernel.as_raw_fd();
            let serials: Vec<_> = machine.disks.iter().map(|disk| disk.file.as_raw_fd()).collect();
            let servers: Vec<_> = machine.shares.iter().map(|share| share.server.as_raw_fd()).collect();
            let taps: Vec<_> = machine.networks.iter().flat_map(|network| &network.taps).map(|tap| tap.as_raw_fd()).collect();
            let memory = machine.memory.file.as_ref().map(|file| file.as_raw_fd());
            let slots: Vec<_> = machine.network_slots().collect();
            let (config, fds) = machine.into_packet().unwrap();
            let fd = |index: DescriptorIndex| fds[usize::from(index.0)].as_raw_fd();
            prop_assert_eq!(fd(config.kernel), kernel);
            prop_assert_eq!(config.memory.file.map(fd), memory);
            prop_assert_eq!(config.disks.iter().map(|disk| fd(disk.file)).collect::<Vec<_>>(), serials);
            prop_assert_eq!(config.shares.iter().map(|share| fd(share.server)).collect::<Vec<_>>(), servers);
            let places = config.networks.iter().flat_map(|network| &network.taps);
            prop_assert_eq!(places.map(|tap| fd(*tap)).collect::<Vec<_>>(), taps);
            let all: Vec<_> = config.network_slots().collect();
            prop_assert_eq!((slots.len(), all.len()), (config.networks.len(), slots.len() + 2));
            prop_assert_eq!(&all[..slots.len()], slots);
        }
    }

    #[test]
    fn more_descriptors_than_a_packet_takes_are_refused_by_number() {
        let refused = machine(70, 0, false, false).into_packet().unwrap_err();
        assert!(refused.to_string().contains("73 descriptors"), "{refused}");
    }
}
