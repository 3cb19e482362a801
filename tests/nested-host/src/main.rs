//! `nested-host`: runs a command on a Linux host that has a real, unrestricted KVM, on a machine that has none.
//!
//! ```text
//! this machine                              the nested host
//!   nested-host ── spawns ──► qemu (TCG) ═══  Debian's cloud kernel, kvm_amd on an emulated AMD processor
//!     │                         │               │
//!     │ ◄── step/exit lines ── virtio-serial ── init (this same binary as PID 1) ── COMMAND
//!     │ ◄── stdout, stderr ─── virtio-serial ──   │
//!     └── spawns ─► virtiofsd ─ virtio-fs ─────── / read-only, under a tmpfs overlay; --rw folders as they are
//! ```
//!
//! QEMU interprets every instruction, so the processor it shows can have what the real one hides: SVM. With `--intel` Bochs
//! takes its place, for VMX (see [`bochs`]). Where the local KVM is good (see [`probe`]), `--direct-if-possible` runs the
//! command on this machine instead.
//!
//! The same binary is the outer tool and the inner init, so it must be linked statically: build it for
//! `x86_64-unknown-linux-musl`.

mod bochs;
mod command;
mod direct;
mod frames;
mod host;
mod init;
mod initrd;
mod iso;
mod job;
mod machine;
mod mended;
mod modules;
mod probe;
mod qemu;
mod ram;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;

use machine::{Emulator, Machine};

/// Exit status when the command did not finish in time, as timeout(1) has it.
const EXIT_TIMEOUT: u8 = 124;
/// Exit status when the nested host itself failed, before or while the command ran.
const EXIT_BROKEN: u8 = 125;

/// Run a command on a host with a real KVM, emulated where this machine has none.
///
/// The exit status is the command's own; 124 says that it did not finish in time, 125 that the nested host failed.
/// The command sees this machine's files (read-only, under a layer in memory: what it writes is lost, except below
/// --rw folders); /tmp, /run and /dev/shm are empty tmpfs but for its working directory, and containerd's root must lie
/// on one of them. Its working directory is the caller's; its environment is PATH, HOME, TERM, the caller's CAISSON_*,
/// RUST_* and NEXTEST_* variables, and --env.
#[derive(Parser)]
#[command(name = "nested-host", verbatim_doc_comment)]
struct Args {
    /// Say whether this machine's own KVM runs guests properly (exit status 0) or not (1), and why
    #[arg(long, conflicts_with = "command")]
    probe: bool,

    /// The guest of --probe, in a process that can be ended when it hangs
    #[arg(long, hide = true)]
    probe_guest: bool,

    /// Run the command on this machine where its own KVM is good
    #[arg(long, conflicts_with_all = ["exact", "in_ram"])]
    direct_if_possible: bool,

    /// Virtual time is the number of executed instructions (1 ns each): benchmarks repeat. Reading this machine's files
    /// distorts it: see --in-ram
    #[arg(long)]
    exact: bool,

    /// The nested host's root holds the programs and files named by --prog and --file, in memory, and nothing else
    #[arg(long)]
    in_ram: bool,

    /// Emulate an Intel processor with VMX, in Bochs, in place of an AMD processor in QEMU. Needs --in-ram
    #[arg(long, requires = "in_ram", conflicts_with_all = ["exact", "direct_if_possible"])]
    intel: bool,

    /// The processor: a model of `bochs --help cpu` with --intel, else an argument of QEMU's -cpu with svm
    #[arg(long, value_name = "MODEL", conflicts_with = "direct_if_possible")]
    cpu: Option<String>,

    /// A parameter of the nested host's module kvm_amd, or with --intel kvm_intel: npt=0, ept=0
    #[arg(long, value_name = "NAME=VALUE", conflicts_with = "direct_if_possible")]
    kvm: Vec<String>,

    /// With --in-ram: a program (name or path) to take along, with the libraries it needs. bash, coreutils, mount and
    /// the like come along in any case
    #[arg(long, value_name = "NAME", requires = "in_ram")]
    prog: Vec<String>,

    /// With --in-ram: a file or folder to take along, at its own path
    #[arg(long, value_name = "PATH", requires = "in_ram")]
    file: Vec<PathBuf>,

    /// A folder that the command may write; it is shared as it is
    #[arg(long, value_name = "DIR", conflicts_with = "in_ram")]
    rw: Vec<PathBuf>,

    /// Memory of the nested host; without this 4096, or 2048 with --intel
    #[arg(long, value_name = "MiB")]
    mem: Option<u32>,

    /// Seconds of this machine's time that the command may take
    #[arg(long, value_name = "S", default_value_t = 600)]
    timeout: u64,

    /// A variable for the command, or one of the caller's to pass on
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,

    /// The command and its arguments
    #[arg(last = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    match run(Args::parse()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("nested-host: {error:#}");
            ExitCode::from(EXIT_BROKEN)
        }
    }
}

fn run(args: Args) -> anyhow::Result<u8> {
    if args.probe_guest {
        probe::guest()?;
        return Ok(0);
    }
    if args.probe {
        return Ok(match probe::probe() {
            Ok(()) => {
                println!("this machine's KVM runs guests");
                0
            }
            Err(reason) => {
                println!("this machine's KVM cannot be used: {reason}");
                1
            }
        });
    }
    if args.command.is_empty() {
        bail!("no command: nested-host [OPTIONS] -- COMMAND [ARG]...");
    }
    let emulator = if args.intel { Emulator::Bochs } else { Emulator::Qemu };
    let job = job::Job {
        command: args.command,
        env: job::environment(&args.env)?,
        cwd: std::env::current_dir().context("the current directory")?,
        rw: args
            .rw
            .iter()
            .map(|dir| dir.canonicalize().with_context(|| format!("--rw {}", dir.display())))
            .collect::<Result<_, _>>()?,
        in_ram: args.in_ram,
        emulator,
        kvm: args.kvm,
    };
    let limit = Duration::from_secs(args.timeout);
    if args.direct_if_possible {
        match probe::probe() {
            Ok(()) => return direct::run(&job, limit),
            Err(reason) => eprintln!("nested-host: this machine's KVM cannot be used ({reason}): emulating a host"),
        }
    }
    let payload = if args.in_ram { ram::collect(&args.prog, &args.file)? } else { Vec::new() };
    let mem_mib = args.mem.unwrap_or(if args.intel { 2048 } else { 4096 });
    let machine = Machine { emulator, cpu: args.cpu, exact: args.exact, mem_mib };
    host::run(&machine, &job, &payload, limit)
}
