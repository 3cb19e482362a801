//! The ways into an x86-64 kernel, and what number a system call has on each.
//!
//! The numbers are those of the crate `syscalls`, made from the kernel's own tables. x32 (64-bit registers, 32-bit
//! pointers) has the numbers of x86-64 with one bit set, but for a few calls whose structures differ.

use std::str::FromStr;

use syscalls::{x86, x86_64};

/// __X32_SYSCALL_BIT of arch/x86/include/uapi/asm/unistd.h.
pub const X32_BIT: u32 = 0x4000_0000;

/// One way into the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `syscall` with 64-bit pointers.
    X86_64,
    /// `int 0x80` and `sysenter` of 32-bit programs.
    X86,
    /// `syscall` with [`X32_BIT`].
    X32,
}

/// The calls that have a number of their own on x32: arch/x86/entry/syscalls/syscall_64.tbl from 512 on, in order.
const X32_OWN: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];
/// The number of the first of them.
const X32_FIRST: u32 = 512;
/// The calls of x86-64 that x32 has not: those marked `64` in the same table, but for the ones above.
const NOT_X32: [&str; 11] = [
    "uselib",
    "_sysctl",
    "create_module",
    "get_kernel_syms",
    "query_module",
    "nfsservctl",
    "set_thread_area",
    "get_thread_area",
    "epoll_ctl_old",
    "epoll_wait_old",
    "vserver",
];

/// The calls that 32-bit programs may also reach through socketcall(2), from number 1 on: include/uapi/linux/net.h.
const SOCKETCALLS: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

/// The same through ipc(2): include/uapi/linux/ipc.h.
const IPC_CALLS: [(&str, u32); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// A call that is one of many behind one number, chosen by the first argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Multiplexed {
    /// The number of the call that all of them share.
    pub number: u32,
    /// The first argument.
    pub call: u32,
}

impl Architecture {
    /// The number of the call `name`, or None if this architecture has no such call.
    pub fn number(self, name: &str) -> Option<u32> {
        let native = || x86_64::Sysno::from_str(name).ok().and_then(|call| u32::try_from(call.id()).ok());
        match self {
            Self::X86_64 => native(),
            Self::X86 => x86::Sysno::from_str(name).ok().and_then(|call| u32::try_from(call.id()).ok()),
            Self::X32 if NOT_X32.contains(&name) => None,
            Self::X32 => {
                let own = (X32_FIRST..).zip(X32_OWN).find(|(_, own)| *own == name).map(|(number, _)| number);
                own.or_else(native).map(|number| number | X32_BIT)
            }
        }
    }

    /// The other way to the call `name`, if there is one.
    pub fn multiplexed(self, name: &str) -> Option<Multiplexed> {
        if self != Self::X86 {
            return None;
        }
        if let Some((call, _)) = (1..).zip(SOCKETCALLS).find(|(_, known)| *known == name) {
            return Some(Multiplexed { number: self.number("socketcall")?, call });
        }
        let (_, call) = IPC_CALLS.into_iter().find(|(known, _)| *known == name)?;
        Some(Multiplexed { number: self.number("ipc")?, call })
    }

    /// Arguments have 32 bits.
    pub fn is_narrow(self) -> bool {
        self == Self::X86
    }
}

/// Whether any of the architectures has a call of that name.
pub fn is_known(name: &str) -> bool {
    [Architecture::X86_64, Architecture::X86]
        .iter()
        .any(|arch| arch.number(name).is_some() || arch.multiplexed(name).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        use Architecture::{X32, X86, X86_64};
        for (arch, name, number) in [
            (X86_64, "read", Some(0)),
            (X86_64, "execve", Some(59)),
            (X86_64, "openat2", Some(437)),
            (X86_64, "socketcall", None),
            (X86, "read", Some(3)),
            (X86, "socketcall", Some(102)),
            (X86, "_llseek", Some(140)),
            (X86, "socket", Some(359)),
            (X86, "arch_prctl", Some(384)),
            (X32, "read", Some(X32_BIT)),
            (X32, "execve", Some(X32_BIT | 520)),
            (X32, "rt_sigaction", Some(X32_BIT | 512)),
            (X32, "pwritev2", Some(X32_BIT | 547)),
            (X32, "set_thread_area", None),
            (X32, "nonsense", None),
        ] {
            assert_eq!(arch.number(name), number, "{arch:?} {name}");
        }
        assert_eq!(X86.multiplexed("connect"), Some(Multiplexed { number: 102, call: 3 }));
        assert_eq!(X86.multiplexed("shmget"), Some(Multiplexed { number: 117, call: 23 }));
        assert_eq!(X86_64.multiplexed("connect"), None);
        assert!(is_known("semop") && is_known("chown32") && !is_known("nonsense"));
    }
}
