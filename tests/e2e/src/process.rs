//! Processes of this machine as /proc shows them, and programs run with their output captured.

use std::{
    collections::HashMap,
    fmt, fs,
    io::{Read, Write},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

/// One process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// Ended, but not yet waited for.
    pub zombie: bool,
    /// Its name (`comm`).
    pub name: String,
    /// Its arguments, joined by spaces.
    pub command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} (parent {}) {}: {}", self.pid, self.parent, self.name, self.command)
    }
}

impl Process {
    /// Reads one; None if it is gone.
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // pid (comm) state ppid: the name may hold anything, so it ends at the last parenthesis.
        let (head, tail) = stat.rsplit_once(')')?;
        let name = head.split_once('(')?.1.to_owned();
        let mut fields = tail.split_whitespace();
        let zombie = matches!(fields.next()?, "Z" | "X");
        let parent = fields.next()?.parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
        Some(Self { pid, parent, zombie, name, command })
    }

    /// The program that it runs; None if it is gone or a kernel thread.
    pub fn program(&self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.pid)).ok()
    }
}

/// Every process below `root`, zombies too.
pub fn descendants(root: i32) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<Process>> = HashMap::new();
    for entry in fs::read_dir("/proc").expect("/proc is readable").flatten() {
        if let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Process::read) {
            children.entry(process.parent).or_default().push(process);
        }
    }
    let (mut found, mut parents) = (Vec::new(), vec![root]);
    while let Some(parent) = parents.pop() {
        for process in children.remove(&parent).unwrap_or_default() {
            parents.push(process.pid);
            found.push(process);
        }
    }
    found
}

/// This process's id.
pub fn own_pid() -> i32 {
    std::process::id() as i32
}

/// Sends a signal; a process that is gone is no error.
pub fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// What a stream has brought so far, and whether it has ended.
#[derive(Clone, Default)]
pub struct Capture(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<(Vec<u8>, bool)>,
    changed: Condvar,
}

impl Capture {
    /// Reads `stream` to its end on a thread of its own.
    pub fn of(mut stream: impl Read + Send + 'static) -> Self {
        let capture = Self::default();
        let shared = capture.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                // A pseudo-terminal's end is an error (EIO), a pipe's is 0.
                let count = stream.read(&mut buffer).unwrap_or(0);
                let mut state = shared.0.state.lock().expect("no reader panics");
                state.0.extend_from_slice(&buffer[..count]);
                state.1 |= count == 0;
                shared.0.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        capture
    }

    /// Everything so far.
    pub fn so_far(&self) -> Vec<u8> {
        self.0.state.lock().expect("no reader panics").0.clone()
    }

    /// Waits until `found` sees what it looks for in the text so far.
    ///
    /// # Panics
    /// At the stream's end or after `limit`, with `what` and the text.
    pub fn wait_for<T>(&self, what: &str, limit: Duration, found: impl Fn(&str) -> Option<T>) -> T {
        let end = Instant::now() + limit;
        let mut state = self.0.state.lock().expect("no reader panics");
        loop {
            let text = String::from_utf8_lossy(&state.0);
            if let Some(value) = found(&text) {
                return value;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!state.1, "the output ended without {what}: {text:?}");
            assert!(!left.is_zero(), "waited {limit:?} in vain for {what} in {text:?}");
            state = self.0.changed.wait_timeout(state, left).expect("no reader panics").0;
        }
    }

    /// Waits for the stream's end and takes everything.
    ///
    /// # Panics
    /// After `limit`, with `what`.
    pub fn wait_for_end(&self, what: &str, limit: Duration) -> Vec<u8> {
        let end = Instant::now() + limit;
        let mut state = self.0.state.lock().expect("no reader panics");
        while !state.1 {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {limit:?} in vain for the end of {what}");
            state = self.0.changed.wait_timeout(state, left).expect("no reader panics").0;
        }
        std::mem::take(&mut state.0)
    }
}

/// A program that runs in the background, killed when dropped.
pub struct Running {
    /// How it was called, for messages.
    pub call: String,
    /// Its id.
    pub pid: i32,
    /// Its standard input until [`Running::close_stdin`].
    pub stdin: Option<std::process::ChildStdin>,
    /// Its standard output.
    pub stdout: Capture,
    /// Its standard error.
    pub stderr: Capture,
    exit: mpsc::Receiver<ExitStatus>,
    status: Option<ExitStatus>,
}

impl Running {
    /// Starts `command` with pipes.
    pub fn start(command: &mut Command) -> Self {
        Self::start_with(command, Stdio::piped())
    }

    /// Starts `command` with pipes for its output and this input.
    pub fn start_with(command: &mut Command, input: Stdio) -> Self {
        let call = format!("{command:?}").replace('"', "");
        let mut child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {call}: {error}"));
        let stdout = Capture::of(child.stdout.take().expect("it is a pipe"));
        let stderr = Capture::of(child.stderr.take().expect("it is a pipe"));
        let stdin = child.stdin.take();
        Self::supervise(call, child, stdin, stdout, stderr)
    }

    /// Takes a started child whose output goes elsewhere (a terminal).
    pub fn supervise(
        call: String,
        mut child: Child,
        stdin: Option<std::process::ChildStdin>,
        stdout: Capture,
        stderr: Capture,
    ) -> Self {
        let pid = child.id() as i32;
        let (tell, exit) = mpsc::channel();
        thread::spawn(move || {
            if let Ok(status) = child.wait() {
                let _ = tell.send(status);
            }
        });
        Self { call, pid, stdin, stdout, stderr, exit, status: None }
    }

    /// Writes to its standard input.
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("standard input is still open");
        stdin.write_all(bytes).unwrap_or_else(|error| panic!("{} does not take its input: {error}", self.call));
        stdin.flush().expect("a pipe needs no flush");
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// After `limit`, with what it has written.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        if let Some(status) = self.status {
            return status;
        }
        match self.exit.recv_timeout(limit) {
            Ok(status) => *self.status.insert(status),
            Err(_) => panic!(
                "waited {limit:?} in vain for the end of {}\nstdout: {}\nstderr: {}",
                self.call,
                String::from_utf8_lossy(&self.stdout.so_far()),
                String::from_utf8_lossy(&self.stderr.so_far())
            ),
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.status = self.status.or_else(|| self.exit.try_recv().ok());
        self.status.is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            signal(self.pid, rustix::process::Signal::KILL);
        }
    }
}
