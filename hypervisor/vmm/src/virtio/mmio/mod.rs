//! The virtio-mmio transport: joins a device, its registers, its queues and its interrupt.
//!
//! ```text
//!   vCPU threads                              device thread
//!     register write ──► [lock] Registers       │
//!     register read ══► page (no exit)          │
//!       DRIVER_OK, reset ─────── wake ─────────►│ apply_status: device.reset, activate
//!     QueueNotify ═══ ioeventfd (no exit) ═════►│ device.queue_ready
//!     InterruptACK, 1 ══ ioeventfd, never read  │ device.descriptor_ready
//!     ◄═══════════════ irqfd ═══════════════════│ one interrupt, if any completed chain needs it
//! ```
//!
//! A reset takes effect in the very register write: the queues are gone when the vCPU goes on, so nothing can touch
//! guest memory any more; device.reset is called before anything else of the device. Activation may happen a little
//! after the write, which no driver can tell from a slow device.
//!
//! **Interrupts** are edges on an IOAPIC pin of their own, so that none has to be taken back. The acknowledgement of a used
//! buffer is then of no use to anybody, but Linux writes it after each interrupt; an ioeventfd that nobody reads swallows it inside
//! KVM. So this cause, once given, stays readable in InterruptStatus, and a driver looks at its used rings at each interrupt, as it
//! does anyway. The other cause, a changed configuration, is rare, and a driver that found it each time would read its
//! configuration each time: what acknowledges that one comes out to this process, and takes it away.
//!
//! **A changed configuration** is written to the page between two changes of ConfigGeneration, then the driver is interrupted. One that
//! reads meanwhile sees another generation afterwards, or reads once more because of the interrupt.

mod page;
mod registers;

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering, fence},
    },
};

use caisson_protos::monitor::NetworkStats;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use kvm_ioctls::IoEventAddress;
use slog::Logger;
use virtio_bindings::{
    virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY},
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::registers::{Effect, QueueRegisters};
pub use self::{
    page::{RegisterPage, RegisterPages},
    registers::Registers,
};
use super::{Context, DeviceError, GuestMemory, Poll, PollToken, QueueError, VirtQueue, VirtioDevice};

/// The size of one device's register page.
pub const REGISTERS_SIZE: u64 = 4096;
/// Failures of one device beyond this number are counted, not logged: a guest can produce them without end.
const MAX_LOGGED_FAILURES: u64 = 8;

/// One device on the bus.
pub struct MmioDevice {
    name: &'static str,
    memory: GuestMemory,
    log: Logger,
    notify: Vec<EventFd>,
    acknowledge: EventFd,
    /// A register write asks for a reset or activation of the device.
    wake: EventFd,
    interrupt: EventFd,
    page: RegisterPage,
    notifications: AtomicU64,
    interrupts: AtomicU64,
    guest_faults: AtomicU64,
    failures: AtomicU64,
    inner: Mutex<Inner>,
}

struct Inner {
    registers: Registers,
    device: Box<dyn VirtioDevice>,
    /// Exists while the device is active.
    queues: Option<Vec<VirtQueue>>,
    /// The device was active when the driver reset it, and device.reset is still to be called.
    reset_due: bool,
}

/// Counters of one device.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceStats {
    /// Queue notifications handled.
    pub notifications: u64,
    /// Interrupts sent.
    pub interrupts: u64,
    /// Malformed requests and register accesses.
    pub guest_faults: u64,
    /// Open streams.
    pub streams: u32,
    /// What a network device has moved.
    pub network: Option<NetworkStats>,
}

