//! The transport with real devices behind it, against drivers that do anything in any order; without KVM: register
//! accesses are calls, notifications are events.

use std::os::fd::OwnedFd;

use proptest::prelude::*;
use rustix::event::Timespec;
use virtio_bindings::virtio_mmio::*;
use vm_memory::Bytes;

use super::*;
use crate::virtio::{
    block::{Backing, Block},
    rng::Rng,
    testing::Watched,
};

const MEMORY: usize = 0x8000;
const TABLE: u32 = 0x1000;
const AVAILABLE: u32 = 0x2000;
const USED: u32 = 0x3000;
const BUFFER: u32 = 0x4000;

struct Machine {
    device: MmioDevice,
    memory: GuestMemory,
    poll: Watched,
}

impl Machine {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let log = Logger::root(slog::Discard, slog::o!());
        let page = RegisterPages::new(1).unwrap().page(0).unwrap();
        let device = MmioDevice::new(device, page, memory.clone(), log).unwrap();
        device.publish();
        Self { device, memory, poll: Watched::default() }
    }

    fn rng() -> Self {
        Self::new(Box::new(Rng))
    }

    fn write(&self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    fn read(&self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.device.page.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// What the event loop would do now.
    fn serve(&mut self) {
        let device = &self.device;
        let ready = |event: &EventFd| {
            let pending = event.read().is_ok();
            if pending {
                event.write(1).unwrap();
            }
            pending
        };
        for event in device.notify.iter().chain([&device.wake]) {
            if ready(event) {
                device.handle(event.as_raw_fd(), 0, EventSet::IN, &mut self.poll);
            }
        }
        self.serve_descriptors(Timespec::default());
    }

    /// Waits for one of the device's own descriptors until `timeout`; false if none was ready.
    fn serve_descriptors(&mut self, timeout: Timespec) -> bool {
        let ready = self.poll.ready(timeout);
        for (fd, token) in &ready {
            self.device.handle(*fd, *token, EventSet::IN, &mut self.poll);
        }
        !ready.is_empty()
    }

    fn notify(&mut self, queue: usize) {
        if let Some(event) = self.device.notify.get(queue) {
            event.write(1).unwrap();
        }
        self.serve();
    }

    /// A driver that keeps the rules, up to the last step.
    fn set_up(&self, event_index: bool) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.write(VIRTIO_MMIO_STATUS, 1);
        self.write(VIRTIO_MMIO_STATUS, 3);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, if event_index { 1 << VIRTIO_RING_F_EVENT_IDX } else { 0 });
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
        self.write(VIRTIO_MMIO_STATUS, 11);
        self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(VIRTIO_MMIO_QUEUE_NUM, 8);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, TABLE);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, USED);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn go_live(&mut self) {
        self.set_up(false);
        self.write(VIRTIO_MMIO_STATUS, 15);
        self.serve();
    }

    /// One writable buffer of 64 bytes, made available as number `n`.
    fn offer(&self, n: u16) {
        self.memory.write_obj(u64::from(BUFFER), GuestAddress(TABLE.into())).unwrap();
        self.memory.write_obj(64u32, GuestAddress(u64::from(TABLE) + 8)).unwrap();
        self.memory.write_obj(2u16, GuestAddress(u64::from(TABLE) + 12)).unwrap();
        self.memory.write_obj(0u16, GuestAddress(u64::from(AVAILABLE) + 4 + u64::from(n % 8) * 2)).unwrap();
        self.memory.write_obj(n + 1, GuestAddress(u64::from(AVAILABLE) + 2)).unwrap();
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(u64::from(USED) + 2)).unwrap()
    }

    fn all_memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

