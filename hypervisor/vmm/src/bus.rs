//! Where the guest's port and register accesses go. Anything that is not there reads as ones and swallows writes.

use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::{
    layout::VIRTIO_MMIO,
    ports::Ports,
    virtio::mmio::{MmioDevice, REGISTERS_SIZE},
};

/// Everything outside RAM.
pub struct Bus {
    /// I/O ports.
    pub ports: Ports,
    /// Devices, one page each from [`VIRTIO_MMIO`] on.
    pub devices: Vec<Arc<MmioDevice>>,
}

impl Bus {
    /// A vCPU reads.
    pub fn read(&self, address: GuestAddress, data: &mut [u8]) {
        match self.device_at(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A vCPU writes.
    pub fn write(&self, address: GuestAddress, data: &[u8]) {
        if let Some((device, offset)) = self.device_at(address) {
            device.write(offset, data);
        }
    }

    fn device_at(&self, address: GuestAddress) -> Option<(&MmioDevice, u64)> {
        let at = address.0.checked_sub(VIRTIO_MMIO.0)?;
        let device = self.devices.get(usize::try_from(at / REGISTERS_SIZE).ok()?)?;
        Some((device, at % REGISTERS_SIZE))
    }
}

/// The register page of device number `index`.
pub fn device_base(index: usize) -> GuestAddress {
    GuestAddress(VIRTIO_MMIO.0 + index as u64 * REGISTERS_SIZE)
}
