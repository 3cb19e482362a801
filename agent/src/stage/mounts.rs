//! Mounting by descriptor: a file system is made detached, configured option by option, and attached to a place that
//! the kernel has resolved inside the container's root. No path is looked up twice.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    io::{Errno, Result},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    },
};

use super::{inroot::Root, rootfs::set_propagation};
use crate::{
    plan::{Failure, FailureKind, MountPlan, Trying},
    sys,
};

/// Mounts everything in order. Returns the mounts that become read-only once all is in place.
pub(super) fn mount_all<'p>(
    root: &Root,
    plans: &'p [MountPlan],
) -> std::result::Result<Vec<(&'p Path, OwnedFd)>, Failure> {
    let mut read_only = Vec::new();
    for plan in plans {
        let mount = one(root, plan)?;
        if plan.read_only {
            read_only.push((plan.destination.as_path(), mount));
        }
    }
    Ok(read_only)
}

fn one(root: &Root, plan: &MountPlan) -> std::result::Result<OwnedFd, Failure> {
    let named = || format!("mounts[{}]: {} on {}", plan.index, plan.fs_type, plan.destination.display());
    let invalid =
        |what: &str, error: Errno| Failure::new(FailureKind::Invalid, format!("{}: {what}: {error}", named()));
    let place = root.make_directories(&plan.destination).map_err(|error| invalid("make the mount point", error))?;
    // A link here would let the image choose where masked and read-only paths of /proc and /sys come to lie.
    if matches!(plan.fs_type.as_str(), "proc" | "sysfs" | "cgroup2") {
        root.find_plain_directory(&plan.destination)
            .map_err(|error| invalid("the mount point must not lead through a symbolic link", error))?;
    }
    let fs = fsopen(plan.fs_type.as_str(), FsOpenFlags::FSOPEN_CLOEXEC).trying(named)?;
    fsconfig_set_string(fs.as_fd(), "source", plan.source.as_str()).trying(named)?;
    for (key, value) in &plan.options {
        match value {
            Some(value) => fsconfig_set_string(fs.as_fd(), key.as_str(), value.as_str()),
            None => fsconfig_set_flag(fs.as_fd(), key.as_str()),
        }
        .map_err(|error| match value {
            Some(value) => invalid(&format!("option {key:?} with value {value:?}"), error),
            None => invalid(&format!("option {key:?}"), error),
        })?;
    }
    fsconfig_create(fs.as_fd()).map_err(|error| match error {
        Errno::INVAL => invalid("options", error),
        _ => Failure::new(FailureKind::Internal, format!("{}: {error}", named())),
    })?;
    let attributes = MountAttrFlags::from_bits_retain(plan.attributes);
    let mount = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).trying(named)?;
    if let Some(kind) = plan.propagation {
        set_propagation(mount.as_fd(), MountPropagationFlags::from_bits_retain(kind)).trying(named)?;
    }
    attach(mount.as_fd(), place.as_fd()).trying(named)?;
    Ok(mount)
}

/// A file system that is mounted nowhere.
pub(super) fn detached(fs_type: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> Result<OwnedFd> {
    let fs = fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(fs.as_fd(), *key, *value)?;
    }
    fsconfig_create(fs.as_fd())?;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// An empty directory that cannot be written.
pub(super) fn empty_directory() -> Result<OwnedFd> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    detached("tmpfs", &[("mode", "755"), ("nr_inodes", "1")], attributes)
}

/// Puts a detached mount on a place.
pub(super) fn attach(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<()> {
    move_mount(mount, "", place, "", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH)
}

/// Makes a mount read-only, with everything below it if `recursive`.
pub(super) fn set_read_only(mount: BorrowedFd<'_>, recursive: bool) -> std::io::Result<()> {
    sys::mount_setattr(mount, MountAttrFlags::MOUNT_ATTR_RDONLY, MountPropagationFlags::empty(), recursive)
}
