//! A whole machine, built from its description and descriptors, not yet running.
//!
//! The order matters little to the guest but much to errors: what can be checked is checked before anything is asked
//! of KVM, so that a wrong description costs nothing.

mod devices;
mod hotplug;

use std::{io, os::fd::OwnedFd, sync::Arc};

use caisson_protos::{
    guest::Slot,
    monitor::{MachineConfig, MachineStats},
};
use kvm_ioctls::{Kvm, VmFd};
use rustix::fs::{OFlags, fcntl_getfl};
use slog::Logger;
use vm_memory::GuestMemoryBackend;

use crate::{
    boot::{self, BootError, CommandLine, Image},
    bus::{Bus, slot_base},
    descriptors::{Access, DescriptorError, Descriptors},
    end::End,
    kvm::{self, KvmError},
    layout::{SERIAL_IRQ, VIRTIO_IRQS},
    memory::{self, Backing, MemoryError},
    output::Output,
    ports::Ports,
    slots::{NotEmpty, Slots},
    vcpu::{self, Gate, Running, Vcpu, VcpuContext},
    virtio::{
        GuestMemory,
        mmio::{DeviceStats, MmioDevice, RegisterPages},
    },
};

/// The most vCPUs in a machine.
pub const MAX_VCPUS: u8 = 32;
/// The most disks in a machine.
pub const MAX_DISKS: usize = 8;
/// The most shares in a machine.
pub const MAX_SHARES: usize = 4;

