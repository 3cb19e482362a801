//! The virtio-mmio register block (virtio 1.2, section 4.2.2) as a pure state machine: no memory, no descriptors, no
//! device. The guest writes, the machine says what that means ([`Effect`]); the shell around it acts.
//!
//! ```text
//!   status:  0 ──ACKNOWLEDGE──► 1 ──DRIVER──► 3 ──FEATURES_OK──► 11 ──DRIVER_OK──► 15 (live)
//!            ▲                                │  only if the features │  queues are
//!            │                                │  fit the offer        │  set up here
//!            └──────────── 0 written, at any time ◄─────────────────────┘
//! ```
//!
//! The driver must go this way; whatever else it writes is refused and changes nothing. In particular features
//! are frozen from FEATURES_OK on and queue registers from DRIVER_OK on: a device that checked its rings once may rely
//! on them until the reset.

use serde::{Deserialize, Serialize};
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
        VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
    },
    virtio_mmio::*,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

/// "virt", the value of MagicValue.
const MAGIC: u32 = 0x7472_6976;
/// The register layout's version: 2 is the modern one.
const VERSION: u32 = 2;
/// "CSSN".
const VENDOR: u32 = 0x4e53_5343;
/// The status while a driver may write queue sizes and addresses; before and after, they cannot change.
const SETTING_UP: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;

/// What a transport offers for every device.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// One queue as the driver described it. Nothing here has been checked against memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// The greatest size the device allows.
    pub max_size: u16,
    /// The driver's choice.
    pub size: u32,
    /// The driver has finished with this queue.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

/// All that must survive a save of one register block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    device_id: u32,
    offered: u64,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    accepted: u64,
    queue_sel: u32,
    config_generation: u32,
    queues: Vec<QueueRegisters>,
}

/// What a register write asks of the shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing; the registers hold it.
    None,
    /// The write broke the rules and changed nothing.
    Refused,
    /// The driver is live now.
    Activate,
    /// The driver has reset the device: all registers are as at the beginning.
    Reset,
    /// Queue notification.
    Notify(u16),
    /// The driver has seen these interrupt causes.
    Acknowledge(u32),
}

/// The registers that can be read in a slot without a device: a device id of 0, which makes a driver leave it alone (4.2.2).
pub const EMPTY: [(u32, u32); 2] = [(VIRTIO_MMIO_MAGIC_VALUE, MAGIC), (VIRTIO_MMIO_VERSION, VERSION)];

impl Registers {
    /// The registers of a device at power-on.
    pub fn new(device_id: u32, device_features: u64, queue_sizes: &[u16]) -> Self {
        let queues = queue_sizes.iter().map(|&max_size| QueueRegisters::new(max_size)).collect();
        Self {
            device_id,
            offered: device_features | TRANSPORT_FEATURES,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            accepted: 0,
            queue_sel: 0,
            config_generation: 0,
            queues,
        }
    }

    /// The features that the driver accepted.
    pub fn accepted_features(&self) -> u64 {
        self.accepted
    }

    /// The queues' registers.
    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Whether the driver is live and the device has not failed.
    pub fn is_live(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.has(VIRTIO_CONFIG_S_NEEDS_RESET)
    }

    /// The device cannot go on until the driver resets it.
    pub fn set_needs_reset(&mut self) {
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    }

    /// The configuration space is about to change, or has changed.
    pub fn next_config_generation(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
    }

