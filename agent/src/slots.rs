//! The machine's virtio slots: binds and unbinds their driver through sysfs, so that a device that came to the running machine is found,
//! and one that is to go is let go of.
//!
//! ```text
//!   slot 5 ─► /sys/bus/platform/devices/virtio-mmio.5          is there from boot on, from the kernel's command line
//!               ├─ driver ─► ../drivers/virtio-mmio             if it is bound
//!               └─ virtio3 ─ driver ─► virtio_net               if there was a device in it and its own driver took that
//! ```
//!
//! The kernel probes while the name is written, so a card is there when that comes back.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use caisson_protos::{
    agent::BindDevicesRequest,
    guest::{MAX_SLOTS, Slot},
};
use ttrpc::Code;

/// Why a driver is not bound or not unbound.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// No machine has such a slot.
    #[error("slot {0}: use 0 to {max}", max = MAX_SLOTS - 1)]
    Number(u32),
    /// More than there can be.
    #[error("{0} slots in {1}: use at most {MAX_SLOTS}")]
    TooMany(usize, &'static str),
    /// This machine has no such slot.
    #[error("{0}: this machine has no such slot (no platform device {name})", name = .0.platform_device())]
    Missing(Slot),
    /// Nothing was put into it.
    #[error("{0} is empty: attach a device before its driver is bound")]
    Empty(Slot),
    /// A device for which the kernel has no driver, or whose driver gave up.
    #[error("{0}: no driver has taken its device, the guest kernel's log may say why")]
    NoDriver(Slot),
    /// The kernel refused.
    #[error("{slot}: cannot {what} its driver: {source}")]
    Refused {
        /// The slot.
        slot: Slot,
        /// bind or unbind.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl SlotError {
    /// The status that agent.proto promises for it.
    pub fn code(&self) -> Code {
        match self {
            Self::Number(_) | Self::TooMany(..) => Code::INVALID_ARGUMENT,
            Self::Missing(_) => Code::NOT_FOUND,
            Self::Empty(_) => Code::FAILED_PRECONDITION,
            Self::NoDriver(_) | Self::Refused { .. } => Code::INTERNAL,
        }
    }
}

/// The slots of this machine.
#[derive(Clone, Debug)]
pub struct Slots {
    /// The platform bus in sysfs.
    bus: PathBuf,
}

impl Default for Slots {
    fn default() -> Self {
        Self::at(Path::new("/sys/bus/platform"))
    }
}

impl Slots {
    /// The slots of the platform bus at `bus`.
    pub fn at(bus: &Path) -> Self {
        Self { bus: bus.to_owned() }
    }

    /// Does what `request` says. Waits for the kernel, which may wait for whoever uses a device.
    ///
    /// # Errors
    /// The first slot that cannot be as it should; what comes before it is done.
    pub fn apply(&self, request: &BindDevicesRequest) -> Result<(), SlotError> {
        let (unbind, bind) = (slots("unbind", &request.unbind)?, slots("bind", &request.bind)?);
        unbind.into_iter().try_for_each(|slot| self.unbind(slot))?;
        bind.into_iter().try_for_each(|slot| self.bind(slot))
    }

    /// Binds the driver of a slot; it may be bound already.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn bind(&self, slot: Slot) -> Result<(), SlotError> {
        if !self.is_bound(slot)? {
            self.write("bind", slot).map_err(|source| match source.raw_os_error() {
                // The driver's answer to a device id of 0.
                Some(libc::ENODEV) => SlotError::Empty(slot),
                _ => SlotError::Refused { slot, what: "bind", source },
            })?;
        }
        if self.has_driver(slot) {
            return Ok(());
        }
        // The next attempt begins anew.
        let _ = self.write("unbind", slot);
        Err(SlotError::NoDriver(slot))
    }

    /// Unbinds the driver of a slot; it may be unbound already.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn unbind(&self, slot: Slot) -> Result<(), SlotError> {
        if !self.is_bound(slot)? {
            return Ok(());
        }
        self.write("unbind", slot).map_err(|source| SlotError::Refused { slot, what: "unbind", source })
    }

    fn is_bound(&self, slot: Slot) -> Result<bool, SlotError> {
        let device = self.device(slot);
        if device.exists() { Ok(device.join("driver").exists()) } else { Err(SlotError::Missing(slot)) }
    }

    /// Whether the virtio device in a bound slot has a driver of its own.
    fn has_driver(&self, slot: Slot) -> bool {
        let Ok(entries) = fs::read_dir(self.device(slot)) else { return false };
        let mut devices = entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"virtio"));
        devices.any(|device| device.path().join("driver").exists())
    }

    fn device(&self, slot: Slot) -> PathBuf {
        self.bus.join("devices").join(slot.platform_device())
    }

    fn write(&self, file: &str, slot: Slot) -> io::Result<()> {
        let path = self.bus.join("drivers/virtio-mmio").join(file);
        OpenOptions::new().write(true).open(path)?.write_all(slot.platform_device().as_bytes())
    }
}

