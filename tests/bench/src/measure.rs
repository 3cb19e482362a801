//! The measurements themselves, on the machine where this runs.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    Host, Runtime, Setup,
    environment::{bin_dir, image_dir},
    until,
    wait::STEP,
};

use crate::{
    figures::{Pair, Report},
    memory::Memory,
    progress, runtimes,
};

/// Our host programs.
pub const PROGRAMS: [&str; 3] = ["containerd-shim-caisson-v2", "caisson-vmm", "caisson-fsd"];

/// The stages of a pod's start as the shim logs them, each with the one before it: the figure is the time between.
const STAGES: [(&str, &str, &str); 7] = [
    ("stage_1_shim_to_vmm_spawned_ms", "", "vmm_spawned_us"),
    ("stage_2_vmm_spawned_to_vm_started_ms", "vmm_spawned_us", "vm_started_us"),
    ("stage_3_kernel_ms", "vm_started_us", "kernel_us"),
    ("stage_4_agent_ready_ms", "kernel_us", "agent_ready_us"),
    ("stage_5_container_created_ms", "agent_ready_us", "container_created_us"),
    ("stage_6_container_started_ms", "container_created_us", "container_started_us"),
    ("stage_7_first_output_ms", "container_started_us", "first_output_us"),
];

/// Runs everything, `runs` times each.
///
/// # Errors
/// If a pod fails.
pub fn all(runs: u32, only_runc: bool) -> Result<Report> {
    let mut report = Report::default();
    let mut host = Host::start(Runtime::Runc, Setup::default());
    let runtimes = runtimes(only_runc);
    let mut times = Pair::default();
    // One of each to warm up: programs and images come into the page cache, which no figure is about.
    for round in 0..=runs {
        progress("ctr run", round, runs);
        for runtime in runtimes {
            host.runtime = *runtime;
            let name = format!("{}-{round}", if *runtime == Runtime::Caisson { "caisson" } else { "runc" });
            let time = run_echo(&host, &name)?;
            if round > 0 {
                times.push(*runtime, time);
            }
        }
    }
    times.report(&mut report, "ctr_run", "ratio_cold");
    if !only_runc {
        stages(&mut report, &host.containerd.log(), runs as usize)?;
        host.runtime = Runtime::Caisson;
        idle(&mut report, &host, runs)?;
        sizes(&mut report)?;
    }
    crate::work::all(&mut report, &mut host, runtimes, runs)?;
    host.finish();
    Ok(report)
}

/// `ctr run --rm` of `echo`, from the program's start to its end.
fn run_echo(host: &Host, name: &str) -> Result<Duration> {
    let container = host.container(name);
    let mut command = container.command(&["echo", "hello"]);
    let begin = Instant::now();
    let output = command.output().context("run ctr")?;
    let time = begin.elapsed();
    ensure!(output.status.success() && output.stdout == b"hello\n", "{name}: {output:?}");
    // What containerd still clears away must not fall into the next run's time.
    host.expect_nothing_left();
    std::thread::sleep(Duration::from_millis(200));
    Ok(time)
}

/// The stages of the last `runs` pods.
fn stages(report: &mut Report, log: &str, runs: usize) -> Result<()> {
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("msg=\"pod timeline\"")).collect();
    ensure!(lines.len() > runs, "{} pod timelines in containerd's log, not {}", lines.len(), runs + 1);
    let lines = &lines[lines.len() - runs..];
    let field = |line: &str, name: &str| -> Option<f64> {
        line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
    };
    let between = |from: &str, to: &str| -> Vec<f64> {
        let time = |line: &&&str| {
            let from = if from.is_empty() { 0.0 } else { field(line, from)? };
            Some((field(line, to)? - from) / 1000.0)
        };
        lines.iter().filter_map(|line| time(&line)).collect()
    };
    for (name, from, to) in STAGES {
        report.add(name, &between(from, to), "ms");
    }
    report.add("vmm_spawn_to_agent_ready_ms", &between("vmm_spawned_us", "agent_ready_us"), "ms");
    report.add("shim_start_to_first_output_ms", &between("", "first_output_us"), "ms");
    Ok(())
}

/// Memory of the processes of a pod that does nothing.
fn idle(report: &mut Report, host: &Host, runs: u32) -> Result<()> {
    // As the kernel names mapped files: without symbolic links on the way.
    let real = |name: &str| image_dir().join(name).canonicalize().with_context(|| format!("find {name}"));
    let (kernel, initramfs) = (real("vmlinux")?, real("initramfs")?);
    let files: [&Path; 2] = [&kernel, &initramfs];
    let mut found: [Vec<Memory>; 3] = Default::default();
    for round in 0..runs {
        progress("memory of an idle pod", round + 1, runs);
        let pod = host.container(&format!("idle-{round}")).start_idle();
        std::thread::sleep(Duration::from_secs(1));
        for (program, found) in PROGRAMS.iter().zip(&mut found) {
            let processes = host.running(program);
            let [process] = &processes[..] else {
                anyhow::bail!("an idle pod has {} processes running {program}", processes.len());
            };
            found.push(Memory::of(process.pid, &files)?);
        }
        let id = pod.id.clone();
        ensure!(pod.end().code == Some(137), "the idle pod did not end by its signal");
        until(&format!("the end of {id}"), STEP, || host.processes().is_empty().then_some(()));
    }
    for (name, found) in ["shim", "vmm", "fsd"].iter().zip(&found) {
        let values = |of: fn(&Memory) -> f64| found.iter().map(of).collect::<Vec<_>>();
        report.add(&format!("{name}_rss_mib"), &values(|memory| memory.rss), "MiB");
        report.add(&format!("{name}_pss_mib"), &values(|memory| memory.pss - memory.guest_pss), "MiB");
        if *name == "vmm" {
            report.add("guest_pss_mib", &values(|memory| memory.guest_pss), "MiB");
        }
    }
    Ok(())
}

/// Sizes of what is installed.
fn sizes(report: &mut Report) -> Result<()> {
    let mut add = |name: &str, path: &Path| -> Result<()> {
        let length = path.metadata().with_context(|| format!("the size of {}", path.display()))?.len();
        report.add(name, &[length as f64 / (1024.0 * 1024.0)], "MiB");
        Ok(())
    };
    add("kernel_mib", &image_dir().join("vmlinux"))?;
    add("initramfs_mib", &image_dir().join("initramfs"))?;
    add("shim_binary_mib", &bin_dir().join(PROGRAMS[0]))?;
    add("vmm_binary_mib", &bin_dir().join(PROGRAMS[1]))?;
    add("fsd_binary_mib", &bin_dir().join(PROGRAMS[2]))
}
