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
//! One file system changes a live file's identity: overlayfs. Without an index it gives a hard-linked file of the image a
//! new inode number of its own at the first change, and leaves the other links behind with the old one; and where its
//! layers lie on several file systems, any file of the image. A node whose file may still do so is not `settled`
//! ([`Nodes::rekey`]).
//!
//! A request holds the [`Node`] that it works on, in the state in which it found it.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::{fs::FileType, io::Errno};

use crate::budget::Claim;

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

/// An `O_PATH` descriptor of a file on a mount, and its part of the budget.
#[derive(Debug)]
pub struct Path {
    fd: OwnedFd,
    _claim: Option<Claim>,
}

impl Path {
    /// Nothing is claimed for the root.
    pub fn new(fd: OwnedFd, claim: Option<Claim>) -> Arc<Self> {
        Arc::new(Self { fd, _claim: claim })
    }
}

impl AsFd for Path {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A file that the guest knows.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its number.
    pub id: u64,
    /// Names the file; by a mount that can be written, if it was reached by one.
    pub path: Arc<Path>,
    /// The mount of `path`.
    pub mount: u64,
    /// Names it on other mounts.
    others: Vec<(u64, Arc<Path>)>,
    /// Its identity.
    pub key: Key,
    /// Its type, which cannot change.
    pub kind: FileType,
    /// Whether it lies on an overlay.
    pub overlay: bool,
    /// Whether its identity stays what it is.
    pub settled: bool,
}

/// Mounts by which one file is named at most; a guest that binds it more often has the first of them.
const MAX_MOUNTS: usize = 16;

impl Node {
    /// A file that is not known yet; not on an overlay.
    pub fn new(path: Arc<Path>, mount: u64, key: Key, kind: FileType) -> Self {
        Self { id: 0, path, mount, others: Vec::new(), key, kind, overlay: false, settled: true }
    }

    /// A descriptor of the file on `mount`, if it was reached by it; otherwise any.
    pub fn path_on(&self, mount: u64) -> &Path {
        let other = self.others.iter().find(|(of, _)| *of == mount && self.mount != mount);
        other.map_or(&self.path, |(_, path)| path)
    }

    /// Whether there is a descriptor of the file on `mount`, or will be none.
    pub fn is_reached_by(&self, mount: u64) -> bool {
        self.mount == mount || self.others.iter().any(|(of, _)| *of == mount) || self.others.len() >= MAX_MOUNTS
    }

    /// The mounts that it was reached by, with a descriptor on each.
    pub fn mounts(&self) -> impl Iterator<Item = (u64, &Arc<Path>)> {
        std::iter::once((self.mount, &self.path)).chain(self.others.iter().map(|(mount, path)| (*mount, path)))
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.path.as_fd()
    }
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    /// References that the guest holds.
    lookups: u64,
    /// How often the guest has it open for writing, as far as it says so.
    writers: u32,
}

/// All of them.
#[derive(Debug)]
pub struct Nodes {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    next: u64,
    removed: u64,
}

impl Nodes {
    /// Knows only the root.
    pub fn new(root: Node) -> Self {
        let key = root.key;
        let root = Known { node: Arc::new(Node { id: ROOT, ..root }), lookups: 1, writers: 0 };
        Self { by_id: HashMap::from([(ROOT, root)]), by_key: HashMap::from([(key, ROOT)]), next: ROOT + 1, removed: 0 }
    }

    /// The node with this number.
    ///
    /// # Errors
    /// ESTALE if there is none.
    pub fn get(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.by_id.get(&id).map(|known| known.node.clone()).ok_or(Errno::STALE)
    }

