//! The classic ways out of a container: races on mounts, links into /proc, consoles and devices that are something
//! else. What concerns the agent's binary and descriptors is in `hostile.rs`.

use std::{fs, os::unix::fs::symlink, path::Path};

use caisson_protos::agent::{BindSource, CreateRequest};
use serde_json::json;
use ttrpc::Code;

use crate::support::{Pod, exec_shell, request, shell, spec, status};

/// Every mount that the agent can see.
fn mounts_of_agent(pod: &Pod) -> String {
    fs::read_to_string(format!("/proc/{}/mountinfo", pod.agent_pid())).unwrap()
}

#[tokio::test]
async fn a_racing_container_cannot_lead_a_mount_out() {
    let pod = Pod::start().await;
    let outside = pod.rootfs().join("../outside");
    fs::create_dir_all(outside.join("x")).unwrap();
    fs::write(outside.join("x/file"), "precious").unwrap();
    fs::create_dir_all(pod.rootfs().join("../volume/real/x")).unwrap();
    let climb = format!("/{}{}", "../".repeat(12), outside.canonicalize().unwrap().display());
    // One container has the volume and exchanges a directory of it for links as fast as it can.
    let script = format!(
        "cd /vol; while :; do ln -sfn {climb} a; ln -sfn /proc/self/root/../.. a; ln -sfn /proc/1/cwd a; rm -f a; \
         mkdir -p a/x; touch a/x/file; rm -rf a; ln -s real a; rm -f a; done"
    );
    let place = spec(&[])["mounts"].as_array().unwrap().len();
    let volume = |mut container: serde_json::Value| {
        let mounts = container["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/vol", "type": "bind", "source": "v", "options": ["rbind"]}));
        mounts.push(json!({"destination": "/vol/a/x", "type": "tmpfs", "source": "caught"}));
        let bind = BindSource { mount: u32::try_from(place).unwrap(), path: "volume".into(), ..Default::default() };
        (container, vec![bind])
    };
    let (mut racer, binds) = volume(shell(&script));
    racer["mounts"].as_array_mut().unwrap().pop();
    pod.create_request(CreateRequest { binds, ..request("racer", &racer) }).await.unwrap();
    pod.start_process("racer", "").await.unwrap();
    let before = mounts_of_agent(&pod);
    // The others mount into it, mask in it and make devices in it, all by names that lead through the volume.
    let (mut victim, binds) = volume(shell("cut -d' ' -f5 /proc/self/mountinfo; cat /vol/a/x/file"));
    victim["linux"]["maskedPaths"] = json!(["/vol/a/x", "/vol/a/x/file"]);
    victim["linux"]["readonlyPaths"] = json!(["/vol/a"]);
    victim["linux"]["devices"] = json!([{"path": "/vol/a/null", "type": "c", "major": 1, "minor": 3}]);
    let (mut created, mut refused) = (0, 0);
    while created + refused < 60 {
        match pod.create_request(CreateRequest { binds: binds.clone(), ..request("victim", &victim) }).await {
            Ok(_) => {
                created += 1;
                pod.start_process("victim", "").await.unwrap();
                pod.wait("victim", "").await.unwrap();
                pod.delete("victim", "").await.unwrap();
            }
            Err(_) => refused += 1,
        }
        assert_eq!(mounts_of_agent(&pod), before, "nothing is mounted in the guest");
        assert_eq!(fs::read_to_string(outside.join("x/file")).unwrap(), "precious");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }
    println!("{created} created, {refused} refused");
}

