//! The files that the guest knows: FUSE node numbers and what they stand for.
//!
//! A node is an `O_PATH` descriptor, which names a file without opening it: it follows renames, it outlives an unlink, and
//! since it pins the inode, (device, inode number) stays unique for as long as the node lives, so that all
//! hard links of a file are one node, whatever mount they were reached by. The guest counts its references; at zero the
//! node goes, and its number is never given again.
//!
//! A file that was reached by several mounts keeps a descriptor of each: link(2) needs one of the mount that the new name is
//! on, and what is written must not be asked of a mount that is read-only while another is not.
//!
//! One file system changes a live file's identity: overlayfs, without an index, gives a hard-linked file of the image a
//! new inode number of its own at the first change, and leaves the other links behind with the old one ([`Nodes::rekey`]).

use std::{collections::HashMap, os::fd::OwnedFd};

use rustix::{fs::FileType, io::Errno};

use crate::attributes::file_system;

/// The number of the shared directory itself (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;

/// What makes two names the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The mount that a directory was reached by; 0 for any other file.
    pub mount: u64,
    /// The file system's device number (major, minor).
    pub device: (u32, u32),
    /// The inode number.
    pub inode: u64,
}

/// A file that the guest knows.
#[derive(Debug)]
pub struct Node {
    /// Names the file; by a mount that can be written, if it was reached by one.
    pub path: OwnedFd,
    /// The mount of `path`.
    pub mount: u64,
    /// Names it on other mounts.
    others: Vec<(u64, OwnedFd)>,
    /// Its identity.
    pub key: Key,
    /// Its type, which cannot change.
    pub kind: FileType,
    /// References that the guest holds.
    lookups: u64,
}

/// Mounts by which one file is named at most; a guest that binds it more often has the first of them.
const MAX_MOUNTS: usize = 16;

impl Node {
    /// A descriptor of the file on `mount`, if it was reached by it; otherwise any.
    pub fn path_on(&self, mount: u64) -> &OwnedFd {
        let other = self.others.iter().find(|(of, _)| *of == mount && self.mount != mount);
        other.map_or(&self.path, |(_, path)| path)
    }

    /// Notes that the file was reached by a mount.
    fn reach(&mut self, path: OwnedFd, mount: u64) {
        let known = self.mount == mount || self.others.iter().any(|(of, _)| *of == mount);
        if known || self.others.len() >= MAX_MOUNTS {
            return;
        }
        let (mut path, mut mount) = (path, mount);
        if is_read_only(&self.path) && !is_read_only(&path) {
            std::mem::swap(&mut self.path, &mut path);
            std::mem::swap(&mut self.mount, &mut mount);
        }
        self.others.push((mount, path));
    }
}

fn is_read_only(path: &OwnedFd) -> bool {
    file_system(path).is_ok_and(|state| state.f_flag & libc::ST_RDONLY != 0)
}

/// All of them.
#[derive(Debug)]
pub struct Nodes {
    by_id: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    next: u64,
    limit: usize,
}

impl Nodes {
    /// Knows only the root; at most `limit` more may be entered.
    pub fn new(root: OwnedFd, key: Key, limit: usize) -> Self {
        let (kind, mount) = (FileType::Directory, key.mount);
        let root = Node { path: root, mount, others: Vec::new(), key, kind, lookups: 1 };
        Self { by_id: HashMap::from([(ROOT, root)]), by_key: HashMap::from([(key, ROOT)]), next: ROOT + 1, limit }
    }

    /// The node with this number.
    ///
    /// # Errors
    /// ESTALE if there is none.
    pub fn get(&self, id: u64) -> Result<&Node, Errno> {
        self.by_id.get(&id).ok_or(Errno::STALE)
    }

    /// Whether the file is reached by the same mount as the root.
    pub fn on_root_mount(&self, node: &Node) -> bool {
        self.by_id.get(&ROOT).is_some_and(|root| root.mount == node.mount)
    }

    /// Every node.
    pub fn all(&self) -> impl Iterator<Item = &Node> {
        self.by_id.values()
    }

    /// Gives the guest one more reference to the file and returns its number.
    ///
    /// # Errors
    /// ENFILE if the limit is reached.
    pub fn enter(&mut self, (path, mount): (OwnedFd, u64), key: Key, kind: FileType) -> Result<u64, Errno> {
        if let Some(id) = self.by_key.get(&key)
            && let Some(node) = self.by_id.get_mut(id)
        {
            node.lookups = node.lookups.saturating_add(1);
            node.reach(path, mount);
            return Ok(*id);
        }
        self.check_room()?;
        let id = self.next;
        self.next += 1;
        self.by_id.insert(id, Node { path, mount, others: Vec::new(), key, kind, lookups: 1 });
        self.by_key.insert(key, id);
        Ok(id)
    }

    /// Checks that there is room for a new file, before one is made.
    ///
    /// # Errors
    /// ENFILE if the limit is reached.
    pub fn check_room(&self) -> Result<(), Errno> {
        if self.by_id.len() > self.limit { Err(Errno::NFILE) } else { Ok(()) }
    }

