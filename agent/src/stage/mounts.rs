//! Mounting by descriptor: a file system is made detached, configured option by option, and attached to a place that
//! the kernel has resolved inside the container's root. No path is looked up twice.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{FileType, Mode, OFlags, fchmod, fstat, fstatfs, openat},
    io::{Errno, Result},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    },
};

use super::{copyup, inroot::Root};
use crate::{
    plan::{Failure, FailureKind, MountPlan, MountSource, Trying},
    spec::mounts::COVERABLE,
};

/// PROC_SUPER_MAGIC of include/uapi/linux/magic.h.
const PROC_MAGIC: u64 = 0x9fa0;

/// What a mount is called in messages.
pub(super) fn named(plan: &MountPlan) -> String {
    let what = match &plan.source {
        MountSource::FileSystem { fs_type, .. } => fs_type,
        MountSource::Bind { .. } => "bind",
    };
    format!("mounts[{}]: {what} on {}", plan.index, plan.destination.display())
}

fn invalid(plan: &MountPlan, what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(FailureKind::Invalid, format!("{}: {what}: {error}", named(plan)))
}

fn no_source(plan: &MountPlan) -> Failure {
    Failure::new(FailureKind::Internal, format!("{}: no source", named(plan)))
}

/// Makes a new file system, mounted nowhere.
pub(super) fn make(plan: &MountPlan) -> std::result::Result<OwnedFd, Failure> {
    let MountSource::FileSystem { fs_type, .. } = &plan.source else { return Err(no_source(plan)) };
    let fs = fsopen(fs_type.as_str(), FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
        Errno::NODEV => invalid(plan, "type", "this guest has no such file system"),
        _ => Failure::new(FailureKind::Internal, format!("{}: {error}", named(plan))),
    })?;
    make_from(plan, &fs)
}

/// The same from a context of the right type that nobody has configured.
pub(super) fn make_from(plan: &MountPlan, fs: &OwnedFd) -> std::result::Result<OwnedFd, Failure> {
    let MountSource::FileSystem { name, options, .. } = &plan.source else { return Err(no_source(plan)) };
    let what = || named(plan);
    fsconfig_set_string(fs.as_fd(), "source", name.as_str()).trying(what)?;
    for (key, value) in options {
        match value {
            Some(value) => fsconfig_set_string(fs.as_fd(), key.as_str(), value.as_str()),
            None => fsconfig_set_flag(fs.as_fd(), key.as_str()),
        }
        .map_err(|error| match value {
            Some(value) => invalid(plan, &format!("option {key:?} with value {value:?}"), error),
            None => invalid(plan, &format!("option {key:?}"), error),
        })?;
    }
    fsconfig_create(fs.as_fd()).map_err(|error| match error {
        Errno::INVAL => invalid(plan, "options", error),
        Errno::PERM => invalid(plan, "the container's user namespace may not", error),
        _ => Failure::new(FailureKind::Internal, format!("{}: {error}", what())),
    })?;
    let attributes = MountAttrFlags::from_bits_retain(plan.attributes.set);
    let mount = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).trying(what)?;
    spread(mount.as_fd(), &plan.propagation).trying(what)?;
    Ok(mount)
}

/// Attaches everything in order. Returns the mounts that become read-only once all is in place.
pub(super) fn place_all<'p>(
    root: &Root,
    plans: &'p [MountPlan],
    mounts: Vec<OwnedFd>,
) -> std::result::Result<Vec<(&'p Path, OwnedFd)>, Failure> {
    let mut read_only = Vec::new();
    for (plan, mount) in plans.iter().zip(mounts) {
        place(root, plan, &mount)?;
        if plan.read_only {
            read_only.push((plan.destination.as_path(), mount));
        }
    }
    Ok(read_only)
}

fn place(root: &Root, plan: &MountPlan, mount: &OwnedFd) -> std::result::Result<(), Failure> {
    let fs_type = match &plan.source {
        MountSource::FileSystem { fs_type, .. } => fs_type.as_str(),
        MountSource::Bind { .. } => "",
    };
    let before = root.find(&plan.destination).ok();
    let is_directory = is_directory(mount.as_fd()).trying(|| named(plan))?;
    let kind = if is_directory { "directory" } else { "file" };
    let target =
        if is_directory { root.make_directories(&plan.destination) } else { root.make_file(&plan.destination) };
    let target = target.map_err(|error| invalid(plan, &format!("find or make the {kind} to mount on"), error))?;
    if self::is_directory(target.as_fd()).trying(|| named(plan))? != is_directory {
        return Err(invalid(plan, "the mount point", format!("is no {kind} as its source is")));
    }
    check_place(root, plan, fs_type, target.as_fd())?;
    if fs_type == "tmpfs"
        && let Some(before) = before
    {
        as_before(plan, before.as_fd(), mount.as_fd()).trying(|| named(plan))?;
        if plan.copy_up {
            copyup::copy(before.as_fd(), mount.as_fd()).map_err(|error| invalid(plan, "tmpcopyup", error))?;
        }
    }
    attach(mount.as_fd(), target.as_fd()).trying(|| named(plan))
}

fn is_directory(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(FileType::from_raw_mode(fstat(fd)?.st_mode).is_dir())
}

fn check_place(
    root: &Root,
    plan: &MountPlan,
    fs_type: &str,
    target: BorrowedFd<'_>,
) -> std::result::Result<(), Failure> {
    // A link here would let the image choose where masked and read-only paths of /proc and /sys come to lie.
    if matches!(fs_type, "proc" | "sysfs" | "cgroup2") {
        root.find_plain_directory(&plan.destination)
            .map_err(|error| invalid(plan, "the mount point must not lead through a symbolic link", error))?;
    }
    // The specification has been checked for this; the image may have links that lead there.
    let in_proc = fstatfs(target).trying(|| named(plan))?.f_type as u64 == PROC_MAGIC;
    let meant = COVERABLE.iter().any(|path| plan.destination == Path::new(path))
        || (fs_type == "proc" && plan.destination == Path::new("/proc"));
    if in_proc && !meant {
        return Err(invalid(plan, "the mount point", "it leads into /proc, which cannot be covered"));
    }
    Ok(())
}

/// A new tmpfs has the mode of the directory that it covers, unless its options say another.
fn as_before(plan: &MountPlan, before: BorrowedFd<'_>, mount: BorrowedFd<'_>) -> Result<()> {
    if let MountSource::FileSystem { options, .. } = &plan.source
        && options.iter().any(|(key, _)| key == "mode")
    {
        return Ok(());
    }
    let mode = Mode::from_raw_mode(fstat(before)?.st_mode);
    let top = openat(mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    fchmod(&top, mode)
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
    caisson_mount::restrict(mount, MountAttrFlags::MOUNT_ATTR_RDONLY, recursive)
}

/// Changes how changes below the mount spread: MS_* each, in order.
pub(super) fn spread(mount: BorrowedFd<'_>, kinds: &[u32]) -> std::io::Result<()> {
    let nothing = MountAttrFlags::empty();
    kinds.iter().try_for_each(|kind| {
        let kind = MountPropagationFlags::from_bits_retain(*kind);
        let recursive = kind.contains(MountPropagationFlags::REC);
        caisson_mount::set_attributes(mount, nothing, nothing, kind - MountPropagationFlags::REC, recursive)
    })
}
