//! Create, Start, Exec, Wait, Kill, Pids, Delete.

use serde_json::json;
use ttrpc::Code;

use crate::support::{Pod, exec_shell, shell, spec, status, within};

#[tokio::test]
async fn exit_codes_are_told_exactly() {
    let pod = Pod::start().await;
    let cases = [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 42", 42),
        ("nosuchprogram", 127),
        ("kill -9 $(sh -c 'echo $PPID') & wait $!", 137),
        ("sh -c 'kill -TERM $$'", 143),
        ("exit 255", 255),
    ];
    for (script, expected) in cases {
        // The last command's code is the shell's; `exit $?` keeps the shell from replacing itself with it.
        assert_eq!(pod.run(&shell(&format!("{script}; exit $?"))).await.status, expected, "{script}");
    }
    pod.assert_empty();
}

#[tokio::test]
async fn output_and_error_come_apart() {
    let pod = Pod::start().await;
    let output = pod.run(&shell("echo out; echo err >&2")).await;
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out\n", "err\n"));
}

#[tokio::test]
async fn a_missing_program_is_told_at_start_and_leaves_an_ended_container() {
    let pod = Pod::start().await;
    for (args, code, words) in [
        (["nosuch"], Code::NOT_FOUND, "executable file not found in $PATH"),
        (["/no/such"], Code::NOT_FOUND, "no such file"),
        (["/etc/passwd"], Code::INVALID_ARGUMENT, "permission denied"),
        (["/etc"], Code::INVALID_ARGUMENT, "permission denied"),
    ] {
        pod.create("c", &spec(&args), None).await.unwrap();
        let (got, message) = status(pod.start_process("c", "").await);
        assert_eq!(got, code, "{args:?}: {message}");
        assert!(message.contains(words), "{args:?}: {message}");
        let expected = if code == Code::NOT_FOUND { 127 } else { 126 };
        // At once, as ctr does: it has ended when the answer to Start comes.
        assert_eq!(pod.delete("c", "").await.unwrap().exit_status, expected);
    }
    pod.assert_empty();
}

