//! The shared tree: the nodes that the guest knows, the files and directories that it has open, and how a name
//! becomes a node.
//!
//! A name is one component, never a path: `.`, `..` and anything with a slash is refused, a symlink is a node of its own
//! and is never followed (the guest's kernel follows them, inside the guest's tree), and openat2 is told to stay
//! beneath the directory as well.
//!
//! What the guest may keep in its caches depends on the mount. The mount of the shared directory itself belongs to the
//! shim, which adds and removes pods' directories there at any time: nothing of it is cached. What is mounted
//! below (a container's root file system) nobody changes but the guest: that is cached for a day, names
//! that do not exist included. Of a tree that is shared with the host's processes nothing is.

use std::{
    collections::{HashMap, HashSet},
    ffi::CStr,
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use fuse_backend_rs::{abi::fuse_abi::stat64, api::filesystem::Entry};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Statx, openat, openat2, readlinkat},
    io::Errno,
    path::DecInt,
};

use crate::{
    attributes::{attributes, examine, key, kind},
    directory::Directory,
    files::{Access, OpenFiles, out_of_descriptors, reopen},
    handshake::Sharing,
    locks::Locks,
    nodes::Nodes,
};

const CACHED: Duration = Duration::from_secs(24 * 3600);

/// Directories that may be open at once.
const MAX_DIRECTORIES: usize = 1024;

/// Descriptors that are not nodes: open files and directories, the process's own, and what one request needs.
pub const RESERVED_DESCRIPTORS: usize = MAX_DIRECTORIES + crate::files::SLOTS + crate::locks::MAX_OWNERS + 64;

/// See the module's introduction.
#[derive(Debug)]
pub struct Tree {
    /// The nodes.
    pub nodes: Nodes,
    /// Files open for reading and writing.
    pub files: OpenFiles,
    /// Locks that the guest holds of files that it shares with the host.
    pub locks: Locks,
    /// The devices that files were seen on; see [`Tree::ino`].
    devices: Vec<(u32, u32)>,
    directories: HashMap<u64, (u64, Directory)>,
    next_handle: u64,
    proc_fds: OwnedFd,
    sharing: Sharing,
}

impl Tree {
    /// The tree below `root`, which the guest may know `limit` files of. `proc_fds` is `/proc/self/fd`.
    ///
    /// # Errors
    /// If `root` cannot be looked at.
    pub fn new(root: OwnedFd, proc_fds: OwnedFd, limit: usize, sharing: Sharing) -> Result<Self, Errno> {
        let key = key(&examine(&root)?);
        let nodes = Nodes::new(root, key, limit);
        let (files, locks, directories) = (OpenFiles::default(), Locks::default(), HashMap::new());
        // The shared directory's own device is of no volume.
        let devices = vec![key.device];
        Ok(Self { nodes, files, locks, devices, directories, next_handle: 1, proc_fds, sharing })
    }

