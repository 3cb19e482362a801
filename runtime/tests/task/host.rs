//! What the host does for a container beside its root file system: bind mounts, hooks, namespaces of the pod; and what
//! it refuses before there is a machine.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, ShutdownRequest},
    shim_async::TaskClient,
};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use ttrpc::{Code, asynchronous::Client};

use crate::bench::{Bench, LIMIT, refusal, within};

fn hook(directory: &Path, name: &str, script: &str) -> Value {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    json!({ "path": path, "args": [name], "env": ["PATH=/bin:/usr/bin"] })
}

#[tokio::test]
async fn bind_mounts_are_there_before_the_agent_is_asked_and_go_with_the_container() {
    let bench = Bench::new().await;
    let host = bench.directory().join("host");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("file"), "content").unwrap();
    let request = bench.request_with("one", &["sleep"], |spec| {
        spec["mounts"] = json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/d", "type": "bind", "source": host, "options": ["rbind", "rw"] },
            { "destination": "/f", "type": "bind", "source": host.join("file"), "options": ["bind", "ro"] },
            { "destination": "/dev/x", "type": "bind", "source": "/dev/null", "options": ["bind"] },
        ]);
    });
    bench.create(&request).await.unwrap();
    let create = bench.guest.creates.lock().unwrap().pop().unwrap();
    let binds: Vec<_> = create.binds.iter().map(|bind| (bind.mount, bind.path.clone())).collect();
    assert_eq!(binds.iter().map(|bind| bind.0).collect::<Vec<_>>(), [1, 2, 3]);
    // The guest has the same directory once more at `.host`.
    let seen = |at: usize| bench.seen(binds[at].1.strip_prefix(".host/").unwrap());
    fs::write(seen(0).join("from-the-guest"), "").unwrap();
    assert!(host.join("from-the-guest").exists());
    assert_eq!(fs::read_to_string(seen(1)).unwrap(), "content");
    assert!(fs::write(seen(1), "x").is_err(), "read-only on the host itself");
    assert!(seen(2).exists());
    bench.delete("one", "").await.unwrap();
    assert_eq!(bench.shared(), Vec::<String>::new());
    assert!(host.join("file").exists());
}

