//! A device's registers as memory. The guest reads them without an exit: the page is a read-only memory slot of KVM
//! (KVM_MEM_READONLY), and only writes cause exits. At each interrupt Linux reads InterruptStatus and writes InterruptACK; the first is a plain load
//! from here and the second is swallowed (see the module above), so an interrupt costs no exit to this process at all.
//!
//! Where KVM cannot do that, reads come out as any access to a device, and are answered from this page as well.

use std::sync::{Arc, atomic::AtomicU32};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_INTERRUPT_STATUS};
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice, mmap::FromRangesError};

use super::{
    REGISTERS_SIZE,
    registers::{EMPTY, Registers},
};

const SIZE: usize = REGISTERS_SIZE as usize;

/// The pages of all slots of a machine, one after the other.
#[derive(Clone, Debug)]
pub struct RegisterPages(Arc<MmapRegion>);

/// One of them.
#[derive(Clone, Debug)]
pub struct RegisterPage {
    pages: RegisterPages,
    at: usize,
}

impl RegisterPages {
    /// Pages for `count` slots, all of them empty.
    ///
    /// # Errors
    /// No memory.
    pub fn new(count: usize) -> Result<Self, FromRangesError> {
        let pages = Self(Arc::new(MmapRegion::new(count.saturating_mul(SIZE))?));
        (0..count).filter_map(|index| pages.page(index)).for_each(|page| page.clear());
        Ok(pages)
    }

    /// The page of slot number `index`; None if there is none.
    pub fn page(&self, index: usize) -> Option<RegisterPage> {
        let at = index.checked_mul(SIZE)?;
        (at < self.0.size()).then(|| RegisterPage { pages: self.clone(), at })
    }

    /// The memory, for KVM.
    pub fn region(&self) -> &MmapRegion {
        &self.0
    }
}

impl RegisterPage {
    /// Writes what the registers hold now.
    pub fn publish(&self, registers: &Registers) {
        for (register, value) in registers.readable() {
            self.write(register as usize, &value.to_le_bytes());
        }
    }

    /// Makes it the page of an empty slot.
    pub fn clear(&self) {
        self.write(VIRTIO_MMIO_DEVICE_ID as usize, &[0; 4]);
        // All but magic and version, by which a driver knows that there is a slot.
        self.write(VIRTIO_MMIO_DEVICE_ID as usize, &[0; SIZE - VIRTIO_MMIO_DEVICE_ID as usize]);
        for (register, value) in EMPTY {
            self.write(register as usize, &value.to_le_bytes());
        }
    }

    /// Writes the device's configuration space.
    pub fn publish_config(&self, read: impl FnOnce(&mut [u8])) {
        let mut config = [0; SIZE - VIRTIO_MMIO_CONFIG as usize];
        read(&mut config);
        self.write(VIRTIO_MMIO_CONFIG as usize, &config);
    }

    /// Reads as the guest would; zeros beyond the page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(offset) = usize::try_from(offset) {
            // A short read at the page's end leaves the rest at zero.
            let _ = self.slice().read(data, offset);
        }
    }

    /// Changes InterruptStatus by `change`, which may happen on any thread.
    pub fn interrupt_status(&self, change: impl FnOnce(&AtomicU32)) {
        if let Ok(status) = self.slice().get_atomic_ref(VIRTIO_MMIO_INTERRUPT_STATUS as usize) {
            change(status);
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        // In bounds: registers and configuration space are parts of the page.
        let _ = self.slice().write_slice(bytes, offset);
    }

    fn slice(&self) -> VolatileSlice<'_> {
        // In bounds: made by RegisterPages::page.
        self.pages.0.get_slice(self.at, SIZE).unwrap_or_else(|_| self.pages.0.as_volatile_slice())
    }
}
