//! What the agent tells a stage to do: the OCI specification after every question has been answered.
//!
//! The agent reads JSON, refuses what it cannot honour and turns the rest into these types ([`crate::spec`]); the
//! stage ([`crate::stage`]), a fresh process inside the new namespaces, carries them out without deciding anything.
//! A plan crosses from one process to the other as postcard over an inherited socket ([`crate::handshake`]).

use std::{collections::BTreeMap, path::PathBuf};

use oci_spec::runtime::PosixRlimitType;
use serde::{Deserialize, Serialize};

use crate::{idmap::IdMaps, seccomp::Filter};

/// The work of one stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Plan {
    /// Become a new container's init process.
    Init(Box<InitPlan>),
    /// Become one more process of a running container.
    Exec(Box<ExecPlan>),
}

impl Plan {
    /// The process that the stage becomes.
    pub fn process(&self) -> &ProcessPlan {
        match self {
            Self::Init(plan) => &plan.process,
            Self::Exec(plan) => &plan.process,
        }
    }

    /// Its container's namespaces.
    pub fn namespaces(&self) -> &NamespacePlan {
        match self {
            Self::Init(plan) => &plan.namespaces,
            Self::Exec(plan) => &plan.namespaces,
        }
    }

    /// Whether the stage enters its pid namespace last, when it has no more rights than its program will have: a process
    /// there with CAP_SYS_PTRACE could take over any other that it can name.
    pub fn enters_last(&self) -> bool {
        match self {
            Self::Init(plan) => plan.namespaces.joins(NamespaceKind::Pid),
            Self::Exec(_) => true,
        }
    }

    /// Whether the agent sets a limit of the process: in a user namespace the stage may not raise any, and one that
    /// enters its pid namespace last needs a process more than its program.
    pub fn is_limited_from_outside(&self, limit: PosixRlimitType) -> bool {
        self.namespaces().has_users() || self.enters_last() && limit == PosixRlimitType::RlimitNproc
    }
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
    /// Which namespaces are its own.
    pub namespaces: NamespacePlan,
    /// What the container looks like inside.
    pub view: View,
    /// Its first process.
    pub process: ProcessPlan,
    /// Programs of its root file system to run on the way.
    pub hooks: HookPlans,
}

/// The kinds of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamespaceKind {
    /// Process numbers.
    Pid,
    /// Network devices and addresses; always the pod's.
    Network,
    /// System V and POSIX message queues, semaphores, shared memory.
    Ipc,
    /// Host and domain name.
    Uts,
    /// Mounts.
    Mount,
    /// The view of the cgroup tree.
    Cgroup,
    /// Users and groups.
    User,
    /// The offsets of two clocks.
    Time,
}

/// Which namespaces a container makes, which it joins, and what the new ones need.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespacePlan {
    /// To be made. The network is the pod's and never here.
    pub new: Vec<NamespaceKind>,
    /// To be joined; a descriptor for each comes with the plan, in this order.
    pub joined: Vec<NamespaceKind>,
    /// What the ids of a user namespace, new or joined, are outside.
    pub ids: IdMaps,
    /// The clocks of a new time namespace: name, seconds, nanoseconds.
    pub time_offsets: Vec<(String, i64, u32)>,
}

impl NamespacePlan {
    /// Whether the container makes a namespace of this kind.
    pub fn makes(&self, kind: NamespaceKind) -> bool {
        self.new.contains(&kind)
    }

    /// Whether the container joins one of this kind.
    pub fn joins(&self, kind: NamespaceKind) -> bool {
        self.joined.contains(&kind)
    }

    /// Whether the container's users are not the guest's.
    pub fn has_users(&self) -> bool {
        self.makes(NamespaceKind::User) || self.joins(NamespaceKind::User)
    }

    /// Whether the stage that was started is not yet the container's process: a user namespace must own the pid
    /// namespace, and a time namespace holds from the next birth on. One that joins a pid namespace is born into both last.
    pub fn needs_rebirth(&self) -> bool {
        self.makes(NamespaceKind::Pid) && (self.has_users() || self.makes(NamespaceKind::Time))
    }
}

