//! Every call of the Task service, made to the shim itself, in its right use: what it answers, and which events it
//! sends, each once and in order.

use std::{fs, fs::File, io::Write as _};

use caisson_e2e::{
    Host, Runtime,
    bundle::{self, fifo},
    direct::Direct,
    process::Process,
    sizes,
    task::{Streams, Task},
    wait::STEP,
};
use containerd_shim_protos::api::Status;
use serde_json::json;

caisson_e2e::for_each_runtime!(
    a_life,
    execs,
    an_exec_before_the_start,
    a_terminal_of_its_own,
    short_lives,
    deleted_before_its_start,
    update_of_the_period_alone,
);
caisson_e2e::caisson_only!(a_life_as_containerd_2_asks);

const LIFE: [&str; 4] = ["/tasks/create ID", "/tasks/start ID", "/tasks/exit ID 7", "/tasks/delete ID 7"];
const SCRIPT: &str = "echo hello; cat; echo bye >&2; exit 7";

fn a_life(host: &Host) {
    let pod = Direct::start(host, "life", &["sh", "-c", SCRIPT]);
    whole_life(host, &pod);
    pod.end();
}

fn a_life_as_containerd_2_asks(host: &Host) {
    let mut pod = Direct::start(host, "life-3", &["sh", "-c", SCRIPT]);
    pod.task = Task::new(&pod.shim.version_3(), &pod.bundle.id);
    whole_life(host, &pod);
    pod.end();
}

fn whole_life(host: &Host, pod: &Direct) {
    let task = &pod.task;
    let (stdout, out) = pod.output("stdout");
    let (stderr, err) = pod.output("stderr");
    let stdin = pod.bundle.directory.join("stdin");
    fifo(&stdin);
    let mut writer = File::options().read(true).write(true).open(&stdin).expect("the FIFO opens");
    let pid = pod.create(&Streams { stdin, stdout, stderr, terminal: false }).expect("Create");
    assert!(pid > 0);
    let state = task.state("").expect("State");
    assert_eq!(state.status.enum_value(), Ok(Status::CREATED), "{state:?}");
    assert_eq!((&state.id, state.pid, state.terminal), (&task.id, pid, false), "{state:?}");
    assert_eq!(state.bundle, pod.bundle.directory.to_string_lossy(), "{state:?}");
    let connected = task.connect().expect("Connect");
    assert_eq!(connected.task_pid, pid);
    let shim = Process::read(connected.shim_pid as i32).expect("the shim runs");
    assert!(host.processes().contains(&shim), "{shim} is not of this test");

    let waits = [task.wait_beside(""), task.wait_beside("")];
    assert_eq!(task.start("").expect("Start"), pid);
    out.wait_for("hello", STEP, |text| (text == "hello\n").then_some(()));
    assert_eq!(task.status("").expect("State"), Status::RUNNING);
    let pids = task.pids().expect("Pids");
    assert!(!pids.is_empty() && pids.iter().all(|(pid, exec)| *pid > 0 && exec.is_empty()), "{pids:?}");
    task.resize("", 80, 24).expect("ResizePty, which does nothing without a terminal");
    task.shutdown().expect("Shutdown, which does nothing while there is a container");
    assert_eq!(task.status("").expect("State"), Status::RUNNING);

    writer.write_all(b"typed in").expect("the FIFO takes it");
    drop(writer);
    task.close_stdin("").expect("CloseIO");
    for wait in waits {
        assert_eq!(wait.join().expect("it does not panic").expect("Wait"), 7);
    }
    assert_eq!(task.wait("").expect("Wait, late"), 7);
    let state = task.state("").expect("State");
    assert_eq!((state.status.enum_value(), state.exit_status), (Ok(Status::STOPPED), 7), "{state:?}");
    assert_eq!(task.delete("").expect("Delete"), 7);
    assert_eq!(out.wait_for_end("standard output", STEP), b"hello\ntyped in");
    assert_eq!(err.wait_for_end("standard error", STEP), b"bye\n");
    assert_eq!(pod.wait_for("/tasks/delete ID 7"), pid);
    assert_eq!(pod.lines(), LIFE);
    assert!(pod.events.events().iter().all(|event| event.pid == pid), "{:?}", pod.events.events());
}

