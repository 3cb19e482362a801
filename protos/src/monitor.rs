//! The control socket of caisson-vmm: a SOCK_SEQPACKET Unix socket pair, one message to a packet, descriptors beside
//! it by SCM_RIGHTS.
//!
//! ```text
//! parent                                        caisson-vmm (control socket is descriptor 3)
//!   │ ── Command{id:1, Configure(..)} + fds ──►   │
//!   │ ── Command{id:2, Start} ────────────────►   │   may be sent at once, before the first answer
//!   │ ◄──────── Answer{id:1, Ok(Done)} ─────────  │
//!   │ ◄──────── Answer{id:2, Ok(Done)} ─────────  │   the vCPUs run
//!   │ ── Command{id:3, Pause|Resume|Stats|..} ►   │   answered in order
//!   │ ── Command{id:4, AttachNetwork(..)} + fds►  │
//!   │ ◄──────── Answer{id:4, Ok(Attached{..})} ─  │   the guest finds the device when it binds the slot's driver
//!   │ ◄──────── Exited(ExitNotice) ─────────────  │   once, unasked; then the socket closes and the process ends
//! ```
//!
//! Descriptors are numbered in the order in which they were attached to the packet that mentions them
//! ([`DescriptorIndex`]). When the parent's end closes, caisson-vmm ends at once: a monitor never outlives its pod. A packet
//! that is not a command ends it, too, since nobody could be answered: [`ExitReason::MonitorError`] with the reason.
//!
//! Packets are postcard after one version byte ([`encode`], [`decode`]), at most [`MAX_PACKET`] bytes, with
//! at most [`MAX_DESCRIPTORS`] descriptors.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::guest::Slot;

/// The descriptor on which caisson-vmm finds its control socket.
pub const CONTROL_FD: i32 = 3;
/// Version of everything in this module; the first byte of each packet.
pub const VERSION: u8 = 1;
/// The largest packet, bytes.
pub const MAX_PACKET: usize = 64 * 1024;
/// The most descriptors that one packet carries (Linux allows 253, SCM_MAX_FD in include/net/scm.h).
pub const MAX_DESCRIPTORS: usize = 64;
/// The most network devices that a machine has at once.
pub const MAX_NETWORKS: u8 = 8;
/// The greatest MTU of a network device: what a tap takes (ETH_MAX_MTU less an Ethernet header, drivers/net/tun.c).
pub const MAX_MTU: u16 = 65_521;

/// Index of one of the packet's descriptors, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DescriptorIndex(pub u8);

/// Parent to monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Chosen by the parent, repeated in the answer.
    pub id: u32,
    /// What to do.
    pub request: Request,
}

/// What the parent can ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Build the machine; once, first. Refused if any part of it cannot be had, and then the monitor stays unconfigured.
    Configure(Box<MachineConfig>),
    /// Run the vCPUs of a configured machine.
    Start,
    /// Stop every vCPU and every device between two requests. Answered when all stand still.
    Pause,
    /// Undo Pause.
    Resume,
    /// Count what happened so far.
    Stats,
    /// End the machine now, as if the power failed. The exit notice has [`ExitReason::Requested`].
    Shutdown,
    /// Put a network device into an empty slot of a configured machine, running or not. The guest does not look for it: its driver has to
    /// be bound to the slot. Refused if all network slots are in use.
    AttachNetwork(Box<NetworkConfig>),
    /// Take the network device out of its slot, which is empty then; its tap is closed. The guest's driver should have been unbound
    /// before: one that still waits for an answer of the device waits for good.
    DetachNetwork {
        /// Its slot.
        slot: Slot,
    },
    /// Report to the guest whether a network device has a link. It has one at first, and none once its tap is gone.
    SetLink {
        /// Its slot.
        slot: Slot,
        /// Whether there is a link.
        up: bool,
    },
    /// Change the addresses from which a guest may send through a network device that was made with such a list. Refused for one that was not.
    SetSources {
        /// Its slot.
        slot: Slot,
        /// All addresses from now on.
        sources: AllowedSources,
    },
}

/// Monitor to parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The answer to one [`Command`].
    Answer {
        /// The command's id.
        id: u32,
        /// What came of it. The error is a sentence for the operator: it names the thing, the value and what to do.
        result: Result<Reply, String>,
    },
    /// The machine has ended; the last packet.
    Exited(ExitNotice),
}

/// A successful answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// The answer to [`Request::Stats`].
    Stats(MachineStats),
    /// The answer to [`Request::AttachNetwork`].
    Attached {
        /// Where the device is now.
        slot: Slot,
    },
}

