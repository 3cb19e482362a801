//! The transport with real devices behind it, against drivers that do anything in any order; without KVM: register
//! accesses are calls, notifications are events.

use std::collections::BTreeSet;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;
use vm_memory::Bytes;

use super::*;
use crate::virtio::{block::Block, rng::Rng};

const MEMORY: usize = 0x8000;
const TABLE: u32 = 0x1000;
const AVAILABLE: u32 = 0x2000;
const USED: u32 = 0x3000;
const BUFFER: u32 = 0x4000;

#[derive(Default)]
struct Watched(BTreeSet<RawFd>);

impl Poll for Watched {
    fn add(&mut self, fd: RawFd, _: PollToken, _: EventSet) -> io::Result<()> {
        self.0.insert(fd);
        Ok(())
    }
    fn modify(&mut self, _: RawFd, _: PollToken, _: EventSet) -> io::Result<()> {
        Ok(())
    }
    fn remove(&mut self, fd: RawFd) {
        self.0.remove(&fd);
    }
}

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
        self.device.read(register.into(), &mut bytes);
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
    Box::new(Block::new(file.into(), 0x8000, "", false))
}

proptest! {
    #[test]
    fn any_order_of_anything_is_survived(steps in steps(), disk in any::<bool>()) {
        let mut machine = Machine::new(if disk { block() } else { Box::new(Rng) });
        for step in steps {
            match step {
                Step::Write(at, data) => machine.device.write(at, &data),
                Step::Read(at, len) => machine.device.read(at, &mut vec![0; len]),
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