/// Programs to run while a container comes to life, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookPlans {
    /// After the mounts.
    pub create_container: Vec<HookPlan>,
    /// Right before the container's own program.
    pub start_container: Vec<HookPlan>,
    /// What they get of the container.
    pub about: HookState,
}

/// One program to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookPlan {
    /// The field that asks for it, for messages.
    pub field: String,
    /// The program, absolute, in the container's root file system.
    pub path: PathBuf,
    /// Its arguments with its own name first; if empty, the path stands for it.
    pub args: Vec<String>,
    /// Its environment; None is the container's.
    pub env: Option<Vec<String>>,
    /// Seconds after which it has failed.
    pub timeout: Option<u32>,
}

/// What does not change in the state that hooks read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookState {
    /// As the specification has it.
    pub oci_version: String,
    /// The container's name.
    pub id: String,
    /// As the specification has them.
    pub annotations: BTreeMap<String, String>,
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
    /// How mounts spread from and to the root, as [`MountPlan::propagation`].
    pub root_propagation: Option<u32>,
    /// /dev is a bind mount: it is used as it is.
    pub foreign_dev: bool,
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPlan {
    /// Its place in the specification's list, for messages.
    pub index: usize,
    /// Where, absolute, inside the container's root.
    pub destination: PathBuf,
    /// What.
    pub source: MountSource,
    /// Changes to the mount itself.
    pub attributes: Attributes,
    /// Changes to the mount and all below it.
    pub recursive: Attributes,
    /// Of a new file system: read-only, applied when everything below it is in place.
    pub read_only: bool,
    /// MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE, perhaps with MS_REC, in the order of applying.
    pub propagation: Vec<u32>,
    /// Ids on the source and their counterparts in the mount.
    pub ids: Option<MountIds>,
    /// Fill a new tmpfs with what lies at its destination.
    pub copy_up: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A file system of the kernel's.
    FileSystem {
        /// The kernel's name of it.
        fs_type: String,
        /// The source as it shall appear in /proc/mounts.
        name: String,
        /// Options of the file system itself: a flag, or a key with a value.
        options: Vec<(String, Option<String>)>,
    },
    /// A file or directory of the pod's shared directory.
    Bind {
        /// Where, relative to the shared directory; no part of it may be a symbolic link.
        path: PathBuf,
        /// With what is mounted below it.
        recursive: bool,
    },
}

/// Changes to a mount: MOUNT_ATTR_* of linux/mount.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// To set.
    pub set: u32,
    /// To clear first.
    pub clear: u32,
}

/// The ids of an id-mapped mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountIds {
    /// What they are mapped to.
    pub maps: IdMaps,
    /// Also in everything below.
    pub recursive: bool,
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
    /// Which of its namespaces are not the agent's.
    pub namespaces: NamespacePlan,
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
    /// How it is scheduled, if not as usual.
    pub scheduler: Option<SchedulerPlan>,
    /// IO class and priority, as ioprio_set(2) takes them.
    pub io_priority: Option<u16>,
    /// The execution domain, as personality(2) takes it.
    pub personality: Option<u32>,
    /// The processors of an exec, before and after it enters the container's cgroup.
    pub affinity: AffinityPlan,
}

/// How the kernel schedules a process: `struct sched_attr` of linux/sched/types.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedulerPlan {
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// For SCHED_OTHER and SCHED_BATCH, -20 to 19.
    pub nice: i32,
    /// For SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// For SCHED_DEADLINE, nanoseconds.
    pub runtime: u64,
    /// For SCHED_DEADLINE, nanoseconds.
    pub deadline: u64,
    /// For SCHED_DEADLINE, nanoseconds.
    pub period: u64,
}

/// Numbers of processors; empty leaves them as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffinityPlan {
    /// Before.
    pub before: Vec<usize>,
    /// After.
    pub after: Vec<usize>,
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
