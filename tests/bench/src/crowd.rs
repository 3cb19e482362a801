//! Many pods at the same time, beside as many plain containers. In the exact host only the clock of one processor counts, so
//! this measures the whole of the work, not how well it spreads over processors; and once is enough.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anyhow::Result;
use caisson_e2e::{
    Finished, Host, Runtime, Setup,
    process::Running,
    until,
    wait::{STEP, long},
};

use crate::{
    figures::{Pair, Report},
    progress, runtimes,
};

/// Pods that [`many`] starts, and how many of them at a time.
const PODS: usize = 50;
const AT_A_TIME: usize = 8;

/// Measures everything here.
///
/// # Errors
/// If a pod fails.
pub fn all(only_runc: bool) -> Result<Report> {
    let mut report = Report::default();
    let mut host = Host::start(Runtime::Runc, Setup::default());
    let runtimes = runtimes(only_runc);
    let mut times = Pair::default();
    for (&runtime, round) in runtimes.iter().zip(1..) {
        progress("50 pods, 8 at a time", round, runtimes.len() as u32);
        host.runtime = runtime;
        times.push(runtime, many(&host));
    }
    times.report(&mut report, "pods_50_by_8", "ratio");
    host.finish();
    Ok(report)
}

/// `ctr run --rm` of `echo` in [`PODS`] pods, [`AT_A_TIME`] of them at any time.
fn many(host: &Host) -> Duration {
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
    time
}
