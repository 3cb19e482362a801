//! The shared tree: the nodes that the guest knows, the files and directories that it has open, and how a name
//! becomes a node.
//!
//! A name is one component, never a path: `.`, `..` and anything with a slash is refused, a symlink is a node of its own
//! and is never followed (the guest's kernel follows them, inside the guest's tree), and openat2 is restricted to
//! what lies beneath the directory as well.
//!
//! What the guest may keep in its caches depends on the mount. The mount of the shared directory itself belongs to the
//! shim, which adds and removes pods' directories there at any time: nothing of it is cached. What is mounted
//! below (a container's root file system) nobody changes but the guest: that is cached for a day, names
//! that do not exist included. Of a tree that is shared with the host's processes nothing is.
//!
//! Several threads serve a tree. Each map has a lock of its own that is held for a look at the map and never for a system
//! call; what is found there is shared (`Arc`), so that a descriptor stays open, and its number the file's, as long as a
//! request uses it. One lock is held longer, for files of overlays: see [`Tree::change`].

mod opening;

use std::{
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use fuse_backend_rs::{abi::fuse_abi::stat64, api::filesystem::Entry};
use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, Statx, openat, openat2, readlinkat},
    io::Errno,
    path::DecInt,
};

use crate::{
    attributes::{attributes, examine, examine_name, is_overlay, is_read_only, key, kind},
    budget::Claim,
    directory::Directories,
    files::{OpenFiles, out_of_descriptors},
    handshake::Sharing,
    locks::Locks,
    nodes::{Node, Nodes, Path},
};

const CACHED: Duration = Duration::from_secs(24 * 3600);

/// See the module's introduction.
#[derive(Debug)]
pub struct Tree {
    nodes: Mutex<Nodes>,
    directories: Mutex<Directories>,
    /// Locks that the guest holds of files that it shares with the host.
    locks: Mutex<Locks>,
    /// The devices that files were seen on; see [`Tree::ino`].
    devices: Mutex<Vec<(u32, u32)>>,
    /// Held for writing while an overlay's file may get another identity; see [`Tree::change`].
    identities: RwLock<()>,
    /// Held while files are closed that the guest has forgotten; see [`Tree::retry_without_space`].
    forgets: RwLock<()>,
    /// Files open for reading and writing, and the budget: all trees'.
    files: Arc<OpenFiles>,
    connection: usize,
    root_mount: u64,
    proc_fds: OwnedFd,
    sharing: Sharing,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Tree {
    /// The tree below `root`, for the connection with this number. `proc_fds` is `/proc/self/fd`.
    ///
    /// # Errors
    /// If `root` cannot be looked at.
    pub fn new(
        root: OwnedFd,
        proc_fds: OwnedFd,
        files: Arc<OpenFiles>,
        connection: usize,
        sharing: Sharing,
    ) -> Result<Self, Errno> {
        let key = key(&examine(&root)?);
        Ok(Self {
            nodes: Mutex::new(Nodes::new(Node::new(Path::new(root, None), key.mount, key, FileType::Directory))),
            directories: Mutex::default(),
            locks: Mutex::default(),
            // The shared directory's own device is of no volume.
            devices: Mutex::new(vec![key.device]),
            identities: RwLock::new(()),
            forgets: RwLock::new(()),
            files,
            connection,
            root_mount: key.mount,
            proc_fds,
            sharing,
        })
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        lock(&self.nodes)
    }

    /// Locks that the guest holds.
    pub fn locks(&self) -> MutexGuard<'_, Locks> {
        lock(&self.locks)
    }

    /// Forgets what a guest knew: it has restarted or unmounted. No request may be served meanwhile.
    pub fn clear(&self) {
        let gone = self.nodes().clear();
        drop(gone);
        self.files.clear(self.connection);
        self.locks().clear();
        *lock(&self.directories) = Directories::default();
    }

    /// Who changes its files.
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// The inode number that the guest sees of a file with `inode` on `device`. All volumes of a pod are one file system there, and the
    /// host's inode numbers are unique on one device only: the second device and those behind it have a number in the upper bits.
    /// Container roots keep the host's numbers: each container sees one of them.
    pub fn ino(&self, device: (u32, u32), inode: u64) -> u64 {
        const SHIFT: u32 = 48;
        if self.sharing == Sharing::Alone || inode >> SHIFT != 0 {
            return inode;
        }
        let mut devices = lock(&self.devices);
        let known = devices.iter().position(|known| *known == device);
        let index = known.unwrap_or_else(|| {
            devices.push(device);
            devices.len() - 1
        });
        // The shared directory has index 0, the first volume 1.
        inode | ((index as u64).saturating_sub(1) & 0x7fff) << SHIFT
    }

    /// The attributes that the guest gets of a file.
    pub fn attributes(&self, stat: &Statx) -> stat64 {
        attributes(stat, self.ino((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino))
    }

    /// The directory `/proc/self/fd`.
    pub fn proc_fds(&self) -> BorrowedFd<'_> {
        self.proc_fds.as_fd()
    }

