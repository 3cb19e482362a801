//! The seccomp filter: the system calls that serving files takes. Any other one ends the process.
//!
//! The list holds for both C libraries that this program is built with (musl for releases, glibc for tests). What is needed
//! before the filter is there (making threads, mounting, unsharing) is not in it.
//!
//! How a violation is seen:
//! - the process is killed by SIGSYS (signal 31), which the shim reports;
//! - the kernel's log (`journalctl -k`, or /var/log/audit/audit.log where auditd runs) has a line
//!   `type=1326 … comm="caisson-fsd" … sig=31 … syscall=41 …`; `ausyscall 41` gives the call's name;
//! - a debug build writes the number to standard error itself before it dies.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter_all_threads,
};

/// What happens at a call that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The kernel kills the process.
    Kill,
    /// The process writes the call's number to standard error; then the kernel kills it.
    Report,
}

impl Violation {
    /// What this build does.
    pub const DEFAULT: Self = if cfg!(debug_assertions) { Self::Report } else { Self::Kill };
}

/// Calls that are allowed with any arguments.
const ANY: &[libc::c_long] = &[
    // The socket to the monitor, and standard error.
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Files. What they may reach is a matter of the mount namespace and the capabilities.
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    // Who a request acts as (crate::identity).
    libc::SYS_capset,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_umask,
    // Memory, beside mmap and mprotect.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads waiting for each other and ending, time, random numbers of hash maps.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    // glibc asks once how many processors there are, for the number of its heaps.
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    // Signals, beside rt_sigaction and tgkill: an end by abort(3).
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
];

/// The commands of ioctl(2) that lsattr, chattr and xfs_io use (include/uapi/linux/fs.h).
const FS_IOC_GETFLAGS: u64 = 0x8008_6601;
const FS_IOC_SETFLAGS: u64 = 0x4008_6602;
const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u64 = 0x401c_5820;

/// Calls that are allowed if an argument, which the kernel takes as 32 bits, has one of some values: the call, which argument, values.
const ONE_OF: &[(libc::c_long, u8, &[u64])] = &[
    (
        libc::SYS_fcntl,
        1,
        &[
            libc::F_DUPFD_CLOEXEC as u64,
            libc::F_OFD_GETLK as u64,
            libc::F_OFD_SETLK as u64,
            // musl marks what F_DUPFD_CLOEXEC has made once more.
            libc::F_SETFD as u64,
            // Debug builds look before they close a descriptor.
            libc::F_GETFD as u64,
        ],
    ),
    (libc::SYS_ioctl, 1, &[FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR]),
    // abort(3), and the handler of stack overflows that Rust has installed.
    (libc::SYS_rt_sigaction, 0, &[libc::SIGABRT as u64, libc::SIGBUS as u64, libc::SIGSEGV as u64]),
    (libc::SYS_tgkill, 2, &[libc::SIGABRT as u64]),
    (libc::SYS_tkill, 1, &[libc::SIGABRT as u64]),
];

/// The filter as a program for the kernel.
///
/// # Errors
/// If this processor's architecture has no filters.
pub fn program(violation: Violation) -> Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ANY.iter().map(|call| (*call, Vec::new())).collect();
    for (call, argument, values) in ONE_OF {
        let equal = |value: &u64| {
            let condition = SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
            SeccompRule::new(vec![condition])
        };
        rules.insert(*call, values.iter().map(equal).collect::<Result<_, _>>()?);
    }
    // Memory that is not of a file, and never holds code.
    let bits = |argument, mask: libc::c_int, value: libc::c_int| {
        let compare = SeccompCmpOp::MaskedEq(mask as u64);
        SeccompCondition::new(argument, SeccompCmpArgLen::Qword, compare, value as u64)
    };
    let no_code = || bits(2, libc::PROT_EXEC, 0);
    let anonymous = bits(3, libc::MAP_ANONYMOUS, libc::MAP_ANONYMOUS)?;
    rules.insert(libc::SYS_mmap, vec![SeccompRule::new(vec![no_code()?, anonymous])?]);
    rules.insert(libc::SYS_mprotect, vec![SeccompRule::new(vec![no_code()?])?]);

    let otherwise = match violation {
        Violation::Kill => SeccompAction::KillProcess,
        Violation::Report => SeccompAction::Trap,
    };
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, architecture)?;
    Ok(filter.try_into()?)
}

/// Puts the filter on all threads of the process, for good. They must have been made already: no call that makes one is in
/// the filter.
///
/// # Errors
/// What the kernel says.
pub fn install() -> Result<()> {
    let program = program(Violation::DEFAULT).context("compiling the seccomp filter")?;
    if Violation::DEFAULT == Violation::Report {
        report_violations().context("installing a handler of SIGSYS")?;
    }
    apply_filter_all_threads(&program).context("installing the seccomp filter")
}

/// Installs the handler that [`Violation::Report`] needs.
///
/// # Errors
/// The system call's.
pub fn report_violations() -> std::io::Result<()> {
    // SAFETY: zeroes are a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = report as extern "C" fn(libc::c_int, *const libc::siginfo_t, *const libc::c_void) as usize;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and makes system calls only.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The head of siginfo_t for SIGSYS (include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct Forbidden {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    architecture: libc::c_uint,
}

extern "C" fn report(_: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: for SIGSYS the kernel fills in these fields of a siginfo_t, which is larger.
    let call = unsafe { (*info.cast::<Forbidden>()).call };
    let mut line = *b"level=fatal msg=\"forbidden system call\" component=fsd number=     \n";
    let mut rest = call.unsigned_abs();
    // Digits from the last one on, without memory that a signal handler must not ask for.
    for place in line.iter_mut().rev().skip(1).take(5) {
        *place = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    // SAFETY: the bytes outlive the call. The second call is forbidden, too; while this handler runs SIGSYS is blocked,
    // and then the kernel kills.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::syscall(libc::SYS_seccomp);
    }
}
