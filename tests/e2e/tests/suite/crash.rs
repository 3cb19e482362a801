//! A part of a pod killed without warning: containerd is told, and nothing stays.

use caisson_e2e::{Host, Pod, Runtime, process, until, wait::STEP};
use rustix::process::Signal;

caisson_e2e::for_each_runtime!(shim_killed);
caisson_e2e::caisson_only!(monitor_killed, file_server_killed, shim_killed_before_the_task_started_nothing_stays);

/// The shim of the only pod.
fn shim(host: &Host) -> process::Process {
    let program = match host.runtime {
        Runtime::Caisson => "containerd-shim-caisson-v2",
        Runtime::Runc => "containerd-shim-runc-v2",
    };
    only(host, program)
}

fn only(host: &Host, program: &str) -> process::Process {
    let mut found = host.running(program);
    assert_eq!(found.len(), 1, "processes running {program}: {found:?}");
    found.remove(0)
}

/// The task is not running any more in containerd's eyes, and can be deleted; the client that ran it ends.
fn reported_and_deletable(host: &Host, pod: Pod) {
    let id = pod.id.clone();
    until("containerd to report the task as ended", STEP, || {
        let tasks = host.ctr_output(["task", "list"]).succeeded();
        (!tasks.lines().any(|line| line.contains(&id) && line.contains("RUNNING"))).then_some(())
    });
    let finished = pod.finish();
    assert_ne!(finished.code, Some(0), "the client took it for a success: {finished:?}");
    // The client's `--rm` may have deleted both, or have found the task gone.
    for what in ["task", "container"] {
        let deleted = host.ctr_output([what, "delete", &id]);
        let gone = deleted.err().contains("not found") || deleted.err().contains("no running task");
        assert!(gone || what == "task" || deleted.code == Some(0), "{what}: {deleted:?}");
    }
    host.ctr_output(["snapshot", "--snapshotter", host.snapshotter(), "delete", &id]);
    host.forgive_socket_of_runc(&id);
    host.expect_nothing_left();
    // And containerd still works.
    assert_eq!(host.container("after").run(&["echo", "next"]).succeeded(), "next\n");
}

fn shim_killed(host: &Host) {
    let pod = host.container("killed").start_idle();
    process::signal(shim(host).pid, Signal::KILL);
    reported_and_deletable(host, pod);
}

/// Killed while the container is being made: whatever half of it exists goes. The monitor's process shows that the shim's
/// daemon is there to be killed; runc's shim has no such sign, and would sometimes only start after the blow.
fn shim_killed_before_the_task_started_nothing_stays(host: &Host) {
    let pod = host.container("early").start(&["sleep", "100000"]);
    until("caisson-vmm to exist", STEP, || (!host.running("caisson-vmm").is_empty()).then_some(()));
    for process in host.processes() {
        if process.command.contains("containerd-shim-") {
            process::signal(process.pid, Signal::KILL);
        }
    }
    reported_and_deletable(host, pod);
}

fn monitor_killed(host: &Host) {
    let pod = host.container("killed").start_idle();
    process::signal(only(host, "caisson-vmm").pid, Signal::KILL);
    reported_and_deletable(host, pod);
}

fn file_server_killed(host: &Host) {
    let pod = host.container("killed").start_idle();
    process::signal(only(host, "caisson-fsd").pid, Signal::KILL);
    reported_and_deletable(host, pod);
}
