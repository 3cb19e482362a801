use caisson_oci::resources::runc_table::{CASES, effect};
use serde_json::{Value, json};

use super::*;

fn full(json: &Value) -> Result<(Resources, Vec<String>)> {
    update(json.to_string().as_bytes(), &Present::default())
}

#[test]
fn the_guest_writes_what_runc_writes() {
    for case in CASES {
        let present = Present { time: CpuTime::of_file(case.cpu_max), memory_current: 0 };
        let planned = update(case.resources.as_bytes(), &present).ok();
        let written = planned.map(|(resources, _)| effect(&resources.settings, case.bfq));
        assert_eq!(written, case.expected(), "{case:?}");
    }
}

#[test]
fn device_rules_that_cannot_be_are_refused_by_their_name() {
    let rule = |rule: Value| json!({"devices": [{"allow": false, "access": "rwm"}, rule]});
    for (json, field) in [
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
        (json!({"memory": {"swap": 999}}), "memory.swap"),
    ] {
        let error = full(&json).unwrap_err();
        assert_eq!(error.field, format!("linux.resources.{field}"), "{json}: {error}");
    }
}

#[test]
fn a_limit_below_what_is_used_is_refused_where_that_is_asked() {
    let present = Present { memory_current: 1000, ..Present::default() };
    let with = |limit: u64| {
        let json = json!({"memory": {"limit": limit, "checkBeforeUpdate": true}, "cpu": {"idle": 1, "shares": 5}});
        update(json.to_string().as_bytes(), &present)
    };
    assert_eq!(with(1000).unwrap_err().field, "linux.resources.memory.limit");
    let (resources, notes) = with(1001).unwrap();
    assert_eq!((resources.settings.len(), notes.len(), resources.names_devices), (2, 1, false));
}

#[test]
fn what_containerd_always_says_leaves_the_usual_devices() {
    let usual = plan(None, &Present::default(), &mut Vec::new()).unwrap();
    assert!(usual.settings.is_empty() && !usual.names_devices);
    // ctr's default list names most of what is there anyway, and the console.
    let (same, _) = full(&json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": true, "type": "c", "major": 136, "access": "rwm"},
    ]}))
    .unwrap();
    assert_eq!(same.devices, usual.devices);
    assert!(same.names_devices);
    let (privileged, _) = full(&json!({"devices": [{"allow": true, "access": "rwm"}]})).unwrap();
    // Load, six instructions before the answer.
    assert_eq!(privileged.devices.compile().len(), 8);
}
