//! What the seccomp filter kills for, call by call, in a process that has nothing else of the jail. That the server's own
//! calls pass is what all other tests here see, which run under it.

use std::{
    io::{PipeReader, Read},
    os::{fd::AsRawFd, unix::process::ExitStatusExt},
    process::ExitStatus,
};

use caisson_fsd::jail::filter::{Violation, program, report_violations};

type Call = (libc::c_long, [u64; 4]);

/// A child makes the call under the filter; how it ended, and what it wrote to standard error.
fn make(violation: Violation, (number, arguments): Call) -> (ExitStatus, String) {
    let program = program(violation).unwrap();
    let (mut read, write): (PipeReader, _) = std::io::pipe().unwrap();
    // SAFETY: the child makes system calls only, and never returns.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork");
    if pid == 0 {
        // SAFETY: as above. The calls get numbers, or addresses that the kernel refuses.
        unsafe {
            libc::dup2(write.as_raw_fd(), 2);
            if violation == Violation::Report {
                let _ = report_violations();
            }
            if seccompiler::apply_filter(&program).is_err() {
                libc::_exit(9);
            }
            libc::syscall(number, arguments[0], arguments[1], arguments[2], arguments[3], -1i64, 0);
            libc::_exit(0);
        }
    }
    drop(write);
    let mut said = String::new();
    read.read_to_string(&mut said).unwrap();
    let mut status = 0;
    // SAFETY: `status` outlives the call, and the child is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    (ExitStatus::from_raw(status), said)
}

const WRITABLE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const ANONYMOUS: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const NONE: [u64; 4] = [0; 4];
/// Of include/uapi/asm-generic/ioctls.h: musl and glibc have them in different types.
const TIOCSTI: u64 = 0x5412;
const FIONREAD: u64 = 0x541b;

#[test]
fn a_forbidden_call_kills() {
    let forbidden: &[Call] = &[
        // Other programs, threads and processes.
        (libc::SYS_execve, NONE),
        (libc::SYS_execveat, NONE),
        (libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0, 0, 0]),
        (libc::SYS_clone, [(libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64, 0, 0, 0]),
        (libc::SYS_clone3, NONE),
        (libc::SYS_fork, NONE),
        (libc::SYS_vfork, NONE),
        (libc::SYS_kill, [1, 0, 0, 0]),
        (libc::SYS_tgkill, [1, 1, libc::SIGKILL as u64, 0]),
        (libc::SYS_tkill, [1, libc::SIGKILL as u64, 0, 0]),
        (libc::SYS_pidfd_open, NONE),
        (libc::SYS_pidfd_send_signal, NONE),
        (libc::SYS_pidfd_getfd, NONE),
        (libc::SYS_ptrace, NONE),
        (libc::SYS_process_vm_readv, NONE),
        (libc::SYS_process_vm_writev, NONE),
        // Sockets.
        (libc::SYS_socket, [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0, 0]),
        (libc::SYS_socket, [libc::AF_VSOCK as u64, libc::SOCK_STREAM as u64, 0, 0]),
        (libc::SYS_socketpair, NONE),
        (libc::SYS_connect, NONE),
        (libc::SYS_bind, NONE),
        (libc::SYS_accept4, NONE),
        (libc::SYS_sendmsg, NONE),
        (libc::SYS_recvmsg, NONE),
        // Namespaces, mounts and files by other ways.
        (libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0]),
        (libc::SYS_setns, NONE),
        (libc::SYS_mount, NONE),
        (libc::SYS_open_tree, NONE),
        (libc::SYS_move_mount, NONE),
        (libc::SYS_fsopen, NONE),
        (libc::SYS_mount_setattr, NONE),
        (libc::SYS_umount2, NONE),
        (libc::SYS_pivot_root, NONE),
        (libc::SYS_chroot, NONE),
        (libc::SYS_chdir, NONE),
        (libc::SYS_fchdir, NONE),
        (libc::SYS_name_to_handle_at, NONE),
        (libc::SYS_open_by_handle_at, NONE),
        (libc::SYS_memfd_create, NONE),
        // Memory with code in it, and of files.
        (libc::SYS_mmap, [0, 4096, WRITABLE | libc::PROT_EXEC as u64, ANONYMOUS]),
        (libc::SYS_mmap, [0, 4096, WRITABLE, libc::MAP_PRIVATE as u64]),
        (libc::SYS_mprotect, [0, 4096, libc::PROT_EXEC as u64, 0]),
        (libc::SYS_pkey_mprotect, NONE),
        (libc::SYS_remap_file_pages, NONE),
        (libc::SYS_personality, NONE),
        // Commands.
        (libc::SYS_ioctl, [0, TIOCSTI, 0, 0]),
        (libc::SYS_ioctl, [0, FIONREAD, 0, 0]),
        (libc::SYS_fcntl, [0, libc::F_SETOWN as u64, 0, 0]),
        (libc::SYS_fcntl, [0, libc::F_SETFL as u64, 0, 0]),
        (libc::SYS_fcntl, [0, libc::F_SETLEASE as u64, 0, 0]),
        (libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0]),
        (libc::SYS_rt_sigaction, [libc::SIGSYS as u64, 0, 0, 8]),
        (libc::SYS_setuid, NONE),
        (libc::SYS_setgroups, NONE),
        (libc::SYS_setrlimit, NONE),
        (libc::SYS_prlimit64, NONE),
        // What most holes of kernels were in.
        (libc::SYS_io_uring_setup, NONE),
        (libc::SYS_io_uring_enter, NONE),
        (libc::SYS_bpf, NONE),
        (libc::SYS_userfaultfd, NONE),
        (libc::SYS_perf_event_open, NONE),
        (libc::SYS_keyctl, NONE),
        (libc::SYS_add_key, NONE),
        (libc::SYS_seccomp, NONE),
        (libc::SYS_splice, NONE),
        (libc::SYS_vmsplice, NONE),
        // Numbers of x32, and of nothing.
        (0x4000_0000 + libc::SYS_write, NONE),
        (0x4000_0000 + 520, NONE),
        (9999, NONE),
    ];
    for call in forbidden {
        let (status, said) = make(Violation::Kill, *call);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{call:?}: {status}, {said}");
    }
}

