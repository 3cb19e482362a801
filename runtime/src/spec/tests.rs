use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn spec() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/", "oomScoreAdj": 4711 },
        "root": { "path": "rootfs" },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": { "namespaces": [
            { "type": "mount" }, { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }
        ] },
    })
}

fn without(spec: &mut Value, kind: &str) {
    spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != kind);
}

fn device(spec: &mut Value, kind: &str, major: i64, minor: i64) {
    spec["linux"]["devices"] = json!([{ "path": "/dev/x", "type": kind, "major": major, "minor": minor }]);
}

fn read(json: &[u8]) -> Result<BundleSpec, SpecError> {
    let bundle = tempfile::tempdir().unwrap();
    std::fs::write(bundle.path().join("config.json"), json).unwrap();
    BundleSpec::read(bundle.path())
}

#[test]
fn a_good_one_gives_its_root() {
    let read = read(spec().to_string().as_bytes()).unwrap();
    assert!(read.rootfs.ends_with("rootfs") && read.rootfs.is_absolute());
    assert_eq!(read.oom_score_adj, 1000);
}

#[test]
fn a_seccomp_profile_that_says_nothing_is_none() {
    let plain = read(spec().to_string().as_bytes()).unwrap();
    for nothing in [json!({}), json!({ "defaultAction": "", "syscalls": [] }), json!({ "architectures": [] })] {
        let mut spec = spec();
        spec["linux"]["seccomp"] = nothing;
        let read = read(spec.to_string().as_bytes()).unwrap();
        let json = |json: &[u8]| serde_json::from_slice::<Value>(json).unwrap();
        assert_eq!(json(&read.json), json(&plain.json));
    }
    let mut spec = spec();
    spec["linux"]["seccomp"] = json!({ "syscalls": [{ "names": ["bpf"], "action": "SCMP_ACT_ERRNO" }] });
    let message = read(spec.to_string().as_bytes()).unwrap_err().to_string();
    assert!(message.contains("defaultAction"), "{message}");
}

#[test]
fn each_fault_is_named() {
    type Fault = fn(&mut Value);
    let faults: [(Fault, &str); 27] = [
        (|spec| spec["ociVersion"] = json!("2.0"), "ociVersion"),
        (|spec| spec["process"]["args"] = json!([]), "process.args"),
        (|spec| spec["process"]["cwd"] = json!("here"), "process.cwd"),
        (|spec| drop(spec.as_object_mut().unwrap().remove("process")), "process"),
        (|spec| drop(spec.as_object_mut().unwrap().remove("root")), "root"),
        (|spec| spec["linux"]["namespaces"] = json!([{ "type": "mount" }]), "linux.namespaces[pid]"),
        (|spec| without(spec, "network"), "linux.namespaces[network]: is not listed"),
        (|spec| without(spec, "ipc"), "linux.namespaces[ipc]: is not listed"),
        (|spec| without(spec, "uts"), "linux.namespaces[uts]: is not listed"),
        (|spec| without(spec, "mount"), "linux.namespaces[mount]: is not listed"),
        (|spec| drop(spec.as_object_mut().unwrap().remove("linux")), "linux: is missing"),
        (|spec| spec["linux"]["namespaces"][4]["type"] = json!("pid"), "linux.namespaces[pid]: is listed twice"),
        (
            |spec| spec["linux"]["namespaces"][2]["path"] = json!("run/netns/x"),
            "linux.namespaces[network]: \"run/netns/x\" is not an absolute path",
        ),
        (
            |spec| spec["linux"]["namespaces"][3]["path"] = json!("/run/ipc/x"),
            "linux.namespaces[ipc]: \"/run/ipc/x\" is a namespace of the host",
        ),
        (
            |spec| spec["linux"]["namespaces"][3]["path"] = json!("/proc/1/ns/net"),
            "linux.namespaces[ipc]: \"/proc/1/ns/net\"",
        ),
        (|spec| spec["mounts"][0] = json!({ "destination": "/x", "type": "bind" }), "mounts[0].source"),
        (
            |spec| spec["mounts"] = json!(vec![json!({ "destination": "/x", "type": "bind", "source": "/y" }); 1001]),
            "1001 bind mounts",
        ),
        (|spec| device(spec, "b", 8, 0), "linux.devices[0] (/dev/x): the block device 8:0 of the host"),
        (|spec| device(spec, "c", 10, 232), "linux.devices[0] (/dev/x): the character device 10:232"),
        (|spec| device(spec, "c", -1, 3), "linux.devices[0] (/dev/x)"),
        (|spec| spec["hooks"] = json!({ "prestart": [{ "path": "true" }] }), "hooks.prestart[0].path"),
        (|spec| spec["hooks"] = json!({ "poststop": [{ "path": "/t", "timeout": 0 }] }), "hooks.poststop[0].timeout"),
        (|spec| spec["hooks"] = json!({ "poststart": [{ "path": "/t", "env": ["X"] }] }), "hooks.poststart[0].env"),
        (
            |spec| spec["hooks"] = json!({ "createRuntime": [{ "path": "/t", "args": ["a\0"] }] }),
            "hooks.createRuntime[0]",
        ),
        (|spec| spec["linux"]["resources"] = json!({ "cpu": { "cpus": "x" } }), "linux.resources.cpu.cpus"),
        (
            |spec| spec["linux"]["resources"] = json!({ "memory": { "limit": 2, "swap": 1 } }),
            "linux.resources.memory.swap",
        ),
        (|spec| spec["process"]["args"] = json!("sh"), "invalid type"),
    ];
    for (fault, words) in faults {
        let mut spec = spec();
        fault(&mut spec);
        let message = read(spec.to_string().as_bytes()).unwrap_err().to_string();
        assert!(message.contains(words) && message.contains("config.json"), "{words}: {message}");
    }
    let message = read(b"{ \"ociVersion\": \"1.0\",\n oops }").unwrap_err().to_string();
    assert!(message.contains("line 2"), "{message}");
    assert!(matches!(read(&vec![b' '; (MAX_SIZE + 1) as usize]), Err(SpecError::TooLarge(_))));
    assert!(matches!(BundleSpec::read(Path::new("/no/such")), Err(SpecError::Read { .. })));
}