/// A machine that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Number of vCPUs.
    #[error("{0} vCPUs: use 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// Number of devices.
    #[error("{count} {what}: use at most {max}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A disk's serial number.
    #[error("serial number {0:?} of a disk: use up to 20 bytes of printable ASCII")]
    Serial(String),
    /// Two disks or shares of one name.
    #[error("duplicate name {name:?} of {what}: use different ones")]
    DuplicateName {
        /// Of what.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A network device.
    #[error("{what}: {problem}")]
    Network {
        /// Which one.
        what: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// No room for another network device.
    #[error(
        "no empty slot for the network device {mac}, the machine has {count} for network devices: detach one of them, or start \
         the machine with more empty_network_slots"
    )]
    NoEmptySlot {
        /// Its address.
        mac: String,
        /// Network slots.
        count: usize,
    },
    /// There is no network device.
    #[error("{slot}: no network device in it: {}", one_of(.occupied))]
    NoNetwork {
        /// Where not.
        slot: Slot,
        /// Where there are some.
        occupied: Vec<Slot>,
    },
    /// The guest may send from any address.
    #[error("{slot}: its network device lets the guest send from any address: attach it with a list of addresses")]
    AnySource {
        /// Where.
        slot: Slot,
    },
    /// A slot that was thought to be empty.
    #[error(transparent)]
    NotEmpty(#[from] NotEmpty),
    /// The guest's context id.
    #[error("guest context id {0}: use 3 to 4294967294")]
    GuestCid(u64),
    /// A console that a vCPU would wait for.
    #[error("console: the descriptor may block: set O_NONBLOCK on it")]
    BlockingConsole,
    /// A descriptor.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs, command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device.
    #[error("{what}: {source}")]
    Device {
        /// Its name.
        what: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A descriptor or thread of our own.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// A machine; the process keeps all of it until its end.
pub struct Machine {
    /// Closing it would take the devices' notifications and interrupts away.
    vm: VmFd,
    /// vCPUs run in it.
    memory: GuestMemory,
    bus: Arc<Bus>,
    /// Those that network devices may have.
    network_slots: Vec<Slot>,
    /// What devices have counted that are gone.
    gone: DeviceStats,
    networks_attached: u64,
    networks_detached: u64,
    gate: Arc<Gate>,
    waiting: Vec<Vcpu>,
    running: Vec<Running>,
}

impl Machine {
    /// Builds it.
    ///
    /// # Errors
    /// See [`MachineError`]; nothing is left behind then.
    pub fn build(kvm: &Kvm, config: &MachineConfig, mut fds: Descriptors, log: &Logger) -> Result<Self, MachineError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(MachineError::Vcpus(config.vcpus));
        }
        let backing = match config.memory.file {
            Some(index) => {
                let access = if config.memory.private { Access::Read } else { Access::ReadWrite };
                let (file, file_size) = fds.file(index, "guest memory", access)?;
                Some(Backing { file, file_size, private: config.memory.private })
            }
            None => None,
        };
        let memory = memory::create(config.memory.size, backing)?;
        let image = |fds: &mut Descriptors, index, what| -> Result<Image, DescriptorError> {
            let (file, size) = fds.file(index, what, Access::Read)?;
            Ok(Image { file: file.into(), size })
        };
        let kernel = image(&mut fds, config.kernel, "kernel")?;
        let initramfs = config.initramfs.map(|index| image(&mut fds, index, "initramfs")).transpose()?;
        let mut command_line = CommandLine::new(&config.command_line).map_err(BootError::from)?;
        let console = match &config.console {
            Some(console) => {
                command_line.add_console(console.early);
                let output = fds.output(console.output, "console")?;
                check_nonblocking(&output)?;
                Some(Output::new(output))
            }
            None => None,
        };
        let devices = devices::build(config, &mut fds, log)?;
        let no_page = |e| MachineError::System { what: "memory for device registers", source: io::Error::other(e) };
        let count = devices.len() + usize::from(config.empty_network_slots);
        let pages = RegisterPages::new(count).map_err(no_page)?;
        let slots = Slots::new(&pages);
        let devices = (0..=u8::MAX)
            .map(Slot)
            .zip(devices)
            .filter_map(|(slot, device)| Some((slot, device, slots.page(slot)?)))
            .map(|(slot, device, page)| Ok((slot, MmioDevice::new(device, page, memory.clone(), log.clone())?)))
            .collect::<io::Result<Vec<_>>>()
            .map_err(system("eventfd for a device"))?;
        fds.finish()?;
        for (slot, irq) in (0..=u8::MAX).map(Slot).zip(VIRTIO_IRQS).take(count) {
            command_line.add_slot(slot_base(slot), irq, slot);
        }
        let entry = boot::load(&memory, &kernel, initramfs.as_ref(), command_line, config.vcpus)?;

        let ports = Ports::new(console).map_err(system("eventfd for the console"))?;
        let vm = kvm::create_machine(kvm, &memory, config.vcpus)?;
        kvm::map_registers(kvm, &vm, memory.num_regions(), &pages)?;
        for ((slot, device), irq) in devices.into_iter().zip(VIRTIO_IRQS) {
            device.connect(&vm, slot_base(slot), irq).map_err(system("connecting a device to KVM"))?;
            slots.put(slot, Arc::new(device))?;
        }
        if let Some(interrupt) = ports.serial_interrupt().map_err(system("eventfd for the console"))? {
            vm.register_irqfd(&interrupt, SERIAL_IRQ).map_err(kvm::call("KVM_IRQFD"))?;
        }
        let waiting = vcpu::create(kvm, &vm, config.vcpus, config.invariant_tsc, entry)?;
        Ok(Self {
            vm,
            memory,
            bus: Arc::new(Bus { ports, slots }),
            network_slots: config.network_slots().collect(),
            gone: DeviceStats::default(),
            networks_attached: 0,
            networks_detached: 0,
            gate: Arc::default(),
            waiting,
            running: Vec::new(),
        })
    }

    /// Ports and devices.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// Whether [`Self::start`] was called.
    pub fn is_started(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Runs the vCPUs.
    ///
    /// # Errors
    /// No more threads; some vCPUs may run then, and the machine is of no use.
    pub fn start(&mut self, end: &Arc<End>) -> Result<(), MachineError> {
        vcpu::install_kick().map_err(system("signal handler"))?;
        for vcpu in std::mem::take(&mut self.waiting) {
            let context = VcpuContext { bus: self.bus.clone(), end: end.clone(), gate: self.gate.clone() };
            self.running.push(vcpu.start(context).map_err(system("thread for a vCPU"))?);
        }
        Ok(())
    }

    /// Stops all vCPUs; returns when none is in the guest any more.
    pub fn pause(&self) {
        self.gate.close();
        self.running.iter().for_each(Running::kick);
        self.gate.wait_for(self.running.len());
    }

    /// Lets them run on.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Whether a device holds bytes of the guest for somebody who is slow to read them.
    pub fn has_undelivered(&self) -> bool {
        self.bus.slots.devices().any(|(_, device)| device.has_undelivered())
    }

    /// What happened so far.
    pub fn stats(&self) -> MachineStats {
        let mut stats = MachineStats {
            vcpu_exits: self.running.iter().map(Running::exits).sum(),
            console_dropped_bytes: self.bus.ports.console_dropped(),
            queue_notifications: self.gone.notifications,
            interrupts: self.gone.interrupts,
            guest_faults: self.gone.guest_faults,
            networks_attached: self.networks_attached,
            networks_detached: self.networks_detached,
            ..Default::default()
        };
        for (slot, device) in self.bus.slots.devices() {
            let device = device.stats();
            stats.queue_notifications += device.notifications;
            stats.interrupts += device.interrupts;
            stats.guest_faults += device.guest_faults;
            stats.vsock_streams += device.streams;
            stats.networks.extend(device.network.map(|network| (slot, network)));
        }
        stats
    }
}

fn one_of(slots: &[Slot]) -> String {
    match slots {
        [] => "the machine has none".into(),
        slots => {
            let numbers: Vec<_> = slots.iter().map(|Slot(number)| number.to_string()).collect();
            format!("use {}", numbers.join(", "))
        }
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::System { what, source }
}

/// A vCPU writes to it, while it holds the serial port.
fn check_nonblocking(output: &OwnedFd) -> Result<(), MachineError> {
    let flags = fcntl_getfl(output).map_err(|error| system("console")(error.into()))?;
    if flags.contains(OFlags::NONBLOCK) { Ok(()) } else { Err(MachineError::BlockingConsole) }
}