fn slots(what: &'static str, numbers: &[u32]) -> Result<Vec<Slot>, SlotError> {
    if numbers.len() > MAX_SLOTS.into() {
        return Err(SlotError::TooMany(numbers.len(), what));
    }
    let slot = |number: &u32| match u8::try_from(*number) {
        Ok(slot) if slot < MAX_SLOTS => Ok(Slot(slot)),
        _ => Err(SlotError::Number(*number)),
    };
    numbers.iter().map(slot).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A platform bus as sysfs has it, except that nothing happens when its files are written.
    struct Bus(tempfile::TempDir);

    impl Bus {
        fn new() -> Self {
            let bus = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(bus.path("drivers/virtio-mmio")).unwrap();
            for file in ["bind", "unbind"] {
                fs::write(bus.path("drivers/virtio-mmio").join(file), "").unwrap();
            }
            bus
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn slots(&self) -> Slots {
            Slots::at(self.0.path())
        }

        fn add(&self, slot: u8, path: &str) {
            fs::create_dir_all(self.path("devices").join(Slot(slot).platform_device()).join(path)).unwrap();
        }

        fn written(&self, file: &str) -> String {
            fs::read_to_string(self.path("drivers/virtio-mmio").join(file)).unwrap()
        }

        fn apply(&self, bind: &[u32], unbind: &[u32]) -> Result<(), SlotError> {
            self.slots().apply(&BindDevicesRequest { bind: bind.into(), unbind: unbind.into(), ..Default::default() })
        }
    }

    #[test]
    fn the_kernel_is_asked_by_the_names_of_its_devices() {
        let bus = Bus::new();
        bus.add(3, "virtio7/driver");
        bus.add(12, "driver");
        bus.apply(&[3], &[12]).unwrap();
        assert_eq!((bus.written("bind"), bus.written("unbind")), ("virtio-mmio.3".into(), "virtio-mmio.12".into()));
    }

    #[test]
    fn what_is_so_already_is_left_alone() {
        let bus = Bus::new();
        bus.add(3, "driver");
        bus.add(3, "virtio7/driver");
        bus.add(4, "");
        bus.apply(&[3], &[4]).unwrap();
        assert_eq!((bus.written("bind"), bus.written("unbind")), (String::new(), String::new()));
    }

    #[test]
    fn a_slot_that_cannot_be_bound_is_named() {
        let bus = Bus::new();
        let error = |bind: &[u32], unbind: &[u32]| {
            let error = bus.apply(bind, unbind).unwrap_err();
            (error.code(), error.to_string())
        };
        assert_eq!(error(&[17], &[]), (Code::INVALID_ARGUMENT, "slot 17: use 0 to 16".into()));
        assert_eq!(error(&[], &[u32::MAX]).0, Code::INVALID_ARGUMENT);
        assert_eq!(error(&[0; 18], &[]), (Code::INVALID_ARGUMENT, "18 slots in bind: use at most 17".into()));
        let (code, message) = error(&[5], &[]);
        assert_eq!((code, message.contains("slot 5: this machine has no such slot")), (Code::NOT_FOUND, true));
        assert_eq!(error(&[], &[5]).0, Code::NOT_FOUND);

        // Bound, and nothing came of it.
        bus.add(6, "virtio1");
        let (code, message) = error(&[6], &[]);
        assert_eq!((code, message.contains("slot 6: no driver")), (Code::INTERNAL, true));
        assert_eq!(bus.written("unbind"), "virtio-mmio.6", "and it was undone");

        // A write that fails.
        for file in ["bind", "unbind"] {
            let path = bus.path("drivers/virtio-mmio").join(file);
            fs::remove_file(&path).unwrap();
            symlink("/dev/full", path).unwrap();
        }
        bus.add(7, "driver");
        let (code, message) = error(&[], &[7]);
        assert_eq!((code, message.contains("slot 7: cannot unbind its driver: No space")), (Code::INTERNAL, true));
        assert!(error(&[6], &[]).1.contains("slot 6: cannot bind its driver: No space"));
    }
}
