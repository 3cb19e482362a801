//! Who the program runs as: working directory, groups, user, capabilities, in the order that the kernel's rules allow.
//! Limits too, unless the agent sets them ([`crate::plan::Plan::is_limited_from_outside`]), as it sets scheduling.

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    process::{Gid, Uid, fchdir, umask},
    thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set, configure_capability_in_ambient_set,
        remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_no_new_privs, set_thread_gid,
        set_thread_groups, set_thread_uid,
    },
};

use super::{inroot::Root, seccomp};
use crate::{
    plan::{CapabilityPlan, Failure, FailureKind, Plan, ProcessPlan, Trying},
    rlimits,
};

/// Gives up everything that the plan does not grant. The stage has one thread, so the thread's identity is the
/// process's.
pub(super) fn assume(plan: &Plan, root: &Root) -> Result<(), Failure> {
    let process = plan.process();
    let limits = process.rlimits.iter().filter(|(limit, ..)| !plan.is_limited_from_outside(*limit));
    rlimits::set(None, limits).map_err(|error| invalid(error.to_string()))?;
    let user = &process.user;
    umask(Mode::from_raw_mode(user.umask));
    // A directory that root may not enter (on a file system of another user) may be open to the user.
    let entered = enter_working_directory(process, root);
    if let Err(error) = entered.filter_error(Errno::ACCESS) {
        return Err(invalid(format!("process.cwd: enter {}: {error}", process.cwd.display())));
    }

    // Without no_new_privs only someone with CAP_SYS_ADMIN may do it; the profile must then allow what is done below.
    if !process.no_new_privileges {
        seccomp::install(process)?;
    }
    drop_bounding_set(process.capabilities.bounding)?;
    set_keep_capabilities(true).trying(|| "keep capabilities".into())?;
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    set_thread_groups(&groups).map_err(|error| invalid(format!("process.user.additionalGids: {error}")))?;
    // EINVAL: a user namespace does not have it.
    set_thread_gid(Gid::from_raw(user.gid))
        .map_err(|error| invalid(format!("process.user.gid: become group {}: {error}", user.gid)))?;
    set_thread_uid(Uid::from_raw(user.uid))
        .map_err(|error| invalid(format!("process.user.uid: become user {}: {error}", user.uid)))?;
    set_keep_capabilities(false).trying(|| "keep no further capabilities".into())?;
    if entered == Err(Errno::ACCESS) {
        enter_working_directory(process, root)
            .map_err(|error| invalid(format!("process.cwd: enter {}: {error}", process.cwd.display())))?;
    }
    apply_capabilities(&process.capabilities)?;
    if process.no_new_privileges {
        set_no_new_privs(true).trying(|| "set no_new_privs".into())?;
    }
    Ok(())
}

/// Gives up what a container with these capabilities cannot have, but not the user.
pub(super) fn confine(capabilities: &CapabilityPlan, no_new_privileges: bool) -> Result<(), Failure> {
    drop_bounding_set(capabilities.bounding)?;
    apply_capabilities(capabilities)?;
    if no_new_privileges {
        set_no_new_privs(true).trying(|| "set no_new_privs".into())?;
    }
    Ok(())
}

trait FilterError {
    fn filter_error(self, ignored: Errno) -> Self;
}

impl FilterError for rustix::io::Result<()> {
    fn filter_error(self, ignored: Errno) -> Self {
        self.or_else(|error| if error == ignored { Ok(()) } else { Err(error) })
    }
}

fn invalid(message: String) -> Failure {
    Failure::new(FailureKind::Invalid, message)
}

/// By descriptor, found inside the root and through no magic link: a working directory is a classic way out
/// (CVE-2024-21626).
fn enter_working_directory(process: &ProcessPlan, root: &Root) -> rustix::io::Result<()> {
    fchdir(root.open(&process.cwd, OFlags::PATH | OFlags::DIRECTORY)?)
}

fn drop_bounding_set(keep: u64) -> Result<(), Failure> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if keep & capability.bits() != 0 {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last capability of this kernel.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error).trying(|| format!("drop capability {bit} from the bounding set")),
        }
    }
    Ok(())
}

fn apply_capabilities(plan: &CapabilityPlan) -> Result<(), Failure> {
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(plan.effective),
        permitted: CapabilitySet::from_bits_retain(plan.permitted),
        inheritable: CapabilitySet::from_bits_retain(plan.inheritable),
    };
    set_capabilities(None, sets).map_err(|error| {
        invalid(format!(
            "process.capabilities: {error} (effective must be within permitted, inheritable within bounding)"
        ))
    })?;
    clear_ambient_capability_set().trying(|| "clear the ambient capabilities".into())?;
    for bit in (0..64).filter(|bit| plan.ambient & (1 << bit) != 0) {
        configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(1 << bit), true).map_err(|error| {
            invalid(format!(
                "process.capabilities.ambient: capability {bit}: {error} (must be permitted and inheritable)"
            ))
        })?;
    }
    Ok(())
}
