use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    runc_table::{CASES, effect},
    *,
};
use crate::FieldError;

fn limits(json: &Value) -> Result<Limits, FieldError> {
    Limits::of(&serde_json::from_value(json.clone()).unwrap())
}

/// File and value of each setting of a new cgroup.
fn written(json: Value) -> Vec<(String, String)> {
    let settings = limits(&json).unwrap().settings(CpuTime::DEFAULT);
    let joined =
        |setting: Setting| setting.choices.into_iter().reduce(|a, b| (a.0 + "|" + &b.0, a.1 + "|" + &b.1)).unwrap();
    settings.into_iter().map(joined).collect()
}

fn expect(json: Value, expected: &[(&str, &str)]) {
    let expected: Vec<_> = expected.iter().map(|(file, value)| ((*file).to_owned(), (*value).to_owned())).collect();
    assert_eq!(written(json.clone()), expected, "{json}");
}

#[test]
fn what_runc_writes_is_written() {
    for case in CASES {
        let read = limits(&serde_json::from_str(case.resources).unwrap());
        let settings = read.ok().map(|limits| limits.settings(CpuTime::of_file(case.cpu_max)));
        assert_eq!(settings.map(|settings| effect(&settings, case.bfq)), case.expected(), "{case:?}");
    }
}

#[test]
fn cgroup_v1_words_become_v2_files_in_runcs_order() {
    expect(
        json!({
            "cpu": {"shares": 1024, "quota": 50000, "period": 200000, "burst": 1000, "idle": 0,
                    "cpus": "0-1", "mems": "0"},
            "memory": {"limit": 1000, "swap": 1500, "reservation": 500},
            "pids": {"limit": 42},
            "blockIO": {
                "weight": 10,
                "weightDevice": [{"major": 8, "minor": 16, "weight": 1000}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 2000}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 30}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 0}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
            "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}, "mlx4_0": {"hcaObjects": 7}},
            "unified": {"memory.high": "1G", "cgroup.max.depth": "3", "io.latency": "8:0 target=1\n8:1 target=2"},
        }),
        &[
            ("pids.max", "42"),
            ("memory.swap.max", "500"),
            ("memory.max", "1000"),
            ("memory.low", "500"),
            ("io.bfq.weight|io.weight", "10|1"),
            ("io.bfq.weight|io.weight", "8:16 1000|8:16 10000"),
            ("io.max", "8:0 rbps=1000"),
            ("io.max", "8:0 wbps=2000"),
            ("io.max", "8:0 riops=30"),
            ("io.max", "8:0 wiops=max"),
            ("io.latency", "8:0 target=1"),
            ("io.latency", "8:1 target=2"),
            ("cpu.idle", "0"),
            ("cpu.weight", "39"),
            ("cpu.max.burst", "1000"),
            ("cpu.max", "50000 200000"),
            ("cpu.max.burst", "1000"),
            ("cpuset.cpus", "0-1"),
            ("cpuset.mems", "0"),
            ("hugetlb.2MB.max", "4194304"),
            ("hugetlb.2MB.rsvd.max", "4194304"),
            ("rdma.max", "mlx4_0 hca_object=7"),
            ("rdma.max", "mlx5_1 hca_handle=3 hca_object=10000"),
            ("cgroup.max.depth", "3"),
            ("memory.high", "1G"),
        ],
    );
    expect(json!({"cpu": {"shares": 1024, "idle": 1}}), &[("cpu.idle", "1")]);
}

#[test]
fn both_languages_say_the_same_and_the_file_wins() {
    let old = json!({
        "cpu": {"quota": 150_000, "period": 50_000, "shares": 1024, "cpus": "0-2", "mems": "0"},
        "memory": {"limit": 1 << 20, "swap": (1 << 20) + 500, "reservation": 10},
        "pids": {"limit": 7},
    });
    let new = json!({
        "cpu": {"quota": 5, "shares": 2},
        "unified": {
            "cpu.max": "150000 50000", "cpu.weight": "39", "cpuset.cpus": "0,1-2", "cpuset.mems": "0",
            "memory.max": "1M", "memory.swap.max": "500", "memory.low": "10", "pids.max": "7",
        },
    });
    assert_eq!(written(old), written(new.clone()));
    let settings = limits(&new).unwrap().settings(CpuTime::DEFAULT);
    assert!(settings.iter().all(|setting| setting.field.starts_with("linux.resources.unified[")), "{settings:?}");
}