    /// Forgets what a guest knew: it has restarted or unmounted.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.files.clear();
        self.locks.clear();
        self.directories.clear();
    }

    /// Who changes its files.
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// The inode number that the guest sees of a file with `inode` on `device`. All volumes of a pod are one file system there, and the
    /// host's inode numbers are unique on one device only: the second device and those behind it have a number in the upper bits.
    /// Container roots keep the host's numbers: each container sees one of them.
    pub fn ino(&mut self, device: (u32, u32), inode: u64) -> u64 {
        const SHIFT: u32 = 48;
        if self.sharing == Sharing::Alone || inode >> SHIFT != 0 {
            return inode;
        }
        let known = self.devices.iter().position(|known| *known == device);
        let index = known.unwrap_or_else(|| {
            self.devices.push(device);
            self.devices.len() - 1
        });
        // The shared directory has index 0, the first volume 1.
        inode | ((index as u64).saturating_sub(1) & 0x7fff) << SHIFT
    }

    /// The attributes that the guest gets of a file.
    pub fn attributes(&mut self, stat: &Statx) -> stat64 {
        attributes(stat, self.ino((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino))
    }

    /// The directory `/proc/self/fd`.
    pub fn proc_fds(&self) -> BorrowedFd<'_> {
        self.proc_fds.as_fd()
    }

    /// The name below [`Self::proc_fds`] (and, since the jail makes that the working directory, the path) of a node.
    ///
    /// # Errors
    /// ESTALE if there is no such node.
    pub fn proc_name(&self, node: u64) -> Result<DecInt, Errno> {
        Ok(DecInt::from_fd(&self.nodes.get(node)?.path))
    }

    /// Gives the guest a reference to what `name` in `parent` is.
    ///
    /// # Errors
    /// EINVAL for a bad name, ENFILE if the guest knows too many files, the system calls'.
    pub fn lookup(&mut self, parent: u64, name: &CStr) -> Result<Entry, Errno> {
        let (path, stat) = self.find(parent, name)?;
        if has_links(&stat)
            && let Some(known) = self.nodes.find(&key(&stat))
        {
            // That node may have left this identity behind.
            self.identify(known)?;
            // And overlayfs changes a file of the image only by a name that still exists.
            if self.nodes.find(&key(&stat)) == Some(known) && self.is_unlinked(known)? {
                self.nodes.renew(known, path.try_clone().map_err(|_| Errno::NFILE)?);
            }
        }
        self.entry(parent, path, &stat)
    }

    /// Gives the guest a reference to a file that was just created in `parent`.
    ///
    /// # Errors
    /// ENFILE if the guest knows too many files, the system calls'.
    pub fn enter_created(&mut self, parent: u64, file: &OwnedFd) -> Result<Entry, Errno> {
        // The file itself and not its name, which the host's processes may have given to another.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path = openat(&self.proc_fds, DecInt::from_fd(file), flags, Mode::empty()).map_err(out_of_descriptors)?;
        let stat = examine(&path)?;
        self.entry(parent, path, &stat)
    }

    fn entry(&mut self, parent: u64, path: OwnedFd, stat: &Statx) -> Result<Entry, Errno> {
        let entry_timeout = self.timeout(parent)?;
        let inode = self.nodes.enter((path, stat.stx_mnt_id), key(stat), kind(stat))?;
        let (attr_timeout, attr) = (self.timeout(inode)?, self.attributes(stat));
        Ok(Entry { inode, generation: 0, attr, attr_flags: 0, attr_timeout, entry_timeout })
    }

    /// What `name` in `parent` is, for a look.
    fn find(&self, parent: u64, name: &CStr) -> Result<(OwnedFd, Statx), Errno> {
        component(name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let directory = self.nodes.get(parent)?;
        let path = openat2(&directory.path, name, flags, Mode::empty(), resolve).map_err(out_of_descriptors)?;
        let stat = examine(&path)?;
        Ok((path, stat))
    }

    /// Looks at a node, and notes if its identity has changed.
    ///
    /// # Errors
    /// ESTALE if there is no such node, the system call's.
    pub fn identify(&mut self, node: u64) -> Result<Statx, Errno> {
        let stat = examine(&self.nodes.get(node)?.path)?;
        self.nodes.rekey(node, key(&stat));
        Ok(stat)
    }

    /// Whether the name by which a node was found is gone. A name that ends like the kernel's mark passes for gone.
    fn is_unlinked(&self, node: u64) -> Result<bool, Errno> {
        let path = readlinkat(&self.proc_fds, self.proc_name(node)?, Vec::new())?;
        Ok(path.as_bytes().ends_with(b" (deleted)"))
    }

    /// The node of `name` in `parent` if it may get another identity when it is renamed.
    pub fn linked_node(&self, parent: u64, name: &CStr) -> Option<u64> {
        let (_, stat) = self.find(parent, name).ok()?;
        if has_links(&stat) { self.nodes.find(&key(&stat)) } else { None }
    }

    /// How long the guest may believe the attributes of `node` and, if it is a directory, what names are in it.
    ///
    /// # Errors
    /// ESTALE if there is no such node.
    pub fn timeout(&self, node: u64) -> Result<Duration, Errno> {
        let shims = self.nodes.on_root_mount(self.nodes.get(node)?);
        Ok(if shims || self.sharing == Sharing::WithHost { Duration::ZERO } else { CACHED })
    }

    /// Takes references back.
    pub fn forget(&mut self, node: u64, count: u64) {
        if self.nodes.forget(node, count) {
            self.files.forget(node);
            self.locks.forget(node);
        }
    }

    /// A regular file, open.
    ///
    /// # Errors
    /// ESTALE, those of [`OpenFiles::get`].
    pub fn file(&mut self, node: u64, access: Access) -> Result<&mut File, Errno> {
        if access == Access::Write && !self.files.is_open(node, access) {
            // Opening it may give it another identity.
            self.files.get(node, self.nodes.get(node)?, access, &self.proc_fds)?;
            self.identify(node)?;
        }
        self.files.get(node, self.nodes.get(node)?, access, &self.proc_fds)
    }

    /// A directory or file of each file system that the guest knows files of, open: what syncfs(2) needs.
    pub fn file_systems(&self) -> Vec<File> {
        let mut mounts = HashSet::new();
        let nodes = self.nodes.all().filter(|node| !self.nodes.on_root_mount(node) && mounts.insert(node.mount));
        let open = |node| {
            let directory = reopen(node, OFlags::RDONLY | OFlags::DIRECTORY, &self.proc_fds);
            directory.or_else(|_| reopen(node, OFlags::RDONLY, &self.proc_fds)).ok()
        };
        nodes.filter_map(open).collect()
    }

    /// The same for a call that may take long, with which the tree must not wait: another descriptor of the file.
    ///
    /// # Errors
    /// Those of [`Self::file`].
    pub fn file_apart(&mut self, node: u64, access: Access) -> Result<File, Errno> {
        self.file(node, access)?.try_clone().map_err(|_| Errno::NFILE)
    }

    /// A file, opened for a lock: for writing if that is asked for and can be, because a lock against readers needs it.
    ///
    /// # Errors
    /// ESTALE, EISDIR and EINVAL for what is not a regular file, the system call's.
    pub fn open_for_lock(&self, node: u64, write: bool) -> Result<File, Errno> {
        let node = self.nodes.get(node)?;
        if write && let Ok(file) = reopen(node, OFlags::RDWR, &self.proc_fds) {
            return Ok(file);
        }
        reopen(node, OFlags::RDONLY, &self.proc_fds)
    }

    /// Opens a directory and returns its handle.
    ///
    /// # Errors
    /// ENFILE if too many are open, ENOTDIR, ESTALE, the system call's.
    pub fn open_directory(&mut self, node: u64) -> Result<u64, Errno> {
        if self.directories.len() >= MAX_DIRECTORIES {
            return Err(Errno::NFILE);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let directory = reopen(self.nodes.get(node)?, flags, &self.proc_fds)?;
        let handle = self.next_handle;
        self.next_handle += 1;
        self.directories.insert(handle, (node, Directory::new(directory)));
        Ok(handle)
    }

    /// Closes a directory.
    ///
    /// # Errors
    /// EBADF if the handle is not one of this node.
    pub fn close_directory(&mut self, node: u64, handle: u64) -> Result<(), Errno> {
        self.directory(node, handle)?;
        self.directories.remove(&handle);
        Ok(())
    }

    /// An open directory.
    ///
    /// # Errors
    /// EBADF if the handle is not one of this node.
    pub fn directory(&self, node: u64, handle: u64) -> Result<&File, Errno> {
        match self.directories.get(&handle) {
            Some((of, directory)) if *of == node => Ok(directory.file()),
            _ => Err(Errno::BADF),
        }
    }

    /// Lends an open directory beside the tree.
    ///
    /// # Errors
    /// EBADF if the handle is not one of this node; those of `use_it`.
    pub fn with_directory<T>(
        &mut self,
        node: u64,
        handle: u64,
        use_it: impl FnOnce(&mut Self, &mut Directory) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.directory(node, handle)?;
        let mut directory = self.directories.remove(&handle).ok_or(Errno::BADF)?;
        let result = use_it(self, &mut directory.1);
        self.directories.insert(handle, directory);
        result
    }
}

/// Whether the file has other names (a directory counts those that `..` gives it).
fn has_links(stat: &Statx) -> bool {
    stat.stx_nlink > 1 && kind(stat) != FileType::Directory
}

/// Opens the process's table of descriptors; before the jail, which has no /proc.
///
/// # Errors
/// The system call's.
pub fn open_proc_fds() -> Result<OwnedFd, Errno> {
    openat(CWD, c"/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Checks that a name is one.
///
/// # Errors
/// EINVAL if it could lead anywhere but into its directory.
pub fn component(name: &CStr) -> Result<(), Errno> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        for bad in [c"", c".", c"..", c"/", c"/etc", c"a/b", c"a/", c"../x"] {
            assert_eq!(component(bad), Err(Errno::INVAL), "{bad:?}");
        }
        for good in [c"a", c"...", c"..a", c" ", c"-rf", c"\xff\xfe", c"a\\b"] {
            assert_eq!(component(good), Ok(()), "{good:?}");
        }
    }
}
