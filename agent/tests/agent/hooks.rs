//! Hooks that run in the guest: programs of the container's own root file system.

use std::fs;

use serde_json::{Value, json};
use ttrpc::Code;

use crate::support::{Pod, shell, status};

fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "FROM=spec"]})
}

#[tokio::test]
async fn hooks_run_in_order_with_the_containers_state() {
    let pod = Pod::start().await;
    let mut spec = shell("cat /run/trace; ls /run");
    spec["annotations"] = json!({"key": "value"});
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let host = json!([{"path": "/nowhere/on/the/host"}]);
    spec["hooks"] = json!({
        "prestart": host, "createRuntime": host, "poststart": host, "poststop": host,
        "createContainer": [
            hook("cat > /run/create; echo create $(id -u) $$ $(pwd) $FROM $HOME $(hostname) >> /run/trace; chmod 666 /run/trace"),
            hook("echo second $# $0 >> /run/trace; grep -c ' /run ' /proc/mounts >> /run/trace; chmod 777 /run"),
        ],
        "startContainer": [hook("cat > /run/start; echo start $(id -u) >> /run/trace")],
    });
    spec["process"]["env"].as_array_mut().unwrap().push(json!("HOME=/x"));
    let output = pod.run(&spec).await;
    let mut lines = output.stdout.lines();
    let first = lines.next().unwrap();
    assert!(first.starts_with("create 0 ") && first.ends_with(" / spec c"), "{output:?}");
    let rest: Vec<_> = lines.collect();
    assert_eq!(rest, ["second 0 sh", "1", "start 1000", "create", "start", "trace"], "{output:?}");

    spec["process"]["args"] = json!(["cat", "/run/create", "/run/start"]);
    let output = pod.run(&spec).await;
    let states: Vec<Value> =
        serde_json::Deserializer::from_str(&output.stdout).into_iter().map(Result::unwrap).collect();
    for (state, status) in states.iter().zip(["creating", "created"]) {
        assert_eq!((&state["id"], &state["status"], &state["pid"]), (&json!("c"), &json!(status), &json!(1)));
        assert_eq!((&state["ociVersion"], &state["annotations"]["key"]), (&spec["ociVersion"], &json!("value")));
    }
    assert_eq!(states.len(), 2, "{output:?}");
}

#[tokio::test]
async fn a_hook_that_fails_fails_its_call_and_says_why() {
    let pod = Pod::start().await;
    let mut slow = hook("sleep 1000");
    slow["timeout"] = json!(1);
    for (hook, problem) in [
        (hook("echo out; echo bad >&2; exit 7"), "exit status: 7; output: \"out\\nbad\""),
        (hook("kill -9 $$"), "signal: 9"),
        (slow, "took more than 1 s"),
        (json!({"path": "/no/such"}), "no such program in the container's root file system"),
        (json!({"path": "/etc/passwd"}), "ermission denied"),
    ] {
        let mut spec = shell("true");
        spec["hooks"] = json!({"createContainer": [hook]});
        let (code, message) = status(pod.create("c", &spec, None).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains("hooks.createContainer[0]") && message.contains(problem), "{message}");
        pod.assert_empty();

        spec["hooks"] = json!({"startContainer": [hook]});
        pod.create("c", &spec, None).await.unwrap();
        let (code, message) = status(pod.start_process("c", "").await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains("hooks.startContainer[0]") && message.contains(problem), "{message}");
        assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 126);
        pod.delete("c", "").await.unwrap();
        pod.assert_empty();
    }
}

#[tokio::test]
async fn a_hook_of_the_image_may_no_more_than_its_container() {
    let pod = Pod::start().await;
    let mut spec = shell("cat /tmp/caps");
    spec["process"]["capabilities"] =
        json!({"bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]});
    let script = "grep -E 'CapPrm|CapBnd|NoNewPrivs' /proc/self/status > /tmp/caps; mknod /tmp/disk b 254 0; \
                  mount -t tmpfs t /etc; ls /proc/self/fd > /tmp/fds; true";
    spec["hooks"] =
        json!({"createContainer": [hook(script)], "startContainer": [hook("ls /proc/self/fd >> /tmp/fds")]});
    let output = pod.run(&spec).await;
    assert_eq!(output.stdout, "CapPrm:\t0000000000000001\nCapBnd:\t0000000000000001\nNoNewPrivs:\t1\n", "{output:?}");
    assert!(!pod.rootfs().join("tmp/disk").exists());
    // ls itself opens the directory as the next free one.
    assert_eq!(fs::read_to_string(pod.rootfs().join("tmp/fds")).unwrap(), "0\n1\n2\n3\n0\n1\n2\n3\n");
}
