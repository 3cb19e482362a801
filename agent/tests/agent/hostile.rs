//! Images and programs that try to get out.

use std::{fs, os::unix::fs::symlink, path::Path};

use caisson_protos::agent::CreateRequest;
use serde_json::json;
use ttrpc::Code;

use crate::{
    namespaces::join,
    support::{Pod, exec_shell, request, shell, spec, status},
};

#[tokio::test]
async fn mount_targets_that_are_links_stay_inside() {
    let pod = Pod::start().await;
    let outside = pod.rootfs().join("../outside");
    fs::create_dir(&outside).unwrap();
    symlink("../../../../outside", pod.rootfs().join("up")).unwrap();
    symlink(outside.canonicalize().unwrap(), pod.rootfs().join("absolute")).unwrap();
    let mut spec = shell("grep ' /outside' /proc/mounts | wc -l; touch /outside/inside && echo ok");
    spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/up", "type": "tmpfs", "source": "tmpfs"}));
    // The container's own /outside is what its link means.
    fs::create_dir(pod.rootfs().join("outside")).unwrap();
    assert_eq!(pod.run(&spec).await.stdout, "1\nok\n");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);

    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/absolute", "type": "tmpfs", "source": "tmpfs"}));
    // What its link says is made inside, as runc makes it.
    assert_eq!(pod.run(&spec).await.stdout, "1\nok\n");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[tokio::test]
async fn proc_and_sys_cannot_be_led_elsewhere() {
    let pod = Pod::start().await;
    fs::remove_dir(pod.rootfs().join("proc")).unwrap();
    symlink("tmp", pod.rootfs().join("proc")).unwrap();
    let (code, message) = status(pod.create("c", &shell("true"), None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("/proc") && message.contains("symbolic link"), "{message}");
    pod.assert_empty();
}

#[tokio::test]
async fn masks_and_devices_follow_links_inside_only() {
    let pod = Pod::start().await;
    fs::write(pod.rootfs().join("../outside"), "precious").unwrap();
    symlink("../../../outside", pod.rootfs().join("etc/link")).unwrap();
    fs::write(pod.rootfs().join("outside"), "inner").unwrap();
    let mut spec = shell("cat /outside /etc/link | wc -c; ls -l /dev/null | awk '{print $1}'");
    spec["linux"]["maskedPaths"] = json!(["/etc/link"]);
    assert_eq!(pod.run(&spec).await.stdout, "0\ncrw-rw-rw-\n");
    assert_eq!(fs::read_to_string(pod.rootfs().join("../outside")).unwrap(), "precious");

    // A node of the image in the place of a device, where the specification mounts no /dev.
    spec["mounts"].as_array_mut().unwrap().retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    symlink("/etc/passwd", pod.rootfs().join("dev/null")).unwrap();
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("/dev/null"), "{message}");
}

