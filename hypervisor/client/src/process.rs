//! The processes beside a machine: started with their descriptors at fixed numbers, dying with their parent, and
//! watched through a pidfd, so that a recycled pid can never be taken for them.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::ExitStatus,
};

use caisson_protos::monitor::CONTROL_FD;
use nix::{libc, sys::signal::Signal, unistd::Pid};
use tokio::io::Interest;

use crate::{
    fork::{Own, Program, duplicate, reap},
    packet,
};

/// A process that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The program is not there or may not run.
    #[error("cannot run {program}: {source}")]
    Exec {
        /// Its path.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No descriptors, no memory.
    #[error("cannot prepare to run {program}: {source}")]
    Prepare {
        /// Its path.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A child process. Dropped, it is killed and reaped: within a runtime by another thread, because the end of a process
/// takes as long as the kernel needs to free its memory (100 ms for tens of GiB), elsewhere before `drop` comes back.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    reaped: Option<ExitStatus>,
}

/// Starts caisson-vmm: its process and our end of its control socket. `cgroup` as for [`Child::spawn_in`]. It gets a network
/// namespace of its own, in which nothing is: the taps come to it as descriptors, and the host's network is not for it.
///
/// # Errors
/// See [`SpawnError`].
pub fn spawn_monitor(
    program: &Path,
    log: BorrowedFd<'_>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<(Child, OwnedFd), SpawnError> {
    let (ours, theirs) =
        packet::pair().map_err(|source| SpawnError::Prepare { program: program.to_owned(), source })?;
    let descriptors = [(theirs.as_fd(), CONTROL_FD)];
    let child = Child::spawn_with::<&str>(program, &[], &descriptors, log, cgroup, Own::Network)?;
    Ok((child, ours))
}

/// Starts caisson-fsd as [`Child::spawn_in`] does, as the first process of a pid namespace of its own, which it insists on.
/// The system sends it no signal but SIGKILL and SIGSTOP unless it has a handler for it.
///
/// # Errors
/// See [`SpawnError`].
pub fn spawn_file_server<A: AsRef<OsStr>>(
    program: &Path,
    arguments: &[A],
    descriptors: &[(BorrowedFd<'_>, RawFd)],
    log: BorrowedFd<'_>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Child, SpawnError> {
    Child::spawn_with(program, arguments, descriptors, log, cgroup, Own::Pids)
}

impl Child {
    /// Starts `program` with each of `descriptors` at its number (3 or more, ascending), `log` as its standard error,
    /// and nothing else: no other descriptor, a small environment of its own, no blocked or ignored signal. It gets SIGKILL
    /// when the calling thread ends.
    ///
    /// # Errors
    /// See [`SpawnError`].
    pub fn spawn<A: AsRef<OsStr>>(
        program: &Path,
        arguments: &[A],
        descriptors: &[(BorrowedFd<'_>, RawFd)],
        log: BorrowedFd<'_>,
    ) -> Result<Self, SpawnError> {
        Self::spawn_in(program, arguments, descriptors, log, None)
    }

    /// The same in a cgroup from its first instruction on: `cgroup` is that cgroup's directory.
    ///
    /// # Errors
    /// See [`SpawnError`].
    pub fn spawn_in<A: AsRef<OsStr>>(
        program: &Path,
        arguments: &[A],
        descriptors: &[(BorrowedFd<'_>, RawFd)],
        log: BorrowedFd<'_>,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<Self, SpawnError> {
        Self::spawn_with(program, arguments, descriptors, log, cgroup, Own::Nothing)
    }

    fn spawn_with<A: AsRef<OsStr>>(
        program: &Path,
        arguments: &[A],
        descriptors: &[(BorrowedFd<'_>, RawFd)],
        log: BorrowedFd<'_>,
        cgroup: Option<BorrowedFd<'_>>,
        own: Own,
    ) -> Result<Self, SpawnError> {
        let prepare = |source| SpawnError::Prepare { program: program.to_owned(), source };
        // Copies above every target number, so that no dup2 in the child overwrites a source that is still to come.
        let floor = descriptors.iter().map(|(_, number)| number.saturating_add(1)).max().unwrap_or(3);
        let null = File::options().read(true).write(true).open("/dev/null").map_err(prepare)?;
        let standard = [(null.as_fd(), 0), (null.as_fd(), 1), (log, 2)];
        let mut copies = Vec::with_capacity(standard.len() + descriptors.len());
        for (descriptor, number) in standard.iter().chain(descriptors) {
            copies.push((duplicate(*descriptor, floor).map_err(prepare)?, *number));
        }
        let program_to_start = Program {
            path: program,
            arguments: arguments.iter().map(AsRef::as_ref).collect(),
            descriptors: copies.iter().map(|(copy, number)| (copy.as_raw_fd(), *number)).collect(),
            cgroup,
            own,
        };
        let started = program_to_start.start(floor);
        let (pid, pidfd) = started.map_err(|source| SpawnError::Exec { program: program.to_owned(), source })?;
        Ok(Self { pid, pidfd, reaped: None })
    }

    /// Takes charge of a child that was started in another way: it is watched, and killed with this value, like any other.
    ///
    /// # Errors
    /// If there is no descriptor for it. Then it is killed and reaped.
    pub fn adopt(mut child: std::process::Child) -> io::Result<Self> {
        let pid = Pid::from_raw(child.id().cast_signed());
        match open_pidfd(pid) {
            Ok(pidfd) => Ok(Self { pid, pidfd, reaped: None }),
            Err(error) => {
                // It may have ended already; what matters is that nothing of it stays.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().cast_unsigned()
    }

    /// Ends it at once; an ended process stays ended.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Sends it a signal; an ended process stays ended.
    pub fn signal(&self, signal: Signal) {
        if self.reaped.is_none() {
            // The child is not reaped, so its pid is its own. ESRCH cannot happen, EPERM does not matter: it dies with us.
            let _ = nix::sys::signal::kill(self.pid, signal);
        }
    }

    /// Waits until it has ended, and reaps it.
    ///
    /// # Errors
    /// The error of epoll or waitpid.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.reaped {
            return Ok(status);
        }
        let ended = packet::register(self.pidfd.try_clone()?, Interest::READABLE)?;
        let _ = ended.readable().await?;
        self.reap()
    }

    fn reap(&mut self) -> io::Result<ExitStatus> {
        // Without WNOHANG there is a status or an error.
        let status = reap(self.pid, 0)?.unwrap_or_default();
        self.reaped = Some(status);
        Ok(status)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.reaped.is_some() {
            return;
        }
        self.kill();
        let pid = self.pid;
        if tokio::runtime::Handle::try_current().is_err() {
            let _ = reap(pid, 0);
            return;
        }
        if let Ok(None) = reap(pid, libc::WNOHANG) {
            let wait = move || drop(reap(pid, 0));
            if std::thread::Builder::new().name("reap".into()).stack_size(64 << 10).spawn(wait).is_err() {
                // No memory for a thread: the process must not stay a zombie for that.
                let _ = reap(pid, 0);
            }
        }
    }
}

/// A descriptor that stands for the process `pid` and becomes readable when it ends.
///
/// # Errors
/// ESRCH if there is no such process.
pub fn open_pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec as always for pidfds.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        os::unix::{net::UnixStream, process::ExitStatusExt},
        time::Duration,
    };

    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn null() -> File {
        File::options().write(true).open("/dev/null").unwrap()
    }

    #[tokio::test]
    async fn a_child_has_its_descriptors_at_their_numbers_and_is_reaped() {
        let (mut three, theirs3) = UnixStream::pair().unwrap();
        let (mut four, theirs4) = UnixStream::pair().unwrap();
        let script = "read line <&3; echo \"got $line\" >&4; exit 7";
        let descriptors = [(theirs3.as_fd(), 3), (theirs4.as_fd(), 4)];
        let mut child = Child::spawn(Path::new("/bin/sh"), &["-c", script], &descriptors, null().as_fd()).unwrap();
        drop((theirs3, theirs4));
        three.write_all(b"word\n").unwrap();
        let mut text = String::new();
        four.read_to_string(&mut text).unwrap();
        assert_eq!(text, "got word\n");
        let status = timeout(LIMIT, child.wait()).await.expect("the shell ends").unwrap();
        assert_eq!(status.code(), Some(7));
        assert!(open_pidfd(child.pid).is_err(), "reaped");
    }

    #[tokio::test]
    async fn a_killed_child_says_so() {
        let mut child = Child::spawn(Path::new("/bin/sleep"), &["1000"], &[], null().as_fd()).unwrap();
        child.kill();
        let status = timeout(LIMIT, child.wait()).await.expect("it dies").unwrap();
        assert_eq!(status.signal(), Some(9));
    }

    #[tokio::test]
    async fn a_child_has_the_standard_streams_that_it_should() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let script = "read x; echo $? >&3; echo lost; echo \"log $1\" >&2; trap - PIPE; kill -PIPE $$";
        let (mut log, child_log) = UnixStream::pair().unwrap();
        let (arguments, descriptors) = (["-c", script, "name", "an argument"], [(theirs.as_fd(), 3)]);
        let mut child = Child::spawn(Path::new("/bin/sh"), &arguments, &descriptors, child_log.as_fd()).unwrap();
        drop((theirs, child_log));
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "1\n", "no input");
        let status = timeout(LIMIT, child.wait()).await.expect("it ends").unwrap();
        assert_eq!(status.signal(), Some(libc::SIGPIPE), "which Rust's own processes ignore");
        text.clear();
        log.read_to_string(&mut text).unwrap();
        assert_eq!(text, "log an argument\n");
    }

    /// What `program` writes to descriptor 4, which it gets as its only one beside the standard streams.
    fn output_of(program: &str, arguments: &[&str]) -> String {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let _child = Child::spawn(Path::new(program), arguments, &[(theirs.as_fd(), 4)], null().as_fd()).unwrap();
        drop(theirs);
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_child_gets_no_descriptor_that_somebody_left_open() {
        let null = null();
        let left_open = |number| {
            let number = nix::fcntl::fcntl(&null, nix::fcntl::FcntlArg::F_DUPFD(number)).unwrap();
            // SAFETY: fcntl has just made it, without close-on-exec.
            unsafe { OwnedFd::from_raw_fd(number) }
        };
        let left: Vec<_> = [3, 20, 100].map(left_open).into();
        let numbers: Vec<_> = left.iter().map(|fd| fd.as_raw_fd().to_string()).filter(|number| number != "4").collect();
        let script = format!("for n in {}; do [ ! -e /proc/$$/fd/$n ] || echo $n; done >&4", numbers.join(" "));
        assert_eq!(output_of("/bin/sh", &["-c", &script]), "", "of {numbers:?}");
    }

    #[test]
    fn a_child_does_not_get_the_parents_environment() {
        assert!(std::env::vars_os().count() > 2, "this test has an environment");
        let environment = output_of("/bin/sh", &["-c", "tr '\\0' '\\n' < /proc/$$/environ >&4"]);
        assert_eq!(environment, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n");
    }

    #[test]
    fn a_child_has_no_blocked_and_no_ignored_signal() {
        use nix::sys::signal::{SigHandler, SigSet, signal};
        // SAFETY: ignoring this one changes nothing for the other tests.
        unsafe { signal(Signal::SIGURG, SigHandler::SigIgn) }.unwrap();
        let mut blocked = SigSet::empty();
        blocked.add(Signal::SIGUSR2);
        blocked.add(Signal::SIGTERM);
        blocked.thread_block().unwrap();
        let status = output_of("/bin/sh", &["-c", "grep -E '^Sig(Blk|Ign)' /proc/self/status >&4"]);
        blocked.thread_unblock().unwrap();
        assert_eq!(status, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
    }

    #[test]
    fn a_dropped_child_is_gone_at_once_without_a_runtime() {
        let child = Child::spawn(Path::new("/bin/sleep"), &["1000"], &[], null().as_fd()).unwrap();
        let pid = child.pid;
        drop(child);
        assert!(open_pidfd(pid).is_err(), "reaped");
    }

    /// A debugger holds the child, so that its end takes as long as this test wants.
    #[tokio::test]
    async fn a_dropped_child_that_takes_long_to_end_does_not_hold_the_runtime() {
        let child = Child::spawn(Path::new("/bin/sleep"), &["1000"], &[], null().as_fd()).unwrap();
        let pid = child.pid;
        // A traced process stays a zombie for its tracer first: its parent cannot reap it before the tracer ends or lets go.
        let (seized, is_seized) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let tracer = std::thread::spawn(move || {
            nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()).unwrap();
            seized.send(()).unwrap();
            released.recv().unwrap();
        });
        is_seized.recv_timeout(LIMIT).unwrap();
        drop(child);
        assert!(open_pidfd(pid).is_ok(), "not reaped, and here we are");
        release.send(()).unwrap();
        tracer.join().unwrap();
        let end = std::time::Instant::now() + LIMIT;
        while open_pidfd(pid).is_ok() {
            assert!(std::time::Instant::now() < end, "reaped in the end");
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn a_monitor_has_a_network_namespace_of_its_own() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("caisson-monitor-{}", std::process::id()));
        std::fs::write(&path, "#!/bin/sh\nexec /bin/sleep 1000\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let spawned = spawn_monitor(&path, null().as_fd(), None);
        std::fs::remove_file(&path).unwrap();
        let (child, _control) = spawned.expect("these tests run as root");
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_ne!(of(&child.pid().to_string()), of("self"));
        let other = Child::spawn(Path::new("/bin/sleep"), &["1000"], &[], null().as_fd()).unwrap();
        assert_eq!(of(&other.pid().to_string()), of("self"));
    }

    #[tokio::test]
    async fn a_file_server_is_the_first_process_of_a_pid_namespace_and_dies_with_the_thread_that_started_it() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (started, log) = (theirs.try_clone().unwrap(), null());
        let starter = std::thread::spawn(move || {
            let script = "echo $$ >&3; exec sleep 1000";
            let (descriptors, program) = ([(started.as_fd(), 3)], Path::new("/bin/sh"));
            let child = spawn_file_server(program, &["-c", script], &descriptors, log.as_fd(), None);
            let child = child.expect("these tests run as root");
            let mut line = [0; 2];
            ours.read_exact(&mut line).unwrap();
            let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
            (child.pid(), line, of(&child.pid().to_string()) == of("self"), child)
        });
        drop(theirs);
        let (pid, line, same, mut child) = starter.join().unwrap();
        assert_eq!((&line, same), (b"1\n", false));
        assert!(pid > 1);
        let status = timeout(LIMIT, child.wait()).await.expect("it dies").unwrap();
        assert_eq!(status.signal(), Some(9));
    }

    #[test]
    fn what_cannot_be_run_leaves_no_process() {
        for program in ["/no/such", "/etc/passwd", "/"] {
            let refused = Child::spawn::<&str>(Path::new(program), &[], &[], null().as_fd()).unwrap_err();
            assert!(matches!(refused, SpawnError::Exec { .. }), "{refused}");
        }
        let zero = Child::spawn(Path::new("/bin/true"), &["a\0b"], &[], null().as_fd()).unwrap_err();
        assert!(zero.to_string().contains("/bin/true"), "{zero}");
        // Of this thread: other tests have children of their own.
        let children = std::fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
    }

    #[test]
    fn a_missing_program_is_named() {
        let refused = Child::spawn::<&str>(Path::new("/no/such/caisson-vmm"), &[], &[], null().as_fd()).unwrap_err();
        assert!(refused.to_string().starts_with("cannot run /no/such/caisson-vmm: "), "{refused}");
    }
}