#[test]
fn a_debug_build_says_which_call_it_was() {
    for (call, number) in [((libc::SYS_socket, NONE), "00041"), ((libc::SYS_io_uring_setup, NONE), "00425")] {
        let (status, said) = make(Violation::Report, call);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{status}");
        assert!(said.contains(&format!("forbidden system call\" component=fsd number={number}\n")), "{said}");
    }
}

#[test]
fn what_both_c_libraries_ask_for_is_allowed() {
    let allowed: &[Call] = &[
        (libc::SYS_mmap, [0, 4096, WRITABLE, ANONYMOUS]),
        (libc::SYS_mmap, [0, 4096, libc::PROT_NONE as u64, ANONYMOUS | libc::MAP_NORESERVE as u64]),
        (libc::SYS_mprotect, [0, 4096, WRITABLE, 0]),
        (libc::SYS_munmap, [1, 0, 0, 0]),
        (libc::SYS_mremap, NONE),
        (libc::SYS_madvise, [0, 0, libc::MADV_FREE as u64, 0]),
        (libc::SYS_brk, NONE),
        (libc::SYS_futex, [0, 1, 0, 0]),
        (libc::SYS_rt_sigprocmask, [9, 0, 0, 8]),
        (libc::SYS_rt_sigaction, [libc::SIGABRT as u64, 0, 0, 8]),
        (libc::SYS_tgkill, [u64::MAX, u64::MAX, libc::SIGABRT as u64, 0]),
        (libc::SYS_tkill, [u64::MAX, libc::SIGABRT as u64, 0, 0]),
        (libc::SYS_fcntl, [2, libc::F_OFD_GETLK as u64, 0, 0]),
        (libc::SYS_fcntl, [2, libc::F_DUPFD_CLOEXEC as u64, 0, 0]),
        (libc::SYS_fcntl, [2, libc::F_SETFD as u64, 0, 0]),
        (libc::SYS_ioctl, [2, 0x8008_6601, 0, 0]),
        (libc::SYS_clock_gettime, NONE),
        (libc::SYS_getrandom, NONE),
        (libc::SYS_exit_group, NONE),
        (libc::SYS_exit, NONE),
    ];
    for call in allowed {
        let (status, said) = make(Violation::Kill, *call);
        assert_eq!(status.code(), Some(0), "{call:?}: {status}, {said}");
    }
}