#[test]
fn what_the_host_does_for_a_container_is_read() {
    let mut spec = spec();
    spec["mounts"] = json!([
        { "destination": "/a", "type": "bind", "source": "/host/a", "options": ["rbind", "rw", "ro"] },
        { "destination": "/b", "type": "none", "source": "b", "options": ["bind", "ro", "rw"] },
        { "destination": "/c", "type": "tmpfs", "source": "tmpfs" },
        { "destination": "d", "source": "/d", "options": ["bind", "rro"] },
    ]);
    spec["hooks"] = json!({
        "createRuntime": [{ "path": "/c" }],
        "prestart": [{ "path": "/p", "args": ["p", "1"], "env": ["A=b"], "timeout": 5 }],
        "createContainer": [{ "path": "in the guest" }],
    });
    spec["linux"]["cgroupsPath"] = json!("/a/b");
    spec["linux"]["devices"] = json!([
        { "path": "/dev/n", "type": "c", "major": 1, "minor": 3 }, { "path": "/dev/f", "type": "p" },
    ]);
    spec["annotations"] = json!({ "x": "y" });
    let read = read(spec.to_string().as_bytes()).unwrap();
    let binds: Vec<_> =
        read.binds.iter().map(|bind| (bind.index, bind.source.is_absolute(), bind.recursive, bind.read_only)).collect();
    assert_eq!(binds, [(0, true, true, true), (1, true, false, false), (3, true, false, true)]);
    assert!(read.binds[1].source.ends_with("b") && read.binds[1].source != Path::new("/b"), "it lies in the bundle");
    let paths: Vec<_> = read.hooks.create.iter().map(|hook| hook.path.display().to_string()).collect();
    assert_eq!(paths, ["/p", "/c"], "prestart is the older one");
    assert_eq!(read.cgroups_path.as_deref(), Some("/a/b"));
    assert_eq!(read.annotations["x"], "y");
}

#[test]
fn only_the_pods_own_namespaces_are_joined() {
    let mut spec = spec();
    spec["linux"]["namespaces"][3]["path"] = json!("/proc/4711/ns/ipc");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time", "path": "" }));
    let read = read(spec.to_string().as_bytes()).unwrap();
    let joined = read.joined(4711, "first").unwrap();
    assert_eq!((joined.len(), joined[0].type_.as_str(), joined[0].container_id.as_str()), (1, "ipc", "first"));
    for refused in [read.joined(4712, "first").unwrap_err(), read.check_first().unwrap_err()] {
        let refused = refused.to_string();
        assert!(refused.contains("linux.namespaces[ipc]: PID 4711 is not in this pod"), "{refused}");
    }
}

#[test]
fn the_guest_gets_the_file_as_it_is_unless_it_has_numbers_of_the_host() {
    let size = MachineSize { vcpus: 1, memory: 1 << 28 };
    let mut spec = spec();
    spec["linux"]["resources"] = json!({ "cpu": { "shares": 5 } });
    let text = format!(" {spec}");
    assert_eq!(read(text.as_bytes()).unwrap().for_guest(size).unwrap(), text.as_bytes());
    spec["linux"]["resources"]["cpu"]["cpus"] = json!("7");
    let guests = read(spec.to_string().as_bytes()).unwrap().for_guest(size).unwrap();
    spec["linux"]["resources"]["cpu"]["cpus"] = json!("0");
    assert_eq!(serde_json::from_slice::<Value>(&guests).unwrap(), spec);
}

#[test]
fn the_pods_network_namespace_is_the_hosts_to_open_and_the_guest_does_not_see_it() {
    let size = MachineSize { vcpus: 1, memory: 1 << 28 };
    let mut spec = spec();
    let with = |spec: &mut Value, path: &str| {
        spec["linux"]["namespaces"][2]["path"] = json!(path);
        read(spec.to_string().as_bytes()).unwrap()
    };
    let none = with(&mut spec, "");
    assert!(none.open_network().unwrap().is_none());
    let refused = with(&mut spec, "/no/such").open_network().unwrap_err().to_string();
    let expected = "linux.namespaces[network]: \"/no/such\" cannot be opened: No such file or directory";
    assert!(refused.contains(expected), "{refused}");

    let (pods, other) = (Namespace::new().expect("these tests run as root"), Namespace::new().unwrap());
    let thread = pods.task_thread().unwrap();
    let named = with(&mut spec, &format!("/proc/{}/ns/net", thread.pid()));
    assert_eq!(named.open_network().unwrap().unwrap().identity().unwrap(), pods.identity().unwrap());
    named.check_network(&pods).unwrap();
    none.check_network(&pods).unwrap();
    named.check_first().expect("it is of no container");
    let refused = named.check_network(&other).unwrap_err().to_string();
    assert!(refused.contains("is not the network namespace of this pod"), "{refused}");
    let guests: Value = serde_json::from_slice(&named.for_guest(size).unwrap()).unwrap();
    assert_eq!(guests["linux"]["namespaces"][2], json!({ "type": "network" }));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&bytes);
    }
}
