//! The pod's shared directory: what the guest can see of the host. It is a small tmpfs in the shim's own mount
//! namespace, and each container's root file system is mounted in it. So whatever way the pod's processes end, the
//! kernel takes all of these mounts down with the namespace, and nothing of them was ever visible to the host.
//!
//! ```text
//!   shared/   tmpfs, read-write: only the shim writes here ──peers──  view/   the same, read-only: caisson-fsd's root
//!     └ <container>/rootfs   overlay, bind, …                           └ <container>/rootfs   (propagated)
//!     └ <container>/mounts/<index>   files and directories of the host  └ likewise
//!     └ .host   an empty directory, the guest's mount point             └ likewise
//! ```
//!
//! What is mounted there is nosuid, nodev and noexec: caisson-fsd may make device nodes for a guest, and even if a
//! guest took it over, it could open none of them. caisson-fsd gets the read-only view, because a guest that could
//! rename what lies at the top could steer the shim's next mount through a symbolic link out of the directory.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use caisson_protos::guest::HOST_SHARE_DIRECTORY;
use nix::{
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, SFlag, makedev, mknod},
};
use rustix::{
    fs::{CWD, OFlags, ResolveFlags, openat2},
    mount::{MoveMountFlags, move_mount},
};

use crate::{
    host::{namespaces::HostView, paths::PodPaths},
    rootfs::{
        binds::Source,
        mount::{Mount, MountError},
    },
};

/// A share that cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the pod's shared directory: {step}: {source}")]
pub struct ShareError {
    step: &'static str,
    source: io::Error,
}

/// A root file system that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// One of its mounts.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The mount point.
    #[error("cannot make the mount point {path}: {source}")]
    MountPoint {
        /// The path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// containerd passed no mounts, and the bundle has no directory either.
    #[error("containerd passed no root file system and {path} (root.path of config.json) is not a directory")]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
}

/// Moves the calling thread, which must be the process's only one, into a mount namespace of its own. What the host
/// mounts and unmounts later still arrives here; nothing goes the other way. The way back to the host's namespace.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
pub fn enter_mount_namespace() -> Result<HostView, ShareError> {
    let none = None::<&str>;
    let failed = |step| move |errno: nix::Error| ShareError { step, source: errno.into() };
    let host = HostView::here().map_err(|source| ShareError { step: "open the host's mount namespace", source })?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("unshare the mount namespace"))?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(failed("make mounts slaves of the host's"))?;
    Ok(host)
}

/// See the module's introduction.
#[derive(Debug)]
pub struct Share {
    shared: PathBuf,
    view: PathBuf,
    staging: PathBuf,
}

impl Share {
    /// Mounts the directory; [`PodPaths::create`] has made its mount points.
    ///
    /// # Errors
    /// [`ShareError`] names the step.
    pub fn mount(paths: &PodPaths) -> Result<Self, ShareError> {
        let none = None::<&str>;
        let failed = |step| move |errno: nix::Error| ShareError { step, source: errno.into() };
        let share = Self { shared: paths.shared(), view: paths.view(), staging: paths.staging() };
        let nothing = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        // Room for mount points and nothing else.
        let data = Some("mode=0700,size=1m,nr_inodes=4096");
        mount(Some("caisson"), &share.shared, Some("tmpfs"), nothing, data).map_err(failed("mount a tmpfs"))?;
        mount(none, &share.shared, none, MsFlags::MS_SHARED, none).map_err(failed("share its mounts"))?;
        fs::create_dir(share.shared.join(HOST_SHARE_DIRECTORY))
            .map_err(|source| ShareError { step: "make the guest's mount point", source })?;
        mount(Some(&share.shared), &share.view, none, MsFlags::MS_BIND, none).map_err(failed("make the view"))?;
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | nothing;
        mount(none, &share.view, none, read_only, none).map_err(failed("make the view read-only"))?;
        Ok(share)
    }

