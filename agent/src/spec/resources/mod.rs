//! `linux.resources` as cgroup v2 files and rules for devices.
//!
//! The specification speaks cgroup v1; the conversions are the ones that runc documents in docs/cgroup-v2.md. What runc
//! drops in silence on cgroup v2 is refused here where somebody could rely on it, and noted where nobody can.
//!
//! - this file: processors, memory, processes;
//! - [`io`]: block devices, huge pages, RDMA, and files by name;
//! - [`devices`]: the device rules.

mod devices;
mod io;
#[cfg(test)]
mod tests;

use caisson_protos::weights;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::{Result, SpecError, parse, refuse, text};
use crate::cgroup::devices::Devices;

/// The kernel's default period, microseconds: Documentation/admin-guide/cgroup-v2.rst.
const DEFAULT_PERIOD: u64 = 100_000;

/// What a limit's refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// An error.
    Must,
    /// Nothing, if the kernel has none of the files.
    IfThere,
    /// Nothing: the same is written once more, later.
    Try,
}

/// One value for one file of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// A file in the cgroup's directory and what to write to it; of several the first one that exists.
    pub choices: Vec<(String, String)>,
    /// The field that asked for it, for messages.
    pub field: String,
    /// Whether it can be done without.
    pub need: Need,
}

impl Limit {
    fn new(file: impl Into<String>, value: impl Into<String>, field: impl Into<String>) -> Self {
        Self { choices: vec![(file.into(), value.into())], field: field.into(), need: Need::Must }
    }
}

/// What a container may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// In the order of writing.
    pub limits: Vec<Limit>,
    /// The devices that every container has, and those that the specification allows or refuses.
    pub devices: Devices,
    /// Whether the specification says anything about devices.
    pub names_devices: bool,
}

/// What an Update finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Present {
    /// The text of cpu.max.
    pub cpu_max: String,
    /// The number of memory.current, bytes.
    pub memory_current: u64,
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
    let mut limits = Vec::new();
    if let Some(resources) = resources {
        let network = resources.network().as_ref().filter(|network| **network != Default::default());
        refuse("linux.resources.network", network)?;
        if let Some(pids) = resources.pids() {
            pids_limit(pids.limit(), &mut limits);
        }
        if let Some(memory) = resources.memory() {
            memory_limits(memory, present, &mut limits, notes)?;
        }
        io::limits(resources, &mut limits)?;
        if let Some(cpu) = resources.cpu() {
            cpu_limits(cpu, present, &mut limits, notes)?;
        }
        // Last, as with runc: who writes files by their names overrides the rest.
        io::unified(resources, &mut limits)?;
    }
    Ok(Resources { limits, devices, names_devices: !rules.is_empty() })
}

/// A negative number is no limit.
fn or_max(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

fn pids_limit(limit: i64, limits: &mut Vec<Limit>) {
    // 0 is "not set", as runc has it.
    if limit != 0 {
        limits.push(Limit::new("pids.max", or_max(limit), "linux.resources.pids.limit"));
    }
}

fn cpu_limits(cpu: &LinuxCpu, present: &Present, limits: &mut Vec<Limit>, notes: &mut Vec<String>) -> Result<()> {
    for (field, set) in [
        ("realtimeRuntime", cpu.realtime_runtime().is_some_and(|value| value != 0)),
        ("realtimePeriod", cpu.realtime_period().is_some_and(|value| value != 0)),
    ] {
        if set {
            let problem = "cgroup v2 divides no realtime among groups; remove it";
            return Err(SpecError::new(format!("linux.resources.cpu.{field}"), problem));
        }
    }
    match cpu.idle() {
        None => {}
        Some(idle @ (0 | 1)) => {
            limits.push(Limit::new("cpu.idle", idle.to_string(), "linux.resources.cpu.idle"));
        }
        Some(other) => {
            return Err(SpecError::new("linux.resources.cpu.idle", format!("{other} is neither 0 nor 1")));
        }
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        let field = "linux.resources.cpu.shares";
        match cpu.idle() {
            // The kernel would refuse it.
            Some(1) => {
                notes.push(format!("{field} has no effect: with linux.resources.cpu.idle the weight is the least"))
            }
            _ => limits.push(Limit::new("cpu.weight", weights::cpu(shares).to_string(), field)),
        }
    }
    let burst = cpu.burst().map(|burst| Limit::new("cpu.max.burst", burst.to_string(), "linux.resources.cpu.burst"));
    if let Some(value) = cpu_max(cpu, present) {
        // The kernel wants burst <= quota at every moment: which one comes first depends on what they were.
        limits.extend(burst.clone().map(|burst| Limit { need: Need::Try, ..burst }));
        limits.push(Limit::new("cpu.max", value, "linux.resources.cpu.quota"));
    }
    limits.extend(burst);
    for (file, field, list) in [
        ("cpuset.cpus", "linux.resources.cpu.cpus", cpu.cpus()),
        ("cpuset.mems", "linux.resources.cpu.mems", cpu.mems()),
    ] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            limits.push(Limit::new(file, text(field, list)?, field));
        }
    }
    Ok(())
}

