use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn minimal() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"},
        ]},
    })
}

fn with(pointer: &str, value: Value) -> Result<Accepted> {
    let mut spec = minimal();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    spec.pointer_mut(parent).unwrap()[name] = value;
    container(spec.to_string().as_bytes(), &Answers::default())
}

#[test]
fn a_minimal_specification_is_accepted_without_notes() {
    let accepted = container(minimal().to_string().as_bytes(), &Answers::default()).unwrap();
    assert_eq!(accepted.process.args, ["/bin/true"]);
    assert_eq!(accepted.process.user.umask, 0o022);
    assert_eq!(accepted.notes, [""; 0]);
}

#[test]
fn what_containerd_always_says_is_accepted_and_noted() {
    let mut spec = minimal();
    spec["process"]["apparmorProfile"] = json!("cri-containerd.apparmor.d");
    spec["linux"]["cgroupsPath"] = json!("/default/x");
    spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
    let notes = container(spec.to_string().as_bytes(), &Answers::default()).unwrap().notes;
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].contains("apparmorProfile"), "{notes:?}");
}

#[test]
fn what_has_no_effect_is_noted_by_its_name() {
    let mut spec = minimal();
    spec["process"]["apparmorProfile"] = json!("x");
    spec["process"]["selinuxLabel"] = json!("x");
    spec["linux"]["mountLabel"] = json!("x");
    spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "cgroup");
    spec["mounts"] = json!([{"destination": "x/y", "type": "tmpfs"}]);
    let accepted = container(spec.to_string().as_bytes(), &Answers::default()).unwrap();
    assert_eq!(accepted.view.mounts[0].destination, PathBuf::from("/x/y"));
    let names = [
        "process.apparmorProfile",
        "process.selinuxLabel",
        "linux.mountLabel",
        "linux.namespaces",
        "mounts[0] (x/y).destination",
    ];
    assert_eq!(accepted.notes.len(), names.len(), "{:?}", accepted.notes);
    for name in names {
        assert!(accepted.notes.iter().any(|note| note.starts_with(name)), "{name}: {:?}", accepted.notes);
    }
}

#[test]
fn each_field_that_cannot_be_honoured_is_refused_by_its_name() {
    let mapping = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    let mount = |extra: Value| {
        let mut mount = json!({"destination": "/x", "type": "tmpfs", "source": "tmpfs"});
        mount.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!([mount])
    };
    let cases = [
        ("/process/args", json!([]), "process.args"),
        ("/process/args", json!(["a\0b"]), "process.args"),
        ("/process/cwd", json!("tmp"), "process.cwd"),
        ("/process/env", json!(["A=\0"]), "process.env"),
        ("/process/oomScoreAdj", json!(1001), "process.oomScoreAdj"),
        ("/process/rlimits", json!([{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]), "process.rlimits"),
        ("/process/consoleSize", json!({"width": 65536, "height": 1}), "process.consoleSize"),
        ("/process/user", json!({"uid": u32::MAX, "gid": 0}), "process.user.uid"),
        ("/process/user", json!({"uid": 0, "gid": 0, "umask": 0o1000}), "process.user.umask"),
        ("/hostname", json!("x".repeat(65)), "hostname"),
        ("/hooks", json!({"createContainer": [{"path": "true"}]}), "hooks.createContainer[0].path"),
        ("/mounts", mount(json!({"type": "bind", "source": "/etc"})), "mounts[0] (/x).source"),
        ("/mounts", mount(json!({"options": ["rbind"], "source": "/etc"})), "mounts[0] (/x).source"),
        ("/linux/rootfsPropagation", json!("rprivat"), "linux.rootfsPropagation"),
        ("/linux/personality", json!({"domain": "LINUX32", "flags": ["X"]}), "linux.personality.flags"),
        ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
        ("/linux/netDevices", json!({"eth0": {"name": "e"}}), "linux.netDevices"),
        ("/linux/memoryPolicy", json!({"mode": "MPOL_BIND", "nodes": "0"}), "linux.memoryPolicy"),
        ("/linux/uidMappings", mapping, "linux.uidMappings"),
        ("/process/scheduler", json!({"policy": "SCHED_FAST"}), "process.scheduler.policy"),
        ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 8}), "process.ioPriority.priority"),
        ("/process/execCPUAffinity", json!({"final": "x"}), "process.execCPUAffinity.final"),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_CORE", "soft": 1, "hard": 1}, {"type": "RLIMIT_CORE", "soft": 1, "hard": 1}]),
            "process.rlimits",
        ),
        ("/mounts", mount(json!({"type": "ext4"})), "mounts[0] (/x).type"),
        ("/mounts", mount(json!({"destination": "/"})), "mounts[0] (/).destination"),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp.defaultAction"),
        ("/linux/maskedPaths", json!(["proc"]), "linux.maskedPaths"),
        ("/linux/sysctl", json!({"kernel.core_pattern": "|/x"}), "linux.sysctl[\"kernel.core_pattern\"]"),
        ("/linux/sysctl", json!({"net/../kernel/core_pattern": "|/x"}), "linux.sysctl[\"net/../kernel/core_pattern\"]"),
        (
            "/linux/devices",
            json!([{"path": "/dev/x", "type": "c", "major": -1, "minor": 0}]),
            "linux.devices[0] (/dev/x).major",
        ),
        ("/linux/resources", json!({"cpu": {"realtimePeriod": 5}}), "linux.resources.cpu.realtimePeriod"),
        ("/linux/namespaces", json!([{"type": "user"}]), "linux.namespaces"),
        ("/linux/namespaces", json!([{"type": "pid", "path": "/proc/1/ns/pid"}]), "linux.namespaces"),
        (
            "/linux/namespaces",
            json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]),
            "linux.namespaces",
        ),
    ];
    for (pointer, value, field) in cases {
        match with(pointer, value.clone()) {
            Ok(_) => panic!("{pointer} = {value} was accepted"),
            Err(error) => assert_eq!(error.field, field, "{pointer} = {value}: {error}"),
        }
    }
}

