//! Namespaces beyond the usual ones: users, clocks, and those of another container of the pod.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use caisson_protos::agent::{CreateRequest, JoinedNamespace};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::support::{Pod, exec_shell, read_all, request, shell, status, within};

/// The first of the ids that a container's users are outside.
const OUTSIDE: u32 = 100_000;

/// With users of its own, as containerd asks for it.
fn with_users(spec: &mut Value) {
    let mapping = json!([{"containerID": 0, "hostID": OUTSIDE, "size": 65536}]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
}

/// A pod whose root file system belongs to such a container.
async fn pod_of_users() -> Pod {
    let pod = Pod::start().await;
    let owner = format!("{OUTSIDE}:{OUTSIDE}");
    let status = std::process::Command::new("chown").args(["-R", &owner]).arg(pod.rootfs()).status().unwrap();
    assert!(status.success());
    pod
}

/// Asks for namespaces of container `whose` instead of new ones.
pub fn join(spec: &mut Value, kinds: &[&str], whose: &str) -> Vec<JoinedNamespace> {
    let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
    for kind in kinds {
        list.retain(|namespace| namespace["type"] != *kind);
        list.push(json!({"type": kind, "path": format!("/proc/4711/ns/{kind}")}));
    }
    let one = |kind: &&str| JoinedNamespace { type_: (*kind).into(), container_id: whose.into(), ..Default::default() };
    kinds.iter().map(one).collect()
}

#[tokio::test]
async fn a_containers_root_is_somebody_else_outside() {
    let pod = pod_of_users().await;
    let script = "id -u; tr -s ' ' < /proc/self/uid_map; touch /tmp/made; echo $$; ls -d /proc/[0-9]*; \
                  echo reopened > /proc/self/fd/1; mount -t tmpfs t /tmp && echo mounted; mknod /tmp/node c 1 3 || echo no node; \
                  echo x > /dev/null && echo null; head -c 2 /dev/zero | wc -c; cat /sys/class/net/lo/ifindex; hostname; ulimit -n";
    let mut spec = shell(script);
    with_users(&mut spec);
    spec["hostname"] = json!("inner");
    let all = json!(["CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_CHOWN", "CAP_DAC_OVERRIDE"]);
    spec["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": all});
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}));
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 300, "hard": 400}]);
    spec["process"]["oomScoreAdj"] = json!(321);
    let output = pod.run(&spec).await;
    let mut expected = format!("0\n 0 {OUTSIDE} 65536\n1\n/proc/1\n");
    assert!(output.stdout.starts_with(&expected), "{output:?}");
    expected = "reopened\nmounted\nno node\nnull\n2\n1\ninner\n300\n".into();
    assert!(output.stdout.ends_with(&expected), "{output:?}");
    let made = fs::metadata(pod.rootfs().join("tmp/made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (OUTSIDE, OUTSIDE));
    pod.assert_empty();
}

#[tokio::test]
async fn an_exec_and_its_terminal_are_in_the_user_namespace() {
    let pod = pod_of_users().await;
    let mut spec = shell("exec sleep 1000");
    with_users(&mut spec);
    pod.create("c", &spec, None).await.unwrap();
    let pid = pod.start_process("c", "").await.unwrap();
    assert!(pod.pids("c").await.unwrap().iter().any(|(known, _)| *known == pid));
    let script = "for n in user mnt pid ipc uts cgroup; do [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] && echo $n; done";
    assert_eq!(pod.run_exec("c", "r", &exec_shell(script)).await.stdout, "user\nmnt\npid\nipc\nuts\ncgroup\n");
    let script = "id -u; id -g; stat -c '%u' $(tty); stty size";
    let mut process = exec_shell(script);
    process["user"] = json!({"uid": 1000, "gid": 1001});
    process["consoleSize"] = json!({"width": 91, "height": 17});
    let (stdio, streams) = pod.stdio(true).await;
    pod.exec("c", "e", &process, Some(stdio)).await.unwrap();
    pod.start_process("c", "e").await.unwrap();
    assert_eq!(read_all(streams.stdout).await, "1000\r\n1001\r\n1000\r\n17 91\r\n");
    // The standard streams of one without a terminal belong to its user as well.
    let mut process = exec_shell("echo again > /proc/self/fd/1; stat -L -c %u /proc/self/fd/0");
    process["user"] = json!({"uid": 1000, "gid": 1001});
    assert_eq!(pod.run_exec("c", "f", &process).await.stdout, "again\n1000\n");
    pod.kill("c", "", 9, true).await.unwrap();
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 137);
    pod.delete("c", "").await.unwrap();
    pod.assert_empty();
}

