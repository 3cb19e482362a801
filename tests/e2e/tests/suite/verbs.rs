//! What is asked of a whole container, and what is told of it: pause, metrics, update, processes, kills for want of memory, log URIs.
//! The same for both runtimes.

use std::fs;

use caisson_e2e::{
    Finished, Host,
    process::Running,
    until,
    wait::{STEP, long},
};
use containerd_shim_protos::{api, cgroups_v2::metrics::Metrics};
use protobuf::{Message, well_known_types::any::Any};

caisson_e2e::for_each_runtime!(
    paused_and_resumed,
    metrics_and_update,
    processes_with_their_names,
    out_of_memory,
    output_to_a_file,
    output_to_a_logger,
);

fn is(host: &Host, id: &str, state: &str) -> bool {
    let tasks = host.ctr_output(["task", "list"]).succeeded();
    tasks.lines().any(|line| line.contains(id) && line.contains(state))
}

fn paused_and_resumed(host: &Host) {
    let pod =
        host.container("paused").start_ready("echo ready; i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done");
    let id = pod.id.clone();
    host.ctr_output(["task", "pause", &id]).succeeded();
    assert!(is(host, &id, "PAUSED"));
    let refused = pod.exec("refused", &["true"]);
    assert!(refused.code != Some(0) && refused.err().contains("paused"), "{refused:?}");
    let again = host.ctr_output(["task", "pause", &id]);
    assert!(again.code != Some(0) && again.err().contains("cannot pause a paused container"), "{again:?}");
    // What it had written before may still be on its way; from then on it is silent.
    let lines = || pod.stdout().so_far().iter().filter(|byte| **byte == b'\n').count();
    let mut before = lines();
    until("output that stands still", STEP, || {
        std::thread::sleep(std::time::Duration::from_millis(500));
        let now = lines();
        let still = now == before;
        before = now;
        still.then_some(())
    });
    host.ctr_output(["task", "resume", &id]).succeeded();
    assert!(is(host, &id, "RUNNING"));
    until("output that goes on", STEP, || (lines() > before).then_some(()));
    assert_eq!(pod.exec("allowed", &["echo", "yes"]).succeeded(), "yes\n");
    host.ctr_output(["task", "pause", &id]).succeeded();
    assert_eq!(pod.end().code, Some(137), "what is paused can be killed");
}

fn metrics_and_update(host: &Host) {
    let pod = host.container("metrics").start_idle();
    let table = host.ctr_output(["task", "metrics", &pod.id]).succeeded();
    let number = |name: &str| -> u64 {
        let line =
            table.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("{table}"));
        line.split_whitespace().nth(1).and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{table}"))
    };
    assert_eq!(number("pids.current"), 1);
    assert!(number("cpu.usage_usec") > 0 && number("memory.usage") > 0, "{table}");
    assert_eq!((number("memory.usage_limit"), number("pids.limit")), (u64::MAX, u64::MAX), "{table}");

    let shim = pod.shim();
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: br#"{"memory":{"limit":67108864},"pids":{"limit":50}}"#.to_vec(),
        ..Default::default()
    };
    let update = api::UpdateTaskRequest { id: pod.id.clone(), resources: Some(resources).into(), ..Default::default() };
    shim.call::<api::Empty>("Update", &update).expect("the limits can be had");
    let ask = api::StatsRequest { id: pod.id.clone(), ..Default::default() };
    let stats: api::StatsResponse = shim.call("Stats", &ask).expect("it has numbers");
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.stats.value).expect("they are of their type");
    assert_eq!((metrics.memory.usage_limit, metrics.pids.limit), (64 << 20, 50));
    assert_eq!(metrics.memory_events.oom_kill, 0);
    drop(shim);
    assert_eq!(pod.end().code, Some(137));
}

fn processes_with_their_names(host: &Host) {
    let pod = host.container("named").start_idle();
    let mut sleeper = pod.exec_start("sleeper", &["sh", "-c", "echo here; exec sleep 100000"]);
    sleeper.stdout.wait_for("its first line", STEP, |text| text.contains("here\n").then_some(()));
    let listed = host.ctr_output(["task", "ps", &pod.id]).succeeded();
    let named: Vec<_> = listed.lines().filter(|line| line.contains("sleeper")).collect();
    assert!(listed.lines().count() == 3 && named.len() == 1, "{listed}");
    host.ctr_output(["task", "kill", "--all", "--signal", "SIGKILL", &pod.id]).succeeded();
    assert_eq!(sleeper.wait(STEP).code(), Some(137));
    assert_eq!(pod.finish().code, Some(137));
}

fn out_of_memory(host: &Host) {
    let events = Running::start(&mut host.ctr(["events"]));
    let container = host.container("hungry").flag("--memory-limit").flag((32 << 20).to_string());
    let mut pod = container.start_ready("echo ready; read go; tail /dev/zero; echo code $?; read end");
    pod.running.write(b"go\n");
    pod.wait_for("code 137\n");
    let told = |topic: &'static str| {
        move |text: &str| {
            let lines: Vec<_> = text.lines().filter(|line| line.contains(topic)).map(str::to_owned).collect();
            (!lines.is_empty()).then_some(lines)
        }
    };
    let ooms = events.stdout.wait_for("the event of the kill", STEP, told("/tasks/oom"));
    assert!(ooms.iter().all(|line| line.contains(&pod.id)), "{ooms:?}");
    pod.running.write(b"end\n");
    assert_eq!(pod.finish().code, Some(0));
    events.stdout.wait_for("the event of the deletion", STEP, told("/tasks/delete"));
    let text = String::from_utf8_lossy(&events.stdout.so_far()).into_owned();
    assert_eq!(text.lines().filter(|line| line.contains("/tasks/oom")).count(), 1, "{text}");
}

fn output_to_a_file(host: &Host) {
    let log = host.directory().join("logs/one log");
    let uri = format!("file://{}", log.display().to_string().replace(' ', "%20"));
    for round in ["first", "second"] {
        let container = host.container(round).flag("--log-uri").flag(&uri);
        let finished = container.sh(&format!("echo {round} out; echo {round} err >&2"));
        assert_eq!(finished.code, Some(0), "{finished:?}");
        assert!(finished.stdout.is_empty(), "{finished:?}");
    }
    let text = fs::read_to_string(log).expect("it was made");
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["first err", "first out", "second err", "second out"]);
}

fn output_to_a_logger(host: &Host) {
    let file = |name: &str| host.directory().join(name);
    let script = format!(
        "trap '' TERM; exec 5>&-; /bin/cat <&3 > {}; /bin/cat <&4 > {}; echo $CONTAINER_ID $CONTAINER_NAMESPACE > {}",
        file("out").display(),
        file("err").display(),
        file("whose").display(),
    );
    let encoded: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let container = host.container("logged").flag("--log-uri").flag(format!("binary:///bin/sh?-c={encoded}"));
    let id = container.id.clone();
    let finished =
        Finished::of(Running::start(&mut container.command(&["sh", "-c", "seq 1 100000; echo err >&2"])), long());
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let read = |name: &str| fs::read_to_string(file(name)).expect("the logger wrote it");
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(read("out") == expected, "whole and in order");
    assert_eq!(read("err"), "err\n");
    assert_eq!(read("whose"), format!("{id} {}\n", host.namespace()));
}