/// A whole machine. Everything comes as a descriptor: the monitor opens no path after its start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// The host keeps its own time by the TSC, so the guest may do so as well if the processor says that its TSC is invariant.
    pub invariant_tsc: bool,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// The kernel: an uncompressed x86-64 ELF vmlinux, readable. Mapped privately, not copied.
    pub kernel: DescriptorIndex,
    /// The initramfs (newc cpio, may be compressed), readable. Mapped privately, not copied.
    pub initramfs: Option<DescriptorIndex>,
    /// The kernel's command line, printable ASCII; the monitor adds `virtio_mmio.device=` for each slot. Together at most 2047 bytes.
    pub command_line: String,
    /// The debug console (a 16550 at I/O port 0x3f8, ttyS0). None: no serial port exists.
    pub console: Option<ConsoleConfig>,
    /// Stream sockets between host and guest.
    pub vsock: Option<VsockConfig>,
    /// Block devices, vda first. At most 8.
    pub disks: Vec<DiskConfig>,
    /// Shared directories. At most 4.
    pub shares: Vec<ShareConfig>,
    /// Network devices. At most [`MAX_NETWORKS`].
    pub networks: Vec<NetworkConfig>,
    /// Empty slots for network devices that are attached later. With `networks` at most [`MAX_NETWORKS`], and with all devices at most 17
    /// ([`crate::guest::MAX_SLOTS`]). Each costs the guest's kernel about 70 us at boot.
    pub empty_network_slots: u8,
}

impl MachineConfig {
    /// The slots of network devices: of those in `networks`, in order, and then the empty ones.
    pub fn network_slots(&self) -> impl Iterator<Item = Slot> + use<> {
        let others = network_slots_begin(self.vsock.is_some(), self.disks.len(), self.shares.len());
        (others..=u8::MAX).map(Slot).take(self.networks.len().saturating_add(self.empty_network_slots.into()))
    }
}

/// The first slot of a network device, behind those of all other devices: entropy, vsock, disks, shares.
pub fn network_slots_begin(vsock: bool, disks: usize, shares: usize) -> u8 {
    // Beyond a machine's slots there is nothing to number.
    u8::try_from(1 + usize::from(vsock) + disks + shares).unwrap_or(u8::MAX)
}

/// Guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// Bytes; a multiple of 4096, at least 32 MiB, at most 1 TiB.
    pub size: u64,
    /// A memfd or file at least as large. None: anonymous private memory.
    pub file: Option<DescriptorIndex>,
    /// Map the file privately (copy on write: the file never changes) instead of shared.
    pub private: bool,
}

/// The debug console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    /// Where the guest's output goes. Written without blocking: what does not fit is dropped and counted.
    pub output: DescriptorIndex,
    /// Add `earlyprintk`, so that output begins before the console driver is up.
    pub early: bool,
}

/// The vsock device ("hybrid": its host side is Unix sockets).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub guest_cid: u64,
    /// Host to guest: a listening SOCK_STREAM Unix socket. A client writes `CONNECT <guest port>\n`, reads
    /// `OK <host port>\n` when the guest has accepted (or finds the socket closed when it has refused), and then owns one stream.
    pub listener: DescriptorIndex,
    /// Guest to host: a SOCK_SEQPACKET Unix socket. For each stream that the guest opens to CID 2 the monitor makes a
    /// SOCK_STREAM pair and sends the parent one packet, [`GuestStream`], with the far end of it attached. The parent
    /// refuses by closing that end. When this socket is full or closed, the guest's request is reset.
    pub guest_streams: DescriptorIndex,
}

/// Announces a stream that the guest opened (see [`VsockConfig::guest_streams`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStream {
    /// The port on the host that the guest asked for.
    pub host_port: u32,
    /// The guest's own port.
    pub guest_port: u32,
}

/// One block device on a raw file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Up to 20 bytes of printable ASCII: the serial number that the guest sees (`/sys/block/vda/serial`).
    pub serial: String,
    /// A regular file or block device, opened without O_DIRECT and, to be written, without O_APPEND. Its size is rounded down to
    /// whole 512-byte sectors. Never probed for a format.
    pub file: DescriptorIndex,
    /// Offered as read-only, and writes are refused whatever the guest sends.
    pub read_only: bool,
}

/// One virtio-fs device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareConfig {
    /// The tag to mount it by, 1 to 36 bytes.
    pub tag: String,
    /// A SOCK_SEQPACKET Unix socket to the file server: one FUSE message to a packet, both ways.
    pub server: DescriptorIndex,
}

/// One network device on a tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The queues of one tap, all attached, non-blocking, with IFF_NO_PI and IFF_VNET_HDR: one for each pair of queues that the guest
    /// may use. 1 to 32; with more than one, IFF_MULTI_QUEUE.
    pub taps: Vec<DescriptorIndex>,
    /// The guest's address on it.
    pub mac: [u8; 6],
    /// 68 to [`MAX_MTU`]. The guest cannot use a greater one.
    pub mtu: u16,
    /// What the guest may send.
    pub send_limit: RateLimit,
    /// What the guest may receive.
    pub receive_limit: RateLimit,
    /// From which addresses the guest may send; its MAC is then fixed. None: from any.
    pub sources: Option<AllowedSources>,
}

/// How much may pass. None: any amount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Bytes.
    pub bytes: Option<TokenBucket>,
    /// Packets, or requests.
    pub operations: Option<TokenBucket>,
}

/// A rate with a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Each second. Not 0.
    pub rate: u64,
    /// At once, after a time without any. Not 0.
    pub burst: u64,
}

