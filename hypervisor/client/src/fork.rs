//! Starts a program in a cgroup. The standard library cannot: its child could only move itself there, and a move of a
//! process waits for a grace period of the kernel's (7 to 20 ms, measured), while one that is born there
//! (CLONE_INTO_CGROUP, Linux 5.7) waits for nothing.
//!
//! Between fork and exec the child makes system calls and nothing else: all that it needs was built before.

use std::{
    ffi::{CString, OsStr},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
};

use nix::{
    fcntl::OFlag,
    libc,
    unistd::{Pid, pipe2},
};

use crate::process::open_pidfd;

/// include/uapi/linux/sched.h
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

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
    /// Where it is born: a cgroup's directory.
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
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

impl Program<'_> {
    /// Starts it with the environment of this process. It gets SIGKILL when the calling thread ends. `floor` is a
    /// number above all that the program gets.
    ///
    /// # Errors
    /// What kept it from being made or from entering the program.
    pub(crate) fn start(&self, floor: RawFd) -> io::Result<Pid> {
        let path = CString::new(self.path.as_os_str().as_bytes())?;
        let mut arguments = vec![path.clone()];
        for argument in &self.arguments {
            arguments.push(CString::new(argument.as_bytes())?);
        }
        let variable = |(mut name, value): (std::ffi::OsString, std::ffi::OsString)| {
            name.push("=");
            name.push(value);
            CString::new(name.into_vec())
        };
        let environment = std::env::vars_os().map(variable).collect::<Result<Vec<_>, _>>()?;
        let (arguments, environment) = (pointers(&arguments), pointers(&environment));
        let (told, end) = pipe2(OFlag::O_CLOEXEC)?;
        // Out of the way of what the program gets.
        let tells = duplicate(end.as_fd(), floor)?;
        drop(end);
        // In a pid namespace of its own the child does not see whether its parent has changed.
        let parent = open_pidfd(Pid::this())?;
        let into_cgroup = if self.cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 };
        let new_pids = if self.own == Own::Pids { libc::CLONE_NEWPID as u64 } else { 0 };
        let args = CloneArgs {
            flags: into_cgroup | new_pids,
            exit_signal: libc::SIGCHLD as u64,
            cgroup: self.cgroup.map_or(0, |cgroup| cgroup.as_raw_fd() as u64),
            ..CloneArgs::default()
        };
        // SAFETY: no memory is shared and no stack is given, so this is a fork: both sides go on here, each with memory
        // of its own. The child then only makes system calls (below) on what was built above, and never returns from
        // this function.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
        match pid {
            0 => {
                let enter = || -> i32 {
                    // SAFETY: system calls on plain numbers, and on C strings and null-terminated arrays of them that
                    // live in this process's copy of the parent's memory.
                    unsafe {
                        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
                        // The parent may have died before the line above took effect.
                        let mut ended = libc::pollfd { fd: parent.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                        if libc::poll(&raw mut ended, 1, 0) != 0 {
                            return libc::ESRCH;
                        }
                        if self.own == Own::Network && libc::unshare(libc::CLONE_NEWNET) < 0 {
                            return *libc::__errno_location();
                        }
                        for (from, to) in &self.descriptors {
                            if libc::dup2(*from, *to) < 0 {
                                return *libc::__errno_location();
                            }
                        }
                        // Rust ignores this one; programs expect it as it is by default.
                        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
                        libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr());
                        *libc::__errno_location()
                    }
                };
                let errno = enter().to_ne_bytes();
                // SAFETY: as above; the bytes outlive the call. Ends without running anything of the parent's.
                unsafe {
                    libc::write(tells.as_raw_fd(), errno.as_ptr().cast(), errno.len());
                    libc::_exit(127)
                }
            }
            -1 => Err(io::Error::last_os_error()),
            pid => {
                drop(tells);
                let pid = Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?);
                let mut errno = [0; 4];
                // Nothing comes if the program was entered: that closes the child's end.
                match std::fs::File::from(told).read_exact(&mut errno) {
                    Err(_) => Ok(pid),
                    Ok(()) => {
                        let _ = nix::sys::wait::waitpid(pid, None);
                        Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
                    }
                }
            }
        }
    }
}

/// A copy of a descriptor with a number of at least `floor`.
pub(crate) fn duplicate(descriptor: BorrowedFd<'_>, floor: RawFd) -> io::Result<OwnedFd> {
    let copy = nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(floor))?;
    // SAFETY: fcntl has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
