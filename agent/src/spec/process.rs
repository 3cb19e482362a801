//! The `process` object: program, user, capabilities, limits.

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxCapabilities, PosixRlimit, PosixRlimitType};
use rustix::thread::CapabilitySet;

use super::{Result, SpecError, absolute, document::Process, parse, refuse, scheduling, text};
use crate::plan::{AffinityPlan, CapabilityPlan, ProcessPlan, SchedulerPlan, TerminalSize, UserPlan};

/// What an exec takes from its container where its own `process` object says nothing, as runc does.
#[derive(Clone, Debug, Default)]
pub struct Inherited {
    /// The init process's capabilities.
    pub capabilities: CapabilityPlan,
    /// The init process's limits.
    pub rlimits: Vec<(PosixRlimitType, u64, u64)>,
    /// The init process's OOM adjustment.
    pub oom_score_adj: i32,
    /// The init process's file mode creation mask, if it has one of its own.
    pub umask: Option<u32>,
    /// How the init process is scheduled.
    pub scheduler: Option<SchedulerPlan>,
    /// The init process's IO class and priority.
    pub io_priority: Option<u16>,
    /// The container's execution domain.
    pub personality: Option<u32>,
}

impl From<&ProcessPlan> for Inherited {
    fn from(init: &ProcessPlan) -> Self {
        Self {
            capabilities: init.capabilities,
            rlimits: init.rlimits.clone(),
            oom_score_adj: init.oom_score_adj,
            umask: Some(init.user.umask),
            scheduler: init.scheduler,
            io_priority: init.io_priority,
            personality: init.personality,
        }
    }
}

/// Reads the `process` object of an Exec. Beside the plan come the notes for the log.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn exec(json: &[u8], terminal: bool, inherited: &Inherited) -> Result<(ProcessPlan, Vec<String>)> {
    let process: Process = parse("process", json)?;
    let mut notes = Vec::new();
    let plan = plan("process", &process, terminal, inherited, &mut notes)?;
    Ok((plan, notes))
}

pub(super) fn plan(
    field: &str,
    process: &Process,
    terminal: bool,
    inherited: &Inherited,
    notes: &mut Vec<String>,
) -> Result<ProcessPlan> {
    let of = |name: &str| format!("{field}.{name}");
    refuse(&of("commandLine"), process.command_line.as_ref())?;
    let set = |value: &Option<String>| value.as_ref().is_some_and(|value| !value.is_empty());
    if set(&process.apparmor_profile) {
        notes.push(format!("{} has no effect: the guest runs without AppArmor", of("apparmorProfile")));
    }
    if set(&process.selinux_label) {
        notes.push(format!("{} has no effect: the guest runs without SELinux", of("selinuxLabel")));
    }

    let args = strings(&of("args"), &process.args)?;
    if args.first().is_none_or(String::is_empty) {
        return Err(SpecError::new(of("args"), "names no program"));
    }
    let env = strings(&of("env"), &process.env)?;
    if let Some(entry) = env.iter().find(|entry| entry.find('=').is_none_or(|place| place == 0)) {
        return Err(SpecError::new(of("env"), format!("{entry:?} is not NAME=value")));
    }
    let oom_score_adj = process.oom_score_adj.unwrap_or(inherited.oom_score_adj);
    if !(-1000..=1000).contains(&oom_score_adj) {
        return Err(SpecError::new(of("oomScoreAdj"), format!("{oom_score_adj} is not between -1000 and 1000")));
    }
    let rlimits = match &process.rlimits {
        Some(limits) => rlimits(&of("rlimits"), limits)?,
        None => inherited.rlimits.clone(),
    };
    let size = process.console_size.unwrap_or_default();
    let size = TerminalSize {
        width: cells(&of("consoleSize"), size.width())?,
        height: cells(&of("consoleSize"), size.height())?,
    };
    let user = &process.user;
    // 022 is what a container's init process has that says nothing; an exec has its container's.
    let umask = user.umask().or(inherited.umask).unwrap_or(0o022);
    if umask > 0o777 {
        return Err(SpecError::new(of("user.umask"), format!("{umask} is not between 0 and 511 (octal 777)")));
    }
    Ok(ProcessPlan {
        args,
        env,
        cwd: absolute(&of("cwd"), &process.cwd)?,
        user: UserPlan {
            uid: id(&of("user.uid"), user.uid())?,
            gid: id(&of("user.gid"), user.gid())?,
            groups: user
                .additional_gids()
                .iter()
                .flatten()
                .map(|gid| id(&of("user.additionalGids"), *gid))
                .collect::<Result<_>>()?,
            umask,
        },
        capabilities: process.capabilities.as_ref().map_or(inherited.capabilities, capabilities),
        rlimits,
        no_new_privileges: process.no_new_privileges.unwrap_or(false),
        oom_score_adj,
        terminal: terminal.then_some(size),
        seccomp: None,
        scheduler: match &process.scheduler {
            Some(asked) => Some(scheduling::scheduler(&of("scheduler"), asked)?),
            None => inherited.scheduler,
        },
        io_priority: match &process.io_priority {
            Some(asked) => Some(scheduling::io_priority(&of("ioPriority"), asked)?),
            None => inherited.io_priority,
        },
        personality: inherited.personality,
        affinity: match &process.exec_cpu_affinity {
            Some(asked) => scheduling::affinity(&of("execCPUAffinity"), asked)?,
            None => AffinityPlan::default(),
        },
    })
}

