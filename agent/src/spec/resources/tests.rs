use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn full(json: Value, present: &Present) -> Result<(Resources, Vec<String>)> {
    update(json.to_string().as_bytes(), present)
}

/// File and value of each limit.
fn planned(json: Value) -> Result<Vec<(String, String)>> {
    let (resources, _) = full(json, &Present::default())?;
    let joined = |limit: Limit| limit.choices.into_iter().reduce(|a, b| (a.0 + "|" + &b.0, a.1 + "|" + &b.1));
    Ok(resources.limits.into_iter().filter_map(joined).collect())
}

fn expect(json: Value, expected: &[(&str, &str)]) {
    let expected: Vec<_> = expected.iter().map(|(file, value)| ((*file).to_owned(), (*value).to_owned())).collect();
    assert_eq!(planned(json.clone()).unwrap(), expected, "{json}");
}

#[test]
fn cgroup_v1_words_become_v2_files() {
    expect(
        json!({
            "cpu": {"shares": 1024, "quota": 50000, "period": 200000, "burst": 1000, "idle": 0,
                    "cpus": "0-1", "mems": "0"},
            "memory": {"limit": 1000, "swap": 1500, "reservation": 500},
            "pids": {"limit": 42},
        }),
        &[
            ("pids.max", "42"),
            ("memory.swap.max", "500"),
            ("memory.max", "1000"),
            ("memory.low", "500"),
            ("cpu.idle", "0"),
            ("cpu.weight", "39"),
            ("cpu.max.burst", "1000"),
            ("cpu.max", "50000 200000"),
            ("cpu.max.burst", "1000"),
            ("cpuset.cpus", "0-1"),
            ("cpuset.mems", "0"),
        ],
    );
    expect(json!({"cpu": {"shares": 1024, "idle": 1}}), &[("cpu.idle", "1")]);
    expect(
        json!({
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
            "unified": {"memory.high": "1G", "cgroup.max.depth": "3"},
        }),
        &[
            ("io.bfq.weight|io.weight", "10|1"),
            ("io.bfq.weight|io.weight", "8:16 1000|8:16 10000"),
            ("io.max", "8:0 rbps=1000"),
            ("io.max", "8:0 wbps=2000"),
            ("io.max", "8:0 riops=30"),
            ("io.max", "8:0 wiops=max"),
            ("hugetlb.2MB.max", "4194304"),
            ("hugetlb.2MB.rsvd.max", "4194304"),
            ("rdma.max", "mlx4_0 hca_object=7"),
            ("rdma.max", "mlx5_1 hca_handle=3 hca_object=10000"),
            ("cgroup.max.depth", "3"),
            ("memory.high", "1G"),
        ],
    );
}

#[test]
fn negative_is_unlimited_and_zero_is_unset() {
    expect(
        json!({"cpu": {"shares": 0, "quota": -1}, "memory": {"limit": -1}, "pids": {"limit": 0}}),
        &[("memory.swap.max", "max"), ("memory.max", "max"), ("cpu.max", "max 100000")],
    );
    expect(
        json!({"memory": {"limit": 0, "swap": -1}, "pids": {"limit": -1}}),
        &[("pids.max", "max"), ("memory.swap.max", "max")],
    );
    expect(json!({"memory": {"limit": 5, "swap": 5}}), &[("memory.swap.max", "0"), ("memory.max", "5")]);
    expect(json!({"cpu": {}, "memory": {}, "blockIO": {"weight": 0}, "network": {}}), &[]);
}

#[test]
fn an_update_keeps_what_it_does_not_name() {
    let present = Present { cpu_max: "20000 50000\n".into(), memory_current: 0 };
    for (cpu, expected) in [
        (json!({"quota": 30000}), "30000 50000"),
        (json!({"period": 60000}), "20000 60000"),
        (json!({"quota": -1}), "max 50000"),
        (json!({"quota": 1000, "period": 2000}), "1000 2000"),
    ] {
        let (resources, _) = full(json!({"cpu": cpu}), &present).unwrap();
        assert_eq!(resources.limits[0].choices[0].1, expected, "{cpu}");
        assert!(!resources.names_devices);
    }
}

#[test]
fn a_limit_below_what_is_used_is_refused_where_that_is_asked() {
    let present = Present { cpu_max: String::new(), memory_current: 1000 };
    let with = |memory: Value| full(json!({"memory": memory}), &present).map_err(|error| error.field);
    let field = |name: &str| Err(format!("linux.resources.memory.{name}"));
    assert!(with(json!({"limit": 1000})).is_ok());
    assert!(with(json!({"limit": 1001, "checkBeforeUpdate": true})).is_ok());
    assert!(with(json!({"limit": -1, "checkBeforeUpdate": true})).is_ok());
    assert_eq!(with(json!({"limit": 1000, "checkBeforeUpdate": true})).map(drop), field("limit"));
    assert_eq!(with(json!({"limit": 900, "swap": 950, "checkBeforeUpdate": true})).map(drop), field("swap"));
}

