//! `linux.resources` for the container's cgroup in the guest: caisson-oci's limits as they are, and the device rules
//! ([`devices`]). What names the host's devices has been taken out by the shim.

mod devices;

use caisson_oci::{CpuTime, Limits, Setting};
use oci_spec::runtime::LinuxResources;

use super::{Result, parse};
use crate::cgroup::devices::Devices;

/// What a container may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// In the order of writing.
    pub settings: Vec<Setting>,
    /// The devices that every container has, and those that the specification allows or refuses.
    pub devices: Devices,
    /// Whether the specification says anything about devices.
    pub names_devices: bool,
}

/// What an Update finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present {
    /// What cpu.max says.
    pub time: CpuTime,
    /// The number of memory.current, bytes.
    pub memory_current: u64,
}

impl Default for Present {
    fn default() -> Self {
        Self { time: CpuTime::DEFAULT, memory_current: 0 }
    }
}

/// Reads the `linux.resources` object of an Update. Beside the limits come the notes for the log.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn update(json: &[u8], present: &Present) -> Result<(Resources, Vec<String>)> {
    let resources: LinuxResources = parse("linux.resources", json)?;
    let mut notes = Vec::new();
    let resources = plan(Some(&resources), present, &mut notes)?;
    Ok((resources, notes))
}

pub(super) fn plan(
    resources: Option<&LinuxResources>,
    present: &Present,
    notes: &mut Vec<String>,
) -> Result<Resources> {
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let devices = devices::plan(rules)?;
    let mut limits = resources.map(Limits::of).transpose()?.unwrap_or_default();
    limits.check_memory(present.memory_current)?;
    notes.append(&mut limits.notes);
    Ok(Resources { settings: limits.settings(present.time), devices, names_devices: !rules.is_empty() })
}

#[cfg(test)]
mod tests;
