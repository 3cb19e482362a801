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
}
