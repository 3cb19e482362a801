//! The init stage: a fresh copy of the agent that turns itself into a container's process.
//!
//! The agent re-executes its own binary instead of forking, because code after a fork in a threaded process may meet
//! a lock that nobody will ever release. The stage, which has one thread, is already in the right pid namespace when it
//! begins, unless the container has users or clocks of its own or there are others in it (birth.rs); the rest it does to
//! itself:
//!
//! ```text
//! Init                                             Exec
//!  unreachable: not dumpable                        the same
//!  receive the plan                                 the same
//!  join the cgroup                                  (the agent moves it, later)
//!  take what the guest's side has  (gather.rs)
//!  namespaces                      (birth.rs)       the container's, through its init's pidfd
//!  root, mounts, devices           (rootfs.rs)
//!  terminal or pipes               (stdio.rs)       the same
//!  createContainer hooks           (hooks.rs)
//!  read-only and masked paths      (rootfs.rs)
//!  groups, user, capabilities      (identity.rs)    the same
//!  system call filter (seccomp.rs): before capabilities go, or at the very end with no_new_privs
//!  a joined pid namespace, as a child (birth.rs)    the container's
//!  say Ready, wait for go                           the same
//!  startContainer hooks            (hooks.rs)
//!  enter the program               (program.rs)     the same
//! ```
//!
//! A container must not reach a stage that still has rights of the guest's root: one of its processes with CAP_SYS_PTRACE
//! could take that over. So a stage enters a pid namespace in which others live when it has given them up, and
//! createContainer hooks, which run beside an init stage, have no CAP_SYS_PTRACE.
//!
//! Nor must a container reach the agent's binary through the stage and overwrite it (CVE-2019-5736), nor keep one of
//! its descriptors. While a stage lives beside a container's processes it is not dumpable, so its `/proc/<pid>/exe` and
//! fd are closed to them. Once a program has obtained the binary by naming /proc/self/exe as its own path, it finds it
//! on a read-only mount that is in no namespace of its own ([`crate::boot`]), and the kernel refuses to write to a
//! file that PID 1 executes anyhow. All descriptors are close-on-exec.

mod birth;
mod copyup;
mod devices;
mod gather;
mod hooks;
mod identity;
pub mod inroot;
mod joined;
mod mounts;
mod program;
mod rootfs;
mod seccomp;
mod stdio;

use std::{
    fs,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    process::{DumpableBehavior, set_dumpable_behavior, setsid},
    thread::{CpuSet, sched_setaffinity},
};

use crate::{
    handshake::{Reply, StageEnd},
    plan::{Failure, FailureKind, Plan, ProcessPlan, Trying},
    sys,
};

/// The argument that makes the agent's binary a stage.
pub const ARGUMENT: &str = "stage";

/// How a stage ends when it cannot go on, as a shell would say: no such program.
const EXIT_NOT_FOUND: u8 = 127;
/// The same: anything else.
const EXIT_FAILED: u8 = 126;

/// Runs a stage to its end; it returns only if it failed. Descriptor 0 is the socket to the agent.
pub fn main() -> u8 {
    // SAFETY: the agent starts a stage with its socket as descriptor 0, and nothing has used that yet.
    let socket = unsafe { OwnedFd::from_raw_fd(0) };
    let prepared = set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .trying(|| "make the stage unreachable".into())
        // Whatever the agent was started with, neither a hook nor the program sees it.
        .and_then(|()| sys::close_all_on_exec().trying(|| "close the agent's descriptors".into()))
        // Descriptor 0 is needed for the program; the duplicate is close-on-exec and above 2.
        .and_then(|()| rustix::io::fcntl_dupfd_cloexec(&socket, 3).trying(|| "keep the socket to the agent".into()));
    // Dropping the original would let the next open take descriptor 0; it is replaced when the program's own is known.
    std::mem::forget(socket);
    let Ok(socket) = prepared else { return EXIT_FAILED };
    let mut agent = StageEnd::new(socket.into());

    let failure = match stage(&mut agent) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let code = if failure.kind == FailureKind::NotFound { EXIT_NOT_FOUND } else { EXIT_FAILED };
    // If the agent is gone there is nobody left to tell.
    let _ = agent.send(&Reply::Failed(failure), None);
    code
}