#[tokio::test]
async fn a_link_does_not_lead_a_mount_into_proc() {
    let pod = Pod::start().await;
    for (index, target) in
        ["/proc", "/proc/sys", "/proc/self/attr", "/proc/self", "/proc/1/cwd"].into_iter().enumerate()
    {
        let name = format!("/link{index}");
        symlink(target, pod.rootfs().join(&name[1..])).unwrap();
        let mut spec = shell("true");
        spec["mounts"].as_array_mut().unwrap().push(json!({"destination": name, "type": "tmpfs", "source": "fake"}));
        let (code, message) = status(pod.create("c", &spec, None).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{target}: {message}");
        assert!(message.contains(&name), "{target}: {message}");
    }
    pod.assert_empty();
}

#[tokio::test]
async fn a_console_that_is_something_else_is_not_covered() {
    let pod = Pod::start().await;
    let outside = pod.rootfs().join("../outside");
    fs::write(&outside, "precious").unwrap();
    let console = pod.rootfs().join("dev/console");
    let mut spec = shell("tty");
    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/dev");
    fs::create_dir(pod.rootfs().join("dev/pts")).unwrap();
    for target in ["../../outside", "/etc/passwd", "/proc/self/exe", "/nowhere"] {
        symlink(target, &console).unwrap();
        let (stdio, _streams) = pod.stdio(true).await;
        let (code, message) = status(pod.create("c", &spec, Some(stdio)).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{target}: {message}");
        assert!(message.contains("/dev/console"), "{message}");
        fs::remove_file(&console).unwrap();
    }
    assert_eq!(fs::read_to_string(outside).unwrap(), "precious");
    assert!(!pod.rootfs().join("nowhere").exists());
    // What an image usually has there is fine.
    fs::write(&console, "").unwrap();
    let (stdio, streams) = pod.stdio(true).await;
    pod.create("c", &spec, Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    assert_eq!(crate::support::read_all(streams.stdout).await, "/dev/pts/0\r\n");
}

#[tokio::test]
async fn the_image_does_not_choose_what_masks_are_made_of() {
    let pod = Pod::start().await;
    fs::write(pod.rootfs().join("etc/secret"), "s3cret").unwrap();
    // CVE-2025-31133: a /dev/null that is another file would be mounted, writable, over what it should hide.
    let mut spec = shell("cat /etc/secret /etc/passwd | wc -c; echo x > /etc/secret; cat /etc/secret | wc -c");
    spec["linux"]["maskedPaths"] = json!(["/etc/secret", "/etc/passwd"]);
    spec["mounts"] = json!([
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "bind", "source": "x", "options": ["bind"]},
    ]);
    let dev = pod.rootfs().join("../dev");
    fs::create_dir(&dev).unwrap();
    symlink("/proc/sys/kernel/core_pattern", dev.join("null")).unwrap();
    let bind = BindSource { mount: 1, path: "dev".into(), ..Default::default() };
    let output = pod.run_request(CreateRequest { binds: vec![bind], ..request("c", &spec) }).await;
    assert_eq!(output.stdout, "0\n0\n", "{output:?}");
    assert_eq!(fs::read_to_string(pod.rootfs().join("etc/secret")).unwrap(), "s3cret");
}

#[tokio::test]
async fn an_execs_working_directory_is_no_way_out() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    // CVE-2024-21626, for each descriptor that a stage could have open.
    for fd in 3..20 {
        let name = format!("e{fd}");
        let mut process = exec_shell("pwd; ls");
        process["cwd"] = json!(format!("/proc/self/fd/{fd}"));
        pod.exec("c", &name, &process, None).await.unwrap();
        let (code, message) = status(pod.start_process("c", &name).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{fd}: {message}");
        assert!(message.contains("process.cwd"), "{message}");
    }
    // Neither the directory nor anything above it is the agent's.
    let process = exec_shell(
        "readlink /proc/self/cwd; readlink /proc/self/root; cd ..; ls | tr '\\n' ' '; ls /proc/self/cwd/.. | wc -l",
    );
    let output = pod.run_exec("c", "e", &process).await;
    assert_eq!(output.stdout, "/\n/\nbin dev etc home proc root run sys tmp 9\n", "{output:?}");
}

#[tokio::test]
async fn a_program_named_by_a_descriptor_is_not_the_agents() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let refused = |(code, message): (Code, String)| {
        assert!(code == Code::NOT_FOUND || code == Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains("exec:"), "{message}");
    };
    for fd in 3..20 {
        let path = format!("/proc/self/fd/{fd}");
        let container = format!("c{fd}");
        pod.create(&container, &spec(&[&path]), None).await.unwrap();
        refused(status(pod.start_process(&container, "").await));
        pod.wait(&container, "").await.unwrap();
        pod.delete(&container, "").await.unwrap();
        let name = format!("e{fd}");
        let mut process = exec_shell("");
        process["args"] = json!([path]);
        pod.exec("c", &name, &process, None).await.unwrap();
        refused(status(pod.start_process("c", &name).await));
    }
}

#[tokio::test]
async fn capabilities_do_not_come_back_across_exec() {
    let pod = Pod::start().await;
    // A program that is set-user-id root, for a user without privileges.
    let shell_path = pod.rootfs().join("suid/sh");
    fs::create_dir(pod.rootfs().join("suid")).unwrap();
    fs::copy("/bin/busybox", &shell_path).unwrap();
    fs::set_permissions(&shell_path, std::os::unix::fs::PermissionsExt::from_mode(0o4755)).unwrap();
    let script = "exec /suid/sh -c 'id -u; grep -E \"CapPrm|CapEff|CapBnd\" /proc/self/status | cut -f2'";
    let mut spec = shell(script);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let none = "0000000000000000\n".repeat(2);
    spec["process"]["capabilities"] =
        json!({"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"]});
    let output = pod.run(&spec).await;
    assert_eq!(output.stdout, format!("1000\n{none}0000000000000020\n"), "no_new_privs: {output:?}");
    spec["process"]["noNewPrivileges"] = json!(false);
    let output = pod.run(&spec).await;
    // BusyBox itself steps back to the caller; in between it was root, with what is left to root here.
    for set in output.stdout.lines().skip(1) {
        assert!(matches!(u64::from_str_radix(set, 16).unwrap(), 0 | 0x20), "{output:?}");
    }
    assert!(output.stdout.ends_with("0000000000000020\n"), "{output:?}");
}

