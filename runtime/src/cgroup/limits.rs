//! What a container's limits come to for its pod's processes on the host, as files of cgroup v2. Pure.
//!
//! | file                    | value                                                                                  |
//! |-------------------------|----------------------------------------------------------------------------------------|
//! | cpu.max                 | the quota, and the configured overhead in each period                                  |
//! | cpu.weight, .idle, .max.burst, cpuset.\*, io.\* | as they are: they are about the host's processors, nodes and devices |
//! | memory.max              | the machine's memory (which follows the limit) and the overhead, if there is a limit    |
//! | memory.low, .swap.max   | as they are                                                                            |
//! | pids.max                | the limit and the pod's own threads: the guest's processes are none of the host's       |
//!
//! memory.max follows the machine and not a later, lower limit: the guest does not give memory back that its containers
//! have freed, so a lower value would kill the machine of a container that keeps to its limit.

use crate::{
    host::config::Config,
    resources::{Asked, Limit, size::MachineSize},
};

/// One value for one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The file's name.
    pub file: String,
    /// What to write.
    pub value: String,
    /// The specification's field, for messages.
    pub field: String,
}

impl Setting {
    /// The controller that the file belongs to.
    pub fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// What the pod's own processes need beside what its container asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overhead {
    /// Bytes.
    pub memory: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
}

impl Overhead {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        Self {
            memory: u64::from(config.pod_overhead_memory_mib) << 20,
            cpu_millis: config.pod_overhead_cpu_millis.into(),
        }
    }
}

/// Threads of caisson-vmm (beside its vCPUs) and caisson-fsd, and room for more.
const THREADS: u64 = 32;

/// The settings for what is asked, in the order in which they are written.
pub fn settings(asked: &Asked, size: MachineSize, overhead: Overhead) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String, field: &str| {
        settings.push(Setting { file: file.into(), value, field: format!("linux.resources.{field}") });
    };
    match (asked.idle, asked.weight) {
        // The kernel takes no weight for an idle cgroup.
        (Some(true), _) => set("cpu.idle", "1".into(), "cpu.idle"),
        (idle, weight) => {
            if idle.is_some() {
                set("cpu.idle", "0".into(), "cpu.idle");
            }
            if let Some(weight) = weight {
                set("cpu.weight", weight.to_string(), "cpu.shares");
            }
        }
    }
    if let Some(time) = asked.time {
        let quota = match time.quota {
            Limit::Unlimited => "max".into(),
            Limit::To(quota) => {
                let more = time.period.saturating_mul(overhead.cpu_millis) / 1000;
                quota.saturating_add(more).to_string()
            }
        };
        set("cpu.max", format!("{quota} {}", time.period), "cpu.quota");
    }
    if let Some(burst) = asked.burst {
        set("cpu.max.burst", burst.to_string(), "cpu.burst");
    }
    for (file, list, field) in [("cpuset.cpus", &asked.cpus, "cpu.cpus"), ("cpuset.mems", &asked.mems, "cpu.mems")] {
        if let Some(list) = list {
            set(file, list.to_string(), field);
        }
    }
    if let Some(memory) = asked.memory {
        let max = match memory {
            Limit::Unlimited => "max".into(),
            Limit::To(_) => size.memory.saturating_add(overhead.memory).to_string(),
        };
        set("memory.max", max, "memory.limit");
    }
    if let Some(low) = asked.reservation {
        set("memory.low", number(low), "memory.reservation");
    }
    if let Some(swap) = asked.swap {
        set("memory.swap.max", number(swap), "memory.swap");
    }
    if let Some(pids) = asked.pids {
        let max = match pids {
            Limit::Unlimited => Limit::Unlimited,
            Limit::To(limit) => Limit::To(limit.saturating_add(THREADS + u64::from(size.vcpus))),
        };
        set("pids.max", number(max), "pids.limit");
    }
    for (file, value, field) in &asked.io {
        settings.push(Setting { file: file.clone(), value: value.clone(), field: field.clone() });
    }
    settings
}

/// The kernel's counters are 63 bits wide: what is more is no limit.
fn number(limit: Limit) -> String {
    match limit {
        Limit::To(number) if number <= i64::MAX as u64 => number.to_string(),
        _ => "max".into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resources::tests::asked;

    fn lines(json: serde_json::Value) -> Vec<String> {
        let size = MachineSize { vcpus: 2, memory: 300 << 20 };
        let overhead = Overhead { memory: 100 << 20, cpu_millis: 250 };
        let settings = settings(&asked(json).unwrap(), size, overhead);
        settings.iter().map(|setting| format!("{} {}", setting.file, setting.value)).collect()
    }

    #[test]
    fn limits_have_the_overhead_added_and_the_rest_is_as_it_is() {
        let json = json!({
            "cpu": { "quota": 50_000, "period": 200_000, "shares": 1024, "burst": 7, "cpus": "0-1", "mems": "0" },
            "memory": { "limit": 200 << 20, "swap": 210 << 20, "reservation": 5 },
            "pids": { "limit": 100 },
            "blockIO": { "throttleReadIOPSDevice": [{ "major": 8, "minor": 0, "rate": 9 }] },
        });
        let expected = [
            "cpu.weight 39",
            "cpu.max 100000 200000",
            "cpu.max.burst 7",
            "cpuset.cpus 0-1",
            "cpuset.mems 0",
            "memory.max 419430400",
            "memory.low 5",
            "memory.swap.max 10485760",
            "pids.max 134",
            "io.max 8:0 riops=9",
        ];
        assert_eq!(lines(json), expected);
    }

    #[test]
    fn no_limit_is_max_and_silence_sets_nothing() {
        let json = json!({ "cpu": { "quota": -1 }, "memory": { "limit": -1, "swap": -1 }, "pids": { "limit": -1 } });
        assert_eq!(lines(json), ["cpu.max max 100000", "memory.max max", "memory.swap.max max", "pids.max max"]);
        assert_eq!(lines(json!({})), Vec::<String>::new());
        assert_eq!(lines(json!({ "cpu": { "idle": 1, "shares": 2 } })), ["cpu.idle 1"]);
        assert_eq!(lines(json!({ "pids": { "limit": i64::MAX } })), ["pids.max max"]);
    }

    #[test]
    fn a_lower_limit_does_not_shrink_what_the_machine_may_have() {
        assert_eq!(lines(json!({ "memory": { "limit": 1 << 20 } })), ["memory.max 419430400"]);
    }
}
