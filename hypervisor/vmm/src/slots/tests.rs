//! Slots that are filled and emptied while a guest does anything to them; without KVM: accesses are calls.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use proptest::prelude::*;
use slog::Logger;
use virtio_bindings::virtio_mmio::*;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::{GuestMemory, rng::Rng};

const MAGIC: u32 = 0x7472_6976;
const RNG: u32 = 4;

fn slots(count: usize) -> Slots {
    Slots::new(&RegisterPages::new(count).unwrap())
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap()
}

fn rng(slots: &Slots, slot: Slot) -> Arc<MmioDevice> {
    let log = Logger::root(slog::Discard, slog::o!());
    Arc::new(MmioDevice::new(Box::new(Rng), slots.page(slot).unwrap(), memory(), log).unwrap())
}

fn read(slots: &Slots, slot: Slot, register: u32) -> u32 {
    let mut word = [0; 4];
    slots.guest_read(slot.0.into(), register.into(), &mut word);
    u32::from_le_bytes(word)
}

fn write(slots: &Slots, slot: Slot, register: u32, value: u32) {
    slots.guest_write(slot.0.into(), register.into(), &value.to_le_bytes());
}

fn assert_empty(slots: &Slots, slot: Slot) {
    let mut page = vec![0; 4096];
    slots.guest_read(slot.0.into(), 0, &mut page);
    let empty = [MAGIC.to_le_bytes(), 2u32.to_le_bytes()].concat();
    assert_eq!(page[..8], empty);
    assert!(page[8..].iter().all(|byte| *byte == 0), "{slot}: {:02x?}", &page[..0x110]);
}

#[test]
fn an_empty_slot_is_one_that_linux_leaves_alone() {
    let slots = slots(2);
    for slot in [Slot(0), Slot(1)] {
        assert_empty(&slots, slot);
        write(&slots, slot, VIRTIO_MMIO_STATUS, 1);
        assert_empty(&slots, slot);
        assert!(slots.device(slot).is_none() && slots.take(slot).is_none());
    }
    assert_eq!(read(&slots, Slot(2), VIRTIO_MMIO_MAGIC_VALUE), u32::MAX, "beyond the last one");
    write(&slots, Slot(2), VIRTIO_MMIO_STATUS, 1);
    assert_eq!((slots.count(), slots.devices().count()), (2, 0));
}

#[test]
fn a_device_appears_whole_and_disappears_whole() {
    let slots = slots(2);
    let first = rng(&slots, Slot(1));
    assert_empty(&slots, Slot(1));
    slots.put(Slot(1), first.clone()).unwrap();
    assert_eq!(read(&slots, Slot(1), VIRTIO_MMIO_DEVICE_ID), RNG);
    assert_eq!(slots.put(Slot(1), rng(&slots, Slot(1))), Err(NotEmpty(Slot(1))));
    assert_eq!(
        slots.put(Slot(2), first.clone()).unwrap_err().to_string(),
        "slot 2 is not an empty slot of the machine"
    );
    write(&slots, Slot(1), VIRTIO_MMIO_STATUS, 1);
    assert_eq!(read(&slots, Slot(1), VIRTIO_MMIO_STATUS), 1);
    assert_eq!(slots.devices().map(|(slot, _)| slot).collect::<Vec<_>>(), [Slot(1)]);

    assert!(Arc::ptr_eq(&slots.take(Slot(1)).unwrap(), &first));
    assert_empty(&slots, Slot(1));
    write(&slots, Slot(1), VIRTIO_MMIO_STATUS, 3);
    assert_empty(&slots, Slot(1));
    assert_eq!(first.stats().guest_faults, 0, "it heard nothing of that");

    // The next one knows nothing of the one before.
    slots.put(Slot(1), rng(&slots, Slot(1))).unwrap();
    assert_eq!((read(&slots, Slot(1), VIRTIO_MMIO_DEVICE_ID), read(&slots, Slot(1), VIRTIO_MMIO_STATUS)), (RNG, 0));
}

/// As the monitor's vCPU threads would, several at a time and without a pause.
#[test]
fn a_guest_that_never_stops_writing_neither_holds_a_slot_nor_leaves_anything_in_it() {
    const ROUNDS: usize = 200;
    let (slots, stop) = (slots(1), AtomicBool::new(false));
    let slot = Slot(0);
    thread::scope(|scope| {
        for seed in 1u32..=3 {
            let (slots, stop) = (&slots, &stop);
            scope.spawn(move || {
                let mut random = seed;
                while !stop.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let (register, value) = (random >> 8 & 0xfc, random >> 16 & 0xf);
                    write(slots, slot, register, value);
                    write(slots, slot, VIRTIO_MMIO_STATUS, value);
                    read(slots, slot, register);
                }
            });
        }
        for _ in 0..ROUNDS {
            slots.put(slot, rng(&slots, slot)).unwrap();
            assert_eq!(read(&slots, slot, VIRTIO_MMIO_DEVICE_ID), RNG);
            let device = slots.take(slot).unwrap();
            assert_empty(&slots, slot);
            assert_eq!(Arc::strong_count(&device), 1, "nobody is in it");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_empty(&slots, slot);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Put(u8),
    Take(u8),
    Write(u8, u32, u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let register = prop_oneof![1 => Just(VIRTIO_MMIO_STATUS), 2 => (0u32..0x50).prop_map(|n| n * 4)];
    let step = prop_oneof![
        2 => (0u8..5).prop_map(Step::Put),
        2 => (0u8..5).prop_map(Step::Take),
        4 => (0u8..5, register, 0u32..16).prop_map(|(slot, register, value)| Step::Write(slot, register, value)),
    ];
    proptest::collection::vec(step, 0..100)
}

proptest! {
    /// Four slots, and one that is not there.
    #[test]
    fn a_slot_shows_what_is_in_it_whatever_happens_in_others(steps in steps()) {
        let slots = slots(4);
        let mut filled = [false; 4];
        for step in steps {
            match step {
                Step::Put(n) => {
                    let empty = filled.get(usize::from(n)) == Some(&false);
                    let page = slots.page(Slot(n));
                    prop_assert_eq!(page.is_some(), n < 4);
                    let device = rng(&slots, Slot(n.min(3)));
                    prop_assert_eq!(slots.put(Slot(n), device).is_ok(), empty);
                    if empty {
                        filled[usize::from(n)] = true;
                    }
                }
                Step::Take(n) => {
                    let was = filled.get_mut(usize::from(n)).map(std::mem::take).unwrap_or_default();
                    prop_assert_eq!(slots.take(Slot(n)).is_some(), was);
                }
                Step::Write(n, register, value) => write(&slots, Slot(n), register, value),
            }
            for (n, filled) in (0u8..).zip(filled) {
                prop_assert_eq!(slots.device(Slot(n)).is_some(), filled);
                if filled {
                    prop_assert_eq!(read(&slots, Slot(n), VIRTIO_MMIO_DEVICE_ID), RNG);
                } else {
                    assert_empty(&slots, Slot(n));
                }
            }
        }
    }
}
