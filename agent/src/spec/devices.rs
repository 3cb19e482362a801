//! Device nodes: the ones that every container has, and `linux.devices`.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use super::{Result, SpecError, absolute};
use crate::plan::{DeviceKind, DevicePlan};

/// The devices that the OCI specification promises to every container; numbers from
/// Documentation/admin-guide/devices.txt.
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The default nodes, then the specification's own; one of the latter replaces a default of the same path.
pub(super) fn plan(devices: &[LinuxDevice]) -> Result<Vec<DevicePlan>> {
    let mut plans: Vec<DevicePlan> = DEFAULTS
        .iter()
        .map(|(path, major, minor)| DevicePlan {
            path: path.into(),
            kind: DeviceKind::Char,
            major: *major,
            minor: *minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        })
        .collect();
    for (index, device) in devices.iter().enumerate() {
        let own = one(index, device)?;
        plans.retain(|plan| plan.path != own.path);
        plans.push(own);
    }
    Ok(plans)
}

fn one(index: usize, device: &LinuxDevice) -> Result<DevicePlan> {
    let field = format!("linux.devices[{index}] ({})", device.path().display());
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => DeviceKind::Char,
        LinuxDeviceType::B => DeviceKind::Block,
        LinuxDeviceType::P => DeviceKind::Fifo,
        LinuxDeviceType::A => return Err(SpecError::new(format!("{field}.type"), "\"a\" is not a kind of node")),
    };
    let number = |name: &str, value: i64| match kind {
        DeviceKind::Fifo => Ok(0),
        _ => u32::try_from(value)
            .map_err(|_| SpecError::new(format!("{field}.{name}"), format!("{value} is no device number"))),
    };
    Ok(DevicePlan {
        path: absolute(&format!("{field}.path"), device.path())?,
        kind,
        major: number("major", device.major())?,
        minor: number("minor", device.minor())?,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}