#[test]
fn units_of_bytes_are_the_kernels() {
    let max = |text: &str| limits(&json!({"unified": {"memory.max": text}})).map(|limits| limits.memory);
    for (text, bytes) in [("5", 5), ("1k", 1 << 10), ("3G", 3 << 30), ("1e", 1 << 60)] {
        assert_eq!(max(text).unwrap(), Some(Limit::To(bytes)), "{text}");
    }
    assert_eq!(max("max\n").unwrap(), Some(Limit::Unlimited));
    for text in ["", "K", "1KB", "-1", "16E", "ä"] {
        assert!(max(text).is_err(), "{text}");
    }
}

#[test]
fn an_update_keeps_what_it_does_not_name() {
    let present = CpuTime::of_file("20000 50000\n");
    for (cpu, expected) in [
        (json!({"quota": 30000}), "30000 50000"),
        (json!({"period": 60000}), "20000 60000"),
        (json!({"quota": -1}), "max 50000"),
        (json!({"quota": 1000, "period": 2000}), "1000 2000"),
    ] {
        let time = limits(&json!({"cpu": cpu})).unwrap().time_over(present).unwrap();
        assert_eq!(time.to_string(), expected, "{cpu}");
    }
    assert_eq!(limits(&json!({"cpu": {"shares": 5}})).unwrap().time_over(present), None);
    let settings = limits(&json!({"cpu": {"period": 5}})).unwrap().settings(present);
    assert_eq!(settings[0].field, "linux.resources.cpu.period");
}

#[test]
fn a_limit_below_what_is_used_is_refused_where_that_is_asked() {
    let with = |memory: Value| {
        let checked = limits(&json!({"memory": memory})).unwrap().check_memory(1000);
        checked.map_err(|error| error.field)
    };
    let field = |name: &str| Err(format!("linux.resources.memory.{name}"));
    assert!(with(json!({"limit": 1000})).is_ok());
    assert!(with(json!({"limit": 1001, "checkBeforeUpdate": true})).is_ok());
    assert!(with(json!({"limit": -1, "checkBeforeUpdate": true})).is_ok());
    assert_eq!(with(json!({"limit": 1000, "checkBeforeUpdate": true})), field("limit"));
    assert_eq!(with(json!({"limit": 900, "swap": 950, "checkBeforeUpdate": true})), field("swap"));
}

#[test]
fn what_has_no_effect_needs_no_kernel_that_has_it() {
    for (json, file) in [(json!({"burst": 0}), "cpu.max.burst"), (json!({"idle": 0}), "cpu.idle")] {
        let settings = limits(&json!({"cpu": json})).unwrap().settings(CpuTime::DEFAULT);
        assert_eq!((settings[0].choices[0].0.as_str(), settings[0].need), (file, Need::IfThere));
    }
    let settings = limits(&json!({"cpu": {"burst": 1}})).unwrap().settings(CpuTime::DEFAULT);
    assert_eq!(settings[0].need, Need::Must);
}