#[test]
fn a_request_is_served_and_interrupts_once() {
    let mut machine = Machine::rng();
    machine.go_live();
    machine.offer(0);
    machine.notify(0);
    assert_eq!(machine.used(), 1);
    assert_eq!(machine.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    assert_eq!(machine.device.interrupt.read().unwrap(), 1);
    let stats = machine.device.stats();
    assert_eq!((stats.notifications, stats.interrupts, stats.guest_faults), (1, 1, 0));
}

#[test]
fn what_was_offered_before_driver_ok_is_served_without_a_notification() {
    let mut machine = Machine::rng();
    machine.set_up(true);
    machine.offer(0);
    machine.notify(0);
    assert_eq!(machine.used(), 0);
    machine.write(VIRTIO_MMIO_STATUS, 15);
    machine.serve();
    assert_eq!(machine.used(), 1);
}

#[test]
fn nothing_touches_memory_after_a_reset() {
    let mut machine = Machine::rng();
    machine.go_live();
    machine.offer(0);
    machine.device.notify[0].write(1).unwrap();
    machine.write(VIRTIO_MMIO_STATUS, 0);
    let before = machine.all_memory();
    machine.serve();
    machine.notify(0);
    assert!(machine.all_memory() == before);
    assert_eq!(machine.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    // And it works again afterwards.
    machine.go_live();
    assert_eq!(machine.used(), 1);
}

#[test]
fn a_live_queue_stays_where_it_is() {
    let mut machine = Machine::rng();
    machine.go_live();
    machine.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    for register in
        [VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH]
    {
        machine.write(register, 0x5000);
    }
    machine.write(VIRTIO_MMIO_QUEUE_READY, 0);
    machine.offer(0);
    machine.notify(0);
    assert_eq!(machine.used(), 1, "the old rings are in use");
    assert_eq!(machine.device.stats().guest_faults, 5);
}

#[test]
fn queues_that_do_not_lie_in_memory_need_a_reset() {
    for (register, value) in [
        (VIRTIO_MMIO_QUEUE_DESC_LOW, MEMORY as u32 - 16),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1008),
        (VIRTIO_MMIO_QUEUE_USED_HIGH, 1),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2001),
        (VIRTIO_MMIO_QUEUE_NUM, 3),
        (VIRTIO_MMIO_QUEUE_NUM, 16),
        (VIRTIO_MMIO_QUEUE_NUM, 0x1_0008),
    ] {
        let mut machine = Machine::rng();
        machine.set_up(false);
        machine.write(VIRTIO_MMIO_QUEUE_READY, 0);
        machine.write(register, value);
        machine.write(VIRTIO_MMIO_QUEUE_READY, 1);
        machine.write(VIRTIO_MMIO_STATUS, 15);
        machine.serve();
        assert_eq!(machine.read(VIRTIO_MMIO_STATUS), 15 | 64, "{register:#x} {value:#x}");
        assert_eq!(machine.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    }
    let mut machine = Machine::rng();
    machine.set_up(false);
    machine.write(VIRTIO_MMIO_QUEUE_READY, 0);
    machine.write(VIRTIO_MMIO_STATUS, 15);
    machine.serve();
    assert_eq!(machine.read(VIRTIO_MMIO_STATUS), 15 | 64, "a queue that is not ready");
}

#[test]
fn a_malformed_chain_stops_the_device_until_the_reset() {
    let mut machine = Machine::rng();
    machine.go_live();
    machine.offer(0);
    machine.memory.write_obj(u64::MAX, GuestAddress(TABLE.into())).unwrap();
    machine.notify(0);
    assert_eq!(machine.read(VIRTIO_MMIO_STATUS), 15 | 64);
    machine.offer(1);
    machine.notify(0);
    assert_eq!(machine.used(), 0);
    machine.memory.write_slice(&[0; 0x1000], GuestAddress(AVAILABLE.into())).unwrap();
    machine.go_live();
    machine.offer(0);
    machine.notify(0);
    assert_eq!(machine.used(), 1);
}

/// Watches a descriptor while it is active, and counts its events.
struct Listener {
    event: EventFd,
    heard: std::sync::Arc<AtomicU64>,
}

impl VirtioDevice for Listener {
    fn name(&self) -> &'static str {
        "listener"
    }
    fn device_id(&self) -> u32 {
        99
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }
    fn activate(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        context.poll.add(self.event.as_raw_fd(), 7, EventSet::IN).unwrap();
        Ok(())
    }
    fn queue_ready(&mut self, _: &mut Context, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    fn descriptor_ready(&mut self, _: &mut Context, token: PollToken, _: EventSet) -> Result<(), DeviceError> {
        self.heard.fetch_add(token.into(), Ordering::Relaxed);
        Ok(())
    }
    fn reset(&mut self, poll: &mut dyn Poll) {
        poll.remove(self.event.as_raw_fd());
    }
}

#[test]
fn what_epoll_reported_before_a_reset_is_not_for_the_device_after_it() {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let heard = std::sync::Arc::new(AtomicU64::new(0));
    let fd = event.as_raw_fd();
    let mut machine = Machine::new(Box::new(Listener { event, heard: heard.clone() }));
    machine.go_live();
    machine.device.handle(fd, 7, EventSet::IN, &mut machine.poll);
    assert_eq!(heard.load(Ordering::Relaxed), 7);
    // Epoll has reported it; before the loop comes to it, the driver resets the device and sets it up again.
    machine.set_up(false);
    machine.write(VIRTIO_MMIO_STATUS, 15);
    machine.device.handle(fd, 7, EventSet::IN, &mut machine.poll);
    assert_eq!(heard.load(Ordering::Relaxed), 7);
    machine.device.handle(fd, 7, EventSet::IN, &mut machine.poll);
    assert_eq!(heard.load(Ordering::Relaxed), 14);
}

#[test]
fn a_descriptor_that_cannot_be_watched_is_reported() {
    use event_manager::{EventManager, SubscriberOps};
    let device = std::sync::Arc::new(Machine::rng().device);
    let mut events = EventManager::<DeviceEvents>::new().unwrap();
    let first = events.add_subscriber(DeviceEvents::new(device.clone()));
    assert!(events.subscriber_mut(first).unwrap().take_failure().is_none());
    let again = events.add_subscriber(DeviceEvents::new(device));
    assert!(events.subscriber_mut(again).unwrap().take_failure().is_some());
}

#[test]
fn a_disk_that_hangs_holds_neither_its_registers_nor_the_loop() {
    struct Hung(std::sync::mpsc::Receiver<()>, std::sync::mpsc::Sender<()>);
    impl Backing for Hung {
        fn read_at(&self, data: &mut [u8], _: u64) -> io::Result<usize> {
            self.1.send(()).unwrap();
            self.0.recv().unwrap();
            data.fill(0xee);
            Ok(data.len())
        }
        fn write_at(&self, data: &[u8], _: u64) -> io::Result<usize> {
            Ok(data.len())
        }
        fn fallocate(&self, _: rustix::fs::FallocateFlags, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }
    let (release, hang) = std::sync::mpsc::channel();
    let (reading, read_begun) = std::sync::mpsc::channel();
    let log = Logger::root(slog::Discard, slog::o!());
    let disk = Block::new(Hung(hang, reading), 1 << 20, "", false, log).unwrap();
    let mut machine = Machine::new(Box::new(disk));
    machine.go_live();
    // A read of 512 bytes: header, data, status.
    let descriptor = |n: u64, address: u32, len: u32, flags: u16| {
        let at = u64::from(TABLE) + n * 16;
        machine.memory.write_obj(u64::from(address), GuestAddress(at)).unwrap();
        machine.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        machine.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        machine.memory.write_obj(n as u16 + 1, GuestAddress(at + 14)).unwrap();
    };
    descriptor(0, BUFFER, 16, 1);
    descriptor(1, BUFFER + 0x1000, 512, 3);
    descriptor(2, BUFFER + 0x2000, 1, 2);
    machine.memory.write_obj(0u16, GuestAddress(u64::from(AVAILABLE) + 4)).unwrap();
    machine.memory.write_obj(1u16, GuestAddress(u64::from(AVAILABLE) + 2)).unwrap();
    machine.notify(0);
    read_begun.recv().unwrap();
    // The file hangs now; the driver gives up.
    machine.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(machine.read(VIRTIO_MMIO_STATUS), 0);
    let before = machine.all_memory();
    machine.serve();
    machine.set_up(false);
    machine.write(VIRTIO_MMIO_STATUS, 15);
    machine.serve();
    // The same request again, for the new life; the second answer of the file is its own.
    read_begun.try_recv().unwrap_err();
    release.send(()).unwrap();
    read_begun.recv().unwrap();
    assert!(machine.all_memory() == before, "the first answer came too late and is not in guest memory");
    release.send(()).unwrap();
    while machine.used() == 0 {
        assert!(machine.serve_descriptors(Timespec { tv_sec: 60, tv_nsec: 0 }), "the second answer");
    }
    assert_eq!(machine.memory.read_obj::<u8>(GuestAddress(u64::from(BUFFER) + 0x1000)).unwrap(), 0xee);
}

/// Counts what it takes from its two queues, of which it needs the first.
struct Optional;

impl VirtioDevice for Optional {
    fn name(&self) -> &'static str {
        "optional"
    }
    fn device_id(&self) -> u32 {
        1
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 8]
    }
    fn needs_queue(&self, queue: usize) -> bool {
        queue == 0
    }
    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        let turn = crate::virtio::Turn { chains: 8, bytes: 8 };
        crate::virtio::serve(context, queue, turn, |_, _| Ok(crate::virtio::Served::Written(0)))?;
        Ok(())
    }
}