#[tokio::test]
async fn a_container_with_users_has_its_terminal_as_console() {
    let pod = pod_of_users().await;
    let mut spec =
        shell("tty; stat -c %u /dev/pts/0; echo console > /dev/console; exec < /dev/tty && echo controlling");
    with_users(&mut spec);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let (stdio, streams) = pod.stdio(true).await;
    pod.create("c", &spec, Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    assert_eq!(read_all(streams.stdout).await, "/dev/pts/0\r\n1000\r\nconsole\r\ncontrolling\r\n");
    pod.wait("c", "").await.unwrap();
    pod.delete("c", "").await.unwrap();
    pod.assert_empty();
}

#[tokio::test]
async fn a_cgroup_that_can_be_written_belongs_to_the_containers_user() {
    let pod = pod_of_users().await;
    let script = "mkdir /sys/fs/cgroup/inner && echo $$ > /sys/fs/cgroup/inner/cgroup.procs && cat /proc/self/cgroup | grep 0:: ; \
                  stat -c %u /sys/fs/cgroup /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/cgroup.type";
    for (options, expected) in [(&["rw"][..], "0::/inner\n0\n0\n65534\n"), (&["ro"], "65534\n65534\n65534\n")] {
        let mut spec = shell(script);
        with_users(&mut spec);
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options}));
        let output = pod.run(&spec).await;
        assert_eq!(output.stdout, expected, "{options:?}: {output:?}");
    }
    pod.assert_empty();
}

#[tokio::test]
async fn settings_of_the_pods_network_and_of_its_own_ipc_are_made_for_a_container_with_users() {
    let pod = pod_of_users().await;
    let mut spec = shell("cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_default_ttl");
    with_users(&mut spec);
    let before = fs::read_to_string("/proc/sys/net/ipv4/ip_default_ttl").unwrap();
    spec["linux"]["sysctl"] = json!({"kernel.shmmni": "123", "net.ipv4.ip_default_ttl": before.trim()});
    assert_eq!(pod.run(&spec).await.stdout, format!("123\n{before}"));
}

#[tokio::test]
async fn users_that_the_namespace_has_not_are_refused_by_name() {
    let pod = pod_of_users().await;
    let mut spec = shell("true");
    with_users(&mut spec);
    spec["process"]["user"] = json!({"uid": 70_000, "gid": 0});
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("process.user.uid") && message.contains("70000"), "{message}");
    spec["process"]["user"] = json!({"uid": 0, "gid": 0});
    spec["linux"]["uidMappings"] =
        json!([{"containerID": 0, "hostID": 5, "size": 2}, {"containerID": 1, "hostID": 9, "size": 1}]);
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "ranges that overlap: {message}");
    assert!(message.contains("linux.uidMappings"), "{message}");
    pod.assert_empty();
}

#[tokio::test]
async fn a_container_joins_the_namespaces_of_another() {
    let pod = Pod::start().await;
    let mut first = shell("exec sleep 1000");
    first["hostname"] = json!("theirs");
    pod.create("first", &first, None).await.unwrap();
    pod.start_process("first", "").await.unwrap();
    let ns = "for n in pid ipc uts net cgroup mnt; do readlink /proc/self/ns/$n; done";
    let theirs = pod.run_exec("first", "e", &exec_shell(ns)).await.stdout;
    let mut spec = shell(&format!("{ns}; hostname; tr '\\0' ' ' < /proc/1/cmdline"));
    let joins = join(&mut spec, &["pid", "ipc", "uts", "network"], "first");
    let output = pod.run_request(CreateRequest { joins, ..request("second", &spec) }).await;
    let (theirs, mut ours): (Vec<_>, Vec<_>) = (theirs.lines().collect(), output.stdout.lines().collect());
    let rest = ours.split_off(6);
    assert_eq!(ours[..4], theirs[..4]);
    assert!(ours[4] != theirs[4] && ours[5] != theirs[5], "the cgroup and the files are its own: {output:?}");
    assert_eq!(rest, ["theirs", "sleep 1000 "]);
    pod.kill("first", "", 9, true).await.unwrap();
    pod.wait("first", "").await.unwrap();
    pod.delete("first", "").await.unwrap();
    pod.assert_empty();
}