    /// The number of the node with this identity.
    pub fn find(&self, key: &Key) -> Option<u64> {
        self.by_key.get(key).copied()
    }

    /// Notes a node's present identity.
    pub fn rekey(&mut self, id: u64, key: Key) {
        let Some(node) = self.by_id.get_mut(&id) else { return };
        if node.key == key {
            return;
        }
        let old = std::mem::replace(&mut node.key, key);
        if self.by_key.get(&old) == Some(&id) {
            self.by_key.remove(&old);
        }
        self.by_key.insert(key, id);
    }

    /// Names the node's file by another descriptor of it.
    pub fn renew(&mut self, id: u64, path: OwnedFd) {
        if let Some(node) = self.by_id.get_mut(&id) {
            node.path = path;
        }
    }

    /// Takes `count` references back; true if the node is gone. The root always stays.
    pub fn forget(&mut self, id: u64, count: u64) -> bool {
        let Some(node) = self.by_id.get_mut(&id) else { return false };
        if id == ROOT {
            return false;
        }
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return false;
        }
        let key = node.key;
        self.by_id.remove(&id);
        // After a rekey the identity may be another node's.
        if self.by_key.get(&key) == Some(&id) {
            self.by_key.remove(&key);
        }
        true
    }

    /// Forgets everything but the root.
    pub fn clear(&mut self) {
        self.by_id.retain(|id, _| *id == ROOT);
        self.by_key.retain(|_, id| *id == ROOT);
    }

    /// How many there are besides the root.
    pub fn len(&self) -> usize {
        self.by_id.len() - 1
    }

    /// Whether only the root is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs::File};

    use proptest::prelude::*;

    use super::*;

    fn any_file() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn key(inode: u64) -> Key {
        Key { mount: 1, device: (8, 1), inode }
    }

    fn nodes(limit: usize) -> Nodes {
        Nodes::new(any_file(), key(0), limit)
    }

    #[test]
    fn the_limit_counts_files_and_not_references() {
        let mut nodes = nodes(2);
        let first = nodes.enter((any_file(), 1), key(1), FileType::RegularFile).unwrap();
        nodes.enter((any_file(), 1), key(2), FileType::RegularFile).unwrap();
        assert_eq!(nodes.enter((any_file(), 1), key(3), FileType::RegularFile), Err(Errno::NFILE));
        assert_eq!(nodes.enter((any_file(), 1), key(1), FileType::RegularFile), Ok(first));
        assert!(nodes.forget(first, 2));
        assert!(nodes.enter((any_file(), 1), key(3), FileType::RegularFile).is_ok());
    }

    #[test]
    fn a_file_with_a_new_identity_is_found_by_it_and_leaves_the_old_one_to_others() {
        let mut nodes = nodes(9);
        let first = nodes.enter((any_file(), 1), key(1), FileType::RegularFile).unwrap();
        nodes.rekey(first, key(2));
        assert_eq!(nodes.enter((any_file(), 1), key(2), FileType::RegularFile), Ok(first));
        let other = nodes.enter((any_file(), 1), key(1), FileType::RegularFile).unwrap();
        assert_ne!(other, first);
        nodes.rekey(other, key(2));
        assert!(nodes.forget(first, 2));
        assert_eq!(nodes.find(&key(2)), Some(other));
        assert_eq!(nodes.find(&key(1)), None);
    }

    #[test]
    fn the_root_cannot_be_forgotten() {
        let mut nodes = nodes(2);
        assert!(!nodes.forget(ROOT, u64::MAX));
        nodes.clear();
        assert!(nodes.get(ROOT).is_ok());
    }

    proptest! {
        #[test]
        fn a_node_lives_exactly_as_long_as_its_references(
            steps in prop::collection::vec((any::<bool>(), 1u64..6, 0u64..4), 0..120)
        ) {
            let mut nodes = nodes(100);
            // inode -> (id, references)
            let mut model: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
            let mut ever = vec![ROOT];
            for (enter, inode, count) in steps {
                if enter {
                    let id = nodes.enter((any_file(), 1), key(inode), FileType::RegularFile).unwrap();
                    let entry = model.entry(inode).or_insert((id, 0));
                    if entry.1 == 0 {
                        prop_assert!(!ever.contains(&id), "a number was given twice");
                        ever.push(id);
                    }
                    prop_assert_eq!(entry.0, id);
                    entry.1 += 1;
                } else if let Some((id, references)) = model.get_mut(&inode) {
                    *references = references.saturating_sub(count);
                    let gone = *references == 0;
                    prop_assert_eq!(nodes.forget(*id, count), gone);
                    prop_assert_eq!(nodes.get(*id).is_err(), gone);
                    if gone {
                        model.remove(&inode);
                    }
                }
                prop_assert_eq!(nodes.len(), model.len());
            }
        }
    }
}
