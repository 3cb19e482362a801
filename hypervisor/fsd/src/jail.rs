//! Takes everything away that serving one directory does not need.
//!
//! ```text
//!  shim's mount namespace            this process's own
//!  /  …                              /            = the shared directory, nosuid nodev noexec, and what is mounted below it
//!  └─ run/caisson/<pod>/shared ════► (receives the shim's later mounts: rslave)
//!                                    cwd          = /proc/self/fd, reachable by no name
//! ```
//!
//! What the shim has to do for its part:
//! - make the shared directory a mount point with shared propagation (`mount --bind d d; mount --make-shared d`) before this
//!   process starts, in the mount namespace in which it starts it;
//! - mount everything below it nosuid, nodev and noexec. That changes nothing for the guest, whose own kernel runs programs
//!   and opens devices; it makes a device node or setuid program that the guest leaves there harmless on the host;
//! - unmount with MNT_DETACH: as long as the guest remembers a file of a mount, that mount is busy here.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use caisson_mount::{NOSUID_NODEV_NOEXEC, restrict};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    mount::{
        MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree,
        unmount,
    },
    process::{
        Resource, Rlimit, Signal, chdir, fchdir, getrlimit, pivot_root, set_parent_process_death_signal, setrlimit,
    },
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags, remove_capability_from_bounding_set,
        set_capabilities, set_capabilities_secure_bits, set_no_new_privs, unshare_unsafe,
    },
};

use crate::{identity::CAPABILITIES, tree::open_proc_fds};

/// What Linux allows a process by default (fs.nr_open). A guest that remembers so many files uses over 1 GiB for it.
const MAX_DESCRIPTORS: u64 = 1 << 20;

/// What is left of the world inside.
pub struct Jail {
    /// The shared directory, which is now the root directory.
    pub root: OwnedFd,
    /// `/proc/self/fd`, which is now the working directory.
    pub proc_fds: OwnedFd,
    /// Descriptors that the process may have.
    pub descriptors: u64,
}

/// Enters the jail; the process must have one thread. `shared` is a directory in the present mount namespace.
///
/// # Errors
/// The step that failed, and the system's answer.
pub fn enter(shared: OwnedFd) -> Result<Jail> {
    // Of the main thread, which never changes its user: Linux would forget the signal then.
    set_parent_process_death_signal(Some(Signal::KILL)).context("asking for a signal when the parent dies")?;
    let descriptors = raise_descriptor_limit();
    let proc_fds = open_proc_fds().context("opening /proc/self/fd")?;
    enter_namespace(&shared).context("making the shared directory the root directory")?;
    drop(shared);
    let root = openat(CWD, c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    restrict(root.as_fd(), NOSUID_NODEV_NOEXEC, true).context("making the shared mounts nosuid, nodev and noexec")?;
    fchdir(&proc_fds).context("entering /proc/self/fd")?;
    drop_privileges()?;
    Ok(Jail { root, proc_fds, descriptors })
}

/// Checks that a descriptor is a directory.
///
/// # Errors
/// If it is not.
pub fn check_directory(directory: impl AsFd) -> Result<()> {
    let kind = FileType::from_raw_mode(fstat(directory)?.st_mode);
    ensure!(kind == FileType::Directory, "not a directory");
    Ok(())
}

/// As many descriptors as are of use, or as we are allowed.
fn raise_descriptor_limit() -> u64 {
    let limit = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
    // The hard limit is often low where no service manager has raised it; root may.
    if setrlimit(Resource::Nofile, limit(MAX_DESCRIPTORS)).is_err() {
        let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(MAX_DESCRIPTORS);
        let _ = setrlimit(Resource::Nofile, limit(allowed.min(MAX_DESCRIPTORS)));
    }
    getrlimit(Resource::Nofile).current.unwrap_or(0)
}

fn enter_namespace(shared: &OwnedFd) -> Result<()> {
    // A descriptor keeps naming the old namespace's mount; the working directory moves along to the new one's.
    fchdir(shared).context("entering it")?;
    // SAFETY: no FILES flag: the table of descriptors stays as it is.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("unsharing the mount namespace")?;
    mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("cutting the way of our mounts to the host")?;
    // pivot_root wants a mount point, and the copy of the tree keeps its source's propagation.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, c".", flags)
        .context("copying it (it must lie in the mount namespace in which this process starts)")?;
    move_mount(&tree, c"", CWD, c".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context("mounting the copy")?;
    fchdir(&tree)?;
    // The old root comes to lie on top of the new one, and off it goes.
    pivot_root(c".", c".").context("pivot_root")?;
    unmount(c".", UnmountFlags::DETACH).context("unmounting the host")?;
    Ok(chdir(c"/")?)
}

fn drop_privileges() -> Result<()> {
    // The last capability may be one that rustix has no name for: the kernel says where they end.
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if !CAPABILITIES.contains(capability) && remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(bits).context("setting the secure bits")?;
    set_no_new_privs(true).context("setting no_new_privs")?;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: CAPABILITIES, permitted: CAPABILITIES, inheritable })
        .context("dropping capabilities (this program has to be started as root)")
}
