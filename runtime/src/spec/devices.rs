//! Devices. A guest has its own of those that every container gets, and none of the host's: what names another is refused, because a
//! node of the same number would be somebody else in the guest.

use oci_spec::runtime::{LinuxDeviceType, Spec};

use super::Complaint;

/// The character devices that work in a guest because its own kernel has them under the same number
/// (Documentation/admin-guide/devices.txt): those of every container, and FUSE.
const OWN: [(u32, u32); 9] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (10, 229)];

/// Whether the guest has this character device itself.
pub fn is_guests_own(major: u32, minor: u32) -> bool {
    OWN.contains(&(major, minor))
}

pub(super) fn check(spec: &Spec) -> Result<(), Complaint> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    for (index, device) in devices.into_iter().flatten().enumerate() {
        let (major, minor) = (device.major(), device.minor());
        let numbers = u32::try_from(major).ok().zip(u32::try_from(minor).ok());
        let (works, kind) = match device.typ() {
            LinuxDeviceType::P => (true, "FIFO"),
            LinuxDeviceType::B => (false, "block"),
            LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::A => {
                (numbers.is_some_and(|(major, minor)| is_guests_own(major, minor)), "character")
            }
        };
        if !works {
            let field = format!("linux.devices[{index}] ({})", device.path().display());
            let message = format!(
                "the {kind} device {major}:{minor} of the host cannot work in a machine of its own: the guest has null, zero, full, random, urandom, tty, console, ptmx and fuse"
            );
            return Err(Complaint::new(field, message));
        }
    }
    Ok(())
}