#[test]
fn what_cgroup_v2_does_not_have_is_noted_or_refused_by_its_name() {
    let notes = limits(&json!({"cpu": {"shares": 5, "idle": 1}})).unwrap().notes;
    assert!(notes.len() == 1 && notes[0].contains("cpu.shares"), "{notes:?}");
    let memory =
        json!({"kernel": 1, "kernelTCP": 1, "swappiness": 60, "disableOOMKiller": true, "useHierarchy": false});
    let noted = limits(&json!({"memory": memory})).unwrap();
    assert_eq!((noted.settings(CpuTime::DEFAULT).len(), noted.notes.len()), (0, 5));
    for name in ["kernel", "kernelTCP", "swappiness", "disableOOMKiller", "useHierarchy"] {
        assert!(noted.notes.iter().any(|note| note.contains(&format!("memory.{name} "))), "{name}: {noted:?}");
    }
    let device = json!({"major": 8, "minor": -1, "rate": 1});
    for (json, field) in [
        (json!({"memory": {"limit": 1000, "swap": 999}}), "memory.swap"),
        (json!({"memory": {"swap": 999}}), "memory.swap"),
        (json!({"memory": {"limit": 1000, "swap": -2}}), "memory.swap"),
        (json!({"memory": {"limit": -2}}), "memory.limit"),
        (json!({"memory": {"reservation": -2}}), "memory.reservation"),
        (json!({"pids": {"limit": -2}}), "pids.limit"),
        (json!({"cpu": {"realtimeRuntime": 1}}), "cpu.realtimeRuntime"),
        (json!({"cpu": {"realtimePeriod": 1}}), "cpu.realtimePeriod"),
        (json!({"cpu": {"idle": 2}}), "cpu.idle"),
        (json!({"cpu": {"cpus": "0-"}}), "cpu.cpus"),
        (json!({"cpu": {"mems": "x"}}), "cpu.mems"),
        (json!({"network": {"classID": 1}}), "network"),
        (json!({"blockIO": {"leafWeight": 10}}), "blockIO.leafWeight"),
        (json!({"blockIO": {"weight": 9}}), "blockIO.weight"),
        (
            json!({"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "leafWeight": 10}]}}),
            "blockIO.weightDevice[0].leafWeight",
        ),
        (
            json!({"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "weight": 1001}]}}),
            "blockIO.weightDevice[0].weight",
        ),
        (json!({"blockIO": {"throttleReadIOPSDevice": [device]}}), "blockIO.throttleReadIOPSDevice[0]"),
        (json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}), "hugepageLimits[0].pageSize"),
        (json!({"rdma": {"a b": {"hcaHandles": 1}}}), "rdma[\"a b\"]"),
        (json!({"rdma": {"a": {}}}), "rdma[\"a\"]"),
        (json!({"unified": {"../memory.high": "1"}}), "unified[\"../memory.high\"]"),
        (json!({"unified": {"io.../x": "1"}}), "unified[\"io.../x\"]"),
        (json!({"unified": {"tasks": "1"}}), "unified[\"tasks\"]"),
        (json!({"unified": {"cgroup.procs": "1"}}), "unified[\"cgroup.procs\"]"),
        (json!({"unified": {"cgroup.kill": "1"}}), "unified[\"cgroup.kill\"]"),
        (json!({"unified": {"cgroup.subtree_control": "+memory"}}), "unified[\"cgroup.subtree_control\"]"),
        (json!({"unified": {"cpu.max": "1 0"}}), "unified[\"cpu.max\"]"),
        (json!({"unified": {"cpu.weight": "0"}}), "unified[\"cpu.weight\"]"),
        (json!({"unified": {"memory.max": "much"}}), "unified[\"memory.max\"]"),
    ] {
        let error = limits(&json).unwrap_err();
        assert_eq!(error.field, format!("linux.resources.{field}"), "{json}: {error}");
    }
}

/// The kernel's rule for the two files, and the values that it holds.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    time: CpuTime,
    burst: u64,
}

impl Kernel {
    fn takes(quota: Limit, burst: u64) -> bool {
        matches!(quota, Limit::Unlimited) || matches!(quota, Limit::To(quota) if burst <= quota)
    }

    fn write(&mut self, setting: &Setting) {
        let (file, value) = &setting.choices[0];
        let taken = if file == "cpu.max" {
            let time = CpuTime::of_file(value);
            let taken = Self::takes(time.quota, self.burst);
            if taken {
                self.time = time;
            }
            taken
        } else {
            let burst = value.parse().unwrap();
            let taken = Self::takes(self.time.quota, burst);
            if taken {
                self.burst = burst;
            }
            taken
        };
        assert!(taken || setting.need == Need::Try, "{setting:?} is refused by {self:?}");
    }
}

fn quota() -> impl Strategy<Value = i64> {
    prop_oneof![Just(-1), 1000i64..100_000]
}

proptest! {
    /// Whatever a cgroup has, it can become whatever it could have been made with.
    #[test]
    fn burst_and_quota_are_written_in_an_order_that_the_kernel_takes(
        was in quota(), had in 0u64..100_000, quota in quota(), burst in 0u64..100_000, period in 1000u64..1_000_000,
    ) {
        let was = u64::try_from(was).map_or(Limit::Unlimited, Limit::To);
        let wanted = u64::try_from(quota).map_or(Limit::Unlimited, Limit::To);
        prop_assume!(Kernel::takes(was, had) && Kernel::takes(wanted, burst));
        let mut kernel = Kernel { time: CpuTime { quota: was, period: 100_000 }, burst: had };
        let asked = limits(&json!({"cpu": {"quota": quota, "period": period, "burst": burst}})).unwrap();
        for setting in asked.settings(kernel.time) {
            kernel.write(&setting);
        }
        prop_assert_eq!(kernel.time, CpuTime { quota: wanted, period });
        prop_assert_eq!(kernel.burst, burst);
    }

    #[test]
    fn any_numbers_are_read_or_refused(
        quota: Option<i64>, period: Option<u64>, shares: Option<u64>, limit: Option<i64>, swap: Option<i64>,
        file in "(cpu|cpuset|memory|io|pids)\\.[a-z.]{1,8}", value in ".{0,12}", cpu_max: String,
    ) {
        let read = limits(&json!({
            "cpu": {"quota": quota, "period": period, "shares": shares},
            "memory": {"limit": limit, "swap": swap},
            "unified": {file: value},
        }));
        if let Ok(limits) = read {
            let _ = limits.settings(CpuTime::of_file(&cpu_max));
            prop_assert!(limits.weight.is_none_or(|weight| (1..=10_000).contains(&weight)));
        }
    }
}