    /// The view, for caisson-fsd.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open_view(&self) -> Result<OwnedFd, ShareError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        open(&self.view, flags, Mode::empty())
            .map_err(|errno| ShareError { step: "open the view", source: errno.into() })
    }

    /// The root file system's place, relative to the shared directory: what the agent gets.
    pub fn rootfs_name(container: &str) -> String {
        format!("{container}/rootfs")
    }

    /// Mounts a container's root file system: `mounts` one upon the other or, if there are none, `fallback`.
    ///
    /// # Errors
    /// See [`RootfsError`]; then nothing of it remains.
    pub fn mount_rootfs(&self, container: &str, mounts: &[Mount], fallback: &Path) -> Result<Rootfs, RootfsError> {
        let directory = self.shared.join(container);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RootfsError::MountPoint { path, source }
        };
        fs::create_dir(&directory).map_err(failed(&directory))?;
        let rootfs = Rootfs { target: directory.join("rootfs"), directory };
        fs::create_dir(&rootfs.target).map_err(failed(&rootfs.target))?;
        if mounts.is_empty() {
            if !fallback.is_dir() {
                return Err(RootfsError::Missing { path: fallback.to_owned() });
            }
            let source = fallback.to_string_lossy().into_owned();
            let options = vec!["rbind".into(), "rw".into()];
            let bind = Mount { kind: "bind".into(), source, options, ..Mount::default() };
            bind.mount_restricted(&self.staging, &rootfs.target)?;
        }
        for mount in mounts {
            if mount.target.is_empty() {
                mount.mount_restricted(&self.staging, &rootfs.target)?;
            } else {
                let place = rootfs.open(&mount.target).map_err(failed(Path::new(&mount.target)))?;
                mount.mount_restricted(&self.staging, &proc_path(&place))?;
            }
        }
        Ok(rootfs)
    }

    /// A bind mount's place, relative to the shared directory: what the agent gets. By way of the connection for
    /// what the host's processes change, too.
    pub fn bind_name(container: &str, index: u32) -> String {
        format!("{HOST_SHARE_DIRECTORY}/{}", Self::bind_place(container, index))
    }

    /// Where it lies.
    pub fn bind_place(container: &str, index: u32) -> String {
        format!("{container}/mounts/{index}")
    }

    /// Puts a container's bind mounts into its directory, which [`Self::mount_rootfs`] has made.
    ///
    /// # Errors
    /// See [`RootfsError`]; then nothing of it remains.
    pub fn mount_binds(&self, container: &str, sources: Vec<(u32, Source)>) -> Result<Binds, RootfsError> {
        let directory = self.shared.join(container).join("mounts");
        let mut binds = Binds { directory, targets: Vec::new() };
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RootfsError::MountPoint { path, source }
        };
        fs::create_dir(&binds.directory).map_err(failed(&binds.directory))?;
        for (index, source) in sources {
            let target = binds.directory.join(index.to_string());
            match source {
                Source::Tree { tree, directory } => {
                    let made =
                        if directory { fs::create_dir(&target) } else { fs::File::create_new(&target).map(drop) };
                    made.map_err(failed(&target))?;
                    binds.targets.push((target.clone(), Target::Mount { directory }));
                    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                    move_mount(&tree, c"", CWD, &target, flags).map_err(|errno| failed(&target)(errno.into()))?;
                }
                Source::Same(_) => {}
                // The guest's kernel takes its own device for the number; on the host the node opens nothing (nodev).
                Source::Device(major, minor) => {
                    let mode = Mode::from_bits_truncate(0o666);
                    let number = makedev(major.into(), minor.into());
                    mknod(&target, SFlag::S_IFCHR, mode, number).map_err(|errno| failed(&target)(errno.into()))?;
                    binds.targets.push((target.clone(), Target::Node));
                    // Independent of the umask that the shim was started with.
                    let everybody = fs::Permissions::from_mode(0o666);
                    fs::set_permissions(&target, everybody).map_err(failed(&target))?;
                }
            }
        }
        Ok(binds)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        for directory in [&self.view, &self.shared] {
            // Lazily: caisson-fsd may still hold it. The namespace ends soon after, and all of it with it.
            let _ = umount2(directory, MntFlags::MNT_DETACH);
        }
    }
}

/// A mounted root file system. Dropped, it is unmounted.
#[derive(Debug)]
pub struct Rootfs {
    directory: PathBuf,
    target: PathBuf,
}

impl Rootfs {
    /// A directory or file in it. Links in its path lead nowhere outside of it.
    fn open(&self, path: &str) -> io::Result<OwnedFd> {
        let root = open(&self.target, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let path = path.trim_start_matches('/');
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(root, if path.is_empty() { "." } else { path }, flags, rustix::fs::Mode::empty(), resolve)?)
    }
}

/// A path that leads to an open file.
fn proc_path(file: &OwnedFd) -> PathBuf {
    format!("/proc/thread-self/fd/{}", file.as_raw_fd()).into()
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        // As many as were stacked; EINVAL says that there is none left.
        while umount2(&self.target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
        let _ = fs::remove_dir(&self.target);
        let _ = fs::remove_dir(&self.directory);
    }
}

/// What a bind mount's place holds.
#[derive(Clone, Copy, Debug)]
enum Target {
    Mount { directory: bool },
    Node,
}

/// A container's bind mounts. Dropped, they are unmounted.
#[derive(Debug)]
pub struct Binds {
    directory: PathBuf,
    targets: Vec<(PathBuf, Target)>,
}

impl Drop for Binds {
    fn drop(&mut self) {
        for (target, kind) in self.targets.iter().rev() {
            // With all that is mounted below it.
            let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let _ = match kind {
                Target::Mount { directory: true } => fs::remove_dir(target),
                Target::Mount { directory: false } | Target::Node => fs::remove_file(target),
            };
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

#[cfg(test)]
mod tests;
