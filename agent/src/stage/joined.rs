//! What has to happen inside a pid namespace that the container joins before the stage enters it itself (birth.rs):
//! /proc shows the namespace of the process that opened it, and createContainer hooks run in the container's.
//!
//! Processes of another container live there, and one with CAP_SYS_PTRACE can take over whatever it can name. So nothing
//! enters that has more rights than it may have, or a descriptor that it may not use:
//!
//! ```text
//!   stage ── clone ──► helper   in the agent's pid namespace, where no container can name it
//!     │ waits            │ setns: its children will be inside
//!     │                  │ closes all descriptors but its socket to the stage, gives up its rights
//!     │                  └─ clone ──► child   inside: opens /proc in a user namespace of its own, or is a hook
//!     │ ◄─ Ready (+ descriptor) or Failed ──┘
//! ```
//!
//! What comes back through that socket is not trusted either: a process inside may have sent it.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream,
};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    io::{Errno, read},
    mount::{FsOpenFlags, MountPropagationFlags, fsconfig_set_flag, fsopen, mount_change},
    process::{Gid, Pid, Uid, WaitOptions, waitpid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use super::{birth, mounts::empty_directory, rootfs::enter_root};
use crate::{
    handshake::{Reply, StageEnd},
    plan::{Failure, FailureKind, Trying},
    sys,
};

/// Owns nothing: "nobody" of every distribution, the kernel's overflow id.
const NOBODY: u32 = 65534;
/// As much of a file system context's log as is looked at: the kernel keeps eight messages.
const MAX_MESSAGES: usize = 16;

/// Runs `work` in a helper whose children are born in `namespace`. It, or a child, answers through the socket; an error is
/// sent for it. Returns the descriptor that came with the answer.
pub(super) fn run(
    namespace: &OwnedFd,
    work: impl FnOnce(&mut StageEnd) -> Result<(), Failure>,
) -> Result<Option<OwnedFd>, Failure> {
    let (ours, theirs) = UnixStream::pair().trying(|| "make a helper's socket".into())?;
    // SAFETY: a stage has one thread.
    let born = unsafe { sys::fork_into(CloneFlags::empty()) }.map_err(|error| birth::no_process("a helper", &error))?;
    let Some(pid) = born else {
        let entered = setns(namespace, CloneFlags::CLONE_NEWPID).trying(|| "join the pid namespace".into());
        // The agent's socket and the container's mounts are among them.
        let alone = entered
            .and_then(|()| sys::close_all_but(theirs.as_raw_fd()).trying(|| "close a helper's descriptors".into()));
        let mut stage = StageEnd::new(theirs);
        let sent = match alone.and_then(|()| work(&mut stage)) {
            Ok(()) => Ok(()),
            Err(failure) => stage.send(&Reply::Failed(failure), None),
        };
        sys::exit_at_once(u8::from(sent.is_err()));
    };
    drop(theirs);
    let answer = StageEnd::new(ours).receive();
    // Whoever has answered, what the helper waits for is over when it has ended.
    let _ = Pid::from_raw(pid).map(|pid| waitpid(Some(pid), WaitOptions::empty()));
    match answer.trying(|| "receive a helper's answer".into())? {
        Some((Reply::Ready, descriptor)) => Ok(descriptor),
        Some((Reply::Failed(failure), _)) => Err(failure),
        Some((Reply::Born(_) | Reply::Terminal, _)) | None => {
            Err(Failure::new(FailureKind::Internal, "a helper in the joined pid namespace ended without an answer"))
        }
    }
}

/// A context for a new /proc of `namespace`, not configured yet.
///
/// It is opened by a process that is nobody outside of a new user namespace and sees an empty directory: whoever takes it
/// over gets what he could have made himself. The file system is made by the stage, outside.
pub(super) fn open_proc(namespace: &OwnedFd) -> Result<OwnedFd, Failure> {
    let context = run(namespace, |stage| {
        see_nothing()?;
        become_nobody()?;
        // SAFETY: a forked helper has one thread.
        let born = unsafe { sys::fork_into(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS) };
        if born.map_err(|error| birth::no_process("a process that opens /proc", &error))?.is_some() {
            return Ok(());
        }
        let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).trying(|| "open the pid namespace's /proc".into())?;
        stage.send(&Reply::Ready, Some(context.as_fd())).trying(|| "hand over the pid namespace's /proc".into())
    })?;
    context
        .filter(|context| is_proc(context.as_fd()))
        .ok_or_else(|| Failure::new(FailureKind::Internal, "a process of the joined pid namespace interfered"))
}

/// Makes an empty directory the root of a mount namespace of this process's own.
fn see_nothing() -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWNS).trying(|| "make a helper's mount namespace".into())?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .trying(|| "make a helper's mounts private".into())?;
    enter_root(empty_directory().trying(|| "make a helper's root".into())?).map(drop)
}

/// Gives up every identity and with it every capability.
fn become_nobody() -> Result<(), Failure> {
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    set_thread_groups(&[]).trying(|| "leave a helper's groups".into())?;
    set_thread_res_gid(group, group, group).trying(|| "become group nobody".into())?;
    set_thread_res_uid(user, user, user).trying(|| "become user nobody".into())
}

/// Whether `context` would become a /proc. The kernel says which file system it is for when it does not know a
/// parameter; a kind that takes any parameter says nothing.
fn is_proc(context: BorrowedFd<'_>) -> bool {
    const UNKNOWN: &str = "caisson";
    if fsconfig_set_flag(context, UNKNOWN) != Err(Errno::INVAL) {
        return false;
    }
    let wanted = format!("e proc: Unknown parameter '{UNKNOWN}'");
    let mut message = [0; 128];
    for _ in 0..MAX_MESSAGES {
        match read(context, &mut message).ok().and_then(|length| message.get(..length)) {
            None | Some([]) => return false,
            Some(text) if text.trim_ascii_end() == wanted.as_bytes() => return true,
            Some(_) => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_context_of_proc_is_taken() {
        let open = |name: &str| fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        assert!(is_proc(open("proc").as_fd()));
        for other in ["tmpfs", "sysfs", "ramfs", "cgroup2"] {
            assert!(!is_proc(open(other).as_fd()), "{other}");
        }
        // Its log holds more than ours.
        let proc = open("proc");
        for _ in 0..20 {
            fsconfig_set_flag(proc.as_fd(), "other").unwrap_err();
        }
        assert!(is_proc(proc.as_fd()));
        assert!(!is_proc(std::fs::File::open("/dev/null").unwrap().as_fd()));
    }
}