/// It is made outside of the namespace, and what it is in the end is as if it had been made inside.
#[tokio::test]
async fn a_container_in_anothers_pid_namespace_has_proc_hooks_clocks_and_a_terminal() {
    let pod = Pod::start().await;
    pod.start_sleeper("first").await;
    let script = "ls -1d /proc/1 /proc/$$; grep -c '^proc /proc proc .*hidepid' /proc/mounts; cat /run/hook; cat /run/state; cut -d. -f1 /proc/uptime; \
                  exec < /dev/tty && echo controlling; ps -o pid,args | grep -c '[s]leep 1000'";
    let mut spec = shell(script);
    spec["mounts"][0]["options"].as_array_mut().unwrap().push(json!("hidepid=invisible"));
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    let hook = "cat > /run/state; echo >> /run/state; readlink /proc/self/ns/pid > /run/hook; readlink /proc/1/ns/pid >> /run/hook";
    spec["hooks"] = json!({"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", hook], "env": ["PATH=/bin"]}]});
    let joins = join(&mut spec, &["pid"], "first");
    let (stdio, streams) = pod.stdio(true).await;
    pod.create_request(CreateRequest { joins, stdio: Some(stdio).into(), ..request("second", &spec) }).await.unwrap();
    let pid = pod.start_process("second", "").await.unwrap();
    let output = read_all(streams.stdout).await.replace("\r\n", "\n");
    assert_eq!(pod.wait("second", "").await.unwrap().pid, pid);
    let lines: Vec<_> = output.lines().collect();
    let [first, own, options, hook, init, state, uptime, terminal, sleeps] = lines[..] else { panic!("{output}") };
    assert!(first == "/proc/1" && own.starts_with("/proc/") && own != first, "{output}");
    assert_eq!((options, terminal, sleeps), ("1", "controlling", "1"), "{output}");
    assert_eq!(hook, init, "the hook runs in the joined namespace: {output}");
    assert!(state.contains("\"creating\"") && !state.contains("\"pid\""), "{output}");
    assert!(uptime.parse::<u64>().unwrap() > 1_000_000_000, "{output}");
}

#[tokio::test]
async fn what_a_container_leaves_in_anothers_pid_namespace_ends_with_it() {
    let pod = Pod::start().await;
    pod.start_sleeper("first").await;
    // One has left its session, one its parent; both keep the output open.
    let mut spec = shell("(sleep 2000 &) ; sleep 3000 & exec sh -c 'exit 3'");
    let joins = join(&mut spec, &["pid"], "first");
    let (stdio, streams) = pod.stdio(false).await;
    pod.create_request(CreateRequest { joins, stdio: Some(stdio).into(), ..request("second", &spec) }).await.unwrap();
    pod.start_process("second", "").await.unwrap();
    assert_eq!(pod.wait("second", "").await.unwrap().exit_status, 3);
    // It ends when the last process that holds it has ended; Delete comes later.
    assert_eq!(read_all(streams.stdout).await, "");
    assert_eq!(pod.pids("first").await.unwrap().len(), 1, "the other container's process goes on");
    pod.delete("second", "").await.unwrap();
    // Those that nobody has waited for, which is the other container's first process's business, show no arguments.
    let others = pod.run_exec("first", "e", &exec_shell("ps -o args | grep '[s]leep [0-9]'")).await;
    assert_eq!(others.stdout, "sleep 1000\n");
}

#[tokio::test]
async fn a_hook_in_anothers_pid_namespace_fails_its_container_and_says_why() {
    let pod = Pod::start().await;
    pod.start_sleeper("first").await;
    let mut spec = shell("true");
    spec["hooks"] = json!({"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo bad; exit 7"]}]});
    let joins = join(&mut spec, &["pid"], "first");
    let (code, message) = status(pod.create_request(CreateRequest { joins, ..request("second", &spec) }).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("createContainer") && message.contains("exit status: 7; output: \"bad\""), "{message}");
}

#[tokio::test]
async fn a_container_joins_the_users_of_another() {
    let pod = pod_of_users().await;
    let mut first = shell("exec sleep 1000");
    with_users(&mut first);
    pod.create("first", &first, None).await.unwrap();
    let pid = pod.start_process("first", "").await.unwrap();
    let theirs = fs::read_link(format!("/proc/{}/root/proc/{pid}/ns/user", pod.agent_pid())).unwrap();
    for kinds in [&["user"][..], &["user", "pid", "ipc", "uts", "network"]] {
        let mut spec = shell(
            "readlink /proc/self/ns/user; id -u; tr -s ' ' < /proc/self/uid_map; echo ok > /proc/self/fd/1; \
                              cat /proc/sys/kernel/ns_last_pid > /dev/null && echo proc",
        );
        let joins = join(&mut spec, kinds, "first");
        let output = pod.run_request(CreateRequest { joins, ..request("second", &spec) }).await;
        let expected = format!("{}\n0\n 0 {OUTSIDE} 65536\nok\nproc\n", theirs.display());
        assert_eq!(output.stdout, expected, "{kinds:?}: {output:?}");
        let exec = pod.run_exec("first", "e", &exec_shell("readlink /proc/self/ns/user")).await;
        assert_eq!(Path::new(exec.stdout.trim()), theirs);
    }
}

