//! Files of a pod, on its root and on a bind mount, beside the same container of runc.
//!
//! ```text
//! probe storage DIRECTORY FILES MIB  ──►  files_make 812.003       the milliseconds of each step
//!                                         files_write 1204.117     by the container's clock
//! ```
//!
//! The host's file systems lie in memory, so what is compared is the way to them, and no disk.

use anyhow::{Context, Result, ensure};
use caisson_e2e::{Host, Runtime, Setup, host::Image, process::Running, wait::long};

use crate::{
    figures::{Pair, Report},
    progress, runtimes,
};

/// Files that are made, written, read, listed and removed on the root.
pub const FILES: usize = 10_000;
/// Size of the one file that is read and written in parts, MiB.
const MIB: usize = 32;

/// Where, how a picture calls it, and which part of the files is made there: on a bind mount each name is looked up each time, and the
/// emulated host would take an hour for all of them.
pub const PLACES: [(&str, &str, usize); 2] = [("root", "the root", 1), ("bind", "a bind mount", 10)];

/// What the probe does, in its order.
pub const STEPS: [&str; 10] = [
    "files_make",
    "files_write",
    "files_read",
    "files_list",
    "files_remove",
    "files_400",
    "write_sequential",
    "read_sequential",
    "read_random",
    "write_random",
];

/// Measures everything here. The exact host repeats itself to about a hundredth, so once is enough.
///
/// # Errors
/// If a pod fails.
pub fn all(files: usize, only_runc: bool) -> Result<Report> {
    let mut report = Report::default();
    let mut host = Host::start(Runtime::Runc, Setup::default().image(Image::Probe));
    let shared = host.directory().join("shared");
    std::fs::create_dir(&shared).with_context(|| format!("make {}", shared.display()))?;
    let runtimes = runtimes(only_runc);
    for (place, _, part) in PLACES {
        let files = (files / part).max(1);
        let mut times: Vec<Pair> = STEPS.iter().map(|_| Pair::default()).collect();
        for (&runtime, round) in runtimes.iter().zip(1..) {
            progress(&format!("{files} files and {MIB} MiB, {place}"), round, runtimes.len() as u32);
            host.runtime = runtime;
            let container = host.container(&format!("{place}-{}", runtime as usize));
            let mount = format!("--mount=type=bind,src={},dst=/bind,options=rbind:rw", shared.display());
            let container = container.flag(mount).flag("--memory-limit=268435456");
            let directory = format!("/{place}/{}", runtime as usize);
            let (files, mib) = (files.to_string(), MIB.to_string());
            let mut command = container.command(&["probe", "storage", &directory, &files, &mib]);
            let finished = caisson_e2e::Finished::of(Running::start(&mut command), long());
            ensure!(finished.code == Some(0), "{place}: {finished:?}");
            for (step, times) in STEPS.iter().zip(&mut times) {
                times.push(runtime, time(&finished.out(), step)?);
            }
            host.expect_nothing_left();
        }
        for (step, times) in STEPS.iter().zip(&times) {
            times.report(&mut report, &format!("{place}_{step}"), "ratio");
        }
    }
    host.finish();
    Ok(report)
}

fn time(output: &str, step: &str) -> Result<std::time::Duration> {
    let line = output.lines().find_map(|line| line.strip_prefix(step)?.strip_prefix(' '));
    let line = line.with_context(|| format!("no time of {step} in {output:?}"))?;
    let milliseconds: f64 = line.parse().with_context(|| format!("the time of {step} is {line:?}"))?;
    Ok(std::time::Duration::try_from_secs_f64(milliseconds / 1000.0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_found_by_its_whole_name() {
        let output = "files_400 7.5\nfiles_4 3\n";
        assert_eq!(time(output, "files_4").unwrap().as_millis(), 3);
        assert_eq!(time(output, "files_400").unwrap().as_micros(), 7500);
        assert!(time(output, "files").is_err());
        assert!(time("files_make no-number\n", "files_make").is_err());
    }
}
