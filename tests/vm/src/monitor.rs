//! A caisson-vmm process under test.

use std::{
    fs::File,
    io::{PipeReader, Read},
    os::fd::{AsFd, OwnedFd},
    process::ExitStatus,
};

use caisson_protos::monitor::{
    Command, Event, ExitNotice, ExitReason, MAX_PACKET, MachineStats, Reply, Request, decode, encode,
};
use caisson_vmm_client::{Child, Console, Machine, Memory, packet, process::spawn_monitor};
use rustix::event::{PollFd, PollFlags, poll};

use crate::environment::{Deadline, program};

/// A machine with nothing but a kernel.
pub fn machine(kernel: OwnedFd) -> Machine {
    Machine {
        vcpus: 1,
        memory: Memory { size: 32 << 20, file: None, private: false },
        kernel,
        initramfs: None,
        command_line: String::new(),
        console: None,
        vsock: None,
        disks: Vec::new(),
        shares: Vec::new(),
        networks: Vec::new(),
        empty_network_slots: 0,
    }
}

/// Gives the machine a console, and the end to read it from.
pub fn with_console(machine: &mut Machine) -> PipeReader {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("a pipe can be non-blocking");
    machine.console = Some(Console { output: writer.into(), early: false });
    reader
}

/// The process. Dropped, it is killed and, if a test has failed, its log is shown.
pub struct Monitor {
    process: Child,
    control: Option<OwnedFd>,
    next_id: u32,
    log: File,
}

impl Monitor {
    /// Starts one.
    pub fn spawn() -> Self {
        let log = tempfile::tempfile().expect("a temporary file");
        let (process, ours) = spawn_monitor(&program("caisson-vmm"), log.as_fd(), None).expect("caisson-vmm starts");
        Self { process, control: Some(ours), next_id: 1, log }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        let mut bytes = vec![0; 1 << 20];
        let n = std::os::unix::fs::FileExt::read_at(&self.log, &mut bytes, 0).expect("the log is a file");
        bytes.truncate(n);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sends raw bytes and descriptors.
    pub fn send_raw(&self, bytes: &[u8], descriptors: &[OwnedFd]) {
        packet::send(self.control.as_ref().expect("control socket is open"), bytes, descriptors).expect("sending");
    }

    /// Sends a command without waiting; gives its id.
    pub fn send(&mut self, request: Request, descriptors: &[OwnedFd]) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        self.send_raw(&encode(&Command { id, request }).expect("a command fits"), descriptors);
        id
    }