#[tokio::test]
async fn what_cannot_be_joined_is_refused_by_name() {
    let pod = Pod::start().await;
    pod.start_sleeper("first").await;
    let case = async |kinds: &[&str], whose: &str, answered: bool| {
        let mut spec = shell("true");
        let mut joins = join(&mut spec, kinds, whose);
        if !answered {
            joins.clear();
        }
        status(pod.create_request(CreateRequest { joins, ..request("second", &spec) }).await)
    };
    for (kinds, whose, answered, code, part) in [
        (&["pid"][..], "first", false, Code::INVALID_ARGUMENT, "\"pid\" with path \"/proc/4711/ns/pid\""),
        (&["mount"], "first", true, Code::INVALID_ARGUMENT, "\"mount\""),
        (&["user"], "first", true, Code::INVALID_ARGUMENT, "no user namespace of its own"),
        (&["ipc"], "nobody", true, Code::NOT_FOUND, "nobody"),
        (&["ipc"], "second", true, Code::NOT_FOUND, "second"),
        (&["thread"], "first", true, Code::INVALID_ARGUMENT, "\"thread\""),
    ] {
        let (found, message) = case(kinds, whose, answered).await;
        assert_eq!(found, code, "{kinds:?}: {message}");
        assert!(message.contains(part), "{kinds:?}: {message}");
    }
    let mut spec = shell("true");
    spec["hostname"] = json!("mine");
    let joins = join(&mut spec, &["uts"], "first");
    let (code, message) = status(pod.create_request(CreateRequest { joins, ..request("second", &spec) }).await);
    assert!(code == Code::INVALID_ARGUMENT && message.contains("hostname"), "{message}");
}

#[tokio::test]
async fn a_container_that_is_being_created_is_not_joined() {
    let pod = Pod::start().await;
    let mut first = shell("true");
    // Until the test lets it go on, its process is not yet what it will be.
    let script = "touch /tmp/waits; while [ ! -e /tmp/go ]; do sleep 0.01; done";
    first["hooks"] =
        json!({"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}]});
    let (waits, go) = (pod.rootfs().join("tmp/waits"), pod.rootfs().join("tmp/go"));
    let join = async {
        while !waits.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let mut spec = shell("true");
        let joins = join(&mut spec, &["pid"], "first");
        let refused = status(pod.create_request(CreateRequest { joins, ..request("second", &spec) }).await);
        fs::write(&go, "").unwrap();
        refused
    };
    let (created, (code, message)) = tokio::join!(pod.create("first", &first, None), within("the hook to run", join));
    created.unwrap();
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("first: it is being created"), "{message}");
}

#[tokio::test]
async fn clocks_have_their_offsets_in_the_container_and_its_execs() {
    let pod = Pod::start().await;
    let mut spec = shell("cat /proc/self/timens_offsets | tr -s ' '; cut -d. -f1 /proc/uptime");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] =
        json!({"monotonic": {"secs": 86400, "nanosecs": 5}, "boottime": {"secs": 1_000_000_000}});
    let seconds = |text: &str| text.lines().next_back().unwrap().parse::<u64>().unwrap();
    let output = pod.run(&spec).await.stdout;
    assert!(
        output.starts_with("monotonic 86400 5\nboottime 1000000000 0\n") && seconds(&output) > 1_000_000_000,
        "{output}"
    );

    spec["process"]["args"] = json!(["sleep", "1000"]);
    pod.create("c", &spec, None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let script = "readlink /proc/1/ns/time; readlink /proc/self/ns/time; cut -d. -f1 /proc/uptime";
    let exec = pod.run_exec("c", "e", &exec_shell(script)).await;
    let [init, own, _] = exec.stdout.lines().collect::<Vec<_>>()[..] else { panic!("{exec:?}") };
    assert_eq!(init, own);
    assert!(seconds(&exec.stdout) > 1_000_000_000, "{exec:?}");
    pod.kill("c", "", 9, true).await.unwrap();
    pod.wait("c", "").await.unwrap();
    pod.delete("c", "").await.unwrap();

    spec["linux"]["timeOffsets"] = json!({"monotonic": {"secs": i64::MIN}});
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("linux.timeOffsets[\"monotonic\"]"), "{message}");
    pod.assert_empty();
}
