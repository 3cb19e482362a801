//! Tasks: exec, signals, deletion, and the answers to what is not allowed.

use caisson_e2e::{Finished, Host, Runtime, until, wait::STEP};
use containerd_shim_protos::api;
use ttrpc::Code;

caisson_e2e::for_each_runtime!(
    ten_at_once,
    signals_trapped_and_not,
    deletion_of_the_running_and_the_deleted,
    containerd_starts_anew,
    answers_of_the_shim,
    input_closed_by_the_client,
);

fn ten_at_once(host: &Host) {
    let pod = host.container("ten").start_idle();
    let started: Vec<_> = (0..10)
        .map(|index| {
            let script = format!("read line; echo {index} $line; echo e{index} >&2; exit {index}");
            let mut running = pod.exec_start(&format!("x{index}"), &["sh", "-c", &script]);
            running.write(format!("input {index}\n").as_bytes());
            running.close_stdin();
            running
        })
        .collect();
    for (index, running) in started.into_iter().enumerate() {
        let finished = Finished::of(running, STEP);
        assert_eq!(finished.code, Some(index as i32), "{finished:?}");
        assert_eq!(finished.out(), format!("{index} input {index}\n"));
        assert_eq!(finished.err(), format!("e{index}\n"));
    }
    assert_eq!(pod.end().code, Some(137));
}

fn signals_trapped_and_not(host: &Host) {
    let script = "trap 'echo caught; exit 7' TERM; trap 'echo hup' HUP; echo ready; while :; do sleep 0.1; done";
    let pod = host.container("trap").start_ready(script);
    pod.kill("SIGHUP");
    pod.wait_for("hup\n");
    pod.kill("SIGTERM");
    let finished = pod.finish();
    assert_eq!(finished.code, Some(7), "{finished:?}");
    assert_eq!(finished.out(), "ready\nhup\ncaught\n", "each signal arrives once");

    // The first process of a pid namespace does not die of a signal it has no handler for, except SIGKILL.
    let pod = host.container("deaf").start_ready("echo ready; while :; do sleep 0.1; done");
    pod.kill("SIGTERM");
    assert_eq!(pod.exec("still", &["echo", "alive"]).succeeded(), "alive\n");
    pod.kill("SIGKILL");
    assert_eq!(pod.finish().code, Some(137));
}

/// Starts a pod that no client holds on to; gives its id.
fn detached(host: &Host, name: &str) -> String {
    let id = host.container(name).id;
    let mut command = host.ctr(["run", "--detach", "--null-io", "--runtime", host.runtime.name()]);
    command.args(["--snapshotter", host.snapshotter(), host.image_name(), &id, "sleep", "100000"]);
    let started = command.output().expect("ctr is installed");
    assert!(started.status.success(), "{started:?}");
    id
}

fn is(host: &Host, id: &str, state: &str) -> bool {
    let tasks = host.ctr_output(["task", "list"]).succeeded();
    tasks.lines().any(|line| line.contains(id) && line.contains(state))
}

/// Kills a detached pod and deletes its task and its container.
fn kill_and_delete(host: &Host, id: &str) {
    host.ctr_output(["task", "kill", "--signal", "SIGKILL", id]).succeeded();
    until("the task to be reported as stopped", STEP, || is(host, id, "STOPPED").then_some(()));
    let deleted = host.ctr_output(["task", "delete", id]);
    assert!(deleted.code == Some(0) && deleted.err().contains("exit code 137"), "{deleted:?}");
    host.ctr_output(["container", "delete", id]).succeeded();
}

/// The pod lives on without containerd, and the new one finds its shim again.
fn containerd_starts_anew(host: &Host) {
    let id = detached(host, "kept");
    host.restart_containerd();
    assert!(is(host, &id, "RUNNING"), "the new containerd does not know it");
    let finished = host.ctr_output(["task", "exec", "--exec-id", "hello", &id, "echo", "still here"]);
    assert_eq!(finished.succeeded(), "still here\n");
    kill_and_delete(host, &id);
}

fn deletion_of_the_running_and_the_deleted(host: &Host) {
    let id = detached(host, "once");
    let refused = host.ctr_output(["task", "delete", &id]);
    assert!(refused.code != Some(0) && refused.err().contains("must be stopped"), "{refused:?}");
    // ctr asks before it deletes; the shim itself must refuse as well.
    let shim = caisson_e2e::shim::Shim::connect(&host.bundle(&id));
    let request = api::DeleteRequest { id: id.clone(), ..Default::default() };
    let status = shim.call::<api::DeleteResponse>("Delete", &request).expect_err("a running task must stay");
    if host.runtime == Runtime::Caisson {
        assert_eq!(status.code(), Code::FAILED_PRECONDITION, "{status:?}");
    }
    drop(shim);
    assert!(is(host, &id, "RUNNING"));

    kill_and_delete(host, &id);
    for what in ["task", "container"] {
        let again = host.ctr_output([what, "delete", &id]);
        assert!(again.code != Some(0) && again.err().contains("not found"), "{what}: {again:?}");
    }
}

