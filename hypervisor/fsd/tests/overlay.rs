//! On an overlay mount, which is what container roots usually are.

mod support;

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::Path};

use rustix::mount::{MountFlags, mount_bind, mount_remount};
use support::{Client, ROOT, Stage, capability};

fn fill(lower: &Path) {
    fs::create_dir_all(lower.join("dir/sub")).unwrap();
    fs::write(lower.join("file"), b"from the image").unwrap();
    fs::write(lower.join("dir/a"), b"a").unwrap();
    fs::write(lower.join("dir/sub/b"), b"b").unwrap();
    fs::hard_link(lower.join("dir/a"), lower.join("dir/a2")).unwrap();
    std::os::unix::fs::symlink("file", lower.join("link")).unwrap();
}

struct Overlay {
    stage: Stage,
    client: Client,
    root: u64,
}

fn overlay(options: &str) -> Overlay {
    let stage = Stage::new();
    stage.overlay("root", options, fill);
    let mut client = Client::new(&stage);
    let root = client.lookup(ROOT, "root").unwrap().node;
    Overlay { stage, client, root }
}

impl Overlay {
    fn upper(&self) -> std::path::PathBuf {
        self.stage.beside("root.upper")
    }
}

#[test]
fn a_file_of_the_image_stays_the_same_file_when_it_is_written() {
    let mut o = overlay("");
    let before = o.client.walk("root/file").unwrap();
    assert_eq!(o.client.read(before.node, 0, 100).unwrap(), b"from the image");
    o.client.write(before.node, 0, b"FROM").unwrap();
    let after = o.client.walk("root/file").unwrap();
    assert_eq!((after.node, after.attr.ino), (before.node, before.attr.ino));
    assert_eq!(o.client.read(before.node, 0, 100).unwrap(), b"FROM the image");
    assert_eq!(fs::read(o.upper().join("file")).unwrap(), b"FROM the image");
    assert_eq!(fs::read(o.stage.beside("root.lower").join("file")).unwrap(), b"from the image");
}

#[test]
fn attributes_owners_and_xattrs_are_copied_up() {
    let mut o = overlay("");
    let file = o.client.walk("root/file").unwrap();
    let (uid, mode) = (1 << 1, 1);
    let new = o.client.setattr(file.node, uid | mode, (0, 0, 0o600, 1000, 0)).unwrap();
    assert_eq!((new.uid, new.mode, new.size), (1000, 0o100600, 14));
    o.client.setxattr(file.node, "security.capability", &capability()).unwrap();
    assert_eq!(o.client.getxattr(file.node, "security.capability", 100).unwrap(), capability());
    assert_eq!(fs::metadata(o.upper().join("file")).unwrap().uid(), 1000);
    let link = o.client.walk("root/link").unwrap();
    assert_eq!(o.client.setattr(link.node, uid, (0, 0, 0, 5, 0)).unwrap().uid, 5);
}

#[test]
fn hard_links_of_the_image_and_new_ones() {
    let mut o = overlay(",index=on");
    let (a, a2) = (o.client.walk("root/dir/a").unwrap(), o.client.walk("root/dir/a2").unwrap());
    assert_eq!((a.node, a.attr.nlink), (a2.node, 2));
    o.client.write(a.node, 0, b"changed").unwrap();
    let a2 = o.client.walk("root/dir/a2").unwrap();
    assert_eq!(a2.node, a.node, "still one file after it was written");
    assert_eq!(o.client.read(a2.node, 0, 100).unwrap(), b"changed");
    let file = o.client.walk("root/file").unwrap();
    let link = o.client.link(file.node, o.root, "hard").unwrap();
    assert_eq!((link.node, link.attr.nlink), (file.node, 2));
    o.client.unlink(o.root, "file").unwrap();
    assert_eq!(o.client.getattr(link.node).unwrap().nlink, 1);
}

