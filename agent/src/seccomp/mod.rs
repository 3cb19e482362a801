//! `linux.seccomp`: from a profile to the program that the kernel runs at each system call; pure.
//!
//! ```text
//!   JSON ──spec::seccomp──► Profile ──compile──► Filter ──(in the stage)──► seccomp(2)
//! ```
//!
//! - this file: the words, and the finished filter;
//! - [`arch`]: which number a call has, on each of the three ways into an x86-64 kernel;
//! - [`table`]: the rules of a profile, sorted by number;
//! - [`assemble`]: classic BPF, written from its end, since it only jumps forward;
//! - [`compile`]: the whole program.
//!
//! What a profile means follows runc with libseccomp, as seccomp_rule_add(3) and runc's own additions have it:
//!
//! - x86-64 is always in the filter; calls through an architecture that is not are killed;
//! - a name that an architecture does not have is skipped there;
//! - of several rules for one call an unconditional one counts alone (the first of them); otherwise, if several hold
//!   for the arguments, the strictest action does, in the kernel's own order of strictness;
//! - conditions of one rule must all hold, unless two of them look at the same argument: then each is a rule of its
//!   own;
//! - where the default is to refuse, calls that are newer than every call of the profile fail with ENOSYS, so that
//!   programs fall back to older ones (a C library that meets EPERM would give up).

pub mod arch;
mod assemble;
pub mod compile;
mod table;

use serde::{Deserialize, Serialize};

use arch::Architecture;

/// What the kernel does with a call: a SECCOMP_RET value of include/uapi/linux/seccomp.h with its data in the low 16
/// bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Action(pub u32);

impl Action {
    /// The thread dies of SIGSYS.
    pub const KILL_THREAD: Self = Self(libc::SECCOMP_RET_KILL_THREAD);
    /// The process dies of SIGSYS.
    pub const KILL_PROCESS: Self = Self(libc::SECCOMP_RET_KILL_PROCESS);
    /// The process gets SIGSYS and may handle it.
    pub const TRAP: Self = Self(libc::SECCOMP_RET_TRAP);
    /// The call goes ahead and is logged.
    pub const LOG: Self = Self(libc::SECCOMP_RET_LOG);
    /// The call goes ahead.
    pub const ALLOW: Self = Self(libc::SECCOMP_RET_ALLOW);

    /// The call fails with `errno` (the kernel takes at most 4095).
    pub const fn errno(errno: u16) -> Self {
        Self(libc::SECCOMP_RET_ERRNO | errno as u32)
    }

    /// A tracer gets `message`; without one the call fails with ENOSYS.
    pub const fn trace(message: u16) -> Self {
        Self(libc::SECCOMP_RET_TRACE | message as u32)
    }

    /// The kernel's order: the lower, the stricter.
    fn strictness(self) -> i32 {
        (self.0 & libc::SECCOMP_RET_ACTION_FULL).cast_signed()
    }

    /// Calls go ahead, or somebody else decides. An unknown call needs no answer of its own.
    fn is_lenient(self) -> bool {
        let action = Self(self.0 & libc::SECCOMP_RET_ACTION_FULL);
        [Self::ALLOW, Self::LOG, Self::trace(0)].contains(&action)
    }
}

/// How an argument is compared with a value, both as unsigned numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Comparison {
    /// `argument == value`
    Equal,
    /// `argument != value`
    NotEqual,
    /// `argument < value`
    Less,
    /// `argument <= value`
    LessOrEqual,
    /// `argument > value`
    Greater,
    /// `argument >= value`
    GreaterOrEqual,
    /// `argument & mask == value & mask`
    Masked {
        /// The bits that count.
        mask: u64,
    },
}

/// One condition of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Condition {
    /// The argument's place, 0 to 5.
    pub argument: u8,
    /// How it is compared.
    pub comparison: Comparison,
    /// With what.
    pub value: u64,
}

/// What happens to one system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The call's name; the same on all architectures.
    pub name: String,
    /// What the kernel does.
    pub action: Action,
    /// All of them must hold. No two look at the same argument.
    pub conditions: Vec<Condition>,
}

/// A whole profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// For every call without a rule.
    pub default: Action,
    /// The architectures that the profile lists.
    pub architectures: Vec<Architecture>,
    /// The rules in the profile's order.
    pub rules: Vec<Rule>,
}

/// `struct sock_filter` of include/uapi/linux/filter.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Instruction {
    /// BPF_* words.
    pub code: u16,
    /// How many instructions to skip if a condition holds.
    pub jt: u8,
    /// And if not.
    pub jf: u8,
    /// The operand.
    pub k: u32,
}

/// What the stage hands to seccomp(2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: u32,
    /// The program.
    pub program: Vec<Instruction>,
}

#[cfg(test)]
mod tests;