/// Quota and period share a file; the one that is not named stays as it is.
fn cpu_max(cpu: &LinuxCpu, present: &Present) -> Option<String> {
    let (quota, period) = (cpu.quota().filter(|quota| *quota != 0), cpu.period().filter(|period| *period != 0));
    if quota.is_none() && period.is_none() {
        return None;
    }
    let (old_quota, old_period) = present.cpu_max.trim().split_once(' ').unwrap_or(("max", ""));
    let quota = quota.map_or_else(|| old_quota.to_owned(), or_max);
    let period = period.or_else(|| old_period.parse().ok()).unwrap_or(DEFAULT_PERIOD);
    Some(format!("{quota} {period}"))
}

fn memory_limits(
    memory: &LinuxMemory,
    present: &Present,
    limits: &mut Vec<Limit>,
    notes: &mut Vec<String>,
) -> Result<()> {
    for (field, set, why) in [
        ("kernel", memory.kernel().is_some_and(|value| value != 0), "counts it in memory.max"),
        ("kernelTCP", memory.kernel_tcp().is_some_and(|value| value != 0), "counts it in memory.max"),
        ("swappiness", memory.swappiness().is_some(), "has it for the whole machine only"),
        ("disableOOMKiller", memory.disable_oom_killer() == Some(true), "always kills when memory runs out"),
        ("useHierarchy", memory.use_hierarchy() == Some(false), "always counts what is below"),
    ] {
        if set {
            notes.push(format!("linux.resources.memory.{field} has no effect, as with runc: cgroup v2 {why}"));
        }
    }
    let limit = memory.limit().filter(|limit| *limit != 0);
    let swap = memory.swap().filter(|swap| *swap != 0);
    if memory.check_before_update() == Some(true) {
        for (field, value) in [("swap", swap), ("limit", limit)] {
            if let Some(value) = value.and_then(|value| u64::try_from(value).ok())
                && value <= present.memory_current
            {
                let problem = format!("{value} is not above what is used now, {} bytes", present.memory_current);
                return Err(SpecError::new(format!("linux.resources.memory.{field}"), problem));
            }
        }
    }
    if let Some(value) = swap_max(limit, swap)? {
        limits.push(Limit::new("memory.swap.max", value, "linux.resources.memory.swap"));
    }
    if let Some(limit) = limit {
        limits.push(Limit::new("memory.max", or_max(limit), "linux.resources.memory.limit"));
    }
    if let Some(low) = memory.reservation().filter(|low| *low != 0) {
        limits.push(Limit::new("memory.low", or_max(low), "linux.resources.memory.reservation"));
    }
    Ok(())
}

/// The specification's swap is memory and swap together; v2 counts swap alone.
fn swap_max(limit: Option<i64>, swap: Option<i64>) -> Result<Option<String>> {
    match (limit, swap) {
        // Whoever takes the limit away means both.
        (Some(-1), None) | (_, Some(-1)) => Ok(Some("max".into())),
        (_, None) => Ok(None),
        (Some(limit), Some(swap)) if limit > 0 && swap >= limit => Ok(Some((swap - limit).to_string())),
        (limit, Some(swap)) => {
            let limit = limit.map_or("no limit".into(), |limit| format!("a limit of {limit}"));
            let problem = format!("{swap} (memory and swap together) does not go with {limit}");
            Err(SpecError::new("linux.resources.memory.swap", problem))
        }
    }
}