/// containerd mounts with index=off: overlayfs then breaks an image's hard links at the first write, as on the host.
#[test]
fn without_an_index_a_written_hard_link_of_the_image_becomes_a_file_of_its_own() {
    type Change = fn(&mut Client, u64, u64);
    let changes: [(&str, Change); 5] = [
        ("write", |client, _, node| assert_eq!(client.write(node, 0, b"changed"), Ok(7))),
        ("chmod", |client, _, node| assert!(client.setattr(node, 1, (0, 0, 0o600, 0, 0)).is_ok())),
        ("setxattr", |client, _, node| client.setxattr(node, "security.capability", &capability()).unwrap()),
        ("link", |client, dir, node| assert_eq!(client.link(node, dir, "a3").unwrap().node, node)),
        ("rename", |client, dir, _| client.rename((dir, "a"), (dir, "z"), 0).unwrap()),
    ];
    for (what, change) in changes {
        let mut o = overlay(",index=off");
        let dir = o.client.walk("root/dir").unwrap().node;
        let (a, a2) = (o.client.lookup(dir, "a").unwrap(), o.client.lookup(dir, "a2").unwrap());
        assert_eq!(a.node, a2.node);
        change(&mut o.client, dir, a.node);
        let host = o.stage.shared().join("root/dir");
        let name = if what == "rename" { "z" } else { "a" };
        let changed = o.client.lookup(dir, name).unwrap();
        assert_eq!(changed.node, a.node, "still the same file after {what}");
        assert_eq!(o.client.read(changed.node, 0, 100).unwrap(), fs::read(host.join(name)).unwrap(), "after {what}");
        let left = o.client.lookup(dir, "a2").unwrap();
        assert_ne!(left.node, a.node, "another file after {what}");
        assert_eq!(o.client.read(left.node, 0, 100).unwrap(), b"a");
        assert_eq!(left.attr.ino, fs::metadata(host.join("a2")).unwrap().ino());
    }
}

#[test]
fn renaming_a_directory_of_the_image_is_left_to_the_guest_unless_overlayfs_can() {
    let mut o = overlay(",redirect_dir=off");
    assert_eq!(o.client.rename((o.root, "dir"), (o.root, "moved"), 0), Err(libc::EXDEV), "mv copies then");
    let new = o.client.mkdir(o.root, "new", 0o755).unwrap();
    o.client.rename((o.root, "new"), (o.root, "newer"), 0).unwrap();
    assert_eq!(o.client.lookup(o.root, "newer").unwrap().node, new.node);
    drop(o);
    let mut o = overlay(",redirect_dir=on");
    let dir = o.client.lookup(o.root, "dir").unwrap();
    o.client.rename((o.root, "dir"), (o.root, "moved"), 0).unwrap();
    assert_eq!(o.client.walk("root/moved/sub/b").unwrap().attr.size, 1);
    assert_eq!(o.client.lookup(o.root, "moved").unwrap().node, dir.node);
}

#[test]
fn what_is_removed_is_gone_and_whiteouts_do_not_show() {
    let mut o = overlay("");
    o.client.unlink(o.root, "file").unwrap();
    let dir = o.client.lookup(o.root, "dir").unwrap();
    let sub = o.client.lookup(dir.node, "sub").unwrap();
    o.client.unlink(sub.node, "b").unwrap();
    o.client.rmdir(dir.node, "sub").unwrap();
    assert_eq!(o.client.lookup(o.root, "file"), Err(libc::ENOENT));
    for plus in [false, true] {
        let names: Vec<String> = o.client.readdir(plus, o.root).unwrap().into_iter().map(|e| e.name).collect();
        assert!(!names.contains(&"file".to_owned()) && names.contains(&"dir".to_owned()), "{names:?}");
    }
    let host = fs::symlink_metadata(o.upper().join("file")).unwrap();
    assert_eq!((host.mode() & libc::S_IFMT, host.rdev()), (libc::S_IFCHR, 0), "a whiteout");
    let again = o.client.create(o.root, "file", 0o644).unwrap();
    assert_eq!(again.attr.size, 0);
    assert_eq!(o.client.mknod(o.root, "whiteout", libc::S_IFCHR, 0), Err(libc::EPERM), "a guest cannot make one");
}

#[test]
fn a_file_of_the_image_is_readable_after_its_unlink() {
    let mut o = overlay("");
    let file = o.client.walk("root/file").unwrap();
    assert_eq!(o.client.read(file.node, 0, 4).unwrap(), b"from");
    o.client.unlink(o.root, "file").unwrap();
    assert_eq!(o.client.read(file.node, 0, 100).unwrap(), b"from the image");
    // Writing it needs a copy, for which overlayfs has no name any more. It must not come back.
    let _ = o.client.write(file.node, 0, b"FROM");
    assert_eq!(o.client.lookup(o.root, "file"), Err(libc::ENOENT));
    assert!(!o.stage.shared().join("root/file").exists());
    // One that was written before goes on as any file.
    let written = o.client.walk("root/dir/sub/b").unwrap();
    o.client.write(written.node, 0, b"x").unwrap();
    let sub = o.client.walk("root/dir/sub").unwrap();
    o.client.unlink(sub.node, "b").unwrap();
    o.client.write(written.node, 1, b"yz").unwrap();
    assert_eq!(o.client.read(written.node, 0, 100).unwrap(), b"xyz");
}

