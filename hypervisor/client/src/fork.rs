//! Starts a program in a cgroup. The standard library cannot: its child could only move itself there, and a move of a
//! process waits for a grace period of the kernel's (7 to 20 ms, measured), while one that is created there
//! (CLONE_INTO_CGROUP, Linux 5.7) waits for nothing. The pidfd comes with the process (CLONE_PIDFD), so there is no moment at
//! which it runs and nobody holds it.
//!
//! The program inherits nothing by accident: no descriptor but those that it is given, no environment but [`ENVIRONMENT`], no
//! blocked and no ignored signal.
//!
//! Between fork and exec the child makes system calls and nothing else: all that it needs was built before.

use std::{
    ffi::{CStr, CString, OsStr},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, process::ExitStatusExt},
    },
    path::Path,
    process::ExitStatus,
};

use nix::{
    fcntl::OFlag,
    libc,
    unistd::{Pid, pipe2},
};

use crate::process::open_pidfd;

/// These are in include/uapi/linux/sched.h.
const CLONE_PIDFD: u64 = 0x1000;
/// The handlers of this process must not run in the child: they would write into pipes that both share.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Signals that the kernel knows, and bytes of a set of them (_NSIG in arch/x86/include/asm/signal.h).
const KERNEL_SIGNALS: libc::c_int = 64;
const SIGSET_SIZE: usize = 8;

/// The environment of every program. What the parent's may hold (secrets, LD_PRELOAD, proxies) is not for them.
const ENVIRONMENT: [&CStr; 1] = [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];

/// `struct clone_args`, ibidem, as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// A program to start.
pub(crate) struct Program<'a> {
    pub(crate) path: &'a Path,
    pub(crate) arguments: Vec<&'a OsStr>,
    /// What it finds at which number, 0 to 2 included. No number may be one of the descriptors that come later in the
    /// list.
    pub(crate) descriptors: Vec<(RawFd, RawFd)>,
    /// Where it is created: a cgroup's directory.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
    /// What it gets of its own.
    pub(crate) own: Own,
}

/// A namespace that a program starts in, alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    /// None: it is in those of this process.
    Nothing,
    /// A network namespace, empty but for a loopback interface that is down.
    Network,
    /// A pid namespace, whose first process it is: it sees no other process, and all that it starts end with it.
    Pids,
}

/// Pointers to strings, with the null pointer at the end that execve wants.
fn pointers<S: AsRef<CStr>>(strings: &[S]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ref().as_ptr()).chain([std::ptr::null()]).collect()
}

