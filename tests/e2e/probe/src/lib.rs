//! What the test program reports of the container that it runs in: the words between it and the tests.
//!
//! Everything is what the kernel says to a process inside, in plain values; whether it is what the specification asked
//! for is the test's to judge.

pub mod names;
pub mod speed;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// The answer of `probe report`, one JSON document on standard output.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Of the program itself.
    pub process: Process,
    /// Capability names in each of its five sets.
    pub capabilities: Capabilities,
    /// Host name and domain name.
    pub hostname: String,
    /// NIS domain name.
    pub domainname: String,
    /// Kind of namespace (`pid`, `mnt`, ...) to its identity (`pid:[4026531836]`), from /proc/self/ns.
    pub namespaces: BTreeMap<String, String>,
    /// /proc/self/uid_map: rows of first id inside, first id outside, count.
    pub uid_map: Vec<[u64; 3]>,
    /// /proc/self/gid_map.
    pub gid_map: Vec<[u64; 3]>,
    /// /proc/self/setgroups: whether groups may be set.
    pub setgroups: String,
    /// /proc/self/cgroup as it is.
    pub cgroup: String,
    /// /proc/self/mountinfo, in its order.
    pub mounts: Vec<Mount>,
    /// Everything below /dev that is no directory, by path.
    pub devices: BTreeMap<String, Node>,
    /// The answer to each `look=PATH`, by path.
    pub looks: BTreeMap<String, Look>,
    /// The answer to each `write=PATH`, by path: opened for writing and closed, or for a directory a file made and
    /// removed.
    pub writes: BTreeMap<String, Outcome>,
    /// The answer to each `node=KIND:MAJOR:MINOR`, by that text.
    pub nodes: BTreeMap<String, Access>,
    /// The answer to each `call=NUMBER:ARGUMENT...`, by that text.
    pub calls: BTreeMap<String, Outcome>,
}

/// One process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id; 0 if that is outside of the pid namespace.
    pub parent: i32,
    /// Program and arguments.
    pub arguments: Vec<String>,
    /// `NAME=VALUE`, in order.
    pub environment: Vec<String>,
    /// Working directory.
    pub directory: String,
    /// Real, effective, saved and file system user id.
    pub uids: Vec<u32>,
    /// Real, effective, saved and file system group id.
    pub gids: Vec<u32>,
    /// Supplementary groups, in order.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
    /// `RLIMIT_...` to its soft and hard value; None is infinity.
    pub limits: BTreeMap<String, (Option<u64>, Option<u64>)>,
    /// /proc/self/oom_score_adj.
    pub oom_score_adj: i32,
    /// Policy and parameters.
    pub scheduler: Scheduler,
    /// Class (1 real time, 2 best effort, 3 idle; 0 none) and level.
    pub io_priority: (u32, u32),
    /// Processors that it may run on, as /proc/self/status lists them.
    pub processors: String,
    /// Execution domain, as personality(2) gives it.
    pub personality: u32,
    /// Whether exec gains no rights.
    pub no_new_privileges: bool,
    /// prctl(PR_GET_SECUREBITS).
    pub secure_bits: u32,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Mask of blocked signals.
    pub blocked_signals: u64,
    /// Mask of ignored signals.
    pub ignored_signals: u64,
    /// Number of each open descriptor, and what it is.
    pub descriptors: BTreeMap<u32, String>,
}

/// sched_getattr(2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduler {
    /// 0 other, 1 FIFO, 2 round robin, 3 batch, 5 idle, 6 deadline.
    pub policy: u32,
    /// Flags, as SCHED_FLAG_RESET_ON_FORK (1).
    pub flags: u64,
    /// Niceness.
    pub nice: i32,
    /// Of the real-time policies.
    pub priority: u32,
    /// Of the deadline policy, nanoseconds.
    pub runtime: u64,
    /// Likewise.
    pub deadline: u64,
    /// Likewise.
    pub period: u64,
}

/// Names as in the specification (`CAP_CHOWN`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// What exec may ever give.
    pub bounding: BTreeSet<String>,
    /// What holds now.
    pub effective: BTreeSet<String>,
    /// What passes to programs with inheritable capabilities.
    pub inheritable: BTreeSet<String>,
    /// What may be taken.
    pub permitted: BTreeSet<String>,
    /// What passes to every program.
    pub ambient: BTreeSet<String>,
}

/// A row of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Its identity.
    pub id: u64,
    /// The mount that it lies on.
    pub parent: u64,
    /// `MAJOR:MINOR` of the file system.
    pub device: String,
    /// The directory of the file system that it shows.
    pub root: String,
    /// Where.
    pub point: String,
    /// Of the mount itself (`ro`, `nosuid`, ...).
    pub options: BTreeSet<String>,
    /// `shared`, `master`, `unbindable`; none of them is private.
    pub propagation: BTreeSet<String>,
    /// The file system's type.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Of the file system (`size=64k`, ...).
    pub super_options: BTreeSet<String>,
}

/// A directory entry that is no directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `c`, `b`, `p`, `l`, `s` or `f`.
    pub kind: char,
    /// Of a device, else 0.
    pub major: u32,
    /// Likewise.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of a symbolic link, else empty.
    pub target: String,
}

/// What is found at a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Look {
    /// Not even its attributes can be had: the error's number.
    Refused(i32),
    /// A directory, and the names in it (sorted), or why they cannot be read.
    Directory {
        /// Permission bits.
        mode: u32,
        /// Owner and group.
        owner: (u32, u32),
        /// The names.
        names: Result<Vec<String>, i32>,
    },
    /// Anything else, and its first 64 KiB as text, or why it cannot be read. Of a device nothing is read; opening it is
    /// enough.
    File {
        /// Permission bits.
        mode: u32,
        /// Owner and group.
        owner: (u32, u32),
        /// The text, without the last line's end.
        text: Result<String, i32>,
    },
}

/// How a try ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It succeeded.
    Done,
    /// The error's number.
    Refused(i32),
    /// The signal that ended the process that tried.
    Killed(i32),
}

/// What happened to a device node of a test's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// mknod(2).
    pub made: Outcome,
    /// open(2) for reading; the same error as `made` if that failed.
    pub read: Outcome,
    /// open(2) for writing; likewise.
    pub write: Outcome,
}