/// Addresses that a guest may send from, besides its MAC and the link-local IPv6 address that follows from that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowedSources {
    /// IPv4.
    pub ipv4: Vec<Ipv4Addr>,
    /// IPv6.
    pub ipv6: Vec<Ipv6Addr>,
}

/// Counters since the machine was configured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStats {
    /// Exits from guest to monitor, all vCPUs.
    pub vcpu_exits: u64,
    /// Queue notifications handled, all devices.
    pub queue_notifications: u64,
    /// Interrupts sent by devices.
    pub interrupts: u64,
    /// vsock streams open now.
    pub vsock_streams: u32,
    /// Bytes of console output that were dropped because the descriptor could not take them.
    pub console_dropped_bytes: u64,
    /// Malformed requests of the guest (descriptor chains, registers, packets) that were refused.
    pub guest_faults: u64,
    /// Of each network device that is there now, by its slot.
    pub networks: BTreeMap<Slot, NetworkStats>,
    /// Network devices that were attached after the machine was configured.
    pub networks_attached: u64,
    /// Network devices that were detached.
    pub networks_detached: u64,
}

/// Counters of one network device, as its guest sees the directions. A large packet that is cut on its way counts as its segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStats {
    /// Packets that the guest got.
    pub received_packets: u64,
    /// Bytes of frames that the guest got.
    pub received_bytes: u64,
    /// Packets that the guest had no room for or could not have.
    pub receive_dropped: u64,
    /// Packets for addresses that the guest does not want.
    pub receive_filtered: u64,
    /// Packets that the guest has sent.
    pub sent_packets: u64,
    /// Bytes of frames that the guest has sent.
    pub sent_bytes: u64,
    /// Frames of the guest that were refused, or that the host did not take.
    pub send_dropped: u64,
    /// Those of them that claimed another's address.
    pub spoofed: u64,
}

/// Why the machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitNotice {
    /// The reason.
    pub reason: ExitReason,
    /// More about it in words, for the log.
    pub detail: String,
}

/// The distinct ends of a machine. The number is caisson-vmm's exit status as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ExitReason {
    /// The guest powered off in order ([`crate::guest::POWER_PORT`]).
    PoweredOff = 0,
    /// The parent asked for it, or closed the control socket.
    Requested = 10,
    /// The guest asked for a reset (keyboard controller or port 0xcf9): `reboot`, or a kernel panic with `panic=-1`.
    Reset = 11,
    /// The guest's processor met a triple fault (KVM_EXIT_SHUTDOWN).
    TripleFault = 12,
    /// KVM could not go on with the guest (KVM_EXIT_INTERNAL_ERROR or KVM_EXIT_FAIL_ENTRY).
    KvmError = 13,
    /// The monitor itself failed.
    MonitorError = 14,
}

impl ExitReason {
    /// The words a log line or an error uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PoweredOff => "powered off",
            Self::Requested => "ended on request",
            Self::Reset => "guest reset",
            Self::TripleFault => "triple fault",
            Self::KvmError => "KVM error",
            Self::MonitorError => "monitor error",
        }
    }
}

/// A packet that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Another version of Caisson at the other end.
    #[error("control packet has version {0}, expected {VERSION}: install the parts of one Caisson release together")]
    Version(u8),
    /// A packet without bytes.
    #[error("empty control packet")]
    Empty,
    /// Larger than [`MAX_PACKET`].
    #[error("control packet of {0} bytes exceeds {MAX_PACKET}")]
    TooLarge(usize),
    /// Longer than its message.
    #[error("malformed control packet: {0} bytes follow its message")]
    Trailing(usize),
    /// Not what the type expects.
    #[error("malformed control packet: {0}")]
    Malformed(#[from] postcard::Error),
}

/// Encodes one packet of the control or guest-streams socket.
///
/// # Errors
/// [`CodecError::TooLarge`] if it would not fit into a packet.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let packet = postcard::to_extend(message, vec![VERSION])?;
    if packet.len() > MAX_PACKET { Err(CodecError::TooLarge(packet.len())) } else { Ok(packet) }
}

/// Decodes one packet.
///
/// # Errors
/// Every malformed packet is an error; trailing bytes are, too.
pub fn decode<T: DeserializeOwned>(packet: &[u8]) -> Result<T, CodecError> {
    let (version, body) = packet.split_first().ok_or(CodecError::Empty)?;
    if *version != VERSION {
        return Err(CodecError::Version(*version));
    }
    let (message, rest) = postcard::take_from_bytes(body)?;
    if rest.is_empty() { Ok(message) } else { Err(CodecError::Trailing(rest.len())) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_command_survives_the_wire() {
        let command = Command { id: 7, request: Request::Stats };
        assert_eq!(decode::<Command>(&encode(&command).unwrap()).unwrap(), command);
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let mut packet = encode(&Command { id: 1, request: Request::Start }).unwrap();
        packet[0] = 9;
        assert!(matches!(decode::<Command>(&packet), Err(CodecError::Version(9))));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<Command>(&bytes);
            let _ = decode::<Event>(&bytes);
        }
    }
}
