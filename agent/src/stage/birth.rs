//! From the agent's namespaces into the container's.
//!
//! What is joined is joined first, with the rights of the guest's root, no matter whom it belongs to; the user namespace comes
//! last, and new namespaces after it, so that they belong to it. A pid namespace holds from birth on only, and so does
//! a time namespace:
//!
//! ```text
//!   a new pid namespace, and no
//!   user or time namespace:      the agent starts the stage inside as its process 1
//!   otherwise:                   stage ── in the agent's pid namespace, root of the guest
//!                                  │ joins, new time namespace
//!                                  ├─ clone ──► process 1 of the container, in its user namespace
//!                                  │ writes its id maps                     │ waits
//!                                  │ tells the agent its number             │
//!                                  └ ends ───────────────────────────────►  │ goes on as the stage
//! ```
//!
//! A stage stays outside of a pid namespace in which others live already (an exec's, or one that a container joins) until
//! it has given up every right that its program is not to have, because a process there with CAP_SYS_PTRACE can take over
//! any other that it can name, dumpable or not (joined.rs has what must happen inside before):
//!
//! ```text
//!   stage ── joins, prepares, becomes the program's user ── clone ──► its child, in the pid namespace: begins a session,
//!                                                           ends      takes the terminal, enters the program
//! ```

use std::{fs, os::fd::OwnedFd};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
};
use rustix::{
    fs::{Mode, OFlags, openat},
    io::{read, write},
    mount::MountAttrFlags,
    pipe::{PipeFlags, pipe_with},
    process::{DumpableBehavior, Gid, Pid, Uid, WaitOptions, set_dumpable_behavior, waitpid},
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};

use crate::{
    handshake::{Reply, StageEnd},
    idmap::{IdMapping, IdMaps, kernel_text},
    plan::{Failure, FailureKind, NamespaceKind as Kind, NamespacePlan, ProcessPlan, Trying},
    spec::namespaces::name,
    sys,
};

fn flag(kind: Kind) -> CloneFlags {
    match kind {
        Kind::Pid => CloneFlags::CLONE_NEWPID,
        Kind::Network => CloneFlags::CLONE_NEWNET,
        Kind::Ipc => CloneFlags::CLONE_NEWIPC,
        Kind::Uts => CloneFlags::CLONE_NEWUTS,
        Kind::Mount => CloneFlags::CLONE_NEWNS,
        Kind::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        Kind::User => CloneFlags::CLONE_NEWUSER,
        // Not in nix: include/uapi/linux/sched.h.
        Kind::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
    }
}

/// Takes the joined pid namespace out of the descriptors that came for `plan`'s joined namespaces.
pub(super) fn take_pid(plan: &NamespacePlan, joined: &mut Vec<OwnedFd>) -> Option<OwnedFd> {
    let place = plan.joined.iter().position(|kind| *kind == Kind::Pid)?;
    (place < joined.len()).then(|| joined.remove(place))
}

/// Enters a new container's namespaces, but for a pid namespace that it joins; `joined` are the others. With a rebirth it
/// returns in another process than the one that called.
pub(super) fn enter_new(plan: &NamespacePlan, joined: Vec<OwnedFd>, agent: &mut StageEnd) -> Result<(), Failure> {
    for (kind, fd) in plan.joined.iter().filter(|kind| **kind != Kind::Pid).zip(joined) {
        setns(fd, flag(*kind)).trying(|| format!("join the {} namespace", name(*kind)))?;
    }
    if plan.makes(Kind::Time) {
        unshare(flag(Kind::Time)).trying(|| "make a time namespace".into())?;
        for (clock, seconds, nanos) in &plan.time_offsets {
            fs::write("/proc/self/timens_offsets", format!("{clock} {seconds} {nanos}\n")).map_err(|error| {
                let message = format!("linux.timeOffsets[{clock:?}]: {seconds} s and {nanos} ns: {error}");
                Failure::new(FailureKind::Invalid, message)
            })?;
        }
    }
    if plan.needs_rebirth() {
        be_reborn(plan, agent)?;
    }
    if plan.has_users() {
        become_root()?;
    }
    let rest = [Kind::Mount, Kind::Ipc, Kind::Uts, Kind::Cgroup].into_iter().filter(|kind| plan.makes(*kind));
    let rest = rest.fold(CloneFlags::empty(), |all, kind| all | flag(kind));
    unshare(rest).trying(|| "create the container's namespaces".into())
}