#[tokio::test]
async fn a_working_directory_is_no_way_out() {
    let pod = Pod::start().await;
    for fd in 3..24 {
        let mut spec = spec(&["pwd"]);
        spec["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}"));
        let (code, message) = status(pod.create("c", &spec, None).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{fd}: {message}");
        assert!(message.contains("process.cwd"), "{message}");
    }
    symlink("/proc/self/fd/5/../../..", pod.rootfs().join("escape")).unwrap();
    pod.start_sleeper("c").await;
    let mut process = exec_shell("pwd");
    process["cwd"] = json!("/escape");
    pod.exec("c", "e", &process, None).await.unwrap();
    assert_eq!(status(pod.start_process("c", "e").await).0, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn no_descriptor_of_the_agent_reaches_a_program() {
    let pod = Pod::start().await;
    // ls itself opens the directory as the next free one.
    let init = pod.run(&spec(&["ls", "/proc/self/fd"])).await;
    assert_eq!(init.stdout, "0\n1\n2\n3\n");
    pod.start_sleeper("c").await;
    let mut process = exec_shell("");
    process["args"] = json!(["ls", "/proc/self/fd"]);
    assert_eq!(pod.run_exec("c", "e", &process).await.stdout, "0\n1\n2\n3\n");
}

/// What the binary is linked to, so that it runs inside the root file system too.
fn copy_libraries(binary: &Path, rootfs: &Path) {
    let output = std::process::Command::new("ldd").arg(binary).output().unwrap();
    for library in String::from_utf8(output.stdout).unwrap().split_whitespace().filter(|word| word.starts_with('/')) {
        let copy = rootfs.join(library.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(library, copy).unwrap();
    }
}

#[tokio::test]
async fn the_agents_binary_cannot_be_overwritten() {
    let pod = Pod::start().await;
    let binary = pod.rootfs().join("../../agent");
    let before = fs::read(&binary).unwrap();
    copy_libraries(&binary, &pod.rootfs());
    // A program that is /proc/self/exe is the stage's own binary, now inside the container; whoever gets hold of it
    // there must not be able to write to it.
    let mut attack = spec(&["/proc/self/exe", "/tmp"]);
    let all = json!(["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_SYS_CHROOT", "CAP_MKNOD", "CAP_KILL"]);
    attack["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": all});
    // Here the binary is the local agent, which waits for connections: a program that keeps running.
    fs::create_dir(pod.rootfs().join("tmp/cgroup")).unwrap();
    fs::write(pod.rootfs().join("tmp/cgroup/cgroup.controllers"), "").unwrap();
    pod.create("c", &attack, None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let running = async {
        while !pod.rootfs().join("tmp/ready").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    crate::support::within("the binary to run inside the container", running).await;
    let mut process = exec_shell(
        "exec 9</proc/1/exe; cat /proc/1/exe | wc -c; echo x > /proc/self/fd/9; kill -9 1; echo x > /proc/1/exe; \
         for i in $(seq 200); do echo x > /proc/self/fd/9; done; mount -o remount,rw,bind /proc/self/fd/9; true",
    );
    process["capabilities"] = attack["process"]["capabilities"].clone();
    let (stdio, streams) = pod.stdio(false).await;
    pod.exec("c", "e", &process, Some(stdio)).await.unwrap();
    pod.start_process("c", "e").await.unwrap();
    pod.wait("c", "e").await.unwrap();
    let read = crate::support::read_all(streams.stdout).await;
    assert_eq!(read.trim(), before.len().to_string(), "the attack did reach the binary");
    let refused = crate::support::read_all(streams.stderr).await;
    assert!(refused.contains("Read-only file system") || refused.contains("Text file busy"), "{refused}");
    assert!(fs::read(&binary).unwrap() == before, "the agent's binary was changed");
}

#[tokio::test]
async fn a_stage_cannot_be_looked_into_from_its_container() {
    let pod = Pod::start().await;
    // An init that has been created and waits for Start is a stage; another container has it not in sight at all, and
    // in its own only an exec could look. So look at an exec's stage from the init, which spins on /proc.
    let script = "while :; do for p in /proc/[0-9]*; do [ $p != /proc/1 ] && [ $p != /proc/$$ ] && \
                  [ \"$(tr '\\0' ' ' < $p/cmdline 2>/dev/null)\" != \"${x#x}\" ] && \
                  case \"$(tr '\\0' ' ' < $p/cmdline 2>/dev/null)\" in *stage*) echo seen >> /tmp/seen; \
                  readlink $p/exe >> /tmp/got 2>/dev/null; ls $p/fd >> /tmp/got 2>/dev/null;; esac; done; done";
    pod.create("c", &shell(script), None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let seen = pod.rootfs().join("tmp/seen");
    let looked = async {
        for n in 0.. {
            let exec = format!("e{n}");
            pod.run_exec("c", &exec, &exec_shell("true")).await;
            if seen.exists() {
                return;
            }
        }
    };
    crate::support::within("the container to see a stage", looked).await;
    let got = fs::read_to_string(pod.rootfs().join("tmp/got")).unwrap_or_default();
    // A link of a stage that has just entered its program may be read; the agent's binary and descriptors may not.
    assert!(!got.contains("agent"), "{got}");
}

/// A pod with a container that stops every process that it meets.
async fn pod_of_an_attacker() -> Pod {
    let pod = Pod::start().await;
    let binary = pod.rootfs().join("../../agent");
    copy_libraries(&binary, &pod.rootfs());
    fs::copy(&binary, pod.rootfs().join("attack")).unwrap();
    let mut attack = spec(&["/attack", "attack"]);
    let ptrace = json!(["CAP_SYS_PTRACE"]);
    attack["process"]["capabilities"] = json!({"bounding": ptrace, "permitted": ptrace, "effective": ptrace});
    pod.create("c", &attack, None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    pod
}

/// Calls `work` until the attacker has stopped enough processes. Returns what it got of each.
async fn stopped(pod: &Pod, mut work: impl AsyncFnMut(u32)) -> String {
    let got = pod.rootfs().join("tmp/got");
    let stopped = async {
        for n in 0.. {
            work(n).await;
            let text = fs::read_to_string(&got).unwrap_or_default();
            if text.lines().count() >= 20 {
                return text;
            }
        }
        unreachable!()
    };
    crate::support::within("the container to stop other processes", stopped).await
}

#[tokio::test]
async fn who_may_trace_processes_gets_no_rights_of_the_guests_by_an_exec() {
    let pod = pod_of_an_attacker().await;
    let mut process = exec_shell("true");
    process["capabilities"] = json!({});
    let text = stopped(&pod, async |n| drop(pod.run_exec("c", &format!("e{n}"), &process).await)).await;
    for got in text.lines() {
        assert_eq!(got, "0 0000000000000000", "{text}");
    }
}

/// What the attacker meets is what a container that joins its pid namespace will be itself, and who opens its /proc for it:
/// nobody, with capabilities in a namespace of its own only. Hooks may have what the container may, but for CAP_SYS_PTRACE.
#[tokio::test]
async fn who_may_trace_processes_gets_no_rights_of_the_guests_by_a_container_that_joins_it() {
    for (hooks, allowed) in [
        (json!({}), &["1000 0000000000000000", "65534 elsewhere"][..]),
        (
            json!({"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "true"]}]}),
            &["1000 0000000000000000", "65534 elsewhere", "0 0000000000000000", "0 0000000000000001"],
        ),
    ] {
        let pod = pod_of_an_attacker().await;
        let mut second = shell("true");
        second["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let chown = json!(["CAP_CHOWN", "CAP_SYS_PTRACE"]);
        second["process"]["capabilities"] = json!({"bounding": chown, "permitted": [], "effective": []});
        second["hooks"] = hooks;
        let joins = join(&mut second, &["pid"], "c");
        let create = async |n| {
            let request = CreateRequest { joins: joins.clone(), ..request(&format!("n{n}"), &second) };
            assert_eq!(pod.run_request(request).await.status, 0);
        };
        let text = stopped(&pod, create).await;
        for got in text.lines() {
            assert!(allowed.contains(&got), "{got:?} in {text}");
        }
        assert!(text.contains(allowed[0]), "{text}");
    }
}

#[tokio::test]
async fn a_root_file_system_that_is_a_link_is_refused() {
    let pod = Pod::start().await;
    symlink("/", pod.rootfs().join("../link")).unwrap();
    let request = CreateRequest {
        container_id: "c".into(),
        spec: spec(&["true"]).to_string().into_bytes(),
        rootfs: "link".into(),
        ..Default::default()
    };
    let (code, message) = status(pod.create_request(request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
}

#[tokio::test]
async fn an_endless_or_blocking_passwd_stops_nothing() {
    let pod = Pod::start().await;
    let passwd = pod.rootfs().join("etc/passwd");
    fs::remove_file(&passwd).unwrap();
    nix::unistd::mkfifo(Path::new(&passwd), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(pod.run(&shell("echo $HOME")).await.stdout, "/\n");
    fs::remove_file(&passwd).unwrap();
    symlink("/dev/zero", &passwd).unwrap();
    assert_eq!(pod.run(&shell("echo $HOME")).await.stdout, "/\n");
}

#[tokio::test]
async fn a_terminal_multiplexer_of_the_image_is_not_believed() {
    let pod = Pod::start().await;
    let mut spec = shell("true");
    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/dev/pts");
    spec["linux"]["devices"] = json!([{"path": "/dev/pts/ptmx", "type": "c", "major": 1, "minor": 3}]);
    let (stdio, _streams) = pod.stdio(true).await;
    let (code, message) = status(pod.create("c", &spec, Some(stdio)).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("/dev/pts/ptmx"), "{message}");
}

#[tokio::test]
async fn the_old_root_is_gone() {
    let pod = Pod::start().await;
    let mut spec = shell(
        "cd /; cd ../../..; ls -a | tr '\\n' ' '; mount --bind /proc/1/root/.. /tmp; ls /tmp | tr '\\n' ' '; umount -l / && ls / | head -3",
    );
    let all = json!(["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_SYS_CHROOT"]);
    spec["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": all});
    let output = pod.run(&spec).await;
    let names = "bin dev etc home proc root run sys tmp";
    assert!(output.stdout.starts_with(&format!(". .. {names} {names} ")), "{output:?}");
    assert!(!output.stdout.contains("work"), "{output:?}");
}
