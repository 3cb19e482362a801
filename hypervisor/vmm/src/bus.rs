//! Where the guest's port and register accesses go. Anything that is not there reads as ones and swallows writes.

use caisson_protos::guest::Slot;
use vm_memory::GuestAddress;

use crate::{layout::VIRTIO_MMIO, ports::Ports, slots::Slots, virtio::mmio::REGISTERS_SIZE};

/// Everything outside RAM.
pub struct Bus {
    /// I/O ports.
    pub ports: Ports,
    /// Devices, one page for each slot from [`VIRTIO_MMIO`] on.
    pub slots: Slots,
}

impl Bus {
    /// A vCPU reads.
    pub fn read(&self, address: GuestAddress, data: &mut [u8]) {
        match address.0.checked_sub(VIRTIO_MMIO.0) {
            Some(at) => self.slots.guest_read(at / REGISTERS_SIZE, at % REGISTERS_SIZE, data),
            None => data.fill(0xff),
        }
    }

    /// A vCPU writes.
    pub fn write(&self, address: GuestAddress, data: &[u8]) {
        if let Some(at) = address.0.checked_sub(VIRTIO_MMIO.0) {
            self.slots.guest_write(at / REGISTERS_SIZE, at % REGISTERS_SIZE, data);
        }
    }
}

/// The register page of a slot.
pub fn slot_base(Slot(number): Slot) -> GuestAddress {
    GuestAddress(VIRTIO_MMIO.0 + u64::from(number) * REGISTERS_SIZE)
}
