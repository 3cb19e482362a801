//! The outer process: starts the nested host, follows its steps, passes the command's output through.
//!
//! ```text
//!            ┌─ step … (each within its limit) ─┐
//!   start ───► booting ───────────────────────────► running ──── exit N ──► done
//!     ▲         │ fail, end of QEMU, limit         │ end of QEMU, limit
//!     └─ once ──┘                                  └──► broken: last console lines, the step that did not finish
//! ```
//! A start that fails before the command began is tried once more: an emulated host that stops for good has been seen.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::job::Job;
use crate::machine::{self, Emulator, Machine};
use crate::report::Report;
use crate::{EXIT_BROKEN, EXIT_TIMEOUT, bochs, initrd, qemu};

/// The step in which the command runs.
pub const COMMAND_STEP: &str = "command";
/// Console lines kept for a failure.
const CONSOLE_LINES: usize = 40;

/// How one start ended.
enum Outcome {
    /// The command's exit status.
    Exit(u8),
    /// The command did not finish in time.
    Timeout,
    /// The nested host failed; the command may have begun.
    Broken { began: bool, reason: String },
}

/// Runs the job in a nested host and returns the exit status for this process.
pub fn run(machine: &Machine, job: &Job, payload: &[std::path::PathBuf], limit: Duration) -> anyhow::Result<u8> {
    let (kernel, release) = machine::kernel()?;
    let mut archive = File::from(rustix::fs::memfd_create("initramfs", rustix::fs::MemfdFlags::CLOEXEC)?);
    let mut buffered = io::BufWriter::with_capacity(1 << 20, &mut archive);
    initrd::write(&mut buffered, &release, job, payload).context("making the nested host's initramfs")?;
    buffered.flush()?;
    drop(buffered);

    for attempt in 1.. {
        let (outcome, console) = once(machine, job, &kernel, &archive, limit)?;
        let (status, reason) = match outcome {
            Outcome::Exit(status) => return Ok(status),
            Outcome::Timeout => (EXIT_TIMEOUT, format!("the command did not finish within {} s", limit.as_secs())),
            Outcome::Broken { began, reason } if began || attempt == 2 => (EXIT_BROKEN, reason),
            Outcome::Broken { reason, .. } => {
                eprintln!("nested-host: {reason}; starting once more");
                continue;
            }
        };
        eprintln!("nested-host: {reason}; the console's last lines:");
        for line in console {
            eprintln!("  {line}");
        }
        return Ok(status);
    }
    unreachable!("the loop returns at its second turn")
}

fn once(
    machine: &Machine,
    job: &Job,
    kernel: &std::path::Path,
    archive: &File,
    limit: Duration,
) -> anyhow::Result<(Outcome, Vec<String>)> {
    let mut servers = Vec::new();
    let mut shares = Vec::new();
    if !job.in_ram {
        let folders = std::iter::once(("root".to_owned(), std::path::PathBuf::from("/")))
            .chain(job.rw.iter().enumerate().map(|(n, dir)| (format!("rw{n}"), dir.clone())));
        for (tag, folder) in folders {
            let (server, end) = qemu::share(&folder)?;
            servers.push(server);
            shares.push((tag, end));
        }
    }
    let (emulator, channels) = match machine.emulator {
        Emulator::Qemu => qemu::start(machine, kernel, archive, &shares)?,
        Emulator::Bochs => bochs::start(machine, kernel, archive)?,
    };
    drop(shares);

    let console = Arc::new(Mutex::new(VecDeque::new()));
    let relays = [
        relay(channels.stdout, io::stdout()),
        relay(channels.stderr, io::stderr()),
        keep_last_lines(channels.console, Arc::clone(&console)),
    ];
    let outcome = follow(&channels.report, machine.emulator.boot_limit(), limit)?;
    drop(emulator);
    drop(servers);
    for thread in relays {
        // A relay ends with its channel, and the emulator held the other ends.
        let _ = thread.join();
    }
    let lines = console.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
    Ok((outcome, lines))
}

/// Reads reports until the command has ended or a limit is passed.
fn follow(channel: &UnixStream, boot_limit: Duration, limit: Duration) -> anyhow::Result<Outcome> {
    let mut step = "the kernel's start".to_owned();
    let mut deadline = Instant::now() + boot_limit;
    let mut reader = BufReader::new(channel);
    let mut line = Vec::new();
    loop {
        let began = step == COMMAND_STEP;
        let late = || match began {
            true => Outcome::Timeout,
            false => Outcome::Broken { began, reason: format!("step '{step}' took over {} s", boot_limit.as_secs()) },
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(late());
        }
        channel.set_read_timeout(Some(left))?;
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return Ok(Outcome::Broken { began, reason: format!("the nested host died in step '{step}'") }),
            Ok(_) if line.last() != Some(&b'\n') => continue,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(late());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("reading the nested host's reports"),
        }
        let report = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        match Report::parse(&report) {
            Some(Report::Exit(status)) => return Ok(Outcome::Exit(status)),
            Some(Report::Fail(reason)) => {
                return Ok(Outcome::Broken { began, reason: format!("step '{step}': {reason}") });
            }
            Some(Report::Step(name)) => {
                deadline = Instant::now() + if name == COMMAND_STEP { limit } else { boot_limit };
                step = name;
            }
            None => {}
        }
    }
}

/// Passes bytes on as they come. When our own reader is gone, the rest is dropped so that the command can end.
fn relay(mut from: impl Read + Send + 'static, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        let mut open = true;
        while let Ok(n) = from.read(&mut buffer)
            && n > 0
        {
            open = open && to.write_all(&buffer[..n]).and_then(|()| to.flush()).is_ok();
        }
    })
}

fn keep_last_lines(from: impl Read + Send + 'static, lines: Arc<Mutex<VecDeque<String>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n') {
            let Ok(line) = line else { return };
            let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
            if lines.len() == CONSOLE_LINES {
                lines.pop_front();
            }
            lines.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT_LIMIT: Duration = Duration::from_secs(60);

    /// What the outer process makes of these reports, followed by the end of the machine.
    fn outcome(reports: &str) -> Outcome {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(reports.as_bytes()).unwrap();
        drop(theirs);
        follow(&ours, BOOT_LIMIT, Duration::from_secs(60)).unwrap()
    }

    #[test]
    fn the_commands_status_is_the_outcome() {
        assert!(matches!(outcome("step root\nstep command\nexit 42\n"), Outcome::Exit(42)));
    }

    #[test]
    fn a_machine_that_dies_says_in_which_step() {
        let Outcome::Broken { began: false, reason } = outcome("step root\n") else { panic!("not broken") };
        assert!(reason.contains("'root'"), "{reason}");
        let Outcome::Broken { began: true, .. } = outcome("step command\nexi") else { panic!("not broken") };
    }

    #[test]
    fn a_failure_is_told() {
        let Outcome::Broken { began: false, reason } = outcome("step mounts\nfail no tmpfs\n") else {
            panic!("not broken")
        };
        assert!(reason.contains("mounts") && reason.contains("no tmpfs"), "{reason}");
    }

    #[test]
    fn a_command_that_takes_too_long_is_a_timeout() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"step command\n").unwrap();
        assert!(matches!(follow(&ours, BOOT_LIMIT, Duration::from_millis(1)).unwrap(), Outcome::Timeout));
    }
}