/// Enters the namespaces of a running container; its pid namespace is the next child's.
pub(super) fn enter_existing(plan: &NamespacePlan, init: &OwnedFd) -> Result<(), Failure> {
    let mut all = flag(Kind::Pid) | flag(Kind::Ipc) | flag(Kind::Uts) | flag(Kind::Cgroup);
    if plan.makes(Kind::Time) || plan.joins(Kind::Time) {
        all |= flag(Kind::Time);
    }
    if !plan.has_users() {
        return setns(init, all | flag(Kind::Mount)).trying(|| "join the container's namespaces".into());
    }
    // Not all of the others need belong to the user namespace; the mount namespace always does.
    setns(init, all).trying(|| "join the container's namespaces".into())?;
    setns(init, flag(Kind::User)).trying(|| "join the container's user namespace".into())?;
    setns(init, flag(Kind::Mount)).trying(|| "join the container's mount namespace".into())?;
    become_root()
}

/// Goes on as a child that is in the pid and user namespaces from its first instruction on.
fn be_reborn(plan: &NamespacePlan, agent: &mut StageEnd) -> Result<(), Failure> {
    let made = [Kind::User, Kind::Pid].into_iter().filter(|kind| plan.makes(*kind));
    let made = made.fold(CloneFlags::empty(), |all, kind| all | flag(kind));
    let handover = Handover::new(None)?;
    // SAFETY: a stage has one thread.
    let born = unsafe { sys::fork_into(made) };
    let born = born.map_err(|error| {
        no_process(if made.contains(flag(Kind::User)) { "a user namespace" } else { "its next process" }, &error)
    })?;
    let Some(pid) = born else {
        handover.wait();
        return Ok(());
    };
    if plan.makes(Kind::User)
        && let Err(failure) = map_ids(pid, &plan.ids)
    {
        // It ends without the word that it waits for. Waited for here, it is gone before the agent gets the failure.
        drop(handover);
        let _ = Pid::from_raw(pid).map(|pid| waitpid(Some(pid), WaitOptions::empty()));
        return Err(failure);
    }
    handover.give(pid, agent)
}

/// By what a child learns that it may go on.
pub(super) struct Handover {
    wait: OwnedFd,
    release: OwnedFd,
}

/// A process that a stage cannot make. The stage counts as one of the container's processes.
pub(super) fn no_process(what: &str, error: &std::io::Error) -> Failure {
    let message = format!("make {what}: {error}");
    match error.raw_os_error() {
        Some(libc::EAGAIN) => {
            let hint =
                "linux.resources.pids.limit and RLIMIT_NPROC must allow three processes while the container is made";
            Failure::new(FailureKind::Invalid, format!("{message}; {hint}"))
        }
        _ => Failure::new(FailureKind::Internal, message),
    }
}

impl Handover {
    /// `joined` is the pid namespace to enter by the next birth; None leaves that as it is.
    pub(super) fn new(joined: Option<OwnedFd>) -> Result<Self, Failure> {
        if let Some(namespace) = joined {
            setns(namespace, flag(Kind::Pid)).map_err(|error| match error {
                Errno::EPERM => {
                    let problem =
                        "linux.namespaces: \"pid\": the namespace does not belong to the container's user namespace";
                    Failure::new(FailureKind::Invalid, problem)
                }
                _ => Failure::new(FailureKind::Internal, format!("join the pid namespace: {error}")),
            })?;
        }
        let (wait, release) = pipe_with(PipeFlags::CLOEXEC).trying(|| "make a pipe".into())?;
        Ok(Self { wait, release })
    }

