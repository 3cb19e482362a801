//! What the agent tells a stage to do: the OCI specification after every question has been answered.
//!
//! The agent reads JSON, refuses what it cannot honour and turns the rest into these types ([`crate::spec`]); the
//! stage ([`crate::stage`]), a fresh process inside the new namespaces, carries them out without deciding anything.
//! A plan crosses from one process to the other as postcard over an inherited socket ([`crate::handshake`]).

use std::path::PathBuf;

use oci_spec::runtime::PosixRlimitType;
use serde::{Deserialize, Serialize};

use crate::seccomp::Filter;

/// The work of one stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Plan {
    /// Become a new container's init process.
    Init(Box<InitPlan>),
    /// Become one more process of a running container.
    Exec(Box<ExecPlan>),
}

/// A new container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitPlan {
    /// The shared directory that holds the root file system.
    pub share: PathBuf,
    /// The root file system below `share`; neither it nor its parents may be symbolic links.
    pub rootfs: PathBuf,
    /// The container's cgroup directory, which exists.
    pub cgroup: PathBuf,
    /// What the container looks like inside.
    pub view: View,
    /// Its first process.
    pub process: ProcessPlan,
}

/// What a container's processes see: file systems, names, kernel settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// The host name in the new UTS namespace.
    pub hostname: Option<String>,
    /// The NIS domain name in the new UTS namespace.
    pub domainname: Option<String>,
    /// Kernel settings as paths below `/proc/sys` and their values.
    pub sysctl: Vec<(PathBuf, String)>,
    /// File systems in the order of mounting.
    pub mounts: Vec<MountPlan>,
    /// Device nodes to make after mounting.
    pub devices: Vec<DevicePlan>,
    /// Paths hidden behind /dev/null or an empty directory.
    pub masked_paths: Vec<PathBuf>,
    /// Paths made read-only with everything below.
    pub readonly_paths: Vec<PathBuf>,
    /// Make the root itself read-only at the end.
    pub readonly_root: bool,
}

/// One file system to mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPlan {
    /// Its place in the specification's list, for messages.
    pub index: usize,
    /// Where, absolute, inside the container's root.
    pub destination: PathBuf,
    /// The kernel's name of the file system.
    pub fs_type: String,
    /// The source as it shall appear in /proc/mounts.
    pub source: String,
    /// Options of the file system itself: a flag, or a key with a value.
    pub options: Vec<(String, Option<String>)>,
    /// MOUNT_ATTR_* of the mount, without MOUNT_ATTR_RDONLY.
    pub attributes: u32,
    /// Read-only, applied when everything below it is in place.
    pub read_only: bool,
    /// MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE, if the specification names one.
    pub propagation: Option<u32>,
}

/// The kinds of device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe; major and minor do not matter.
    Fifo,
}

/// One device node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePlan {
    /// Where, absolute, inside the container's root.
    pub path: PathBuf,
    /// What.
    pub kind: DeviceKind,
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One more process in a running container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecPlan {
    /// The container's cgroup directory.
    pub cgroup: PathBuf,
    /// The process.
    pub process: ProcessPlan,
}

/// A process, init or exec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// The program and its arguments; at least one. No NUL byte in any.
    pub args: Vec<String>,
    /// `KEY=value`. No NUL byte in any.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: PathBuf,
    /// Numbers it runs as.
    pub user: UserPlan,
    /// The five capability sets.
    pub capabilities: CapabilityPlan,
    /// Resource, soft limit, hard limit; u64::MAX is no limit.
    pub rlimits: Vec<(PosixRlimitType, u64, u64)>,
    /// Set no_new_privs.
    pub no_new_privileges: bool,
    /// How soon the kernel kills it when memory runs out, -1000 to 1000.
    pub oom_score_adj: i32,
    /// A pseudo-terminal of this size instead of three descriptors.
    pub terminal: Option<TerminalSize>,
    /// The filter of its system calls. The container's, also for an exec.
    pub seccomp: Option<Filter>,
}

/// Who a process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserPlan {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
}

/// Capability sets as bit masks (bit n is capability n of linux/capability.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilityPlan {
    /// What may ever be gained.
    pub bounding: u64,
    /// What counts now.
    pub effective: u64,
    /// What survives exec together with file capabilities.
    pub inheritable: u64,
    /// What may be made effective.
    pub permitted: u64,
    /// What survives exec of an ordinary program.
    pub ambient: u64,
}

/// A terminal's size in character cells; 0 leaves the kernel's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Whose fault a failed stage was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The program does not exist.
    NotFound,
    /// The specification asks for what cannot be.
    Invalid,
    /// The kernel refused.
    Internal,
}

/// Why a stage could not go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Whose fault it was.
    pub kind: FailureKind,
    /// What was tried, on what, and what the kernel said.
    pub message: String,
}

impl Failure {
    /// A failure of `kind`.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// Turns a refused system call into a [`Failure`] that says what was tried.
pub trait Trying<T> {
    /// `what` reads as what was tried: `open /dev/pts/ptmx`.
    fn trying(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: std::fmt::Display> Trying<T> for Result<T, E> {
    fn trying(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(FailureKind::Internal, format!("{}: {error}", what())))
    }
}
