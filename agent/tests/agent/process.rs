//! Who a process is and what it may: the `process` object.

use serde_json::json;
use ttrpc::Code;

use crate::support::{Pod, exec_shell, shell, spec, status};

#[tokio::test]
async fn user_groups_umask_directory_and_environment_are_as_asked() {
    let pod = Pod::start().await;
    let mut spec = shell("id -u; id -g; grep Groups /proc/self/status; umask; pwd; echo $A $HOME");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 0o027});
    spec["process"]["cwd"] = json!("/work/deep");
    spec["process"]["env"].as_array_mut().unwrap().extend([json!("A=first"), json!("A=last")]);
    let output = pod.run(&spec).await;
    assert_eq!(output.stdout, "1000\n1001\nGroups:\t7 8 \n0027\n/work/deep\nlast /home/user\n", "{output:?}");
}

#[tokio::test]
async fn home_is_the_root_directory_for_an_unknown_user_and_kept_if_given() {
    let pod = Pod::start().await;
    let mut spec = shell("echo $HOME");
    assert_eq!(pod.run(&spec).await.stdout, "/root\n");
    spec["process"]["user"] = json!({"uid": 77, "gid": 77});
    assert_eq!(pod.run(&spec).await.stdout, "/\n");
    spec["process"]["env"].as_array_mut().unwrap().push(json!("HOME=/given"));
    assert_eq!(pod.run(&spec).await.stdout, "/given\n");
}

const CAPABILITIES: &str = "grep -E 'Cap|NoNewPrivs' /proc/self/status";

fn sets(inheritable: u64, permitted: u64, effective: u64, bounding: u64, ambient: u64, nnp: u8) -> String {
    format!(
        "CapInh:\t{inheritable:016x}\nCapPrm:\t{permitted:016x}\nCapEff:\t{effective:016x}\nCapBnd:\t{bounding:016x}\n\
         CapAmb:\t{ambient:016x}\nNoNewPrivs:\t{nnp}\n"
    )
}

#[tokio::test]
async fn all_five_capability_sets_are_as_asked() {
    let pod = Pod::start().await;
    let (chown, kill, net_raw) = (1u64, 1 << 5, 1 << 13);
    // For root the kernel makes permitted at exec what is bounding, but with no_new_privs only what already was
    // permitted.
    let mut spec = shell(CAPABILITIES);
    spec["process"]["capabilities"] =
        json!({"bounding": ["CAP_CHOWN", "CAP_KILL"], "permitted": ["CAP_CHOWN"], "effective": []});
    let both = chown | kill;
    assert_eq!(pod.run(&spec).await.stdout, sets(0, chown, chown, both, 0, 1));
    spec["process"]["noNewPrivileges"] = json!(false);
    assert_eq!(pod.run(&spec).await.stdout, sets(0, both, both, both, 0, 0));
    // A user keeps what is ambient.
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let all = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"]);
    spec["process"]["capabilities"] = json!({
        "bounding": all, "permitted": all, "effective": all, "inheritable": ["CAP_KILL", "CAP_NET_RAW"], "ambient": ["CAP_NET_RAW"],
    });
    let bounding = chown | kill | net_raw;
    assert_eq!(pod.run(&spec).await.stdout, sets(kill | net_raw, net_raw, net_raw, bounding, net_raw, 0));
    // Without the object nothing is left, as with runc.
    spec["process"].as_object_mut().unwrap().remove("capabilities");
    assert_eq!(pod.run(&spec).await.stdout, sets(0, 0, 0, 0, 0, 0));
}

#[tokio::test]
async fn an_exec_inherits_capabilities_and_limits_or_brings_its_own() {
    let pod = Pod::start().await;
    let mut container = spec(&["sleep", "1000"]);
    container["process"]["capabilities"] =
        json!({"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"]});
    container["process"]["oomScoreAdj"] = json!(321);
    pod.create("c", &container, None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let script = format!("{CAPABILITIES}; ulimit -n; cat /proc/self/oom_score_adj");
    let mut process = exec_shell(&script);
    for field in ["capabilities", "rlimits", "noNewPrivileges"] {
        process.as_object_mut().unwrap().remove(field);
    }
    let kill = 1 << 5;
    let expected = sets(0, kill, kill, kill, 0, 0) + "1024\n321\n";
    assert_eq!(pod.run_exec("c", "e", &process).await.stdout, expected);
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]);
    process["oomScoreAdj"] = json!(5);
    let output = pod.run_exec("c", "e", &process).await;
    assert!(output.stdout.ends_with("\n99\n5\n"), "{output:?}");
}

#[tokio::test]
async fn limits_are_as_asked() {
    let pod = Pod::start().await;
    let mut spec = shell("cat /proc/self/limits");
    spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": u64::MAX},
        {"type": "RLIMIT_AS", "soft": 1u64 << 33, "hard": 1u64 << 34},
    ]);
    let output = pod.run(&spec).await.stdout;
    let line = |name: &str| {
        let line = output.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("Max open files"), "100 200");
    assert_eq!(line("Max core file size"), "0 unlimited");
    assert_eq!(line("Max address space"), "8589934592 17179869184");
}

#[tokio::test]
async fn signals_have_their_default_actions() {
    let pod = Pod::start().await;
    let output = pod.run(&shell("exec grep -E 'Sig(Blk|Ign|Cgt)|ShdPnd' /proc/self/status")).await;
    for line in output.stdout.lines() {
        assert!(line.ends_with("\t0000000000000000"), "{output:?}");
    }
}

#[tokio::test]
async fn what_the_kernel_refuses_is_told_by_field() {
    let pod = Pod::start().await;
    let mut cases = Vec::new();
    let mut with = |field: &str, value, expected: &'static str| {
        let mut spec = spec(&["true"]);
        spec["process"][field] = value;
        cases.push((spec, expected));
    };
    with("cwd", json!("/etc/passwd"), "process.cwd");
    with("capabilities", json!({"ambient": ["CAP_KILL"]}), "process.capabilities.ambient");
    with("capabilities", json!({"effective": ["CAP_KILL"]}), "process.capabilities");
    with("rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 1u64 << 40, "hard": 1u64 << 40}]), "RLIMIT_NOFILE");
    for (spec, expected) in cases {
        let (code, message) = status(pod.create("c", &spec, None).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains(expected), "{message}");
    }
    pod.assert_empty();
}