#[test]
fn listings_and_stat_agree_on_inode_numbers() {
    let mut o = overlay("");
    let written = o.client.walk("root/dir/a").unwrap();
    o.client.write(written.node, 0, b"x").unwrap();
    let dir = o.client.lookup(o.root, "dir").unwrap();
    o.client.create(dir.node, "new", 0o644).unwrap();
    for node in [o.root, dir.node] {
        for plus in [false, true] {
            for entry in o.client.readdir(plus, node).unwrap().iter().filter(|e| !e.name.starts_with('.')) {
                let found = o.client.lookup(node, &entry.name).unwrap();
                assert_eq!(found.attr.ino, entry.ino, "{} (plus: {plus})", entry.name);
                assert_eq!(o.client.getattr(found.node).unwrap().ino, entry.ino, "{}", entry.name);
            }
        }
    }
}

#[test]
fn ten_thousand_small_files() {
    let mut o = overlay("");
    let dir = o.client.lookup(o.root, "dir").unwrap().node;
    let mut nodes = BTreeMap::new();
    for i in 0..10_000 {
        let name = format!("{i:05}");
        let file = o.client.create(dir, &name, 0o644).unwrap();
        o.client.write(file.node, 0, name.as_bytes()).unwrap();
        nodes.insert(name, file.node);
    }
    let listed = o.client.readdir(true, dir).unwrap();
    assert_eq!(listed.len(), 10_000 + 5, "and a, a2, sub, . and ..");
    for entry in &listed {
        if let Some(node) = nodes.get(&entry.name) {
            assert_eq!(entry.entry.map(|e| (e.node, e.attr.size)), Some((*node, 5)));
            assert_eq!(o.client.read(*node, 0, 10).unwrap(), entry.name.as_bytes());
            o.client.unlink(dir, &entry.name).unwrap();
            o.client.forget(*node, 2);
        }
    }
    assert_eq!(o.client.readdir(false, dir).unwrap().len(), 5);
    let open = fs::read_dir(format!("/proc/{}/fd", o.client.child.id())).unwrap().count();
    assert!(open < 100, "{open} descriptors are left open");
}

/// The node may have been found by the name that is gone now, which overlayfs cannot copy up any more.
#[test]
fn a_hard_link_of_the_image_can_be_written_when_another_is_gone() {
    let mut o = overlay(",index=off");
    let dir = o.client.walk("root/dir").unwrap().node;
    let a = o.client.lookup(dir, "a").unwrap();
    o.client.unlink(dir, "a").unwrap();
    let a2 = o.client.lookup(dir, "a2").unwrap();
    assert_eq!(a2.node, a.node);
    o.client.write(a2.node, 0, b"changed").unwrap();
    let host = o.stage.shared().join("root/dir");
    assert_eq!(fs::read(host.join("a2")).unwrap(), b"changed");
    assert!(!host.join("a").exists());
    assert_eq!(o.client.lookup(dir, "a2").unwrap().node, a2.node);
}

/// What is written must not be asked of the mount that is read-only because its name is the one that is left.
#[test]
fn a_hard_link_that_is_found_by_a_read_only_bind_can_still_be_written_by_the_other_mount() {
    let stage = Stage::new();
    let root = stage.overlay("root", ",index=off", fill);
    let ro = stage.shared().join("ro");
    fs::create_dir(&ro).unwrap();
    mount_bind(root.join("dir"), &ro).unwrap();
    mount_remount(&ro, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
    let mut client = Client::new(&stage);
    let dir = client.walk("root/dir").unwrap().node;
    let a = client.lookup(dir, "a").unwrap().node;
    client.unlink(dir, "a").unwrap();
    assert_eq!(client.walk("ro/a2").unwrap().node, a);
    assert_eq!(client.lookup(dir, "a2").unwrap().node, a);
    client.write(a, 0, b"changed").unwrap();
    assert_eq!(fs::read(root.join("dir/a2")).unwrap(), b"changed");
}