    /// Every node.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.by_id.values().map(|known| &known.node)
    }

    /// The node with this identity.
    pub fn find(&self, key: &Key) -> Option<Arc<Node>> {
        self.by_key.get(key).and_then(|id| self.by_id.get(id)).map(|known| known.node.clone())
    }

    /// Gives the guest one more reference to the node with this identity.
    pub fn refer(&mut self, key: &Key) -> Option<Arc<Node>> {
        let known = self.by_key.get(key).and_then(|id| self.by_id.get_mut(id))?;
        known.lookups = known.lookups.saturating_add(1);
        Some(known.node.clone())
    }

    /// Enters a file with an identity that no node has, with one reference.
    pub fn enter(&mut self, node: Node) -> Arc<Node> {
        let id = self.next;
        self.next += 1;
        let node = Arc::new(Node { id, ..node });
        self.by_key.insert(node.key, id);
        self.by_id.insert(id, Known { node: node.clone(), lookups: 1, writers: 0 });
        node
    }

    /// Notes a node's present identity, and whether it stays that.
    pub fn rekey(&mut self, id: u64, key: Key, settled: bool) {
        let Some(known) = self.by_id.get_mut(&id) else { return };
        let old = known.node.key;
        if old == key && (known.node.settled || !settled) {
            return;
        }
        let node = Arc::make_mut(&mut known.node);
        node.key = key;
        node.settled |= settled;
        if old == key {
            return;
        }
        if self.by_key.get(&old) == Some(&id) {
            self.by_key.remove(&old);
        }
        self.by_key.insert(key, id);
    }

    /// Names the node's file by a descriptor on one more mount, or by another on a mount that is known; `main` makes it the
    /// one that is used where any will do. Returns what it replaces, which the caller closes.
    #[must_use]
    pub fn reach(&mut self, id: u64, path: Arc<Path>, mount: u64, main: bool) -> Option<Arc<Path>> {
        let Some(known) = self.by_id.get_mut(&id) else { return Some(path) };
        let node = Arc::make_mut(&mut known.node);
        if node.mount == mount {
            return Some(std::mem::replace(&mut node.path, path));
        }
        let place = node.others.iter().position(|(of, _)| *of == mount);
        let replaced = place.map(|at| node.others.remove(at).1);
        if replaced.is_none() && node.others.len() >= MAX_MOUNTS {
            return Some(path);
        }
        let other = if main {
            (std::mem::replace(&mut node.mount, mount), std::mem::replace(&mut node.path, path))
        } else {
            (mount, path)
        };
        node.others.push(other);
        replaced
    }

    /// Notes that the guest has opened a file for writing.
    pub fn add_writer(&mut self, id: u64) {
        if let Some(known) = self.by_id.get_mut(&id) {
            known.writers = known.writers.saturating_add(1);
        }
    }

    /// Notes that the guest has closed a file that it had open for writing; true if that was the last time.
    pub fn remove_writer(&mut self, id: u64) -> bool {
        let Some(known) = self.by_id.get_mut(&id) else { return false };
        known.writers = known.writers.saturating_sub(1);
        known.writers == 0
    }

    /// Takes `count` references back; returns the node if it is gone, for the caller to close. The root always stays.
    pub fn forget(&mut self, id: u64, count: u64) -> Option<Arc<Node>> {
        let known = self.by_id.get_mut(&id)?;
        if id == ROOT {
            return None;
        }
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 {
            return None;
        }
        let gone = self.by_id.remove(&id)?.node;
        self.removed += 1;
        // After a rekey the identity may be another node's.
        if self.by_key.get(&gone.key) == Some(&id) {
            self.by_key.remove(&gone.key);
        }
        Some(gone)
    }

    /// Forgets everything but the root; returns what is gone.
    pub fn clear(&mut self) -> Vec<Arc<Node>> {
        self.by_key.retain(|_, id| *id == ROOT);
        let gone: Vec<_> = self.by_id.extract_if(|id, _| *id != ROOT).map(|(_, known)| known.node).collect();
        self.removed += gone.len() as u64;
        gone
    }

    /// How many nodes are gone so far. As long as this stays what it is, an identity belongs to no other file.
    pub fn removed(&self) -> u64 {
        self.removed
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

    fn any_path() -> Arc<Path> {
        Path::new(File::open("/dev/null").unwrap().into(), None)
    }

    fn key(inode: u64) -> Key {
        Key { mount: 1, device: (8, 1), inode }
    }

    fn file(inode: u64) -> Node {
        Node::new(any_path(), 1, key(inode), FileType::RegularFile)
    }

    fn nodes() -> Nodes {
        Nodes::new(file(0))
    }

    fn enter(nodes: &mut Nodes, inode: u64) -> u64 {
        nodes.refer(&key(inode)).unwrap_or_else(|| nodes.enter(file(inode))).id
    }

    #[test]
    fn a_file_with_a_new_identity_is_found_by_it_and_leaves_the_old_one_to_others() {
        let mut nodes = nodes();
        let first = enter(&mut nodes, 1);
        nodes.rekey(first, key(2), true);
        assert_eq!(enter(&mut nodes, 2), first);
        let other = enter(&mut nodes, 1);
        assert_ne!(other, first);
        nodes.rekey(other, key(2), true);
        assert!(nodes.forget(first, 2).is_some());
        assert_eq!(nodes.find(&key(2)).map(|node| node.id), Some(other));
        assert!(nodes.find(&key(1)).is_none());
    }

    #[test]
    fn the_root_cannot_be_forgotten() {
        let mut nodes = nodes();
        assert!(nodes.forget(ROOT, u64::MAX).is_none());
        enter(&mut nodes, 1);
        assert_eq!(nodes.clear().len(), 1);
        assert!(nodes.get(ROOT).is_ok() && nodes.is_empty() && nodes.removed() == 1);
    }

    #[test]
    fn a_file_has_a_descriptor_of_each_mount_and_one_that_is_used_where_any_will_do() {
        let mut nodes = nodes();
        let id = enter(&mut nodes, 1);
        let [first, second, third, again] = [(); 4].map(|()| any_path());
        let replaced = nodes.reach(id, first.clone(), 1, true).unwrap();
        assert!(!Arc::ptr_eq(&replaced, &first));
        assert!(nodes.reach(id, second.clone(), 2, false).is_none());
        assert!(nodes.reach(id, third.clone(), 3, true).is_none());
        let node = nodes.get(id).unwrap();
        assert!(Arc::ptr_eq(&node.path, &third) && node.mount == 3);
        for (mount, path) in [(1, &first), (2, &second), (3, &third), (9, &third)] {
            assert!(std::ptr::eq(node.path_on(mount), &**path), "{mount}");
        }
        assert!(nodes.reach(id, again.clone(), 2, true).is_some_and(|old| Arc::ptr_eq(&old, &second)));
        let mounts: Vec<u64> = nodes.get(id).unwrap().mounts().map(|(mount, _)| mount).collect();
        assert_eq!(mounts, [2, 1, 3]);
    }

    proptest! {
        #[test]
        fn a_node_lives_exactly_as_long_as_its_references(
            steps in prop::collection::vec((any::<bool>(), 1u64..6, 0u64..4), 0..120)
        ) {
            let mut nodes = nodes();
            // inode -> (id, references)
            let mut model: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
            let mut ever = vec![ROOT];
            for (add, inode, count) in steps {
                if add {
                    let id = enter(&mut nodes, inode);
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
                    prop_assert_eq!(nodes.forget(*id, count).is_some(), gone);
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
