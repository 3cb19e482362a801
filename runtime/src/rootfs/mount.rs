//! Mounts as containerd describes them: a type, a source, and options of which some are flags of mount(2), some change
//! propagation, and the rest goes to the file system as data. The meaning of each option is that of containerd's
//! own mount package, because snapshotters write for it.
//!
//! The kernel takes one page of data. An overlay of many layers needs more, so its lower directories are
//! then named relative to the directory that they share, which becomes the working directory for the one call.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use caisson_mount::{NOSUID_NODEV_NOEXEC, restrict, set_attributes};
use nix::{
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::Mode,
    unistd::{chdir, fchdir},
};
use rustix::mount::{MountAttrFlags, MountPropagationFlags};

/// One mount of a root file system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// The file system's type, or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// As containerd names them.
    pub options: Vec<String>,
    /// Where in the root file system it is mounted; empty for its root.
    pub target: String,
}

/// A mount that did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount the root file system: type {kind:?}, source {from:?}, options {options:?}: {reason}")]
pub struct MountError {
    kind: String,
    from: String,
    options: String,
    reason: String,
}

/// Bytes of data that mount(2) takes: a page with its terminating zero.
const MAX_DATA: usize = 4095;
/// In an error message no more of the options than this, characters.
const MAX_SHOWN: usize = 1024;

/// The calls that one [`Mount`] comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    flags: MsFlags,
    propagation: MsFlags,
    data: String,
    directory: Option<String>,
}

const PROPAGATION: MsFlags =
    MsFlags::MS_SHARED.union(MsFlags::MS_PRIVATE).union(MsFlags::MS_SLAVE).union(MsFlags::MS_UNBINDABLE);

/// A flag and whether the option sets it (or clears it).
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "atime" => (MsFlags::MS_NOATIME, false),
        "bind" => (MsFlags::MS_BIND, true),
        "defaults" => (MsFlags::empty(), true),
        "dev" => (MsFlags::MS_NODEV, false),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "mand" => (MsFlags::MS_MANDLOCK, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "nodev" => (MsFlags::MS_NODEV, true),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "nomand" => (MsFlags::MS_MANDLOCK, false),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "private" => (MsFlags::MS_PRIVATE, true),
        "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "remount" => (MsFlags::MS_REMOUNT, true),
        "ro" => (MsFlags::MS_RDONLY, true),
        "rprivate" => (MsFlags::MS_PRIVATE.union(MsFlags::MS_REC), true),
        "rshared" => (MsFlags::MS_SHARED.union(MsFlags::MS_REC), true),
        "rslave" => (MsFlags::MS_SLAVE.union(MsFlags::MS_REC), true),
        "runbindable" => (MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC), true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "shared" => (MsFlags::MS_SHARED, true),
        "slave" => (MsFlags::MS_SLAVE, true),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "unbindable" => (MsFlags::MS_UNBINDABLE, true),
        _ => return None,
    })
}

impl Plan {
    /// Reads the options of a mount of type `kind`.
    ///
    /// # Errors
    /// A sentence, if they cannot be given to the kernel.
    pub fn new(kind: &str, options: &[String]) -> Result<Self, String> {
        if kind.starts_with("fuse.") || kind.starts_with("fuse3.") {
            return Err("file systems that need a mount.fuse program are not supported".into());
        }
        let (mut flags, mut data) = (MsFlags::empty(), Vec::new());
        for option in options {
            match flag(option) {
                Some((bits, true)) => flags |= bits,
                Some((bits, false)) => flags &= !bits,
                None if option == "loop" => return Err("loop mounts are not supported".into()),
                None => data.push(option.as_str()),
            }
        }
        let mut plan = Self {
            flags: flags & !PROPAGATION,
            propagation: flags & PROPAGATION,
            data: data.join(","),
            directory: None,
        };
        if plan.data.len() > MAX_DATA
            && kind == "overlay"
            && let Some((directory, shorter)) = relative_to_common(&data)
        {
            plan.directory = Some(directory);
            plan.data = shorter;
        }
        if plan.data.len() > MAX_DATA {
            return Err(format!("{} bytes of options, the kernel takes {MAX_DATA}: use fewer layers", plan.data.len()));
        }
        Ok(plan)
    }

