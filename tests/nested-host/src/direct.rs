//! The command on this machine itself, where its KVM is good: same environment, same limit, same exit status.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::EXIT_TIMEOUT;
use crate::job::Job;

/// Runs the command in a process group of its own, which ends with the limit.
pub fn run(job: &Job, limit: Duration) -> anyhow::Result<u8> {
    let (program, arguments) = job.command.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(job.env.iter().cloned()).current_dir(&job.cwd).stdin(Stdio::null());
    let mut child = match command.process_group(0).spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("nested-host: {program}: {error}");
            return Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    let group = Pid::from_raw(child.id().cast_signed()).context("a child's pid")?;
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait()));
    match end.recv_timeout(limit) {
        Ok(status) => {
            let status = status.context("waiting for the command")?;
            Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)) as u8)
        }
        Err(_) => {
            eprintln!("nested-host: the command did not finish within {} s", limit.as_secs());
            let _ = kill_process_group(group, Signal::KILL);
            Ok(EXIT_TIMEOUT)
        }
    }
}