#[test]
fn a_queue_that_the_device_does_not_need_may_be_left_out() {
    let mut machine = Machine::new(Box::new(Optional));
    machine.go_live();
    assert_eq!(machine.read(VIRTIO_MMIO_STATUS), 15);
    machine.offer(0);
    let before = machine.all_memory();
    machine.notify(1);
    assert!(machine.all_memory() == before, "the other one is no queue");
    machine.notify(0);
    assert_eq!(machine.used(), 1);
    // The first one is needed.
    machine.write(VIRTIO_MMIO_STATUS, 0);
    machine.set_up(false);
    machine.write(VIRTIO_MMIO_QUEUE_READY, 0);
    machine.write(VIRTIO_MMIO_STATUS, 15);
    machine.serve();
    assert_eq!(machine.read(VIRTIO_MMIO_STATUS), 15 | 64);
}

/// Has a link, which is the first byte of its configuration space.
struct Linked {
    up: bool,
    changed: bool,
}

impl VirtioDevice for Linked {
    fn name(&self) -> &'static str {
        "linked"
    }
    fn device_id(&self) -> u32 {
        99
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config_bytes(&[self.up.into()], offset, data);
    }
    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        // The driver's requests switch the link as well.
        let turn = crate::virtio::Turn { chains: 8, bytes: 8 };
        crate::virtio::serve(context, queue, turn, |_, _| {
            (self.up, self.changed) = (!self.up, true);
            Ok(crate::virtio::Served::Written(0))
        })?;
        Ok(())
    }
    fn set_link(&mut self, up: bool) -> bool {
        self.changed |= self.up != up;
        self.up = up;
        true
    }
    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}