    fn run(&self, kind: &str, source: &str, target: &Path) -> io::Result<()> {
        let none = None::<&str>;
        if !self.flags.contains(MsFlags::MS_REMOUNT) || !self.data.is_empty() {
            let back = open(".", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
            if let Some(directory) = &self.directory {
                chdir(directory.as_str())?;
            }
            let mounted = mount(Some(source), target, Some(kind), self.flags, Some(self.data.as_str()));
            if self.directory.is_some() {
                fchdir(&back)?;
            }
            mounted?;
        }
        if !self.propagation.is_empty() {
            let recursive = self.flags & MsFlags::MS_REC;
            mount(none, target, none, self.propagation | recursive, none)?;
        }
        if self.flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
            // A bind mount takes no flags when it is made; this gives them to it.
            mount(none, target, none, self.flags | MsFlags::MS_REMOUNT, none)?;
        }
        Ok(())
    }
}

/// Overlay data with its lower directories relative to the one they share; None if they share none but `/`.
fn relative_to_common(data: &[&str]) -> Option<(String, String)> {
    let lower = data.iter().position(|option| option.starts_with("lowerdir="))?;
    let directories: Vec<&str> = data.get(lower)?.strip_prefix("lowerdir=")?.split(':').collect();
    let common = (directories.iter().copied())
        .map(|directory| directory.rsplit_once('/').map_or("", |(parent, _)| parent))
        .reduce(common_directory)?;
    if common.is_empty() || !common.starts_with('/') {
        return None;
    }
    let relative: Option<Vec<&str>> =
        (directories.iter()).map(|directory| directory.strip_prefix(common)?.strip_prefix('/')).collect();
    let lowerdir = format!("lowerdir={}", relative?.join(":"));
    let rest = data.iter().enumerate().filter(|(index, _)| *index != lower).map(|(_, option)| *option);
    Some((common.to_owned(), rest.chain([lowerdir.as_str()]).collect::<Vec<_>>().join(",")))
}

/// The longest directory that both paths lie in or are.
fn common_directory<'p>(one: &'p str, other: &'p str) -> &'p str {
    let mut end = 0;
    for (index, part) in one.split_inclusive('/').scan(0, |at, part| {
        *at += part.len();
        Some((*at, part))
    }) {
        let name = part.trim_end_matches('/');
        let start = index - part.len();
        let matches = (other.get(start..)).is_some_and(|rest| rest.split('/').next() == Some(name));
        if !matches {
            break;
        }
        end = start + name.len();
    }
    one.get(..end).unwrap_or_default()
}

impl Mount {
    /// Mounts it at `target`. The thread's working directory is another one meanwhile, so the thread must not share it.
    ///
    /// # Errors
    /// [`MountError`] names the mount and what the kernel said.
    pub fn mount_at(&self, target: &Path) -> Result<(), MountError> {
        let plan = Plan::new(&self.kind, &self.options).map_err(|reason| self.failed(reason))?;
        plan.run(&self.kind, &self.source, target).map_err(|error| self.failed(error.to_string()))
    }