#[test]
fn a_document_that_is_no_specification_is_refused() {
    for json in ["", "{", "[]", "{\"process\": 1}", "{}"] {
        assert!(container(json.as_bytes(), &Answers::default()).is_err(), "{json}");
    }
    let large = format!("{{\"hostname\": \"{}\"}}", " ".repeat(MAX_SPEC));
    assert!(container(large.as_bytes(), &Answers::default()).unwrap_err().problem.contains("at most"));
}

#[test]
fn sysctl_keys_become_paths() {
    let accepted = with("/linux/sysctl", json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "4096"})).unwrap();
    let expected = [("kernel/shmmax", "4096"), ("net/ipv4/ip_forward", "1")];
    assert_eq!(accepted.view.sysctl, expected.map(|(path, value)| (PathBuf::from(path), value.to_owned())));
}

proptest::proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(json in proptest::collection::vec(proptest::num::u8::ANY, 0..256)) {
        let _ = container(&json, &Answers::default());
    }

    #[test]
    fn any_value_in_any_field_is_planned_or_refused(
        changes in proptest::collection::vec((proptest::sample::select(FIELDS.to_vec()), any_json()), 1..4),
    ) {
        let mut spec = full();
        for (pointer, value) in changes {
            if let Some(place) = spec.pointer_mut(pointer) {
                *place = value;
            }
        }
        let binds = BTreeMap::from([(1, PathBuf::from("b"))]);
        let _ = container(spec.to_string().as_bytes(), &Answers { binds, joins: vec![NamespaceKind::Uts], ..Answers::default() });
    }
}

/// A specification with something in each field that is read here.
fn full() -> Value {
    let mut spec = minimal();
    let map = json!([{"containerID": 0, "hostID": 5, "size": 10}]);
    spec["mounts"] = json!([
        {"destination": "/t", "type": "tmpfs", "source": "t", "options": ["rro", "size=1m", "tmpcopyup"]},
        {"destination": "/b", "type": "bind", "source": "/h", "options": ["rbind", "ridmap", "rslave"], "uidMappings": map, "gidMappings": map},
    ]);
    spec["hooks"] = json!({"createContainer": [{"path": "/h", "args": ["h"], "env": ["A=1"], "timeout": 1}]});
    spec["hostname"] = json!("h");
    spec["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 1, "flags": ["SCHED_FLAG_RECLAIM"]});
    spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_RT", "priority": 1});
    spec["process"]["execCPUAffinity"] = json!({"initial": "0", "final": "1-2"});
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_CPU", "soft": 1, "hard": 2}]);
    spec["linux"]["namespaces"] = json!([
        {"type": "pid"}, {"type": "ipc"}, {"type": "uts", "path": "/p"}, {"type": "mount"}, {"type": "network"},
        {"type": "user"}, {"type": "time"},
    ]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1, "nanosecs": 2}});
    spec["linux"]["rootfsPropagation"] = json!("rslave");
    spec["linux"]["personality"] = json!({"domain": "LINUX"});
    spec
}

const FIELDS: [&str; 24] = [
    "/mounts/0/destination",
    "/mounts/0/type",
    "/mounts/0/options/0",
    "/mounts/0/options/1",
    "/mounts/1/type",
    "/mounts/1/options/1",
    "/mounts/1/uidMappings/0/size",
    "/mounts/1/gidMappings",
    "/hooks/createContainer/0/path",
    "/hooks/createContainer/0/timeout",
    "/hooks/createContainer/0/env/0",
    "/hostname",
    "/process/scheduler/policy",
    "/process/scheduler/priority",
    "/process/ioPriority/priority",
    "/process/execCPUAffinity/final",
    "/process/rlimits/0/soft",
    "/linux/namespaces/2/path",
    "/linux/namespaces/5/type",
    "/linux/uidMappings/0/hostID",
    "/linux/gidMappings/0/containerID",
    "/linux/timeOffsets/boottime/nanosecs",
    "/linux/rootfsPropagation",
    "/linux/personality/domain",
];

fn any_json() -> impl Strategy<Value = Value> {
    let words = [
        "",
        "/",
        "/..",
        "bind",
        "rbind",
        "idmap",
        "tmpfs",
        "proc",
        "uts",
        "user",
        "shared",
        "0-5",
        "SCHED_DEADLINE",
        "A=\0",
    ];
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        proptest::sample::select(words.to_vec()).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
    ]
}

#[test]
fn the_full_specification_is_accepted_but_for_the_name_in_a_joined_namespace() {
    let binds = BTreeMap::from([(1, PathBuf::from("b"))]);
    let answers = Answers { binds, joins: vec![NamespaceKind::Uts], ..Answers::default() };
    let mut spec = full();
    assert_eq!(container(spec.to_string().as_bytes(), &answers).unwrap_err().field, "hostname");
    spec["hostname"] = Value::Null;
    let accepted = container(spec.to_string().as_bytes(), &answers).unwrap();
    assert_eq!(accepted.namespaces.joined, [NamespaceKind::Uts]);
    assert!(FIELDS.iter().all(|field| full().pointer(field).is_some()));
}