impl MmioDevice {
    /// Puts `device` behind a register block, which is not in `page` yet ([`Self::publish`]), nor connected to KVM
    /// ([`Self::connect`]).
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        page: RegisterPage,
        memory: GuestMemory,
        log: Logger,
    ) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let registers = Registers::new(device.device_id(), device.features(), device.queue_sizes());
        Ok(Self {
            name: device.name(),
            memory,
            log,
            notify: device.queue_sizes().iter().map(|_| event()).collect::<Result<_, _>>()?,
            acknowledge: event()?,
            wake: event()?,
            interrupt: event()?,
            page,
            notifications: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
            guest_faults: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            inner: Mutex::new(Inner { registers, device, queues: None, reset_due: false }),
        })
    }

    /// Shows the guest the device: from here on a driver may use it.
    pub fn publish(&self) {
        let inner = self.lock();
        self.page.publish_config(|config| inner.device.read_config(0, config));
        fence(Ordering::SeqCst);
        self.page.publish(&inner.registers);
    }

    /// Joins notifications and interrupt to the machine: registers at `base`, interrupt `irq`. All of them, or none.
    ///
    /// # Errors
    /// KVM's.
    pub fn connect(&self, vm: &kvm_ioctls::VmFd, base: GuestAddress, irq: u32) -> io::Result<()> {
        let connected = vm.register_irqfd(&self.interrupt, irq).and_then(|()| {
            self.notifications(base).try_for_each(|(event, at, value)| vm.register_ioevent(event, &at, value))
        });
        if connected.is_err() {
            // What was not joined cannot be parted, which is the only error here.
            let _ = self.disconnect(vm, base, irq);
        }
        Ok(connected?)
    }

    /// Undoes [`Self::connect`].
    ///
    /// # Errors
    /// KVM's first; the rest is undone all the same.
    pub fn disconnect(&self, vm: &kvm_ioctls::VmFd, base: GuestAddress, irq: u32) -> io::Result<()> {
        let mut result = vm.unregister_irqfd(&self.interrupt, irq);
        for (event, at, value) in self.notifications(base) {
            result = result.and(vm.unregister_ioevent(event, &at, value));
        }
        Ok(result?)
    }

    /// The register writes that KVM turns into events, each with its address and value.
    fn notifications(&self, base: GuestAddress) -> impl Iterator<Item = (&EventFd, IoEventAddress, u32)> {
        let at = move |register: u32| IoEventAddress::Mmio(base.0 + u64::from(register));
        let queues = (0u32..).zip(&self.notify).map(move |(index, event)| (event, at(VIRTIO_MMIO_QUEUE_NOTIFY), index));
        queues.chain([(&self.acknowledge, at(VIRTIO_MMIO_INTERRUPT_ACK), VIRTIO_MMIO_INT_VRING)])
    }

    /// The device's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What happened so far.
    pub fn stats(&self) -> DeviceStats {
        let (streams, network) = {
            let inner = self.lock();
            (inner.device.open_streams(), inner.device.network_stats())
        };
        DeviceStats {
            notifications: self.notifications.load(Ordering::Relaxed),
            interrupts: self.interrupts.load(Ordering::Relaxed),
            guest_faults: self.guest_faults.load(Ordering::Relaxed),
            streams,
            network,
        }
    }

    /// Whether the device holds bytes of the guest for somebody who is slow to read them.
    pub fn has_undelivered(&self) -> bool {
        self.lock().device.has_undelivered()
    }

    /// Whether a driver uses it.
    pub fn is_live(&self) -> bool {
        self.lock().registers.is_live()
    }

    /// Reports to the driver whether there is a link; false if the device is of a kind that has none.
    pub fn set_link(&self, up: bool) -> bool {
        let mut inner = self.lock();
        let has_link = inner.device.set_link(up);
        self.publish_config_change(&mut inner);
        has_link
    }

    /// A vCPU writes `data` at `offset` of the register page.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // No device has a configuration space that a driver could write.
        let Ok(word) = <[u8; 4]>::try_from(data) else { return self.count_fault() };
        let mut inner = self.lock();
        let effect = inner.registers.write(offset, u32::from_le_bytes(word));
        self.page.publish(&inner.registers);
        match effect {
            Effect::None => {}
            Effect::Refused => self.count_fault(),
            Effect::Activate => signal(&self.wake),
            Effect::Reset => {
                if inner.queues.take().is_some() {
                    inner.reset_due = true;
                    signal(&self.wake);
                }
                self.page.interrupt_status(|status| status.store(0, Ordering::Release));
            }
            // Comes here only if it was not written as one aligned word.
            Effect::Notify(queue) => self.notify.get(usize::from(queue)).into_iter().for_each(signal),
            Effect::Acknowledge(causes) => {
                self.page.interrupt_status(|status| {
                    status.fetch_and(!(causes & VIRTIO_MMIO_INT_CONFIG), Ordering::AcqRel);
                });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count_fault(&self) {
        self.guest_faults.fetch_add(1, Ordering::Relaxed);
    }

    fn send_interrupt(&self, cause: u32) {
        self.page.interrupt_status(|status| {
            status.fetch_or(cause, Ordering::AcqRel);
        });
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        signal(&self.interrupt);
    }

    /// Brings the device to where the registers are: reset, then active. Whether there was a reset.
    fn apply_status(&self, inner: &mut Inner, poll: &mut dyn Poll) -> bool {
        let reset = std::mem::take(&mut inner.reset_due);
        if reset {
            inner.device.reset(poll);
            self.publish_config_change(inner);
        }
        if inner.registers.is_live() && inner.queues.is_none() {
            let queues = inner.registers.queues().iter().enumerate();
            match queues.map(|(index, queue)| self.build_queue(inner, index, queue)).collect() {
                Ok(queues) => inner.queues = Some(queues),
                Err(error) => {
                    self.fail(inner, poll, &error);
                    return reset;
                }
            }
            self.call(inner, poll, |device, context| {
                device.activate(context)?;
                // Notifications before DRIVER_OK had no effect.
                (0..context.queues.len()).try_for_each(|queue| device.queue_ready(context, queue))
            });
        }
        reset
    }

    fn build_queue(&self, inner: &Inner, index: usize, registers: &QueueRegisters) -> Result<VirtQueue, DeviceError> {
        let mut virt_queue = VirtQueue::new(registers.max_size)?;
        if !registers.ready && !inner.device.needs_queue(index) {
            return Ok(virt_queue);
        }
        let queue = virt_queue.registers_mut();
        set_rings(queue, registers).map_err(QueueError::from)?;
        queue.set_event_idx(inner.registers.accepted_features() & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_ready(registers.ready);
        if virt_queue.is_usable(&self.memory) {
            Ok(virt_queue)
        } else {
            Err(DeviceError::Protocol("DRIVER_OK with a queue that is not ready or lies outside memory"))
        }
    }

    /// One call of an active device, with everything that follows from it.
    fn call(
        &self,
        inner: &mut Inner,
        poll: &mut dyn Poll,
        call: impl FnOnce(&mut dyn VirtioDevice, &mut Context) -> Result<(), DeviceError>,
    ) {
        let Some(queues) = inner.queues.as_deref_mut() else { return };
        let mut guest_faults = 0;
        let mut context = Context {
            memory: &self.memory,
            queues,
            poll: &mut *poll,
            features: inner.registers.accepted_features(),
            guest_faults: &mut guest_faults,
        };
        let result = call(inner.device.as_mut(), &mut context).and_then(|()| self.interrupt_if_due(queues));
        self.guest_faults.fetch_add(guest_faults, Ordering::Relaxed);
        self.publish_config_change(inner);
        if let Err(error) = result {
            self.fail(inner, poll, &error);
        }
    }

    fn interrupt_if_due(&self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        let mut due = false;
        for (queue, notify) in queues.iter_mut().zip(&self.notify) {
            due |= queue.take_signal(&self.memory)?;
            if queue.take_call_again() {
                signal(notify);
            }
        }
        if due {
            self.send_interrupt(VIRTIO_MMIO_INT_VRING);
        }
        Ok(())
    }

    /// Shows the driver a configuration space that has changed, and interrupts it.
    fn publish_config_change(&self, inner: &mut Inner) {
        if !inner.device.take_config_change() {
            return;
        }
        inner.registers.next_config_generation();
        self.page.publish(&inner.registers);
        fence(Ordering::SeqCst);
        self.page.publish_config(|config| inner.device.read_config(0, config));
        fence(Ordering::SeqCst);
        inner.registers.next_config_generation();
        self.page.publish(&inner.registers);
        if inner.registers.is_live() {
            self.send_interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn fail(&self, inner: &mut Inner, poll: &mut dyn Poll, error: &DeviceError) {
        self.count_fault();
        if self.failures.fetch_add(1, Ordering::Relaxed) < MAX_LOGGED_FAILURES {
            slog::warn!(self.log, "device stopped until its driver resets it"; "device" => self.name, "error" => %error);
        }
        inner.device.reset(poll);
        inner.queues = None;
        inner.registers.set_needs_reset();
        self.publish_config_change(inner);
        self.page.publish(&inner.registers);
        self.send_interrupt(VIRTIO_MMIO_INT_CONFIG);
    }

    fn handle(&self, fd: RawFd, token: PollToken, events: EventSet, poll: &mut dyn Poll) {
        let mut inner = self.lock();
        let reset = self.apply_status(&mut inner, poll);
        if fd == self.wake.as_raw_fd() {
            let _ = self.wake.read();
        } else if let Some((queue, event)) = self.notify.iter().enumerate().find(|(_, event)| event.as_raw_fd() == fd) {
            // The counter says how often the driver notified since the last time.
            self.notifications.fetch_add(event.read().unwrap_or(0), Ordering::Relaxed);
            self.call(&mut inner, poll, |device, context| device.queue_ready(context, queue));
        } else if !reset {
            self.call(&mut inner, poll, |device, context| device.descriptor_ready(context, token, events));
        }
        // After a reset, the event is of a descriptor that the device watched before, and its number may mean another one
        // now. What is true of that one will be reported: epoll does so for each descriptor that is added.
    }
}

/// Size and places, checked for alignment; whether they lie in memory is checked later.
fn set_rings(queue: &mut Queue, registers: &QueueRegisters) -> Result<(), virtio_queue::Error> {
    queue.try_set_size(u16::try_from(registers.size).map_err(|_| virtio_queue::Error::InvalidSize)?)?;
    queue.try_set_desc_table_address(GuestAddress(registers.descriptors))?;
    queue.try_set_avail_ring_address(GuestAddress(registers.available))?;
    queue.try_set_used_ring_address(GuestAddress(registers.used))
}

/// Writing 1 to an eventfd fails only when its counter is full, and then it is ready anyway.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}

/// A device on the event loop.
pub struct DeviceEvents {
    device: std::sync::Arc<MmioDevice>,
    /// The first of its own descriptors that could not be watched.
    failure: Option<event_manager::Error>,
    /// Watches that rest: taken out of epoll, because it reports hang-ups even to those who ask for nothing.
    resting: BTreeSet<RawFd>,
}

impl DeviceEvents {
    /// Ready to be added to an event manager.
    pub fn new(device: std::sync::Arc<MmioDevice>) -> Self {
        Self { device, failure: None, resting: BTreeSet::new() }
    }

    /// Why the device cannot be served, if it was added to an event manager in vain.
    pub fn take_failure(&mut self) -> Option<event_manager::Error> {
        self.failure.take()
    }
}

impl MutEventSubscriber for DeviceEvents {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let mut watches = Watches { ops, resting: &mut self.resting };
        self.device.handle(events.fd(), events.data(), events.event_set(), &mut watches);
    }

    fn init(&mut self, ops: &mut EventOps) {
        for event in self.device.notify.iter().chain([&self.device.wake]) {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                self.failure.get_or_insert(error);
            }
        }
    }
}

struct Watches<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    resting: &'a mut BTreeSet<RawFd>,
}

impl Poll for Watches<'_, '_> {
    fn add(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        if events.is_empty() {
            self.resting.insert(fd);
            return Ok(());
        }
        self.ops.add(Events::with_data_raw(fd, token, events)).map_err(io::Error::other)
    }

    fn modify(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        if self.resting.remove(&fd) {
            return self.add(fd, token, events);
        }
        if events.is_empty() {
            self.remove(fd);
            self.resting.insert(fd);
            return Ok(());
        }
        self.ops.modify(Events::with_data_raw(fd, token, events)).map_err(io::Error::other)
    }

    fn remove(&mut self, fd: RawFd) {
        if !self.resting.remove(&fd) {
            let _ = self.ops.remove(Events::empty_raw(fd));
        }
    }
}

#[cfg(test)]
mod tests;