#[tokio::test]
async fn a_script_without_an_interpreter_is_no_program() {
    let pod = Pod::start().await;
    let script = pod.rootfs().join("script");
    std::fs::write(&script, "echo hi\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    pod.create("c", &spec(&["/script"]), None).await.unwrap();
    let (code, message) = status(pod.start_process("c", "").await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
}

#[tokio::test]
async fn a_short_process_is_never_missed_by_any_waiter() {
    let pod = Pod::start().await;
    for round in 0..20 {
        pod.create("c", &spec(&["false"]), None).await.unwrap();
        let (before, started) = tokio::join!(pod.wait("c", ""), pod.start_process("c", ""));
        let after = pod.wait("c", "").await.unwrap();
        let before = before.unwrap();
        assert_eq!((before.exit_status, after.exit_status), (1, 1), "round {round}");
        assert_eq!((before.pid, before.exited_at_ns), (started.unwrap(), after.exited_at_ns));
        pod.delete("c", "").await.unwrap();
    }
}

#[tokio::test]
async fn ten_execs_at_once_each_have_their_own_output_and_code() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let one = |n: u32| {
        let pod = &pod;
        async move {
            let script = format!("cat; echo out{n}; echo err{n} >&2; exit {n}");
            (n, pod.run_exec("c", &format!("e{n}"), &exec_shell(&script)).await)
        }
    };
    let (a, b, c, d, e, f, g, h, i, j) =
        tokio::join!(one(0), one(1), one(2), one(3), one(4), one(5), one(6), one(7), one(8), one(9));
    for (n, output) in [a, b, c, d, e, f, g, h, i, j] {
        assert_eq!(output.status, n);
        assert_eq!((output.stdout, output.stderr), (format!("out{n}\n"), format!("err{n}\n")));
    }
    pod.kill("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 137);
    pod.delete("c", "").await.unwrap();
    pod.assert_empty();
}

#[tokio::test]
async fn an_exec_that_cannot_begin_ends_and_can_be_deleted() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let mut process = exec_shell("true");
    process["args"] = json!(["nosuch"]);
    pod.exec("c", "e", &process, None).await.unwrap();
    assert_eq!(status(pod.start_process("c", "e").await).0, Code::NOT_FOUND);
    assert_eq!(pod.delete("c", "e").await.unwrap().exit_status, 127);
    assert_eq!(status(pod.delete("c", "e").await).0, Code::NOT_FOUND);
    // The name is free again.
    assert_eq!(pod.run_exec("c", "e", &exec_shell("exit 3")).await.status, 3);
}

#[tokio::test]
async fn signals_reach_a_handler_and_kill_without_one() {
    let pod = Pod::start().await;
    let (stdio, streams) = pod.stdio(false).await;
    let script = "trap 'echo trapped; exit 7' TERM; echo ready; while :; do sleep 0.01; done";
    pod.create("c", &shell(script), Some(stdio)).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let mut stdout = tokio::io::BufReader::new(streams.stdout.unwrap());
    let mut line = String::new();
    within("the handler to be in place", tokio::io::AsyncBufReadExt::read_line(&mut stdout, &mut line)).await.unwrap();
    pod.kill("c", "", libc::SIGTERM, false).await.unwrap();
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 7);
    pod.delete("c", "").await.unwrap();

    pod.start_sleeper("c").await;
    pod.exec("c", "e", &exec_shell("exec sleep 1000"), None).await.unwrap();
    pod.start_process("c", "e").await.unwrap();
    pod.kill("c", "e", libc::SIGRTMAX(), false).await.unwrap();
    assert_eq!(pod.wait("c", "e").await.unwrap().exit_status, 128 + libc::SIGRTMAX() as u32);
    assert_eq!(
        status(pod.kill("c", "e", libc::SIGTERM, false).await),
        (Code::NOT_FOUND, "c: process already finished".into())
    );
    assert_eq!(status(pod.kill("c", "", 65, false).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(status(pod.kill("x", "", 9, false).await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn when_init_ends_everything_in_the_container_ends() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    for exec in ["a", "b"] {
        pod.exec("c", exec, &exec_shell("sleep 1000 & sleep 1000 & exec sleep 1000"), None).await.unwrap();
        pod.start_process("c", exec).await.unwrap();
    }
    pod.kill("c", "", libc::SIGKILL, false).await.unwrap();
    for exec in ["", "a", "b"] {
        assert_eq!(pod.wait("c", exec).await.unwrap().exit_status, 137, "{exec}");
    }
    pod.delete("c", "").await.unwrap();
    assert_eq!(status(pod.wait("c", "a").await).0, Code::NOT_FOUND);
    pod.assert_empty();
}

#[tokio::test]
async fn kill_all_reaches_every_process() {
    let pod = Pod::start().await;
    let script = "sh -c 'trap \"exit 0\" TERM; while :; do sleep 0.01; done' & trap 'wait; exit 5' TERM; \
                  while :; do sleep 0.01; done";
    pod.create("c", &shell(script), None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    // Three shells and sleeps come and go; the handlers are in place once the sleeps appear.
    let settled = async {
        while pod.pids("c").await.unwrap().len() < 4 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    within("the container's processes to appear", settled).await;
    pod.kill("c", "", libc::SIGTERM, true).await.unwrap();
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 5);
    pod.delete("c", "").await.unwrap();

    pod.start_sleeper("c").await;
    pod.kill("c", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 137);
    assert_eq!(status(pod.kill("c", "", libc::SIGKILL, true).await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn pids_name_the_exec_that_a_process_is() {
    let pod = Pod::start().await;
    pod.create("c", &spec(&["sleep", "1000"]), None).await.unwrap();
    let init = pod.start_process("c", "").await.unwrap();
    pod.exec("c", "e", &exec_shell("exec sleep 1000"), None).await.unwrap();
    let exec = pod.start_process("c", "e").await.unwrap();
    let mut expected = vec![(init, String::new()), (exec, "e".to_owned())];
    expected.sort();
    assert_eq!(pod.pids("c").await.unwrap(), expected);
}

#[tokio::test]
async fn an_exec_runs_in_a_created_container_before_its_program() {
    let pod = Pod::start().await;
    pod.create("c", &spec(&["sh", "-c", "cat /made; exec sleep 1000"]), None).await.unwrap();
    assert_eq!(pod.run_exec("c", "e", &exec_shell("echo made > /made; exit 4")).await.status, 4);
    assert!(pod.rootfs().join("made").exists());
    pod.start_process("c", "").await.unwrap();
    assert_eq!(pod.run_exec("c", "f", &exec_shell("exit 5")).await.status, 5);
    pod.kill("c", "", libc::SIGKILL, true).await.unwrap();
    pod.wait("c", "").await.unwrap();
    pod.delete("c", "").await.unwrap();
    pod.assert_empty();
}

#[tokio::test]
async fn each_call_is_refused_in_the_wrong_state() {
    let pod = Pod::start().await;
    assert_eq!(status(pod.start_process("c", "").await).0, Code::NOT_FOUND);
    assert_eq!(status(pod.create("../x", &spec(&["true"]), None).await).0, Code::INVALID_ARGUMENT);
    pod.create("c", &spec(&["sleep", "1000"]), None).await.unwrap();
    assert_eq!(status(pod.create("c", &spec(&["true"]), None).await).0, Code::ALREADY_EXISTS);
    pod.start_process("c", "").await.unwrap();
    assert_eq!(status(pod.start_process("c", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(status(pod.delete("c", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(status(pod.resize("c", "", 80, 25).await).0, Code::FAILED_PRECONDITION);
    pod.exec("c", "e", &exec_shell("exec sleep 1000"), None).await.unwrap();
    assert_eq!(status(pod.exec("c", "e", &exec_shell("true"), None).await).0, Code::ALREADY_EXISTS);
    assert_eq!(status(pod.kill("c", "e", 9, false).await).0, Code::FAILED_PRECONDITION);
    pod.start_process("c", "e").await.unwrap();
    assert_eq!(status(pod.delete("c", "e").await).0, Code::FAILED_PRECONDITION);
    pod.kill("c", "", 9, false).await.unwrap();
    pod.wait("c", "").await.unwrap();
    assert_eq!(status(pod.exec("c", "f", &exec_shell("true"), None).await).0, Code::FAILED_PRECONDITION);
    pod.delete("c", "").await.unwrap();
    assert_eq!(status(pod.delete("c", "").await).0, Code::NOT_FOUND);
    pod.assert_empty();
}

#[tokio::test]
async fn a_container_that_was_never_started_can_be_killed_or_deleted() {
    let pod = Pod::start().await;
    pod.create("c", &spec(&["true"]), None).await.unwrap();
    assert_eq!(pod.delete("c", "").await.unwrap().exit_status, 137);
    pod.create("c", &spec(&["true"]), None).await.unwrap();
    pod.kill("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 137);
    assert_eq!(status(pod.start_process("c", "").await).0, Code::FAILED_PRECONDITION);
    pod.delete("c", "").await.unwrap();
    pod.assert_empty();
}

#[tokio::test]
async fn a_failed_create_leaves_nothing() {
    let pod = Pod::start().await;
    let mut bad = spec(&["true"]);
    bad["mounts"][1]["options"] = json!(["nosuchoption=1"]);
    let (code, message) = status(pod.create("c", &bad, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("mounts[1]") && message.contains("nosuchoption"), "{message}");
    for rootfs in ["", "..", "a/../..", "/etc", "nosuch"] {
        let request = caisson_protos::agent::CreateRequest {
            container_id: "c".into(),
            spec: spec(&["true"]).to_string().into_bytes(),
            rootfs: rootfs.into(),
            ..Default::default()
        };
        assert_eq!(status(pod.create_request(request).await).0, Code::INVALID_ARGUMENT, "{rootfs:?}");
    }
    pod.assert_empty();
    assert_eq!(pod.run(&shell("exit 4")).await.status, 4);
}

#[tokio::test]
async fn a_specification_may_have_a_mebibyte_and_no_more() {
    let pod = Pod::start().await;
    let mut large = shell("echo all there");
    let paths: Vec<_> = (0..20_000).map(|n| format!("/absent/{n:032}")).collect();
    large["linux"]["maskedPaths"] = json!(paths);
    assert_eq!(pod.run(&large).await.stdout, "all there\n");
    large["annotations"] = json!({"fill": "x".repeat(300_000)});
    let (code, message) = status(pod.create("c", &large, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("1048576"), "{message}");
}

#[tokio::test]
async fn a_limit_that_the_kernel_does_not_take_is_told_by_its_field() {
    let pod = Pod::start().await;
    let mut spec = spec(&["true"]);
    spec["linux"]["resources"] = json!({"cpu": {"cpus": "words"}});
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("linux.resources.cpu.cpus") && message.contains("words"), "{message}");
    pod.assert_empty();
}

#[tokio::test]
async fn every_orphan_is_reaped() {
    let pod = Pod::start().await;
    // A process beside the containers whose parent goes first falls to the agent, which is process 1 there.
    let target = pod.agent_pid().to_string();
    let entered = std::process::Command::new("nsenter")
        .args(["--target", &target, "--pid", "--", "sh", "-c", "sleep 0.1 & sleep 0.1 & exit 0"])
        .status();
    assert!(entered.unwrap().success());
    let reaped = async {
        while pod.log().matches("reaped an orphan").count() < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    within("both orphans to be reaped", reaped).await;
    pod.assert_empty();
}

#[tokio::test]
async fn many_containers_leave_no_process_and_no_descriptor() {
    let pod = Pod::start().await;
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", pod.agent_pid())).unwrap().count();
    // Their background processes are still there when init ends.
    let script = shell("(sleep 1000 & true); true");
    // An answer shows that the agent holds this test's connection.
    assert_eq!(status(pod.pids("c").await).0, Code::NOT_FOUND);
    let before = descriptors();
    for _ in 0..10 {
        pod.run(&script).await;
    }
    pod.assert_empty();
    // The agent closes a stream when it has seen that this side has.
    let closed = async {
        while descriptors() > before {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    within("the last streams to be closed", closed).await;
}
