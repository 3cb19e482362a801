//! Devices. A guest has its own of those that every container gets, and none of the host's: what names another is
//! refused, because a node of the same number would be somebody else in the guest, or nobody.
//!
//! One kind of specification names every device of the host without meaning any: a privileged container's, whose rules
//! allow all devices. There, those that cannot work are left out.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};
use serde_json::Value;

use super::FieldError;

/// The character devices that work in a guest because its own kernel has them under the same number
/// (Documentation/admin-guide/devices.txt): those of every container, the kernel's messages, and FUSE.
const OWN: [(u32, u32); 10] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 229)];
/// So many are named when they are left out.
const MAX_NAMED: usize = 8;

/// Whether the guest has this character device itself.
pub fn is_guests_own(major: u32, minor: u32) -> bool {
    OWN.contains(&(major, minor))
}

/// What becomes of `linux.devices`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// Positions that the guest does not get.
    left_out: Vec<usize>,
    /// A sentence about them, for the log.
    pub note: Option<String>,
}

impl Devices {
    /// Whether there are any that the guest does not get.
    pub fn is_complete(&self) -> bool {
        self.left_out.is_empty()
    }

    /// Takes them out of a specification's `linux` object.
    pub fn leave_out(&self, linux: &mut Value) {
        let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) else { return };
        let mut index = 0..;
        devices.retain(|_| index.next().is_none_or(|index| !self.left_out.contains(&index)));
    }
}

pub(super) fn check(spec: &Spec) -> Result<Devices, FieldError> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let foreign: Vec<(usize, &LinuxDevice)> =
        devices.into_iter().flatten().enumerate().filter(|(_, device)| !works(device)).collect();
    let Some((index, first)) = foreign.first() else { return Ok(Devices::default()) };
    if !allows_all(spec) {
        let field = format!("linux.devices[{index}] ({})", first.path().display());
        let kind = if first.typ() == LinuxDeviceType::B { "block" } else { "character" };
        let message = format!(
            "the {kind} device {}:{} of the host cannot work in a machine of its own: the guest has null, zero, full, random, urandom, kmsg, tty, console, ptmx and fuse",
            first.major(),
            first.minor()
        );
        return Err(FieldError::new(field, message));
    }
    let mut names: Vec<_> =
        foreign.iter().take(MAX_NAMED).map(|(_, device)| device.path().display().to_string()).collect();
    if let Some(more) = foreign.len().checked_sub(MAX_NAMED).filter(|more| *more > 0) {
        names.push(format!("{more} more"));
    }
    let note =
        format!("linux.devices of the host that a privileged container's guest does not have: {}", names.join(", "));
    Ok(Devices { left_out: foreign.into_iter().map(|(index, _)| index).collect(), note: Some(note) })
}

fn works(device: &LinuxDevice) -> bool {
    let numbers = u32::try_from(device.major()).ok().zip(u32::try_from(device.minor()).ok());
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::B => false,
        LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::A => {
            numbers.is_some_and(|(major, minor)| is_guests_own(major, minor))
        }
    }
}

/// Whether a rule lets the container use every device, as a privileged one's does.
fn allows_all(spec: &Spec) -> bool {
    let rules = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()?.devices().as_ref());
    rules.into_iter().flatten().any(|rule| {
        let all = |number: Option<i64>| number.is_none_or(|number| number < 0);
        let access = rule.access().as_deref().is_none_or(|access| "rwm".chars().all(|c| access.contains(c)));
        let any_kind = rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A);
        rule.allow() && any_kind && all(rule.major()) && all(rule.minor()) && access
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(rules: Value) -> (Result<Devices, FieldError>, Value) {
        let linux = json!({
            "devices": [
                { "path": "/dev/vda", "type": "b", "major": 254, "minor": 0 },
                { "path": "/dev/null", "type": "c", "major": 1, "minor": 3 },
                { "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232 },
            ],
            "resources": { "devices": rules },
        });
        let spec: Spec = serde_json::from_value(json!({ "ociVersion": "1.0.2", "linux": linux })).unwrap();
        (check(&spec), linux)
    }

    #[test]
    fn a_privileged_container_does_without_what_the_guest_has_not() {
        let (devices, mut linux) =
            checked(json!([{ "allow": false, "access": "rwm" }, { "allow": true, "access": "rwm" }]));
        let devices = devices.unwrap();
        assert!(!devices.is_complete());
        assert!(devices.note.as_ref().unwrap().ends_with(": /dev/vda, /dev/kvm"), "{:?}", devices.note);
        devices.leave_out(&mut linux);
        assert_eq!(linux["devices"], json!([{ "path": "/dev/null", "type": "c", "major": 1, "minor": 3 }]));
    }

    #[test]
    fn whoever_names_a_device_means_it() {
        for rules in [
            json!([]),
            json!([{ "allow": false, "access": "rwm" }]),
            json!([{ "allow": true, "access": "r" }]),
            json!([{ "allow": true, "type": "b", "major": 254, "minor": 0, "access": "rwm" }]),
        ] {
            let refused = checked(rules).0.unwrap_err();
            assert_eq!(refused.field, "linux.devices[0] (/dev/vda)");
        }
    }
}
