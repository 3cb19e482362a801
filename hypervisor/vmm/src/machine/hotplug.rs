//! Network devices that come to a configured machine, and go.
//!
//! ```text
//!   prepare_network ─► (on the event loop) ─► attach_network ─► the guest binds the slot's driver
//!   detach_network  ◄─ (off the event loop afterwards)      ◄─ the guest has unbound it, or is not asked
//! ```

use std::sync::Arc;

use caisson_protos::{guest::Slot, monitor::NetworkConfig};
use slog::Logger;

use super::{Machine, MachineError, devices, system};
use crate::{bus::slot_base, descriptors::Descriptors, layout::VIRTIO_IRQS, virtio::mmio::MmioDevice};

impl Machine {
    /// Makes a network device for an empty slot. The guest does not see it yet.
    ///
    /// # Errors
    /// See [`MachineError`]; nothing is left behind then.
    pub fn prepare_network(
        &self,
        config: &NetworkConfig,
        mut fds: Descriptors,
        log: &Logger,
    ) -> Result<(Slot, Arc<MmioDevice>), MachineError> {
        let slots = &self.bus.slots;
        let empty = self.network_slots.iter().find(|slot| slots.device(**slot).is_none());
        let Some((slot, page)) = empty.and_then(|slot| Some((*slot, slots.page(*slot)?))) else {
            let mac = config.mac.map(|byte| format!("{byte:02x}")).join(":");
            return Err(MachineError::NoEmptySlot { mac, count: self.network_slots.len() });
        };
        let device = devices::net(&format!("network of {slot}"), config, &mut fds, log)?;
        fds.finish()?;
        let device = MmioDevice::new(Box::new(device), page, self.memory.clone(), log.clone());
        Ok((slot, Arc::new(device.map_err(system("eventfd for a device"))?)))
    }

    /// Puts a device into the slot that [`Self::prepare_network`] gave with it; it must be on the event loop.
    ///
    /// # Errors
    /// KVM's; nothing has changed then.
    pub fn attach_network(&mut self, slot: Slot, device: Arc<MmioDevice>) -> Result<(), MachineError> {
        device.connect(&self.vm, slot_base(slot), irq(slot)).map_err(system("connecting a device to KVM"))?;
        self.bus.slots.put(slot, device)?;
        self.networks_attached += 1;
        Ok(())
    }

    /// Takes a network device out of its slot; whether a driver still used it. It is to be taken off the event loop next, before
    /// that runs again.
    ///
    /// # Errors
    /// [`MachineError::NoNetwork`], and nothing has changed then.
    pub fn detach_network(&mut self, slot: Slot, log: &Logger) -> Result<bool, MachineError> {
        self.network(slot)?;
        let Some(device) = self.bus.slots.take(slot) else { return Err(self.no_network(slot)) };
        let in_use = device.is_live();
        if let Err(error) = device.disconnect(&self.vm, slot_base(slot), irq(slot)) {
            // The device is gone all the same. What is left of it would be in the way of the next one in this slot.
            slog::error!(log, "cannot disconnect a device from KVM"; "slot" => slot.0, "error" => %error);
        }
        let stats = device.stats();
        self.gone.notifications += stats.notifications;
        self.gone.interrupts += stats.interrupts;
        self.gone.guest_faults += stats.guest_faults;
        self.networks_detached += 1;
        Ok(in_use)
    }

    /// Reports to the guest whether a network device has a link.
    ///
    /// # Errors
    /// [`MachineError::NoNetwork`].
    pub fn set_link(&self, slot: Slot, up: bool) -> Result<(), MachineError> {
        self.network(slot)?.set_link(up);
        Ok(())
    }

    fn network(&self, slot: Slot) -> Result<Arc<MmioDevice>, MachineError> {
        let device = self.network_slots.contains(&slot).then(|| self.bus.slots.device(slot)).flatten();
        device.ok_or_else(|| self.no_network(slot))
    }

    fn no_network(&self, slot: Slot) -> MachineError {
        let occupied = self.network_slots.iter().filter(|slot| self.bus.slots.device(**slot).is_some());
        MachineError::NoNetwork { slot, occupied: occupied.copied().collect() }
    }
}

/// The interrupt of a slot, of which a machine has no more than there are interrupts.
fn irq(Slot(number): Slot) -> u32 {
    VIRTIO_IRQS.get(usize::from(number)).copied().unwrap_or_default()
}
