//! What a new container needs of the guest's side, taken while that is still in sight and with the rights of the
//! guest's root: its root file system, the sources of its bind mounts, and what a user namespace cannot make itself.
//!
//! Everything becomes a detached mount behind a descriptor, with its attributes set. Nothing is looked up by name
//! later.

use std::{
    fs,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::chown,
    },
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, major, minor, openat},
    io::Errno,
    mount::{MountAttrFlags, MountPropagationFlags, OpenTreeFlags, open_tree},
};

use super::{birth, inroot::find_beneath, joined, mounts};
use crate::plan::{
    DeviceKind, DevicePlan, Failure, FailureKind, InitPlan, MountPlan, MountSource, NamespaceKind, Trying,
};

/// Detached mounts.
pub(super) struct Gathered {
    /// The root file system.
    pub(super) root: OwnedFd,
    /// For each mount of the plan, if it is not for the container to make.
    pub(super) mounts: Vec<Option<OwnedFd>>,
    /// For each device of the plan, if the container cannot make it.
    pub(super) devices: Vec<Option<OwnedFd>>,
    /// The guest's null device, whatever the container makes of its own.
    pub(super) null: OwnedFd,
}

/// `pid` is the pid namespace that the container joins, if it joins one.
pub(super) fn gather(plan: &InitPlan, pid: Option<&OwnedFd>) -> Result<Gathered, Failure> {
    let share = openat(CWD, &plan.share, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let share = share.trying(|| format!("open {}", plan.share.display()))?;
    let has_users = plan.namespaces.has_users();
    let mounts = plan.view.mounts.iter().map(|mount| match &mount.source {
        MountSource::Bind { path, recursive } => bind(share.as_fd(), mount, path, *recursive).map(Some),
        // It shows the namespace of whoever opens it, which the stage is not in.
        MountSource::FileSystem { fs_type, .. } if fs_type == "proc" && pid.is_some() => {
            let context = pid.map(joined::open_proc).transpose()?;
            context.map(|context| mounts::make_from(mount, &context)).transpose()
        }
        // The pod's network, which it shows, belongs to the guest's root.
        MountSource::FileSystem { fs_type, .. } if fs_type == "sysfs" && has_users => mounts::make(mount).map(Some),
        MountSource::FileSystem { .. } => Ok(None),
    });
    let devices = plan.view.devices.iter().map(|device| match device.kind {
        DeviceKind::Char | DeviceKind::Block if has_users => guest_device(device).map(Some),
        _ => Ok(None),
    });
    delegate(plan)?;
    if has_users {
        // The pod's network is not the user namespace's to set.
        for (path, value) in plan.view.sysctl.iter().filter(|(path, _)| path.starts_with("net")) {
            fs::write(Path::new("/proc/sys").join(path), value).map_err(|error| {
                let message = format!("linux.sysctl: set {} to {value:?}: {error}", path.display());
                Failure::new(FailureKind::Invalid, message)
            })?;
        }
    }
    Ok(Gathered {
        root: root(share.as_fd(), plan)?,
        mounts: mounts.collect::<Result<_, _>>()?,
        devices: devices.collect::<Result<_, _>>()?,
        null: device_at(Path::new("/dev/null"), FileType::CharacterDevice, (1, 3))
            .trying(|| "take the guest's /dev/null".into())?,
    })
}

/// Who can write to the container's cgroup from inside shall own it: what the kernel lists as safe to hand over, as runc
/// does.
fn delegate(plan: &InitPlan) -> Result<(), Failure> {
    let writable = plan.view.mounts.iter().any(|mount| match &mount.source {
        MountSource::FileSystem { fs_type, .. } => {
            fs_type == "cgroup2" && !mount.read_only && mount.destination == Path::new("/sys/fs/cgroup")
        }
        MountSource::Bind { .. } => false,
    });
    let owner = plan.namespaces.ids.uid(plan.process.user.uid).filter(|uid| *uid != 0);
    let (Some(owner), true, true) = (owner, writable, plan.namespaces.makes(NamespaceKind::Cgroup)) else {
        return Ok(());
    };
    let own = |path: &Path| match chown(path, Some(owner), None) {
        // A file of a controller that is not there.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.trying(|| format!("give {} to user {owner}", path.display())),
    };
    let files =
        fs::read_to_string("/sys/kernel/cgroup/delegate").trying(|| "read what a cgroup can hand over".into())?;
    own(&plan.cgroup)?;
    files.lines().try_for_each(|file| own(&plan.cgroup.join(file)))
}

fn root(share: BorrowedFd<'_>, plan: &InitPlan) -> Result<OwnedFd, Failure> {
    let named = || format!("root file system {} in {}", plan.rootfs.display(), plan.share.display());
    let place = find_beneath(share, &plan.rootfs, OFlags::DIRECTORY);
    let place = place.map_err(|error| Failure::new(blame(error), format!("open the {}: {error}", named())))?;
    clone_tree(place.as_fd(), true).trying(|| format!("bind the {}", named()))
}

/// Who is to blame for a path below the shared directory that cannot be opened.
fn blame(error: Errno) -> FailureKind {
    match error {
        Errno::NOENT | Errno::LOOP | Errno::XDEV | Errno::NOTDIR => FailureKind::Invalid,
        _ => FailureKind::Internal,
    }
}

fn bind(share: BorrowedFd<'_>, plan: &MountPlan, path: &Path, recursive: bool) -> Result<OwnedFd, Failure> {
    let named = || mounts::named(plan);
    let place = find_beneath(share, path, OFlags::empty());
    let place = place.map_err(|error| Failure::new(blame(error), format!("{}: open {path:?}: {error}", named())))?;
    let mount = clone_tree(place.as_fd(), recursive).trying(named)?;
    if let Some(ids) = &plan.ids {
        let users = birth::user_namespace(&ids.maps)?;
        caisson_mount::map_ids(mount.as_fd(), users.as_fd(), ids.recursive).map_err(|error| {
            let problem = match error.raw_os_error() {
                Some(libc::EINVAL | libc::EOPNOTSUPP) => "the file system cannot map ids in this guest".to_owned(),
                _ => error.to_string(),
            };
            Failure::new(FailureKind::Invalid, format!("{}: uidMappings and gidMappings: {problem}", named()))
        })?;
    }
    for (attributes, recursive) in [(plan.attributes, false), (plan.recursive, true)] {
        let (set, clear) =
            (MountAttrFlags::from_bits_retain(attributes.set), MountAttrFlags::from_bits_retain(attributes.clear));
        caisson_mount::set_attributes(mount.as_fd(), set, clear, MountPropagationFlags::empty(), recursive)
            .map_err(|error| Failure::new(FailureKind::Invalid, format!("{}: options: {error}", named())))?;
    }
    mounts::spread(mount.as_fd(), &plan.propagation).trying(named)?;
    Ok(mount)
}

/// The guest's own node; a user namespace cannot make one that works.
fn guest_device(device: &DevicePlan) -> Result<OwnedFd, Failure> {
    let kind = match device.kind {
        DeviceKind::Block => FileType::BlockDevice,
        _ => FileType::CharacterDevice,
    };
    device_at(&device.path, kind, (device.major, device.minor)).map_err(|error| {
        let message = format!(
            "linux.devices: {}: a container with a user namespace can only have the guest's own node of that path: {error}",
            device.path.display()
        );
        Failure::new(FailureKind::Invalid, message)
    })
}

fn device_at(path: &Path, kind: FileType, number: (u32, u32)) -> std::io::Result<OwnedFd> {
    let node = openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let found = fstat(&node)?;
    if FileType::from_raw_mode(found.st_mode) != kind || (major(found.st_rdev), minor(found.st_rdev)) != number {
        return Err(std::io::Error::other("the guest has another device there"));
    }
    Ok(clone_tree(node.as_fd(), false)?)
}

/// A detached copy of the mount at `place`.
pub(super) fn clone_tree(place: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(place, "", flags)
}