#[test]
fn a_changed_configuration_is_shown_and_interrupts_until_it_is_acknowledged() {
    let mut machine = Machine::new(Box::new(Linked { up: true, changed: false }));
    let config = |machine: &Machine| {
        (
            machine.read(VIRTIO_MMIO_CONFIG),
            machine.read(VIRTIO_MMIO_CONFIG_GENERATION),
            machine.read(VIRTIO_MMIO_INTERRUPT_STATUS),
        )
    };
    assert_eq!(config(&machine), (1, 0, 0));
    // Nobody to be interrupted yet.
    assert!(machine.device.set_link(false));
    assert_eq!(config(&machine), (0, 2, 0));
    machine.go_live();
    assert!(machine.device.set_link(false));
    assert_eq!(config(&machine), (0, 2, 0), "nothing has changed");
    assert!(machine.device.interrupt.read().is_err());

    assert!(machine.device.set_link(true));
    assert_eq!(config(&machine), (1, 4, VIRTIO_MMIO_INT_CONFIG));
    assert_eq!(machine.device.interrupt.read().unwrap(), 1);
    machine.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(config(&machine), (1, 4, 0));

    // Together with a used buffer, which stays: its acknowledgement alone is swallowed by KVM.
    machine.offer(0);
    machine.notify(0);
    assert_eq!(config(&machine), (0, 6, VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG));
    machine.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(config(&machine), (0, 6, VIRTIO_MMIO_INT_VRING));

    // A reset takes no generation back, by which a driver would miss a change.
    machine.write(VIRTIO_MMIO_STATUS, 0);
    machine.serve();
    assert_eq!(config(&machine), (0, 6, 0));
    assert_eq!(machine.device.stats().guest_faults, 0);
    assert!(!Machine::rng().device.set_link(false), "a device that has no link");
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Poke(u16, Vec<u8>),
    Offer(u16),
    SetUp(bool),
    Live,
    Notify(usize),
    Serve,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || prop_oneof![6 => (0u64..0x50).prop_map(|n| n * 4), 1 => 0u64..0x1000, 1 => any::<u64>()];
    let value = prop_oneof![
        3 => (0u32..16).prop_map(|n| n.to_le_bytes().to_vec()),
        2 => prop_oneof![Just(TABLE), Just(USED), Just(0x7ff0)].prop_map(|n| n.to_le_bytes().to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..9),
    ];
    let step = prop_oneof![
        6 => (place(), value).prop_map(|(at, data)| Step::Write(at, data)),
        2 => (place(), 0usize..9).prop_map(|(at, len)| Step::Read(at, len)),
        4 => (0x1000u16..0x3100, proptest::collection::vec(any::<u8>(), 0..32)).prop_map(|(at, data)| Step::Poke(at, data)),
        4 => (0u16..9).prop_map(Step::Offer),
        2 => any::<bool>().prop_map(Step::SetUp),
        2 => Just(Step::Live),
        4 => (0usize..2).prop_map(Step::Notify),
        2 => Just(Step::Serve),
    ];
    proptest::collection::vec(step, 0..60)
}

