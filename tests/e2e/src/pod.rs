//! Containers through `ctr`: run to their end, or in the background with their streams at hand.

use std::{fmt, process::Command, time::Duration};

use crate::{
    host::Host,
    process::{Capture, Running},
    shim::Shim,
    wait::{STEP, long},
};

/// What a program left when it ended.
#[derive(Clone, PartialEq, Eq)]
pub struct Finished {
    /// Exit code; None if `ctr` itself was killed.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Waits for `running` and both its streams.
    pub fn of(mut running: Running, limit: Duration) -> Self {
        let code = running.wait(limit).code();
        let stdout = running.stdout.wait_for_end("standard output", limit);
        let stderr = running.stderr.wait_for_end("standard error", limit);
        Self { code, stdout, stderr }
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Requires exit code 0 and gives standard output as text.
    #[track_caller]
    pub fn succeeded(&self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out()
    }
}

impl fmt::Debug for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |bytes: &[u8]| {
            let end = bytes.len().min(4000);
            format!("{:?}{}", String::from_utf8_lossy(&bytes[..end]), if end < bytes.len() { "..." } else { "" })
        };
        write!(f, "exit code {:?}, stdout {}, stderr {}", self.code, text(&self.stdout), text(&self.stderr))
    }
}

/// A container that is yet to be run.
pub struct Container<'a> {
    host: &'a Host,
    /// Its id in containerd.
    pub id: String,
    flags: Vec<String>,
}

impl<'a> Container<'a> {
    pub(crate) fn new(host: &'a Host, id: String) -> Self {
        Self { host, id, flags: Vec::new() }
    }

    /// A flag of `ctr run`.
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// The `ctr run --rm` that runs it with `arguments`.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.host.ctr(["run", "--rm", "--runtime", self.host.runtime.name()]);
        command.args(["--snapshotter", self.host.snapshotter()]).args(&self.flags);
        command.arg(self.host.image_name()).arg(&self.id).args(arguments);
        command
    }

    /// Runs it to its end, without input.
    pub fn run(&self, arguments: &[&str]) -> Finished {
        let mut running = Running::start(&mut self.command(arguments));
        running.close_stdin();
        Finished::of(running, long())
    }

    /// Runs `sh -c script` to its end, without input.
    pub fn sh(&self, script: &str) -> Finished {
        self.run(&["sh", "-c", script])
    }

    /// Starts it in the background.
    pub fn start(self, arguments: &[&str]) -> Pod<'a> {
        let running = Running::start(&mut self.command(arguments));
        Pod { host: self.host, id: self.id, running }
    }

    /// Starts `sh -c script` in the background and waits until it has written the line `ready`.
    pub fn start_ready(self, script: &str) -> Pod<'a> {
        let pod = self.start(&["sh", "-c", script]);
        pod.wait_for("ready\n");
        pod
    }

    /// Starts it and waits until it runs; it does nothing until it is killed or its input ends.
    pub fn start_idle(self) -> Pod<'a> {
        self.start_ready("echo ready; cat")
    }
}

/// A container in the background.
pub struct Pod<'a> {
    host: &'a Host,
    /// Its id in containerd.
    pub id: String,
    /// The `ctr run` that runs it.
    pub running: Running,
}

impl Pod<'_> {
    /// Waits until its standard output holds `text`. Ends with what it wrote instead if it ends first.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.stdout().wait_for(
            &format!("{text:?} from {} ({})", self.id, Lossy(&self.running.stderr)),
            STEP,
            |output| output.contains(text).then_some(()),
        );
    }

    /// Its standard output so far.
    pub fn stdout(&self) -> &Capture {
        &self.running.stdout
    }

    /// `ctr task exec` of `arguments`, under the name `name`.
    pub fn exec_command(&self, name: &str, flags: &[&str], arguments: &[&str]) -> Command {
        let mut command = self.host.ctr(["task", "exec", "--exec-id", name]);
        command.args(flags).arg(&self.id).args(arguments);
        command
    }

    /// Runs a second program in it to its end, without input.
    pub fn exec(&self, name: &str, arguments: &[&str]) -> Finished {
        let mut running = Running::start(&mut self.exec_command(name, &[], arguments));
        running.close_stdin();
        Finished::of(running, STEP)
    }

    /// Starts a second program in it.
    pub fn exec_start(&self, name: &str, arguments: &[&str]) -> Running {
        Running::start(&mut self.exec_command(name, &[], arguments))
    }

    /// Sends a signal to its first process.
    pub fn kill(&self, signal: &str) {
        self.host.ctr_output(["task", "kill", "--signal", signal, &self.id]).succeeded();
    }

    /// Sends a signal to a process that [`Pod::exec_start`] started.
    pub fn kill_exec(&self, name: &str, signal: &str) {
        self.host.ctr_output(["task", "kill", "--signal", signal, "--exec-id", name, &self.id]).succeeded();
    }

    /// Waits for its end.
    pub fn finish(self) -> Finished {
        Finished::of(self.running, long())
    }

    /// Kills it and waits for its end.
    pub fn end(self) -> Finished {
        self.kill("SIGKILL");
        self.finish()
    }

    /// The shim that runs it.
    pub fn shim(&self) -> Shim {
        Shim::connect(&self.host.bundle(&self.id))
    }
}

struct Lossy<'a>(&'a Capture);

impl fmt::Display for Lossy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0.so_far()))
    }
}
