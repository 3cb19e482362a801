//! `caisson-bench`: what a pod costs in time and memory, beside a plain container of runc on the same containerd.
//!
//! ```text
//! caisson-bench ──► nested-host --exact --in-ram ──► caisson-bench --inside alone    measure.rs, memory.rs, work.rs
//!      │ ▲                                                 │ one line of JSON on standard output
//!      │ └── report.json, report.svg, a table ◄────────────┤
//!      ├────► another one ───────────────────► caisson-bench --inside crowd    crowd.rs
//!      ├────► another one ───────────────────► caisson-bench --inside storage  storage.rs
//!      └────► another one ───────────────────► caisson-bench --inside network  network.rs
//! ```
//!
//! The exact nested host has one processor and a clock that counts instructions, and everything that is measured lies in
//! its memory, so the figures repeat to about a hundredth on any machine and ratios between runtimes mean something.
//! Absolute times are those of a processor of one thousand million instructions a second.
//!
//! It needs the variables of the end-to-end tests (`CAISSON_BIN_DIR`, `CAISSON_IMAGE_DIR`, `CAISSON_OCI_DIR`).

mod crowd;
mod figures;
mod measure;
mod memory;
mod network;
mod picture;
mod storage;
mod work;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    Runtime,
    environment::{bin_dir, image_dir, oci_dir},
};
use clap::{Parser, ValueEnum};

use figures::Report;

/// Measure pods against plain containers.
#[derive(Parser)]
struct Arguments {
    /// Runs of each kind, at least 7
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(7..))]
    runs: u32,

    /// The nested-host program
    #[arg(long, default_value = "nested-host")]
    nested_host: PathBuf,

    /// Seconds of this machine's time that the measurement may take
    #[arg(long, default_value_t = 3600)]
    timeout: u32,

    /// What to measure; everything, if nothing is named
    parts: Vec<Part>,

    /// Files of the storage part
    #[arg(long, default_value_t = storage::FILES)]
    files: usize,

    /// Where report.json and report.svg go
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,

    /// Measure on this very machine and print the report as one line: what a nested host runs
    #[arg(long, hide = true)]
    inside: Option<Part>,

    /// Measure runc alone
    #[arg(long, hide = true)]
    only_runc: bool,
}

/// What is measured in one nested host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// One pod at a time.
    Alone,
    /// Many pods.
    Crowd,
    /// Files of a pod.
    Storage,
    /// The network of a pod.
    Network,
}

/// Marks the report among whatever else comes out of the nested host.
const MARK: &str = "caisson-bench-report ";
/// Marks what is measured next, for who waits.
const PROGRESS: &str = "caisson-bench-progress ";

/// Says what is measured next.
fn progress(what: &str, round: u32, rounds: u32) {
    println!("{PROGRESS}{what}: {round} of {rounds}");
}

/// What is measured, in the order of each round.
fn runtimes(only_runc: bool) -> &'static [Runtime] {
    if only_runc { &[Runtime::Runc] } else { &[Runtime::Caisson, Runtime::Runc] }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(part) = arguments.inside {
        let report = match part {
            Part::Alone => measure::all(arguments.runs, arguments.only_runc)?,
            Part::Crowd => crowd::all(arguments.only_runc)?,
            Part::Storage => storage::all(arguments.files, arguments.only_runc)?,
            Part::Network => network::all(arguments.runs, arguments.only_runc)?,
        };
        println!("{MARK}{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    let mut report = Report::default();
    let parts = if arguments.parts.is_empty() { Part::value_variants() } else { &arguments.parts };
    for part in parts {
        report.0.extend(in_nested_host(&arguments, *part)?.0);
        // What there is: each part takes minutes.
        write(&arguments.out, &report)?;
    }
    print!("{}", report.table());
    println!("\nwritten to {0}/report.json and {0}/report.svg", arguments.out.display());
    Ok(())
}

fn write(directory: &Path, report: &Report) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    write("report.json", serde_json::to_string_pretty(report)? + "\n")?;
    write("report.svg", picture::draw(report))
}

fn in_nested_host(arguments: &Arguments, part: Part) -> Result<Report> {
    let own = std::env::current_exe().context("the path of this program")?;
    let mut command = Command::new(&arguments.nested_host);
    command.args(["--exact", "--in-ram", "--mem", "3072", "--timeout", &arguments.timeout.to_string()]);
    let mut programs: Vec<PathBuf> = ["containerd", "ctr", "containerd-shim-runc-v2", "runc"].map(PathBuf::from).into();
    programs.push(own.clone());
    programs.push(bin_dir().join("caisson-e2e-probe"));
    if part == Part::Network {
        programs.extend(network::programs());
    }
    let mut files = vec![oci_dir().join("busybox.tar")];
    if !arguments.only_runc {
        programs.extend(measure::PROGRAMS.map(|name| bin_dir().join(name)));
        files.extend([image_dir().join("vmlinux"), image_dir().join("initramfs")]);
    }
    for program in &programs {
        command.arg("--prog").arg(program);
    }
    for file in &files {
        command.arg("--file").arg(file);
    }
    for (name, path) in
        [("CAISSON_BIN_DIR", bin_dir()), ("CAISSON_IMAGE_DIR", image_dir()), ("CAISSON_OCI_DIR", oci_dir())]
    {
        command.env(name, absolute(&path)?);
    }
    let part = part.to_possible_value().context("a part without a name")?;
    command.arg("--").arg(&own).args(["--inside", part.get_name(), "--runs", &arguments.runs.to_string()]);
    command.args(["--files", &arguments.files.to_string()]);
    if arguments.only_runc {
        command.arg("--only-runc");
    }
    let mut host = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {}", arguments.nested_host.display()))?;
    let (mut report, mut said) = (None, String::new());
    for line in BufReader::new(host.stdout.take().context("the nested host has no output")?).split(b'\n') {
        let line = line.context("read from the nested host")?;
        let line = String::from_utf8_lossy(&line);
        match line.trim_end().strip_prefix(MARK) {
            Some(json) => report = Some(serde_json::from_str(json).context("read the report")?),
            None => said = said + &line + "\n",
        }
        if let Some(progress) = line.trim_end().strip_prefix(PROGRESS) {
            eprintln!("bench: {progress}");
        }
    }
    let status = host.wait().context("wait for the nested host")?;
    ensure!(status.success(), "the nested host ended with {status}:\n{said}");
    report.with_context(|| format!("the nested host gave no report:\n{said}"))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("the full path of {}", path.display()))
}