    /// Mounts it at `target` as [`Self::mount_at`] does, but so that nobody ever sees it there without nosuid, nodev
    /// and noexec, on itself and on all that came with it: flags that are given to a mount later do not reach the
    /// copies that its propagation has made by then. `staging` is an empty directory on a mount that propagates
    /// nowhere.
    ///
    /// # Errors
    /// [`MountError`] names the mount and what the kernel said; then nothing of it remains.
    pub fn mount_restricted(&self, staging: &Path, target: &Path) -> Result<(), MountError> {
        let none = None::<&str>;
        let moved = self.mount_at(staging).and_then(|()| {
            let moved =
                restrict_mount(staging).and_then(|()| Ok(mount(Some(staging), target, none, MsFlags::MS_MOVE, none)?));
            moved.map_err(|error| self.failed(format!("setting nosuid, nodev and noexec: {error}")))
        });
        if moved.is_err() {
            // EINVAL: it did not come so far.
            let _ = umount2(staging, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        moved
    }

    fn failed(&self, reason: String) -> MountError {
        let options = self.options.join(",").chars().take(MAX_SHOWN).collect();
        MountError { kind: self.kind.clone(), from: self.source.clone(), options, reason }
    }
}

/// Gives nosuid, nodev and noexec to the mount at `path` and to all below it.
fn restrict_mount(path: &Path) -> io::Result<()> {
    let root = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    restrict(root.as_fd(), NOSUID_NODEV_NOEXEC, true)
}

/// Gives them to a tree of mounts that is mounted nowhere yet, and cuts it off from what is mounted later where it was
/// copied from. `read_only`: nothing in it can be written by anybody.
///
/// # Errors
/// The system call's.
pub fn restrict_tree(tree: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let nothing = MountAttrFlags::empty();
    let read_only = if read_only { MountAttrFlags::MOUNT_ATTR_RDONLY } else { nothing };
    set_attributes(tree, NOSUID_NODEV_NOEXEC | read_only, nothing, MountPropagationFlags::PRIVATE, true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(kind: &str, options: &[&str]) -> Result<Plan, String> {
        Plan::new(kind, &options.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn flags_propagation_and_data_go_their_ways() {
        let plan = plan("bind", &["rbind", "ro", "rslave", "nodev", "dev", "size=1m", "defaults", "x"]).unwrap();
        assert_eq!(plan.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
        assert_eq!(plan.propagation, MsFlags::MS_SLAVE);
        assert_eq!(plan.data, "size=1m,x");
    }

    #[test]
    fn an_overlay_of_many_layers_is_named_from_the_directory_the_layers_share() {
        let layers: Vec<String> = (0..120)
            .map(|n| format!("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"))
            .collect();
        let lower = format!("lowerdir={}", layers.join(":"));
        let plan = plan("overlay", &["index=off", &lower, "upperdir=/u"]).unwrap();
        let directory = plan.directory.unwrap();
        assert_eq!(directory, "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots");
        assert!(plan.data.starts_with("index=off,upperdir=/u,lowerdir=0/fs:1/fs:"), "{}", plan.data);
    }

    #[test]
    fn what_cannot_be_mounted_says_why() {
        let long = format!("lowerdir=/a/{}:/b/{}", "x".repeat(3000), "y".repeat(3000));
        assert!(plan("overlay", &[&long]).unwrap_err().contains("6016 bytes"));
        assert!(plan("fuse3.overlay", &[]).unwrap_err().contains("mount.fuse"));
        assert!(plan("ext4", &["loop"]).unwrap_err().contains("loop"));
        let mount =
            Mount { kind: "nosuchfs".into(), source: "/dev/x".into(), options: vec!["a=b".into()], ..Mount::default() };
        let message = mount.failed("ENODEV".into()).to_string();
        for word in ["nosuchfs", "/dev/x", "a=b", "ENODEV"] {
            assert!(message.contains(word), "{message}");
        }
    }

    proptest! {
        #[test]
        fn relative_layers_are_the_same_layers(paths in proptest::collection::vec("(/[a-c]{1,2}){1,4}", 1..6)) {
            let lower = format!("lowerdir={}", paths.join(":"));
            if let Some((directory, data)) = relative_to_common(&["a=b", &lower]) {
                let relative = data.strip_prefix("a=b,lowerdir=").unwrap();
                let back: Vec<_> = relative.split(':').map(|path| format!("{directory}/{path}")).collect();
                prop_assert_eq!(back, paths);
            }
        }

        #[test]
        fn any_options_plan_or_fail_without_panic(options in proptest::collection::vec(".{0,30}", 0..6), kind in ".{0,8}") {
            let _ = Plan::new(&kind, &options);
        }
    }
}