    /// The node with this number.
    ///
    /// # Errors
    /// ESTALE if there is none.
    pub fn node(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.nodes().get(id)
    }

    /// A part of the budget for one more file that the guest knows.
    ///
    /// # Errors
    /// ENFILE if nothing is left of it.
    pub fn claim(&self) -> Result<Claim, Errno> {
        self.files.claim(1)
    }

    /// Gives the guest a reference to what `name` in `parent` is.
    ///
    /// # Errors
    /// EINVAL for a bad name, ENFILE if the guest knows too many files, ESTALE, the system calls'.
    pub fn lookup(&self, parent: u64, name: &CStr) -> Result<Entry, Errno> {
        let parent = self.node(parent)?;
        component(name)?;
        // Where nothing is cached, the guest asks again and again for what it knows.
        if self.timeout(&parent).is_zero()
            && let Some(entry) = self.refer(&parent, name)?
        {
            return Ok(entry);
        }
        let _identities = parent.overlay.then(|| self.identities());
        self.open_name(&parent, name, None)
    }

    /// The same for a file that was just made in `parent`, with a part of the budget.
    ///
    /// # Errors
    /// See [`Self::lookup`].
    pub fn lookup_made(&self, parent: &Node, name: &CStr, claim: Claim) -> Result<Entry, Errno> {
        let _identities = parent.overlay.then(|| self.identities());
        self.open_name(parent, name, Some(claim))
    }

    /// The same while [`Self::exclusive`] is held.
    ///
    /// # Errors
    /// See [`Self::lookup`].
    pub fn lookup_exclusive(&self, parent: &Node, name: &CStr) -> Result<Entry, Errno> {
        self.open_name(parent, name, None)
    }

    /// A reference to what `name` is, if that is a file that the guest knows by the same mount.
    fn refer(&self, parent: &Node, name: &CStr) -> Result<Option<Entry>, Errno> {
        let before = self.nodes().removed();
        let stat = examine_name(parent, name)?;
        let key = key(&stat);
        let node = {
            let mut nodes = self.nodes();
            // Nothing keeps the file that was looked at from being another one's number by now, but that.
            if nodes.removed() != before {
                return Ok(None);
            }
            match nodes.find(&key) {
                Some(node) if node.settled && node.is_reached_by(stat.stx_mnt_id) => nodes.refer(&key),
                _ => None,
            }
        };
        Ok(node.map(|node| self.entry(parent, &node, &stat)))
    }

    fn open_name(&self, parent: &Node, name: &CStr, claim: Option<Claim>) -> Result<Entry, Errno> {
        let (path, stat) = self.find(parent, name)?;
        let known = if has_links(&stat) { self.nodes().find(&key(&stat)) } else { None };
        // That node may have left this identity behind.
        if let Some(known) = known.filter(|known| !known.settled) {
            self.note_identity(&known, false)?;
            let found = self.nodes().find(&key(&stat));
            // And overlayfs changes a file of the image only by a name that still exists.
            if found.is_some_and(|found| found.id == known.id)
                && self.is_unlinked(&known)?
                && (!is_read_only(&path) || is_read_only(&*known))
            {
                let path = path.try_clone().map_err(|_| Errno::NFILE)?;
                self.reach(&known, path, stat.stx_mnt_id, true)?;
            }
        }
        self.enter(parent, path, &stat, claim, false)
    }

    /// Gives the guest a reference to a file that was just created in `parent`, with a part of the budget.
    ///
    /// # Errors
    /// The system calls'.
    pub fn enter_created(&self, parent: &Node, file: &OwnedFd, claim: Claim) -> Result<Entry, Errno> {
        // The file itself and not its name, which the host's processes may have given to another.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path = openat(&self.proc_fds, DecInt::from_fd(file), flags, Mode::empty()).map_err(out_of_descriptors)?;
        let stat = examine(&path)?;
        self.enter(parent, path, &stat, Some(claim), true)
    }

    fn enter(
        &self,
        parent: &Node,
        path: OwnedFd,
        stat: &Statx,
        claim: Option<Claim>,
        created: bool,
    ) -> Result<Entry, Errno> {
        let (key, mount) = (key(stat), stat.stx_mnt_id);
        let known = self.nodes().refer(&key);
        let node = match known {
            Some(node) if node.is_reached_by(mount) => node,
            Some(node) => {
                let main = is_read_only(&*node) && !is_read_only(&path);
                if let Err(errno) = self.reach(&node, path, mount, main) {
                    self.forget(node.id, 1);
                    return Err(errno);
                }
                node
            }
            None => {
                let claim = claim.map_or_else(|| self.claim(), Ok)?;
                let overlay = if mount == parent.mount { parent.overlay } else { is_overlay(&path) };
                let path = Path::new(path, Some(claim));
                let mut fresh = Node::new(path, mount, key, kind(stat));
                (fresh.overlay, fresh.settled) = (overlay, !overlay || created);
                let mut nodes = self.nodes();
                // Another thread may have entered it meanwhile; the descriptor is closed without the lock.
                match nodes.refer(&key) {
                    Some(node) => {
                        drop(nodes);
                        drop(fresh);
                        node
                    }
                    None => nodes.enter(fresh),
                }
            }
        };
        Ok(self.entry(parent, &node, stat))
    }