#[test]
fn what_cgroup_v2_does_not_have_is_noted_or_refused_by_its_name() {
    let (_, notes) = full(json!({"cpu": {"shares": 5, "idle": 1}}), &Present::default()).unwrap();
    assert!(notes.len() == 1 && notes[0].contains("cpu.shares"), "{notes:?}");
    let memory =
        json!({"kernel": 1, "kernelTCP": 1, "swappiness": 60, "disableOOMKiller": true, "useHierarchy": false});
    let (resources, notes) = full(json!({"memory": memory}), &Present::default()).unwrap();
    assert_eq!((resources.limits.len(), notes.len()), (0, 5));
    for name in ["kernel", "kernelTCP", "swappiness", "disableOOMKiller", "useHierarchy"] {
        assert!(notes.iter().any(|note| note.contains(&format!("memory.{name} "))), "{name}: {notes:?}");
    }
    let device = json!({"major": 8, "minor": -1, "rate": 1});
    let rule = |rule: Value| json!({"devices": [{"allow": false, "access": "rwm"}, rule]});
    for (json, field) in [
        (json!({"memory": {"limit": 1000, "swap": 999}}), "memory.swap"),
        (json!({"memory": {"swap": 999}}), "memory.swap"),
        (json!({"memory": {"limit": 1000, "swap": -2}}), "memory.swap"),
        (json!({"cpu": {"realtimeRuntime": 1}}), "cpu.realtimeRuntime"),
        (json!({"cpu": {"realtimePeriod": 1}}), "cpu.realtimePeriod"),
        (json!({"cpu": {"idle": 2}}), "cpu.idle"),
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
        (json!({"unified": {"tasks": "1"}}), "unified[\"tasks\"]"),
        (json!({"unified": {"cgroup.procs": "1"}}), "unified[\"cgroup.procs\"]"),
        (json!({"unified": {"cgroup.kill": "1"}}), "unified[\"cgroup.kill\"]"),
        (json!({"unified": {"cgroup.subtree_control": "+memory"}}), "unified[\"cgroup.subtree_control\"]"),
        (rule(json!({"allow": true, "type": "c"})), "devices[1].access"),
        (rule(json!({"allow": true, "type": "c", "access": "x"})), "devices[1].access"),
        (rule(json!({"allow": true, "type": "p", "access": "r"})), "devices[1].type"),
        (rule(json!({"allow": true, "type": "c", "major": -2, "access": "r"})), "devices[1].major"),
        (rule(json!({"allow": true, "type": "c", "minor": 4294967296i64, "access": "r"})), "devices[1].minor"),
        (
            json!({"devices": [
                {"allow": true, "type": "c", "major": 7, "access": "rw"},
                {"allow": false, "type": "c", "major": 7, "minor": 1, "access": "w"},
            ]}),
            "devices[1]",
        ),
        (
            json!({"devices": [
                {"allow": true, "access": "rwm"},
                {"allow": false, "type": "c", "major": 1, "access": "r"},
            ]}),
            "devices",
        ),
    ] {
        let error = full(json.clone(), &Present::default()).unwrap_err();
        assert_eq!(error.field, format!("linux.resources.{field}"), "{json}: {error}");
    }
}

#[test]
fn what_containerd_always_says_leaves_the_usual_devices() {
    let usual = plan(None, &Present::default(), &mut Vec::new()).unwrap();
    assert!(usual.limits.is_empty() && !usual.names_devices);
    // ctr's default list names most of what is there anyway, and the console.
    let (same, _) = full(
        json!({"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            {"allow": true, "type": "c", "major": 136, "access": "rwm"},
        ]}),
        &Present::default(),
    )
    .unwrap();
    assert_eq!(same.devices, usual.devices);
    assert!(same.names_devices);
    let (privileged, _) = full(json!({"devices": [{"allow": true, "access": "rwm"}]}), &Present::default()).unwrap();
    // Load, six instructions before the answer.
    assert_eq!(privileged.devices.compile().len(), 8);
}

proptest! {
    #[test]
    fn any_memory_numbers_are_planned_or_refused(limit: i64, swap: i64, reservation: i64) {
        let _ = planned(json!({"memory": {"limit": limit, "swap": swap, "reservation": reservation}}));
    }

    #[test]
    fn any_present_text_is_read(cpu_max: String, quota: i64) {
        let present = Present { cpu_max, memory_current: 0 };
        let _ = full(json!({"cpu": {"quota": quota}}), &present);
    }
}