fn execs(host: &Host) {
    let pod = Direct::start(host, "execs", &["sleep", "100000"]);
    let task = &pod.task;
    let pid = pod.run();

    let (stdout, out) = pod.output("one.stdout");
    let (stderr, _) = pod.output("one.stderr");
    let streams = Streams { stdout, stderr, ..Streams::default() };
    task.exec("one", &["sh", "-c", "echo here; exec sleep 100000"], &streams).expect("Exec");
    assert_eq!(task.status("one").expect("State"), Status::CREATED);
    let wait = task.wait_beside("one");
    let exec_pid = task.start("one").expect("Start of an exec");
    assert!(exec_pid > 0);
    out.wait_for("here", STEP, |text| text.contains("here\n").then_some(()));
    let state = task.state("one").expect("State");
    assert_eq!((state.status.enum_value(), state.pid), (Ok(Status::RUNNING), exec_pid), "{state:?}");
    let pids = task.pids().expect("Pids");
    let mut names: Vec<&str> = pids.iter().map(|(_, exec)| exec.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["", "one"], "{pids:?}");
    assert_ne!(pids[0].0, pids[1].0, "two processes have two pids");

    // Another that ends by itself beside it, and one that is deleted unstarted.
    let none = Streams::default();
    task.exec("two", &["sh", "-c", "exit 5"], &none).expect("Exec");
    let two_pid = task.start("two").expect("Start of an exec");
    assert_eq!(task.wait("two").expect("Wait"), 5);
    assert_eq!(task.delete("two").expect("Delete"), 5);
    task.exec("three", &["true"], &none).expect("Exec");
    task.delete("three").expect("Delete of an exec that never ran");

    task.kill("one", 15, false).expect("Kill of an exec");
    assert_eq!(wait.join().expect("it does not panic").expect("Wait"), 143);
    assert_eq!(task.delete("one").expect("Delete"), 143);
    assert_eq!(task.status("").expect("State"), Status::RUNNING, "the container is none the worse");

    // All processes at once.
    task.exec("four", &["sleep", "100000"], &none).expect("Exec");
    task.start("four").expect("Start of an exec");
    task.kill("", 9, true).expect("Kill of all");
    assert_eq!((task.wait("four").expect("Wait"), task.wait("").expect("Wait")), (137, 137));
    assert_eq!(task.delete("four").expect("Delete"), 137);
    assert_eq!(task.delete("").expect("Delete"), 137);
    pod.wait_for("/tasks/delete ID 137");

    let lines = pod.lines();
    for (name, status) in [("one", 143), ("two", 5), ("four", 137)] {
        let whole = ["exec-added", "exec-started", "exit"].map(|topic| format!("/tasks/{topic} ID {name}"));
        let whole = [whole[0].clone(), whole[1].clone(), format!("{} {status}", whole[2])];
        assert_eq!(of(&lines, name), whole, "{lines:?}");
    }
    assert_eq!(of(&lines, "three"), ["/tasks/exec-added ID three"], "{lines:?}");
    let names = ["one", "two", "three", "four"];
    let own: Vec<&String> = lines.iter().filter(|line| !names.iter().any(|name| has(line, name))).collect();
    assert_eq!(own, ["/tasks/create ID", "/tasks/start ID", "/tasks/exit ID 137", "/tasks/delete ID 137"]);
    assert_eq!(pod.wait_for("/tasks/exec-started ID two"), two_pid);
    assert_eq!(pod.wait_for("/tasks/exit ID two 5"), two_pid);
    assert_eq!(pod.wait_for("/tasks/exit ID one 143"), exec_pid);
    assert_eq!(pod.wait_for("/tasks/exit ID 137"), pid);
    pod.end();
}

fn has(line: &str, exec: &str) -> bool {
    line.split(' ').nth(2) == Some(exec)
}

/// What was told of an exec, in order.
fn of<'a>(lines: &'a [String], exec: &str) -> Vec<&'a str> {
    lines.iter().map(String::as_str).filter(|line| has(line, exec)).collect()
}