    fn reach(&self, node: &Node, path: OwnedFd, mount: u64, main: bool) -> Result<(), Errno> {
        let path = Path::new(path, Some(self.claim()?));
        let replaced = self.nodes().reach(node.id, path, mount, main);
        drop(replaced);
        Ok(())
    }

    fn entry(&self, parent: &Node, node: &Node, stat: &Statx) -> Entry {
        Entry {
            inode: node.id,
            generation: 0,
            attr: self.attributes(stat),
            attr_flags: 0,
            attr_timeout: self.timeout(node),
            entry_timeout: self.timeout(parent),
        }
    }

    /// What `name` in `parent` is, for a look.
    fn find(&self, parent: &Node, name: &CStr) -> Result<(OwnedFd, Statx), Errno> {
        component(name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let path = openat2(parent, name, flags, Mode::empty(), resolve).map_err(out_of_descriptors)?;
        let stat = examine(&path)?;
        Ok((path, stat))
    }

    /// Carries out what may give the file of an overlay another identity (it is copied up to the upper layer).
    ///
    /// Nobody may look a file up between the change and the note of it: the file would become a second node. So changes of
    /// such files wait for lookups on overlays and the other way round, each file's first change only.
    ///
    /// # Errors
    /// `change`'s.
    pub fn change<T>(&self, node: &Node, change: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        if node.settled {
            return change();
        }
        let _exclusive = self.exclusive();
        let result = change()?;
        // What it is then is its identity for good.
        let _ = self.note_identity(node, true);
        Ok(result)
    }

    /// Keeps everybody else from looking up files of overlays.
    pub fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.identities.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn identities(&self) -> RwLockReadGuard<'_, ()> {
        self.identities.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Looks at a node, and notes if its identity has changed.
    ///
    /// # Errors
    /// The system call's.
    pub fn identify(&self, node: &Node) -> Result<Statx, Errno> {
        if node.settled {
            return examine(node);
        }
        let _identities = self.identities();
        self.note_identity(node, false)
    }

    /// The same while the identities cannot change.
    ///
    /// # Errors
    /// The system call's.
    pub fn note_identity(&self, node: &Node, settled: bool) -> Result<Statx, Errno> {
        let stat = examine(node)?;
        self.nodes().rekey(node.id, key(&stat), settled);
        Ok(stat)
    }

    /// Whether the name by which a node was found is gone. A name that ends like the kernel's mark passes for gone.
    fn is_unlinked(&self, node: &Node) -> Result<bool, Errno> {
        let path = readlinkat(&self.proc_fds, DecInt::from_fd(node), Vec::new())?;
        Ok(path.as_bytes().ends_with(b" (deleted)"))
    }

    /// The node of `name` in `parent` if it may get another identity when it is renamed.
    pub fn unsettled(&self, parent: &Node, name: &CStr) -> Option<Arc<Node>> {
        let (_path, stat) = self.find(parent, name).ok()?;
        self.nodes().find(&key(&stat)).filter(|node| !node.settled)
    }

    /// How long the guest may believe the attributes of `node` and, if it is a directory, what names are in it.
    pub fn timeout(&self, node: &Node) -> Duration {
        let shims = node.mount == self.root_mount;
        if shims || self.sharing == Sharing::WithHost { Duration::ZERO } else { CACHED }
    }

    /// Carries out what needs space on a disk, and once more if there is none after files are gone that other threads are
    /// closing: a file that the guest has removed takes its space until its FORGET, which has come before this request, is
    /// carried out.
    ///
    /// # Errors
    /// `attempt`'s.
    pub fn retry_without_space<T>(&self, mut attempt: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
        /// In which a thread that has received a FORGET begins with it. Between its recv(2) and the lock below nothing tells that
        /// it has one: to know, every request would need the lock around its recv, or a further call. So this waits by the clock,
        /// once a request, and only where the alternative is the guest's error.
        const PAUSE: Duration = Duration::from_millis(5);
        match attempt() {
            Err(Errno::NOSPC | Errno::DQUOT) => {
                std::thread::sleep(PAUSE);
                drop(self.forgets.write().unwrap_or_else(|poisoned| poisoned.into_inner()));
                attempt()
            }
            result => result,
        }
    }

    /// Takes references back.
    pub fn forget(&self, node: u64, count: u64) {
        let _forgets = self.forgets.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let gone = self.nodes().forget(node, count);
        if gone.is_some() {
            self.files.close((self.connection, node));
            self.locks().forget(node);
        }
        // Before the lock is given back.
        drop(gone);
    }
}

/// Whether the file has other names (a directory counts those that `..` gives it).
fn has_links(stat: &Statx) -> bool {
    stat.stx_nlink > 1 && kind(stat) != FileType::Directory
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
