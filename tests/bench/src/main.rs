//! `caisson-bench`: what a pod costs in time and memory, beside a plain container of runc on the same containerd.
//!
//! ```text
//! caisson-bench ──► nested-host --exact --in-ram ──► caisson-bench --inside      measures (measure.rs, memory.rs)
//!      ▲                                                    │ one line of JSON on standard output
//!      └── report.json, report.svg, a table ◄───────────────┘
//! ```
//!
//! The exact nested host has one processor and a clock that counts instructions, and everything that is measured lies in
//! its memory, so the figures repeat to about a hundredth on any machine and ratios between runtimes mean something.
//! Absolute times are those of a processor of one thousand million instructions a second.
//!
//! It needs the variables of the end-to-end tests (`CAISSON_BIN_DIR`, `CAISSON_IMAGE_DIR`, `CAISSON_OCI_DIR`).

mod figures;
mod measure;
mod memory;
mod picture;
mod work;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::environment::{bin_dir, image_dir, oci_dir};
use clap::Parser;

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

    /// Where report.json and report.svg go
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,

    /// Measure on this very machine and print the report as one line: what the nested host runs
    #[arg(long, hide = true)]
    inside: bool,

    /// Measure runc alone
    #[arg(long, hide = true)]
    only_runc: bool,
}

/// Marks the report among whatever else comes out of the nested host.
const MARK: &str = "caisson-bench-report ";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.inside {
        let report = measure::all(arguments.runs, arguments.only_runc)?;
        println!("{MARK}{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    let report = in_nested_host(&arguments)?;
    fs::create_dir_all(&arguments.out).with_context(|| format!("make {}", arguments.out.display()))?;
    let write = |name: &str, text: String| {
        let path = arguments.out.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    write("report.json", serde_json::to_string_pretty(&report)? + "\n")?;
    write("report.svg", picture::draw(&report))?;
    print!("{}", report.table());
    println!("\nwritten to {0}/report.json and {0}/report.svg", arguments.out.display());
    Ok(())
}

fn in_nested_host(arguments: &Arguments) -> Result<Report> {
    let own = std::env::current_exe().context("the path of this program")?;
    let mut command = Command::new(&arguments.nested_host);
    command.args(["--exact", "--in-ram", "--mem", "3072", "--timeout", &arguments.timeout.to_string()]);
    let mut programs: Vec<PathBuf> = ["containerd", "ctr", "containerd-shim-runc-v2", "runc"].map(PathBuf::from).into();
    programs.push(own.clone());
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
    command.arg("--").arg(&own).args(["--inside", "--runs", &arguments.runs.to_string()]);
    if arguments.only_runc {
        command.arg("--only-runc");
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("run {}", arguments.nested_host.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.trim_end().strip_prefix(MARK));
    ensure!(output.status.success() && line.is_some(), "the nested host ended with {}:\n{text}", output.status);
    serde_json::from_str(line.unwrap_or_default()).context("read the report")
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("the full path of {}", path.display()))
}
