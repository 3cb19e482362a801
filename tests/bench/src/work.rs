//! What a pod costs after its start: a second program in it, and its end, each beside runc.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{Finished, Host, Runtime, process::Running, wait::STEP};

use crate::{
    figures::{Pair, Report},
    progress,
};

/// Measures everything here.
///
/// # Errors
/// If a pod fails.
pub fn all(report: &mut Report, host: &mut Host, runtimes: &[Runtime], runs: u32) -> Result<()> {
    let (mut exec, mut end) = (Pair::default(), Pair::default());
    // The first round warms the page cache, as everywhere.
    for round in 0..=runs {
        progress("exec and kill", round, runs);
        for &runtime in runtimes {
            host.runtime = runtime;
            let (exec_time, end_time) = exec_and_end(host, &format!("work-{}-{round}", runtime as usize))?;
            if round > 0 {
                exec.push(runtime, exec_time);
                end.push(runtime, end_time);
            }
        }
    }
    exec.report(report, "ctr_exec", "ratio");
    end.report(report, "kill_to_exit_event", "ratio");
    Ok(())
}

/// `ctr task exec` of `true` from its start to its end; then SIGKILL, from the start of `ctr task kill` to the exit event.
fn exec_and_end(host: &Host, name: &str) -> Result<(Duration, Duration)> {
    let events = Running::start(&mut host.ctr(["events"]));
    let pod = host.container(name).start_idle();
    let begin = Instant::now();
    let output = pod.exec_command("one", &[], &["true"]).output().context("run ctr")?;
    let exec = begin.elapsed();
    ensure!(output.status.success(), "{name}: exec: {output:?}");
    std::thread::sleep(Duration::from_millis(200));

    let id = pod.id.clone();
    let exits = |text: &str| text.lines().filter(|line| line.contains("/tasks/exit") && line.contains(&id)).count();
    // The exec's own exit is told, too.
    events.stdout.wait_for("the exec's exit event", STEP, |text| (exits(text) == 1).then_some(()));
    let begin = Instant::now();
    let killing = Running::start(&mut host.ctr(["task", "kill", "--signal", "SIGKILL", &id]));
    events.stdout.wait_for("the pod's exit event", STEP, |text| (exits(text) == 2).then_some(()));
    let end = begin.elapsed();
    Finished::of(killing, STEP).succeeded();
    ensure!(pod.finish().code == Some(137), "{name} did not end by its signal");
    drop(events);
    host.expect_nothing_left();
    Ok((exec, end))
}