impl Program<'_> {
    /// Starts it; gives its pid and pidfd. It gets SIGKILL when the calling thread ends. `floor` is a number above all
    /// that the program gets.
    ///
    /// # Errors
    /// What kept it from being made or from entering the program. Then no process is left.
    pub(crate) fn start(&self, floor: RawFd) -> io::Result<(Pid, OwnedFd)> {
        let path = CString::new(self.path.as_os_str().as_bytes())?;
        let mut arguments = vec![path.clone()];
        for argument in &self.arguments {
            arguments.push(CString::new(argument.as_bytes())?);
        }
        let (arguments, environment) = (pointers(&arguments), pointers(&ENVIRONMENT));
        let (report, end) = pipe2(OFlag::O_CLOEXEC)?;
        // Out of the way of what the program gets.
        let reports = duplicate(end.as_fd(), floor)?;
        drop(end);
        // In a pid namespace of its own the child does not see whether its parent has changed.
        let parent = open_pidfd(Pid::this())?;
        let into_cgroup = if self.cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 };
        let new_pids = if self.own == Own::Pids { libc::CLONE_NEWPID as u64 } else { 0 };
        let mut pidfd: RawFd = -1;
        let args = CloneArgs {
            flags: CLONE_PIDFD | CLONE_CLEAR_SIGHAND | into_cgroup | new_pids,
            pidfd: (&raw mut pidfd) as u64,
            exit_signal: libc::SIGCHLD as u64,
            cgroup: self.cgroup.map_or(0, |cgroup| cgroup.as_raw_fd() as u64),
            ..CloneArgs::default()
        };
        // SAFETY: no memory is shared and no stack is given, so this is a fork: both sides go on here, each with memory
        // of its own. The child then only makes system calls (below) on what was built above, and never returns from
        // this function. The kernel writes the pidfd to `pidfd`, which outlives the call.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
        match pid {
            0 => {
                let errno = self.enter(parent.as_raw_fd(), &path, &arguments, &environment).to_ne_bytes();
                // SAFETY: system calls on plain numbers and on bytes that outlive them. Ends without running anything of
                // the parent's.
                unsafe {
                    libc::write(reports.as_raw_fd(), errno.as_ptr().cast(), errno.len());
                    libc::_exit(127)
                }
            }
            -1 => Err(io::Error::last_os_error()),
            pid => {
                drop(reports);
                // SAFETY: clone3 has succeeded, so this is a new descriptor that nobody else owns.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                // A pid is a C int.
                let pid = Pid::from_raw(pid as i32);
                let mut errno = [0; 4];
                // Nothing comes if the program was entered: that closes the child's end.
                match std::fs::File::from(report).read_exact(&mut errno) {
                    Err(_) => Ok((pid, pidfd)),
                    Ok(()) => {
                        reap(pid, 0)?;
                        Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
                    }
                }
            }
        }
    }

    /// Becomes the program; gives the error number if it cannot. Runs in the child: system calls only.
    fn enter(
        &self,
        parent: RawFd,
        path: &CStr,
        arguments: &[*const libc::c_char],
        environment: &[*const libc::c_char],
    ) -> i32 {
        // SAFETY: system calls on plain numbers, on zeros that live here, and on C strings and null-terminated arrays
        // of them that live in this process's copy of the parent's memory.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
            // The parent may have died before the line above took effect.
            let mut ended = libc::pollfd { fd: parent, events: libc::POLLIN, revents: 0 };
            if libc::poll(&raw mut ended, 1, 0) != 0 {
                return libc::ESRCH;
            }
            if self.own == Own::Network && libc::unshare(libc::CLONE_NEWNET) < 0 {
                return *libc::__errno_location();
            }
            // Before the program's own descriptors are put in their places, which takes the flag off them. Needs Linux 5.11;
            // before that the flag that each descriptor of this program has from the beginning must do.
            libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
            for (from, to) in &self.descriptors {
                if libc::dup2(*from, *to) < 0 {
                    return *libc::__errno_location();
                }
            }
            // Ignored signals (Rust ignores SIGPIPE) and blocked ones would stay so in the program. Straight from the kernel,
            // because the C library keeps some signals for itself: SIG_DFL, no flags and an empty mask are zeros, and so is an
            // empty set. SIGKILL and SIGSTOP are refused and need nothing.
            let (zeros, null) = ([0u64; 4], std::ptr::null::<u64>());
            for signal in 1..=KERNEL_SIGNALS {
                libc::syscall(libc::SYS_rt_sigaction, signal, zeros.as_ptr(), null, SIGSET_SIZE);
            }
            libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, zeros.as_ptr(), null, SIGSET_SIZE);
            libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr());
            *libc::__errno_location()
        }
    }
}

/// Waits for the end of our own child `pid` and reaps it; with WNOHANG in `flags`, None if it has not ended.
///
/// # Errors
/// ECHILD if somebody else has reaped it.
pub(crate) fn reap(pid: Pid, flags: libc::c_int) -> io::Result<Option<ExitStatus>> {
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        match unsafe { libc::waitpid(pid.as_raw(), &mut status, flags) } {
            0 => return Ok(None),
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
            _ => return Ok(Some(ExitStatus::from_raw(status))),
        }
    }
}

/// A copy of a descriptor with a number of at least `floor`.
pub(crate) fn duplicate(descriptor: BorrowedFd<'_>, floor: RawFd) -> io::Result<OwnedFd> {
    let copy = nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(floor))?;
    // SAFETY: fcntl has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