fn rlimits(field: &str, limits: &[PosixRlimit]) -> Result<Vec<(PosixRlimitType, u64, u64)>> {
    let mut plans: Vec<(PosixRlimitType, u64, u64)> = Vec::with_capacity(limits.len());
    for limit in limits {
        let (typ, soft, hard) = (limit.typ(), limit.soft(), limit.hard());
        if plans.iter().any(|(earlier, ..)| *earlier == typ) {
            return Err(SpecError::new(field, format!("{typ} is there twice")));
        }
        if soft > hard {
            return Err(SpecError::new(field, format!("{typ}: soft {soft} exceeds hard {hard}")));
        }
        plans.push((typ, soft, hard));
    }
    Ok(plans)
}

fn strings(field: &str, list: &[String]) -> Result<Vec<String>> {
    list.iter().map(|value| text(field, value)).collect()
}

/// A user or group: u32::MAX means "leave as it is" to the kernel, which here would be root.
fn id(field: &str, id: u32) -> Result<u32> {
    if id == u32::MAX { Err(SpecError::new(field, format!("{id} is no valid id"))) } else { Ok(id) }
}

fn cells(field: &str, cells: u64) -> Result<u16> {
    u16::try_from(cells).map_err(|_| SpecError::new(field, format!("{cells} exceeds 65535 cells")))
}

fn capabilities(sets: &LinuxCapabilities) -> CapabilityPlan {
    CapabilityPlan {
        bounding: mask(sets.bounding()),
        effective: mask(sets.effective()),
        inheritable: mask(sets.inheritable()),
        permitted: mask(sets.permitted()),
        ambient: mask(sets.ambient()),
    }
}

fn mask(set: &Option<HashSet<Capability>>) -> u64 {
    // Both crates spell the names as linux/capability.h does, without the CAP_.
    let bits = |capability: &Capability| CapabilitySet::from_name(&capability.to_string()).map_or(0, |set| set.bits());
    set.iter().flatten().fold(0, |mask, capability| mask | bits(capability))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_of_the_specification_has_its_bit() {
        let names = [
            "CHOWN",
            "DAC_OVERRIDE",
            "DAC_READ_SEARCH",
            "FOWNER",
            "FSETID",
            "KILL",
            "SETGID",
            "SETUID",
            "SETPCAP",
            "LINUX_IMMUTABLE",
            "NET_BIND_SERVICE",
            "NET_BROADCAST",
            "NET_ADMIN",
            "NET_RAW",
            "IPC_LOCK",
            "IPC_OWNER",
            "SYS_MODULE",
            "SYS_RAWIO",
            "SYS_CHROOT",
            "SYS_PTRACE",
            "SYS_PACCT",
            "SYS_ADMIN",
            "SYS_BOOT",
            "SYS_NICE",
            "SYS_RESOURCE",
            "SYS_TIME",
            "SYS_TTY_CONFIG",
            "MKNOD",
            "LEASE",
            "AUDIT_WRITE",
            "AUDIT_CONTROL",
            "SETFCAP",
            "MAC_OVERRIDE",
            "MAC_ADMIN",
            "SYSLOG",
            "WAKE_ALARM",
            "BLOCK_SUSPEND",
            "AUDIT_READ",
            "PERFMON",
            "BPF",
            "CHECKPOINT_RESTORE",
        ];
        for (bit, name) in names.into_iter().enumerate() {
            let capability: Capability = serde_json::from_str(&format!("\"CAP_{name}\"")).unwrap();
            assert_eq!(mask(&Some(HashSet::from([capability]))), 1 << bit, "{name}");
        }
    }
}