    /// The registers that can be read, with their values, except InterruptStatus, which devices change while they work. All others
    /// read as 0. The device's id is the last: where it appears, the others are right.
    pub fn readable(&self) -> [(u32, u32); 13] {
        [
            (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (VIRTIO_MMIO_VERSION, VERSION),
            (VIRTIO_MMIO_VENDOR_ID, VENDOR),
            (VIRTIO_MMIO_DEVICE_FEATURES, half(self.offered, self.device_features_sel)),
            (VIRTIO_MMIO_QUEUE_NUM_MAX, self.selected().map_or(0, |queue| queue.max_size.into())),
            (VIRTIO_MMIO_QUEUE_READY, self.selected().is_some_and(|queue| queue.ready).into()),
            (VIRTIO_MMIO_STATUS, self.status),
            // The length of a shared memory region that does not exist is -1 (4.2.2).
            (VIRTIO_MMIO_SHM_LEN_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_LEN_HIGH, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_HIGH, u32::MAX),
            (VIRTIO_MMIO_CONFIG_GENERATION, self.config_generation),
            (VIRTIO_MMIO_DEVICE_ID, self.device_id),
        ]
    }

    /// Writes the register at `offset`, below the configuration space.
    pub fn write(&mut self, offset: u64, value: u32) -> Effect {
        let Ok(offset) = u32::try_from(offset) else { return Effect::Refused };
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_SHM_SEL => {}
            VIRTIO_MMIO_INTERRUPT_ACK => return Effect::Acknowledge(value),
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            VIRTIO_MMIO_DRIVER_FEATURES => return self.accept(value),
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                return match u16::try_from(value) {
                    Ok(queue) if self.is_live() && usize::from(queue) < self.queues.len() => Effect::Notify(queue),
                    _ => Effect::Refused,
                };
            }
            VIRTIO_MMIO_QUEUE_READY => return self.write_ready(value),
            VIRTIO_MMIO_QUEUE_NUM => return self.set_up(|queue| queue.size = value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => return self.set_up(|queue| set_low(&mut queue.descriptors, value)),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => return self.set_up(|queue| set_high(&mut queue.descriptors, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => return self.set_up(|queue| set_low(&mut queue.available, value)),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => return self.set_up(|queue| set_high(&mut queue.available, value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => return self.set_up(|queue| set_low(&mut queue.used, value)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => return self.set_up(|queue| set_high(&mut queue.used, value)),
            _ => return Effect::Refused,
        }
        Effect::None
    }

    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        let added = value & !self.status;
        // A driver never takes a bit back (2.1.1); NEEDS_RESET is the device's.
        if self.status & !VIRTIO_CONFIG_S_NEEDS_RESET & !value != 0 {
            return Effect::Refused;
        }
        match added {
            0 => Effect::None,
            VIRTIO_CONFIG_S_FAILED => self.add(added),
            _ if self.has(VIRTIO_CONFIG_S_FAILED) => Effect::Refused,
            VIRTIO_CONFIG_S_ACKNOWLEDGE => self.add(added),
            VIRTIO_CONFIG_S_DRIVER if self.has(VIRTIO_CONFIG_S_ACKNOWLEDGE) => self.add(added),
            VIRTIO_CONFIG_S_FEATURES_OK if self.has(VIRTIO_CONFIG_S_DRIVER) && self.features_fit() => self.add(added),
            VIRTIO_CONFIG_S_DRIVER_OK if self.has(VIRTIO_CONFIG_S_FEATURES_OK) => {
                self.add(added);
                Effect::Activate
            }
            _ => Effect::Refused,
        }
    }

    fn add(&mut self, bits: u32) -> Effect {
        self.status |= bits;
        Effect::None
    }

    /// Without VERSION_1 the driver would speak another protocol.
    fn features_fit(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn accept(&mut self, value: u32) -> Effect {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return Effect::Refused;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.accepted, value),
            1 => set_high(&mut self.accepted, value),
            // Bits from 64 on are never offered; to accept none of them is fine.
            _ if value == 0 => {}
            _ => return Effect::Refused,
        }
        Effect::None
    }

    fn write_ready(&mut self, value: u32) -> Effect {
        // A driver that cleans up after a reset writes 0 here, which is true already.
        if value == 0 && self.selected().is_some_and(|queue| !queue.ready) {
            return Effect::None;
        }
        if value > 1 {
            return Effect::Refused;
        }
        match self.selected_for_setup() {
            Some(queue) => queue.ready = value == 1,
            None => return Effect::Refused,
        }
        Effect::None
    }

    /// The only way to a queue's registers.
    fn selected_for_setup(&mut self) -> Option<&mut QueueRegisters> {
        // Exactly these bits: neither live nor failed.
        if self.status != SETTING_UP {
            return None;
        }
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }

    fn set_up(&mut self, change: impl FnOnce(&mut QueueRegisters)) -> Effect {
        match self.selected_for_setup() {
            Some(queue) if !queue.ready => {
                change(queue);
                Effect::None
            }
            _ => Effect::Refused,
        }
    }

    fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        let config_generation = self.config_generation;
        *self = Self { config_generation, ..Self::new(self.device_id, self.offered, &sizes) };
    }
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size.into(), ready: false, descriptors: 0, available: 0, used: 0 }
    }
}

fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(target: &mut u64, value: u32) {
    *target = *target & !0xffff_ffff | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = *target & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NET_FEATURE: u64 = 1 << 5;

    fn registers() -> Registers {
        Registers::new(4, NET_FEATURE, &[64, 128])
    }

    fn up_to(status: &[u32]) -> Registers {
        let mut registers = registers();
        let mut value = 0;
        for bit in status {
            if *bit == VIRTIO_CONFIG_S_FEATURES_OK {
                registers.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL.into(), 1);
                assert_eq!(registers.write(VIRTIO_MMIO_DRIVER_FEATURES.into(), 1), Effect::None);
            }
            value |= bit;
            registers.write(VIRTIO_MMIO_STATUS.into(), value);
        }
        assert_eq!(registers.status, value);
        registers
    }

    fn live() -> Registers {
        up_to(&[
            VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK,
            VIRTIO_CONFIG_S_DRIVER_OK,
        ])
    }

    #[test]
    fn a_driver_that_keeps_the_rules_gets_live() {
        assert!(live().is_live());
    }

    #[test]
    fn features_beyond_the_offer_are_not_ok() {
        let mut registers = up_to(&[VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER]);
        registers.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL.into(), 1);
        registers.write(VIRTIO_MMIO_DRIVER_FEATURES.into(), 1);
        registers.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL.into(), 0);
        registers.write(VIRTIO_MMIO_DRIVER_FEATURES.into(), 1 << 6);
        assert_eq!(registers.write(VIRTIO_MMIO_STATUS.into(), 11), Effect::Refused);
        assert_eq!(registers.status, 3);
    }

    #[test]
    fn a_legacy_driver_is_refused() {
        let mut registers = up_to(&[VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER]);
        assert_eq!(registers.write(VIRTIO_MMIO_STATUS.into(), 11), Effect::Refused);
    }

    #[test]
    fn features_are_frozen_once_ok() {
        let mut registers = up_to(&[VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK]);
        let before = registers.accepted_features();
        assert_eq!(registers.write(VIRTIO_MMIO_DRIVER_FEATURES.into(), u32::MAX), Effect::Refused);
        assert_eq!(registers.accepted_features(), before);
    }

    #[test]
    fn a_reset_while_live_is_a_fresh_start() {
        let mut registers = live();
        assert_eq!(registers.write(VIRTIO_MMIO_STATUS.into(), 0), Effect::Reset);
        assert_eq!(registers, self::registers());
    }

    #[test]
    fn a_device_that_needs_a_reset_takes_no_notifications() {
        let mut registers = live();
        assert_eq!(registers.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), 1), Effect::Notify(1));
        assert_eq!(registers.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), 2), Effect::Refused);
        registers.set_needs_reset();
        assert_eq!(registers.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), 1), Effect::Refused);
    }

    /// Mostly real registers and small values, so that sequences get somewhere.
    fn writes() -> impl Strategy<Value = Vec<(u64, u32)>> {
        let offset = prop_oneof![8 => (0u64..0x40).prop_map(|n| n * 4), 1 => any::<u64>()];
        let value = prop_oneof![4 => 0u32..16, 1 => Just(1 << 5), 1 => any::<u32>()];
        proptest::collection::vec((offset, value), 0..200)
    }

    proptest! {
        #[test]
        fn no_write_changes_queues_or_features_of_a_live_driver(writes in writes()) {
            let mut registers = live();
            for (offset, value) in writes {
                let before = registers.clone();
                let effect = registers.write(offset, value);
                if effect == Effect::Reset {
                    prop_assert_eq!(&registers, &self::registers());
                    return Ok(());
                }
                prop_assert_eq!(registers.queues(), before.queues());
                prop_assert_eq!(registers.accepted_features(), before.accepted_features());
                prop_assert_ne!(effect, Effect::Activate);
            }
        }

        #[test]
        fn live_means_negotiated_whatever_came_before(writes in writes()) {
            let mut registers = registers();
            for (offset, value) in writes {
                let before = registers.clone();
                let effect = registers.write(offset, value);
                if effect == Effect::Refused {
                    prop_assert_eq!(&registers, &before);
                }
                prop_assert_eq!(effect == Effect::Activate, registers.is_live() && !before.is_live());
                if registers.is_live() {
                    prop_assert_eq!(registers.accepted_features() & !(NET_FEATURE | TRANSPORT_FEATURES), 0);
                    prop_assert_ne!(registers.accepted_features() & 1 << VIRTIO_F_VERSION_1, 0);
                }
            }
        }
    }
}
