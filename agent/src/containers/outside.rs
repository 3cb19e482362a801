//! What the agent does to a process from outside, with the rights of the guest's root, which a process in a user
//! namespace has not.

use super::error::Result;
use crate::{
    plan::{Plan, UserPlan},
    rlimits,
    spec::SpecError,
    sys::{set_io_priority, set_scheduler},
};

/// Gives a stage that waits for its program the scheduling of its plan, and limits that it could not set itself.
///
/// # Errors
/// What the kernel refuses, by field.
pub(super) fn set(pid: i32, plan: &Plan) -> Result<()> {
    let process = plan.process();
    let refused = |field: &str, value: String, error: std::io::Error| {
        SpecError::new(format!("process.{field}"), format!("{value}: {error}"))
    };
    let limits = process.rlimits.iter().filter(|(limit, ..)| plan.is_limited_from_outside(*limit));
    rlimits::set(Some(pid), limits)?;
    if let Some(scheduler) = &process.scheduler {
        set_scheduler(pid, scheduler).map_err(|error| refused("scheduler", format!("{scheduler:?}"), error))?;
    }
    if let Some(value) = process.io_priority {
        set_io_priority(pid, value).map_err(|error| refused("ioPriority", format!("{value:#x}"), error))?;
    }
    Ok(())
}

/// The process's user and group as the guest knows them, for what the agent makes for it.
///
/// # Errors
/// If the container's user namespace does not have them.
pub(super) fn user(plan: &Plan) -> Result<UserPlan> {
    let (ids, user) = (&plan.namespaces().ids, &plan.process().user);
    let missing =
        |field: &str, id: u32| SpecError::new(field, format!("{id} is not in the container's user namespace"));
    let uid = ids.uid(user.uid).ok_or_else(|| missing("process.user.uid", user.uid))?;
    let gid = ids.gid(user.gid).ok_or_else(|| missing("process.user.gid", user.gid))?;
    Ok(UserPlan { uid, gid, ..user.clone() })
}
