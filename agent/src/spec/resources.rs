//! `linux.resources` as cgroup v2 files.
//!
//! The specification speaks cgroup v1; the conversions are the ones that runc documents in docs/cgroup-v2.md.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::{Result, SpecError, refuse, text};

/// One value for one file of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The file's name in the cgroup's directory.
    pub file: &'static str,
    /// What to write.
    pub value: String,
    /// The field that asked for it, for messages.
    pub field: &'static str,
}

pub(super) fn plan(resources: &LinuxResources, notes: &mut Vec<String>) -> Result<Vec<Limit>> {
    let filled = |field: &str, full: bool| refuse(field, full.then_some(()));
    filled("linux.resources.blockIO", resources.block_io().as_ref().is_some_and(|io| *io != Default::default()))?;
    filled(
        "linux.resources.hugepageLimits",
        resources.hugepage_limits().as_ref().is_some_and(|list| !list.is_empty()),
    )?;
    filled("linux.resources.network", resources.network().as_ref().is_some_and(|net| *net != Default::default()))?;
    filled("linux.resources.rdma", resources.rdma().as_ref().is_some_and(|map| !map.is_empty()))?;
    filled("linux.resources.unified", resources.unified().as_ref().is_some_and(|map| !map.is_empty()))?;
    if resources.devices().as_ref().is_some_and(|list| !list.is_empty()) {
        notes.push("linux.resources.devices is not enforced yet: the guest holds no device of the host".into());
    }
    let mut limits = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_limits(cpu, &mut limits)?;
    }
    if let Some(memory) = resources.memory() {
        memory_limits(memory, &mut limits, notes)?;
    }
    // 0 is "not set", as runc has it.
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        limits.push(Limit { file: "pids.max", value: or_max(limit), field: "linux.resources.pids.limit" });
    }
    Ok(limits)
}

/// A negative number is no limit.
fn or_max(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

fn cpu_limits(cpu: &LinuxCpu, limits: &mut Vec<Limit>) -> Result<()> {
    refuse("linux.resources.cpu.realtimeRuntime", cpu.realtime_runtime().filter(|v| *v != 0))?;
    refuse("linux.resources.cpu.realtimePeriod", cpu.realtime_period().filter(|v| *v != 0))?;
    refuse("linux.resources.cpu.idle", cpu.idle().filter(|v| *v != 0))?;
    refuse("linux.resources.cpu.burst", cpu.burst().filter(|v| *v != 0))?;
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        limits.push(Limit {
            file: "cpu.weight",
            value: weight(shares).to_string(),
            field: "linux.resources.cpu.shares",
        });
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        // The kernel's default period, 100 ms: Documentation/admin-guide/cgroup-v2.rst.
        let value = format!("{} {}", or_max(quota.unwrap_or(-1)), period.unwrap_or(100_000));
        limits.push(Limit { file: "cpu.max", value, field: "linux.resources.cpu.quota" });
    }
    for (file, field, list) in [
        ("cpuset.cpus", "linux.resources.cpu.cpus", cpu.cpus()),
        ("cpuset.mems", "linux.resources.cpu.mems", cpu.mems()),
    ] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            limits.push(Limit { file, value: text(field, list)?, field });
        }
    }
    Ok(())
}

/// From v1 shares (2 to 262144) to v2 weight (1 to 10000), linear.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn memory_limits(memory: &LinuxMemory, limits: &mut Vec<Limit>, notes: &mut Vec<String>) -> Result<()> {
    refuse("linux.resources.memory.swappiness", memory.swappiness())?;
    refuse("linux.resources.memory.disableOOMKiller", memory.disable_oom_killer().filter(|disable| *disable))?;
    for (field, value) in [("kernel", memory.kernel()), ("kernelTCP", memory.kernel_tcp())] {
        if value.is_some_and(|value| value != 0) {
            notes.push(format!("linux.resources.memory.{field} has no effect: cgroup v2 counts it in memory.max"));
        }
    }
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        limits.push(Limit { file: "memory.max", value: or_max(limit), field: "linux.resources.memory.limit" });
    }
    // The specification's swap is memory and swap together; v2 counts swap alone.
    let field = "linux.resources.memory.swap";
    match (memory.swap().filter(|swap| *swap != 0), limit) {
        (None, _) => {}
        (Some(swap), _) if swap < 0 => limits.push(Limit { file: "memory.swap.max", value: "max".into(), field }),
        (Some(swap), Some(limit)) if limit > 0 && swap >= limit => {
            limits.push(Limit { file: "memory.swap.max", value: (swap - limit).to_string(), field });
        }
        (Some(swap), limit) => {
            let limit = limit.map_or("no limit".into(), |limit| format!("a limit of {limit}"));
            return Err(SpecError::new(field, format!("{swap} (memory and swap together) does not go with {limit}")));
        }
    }
    if let Some(low) = memory.reservation().filter(|low| *low != 0) {
        limits.push(Limit { file: "memory.low", value: or_max(low), field: "linux.resources.memory.reservation" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn planned(json: serde_json::Value) -> Result<Vec<(&'static str, String)>> {
        let limits = plan(&serde_json::from_value(json).unwrap(), &mut Vec::new())?;
        Ok(limits.into_iter().map(|limit| (limit.file, limit.value)).collect())
    }

    #[test]
    fn cgroup_v1_words_become_v2_files() {
        let limits = planned(serde_json::json!({
            "cpu": {"shares": 1024, "quota": 50000, "period": 200000, "cpus": "0-1", "mems": "0"},
            "memory": {"limit": 1000, "swap": 1500, "reservation": 500},
            "pids": {"limit": 42},
        }));
        let expected = [
            ("cpu.weight", "39"),
            ("cpu.max", "50000 200000"),
            ("cpuset.cpus", "0-1"),
            ("cpuset.mems", "0"),
            ("memory.max", "1000"),
            ("memory.swap.max", "500"),
            ("memory.low", "500"),
            ("pids.max", "42"),
        ];
        assert_eq!(limits.unwrap(), expected.map(|(file, value)| (file, value.to_owned())));
    }

    #[test]
    fn negative_is_unlimited_and_zero_is_unset() {
        let limits = planned(
            serde_json::json!({"cpu": {"shares": 0, "quota": -1}, "memory": {"limit": -1, "swap": -1}, "pids": {"limit": 0}}),
        );
        let expected = [("cpu.max", "max 100000"), ("memory.max", "max"), ("memory.swap.max", "max")];
        assert_eq!(limits.unwrap(), expected.map(|(file, value)| (file, value.to_owned())));
    }

    #[test]
    fn swap_below_the_limit_is_refused_by_name() {
        let error = planned(serde_json::json!({"memory": {"limit": 1000, "swap": 999}})).unwrap_err();
        assert_eq!(error.field, "linux.resources.memory.swap");
    }

    proptest! {
        #[test]
        fn any_shares_give_a_weight_that_the_kernel_takes(shares: u64) {
            prop_assert!((1..=10_000).contains(&weight(shares)));
        }

        #[test]
        fn any_memory_numbers_are_planned_or_refused(limit: i64, swap: i64) {
            let _ = planned(serde_json::json!({"memory": {"limit": limit, "swap": swap}}));
        }
    }
}
