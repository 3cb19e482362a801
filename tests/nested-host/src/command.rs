//! The command in the nested host: its output leaves through the ports, its exit status is reported, orphans are reaped.
//!
//! The command writes to pipes, not to the virtio-serial ports themselves, because a port can be opened only once
//! (`echo > /dev/stderr` would fail).

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};

use crate::job::Job;

/// Runs the command, carries its output, reaps whatever it leaves behind; returns its exit status.
pub fn run(job: &Job, mut stdout: impl Write, mut stderr: impl Write) -> anyhow::Result<u8> {
    let (program, arguments) = job.command.split_first().context("the job has no command")?;
    let (out, out_in) = io::pipe()?;
    let (err, err_in) = io::pipe()?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(job.env.iter().cloned());
    command.current_dir(if job.cwd.is_dir() { &job.cwd } else { Path::new("/") });
    command.stdin(Stdio::null()).stdout(out_in).stderr(err_in);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            writeln!(stderr, "nested-host: {program}: {error}")?;
            return Ok(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    drop(command);
    pump([(out, &mut stdout), (err, &mut stderr)], child.id())
}

/// Copies each pipe to its port until the command has ended and what it had written is out. Daemons that outlive it
/// keep the pipes open, so the end of a pipe is not waited for.
fn pump(mut streams: [(io::PipeReader, &mut dyn Write); 2], command: u32) -> anyhow::Result<u8> {
    let ended = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(command.cast_signed()).context("a child's pid")?,
        rustix::process::PidfdFlags::empty(),
    )?;
    for (pipe, _) in &streams {
        rustix::io::ioctl_fionbio(pipe, true)?;
    }
    let mut status = None;
    let mut buffer = vec![0; 64 << 10];
    let mut open = [true, true];
    loop {
        let mut ready = vec![PollFd::from_borrowed_fd(ended.as_fd(), PollFlags::IN)];
        ready.extend(
            streams.iter().zip(open).filter(|(_, open)| *open).map(|((p, _), _)| PollFd::new(p, PollFlags::IN)),
        );
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        // Look for the end before reading: then nothing that the command wrote can come after the last read.
        while let Some((pid, how)) = reap()? {
            if pid == command {
                status = Some(how);
            }
        }
        for (n, (pipe, port)) in streams.iter_mut().enumerate() {
            while open[n] {
                match rustix::io::read(&*pipe, &mut buffer[..]) {
                    Ok(0) => open[n] = false,
                    Ok(length) => port.write_all(&buffer[..length])?,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(error) => return Err(error).context("reading the command's output"),
                }
            }
        }
        if let Some(how) = status {
            return Ok(how.code().unwrap_or_else(|| 128 + how.signal().unwrap_or(0)) as u8);
        }
    }
}

/// One child that has ended, ours or an orphan.
fn reap() -> anyhow::Result<Option<(u32, ExitStatus)>> {
    use rustix::process::{WaitOptions, wait};
    match wait(WaitOptions::NOHANG) {
        Ok(Some((pid, status))) => {
            Ok(Some((pid.as_raw_nonzero().get().cast_unsigned(), ExitStatus::from_raw(status.as_raw()))))
        }
        Ok(None) | Err(rustix::io::Errno::CHILD | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error).context("waiting for children"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::sync::{Mutex, PoisonError};

    /// As PID 1 does, `run` reaps every child of the process: one at a time where tests share a process.
    static CHILDREN: Mutex<()> = Mutex::new(());

    /// Runs a script as the nested host would: exit status, standard output, standard error.
    fn run_script(command: &[&str]) -> (u8, String, String) {
        let _alone = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
        let place = tempfile::tempdir().unwrap();
        let (out, err) = (place.path().join("out"), place.path().join("err"));
        let job = Job {
            command: command.iter().map(|word| (*word).into()).collect(),
            env: vec![("PATH".into(), "/usr/bin:/bin".into()), ("GREETING".into(), "hello".into())],
            cwd: "/nowhere".into(),
            rw: Vec::new(),
            in_ram: false,
            emulator: crate::machine::Emulator::Qemu,
            kvm: Vec::new(),
        };
        let status = run(&job, File::create(&out).unwrap(), File::create(&err).unwrap()).unwrap();
        (status, fs::read_to_string(out).unwrap(), fs::read_to_string(err).unwrap())
    }

    #[test]
    fn output_and_status() {
        let (status, out, err) = run_script(&["sh", "-c", "echo $GREETING; pwd; echo oops >&2; exit 42"]);
        assert_eq!((status, out.as_str(), err.as_str()), (42, "hello\n/\n", "oops\n"));
    }

    #[test]
    fn all_output_comes_before_the_end() {
        let (status, out, _) = run_script(&["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x"]);
        assert_eq!((status, out.len()), (0, 3_000_000));
    }

    #[test]
    fn a_signal_is_an_exit_status() {
        assert_eq!(run_script(&["sh", "-c", "kill -KILL $$"]).0, 137);
    }

    #[test]
    fn a_missing_program_is_named() {
        let (status, _, err) = run_script(&["no-such-program"]);
        assert_eq!(status, 127);
        assert!(err.contains("no-such-program"), "{err}");
    }

    #[test]
    fn a_daemon_that_keeps_the_pipes_open_is_not_waited_for() {
        let (status, out, _) = run_script(&["sh", "-c", "sleep 60 & echo $!"]);
        assert_eq!(status, 0);
        let daemon = rustix::process::Pid::from_raw(out.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(daemon, rustix::process::Signal::KILL).expect("the daemon still runs");
    }
}
