//! The slots of a machine: places for virtio devices, which the guest knows from its kernel's command line, whether there is a device
//! in them or not. vCPUs write to their registers while the main thread puts devices in and takes them out.
//!
//! ```text
//!            put: the device is connected and on the event loop, its registers appear
//!   empty ──────────────────────────────────────────────────────────────────────────► filled
//!     ▲  a device id of 0, writes do nothing                                             │
//!     └──────────────────────────────────────────────────────────────────────────────────┘
//!            take: no vCPU is in a write to the device any more, its registers are gone
//! ```
//!
//! A vCPU's write holds the slot's lock, which other vCPUs share; the main thread takes it alone. It is not starved by a guest that
//! writes without end: the standard library's lock lets nobody in while a writer waits. Reads need no lock: they are of the
//! page (`virtio::mmio`), mostly without an exit.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use caisson_protos::guest::Slot;

use crate::virtio::mmio::{MmioDevice, RegisterPage, RegisterPages};

/// A slot that has a device already, or that does not exist.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0} is not an empty slot of the machine")]
pub struct NotEmpty(Slot);

/// All slots of a machine.
pub struct Slots(Vec<Place>);

struct Place {
    page: RegisterPage,
    device: RwLock<Option<Arc<MmioDevice>>>,
}

impl Slots {
    /// As many empty ones as there are pages, at most 256.
    pub fn new(pages: &RegisterPages) -> Self {
        let place = |page| Place { page, device: RwLock::new(None) };
        Self((0..=u8::MAX).map_while(|index| pages.page(index.into())).map(place).collect())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Where the registers of a device in `slot` are to be.
    pub fn page(&self, slot: Slot) -> Option<RegisterPage> {
        self.place(slot).map(|place| place.page.clone())
    }

    /// The device in `slot`.
    pub fn device(&self, slot: Slot) -> Option<Arc<MmioDevice>> {
        self.place(slot)?.read().clone()
    }

    /// All devices, with their slots.
    pub fn devices(&self) -> impl Iterator<Item = (Slot, Arc<MmioDevice>)> {
        let slots = (0..=u8::MAX).map(Slot);
        slots.zip(&self.0).filter_map(|(slot, place)| Some((slot, place.read().clone()?)))
    }

    /// Puts `device`, whose page is that of `slot`, into it. The guest may use it before this comes back.
    ///
    /// # Errors
    /// [`NotEmpty`].
    pub fn put(&self, slot: Slot, device: Arc<MmioDevice>) -> Result<(), NotEmpty> {
        let place = self.place(slot).ok_or(NotEmpty(slot))?;
        let mut content = place.write();
        if content.is_some() {
            return Err(NotEmpty(slot));
        }
        device.publish();
        *content = Some(device);
        Ok(())
    }

    /// Takes the device out. No access of the guest reaches it any more, and the guest sees an empty slot.
    pub fn take(&self, slot: Slot) -> Option<Arc<MmioDevice>> {
        let place = self.place(slot)?;
        let mut content = place.write();
        let device = content.take()?;
        place.page.clear();
        Some(device)
    }

    /// A vCPU reads at `offset` of slot number `index`, where KVM does not show it the page itself. Beyond the last slot there
    /// are ones.
    pub fn guest_read(&self, index: u64, offset: u64, data: &mut [u8]) {
        match self.at(index) {
            Some(place) => place.page.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A vCPU writes at `offset` of slot number `index`.
    pub fn guest_write(&self, index: u64, offset: u64, data: &[u8]) {
        if let Some(place) = self.at(index)
            && let Some(device) = &*place.read()
        {
            device.write(offset, data);
        }
    }

    fn place(&self, Slot(number): Slot) -> Option<&Place> {
        self.0.get(usize::from(number))
    }

    fn at(&self, index: u64) -> Option<&Place> {
        self.0.get(usize::try_from(index).ok()?)
    }
}

impl Place {
    fn read(&self) -> RwLockReadGuard<'_, Option<Arc<MmioDevice>>> {
        self.device.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Option<Arc<MmioDevice>>> {
        self.device.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
