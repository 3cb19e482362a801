//! The specification's two outer objects. Everything inside them is oci-spec's.
//!
//! oci-spec's own `Spec` and `Process` check one field (execCPUAffinity) with a regular
//! expression, and with them a whole engine for these would lie in each guest's memory: a fifth of the agent.

use std::{collections::BTreeMap, path::PathBuf};

use oci_spec::runtime::{Box as Size, Hooks, Linux, LinuxCapabilities, Mount, PosixRlimit, Root, User};
use serde::{Deserialize, de::IgnoredAny};

use super::scheduling::{Affinity, IoPriority, Scheduler};

/// config.json. What is neither here nor below has no meaning to a Linux runtime.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    pub oci_version: Option<String>,
    pub annotations: Option<BTreeMap<String, String>>,
    pub root: Option<Root>,
    pub mounts: Option<Vec<Mount>>,
    pub process: Option<Process>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub hooks: Option<Hooks>,
    pub linux: Option<Linux>,
    pub solaris: Option<IgnoredAny>,
    pub windows: Option<IgnoredAny>,
    pub vm: Option<IgnoredAny>,
    pub zos: Option<IgnoredAny>,
}

/// The `process` object.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Process {
    // `terminal` is the caller's to say.
    pub console_size: Option<Size>,
    pub user: User,
    #[serde(default)]
    pub args: Vec<String>,
    pub command_line: Option<IgnoredAny>,
    #[serde(default)]
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub capabilities: Option<LinuxCapabilities>,
    pub rlimits: Option<Vec<PosixRlimit>>,
    pub no_new_privileges: Option<bool>,
    pub apparmor_profile: Option<String>,
    pub oom_score_adj: Option<i32>,
    pub selinux_label: Option<String>,
    pub io_priority: Option<IoPriority>,
    pub scheduler: Option<Scheduler>,
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<Affinity>,
}