fn block() -> Box<dyn VirtioDevice> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x8000).unwrap();
    let log = Logger::root(slog::Discard, slog::o!());
    Box::new(Block::new(OwnedFd::from(file), 0x8000, "", false, log).unwrap())
}

proptest! {
    #[test]
    fn any_order_of_anything_is_survived(steps in steps(), disk in any::<bool>()) {
        let mut machine = Machine::new(if disk { block() } else { Box::new(Rng) });
        for step in steps {
            match step {
                Step::Write(at, data) => machine.device.write(at, &data),
                Step::Read(at, len) => machine.device.page.read(at, &mut vec![0; len]),
                Step::Poke(at, data) => machine.memory.write_slice(&data, GuestAddress(at.into())).unwrap(),
                Step::Offer(n) => machine.offer(n),
                Step::SetUp(event_index) => machine.set_up(event_index),
                Step::Live => machine.go_live(),
                Step::Notify(queue) => machine.notify(queue),
                Step::Serve => machine.serve(),
            }
            machine.serve();
            let inner = machine.device.lock();
            prop_assert_eq!(inner.queues.is_some(), inner.registers.is_live());
        }
        // A driver that begins anew finds a device that works, whatever was before.
        machine.memory.write_slice(&[0; 0x3000], GuestAddress(0x1000)).unwrap();
        machine.go_live();
        prop_assert_eq!(machine.read(VIRTIO_MMIO_STATUS), 15);
        if !disk {
            machine.offer(0);
            machine.notify(0);
            prop_assert_eq!(machine.used(), 1);
        }
    }
}
