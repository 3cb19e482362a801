//! What a pod costs after its start: a second program in it, its end, and many pods at the same time, each beside runc.
//!
//! In the exact host only the clock of one processor counts, so "at the same time" measures the whole of the work, not how
//! well it spreads over processors.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{Finished, Host, Runtime, process::Running, until, wait::STEP, wait::long};

use crate::figures::{Pair, Report};

/// Pods that [`many`] starts, and how many of them at a time.
const PODS: usize = 50;
const AT_A_TIME: usize = 8;

/// Measures everything here.
///
/// # Errors
/// If a pod fails.
pub fn all(report: &mut Report, host: &mut Host, runtimes: &[Runtime], runs: u32) -> Result<()> {
    let (mut exec, mut end) = (Pair::default(), Pair::default());
    // The first round warms the page cache, as everywhere.
    for round in 0..=runs {
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

    let mut crowd = Pair::default();
    for &runtime in runtimes {
        host.runtime = runtime;
        crowd.push(runtime, many(host)?);
    }
    crowd.report(report, "pods_50_by_8", "ratio");
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

/// `ctr run --rm` of `echo` in [`PODS`] pods, [`AT_A_TIME`] of them at any time.
fn many(host: &Host) -> Result<Duration> {
    let mut running = VecDeque::new();
    let begin = Instant::now();
    for index in 0..PODS {
        if running.len() == AT_A_TIME
            && let Some(first) = running.pop_front()
        {
            Finished::of(first, long()).succeeded();
        }
        let container = host.container(&format!("many-{}-{index}", host.runtime as usize));
        running.push_back(Running::start(&mut container.command(&["echo", "hello"])));
    }
    for last in running {
        Finished::of(last, long()).succeeded();
    }
    let time = begin.elapsed();
    until("the end of every pod", STEP, || host.processes().is_empty().then_some(()));
    host.expect_nothing_left();
    Ok(time)
}
