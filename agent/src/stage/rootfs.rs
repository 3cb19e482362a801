//! The container's file systems, from an empty mount namespace to the finished view.
//!
//! ```text
//! (gather  root file system, sources of bind mounts: before this process is in the container's namespaces)
//! prepare  all mounts private ─► names and kernel settings ─► new file systems, mounted nowhere yet
//!              ─► root file system on top, pivot_root, detach the guest's ─► mounts in place ─► devices
//!              (then the terminal, which may become /dev/console, and hooks)
//! seal     read-only mounts ─► read-only and masked paths ─► read-only root ─► propagation
//! ```
//!
//! The guest's own tree is gone before the first path of the image is touched, so even a mistake in what follows could
//! not reach it. File systems are made before, because in a user namespace the kernel gives a new /proc only to whom an
//! old one is in sight.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    io::Errno,
    mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_change, unmount},
    process::{fchdir, pivot_root},
};

use super::{
    devices,
    gather::{Gathered, clone_tree},
    inroot::Root,
    mounts::{attach, make, place_all, set_read_only, spread},
};
use crate::plan::{Failure, FailureKind, InitPlan, Trying, View};

/// A container's root, in which everything may still be changed.
pub(super) struct Unsealed<'p> {
    pub(super) root: Root,
    read_only: Vec<(&'p Path, OwnedFd)>,
    null: OwnedFd,
}

/// Builds the view of a new container; the calling process is inside afterwards, at its root.
pub(super) fn prepare(plan: &InitPlan, gathered: Gathered) -> Result<Unsealed<'_>, Failure> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .trying(|| "make the mounts private".into())?;
    let view = &plan.view;
    name_system(view)?;
    set_kernel_settings(plan)?;
    let mounts = view.mounts.iter().zip(gathered.mounts);
    let mounts = mounts.map(|(plan, given)| given.map_or_else(|| make(plan), Ok)).collect::<Result<Vec<_>, _>>()?;
    let root = enter_root(gathered.root)?;

    // What is made from here on has exactly the mode that it asks for.
    rustix::process::umask(Mode::empty());
    let read_only = place_all(&root, &view.mounts, mounts)?;
    if !view.foreign_dev {
        devices::make(&root, view, gathered.devices)?;
    }
    make_working_directory(&root, &plan.process.cwd)?;
    Ok(Unsealed { root, read_only, null: gathered.null })
}

/// Takes away what the program may not change or see.
pub(super) fn seal(unsealed: Unsealed<'_>, view: &View) -> Result<Root, Failure> {
    let Unsealed { root, read_only, null } = unsealed;
    for (path, mount) in read_only {
        set_read_only(mount.as_fd(), false).trying(|| format!("make {} read-only", path.display()))?;
    }
    for path in &view.readonly_paths {
        make_read_only(&root, path).trying(|| format!("linux.readonlyPaths: {}", path.display()))?;
    }
    let mut cover = Cover { null, attached: false };
    for path in &view.masked_paths {
        mask(&root, path, &mut cover).trying(|| format!("linux.maskedPaths: {}", path.display()))?;
    }
    if view.readonly_root {
        set_read_only(root.directory(), false).trying(|| "make the root read-only".into())?;
    }
    if let Some(kind) = view.root_propagation {
        spread(root.directory(), &[kind]).trying(|| "linux.rootfsPropagation".into())?;
    }
    Ok(root)
}

/// Makes `root`, a detached mount, the root of this process's mount namespace.
pub(super) fn enter_root(root: OwnedFd) -> Result<Root, Failure> {
    let old = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let old = old.trying(|| "open the guest's root".into())?;
    attach(root.as_fd(), old.as_fd()).trying(|| "mount the root file system".into())?;
    fchdir(&root).trying(|| "enter the root file system".into())?;
    // The old root comes to lie on top of the new one and is detached from there, so no directory of the
    // image is needed to hold it.
    pivot_root(".", ".").trying(|| "make the root file system the root".into())?;
    fchdir(&old).trying(|| "enter the guest's root".into())?;
    unmount(".", UnmountFlags::DETACH).trying(|| "detach the guest's root".into())?;
    rustix::process::chdir("/").trying(|| "enter the container's root".into())?;
    Ok(Root::new(root))
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

/// The guest's null device as a mount, which covers files. The container's own could be anything by now.
struct Cover {
    null: OwnedFd,
    /// Only what is mounted somewhere in this namespace can be copied.
    attached: bool,
}

fn mask(root: &Root, path: &Path, cover: &mut Cover) -> std::io::Result<()> {
    let place = match root.find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        place => place?,
    };
    if FileType::from_raw_mode(fstat(&place)?.st_mode).is_dir() {
        attach(super::mounts::empty_directory()?.as_fd(), place.as_fd())?;
    } else if cover.attached {
        attach(clone_tree(cover.null.as_fd(), false)?.as_fd(), place.as_fd())?;
    } else {
        attach(cover.null.as_fd(), place.as_fd())?;
        cover.attached = true;
    }
    Ok(())
}

fn make_working_directory(root: &Root, cwd: &Path) -> Result<(), Failure> {
    // As runc does. What cannot be made (a read-only mount, a file in the way) is reported when the process enters it.
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

fn set_kernel_settings(plan: &InitPlan) -> Result<(), Failure> {
    // With users of its own the container has no say in these, and they are set already.
    let has_users = plan.namespaces.has_users();
    let own = plan.view.sysctl.iter().filter(|(path, _)| !(has_users && path.starts_with("net")));
    let mut own = own.peekable();
    if own.peek().is_none() {
        return Ok(());
    }
    // Through a /proc of our own that is mounted nowhere: the container's may be anything.
    let proc = super::mounts::detached("proc", &[], MountAttrFlags::empty()).trying(|| "open /proc/sys".into())?;
    for (path, value) in own {
        let named = || format!("linux.sysctl: set {} to {value:?}", path.display());
        let file = openat(&proc, Path::new("sys").join(path), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(|error| Failure::new(FailureKind::Invalid, format!("{}: {error}", named())))?;
        rustix::io::write(&file, value.as_bytes())
            .map_err(|error| Failure::new(FailureKind::Invalid, format!("{}: {error}", named())))?;
    }
    Ok(())
}