    /// Waits for the next packet; None at the end of the stream.
    pub fn event(&mut self) -> Option<Event> {
        let deadline = Deadline::default();
        let control = self.control.as_ref().expect("control socket is open");
        wait_readable(control, deadline, "an event of caisson-vmm");
        let mut buffer = vec![0; MAX_PACKET];
        match packet::receive(control, &mut buffer) {
            Ok((0, _)) => None,
            Ok((len, fds)) => {
                assert!(fds.is_empty(), "caisson-vmm sends no descriptors here");
                Some(decode(&buffer[..len]).expect("a sound packet"))
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("control socket: {error}"),
        }
    }

    /// Sends a command and waits for its answer.
    pub fn call(&mut self, request: Request) -> Result<Reply, String> {
        self.call_with(request, &[])
    }

    /// The same with descriptors.
    pub fn call_with(&mut self, request: Request, descriptors: &[OwnedFd]) -> Result<Reply, String> {
        let sent = self.send(request, descriptors);
        match self.event() {
            Some(Event::Answer { id, result }) if id == sent => result,
            other => panic!("expected the answer to command {sent}, got {other:?}; log:\n{}", self.log()),
        }
    }

    /// Configures the machine.
    pub fn configure(&mut self, machine: Machine) -> Result<Reply, String> {
        let (config, descriptors) = machine.into_packet().expect("few descriptors");
        self.call_with(Request::Configure(Box::new(config)), &descriptors)
    }

    /// Configures and starts the machine; both must succeed.
    pub fn start(&mut self, machine: Machine) {
        self.configure(machine).unwrap_or_else(|error| panic!("Configure: {error}"));
        self.call(Request::Start).unwrap_or_else(|error| panic!("Start: {error}"));
    }

    /// The counters.
    pub fn stats(&mut self) -> MachineStats {
        match self.call(Request::Stats) {
            Ok(Reply::Stats(stats)) => stats,
            other => panic!("expected statistics, got {other:?}"),
        }
    }

    /// Asks for the counters until `enough` says so.
    pub fn wait_for_stats(&mut self, what: &str, enough: impl Fn(&MachineStats) -> bool) {
        let deadline = Deadline::default();
        while !enough(&self.stats()) {
            deadline.left(what);
        }
    }

    /// Closes our end of the control socket.
    pub fn hang_up(&mut self) {
        self.control = None;
    }

    /// Waits for the exit notice, then for the end of the stream and of the process; checks that all three agree.
    pub fn exit_notice(self) -> ExitNotice {
        self.exit_notice_and_log().0
    }

    /// The same, with all that it has logged.
    pub fn exit_notice_and_log(mut self) -> (ExitNotice, String) {
        let notice = match self.event() {
            Some(Event::Exited(notice)) => notice,
            other => panic!("expected the exit notice, got {other:?}; log:\n{}", self.log()),
        };
        assert_eq!(self.event(), None, "nothing comes after the exit notice");
        let status = self.exit_status();
        assert_eq!(status.code(), Some(notice.reason as i32), "exit status and notice agree; log:\n{}", self.log());
        (notice, self.log())
    }

    /// The same for its reason alone.
    pub fn exit_reason(self) -> ExitReason {
        self.exit_notice().reason
    }

    /// Waits for the process to end.
    pub fn exit_status(&mut self) -> ExitStatus {
        let limit = Deadline::default().left("the end of caisson-vmm's process");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let ended = runtime.block_on(async { tokio::time::timeout(limit, self.process.wait()).await });
        ended.expect("caisson-vmm's process ends in time").expect("waiting for a child")
    }

    /// The counters of a machine that may be dead; None if there is no answer soon.
    fn last_stats(&mut self) -> Option<MachineStats> {
        let command = encode(&Command { id: self.next_id, request: Request::Stats }).ok()?;
        let control = self.control.as_ref()?;
        packet::send(control, &command, &[]).ok()?;
        let soon = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        let mut buffer = vec![0; MAX_PACKET];
        while poll(&mut [PollFd::new(control, PollFlags::IN)], Some(&soon)) == Ok(1) {
            let (len, _) = packet::receive(control, &mut buffer).ok()?;
            match decode(buffer.get(..len)?).ok()? {
                Event::Answer { result: Ok(Reply::Stats(stats)), .. } => return Some(stats),
                Event::Exited(notice) => eprintln!("the machine has ended: {notice:?}"),
                Event::Answer { .. } => {}
            }
        }
        None
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("caisson-vmm's log:\n{}", self.log());
            // Twice: whether they still move tells a slow machine from one that stands.
            for _ in 0..2 {
                eprintln!("the machine's counters: {:?}", self.last_stats());
                std::thread::sleep(std::time::Duration::from_secs(1));
            }
        }
    }
}

/// Waits until a descriptor can be read.
pub fn wait_readable(fd: &impl AsFd, deadline: Deadline, what: &str) {
    loop {
        let left = deadline.left(what);
        let timeout = rustix::event::Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: 1 };
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(1..) => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// Reads until `enough` says so, and gives all that was read.
pub fn read_until(reader: &mut PipeReader, what: &str, enough: impl Fn(&str) -> bool) -> String {
    let deadline = Deadline::default();
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    while !enough(&text) {
        wait_readable(reader, deadline, &format!("{what}; so far:\n{text}"));
        let n = reader.read(&mut buffer).expect("the console is a pipe");
        assert_ne!(n, 0, "the console ended before {what}; it said:\n{text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    text
}
