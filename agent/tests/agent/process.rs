//! Who a process is and what it may: the `process` object.

use std::fs;

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
async fn an_empty_home_is_as_none_and_an_exec_has_its_containers_umask() {
    let pod = Pod::start().await;
    let mut spec = shell("echo $HOME; umask; exec sleep 1000");
    spec["process"]["env"].as_array_mut().unwrap().push(json!("HOME="));
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "umask": 0o077});
    pod.create("c", &spec, None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let mut process = exec_shell("echo $HOME; umask");
    process["env"] = json!(["PATH=/bin", "HOME="]);
    assert_eq!(pod.run_exec("c", "e", &process).await.stdout, "/root\n0077\n");
    process["user"] = json!({"uid": 1000, "gid": 1000, "umask": 0o002});
    assert_eq!(pod.run_exec("c", "e", &process).await.stdout, "/home/user\n0002\n");
}

/// Nice value, real-time priority and policy: fields 19, 40 and 41 of proc(5)'s stat, after a name without spaces.
const SCHEDULED: &str = "cut -d' ' -f19,40,41 /proc/self/stat";

#[tokio::test]
async fn a_process_and_its_execs_are_scheduled_as_asked() {
    let pod = Pod::start().await;
    // What is not asked for is as it was.
    let nice = rustix::process::getpriority_process(None).unwrap();
    for (scheduler, expected) in [
        (json!({"policy": "SCHED_OTHER", "nice": -7}), "-7 0 0\n".to_owned()),
        (json!({"policy": "SCHED_BATCH", "nice": 5}), "5 0 3\n".to_owned()),
        (json!({"policy": "SCHED_IDLE"}), format!("{nice} 0 5\n")),
        (
            json!({"policy": "SCHED_FIFO", "priority": 3, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
            format!("{nice} 3 1\n"),
        ),
        (json!({"policy": "SCHED_RR", "priority": 9}), format!("{nice} 9 2\n")),
    ] {
        // The program itself, not a child of it: that is where the flag ends.
        let mut spec = spec(&["sh", "-c", &format!("exec {SCHEDULED}")]);
        spec["process"]["scheduler"] = scheduler.clone();
        assert_eq!(pod.run(&spec).await.stdout, expected, "{scheduler}");
    }
    let mut container = spec(&["sleep", "1000"]);
    container["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 1});
    container["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    pod.create("c", &container, None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let mut process = exec_shell(&format!("{SCHEDULED}; ionice"));
    assert_eq!(pod.run_exec("c", "e", &process).await.stdout, "1 0 3\nbest-effort: prio 6\n");
    process["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 2});
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE"});
    assert_eq!(pod.run_exec("c", "e", &process).await.stdout, "2 0 0\nidle\n");

    container["process"]["scheduler"] = json!({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 1, "period": 1});
    let (code, message) = status(pod.create("d", &container, None).await);
    assert!(code == Code::INVALID_ARGUMENT && message.contains("process.scheduler"), "{message}");
}

#[tokio::test]
async fn the_execution_domain_is_the_containers_and_its_execs() {
    let pod = Pod::start().await;
    let mut spec = spec(&["sh", "-c", "uname -m; exec sleep 1000"]);
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    pod.create("c", &spec, None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    assert_eq!(pod.run_exec("c", "e", &exec_shell("uname -m")).await.stdout, "i686\n");
    pod.kill("c", "", 9, true).await.unwrap();
    pod.wait("c", "").await.unwrap();
    pod.delete("c", "").await.unwrap();
    spec["linux"]["personality"] = json!({"domain": "LINUX"});
    spec["process"]["args"] = json!(["uname", "-m"]);
    assert_eq!(pod.run(&spec).await.stdout, "x86_64\n");
}

#[tokio::test]
async fn an_exec_runs_on_the_processors_that_it_asks_for() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let mut process = exec_shell("grep Cpus_allowed_list /proc/self/status | cut -f2");
    for affinity in [json!({"initial": "0"}), json!({"final": "0"}), json!({"initial": "0-1", "final": "0"})] {
        process["execCPUAffinity"] = affinity.clone();
        assert_eq!(pod.run_exec("c", "e", &process).await.stdout, "0\n", "{affinity}");
    }
    process["execCPUAffinity"] = json!({"final": "1000"});
    pod.exec("c", "f", &process, None).await.unwrap();
    let (code, message) = status(pod.start_process("c", "f").await);
    assert!(code == Code::INVALID_ARGUMENT && message.contains("process.execCPUAffinity.final"), "{message}");
}

#[tokio::test]
async fn every_limit_is_set() {
    let pod = Pod::start().await;
    // Name in the specification, name in /proc/self/limits.
    let names = [
        ("CPU", "Max cpu time"),
        ("FSIZE", "Max file size"),
        ("DATA", "Max data size"),
        ("STACK", "Max stack size"),
        ("CORE", "Max core file size"),
        ("RSS", "Max resident set"),
        ("NPROC", "Max processes"),
        ("NOFILE", "Max open files"),
        ("MEMLOCK", "Max locked memory"),
        ("AS", "Max address space"),
        ("LOCKS", "Max file locks"),
        ("SIGPENDING", "Max pending signals"),
        ("MSGQUEUE", "Max msgqueue size"),
        ("NICE", "Max nice priority"),
        ("RTPRIO", "Max realtime priority"),
        ("RTTIME", "Max realtime timeout"),
    ];
    // Below what this machine allows, where that is not enough; all different otherwise.
    let allowed = fs::read_to_string("/proc/self/limits").unwrap();
    let allowed = |line: &str| {
        let found = allowed.lines().find_map(|text| text.strip_prefix(line)).unwrap();
        found.split_whitespace().nth(1).unwrap().parse().unwrap_or(u64::MAX)
    };
    let values = |index: usize, (name, line): &(&str, &str)| {
        let hard = if *name == "NOFILE" { 100 } else { (1u64 << 29) + 2 * index as u64 };
        let hard = hard.min(allowed(line));
        [hard.saturating_sub(1), hard]
    };
    let mut spec = shell("cat /proc/self/limits");
    let limit = |(index, (name, _)): (usize, &(&str, &str))| {
        let [soft, hard] = values(index, &names[index]);
        json!({"type": format!("RLIMIT_{name}"), "soft": soft, "hard": hard})
    };
    spec["process"]["rlimits"] = names.iter().enumerate().map(limit).collect();
    let output = pod.run(&spec).await.stdout;
    for (index, (name, line)) in names.iter().enumerate() {
        let found = output.lines().find_map(|text| text.strip_prefix(line)).unwrap();
        let found: Vec<_> = found.split_whitespace().take(2).collect();
        assert_eq!(found, values(index, &(*name, *line)).map(|number| number.to_string()), "{name}");
    }
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
