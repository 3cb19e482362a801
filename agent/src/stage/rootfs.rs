//! The container's file systems, from an empty mount namespace to the finished view.
//!
//! ```text
//! prepare  all mounts private ─► bind the root file system ─► pivot_root, detach the guest's ─► mounts ─► devices
//!              ─► names and kernel settings          (then the terminal, which may become /dev/console)
//! seal     read-only mounts ─► read-only and masked paths ─► read-only root
//! ```
//!
//! The guest's own tree is gone before the first path of the image is touched, so even a mistake in what follows could
//! not reach it.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, makedev, openat},
    io::Errno,
    mount::{MountAttrFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount_change, open_tree, unmount},
    process::{fchdir, pivot_root},
};

use super::{
    devices,
    inroot::{Root, open_beneath},
    mounts::{attach, mount_all, set_read_only},
};
use crate::{
    plan::{Failure, FailureKind, InitPlan, Trying, View},
    sys,
};

/// A container's root, in which everything may still be changed.
pub(super) struct Unsealed<'p> {
    pub(super) root: Root,
    read_only: Vec<(&'p Path, OwnedFd)>,
}

/// Builds the view of a new container; the calling process is inside afterwards, at its root.
pub(super) fn prepare(plan: &InitPlan) -> Result<Unsealed<'_>, Failure> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .trying(|| "make the mounts private".into())?;
    let root = enter_root(plan)?;

    // What is made from here on has exactly the mode that it asks for.
    rustix::process::umask(Mode::empty());
    let view = &plan.view;
    let read_only = mount_all(&root, &view.mounts)?;
    devices::make(&root, view)?;
    name_system(view)?;
    set_kernel_settings(view)?;
    make_working_directory(&root, &plan.process.cwd)?;
    Ok(Unsealed { root, read_only })
}

/// Takes away what the program may not change or see.
pub(super) fn seal(unsealed: Unsealed<'_>, view: &View) -> Result<Root, Failure> {
    let Unsealed { root, read_only } = unsealed;
    for (path, mount) in read_only {
        set_read_only(mount.as_fd(), false).trying(|| format!("make {} read-only", path.display()))?;
    }
    for path in &view.readonly_paths {
        make_read_only(&root, path).trying(|| format!("linux.readonlyPaths: {}", path.display()))?;
    }
    for path in &view.masked_paths {
        mask(&root, path).trying(|| format!("linux.maskedPaths: {}", path.display()))?;
    }
    if view.readonly_root {
        set_read_only(root.directory(), false).trying(|| "make the root read-only".into())?;
    }
    Ok(root)
}

fn enter_root(plan: &InitPlan) -> Result<Root, Failure> {
    let named = || format!("root file system {} in {}", plan.rootfs.display(), plan.share.display());
    let share = openat(CWD, &plan.share, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let share = share.trying(|| format!("open {}", plan.share.display()))?;
    let place = open_beneath(share.as_fd(), &plan.rootfs).map_err(|error| {
        let kind = if matches!(error, Errno::NOENT | Errno::LOOP | Errno::XDEV | Errno::NOTDIR) {
            FailureKind::Invalid
        } else {
            FailureKind::Internal
        };
        Failure::new(kind, format!("open the {}: {error}", named()))
    })?;
    let root = clone_tree(place.as_fd(), true).trying(|| format!("bind the {}", named()))?;
    attach(root.as_fd(), place.as_fd()).trying(|| format!("mount the {}", named()))?;

    let old = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let old = old.trying(|| "open the guest's root".into())?;
    fchdir(&root).trying(|| format!("enter the {}", named()))?;
    // The old root comes to lie on top of the new one and is detached from there, so no directory of the
    // image is needed to hold it.
    pivot_root(".", ".").trying(|| format!("make the {} the root", named()))?;
    fchdir(&old).trying(|| "enter the guest's root".into())?;
    unmount(".", UnmountFlags::DETACH).trying(|| "detach the guest's root".into())?;
    rustix::process::chdir("/").trying(|| "enter the container's root".into())?;
    Ok(Root::new(root))
}

/// A detached copy of the mount at `place`.
fn clone_tree(place: BorrowedFd<'_>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(place, "", flags)
}

fn make_read_only(root: &Root, path: &Path) -> std::io::Result<()> {
    let place = match root.find(path) {
        Err(Errno::NOENT) => return Ok(()),
        place => place?,
    };
    let copy = clone_tree(place.as_fd(), true)?;
    set_read_only(copy.as_fd(), true)?;
    Ok(attach(copy.as_fd(), place.as_fd())?)
}

fn mask(root: &Root, path: &Path) -> std::io::Result<()> {
    let place = match root.find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        place => place?,
    };
    let cover = if FileType::from_raw_mode(fstat(&place)?.st_mode).is_dir() {
        super::mounts::empty_directory()?
    } else {
        clone_tree(null_device(root)?.as_fd(), false)?
    };
    Ok(attach(cover.as_fd(), place.as_fd())?)
}

/// The container's own /dev/null, if it is the real one.
fn null_device(root: &Root) -> std::io::Result<OwnedFd> {
    let null = root.find(Path::new("/dev/null"))?;
    let found = fstat(&null)?;
    if FileType::from_raw_mode(found.st_mode).is_char_device() && found.st_rdev == makedev(1, 3) {
        Ok(null)
    } else {
        Err(std::io::Error::other("the container's /dev/null is not the null device"))
    }
}

fn make_working_directory(root: &Root, cwd: &Path) -> Result<(), Failure> {
    // As runc does. What cannot be made (a read-only mount, a file in the way) is told when the process enters it.
    match root.make_directories(cwd) {
        Ok(_) | Err(Errno::NOTDIR | Errno::ROFS | Errno::NOENT | Errno::LOOP | Errno::ACCESS) => Ok(()),
        Err(error) => Err(error).trying(|| format!("process.cwd: make {}", cwd.display())),
    }
}

fn name_system(view: &View) -> Result<(), Failure> {
    if let Some(name) = &view.hostname {
        rustix::system::sethostname(name.as_bytes()).trying(|| format!("set the host name {name:?}"))?;
    }
    if let Some(name) = &view.domainname {
        rustix::system::setdomainname(name.as_bytes()).trying(|| format!("set the domain name {name:?}"))?;
    }
    Ok(())
}

fn set_kernel_settings(view: &View) -> Result<(), Failure> {
    if view.sysctl.is_empty() {
        return Ok(());
    }
    // Through a /proc of our own that is mounted nowhere: the container's may be anything.
    let proc = super::mounts::detached("proc", &[], MountAttrFlags::empty()).trying(|| "open /proc/sys".into())?;
    for (path, value) in &view.sysctl {
        let named = || format!("linux.sysctl: set {} to {value:?}", path.display());
        let file = openat(&proc, Path::new("sys").join(path), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(|error| Failure::new(FailureKind::Invalid, format!("{}: {error}", named())))?;
        rustix::io::write(&file, value.as_bytes())
            .map_err(|error| Failure::new(FailureKind::Invalid, format!("{}: {error}", named())))?;
    }
    Ok(())
}

/// Changes only how changes below the mount spread.
pub(super) fn set_propagation(mount: BorrowedFd<'_>, kind: MountPropagationFlags) -> std::io::Result<()> {
    let recursive = kind.contains(MountPropagationFlags::REC);
    sys::mount_setattr(mount, MountAttrFlags::empty(), kind - MountPropagationFlags::REC, recursive)
}