fn stage(agent: &mut StageEnd) -> Result<std::convert::Infallible, Failure> {
    let (plan, mut fds) = agent.receive_plan().trying(|| "receive the plan".into())?;
    let (process, root, mut terminal, pid) = match &plan {
        Plan::Init(plan) => {
            begin(Some(&plan.cgroup), &plan.process)?;
            let standard = fds.split_off(plan.namespaces.joined.len().min(fds.len()));
            let pid = birth::take_pid(&plan.namespaces, &mut fds);
            let gathered = gather::gather(plan, pid.as_ref())?;
            birth::enter_new(&plan.namespaces, fds, agent)?;
            sys::new_session_keyring().trying(|| "begin a session keyring".into())?;
            begin_session()?;
            let unsealed = rootfs::prepare(plan, gathered)?;
            let terminal = stdio::attach(&plan.process, &unsealed.root, true, standard)?;
            if pid.is_none() {
                stdio::control(&plan.process)?;
            }
            hooks::create_container(&plan.hooks.create_container, &plan.hooks.about, &plan.process, pid.as_ref())?;
            (&plan.process, rootfs::seal(unsealed, &plan.view)?, terminal, pid)
        }
        Plan::Exec(plan) => {
            // The agent moves the process into its cgroup, which may have room for one only.
            begin(None, &plan.process)?;
            if fds.is_empty() {
                return Err(Failure::new(FailureKind::Internal, "the plan came without a pidfd"));
            }
            let standard = fds.split_off(1);
            for init in &fds {
                birth::enter_existing(&plan.namespaces, init)?;
            }
            drop(fds);
            sys::new_session_keyring().trying(|| "begin a session keyring".into())?;
            let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
            let root = inroot::Root::new(root.trying(|| "open the container's root".into())?);
            let terminal = stdio::attach(&plan.process, &root, false, standard)?;
            // It has been joined with the others.
            (&plan.process, root, terminal, None)
        }
    };
    let env = program::environment(process, &root);
    // Before a profile that may not allow it is in force.
    sys::default_signals();
    sys::close_all_on_exec().trying(|| "close the agent's descriptors".into())?;
    if let Some(domain) = process.personality {
        sys::set_personality(domain).trying(|| format!("linux.personality: {domain:#x}"))?;
    }
    // Before the process's limits are in force.
    let handover = plan.enters_last().then(|| birth::Handover::new(pid)).transpose()?;
    identity::assume(&plan, &root)?;
    drop(root);
    if let Some(handover) = handover {
        // Only the agent gets it, and from this process, which nobody else can name.
        if let Some(master) = terminal.take() {
            agent.send(&Reply::Terminal, Some(master.as_fd())).trying(|| "hand over the terminal".into())?;
        }
        handover.enter_last(process, agent)?;
        begin_session()?;
        stdio::control(process)?;
        run_on(&process.affinity.after, "final")?;
    }
    agent.send(&Reply::Ready, terminal.as_ref().map(AsFd::as_fd)).trying(|| "report to the agent".into())?;
    drop(terminal);
    agent.receive_go().trying(|| "wait for the agent".into())?;
    if let Plan::Init(plan) = &plan {
        hooks::start_container(&plan.hooks.start_container, &plan.hooks.about, process)?;
    }
    program::exec(process, &env)
}

/// What is done while the guest's own file systems are in sight.
fn begin(cgroup: Option<&Path>, process: &ProcessPlan) -> Result<(), Failure> {
    run_on(&process.affinity.before, "initial")?;
    if let Some(cgroup) = cgroup {
        // 0 means the process that writes.
        fs::write(cgroup.join("cgroup.procs"), "0").trying(|| format!("join the cgroup {}", cgroup.display()))?;
        run_on(&process.affinity.after, "final")?;
    }
    let score = process.oom_score_adj;
    fs::write("/proc/self/oom_score_adj", score.to_string()).trying(|| format!("set oom_score_adj to {score}"))
}

fn run_on(processors: &[usize], field: &str) -> Result<(), Failure> {
    if processors.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    processors.iter().filter(|number| **number < CpuSet::MAX_CPU).for_each(|number| set.set(*number));
    sched_setaffinity(None, &set).map_err(|error| {
        let message = format!("process.execCPUAffinity.{field}: {processors:?}: {error}");
        Failure::new(FailureKind::Invalid, message)
    })
}

fn begin_session() -> Result<(), Failure> {
    setsid().map(drop).trying(|| "begin a session".into())
}

/// Puts `fd` in place of a standard descriptor; the copy survives exec.
fn replace(fd: &OwnedFd, standard: i32) -> Result<(), Failure> {
    // SAFETY: it borrows a standard descriptor only for the call that replaces it; the forget below keeps it open.
    let mut target = unsafe { OwnedFd::from_raw_fd(standard) };
    let result = rustix::io::dup2(fd, &mut target);
    std::mem::forget(target);
    result.trying(|| format!("make descriptor {} the standard descriptor {standard}", fd.as_raw_fd()))
}
