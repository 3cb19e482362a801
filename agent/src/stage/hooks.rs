//! Hooks: programs of the container's root file system that run before its own.
//!
//! The guest holds no program but the agent, so unlike with runc a hook comes from the image, and may do no more than
//! the container: it is in its namespaces and cgroup, and what its processes cannot gain in capabilities it has not
//! either; a createContainer hook does not have CAP_SYS_PTRACE, with which it could take over the stage that waits for it.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
    thread::CapabilitySet,
};
use serde_json::json;

use super::{identity, joined};
use crate::{
    handshake::{Reply, StageEnd},
    plan::{CapabilityPlan, Failure, FailureKind, HookPlan, HookState, ProcessPlan, Trying},
};

/// As much of a failed hook's output as a message holds.
const MAX_OUTPUT: u64 = 2048;

/// Runs hooks one after the other, as user 0 with the capabilities that the container can have; in `pid`, if that is the
/// namespace that the container joins.
pub(super) fn create_container(
    hooks: &[HookPlan],
    about: &HookState,
    process: &ProcessPlan,
    pid: Option<&OwnedFd>,
) -> Result<(), Failure> {
    if hooks.is_empty() {
        return Ok(());
    }
    let Some(namespace) = pid else { return beside_stage(hooks, about, process) };
    let inside = |stage: &mut StageEnd| {
        identity::confine(&without_ptrace(process.capabilities), process.no_new_privileges)?;
        hooks.iter().try_for_each(|hook| {
            let mut command = command(hook, process);
            // SAFETY: it does nothing. With it the hook's process gets a copy of this one's memory; without, it would
            // share it until its program runs, and who takes it over would have this one, which is outside, as well.
            unsafe { command.pre_exec(|| Ok(())) };
            // Its number inside is not known yet, and may be missing in this status.
            run(hook, command, &state(about, "creating", None))
        })?;
        stage.send(&Reply::Ready, None).trying(|| "report the end of the hooks".into())
    };
    joined::run(namespace, inside).map(drop)
}

/// The stage is process 1 of the pid namespace, and the hooks are its children.
fn beside_stage(hooks: &[HookPlan], about: &HookState, process: &ProcessPlan) -> Result<(), Failure> {
    hooks.iter().try_for_each(|hook| {
        let mut command = command(hook, process);
        let (capabilities, no_new_privileges) = (without_ptrace(process.capabilities), process.no_new_privileges);
        let confine = move || {
            identity::confine(&capabilities, no_new_privileges)
                .map_err(|_| io::Error::from(io::ErrorKind::PermissionDenied))
        };
        // SAFETY: the stage has one thread, so nothing that the closure calls can meet a lock held by another.
        unsafe { command.pre_exec(confine) };
        run(hook, command, &state(about, "creating", Some(std::process::id())))
    })
}

fn without_ptrace(plan: CapabilityPlan) -> CapabilityPlan {
    let without = |set: u64| set & !CapabilitySet::SYS_PTRACE.bits();
    CapabilityPlan {
        bounding: without(plan.bounding),
        effective: without(plan.effective),
        permitted: without(plan.permitted),
        inheritable: without(plan.inheritable),
        ambient: without(plan.ambient),
    }
}

/// Runs hooks one after the other, as what this process is: the container's user.
pub(super) fn start_container(hooks: &[HookPlan], about: &HookState, process: &ProcessPlan) -> Result<(), Failure> {
    let state = state(about, "created", Some(std::process::id()));
    hooks.iter().try_for_each(|hook| run(hook, command(hook, process), &state))
}

/// What a hook reads. The bundle is the host's and not here; the pid is the container's own view, as with runc.
fn state(about: &HookState, status: &str, pid: Option<u32>) -> Vec<u8> {
    let mut state = json!({
        "ociVersion": about.oci_version,
        "id": about.id,
        "status": status,
        "bundle": "",
        "annotations": about.annotations,
    });
    if let Some(pid) = pid {
        state["pid"] = pid.into();
    }
    state.to_string().into_bytes()
}

fn command(hook: &HookPlan, process: &ProcessPlan) -> Command {
    let mut command = Command::new(&hook.path);
    if let [name, args @ ..] = hook.args.as_slice() {
        command.arg0(name).args(args);
    }
    let env = hook.env.as_ref().unwrap_or(&process.env);
    command.env_clear().envs(env.iter().filter_map(|entry| entry.split_once('=')));
    command.current_dir("/");
    command
}

fn run(hook: &HookPlan, mut command: Command, state: &[u8]) -> Result<(), Failure> {
    let named = || format!("{}: {}", hook.field, hook.path.display());
    let failed = |problem: String| Failure::new(FailureKind::Invalid, format!("{}: {problem}", named()));
    // Files in memory: nobody must wait for a hook that does not read, nor for one whose children keep its output open.
    let (input, mut output) = (in_memory(state).trying(named)?, in_memory(&[]).trying(named)?);
    command.stdin(input).stdout(output.try_clone().trying(named)?).stderr(output.try_clone().trying(named)?);
    let child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            failed("there is no such program in the container's root file system, where hooks are looked up".into())
        }
        _ => failed(error.to_string()),
    })?;
    let status = wait(child, hook.timeout).trying(named)?;
    if status.is_some_and(|status| status.success()) {
        return Ok(());
    }
    let mut said = Vec::new();
    // What it said is a help, no more.
    let _ = output.rewind().and_then(|()| output.take(MAX_OUTPUT).read_to_end(&mut said));
    let said = String::from_utf8_lossy(&said);
    let problem = match (status, hook.timeout) {
        (Some(status), _) => status.to_string(),
        (None, seconds) => format!("took more than {} s", seconds.unwrap_or(0)),
    };
    Err(failed(format!("{problem}; output: {:?}", said.trim_end())))
}

fn in_memory(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// Waits for a hook's end; None if it took too long and was killed.
fn wait(mut child: Child, timeout: Option<u32>) -> io::Result<Option<ExitStatus>> {
    let Some(seconds) = timeout else { return child.wait().map(Some) };
    let deadline = Instant::now() + Duration::from_secs(seconds.into());
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(0) => {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
