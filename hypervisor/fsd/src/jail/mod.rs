//! Takes everything away that serving one directory does not need.
//!
//! ```text
//!  shim                              this process
//!  mount namespace                   a mount namespace of its own
//!  /  …                              /            = the shared directory, nosuid nodev noexec, and what is mounted below it
//!  └─ run/caisson/<pod>/shared ════► (receives the shim's later mounts: rslave)
//!                                    cwd          = its own /proc/self/fd, the root of a mount of its own: nothing is above it
//!  pid, network, IPC, UTS and        one of each of its own, with nothing in it but this process
//!  cgroup namespaces
//!  all capabilities                  [`CAPABILITIES`]
//!  all system calls                  [`filter`]
//! ```
//!
//! The order of a start, which each step depends on:
//! 1. The shim starts this program as the first process of a pid namespace (a process cannot enter one itself).
//! 2. [`enter`], while the process has one thread.
//! 3. All serving threads are made, and each unshares its umask and working directory (CLONE_FS).
//! 4. [`filter::install`] for all of them. From then on no thread can be made, and nothing unshared.
//! 5. The threads serve.
//!
//! What the shim has to do for its part:
//! - make the shared directory a mount point with shared propagation (`mount --bind d d; mount --make-shared d`) before this
//!   process starts, in the mount namespace in which it starts it;
//! - mount everything below it nosuid, nodev and noexec. That changes nothing for the guest, whose own kernel runs programs
//!   and opens devices; it makes a device node or setuid program that the guest leaves there harmless on the host;
//! - unmount with MNT_DETACH: as long as the guest remembers a file of a mount, that mount is busy here.

pub mod filter;

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use caisson_mount::{NOSUID_NODEV_NOEXEC, restrict};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree, unmount,
    },
    process::{
        DumpableBehavior, Resource, Rlimit, Signal, chdir, fchdir, getpid, getrlimit, pivot_root,
        set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
    },
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags, remove_capability_from_bounding_set,
        set_capabilities, set_capabilities_secure_bits, set_no_new_privs, unshare_unsafe,
    },
};

use crate::identity::CAPABILITIES;

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

/// Enters the jail; the process must have one thread and be the first of its pid namespace. `shared` is a directory in
/// the present mount namespace.
///
/// # Errors
/// The step that failed, and the system's answer.
pub fn enter(shared: OwnedFd) -> Result<Jail> {
    ensure!(
        getpid().is_init(),
        "process {} is not the first of a pid namespace: start this program with CLONE_NEWPID (unshare --pid --fork)",
        getpid()
    );
    // Of the main thread, which never changes its user: Linux would forget the signal then.
    set_parent_process_death_signal(Some(Signal::KILL)).context("asking for a signal when the parent dies")?;
    let descriptors = set_limits()?;
    let proc_fds = enter_namespaces(&shared).context("making the shared directory the root directory")?;
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

/// Sets the resource limits; returns how many descriptors there may be: as many as are of use, or as we are allowed.
fn set_limits() -> Result<u64> {
    let limit = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
    // A core dump would hold what the guest reads and writes.
    setrlimit(Resource::Core, limit(0)).context("forbidding core dumps")?;
    // The guest's own limits hold for its files. Without the right to raise it, the host's limit stays and writes beyond
    // it fail with EFBIG; their SIGXFSZ does nothing to the first process of a pid namespace.
    let _ = setrlimit(Resource::Fsize, Rlimit { current: None, maximum: None });
    // The hard limit is often low where no service manager has raised it; root may.
    if setrlimit(Resource::Nofile, limit(MAX_DESCRIPTORS)).is_err() {
        let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(MAX_DESCRIPTORS);
        let _ = setrlimit(Resource::Nofile, limit(allowed.min(MAX_DESCRIPTORS)));
    }
    Ok(getrlimit(Resource::Nofile).current.unwrap_or(0))
}

/// Enters namespaces with nothing in them but the shared directory; returns [`own_descriptors`].
fn enter_namespaces(shared: &OwnedFd) -> Result<OwnedFd> {
    // A descriptor keeps naming the old namespace's mount; the working directory moves along to the new one's.
    fchdir(shared).context("entering it")?;
    let namespaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: no FILES flag: the table of descriptors stays as it is.
    unsafe { unshare_unsafe(namespaces) }.context(
        "unsharing the mount, network, IPC, UTS and cgroup namespaces (this program has to be started as root)",
    )?;
    mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("ending the propagation of our mounts to the host")?;
    let proc_fds = own_descriptors().context("mounting a proc file system for /proc/self/fd")?;
    // pivot_root wants a mount point, and the copy of the tree keeps its source's propagation.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, c".", flags)
        .context("copying it (it must lie in the mount namespace in which this process starts)")?;
    move_mount(&tree, c"", CWD, c".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context("mounting the copy")?;
    fchdir(&tree)?;
    // The old root comes to lie on top of the new one, and is taken off.
    pivot_root(c".", c".").context("pivot_root")?;
    unmount(c".", UnmountFlags::DETACH).context("unmounting the host")?;
    chdir(c"/")?;
    Ok(proc_fds)
}

/// The process's table of descriptors as a mount that consists of this directory alone and is attached nowhere: `..` in it
/// leads nowhere else. It is of a proc file system of our own pid namespace, which shows no process but this one.
fn own_descriptors() -> Result<OwnedFd> {
    let file_system = fsopen(c"proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&file_system, c"subset", c"pid")?;
    fsconfig_create(&file_system)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | NOSUID_NODEV_NOEXEC;
    let proc = fsmount(&file_system, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // Linux clones parts of attached mounts only (before 6.15). This one goes with the rest of the host's.
    move_mount(&proc, c"", CWD, c"/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(open_tree(CWD, c"/proc/self/fd", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?)
}

fn drop_privileges() -> Result<()> {
    // The last capability may be one that rustix has no name for: the kernel says where they end.
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if CAPABILITIES.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(errno) => {
                return Err(errno).with_context(|| format!("removing capability {number} from the bounding set"));
            }
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
        .context("dropping capabilities (this program has to be started as root)")?;
    // After the change of capabilities, which sets it anew.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("forbidding others to trace this process")
}