fn a_terminal_of_its_own(host: &Host) {
    let mut specification = bundle::specification(&["sh", "-c", "echo up; read line; stty size; exit 3"]);
    specification["process"]["terminal"] = true.into();
    specification["mounts"] = json!([
        { "destination": "/proc", "type": "proc", "source": "proc" },
        { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
        {
            "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["newinstance", "ptmxmode=0666"],
        },
    ]);
    let pod = Direct::of(host, "terminal", specification);
    let (stdout, screen) = pod.output("stdout");
    let stdin = pod.bundle.directory.join("stdin");
    fifo(&stdin);
    let mut keys = File::options().read(true).write(true).open(&stdin).expect("the FIFO opens");
    pod.create(&Streams { stdin, stdout, terminal: true, ..Streams::default() }).expect("Create");
    pod.task.start("").expect("Start");
    screen.wait_for("its first line", STEP, |text| text.contains("up\r\n").then_some(()));
    pod.task.resize("", 132, 43).expect("ResizePty");
    keys.write_all(b"\n").expect("the FIFO takes it");
    screen.wait_for("the new size", STEP, |text| text.contains("43 132\r\n").then_some(()));
    assert!(pod.task.state("").expect("State").terminal);
    assert_eq!(pod.task.wait("").expect("Wait"), 3);
    assert_eq!(pod.task.delete("").expect("Delete"), 3);
    drop(keys);
    pod.end();
}

/// However short an exec lives, its exit is told once, behind its start, and Wait learns it.
fn short_lives(host: &Host) {
    let pod = Direct::start(host, "short", &["sleep", "100000"]);
    let task = &pod.task;
    pod.run();
    let count = sizes::size(5, 50);
    let mut expected = Vec::new();
    for index in 0..count {
        let name = format!("x{index}");
        task.exec(&name, &["sh", "-c", &format!("exit {index}")], &Streams::default()).expect("Exec");
        let early = task.wait_beside(&name);
        task.start(&name).expect("Start of an exec");
        assert_eq!(task.wait(&name).expect("Wait"), index as u32);
        assert_eq!(early.join().expect("it does not panic").expect("Wait"), index as u32);
        assert_eq!(task.delete(&name).expect("Delete"), index as u32);
        expected.extend(["exec-added", "exec-started"].map(|topic| format!("/tasks/{topic} ID {name}")));
        expected.push(format!("/tasks/exit ID {name} {index}"));
    }
    pod.kill_and_delete();
    pod.wait_for("/tasks/delete ID 137");
    let lines: Vec<String> = pod.lines().into_iter().filter(|line| line.contains(" x")).collect();
    assert_eq!(lines, expected);
    pod.end();
}

fn deleted_before_its_start(host: &Host) {
    let pod = Direct::start(host, "unstarted", &["true"]);
    pod.create(&Streams::default()).expect("Create");
    pod.task.delete("").expect("Delete of a container that never ran");
    let root = pod.bundle.directory.join("rootfs");
    assert_eq!(fs::read_dir(&root).map_or(0, Iterator::count), 0, "something is mounted on {}", root.display());
    let status = pod.task.state("").expect_err("it is gone");
    assert_eq!(status.code(), ttrpc::Code::NOT_FOUND, "{status:?}");
    if host.runtime == Runtime::Caisson {
        pod.wait_for("/tasks/delete ID 137");
    }
    let lines = pod.lines();
    assert!(!lines.iter().any(|line| line.starts_with("/tasks/start")), "{lines:?}");
    pod.end();
}

/// A created container takes execs, too; its own program begins when it is started.
fn an_exec_before_the_start(host: &Host) {
    let pod = Direct::start(host, "early", &["sleep", "100000"]);
    pod.create(&Streams::default()).expect("Create");
    pod.task.exec("early", &["sh", "-c", "exit 5"], &Streams::default()).expect("Exec into a created container");
    pod.task.start("early").expect("Start of the exec");
    assert_eq!(pod.task.wait("early").expect("Wait"), 5);
    assert_eq!(pod.task.delete("early").expect("Delete"), 5);
    pod.task.start("").expect("Start");
    pod.kill_and_delete();
    pod.end();
}

/// An Update of cpu.period keeps the quota, and one of the quota keeps the period.
fn update_of_the_period_alone(host: &Host) {
    let mut specification = caisson_e2e::bundle::specification(&["sleep", "100000"]);
    specification["linux"]["resources"]["cpu"] = serde_json::json!({ "quota": 50_000, "period": 100_000 });
    let pod = Direct::of(host, "period", specification);
    pod.run();
    let file = format!("/sys/fs/cgroup/{}/period/cpu.max", host.namespace());
    // A pod has a quarter of a processor in each period beside its container's time.
    let expect = |quota: u64, period: u64| {
        let quota = if host.runtime == caisson_e2e::Runtime::Caisson { quota + period / 4 } else { quota };
        let text = std::fs::read_to_string(&file).expect("the test's host has the cpu controller");
        assert_eq!(text, format!("{quota} {period}\n"));
    };
    expect(50_000, 100_000);
    pod.task.update(&serde_json::json!({ "cpu": { "period": 200_000 } })).expect("Update of the period");
    expect(50_000, 200_000);
    pod.task.update(&serde_json::json!({ "cpu": { "quota": 80_000 } })).expect("Update of the quota");
    expect(80_000, 200_000);
    pod.kill_and_delete();
    pod.end();
}