    /// Goes on as a child in the pid namespace that was joined; this process has no rights left that its program is not
    /// to have.
    pub(super) fn enter_last(self, process: &ProcessPlan, agent: &mut StageEnd) -> Result<(), Failure> {
        // SAFETY: a stage has one thread.
        let born = unsafe { sys::fork_into(CloneFlags::empty()) };
        let born = born.map_err(|error| {
            let mut failure = no_process("a process in the container's pid namespace", &error);
            if process.seccomp.is_some() && !process.no_new_privileges {
                failure.kind = FailureKind::Invalid;
                failure.message += "; without noNewPrivileges the profile of linux.seccomp must allow clone";
            }
            failure
        })?;
        match born {
            Some(pid) => self.give(pid, agent),
            None => {
                self.wait();
                Ok(())
            }
        }
    }

    /// In the child: waits until it may go on. Otherwise the other process reports what went wrong, or is dead and so is
    /// this one.
    fn wait(self) {
        drop(self.release);
        if read(&self.wait, &mut [0]) != Ok(1) {
            sys::exit_at_once(super::EXIT_FAILED);
        }
    }

    /// In the parent: lets the child go on when the agent knows it, and ends.
    fn give(self, pid: i32, agent: &mut StageEnd) -> Result<(), Failure> {
        agent.send(&Reply::Born(pid), None).trying(|| "report the container's process to the agent".into())?;
        agent.receive_seen().trying(|| "wait for the agent".into())?;
        write(&self.release, &[0]).trying(|| "let the container's process go on".into())?;
        sys::exit_at_once(0)
    }
}

fn map_ids(pid: i32, ids: &IdMaps) -> Result<(), Failure> {
    for (file, field, list) in
        [("uid_map", "linux.uidMappings", &ids.uids), ("gid_map", "linux.gidMappings", &ids.gids)]
    {
        fs::write(format!("/proc/{pid}/{file}"), kernel_text(list))
            .map_err(|error| Failure::new(FailureKind::Invalid, format!("{field}: {}: {error}", words(list))))?;
    }
    Ok(())
}

/// Inside a user namespace this process is still the guest's root, which is nobody there.
fn become_root() -> Result<(), Failure> {
    set_thread_groups(&[]).trying(|| "leave all groups".into())?;
    set_thread_gid(Gid::ROOT).trying(|| "become group 0 of the user namespace".into())?;
    set_thread_uid(Uid::ROOT).trying(|| "become user 0 of the user namespace".into())?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).trying(|| "stay unreachable".into())
}

/// A user namespace with these mappings that nobody lives in.
pub(super) fn user_namespace(maps: &IdMaps) -> Result<OwnedFd, Failure> {
    let what = || "make a user namespace for mapped ids".to_owned();
    let (wait, release) = pipe_with(PipeFlags::CLOEXEC).trying(what)?;
    // SAFETY: a stage has one thread.
    let Some(pid) = (unsafe { sys::fork_into(flag(Kind::User)) }).trying(what)? else {
        drop(release);
        // Until the parent has what it wants, or has died.
        let _ = read(&wait, &mut [0]);
        sys::exit_at_once(0);
    };
    // The guest's /proc may not show this stage's children under the numbers that it knows.
    let namespace = map_and_open(pid, maps);
    drop(release);
    if let Some(pid) = Pid::from_raw(pid) {
        waitpid(Some(pid), WaitOptions::empty()).trying(what)?;
    }
    namespace.map_err(|error| {
        let message = format!("uidMappings {}, gidMappings {}: {error}", words(&maps.uids), words(&maps.gids));
        Failure::new(FailureKind::Invalid, message)
    })
}

fn map_and_open(pid: i32, maps: &IdMaps) -> std::io::Result<OwnedFd> {
    let proc = super::mounts::detached("proc", &[], MountAttrFlags::empty())?;
    let open = |path: String, flags| openat(&proc, path, flags | OFlags::CLOEXEC, Mode::empty());
    for (file, list) in [("uid_map", &maps.uids), ("gid_map", &maps.gids)] {
        write(&open(format!("{pid}/{file}"), OFlags::WRONLY)?, kernel_text(list).as_bytes())?;
    }
    Ok(open(format!("{pid}/ns/user"), OFlags::RDONLY)?)
}

/// Mappings for a message.
fn words(list: &[IdMapping]) -> String {
    format!("{:?}", kernel_text(list).trim_end().replace('\n', ", "))
}