#[tokio::test]
async fn a_user_namespace_reaches_nothing_of_the_guests() {
    let pod = Pod::start().await;
    let owner = std::process::Command::new("chown").args(["-R", "100000:100000"]).arg(pod.rootfs()).status().unwrap();
    assert!(owner.success());
    // The agent's own files of /proc and the pod's network are not the user namespace's to change.
    let script = "echo 1 > /proc/sys/kernel/sysrq; echo x > /proc/sysrq-trigger; echo 1 > /proc/sys/net/ipv4/ip_forward; \
                  echo 1 > /sys/kernel/mm/ksm/run; mount -o remount,rw /sys; mount -t devtmpfs d /tmp; mount -t sysfs s /tmp; \
                  kill -9 -1; ls /tmp | wc -l; cut -d' ' -f5 /proc/self/mountinfo | sort -u | tr '\\n' ' '";
    let mut spec = shell(script);
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    spec["linux"]["readonlyPaths"] = json!([]);
    let all =
        json!(["CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SYS_RESOURCE"]);
    spec["process"]["capabilities"] = json!({"bounding": all, "permitted": all, "effective": all});
    let output = pod.run(&spec).await;
    let (first, mounts) = output.stdout.split_once('\n').unwrap();
    assert_eq!(first, "0", "{output:?}");
    let known = ["/", "/proc", "/dev", "/sys", "/run"];
    for place in mounts.split_whitespace() {
        assert!(known.iter().any(|top| Path::new(place).starts_with(top)) && !place.starts_with("/tmp"), "{output:?}");
    }
    assert!(output.stderr.lines().count() >= 7, "each of these is refused: {output:?}");
}