fn answers_of_the_shim(host: &Host) {
    let pod = host.container("asked").start_idle();
    let (id, shim) = (pod.id.clone(), pod.shim());
    let mut sleeper = pod.exec_start("sleeper", &["sh", "-c", "echo here; exec sleep 100000"]);
    sleeper.stdout.wait_for("its first line", STEP, |text| text.contains("here\n").then_some(()));

    let ask = |exec: &str| api::StateRequest { id: id.clone(), exec_id: exec.to_owned(), ..Default::default() };
    let state: api::StateResponse = shim.call("State", &ask("")).expect("it has a state");
    assert_eq!(state.status.enum_value(), Ok(api::Status::RUNNING));
    assert!(state.pid > 0 && state.id == id && state.bundle == host.bundle(&id).to_string_lossy(), "{state:?}");
    let state: api::StateResponse = shim.call("State", &ask("sleeper")).expect("it has a state");
    assert_eq!(state.status.enum_value(), Ok(api::Status::RUNNING));

    let pids = api::PidsRequest { id: id.clone(), ..Default::default() };
    let pids: api::PidsResponse = shim.call("Pids", &pids).expect("it has processes");
    // cat, in place of the shell that started it, and sleep.
    assert_eq!(pids.processes.len(), 2, "{pids:?}");
    let listed = host.ctr_output(["task", "ps", &id]).succeeded();
    assert_eq!(listed.lines().count(), 3, "a heading and two processes: {listed}");

    let connect = api::ConnectRequest { id: id.clone(), ..Default::default() };
    let connected: api::ConnectResponse = shim.call("Connect", &connect).expect("it knows itself");
    let shim_is = |process: &caisson_e2e::process::Process| process.pid == connected.shim_pid as i32;
    assert!(host.processes().iter().any(shim_is), "no process {} is the shim", connected.shim_pid);

    // What is wrong is refused with the code that tells what it is.
    let refused = |method: &str, request: &dyn Fn() -> Result<api::Empty, ttrpc::Status>, code: Code| {
        let status = request().expect_err(method);
        assert_eq!(status.code(), code, "{method}: {status:?}");
    };
    let exec = |name: &str| {
        let spec = br#"{"args":["true"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
        let spec = protobuf::well_known_types::any::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: spec,
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: id.clone(),
            exec_id: name.to_owned(),
            spec: Some(spec).into(),
            ..Default::default()
        };
        shim.call::<api::Empty>("Exec", &request)
    };
    refused("a second process of one name", &|| exec("sleeper"), Code::ALREADY_EXISTS);
    let kill = api::KillRequest { id: id.clone(), exec_id: "nobody".to_owned(), signal: 15, ..Default::default() };
    refused("a signal to nobody", &|| shim.call("Kill", &kill), Code::NOT_FOUND);
    let state = shim.call::<api::StateResponse>("State", &ask("nobody")).expect_err("nobody has no state");
    assert_eq!(state.code(), Code::NOT_FOUND, "{state:?}");

    // An exec is deleted once, and only when it has ended.
    let delete = api::DeleteRequest { id: id.clone(), exec_id: "sleeper".to_owned(), ..Default::default() };
    shim.call::<api::DeleteResponse>("Delete", &delete).expect_err("a running process must stay");
    pod.kill_exec("sleeper", "SIGTERM");
    assert_eq!(sleeper.wait(STEP).code(), Some(143));
    let gone = shim.call::<api::DeleteResponse>("Delete", &delete).expect_err("ctr has deleted it already");
    assert_eq!(gone.code(), Code::NOT_FOUND, "{gone:?}");

    let size = api::ResizePtyRequest { id: id.clone(), width: 80, height: 24, ..Default::default() };
    shim.call::<api::Empty>("ResizePty", &size).expect("without a terminal there is nothing to do");

    if host.runtime == Runtime::Caisson {
        let start = api::StartRequest { id: id.clone(), ..Default::default() };
        let status = shim.call::<api::StartResponse>("Start", &start).expect_err("it runs already");
        assert_eq!(status.code(), Code::FAILED_PRECONDITION, "{status:?}");
        let checkpoint = api::CheckpointTaskRequest { id: id.clone(), ..Default::default() };
        let status = shim.call::<api::Empty>("Checkpoint", &checkpoint).expect_err("there is none");
        assert_eq!(status.code(), Code::UNIMPLEMENTED, "{status:?}");
    }
    drop(shim);
    assert_eq!(pod.end().code, Some(137));
}

fn input_closed_by_the_client(host: &Host) {
    let mut pod = host.container("closes").start_ready("echo ready; wc -c; echo end of input");
    pod.running.write(b"twelve bytes");
    pod.running.close_stdin();
    let finished = pod.finish();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_eq!(finished.out(), "ready\n12\nend of input\n");
}