#[tokio::test]
async fn a_bind_mount_that_cannot_be_is_creates_error_and_leaves_nothing() {
    let bench = Bench::new().await;
    let disk = bench.directory().join("disk");
    mknod(&disk, SFlag::S_IFBLK, Mode::S_IRWXU, makedev(7, 0)).unwrap();
    let disk = disk.to_str().unwrap();
    for (source, words) in [("/no/such", "No such file"), ("/proc/sys", "is on proc"), (disk, "device 7:0")] {
        let request = bench.request_with("one", &["sleep"], |spec| {
            spec["mounts"] = json!([{ "destination": "/d", "type": "bind", "source": source, "options": ["rbind"] }]);
        });
        let (code, message) = refusal(bench.create(&request).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(message.contains("mounts[0] (/d)") && message.contains(source) && message.contains(words), "{message}");
        assert_eq!(bench.shared(), Vec::<String>::new());
    }
    assert!(bench.guest.creates.lock().unwrap().is_empty());
}

#[tokio::test]
async fn hooks_run_at_their_moments_with_the_state_of_each() {
    let bench = Bench::new().await;
    let log = bench.directory().join("log");
    let note = |name: &str| format!("echo \"{name} $(cat)\" >> {}", log.display());
    let mut hooks = json!({});
    for (kind, name) in [("createRuntime", "c"), ("prestart", "p"), ("poststart", "started"), ("poststop", "stopped")] {
        hooks[kind] = json!([hook(bench.directory(), name, &note(name))]);
    }
    let request = bench.request_with("one", &["sleep"], |spec| {
        spec["hooks"] = hooks;
        spec["annotations"] = json!({ "who": "me" });
    });
    let noted = || -> Vec<(String, Value)> {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let split = |line: &str| line.split_once(' ').map(|(name, state)| (name.to_owned(), state.to_owned()));
        let lines = text.lines().filter_map(split);
        lines.map(|(name, state)| (name, serde_json::from_str(&state).unwrap())).collect()
    };
    let pid = bench.create(&request).await.unwrap().pid;
    let state = |status: &str| json!({ "ociVersion": "1.0.2", "id": "one", "status": status, "pid": pid, "bundle": request.bundle, "annotations": { "who": "me" } });
    let mut expected = vec![("p".to_owned(), state("creating")), ("c".to_owned(), state("creating"))];
    assert_eq!(noted(), expected);
    bench.start("one", "").await.unwrap();
    expected.push(("started".to_owned(), state("running")));
    assert_eq!(noted(), expected);
    bench.kill("one", "", 9).await.unwrap();
    bench.wait("one", "").await.unwrap();
    assert_eq!(noted(), expected);
    bench.delete("one", "").await.unwrap();
    let mut stopped = state("stopped");
    stopped.as_object_mut().unwrap().remove("pid");
    expected.push(("stopped".to_owned(), stopped));
    assert_eq!(noted(), expected);
}

#[tokio::test]
async fn a_hook_that_fails_fails_create_and_undoes_it() {
    let bench = Bench::new().await;
    let stopped = bench.directory().join("stopped");
    let fails = hook(bench.directory(), "fails", "echo no such luck >&2; exit 5");
    let poststop = hook(bench.directory(), "poststop", &format!("touch {}", stopped.display()));
    let request = bench.request_with("one", &["sleep"], |spec| {
        spec["hooks"] = json!({ "createRuntime": [fails], "poststop": [poststop] });
    });
    let (code, message) = refusal(bench.create(&request).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    for word in ["hooks.createRuntime[0]", "exit status: 5", "no such luck"] {
        assert!(message.contains(word), "{word}: {message}");
    }
    assert!(stopped.exists(), "the poststop hook has run");
    assert!(bench.guest.creates.lock().unwrap().is_empty(), "the agent was not asked");
    assert_eq!((bench.shared(), bench.events().await), (Vec::new(), Vec::new()));
    assert_eq!(refusal(bench.state("one", "").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn hooks_that_fail_later_do_no_harm_and_a_create_that_fails_runs_poststop() {
    let bench = Bench::new().await;
    let stopped = bench.directory().join("stopped");
    let fails = hook(bench.directory(), "fails", "exit 1");
    let poststop = hook(bench.directory(), "poststop", &format!("touch {}; exit 1", stopped.display()));
    let hooks = json!({ "poststart": [fails], "poststop": [poststop] });
    let request = bench.request_with("one", &["sleep"], |spec| spec["hooks"] = hooks.clone());
    bench.create(&request).await.unwrap();
    bench.start("one", "").await.expect("a failed poststart is no failure");
    bench.kill("one", "", 9).await.unwrap();
    bench.wait("one", "").await.unwrap();
    bench.delete("one", "").await.expect("nor is a failed poststop");
    fs::remove_file(&stopped).unwrap();
    let request = bench.request_with("two", &["uncreatable"], |spec| spec["hooks"] = hooks);
    assert!(refusal(bench.create(&request).await).1.contains("the guest cannot have it"));
    assert!(stopped.exists());
}

#[tokio::test]
async fn a_crash_leaves_poststop_to_delete_which_runs_it_once() {
    let bench = Bench::new().await;
    let stopped = bench.directory().join("stopped");
    let poststop = hook(bench.directory(), "poststop", &format!("cat >> {}", stopped.display()));
    let request = bench.request_with("one", &["sleep"], |spec| spec["hooks"] = json!({ "poststop": [poststop] }));
    bench.create(&request).await.unwrap();
    // The shim's end is only played: nothing more is asked of it.
    let delete = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-caisson-v2"));
        command.args(["-namespace", "ns", "-id", "one", "-address", "/c.sock", "-bundle", &request.bundle, "delete"]);
        command.env("CAISSON_CONFIG", bench.directory().join("config.toml"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    let state_dir = bench.directory().join("nothing");
    fs::write(bench.directory().join("config.toml"), format!("state_dir = {state_dir:?}\n")).unwrap();
    delete();
    let state: Value = serde_json::from_slice(&fs::read(&stopped).unwrap()).unwrap();
    assert_eq!((&state["status"], &state["id"]), (&json!("stopped"), &json!("one")));
    fs::remove_file(&stopped).unwrap();
    delete();
    assert!(!stopped.exists(), "once");
}

#[tokio::test]
async fn the_second_container_joins_the_first_by_the_pid_of_its_task() {
    let bench = Bench::new().await;
    let join = |pid: u32| {
        move |spec: &mut Value| {
            spec["linux"]["namespaces"][3]["path"] = json!(format!("/proc/{pid}/ns/ipc"));
        }
    };
    let (code, message) = refusal(bench.create(&bench.request_with("one", &["sleep"], join(4711))).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("linux.namespaces[ipc]: PID 4711 is not in this pod"), "{message}");
    let pid = bench.create(&bench.request("one", &["sleep"])).await.unwrap().pid;
    bench.create(&bench.request_with("two", &["sleep"], join(pid))).await.unwrap();
    let create = bench.guest.creates.lock().unwrap().pop().unwrap();
    let joins: Vec<_> = create.joins.iter().map(|join| (join.type_.as_str(), join.container_id.as_str())).collect();
    assert_eq!(joins, [("ipc", "one")]);
    let (code, message) = refusal(bench.create(&bench.request_with("three", &["sleep"], join(1))).await);
    assert_eq!((code, message.contains("PID 1 is not in this pod")), (Code::INVALID_ARGUMENT, true), "{message}");
}

/// The real shim, in a bundle of its own.
struct RealShim {
    directory: tempfile::TempDir,
    bundle: PathBuf,
}

impl RealShim {
    fn new(spec: &Value) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let bundle = directory.path().join("bundle");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let state = directory.path().join("state");
        // Whoever starts a monitor leaves a mark.
        hook(directory.path(), "monitor", &format!("touch {}", directory.path().join("started").display()));
        let config = format!(
            "state_dir = {state:?}\nmonitor = {:?}\nfile_server = \"/bin/false\"\n",
            directory.path().join("monitor"),
        );
        fs::write(directory.path().join("config.toml"), config).unwrap();
        Self { directory, bundle }
    }

    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-caisson-v2"));
        command.args(["-namespace", "ns", "-id", "one", "-address", "/c.sock", "-publish-binary", "/bin/true"]);
        command.arg(action).current_dir(&self.bundle).stdin(Stdio::null());
        command.env("CAISSON_CONFIG", self.directory.path().join("config.toml"));
        command
    }

    /// Starts it, creates the container, and ends the shim; what Create answered.
    async fn create(&self) -> (Code, String) {
        let started = self.command("start").output().unwrap();
        assert!(started.status.success(), "{started:?}");
        let address = String::from_utf8(started.stdout).unwrap();
        let task = TaskClient::new(Client::connect(&address).await.unwrap());
        let bundle = self.bundle.display().to_string();
        let request = CreateTaskRequest { id: "one".into(), bundle, ..CreateTaskRequest::default() };
        let message = refusal(task.create(within(), &request).await);
        let shutdown = ShutdownRequest { id: "one".into(), now: true, ..ShutdownRequest::default() };
        let _ = task.shutdown(within(), &shutdown).await;
        let pid = fs::read_to_string(self.bundle.join("shim.pid")).unwrap();
        let deadline = Instant::now() + LIMIT;
        while is_running(&pid) {
            assert!(Instant::now() < deadline, "waited {LIMIT:?} for the shim's end");
            sleep(std::time::Duration::from_millis(10)).await;
        }
        message
    }
}

/// Nobody reaps the daemon here: one that has ended stays as a zombie.
fn is_running(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[tokio::test]
async fn what_a_specification_cannot_have_is_refused_before_a_machine_starts() {
    let good = json!({
        "ociVersion": "1.0.2",
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/" },
        "root": { "path": "rootfs" },
        "linux": { "namespaces": [
            { "type": "mount" }, { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }
        ] },
    });
    let without = |kind: &str| {
        let mut spec = good.clone();
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != kind);
        spec
    };
    let with = |change: fn(&mut Value)| {
        let mut spec = good.clone();
        change(&mut spec);
        spec
    };
    let cases = [
        (without("network"), "linux.namespaces[network]"),
        (without("pid"), "linux.namespaces[pid]"),
        (without("ipc"), "linux.namespaces[ipc]"),
        (
            with(|spec| spec["linux"]["namespaces"][2]["path"] = json!("/proc/self/ns/net")),
            "linux.namespaces[network]: \"/proc/self/ns/net\" is the host's network namespace",
        ),
        (
            with(|spec| spec["linux"]["namespaces"][2]["path"] = json!("/dev/null")),
            "linux.namespaces[network]: \"/dev/null\" is no network namespace",
        ),
        (with(|spec| spec["linux"]["namespaces"][3]["path"] = json!("/proc/1/ns/ipc")), "linux.namespaces[ipc]"),
        (
            with(|spec| {
                spec["linux"]["devices"] = json!([{ "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 }])
            }),
            "linux.devices[0] (/dev/sda)",
        ),
        (
            with(|spec| spec["mounts"] = json!([{ "destination": "/p", "type": "bind", "source": "/proc" }])),
            "mounts[0] (/p): \"/proc\" is on proc",
        ),
        (with(|spec| spec["linux"]["resources"] = json!({ "cpu": { "cpus": "x" } })), "linux.resources.cpu.cpus"),
    ];
    for (spec, words) in cases {
        let shim = RealShim::new(&spec);
        let message = timeout(LIMIT, shim.create()).await.expect("an answer");
        assert_eq!(message.0, Code::INVALID_ARGUMENT, "{}", message.1);
        assert!(message.1.contains(words), "{words}: {}", message.1);
        assert!(!shim.directory.path().join("started").exists(), "a monitor was started: {words}");
        // Not even the pod's directory was made, which comes before its processes.
        let left: Vec<_> = fs::read_dir(shim.directory.path().join("state")).unwrap().flatten().collect();
        assert_eq!(left.iter().map(|entry| entry.file_name()).collect::<Vec<_>>(), ["s"]);
        let deleted = shim.command("delete").output().unwrap();
        assert!(deleted.status.success(), "{deleted:?}");
    }
}
