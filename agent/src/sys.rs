//! The system calls that no crate wraps, but for bpf(2), which is in [`crate::cgroup::bpf`].

use std::{io, os::fd::RawFd};

use nix::sched::CloneFlags;

use crate::plan::SchedulerPlan;

/// Sends signal `number` (1 to 64, real-time signals too) to `pid`.
///
/// # Errors
/// What kill(2) says.
pub fn kill(pid: i32, number: i32) -> io::Result<()> {
    // SAFETY: kill takes two integers and touches no memory of ours.
    checked(libc::c_long::from(unsafe { libc::kill(pid, number) }))
}

/// Gives the calling process a new, empty session keyring. A kernel without keyrings has none to hide.
///
/// # Errors
/// What keyctl(2) says, except that it does not exist.
pub fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    let anonymous = std::ptr::null::<libc::c_char>();
    // SAFETY: a null name asks for an anonymous keyring; no memory of ours is read.
    match checked(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, anonymous) }) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        result => result,
    }
}

/// Forks, with the child in new namespaces (CLONE_NEW*). Returns the child's pid to the parent and None to the child.
///
/// # Safety
/// The process must have one thread only: another may hold a lock that nobody would ever release in the child.
///
/// # Errors
/// What clone(2) says.
pub unsafe fn fork_into(namespaces: CloneFlags) -> io::Result<Option<i32>> {
    let flags = libc::c_long::from(namespaces.bits() | libc::SIGCHLD);
    // SAFETY: without CLONE_VM and with no stack of its own the child goes on with a copy of everything, as after fork;
    // no pointer is passed. The caller has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    checked(pid)?;
    Ok(i32::try_from(pid).ok().filter(|pid| *pid > 0))
}

/// `struct sched_attr` of include/uapi/linux/sched/types.h, its first version.
#[repr(C)]
struct SchedulerAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Changes how the kernel schedules process `pid`.
///
/// # Errors
/// What sched_setattr(2) says.
pub fn set_scheduler(pid: i32, plan: &SchedulerPlan) -> io::Result<()> {
    let attributes = SchedulerAttributes {
        size: size_of::<SchedulerAttributes>() as u32,
        policy: plan.policy,
        flags: plan.flags,
        nice: plan.nice,
        priority: plan.priority,
        runtime: plan.runtime,
        deadline: plan.deadline,
        period: plan.period,
    };
    // SAFETY: the kernel reads `size` bytes of `attributes`, which is as long as that.
    checked(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attributes, 0) })
}

/// Changes the IO class and priority of process `pid`.
///
/// # Errors
/// What ioprio_set(2) says.
pub fn set_io_priority(pid: i32, value: u16) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: three numbers.
    checked(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, libc::c_int::from(value)) })
}

/// Changes the execution domain of the calling process.
///
/// # Errors
/// What personality(2) says.
pub fn set_personality(domain: u32) -> io::Result<()> {
    // SAFETY: one number.
    checked(libc::c_long::from(unsafe { libc::personality(domain.into()) }))
}

/// Ends the calling process at once, without what the C library or Rust would do first.
pub fn exit_at_once(code: u8) -> ! {
    // SAFETY: it does not return, and nothing of this process is used afterwards.
    unsafe { libc::_exit(code.into()) }
}

/// Marks every descriptor from 3 up close-on-exec.
///
/// # Errors
/// What close_range(2) says.
pub fn close_all_on_exec() -> io::Result<()> {
    // SAFETY: setting a flag on descriptors neither closes any nor touches memory.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    checked(result)
}

/// Closes every descriptor but one.
///
/// # Errors
/// What close_range(2) says.
pub fn close_all_but(kept: RawFd) -> io::Result<()> {
    let kept = u32::try_from(kept).map_err(|_| io::ErrorKind::InvalidInput)?;
    let close = |first: u32, last: u32| {
        // SAFETY: it touches no memory. Whoever calls this goes on with the kept descriptor alone, in a forked child.
        checked(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })
    };
    if let Some(last) = kept.checked_sub(1) {
        close(0, last)?;
    }
    close(kept.saturating_add(1), u32::MAX)
}

/// Makes the calling process's system calls go through `filter` from now on, after exec too. `flags` are
/// SECCOMP_FILTER_FLAG_*.
///
/// # Errors
/// What seccomp(2) says: EACCES without no_new_privs and CAP_SYS_ADMIN.
pub fn filter_system_calls(filter: &mut [libc::sock_filter], flags: u32) -> io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel reads `len` instructions behind the pointer, and copies them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    checked(result)
}

/// `struct sigaction` of the kernel on x86-64 (arch/x86/include/uapi/asm/signal.h), not the C library's.
#[repr(C)]
struct SignalAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Sets every signal back to its default action: what is ignored stays ignored through exec, and Rust's
/// runtime ignores SIGPIPE. Past the C library, which would keep two signals to itself.
pub fn default_signals() {
    let default = SignalAction { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    let nothing = std::ptr::null_mut::<SignalAction>();
    for number in 1..=64 {
        // SAFETY: the kernel only reads `default`, whose mask is as long as passed; the default action runs no code of
        // ours. SIGKILL and SIGSTOP are refused, and have it anyway.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, number, &raw const default, nothing, size_of::<u64>()) };
    }
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
