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

use caisson_oci::{CpuTime, Limit, Limits, Setting, resources::CpuTimeChange};

use crate::{host::config::Config, resources::size::MachineSize};

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

    /// Microseconds in each period.
    fn cpu_time(self, period: u64) -> u64 {
        period.saturating_mul(self.cpu_millis) / 1000
    }

    /// The pod's processor time when its container has this.
    pub fn added_to(self, time: CpuTime) -> CpuTime {
        let quota = match time.quota {
            Limit::To(quota) => Limit::To(quota.saturating_add(self.cpu_time(time.period))),
            Limit::Unlimited => Limit::Unlimited,
        };
        CpuTime { quota, ..time }
    }

    /// The container's processor time when its pod has this.
    pub fn taken_from(self, time: CpuTime) -> CpuTime {
        let quota = match time.quota {
            Limit::To(quota) => Limit::To(quota.saturating_sub(self.cpu_time(time.period))),
            Limit::Unlimited => Limit::Unlimited,
        };
        CpuTime { quota, ..time }
    }
}

/// Threads of caisson-vmm (beside its vCPUs) and caisson-fsd, and room for more.
const THREADS: u64 = 32;
/// More than this the kernel does not take for pids.max: PID_MAX_LIMIT of include/linux/threads.h.
const MAX_PIDS: u64 = 4_194_304;

/// The settings for what is asked, in the order in which they are written; `present` is the processor time that the
/// container has now.
pub fn settings(asked: &Limits, present: CpuTime, size: MachineSize, overhead: Overhead) -> Vec<Setting> {
    let mut pod = asked.clone();
    // These are the guest's.
    pod.huge_pages.clear();
    pod.rdma.clear();
    pod.files.clear();
    if let Some(time) = asked.time_over(present) {
        let CpuTime { quota, period } = overhead.added_to(time);
        pod.time = CpuTimeChange { quota: Some(quota), period: Some(period) };
    }
    if let Some(Limit::To(_)) = asked.memory {
        pod.memory = Some(Limit::To(size.memory.saturating_add(overhead.memory)));
    }
    if let Some(Limit::To(limit)) = asked.pids {
        let pids = limit.saturating_add(THREADS + u64::from(size.vcpus));
        pod.pids = Some(if pids > MAX_PIDS { Limit::Unlimited } else { Limit::To(pids) });
    }
    pod.settings(present)
}

#[cfg(test)]
mod tests {
    use caisson_oci::resources::runc_table::{CASES, effect};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::resources::tests::asked;

    const SIZE: MachineSize = MachineSize { vcpus: 2, memory: 300 << 20 };
    const OVERHEAD: Overhead = Overhead { memory: 100 << 20, cpu_millis: 250 };

    fn lines_after(json: serde_json::Value, present: &str) -> Vec<String> {
        let present = OVERHEAD.taken_from(CpuTime::of_file(present));
        let settings = settings(&asked(json).unwrap(), present, SIZE, OVERHEAD);
        let line = |setting: &Setting| setting.choices.last().map(|(file, value)| format!("{file} {value}")).unwrap();
        settings.iter().map(line).collect()
    }

    fn lines(json: serde_json::Value) -> Vec<String> {
        lines_after(json, "")
    }

    #[test]
    fn the_host_writes_what_runc_writes_for_a_pod_without_overhead() {
        let none = Overhead { memory: 0, cpu_millis: 0 };
        for case in CASES {
            let asked = asked(serde_json::from_str(case.resources).unwrap()).ok();
            let written = asked.map(|asked| {
                // A machine that is as large as the limit.
                let memory = match asked.memory {
                    Some(Limit::To(memory)) => memory,
                    _ => 0,
                };
                let size = MachineSize { vcpus: 0, memory };
                effect(&settings(&asked, CpuTime::of_file(case.cpu_max), size, none), case.bfq)
            });
            let expected = case.expected().map(|mut files| {
                files.retain(|file, _| {
                    file != "memory.high" && !["hugetlb", "rdma"].iter().any(|name| file.starts_with(name))
                });
                if let Some(pids) = files.get_mut("pids.max").filter(|pids| *pids != "max") {
                    *pids = (pids.parse::<u64>().unwrap() + THREADS).to_string();
                }
                files
            });
            assert_eq!(written, expected, "{case:?}");
        }
    }

    #[test]
    fn an_update_of_the_period_alone_keeps_the_containers_quota() {
        let json = json!({ "cpu": { "period": 200_000 } });
        // A container with 50000 in 100000.
        assert_eq!(lines_after(json.clone(), "75000 100000"), ["cpu.max 100000 200000"]);
        assert_eq!(lines_after(json, "max 100000"), ["cpu.max max 200000"]);
        assert_eq!(lines_after(json!({ "cpu": { "quota": 10_000 } }), "75000 200000"), ["cpu.max 60000 200000"]);
        assert_eq!(lines_after(json!({ "cpu": { "burst": 0 } }), "75000 100000"), ["cpu.max.burst 0"]);
    }

    proptest! {
        /// The pod's file is all that remembers its container's processor time.
        #[test]
        fn a_containers_time_can_be_read_from_its_pods(
            quota in 1000u64..1 << 40, period in 1000u64..=1_000_000, cpu_millis in 0u64..10_000,
        ) {
            let overhead = Overhead { memory: 0, cpu_millis };
            for quota in [Limit::To(quota), Limit::Unlimited] {
                let time = CpuTime { quota, period };
                let file = overhead.added_to(time).to_string();
                prop_assert_eq!(overhead.taken_from(CpuTime::of_file(&file)), time);
            }
        }
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
            "pids.max 134",
            "memory.swap.max 10485760",
            "memory.max 419430400",
            "memory.low 5",
            "io.max 8:0 riops=9",
            "cpu.weight 39",
            "cpu.max.burst 7",
            "cpu.max 100000 200000",
            "cpu.max.burst 7",
            "cpuset.cpus 0-1",
            "cpuset.mems 0",
        ];
        assert_eq!(lines(json), expected);
    }

    #[test]
    fn no_limit_is_max_and_silence_sets_nothing() {
        let json = json!({ "cpu": { "quota": -1 }, "memory": { "limit": -1, "swap": -1 }, "pids": { "limit": -1 } });
        assert_eq!(lines(json), ["pids.max max", "memory.swap.max max", "memory.max max", "cpu.max max 100000"]);
        assert_eq!(lines(json!({})), Vec::<String>::new());
        assert_eq!(lines(json!({ "cpu": { "idle": 1, "shares": 2 } })), ["cpu.idle 1"]);
        assert_eq!(lines(json!({ "pids": { "limit": i64::MAX } })), ["pids.max max"]);
        assert_eq!(lines(json!({ "pids": { "limit": 4_194_304 } })), ["pids.max max"]);
    }

    #[test]
    fn a_lower_limit_does_not_shrink_what_the_machine_may_have() {
        assert_eq!(lines(json!({ "memory": { "limit": 1 << 20 } })), ["memory.max 419430400"]);
    }
}
