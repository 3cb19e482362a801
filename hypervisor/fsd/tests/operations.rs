//! FUSE's operations, request by request, and what the host sees of them.

mod support;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
};

use support::{Client, ROOT, Stage, cstr, op, u64_at};

const FATTR_MODE: u32 = 1;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const FATTR_ATIME: u32 = 1 << 4;
const FATTR_MTIME: u32 = 1 << 5;
const FATTR_KILL_SUIDGID: u32 = 1 << 11;

#[test]
fn init_agrees_on_what_both_know() {
    let stage = Stage::new();
    let mut client = Client::unready(&stage);
    let (flags, max_write, max_pages) = client.init(u32::MAX);
    assert_eq!((max_write, max_pages), (1 << 20, 256));
    for (name, bit) in [("WRITEBACK_CACHE", 16), ("POSIX_ACL", 20), ("MAX_PAGES", 22), ("HANDLE_KILLPRIV_V2", 28)] {
        assert!(flags & 1 << bit != 0, "{name} in {flags:#x}");
    }
    for (name, bit) in [("POSIX_LOCKS", 1), ("ATOMIC_O_TRUNC", 3), ("EXPORT_SUPPORT", 4), ("FLOCK_LOCKS", 10)] {
        assert!(flags & 1 << bit == 0, "{name} in {flags:#x}");
    }
    assert_eq!(client.init(0).0, 0);
    let (status, said) = client.finish();
    assert!(status.success(), "{said}");
}

#[test]
fn a_file_is_created_written_read_and_seen_on_the_host() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    assert_eq!(client.write(file.node, 0, b"hello").unwrap(), 5);
    assert_eq!(client.write(file.node, 1 << 20, b"far").unwrap(), 3);
    assert_eq!(client.read(file.node, 0, 5).unwrap(), b"hello");
    assert_eq!(client.read(file.node, (1 << 20) - 1, 100).unwrap(), b"\0far");
    assert_eq!(client.read(file.node, 1 << 30, 100).unwrap(), b"");
    let host = fs::metadata(stage.shared().join("file")).unwrap();
    assert_eq!((host.len(), host.mode()), ((1 << 20) + 3, 0o100644));
    assert_eq!(client.getattr(file.node).unwrap().size, (1 << 20) + 3);
    assert_eq!(client.lookup(ROOT, "file").unwrap().node, file.node);
}

#[test]
fn a_mebibyte_goes_in_one_request_each_way() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 13) as u8).collect();
    assert_eq!(client.write(file.node, 3, &data).unwrap(), 1 << 20);
    assert!(client.read(file.node, 3, 1 << 20).unwrap() == data);
}

#[test]
fn open_is_not_needed_and_flags_of_the_guest_do_not_reach_the_host() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    assert_eq!(client.ask(op::OPEN, file.node, &[0; 8]), Err(libc::ENOSYS));
    assert_eq!(client.ask(op::FLUSH, file.node, &[0; 24]), Err(libc::ENOSYS));
    let writing = [(libc::O_RDWR as u32).to_le_bytes(), [0; 4]].concat();
    assert_eq!(client.ask(op::OPEN, file.node, &writing), Err(libc::ENOSYS), "done, and nothing to release");
    client.write(file.node, 0, b"0123456789").unwrap();
    // At its offset and not at the end, from a buffer that is not aligned.
    let flags = (libc::O_RDWR | libc::O_APPEND | libc::O_DIRECT) as u32;
    assert_eq!(client.write_with(file.node, 2, b"xy", 0, flags).unwrap(), 2);
    assert_eq!(client.read_with(file.node, 0, 100, libc::O_DIRECT as u32).unwrap(), b"01xy456789");
}

#[test]
fn an_unlinked_file_lives_until_it_is_forgotten() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    client.write(file.node, 0, b"still").unwrap();
    client.unlink(ROOT, "file").unwrap();
    assert_eq!(client.lookup(ROOT, "file"), Err(libc::ENOENT));
    client.write(file.node, 5, b" here").unwrap();
    assert_eq!(client.read(file.node, 0, 100).unwrap(), b"still here");
    assert_eq!(client.getattr(file.node).unwrap().nlink, 0);
    assert_eq!(client.setattr(file.node, FATTR_SIZE, (5, 0, 0, 0, 0)).unwrap().size, 5);
    client.forget(file.node, 1);
    assert_eq!(client.getattr(file.node), Err(libc::ESTALE));
    assert_eq!(client.read(file.node, 0, 1), Err(libc::ESTALE));
}

#[test]
fn hard_links_are_one_node_and_links_to_symlinks_are_links() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "a", 0o644).unwrap();
    let link = client.link(file.node, ROOT, "b").unwrap();
    assert_eq!((link.node, link.attr.nlink), (file.node, 2));
    client.unlink(ROOT, "a").unwrap();
    assert_eq!(client.lookup(ROOT, "b").unwrap().node, file.node);
    let symlink = client.symlink(ROOT, "s", "/nowhere").unwrap();
    assert_eq!(client.link(symlink.node, ROOT, "t").unwrap().node, symlink.node);
    assert_eq!(client.ask(op::READLINK, symlink.node, &[]).unwrap(), b"/nowhere");
    let dir = client.mkdir(ROOT, "d", 0o755).unwrap();
    assert_eq!(client.link(dir.node, ROOT, "e"), Err(libc::EPERM));
}

#[test]
fn renames_replace_exchange_or_refuse() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let dir = client.mkdir(ROOT, "dir", 0o755).unwrap();
    let a = client.create(ROOT, "a", 0o644).unwrap();
    let b = client.create(dir.node, "b", 0o644).unwrap();
    assert_eq!(client.rename((ROOT, "a"), (dir.node, "b"), libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    client.rename((ROOT, "a"), (dir.node, "b"), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(client.lookup(ROOT, "a").unwrap().node, b.node);
    assert_eq!(client.lookup(dir.node, "b").unwrap().node, a.node);
    client.rename((ROOT, "a"), (dir.node, "b"), 0).unwrap();
    assert_eq!(client.lookup(ROOT, "a"), Err(libc::ENOENT));
    assert_eq!(client.lookup(dir.node, "b").unwrap().node, b.node);
    client.rename((ROOT, "dir"), (ROOT, "new"), 0).unwrap();
    assert_eq!(client.walk("new/b").unwrap().node, b.node);
    let body = [&ROOT.to_le_bytes()[..], &cstr("new"), &cstr("old")].concat();
    client.ask(op::RENAME, ROOT, &body).unwrap();
    assert_eq!(client.walk("old").unwrap().node, dir.node);
}

#[test]
fn directories_come_and_go() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let dir = client.mkdir(ROOT, "dir", 0o1777).unwrap();
    assert_eq!(dir.attr.mode, 0o041755, "the umask applies");
    client.create(dir.node, "file", 0o600).unwrap();
    assert_eq!(client.rmdir(ROOT, "dir"), Err(libc::ENOTEMPTY));
    assert_eq!(client.unlink(ROOT, "dir"), Err(libc::EISDIR));
    client.unlink(dir.node, "file").unwrap();
    client.rmdir(ROOT, "dir").unwrap();
    assert!(!stage.shared().join("dir").exists());
    assert_eq!(client.create(dir.node, "file", 0o600), Err(libc::ENOENT));
}

#[test]
fn attributes_are_set() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    client.write(file.node, 0, b"0123456789").unwrap();
    assert_eq!(client.setattr(file.node, FATTR_SIZE, (4, 0, 0, 0, 0)).unwrap().size, 4);
    assert_eq!(client.setattr(file.node, FATTR_MODE, (0, 0, 0o4711, 0, 0)).unwrap().mode, 0o104711);
    let owned = client.setattr(file.node, FATTR_UID | FATTR_GID, (0, 0, 0, 1234, 5678)).unwrap();
    assert_eq!((owned.uid, owned.gid, owned.mode), (1234, 5678, 0o100711), "chown takes setuid away");
    let both = client.setattr(file.node, FATTR_UID | FATTR_MODE, (0, 0, 0o4755, 7, 0)).unwrap();
    assert_eq!((both.uid, both.gid, both.mode), (7, 5678, 0o104755), "a mode given with it stays");
    let times = client.setattr(file.node, FATTR_ATIME | FATTR_MTIME, (0, 1_000_000_000, 0, 0, 0)).unwrap();
    assert_eq!(times.mtime, 1_000_000_000);
    let host = fs::metadata(stage.shared().join("file")).unwrap();
    assert_eq!((host.uid(), host.gid(), host.mtime(), host.len()), (7, 5678, 1_000_000_000, 4));
    // Of a symlink itself, not of what it points to.
    let link = client.symlink(ROOT, "link", "file").unwrap();
    assert_eq!(client.setattr(link.node, FATTR_UID | FATTR_GID, (0, 0, 0, 9, 9)).unwrap().uid, 9);
    assert_eq!(client.setattr(link.node, FATTR_MTIME, (0, 5, 0, 0, 0)).unwrap().mtime, 5);
    assert_eq!(client.setattr(link.node, FATTR_SIZE, (0, 0, 0, 0, 0)), Err(libc::EINVAL));
    assert_eq!(client.getattr(file.node).unwrap().uid, 7);
}

#[test]
fn setuid_and_setgid_go_when_the_guest_says_so_and_stay_otherwise() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o755).unwrap();
    const WRITE_KILL_SUIDGID: u32 = 1 << 2;
    let setuid = |client: &mut Client| client.setattr(file.node, FATTR_MODE, (0, 0, 0o6755, 0, 0)).unwrap();
    assert_eq!(setuid(&mut client).mode, 0o106755);
    client.write(file.node, 0, b"by root").unwrap();
    assert_eq!(client.getattr(file.node).unwrap().mode, 0o106755);
    client.write_with(file.node, 0, b"by a user", WRITE_KILL_SUIDGID, 0).unwrap();
    assert_eq!(client.getattr(file.node).unwrap().mode, 0o100755);
    assert_eq!(setuid(&mut client).mode, 0o106755, "the capability is back");
    assert_eq!(client.setattr(file.node, FATTR_SIZE, (1, 0, 0, 0, 0)).unwrap().mode, 0o106755);
    assert_eq!(client.setattr(file.node, FATTR_SIZE | FATTR_KILL_SUIDGID, (1, 0, 0, 0, 0)).unwrap().mode, 0o100755);
}

#[test]
fn what_a_user_creates_is_the_users() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let dir = client.mkdir(ROOT, "team", 0o755).unwrap();
    // Writable for a supplementary group of the user, which no request tells: the guest has checked.
    client.setattr(dir.node, FATTR_UID | FATTR_GID | FATTR_MODE, (0, 0, 0o2770, 0, 2000)).unwrap();
    client.as_user(1000, 1001);
    let file = client.create(dir.node, "file", 0o600).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (1000, 2000), "setgid directory");
    let sub = client.mkdir(dir.node, "sub", 0o755).unwrap();
    assert_eq!((sub.attr.uid, sub.attr.gid, sub.attr.mode), (1000, 2000, 0o042755));
    let link = client.symlink(ROOT, "link", "x").unwrap();
    assert_eq!((link.attr.uid, link.attr.gid), (1000, 1001));
    let fifo = client.mknod(ROOT, "fifo", libc::S_IFIFO | 0o666, 0).unwrap();
    assert_eq!((fifo.attr.uid, fifo.attr.gid, fifo.attr.mode), (1000, 1001, 0o010644));
    let plain = client.mknod(ROOT, "plain", libc::S_IFREG | 0o640, 0).unwrap();
    assert_eq!((plain.attr.uid, plain.attr.mode), (1000, 0o100640));
    // And root's again, in the same session.
    client.as_user(0, 0);
    assert_eq!(client.create(ROOT, "roots", 0o600).unwrap().attr.uid, 0);
    client.as_user(0, 5);
    assert_eq!(client.create(ROOT, "roots2", 0o600).unwrap().attr.gid, 5);
    client.as_user(u32::MAX, 0);
    assert_eq!(client.create(ROOT, "nobodys", 0o600), Err(libc::EINVAL));
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let dir = client.mkdir(ROOT, "dir", 0o755).unwrap();
    // struct posix_acl_xattr_header, then entries (tag, permissions, id): user::rwx group::rwx other::r-x
    let entries: [(u16, u16, u32); 3] = [(1, 7, u32::MAX), (4, 7, u32::MAX), (0x20, 5, u32::MAX)];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    client.setxattr(dir.node, "system.posix_acl_default", &acl).unwrap();
    assert_eq!(client.getxattr(dir.node, "system.posix_acl_default", 100).unwrap(), acl);
    let with = client.create_with(dir.node, "with", libc::O_RDWR, 0o666, 0o077).unwrap();
    assert_eq!(with.attr.mode, 0o100664);
    let without = client.create_with(ROOT, "without", libc::O_RDWR, 0o666, 0o077).unwrap();
    assert_eq!(without.attr.mode, 0o100600);
    assert_eq!(client.mkdir(dir.node, "sub", 0o777).unwrap().attr.mode, 0o040775);
}

#[test]
fn extended_attributes_of_files_directories_and_links() {
    let stage = Stage::new();
    let _disk = stage.disk("disk");
    let mut client = Client::new(&stage);
    let disk = client.lookup(ROOT, "disk").unwrap().node;
    let file = client.create(disk, "file", 0o644).unwrap();
    let dir = client.mkdir(disk, "dir", 0o755).unwrap();
    for node in [file.node, dir.node] {
        client.setxattr(node, "user.a", b"value").unwrap();
        client.setxattr(node, "user.empty", b"").unwrap();
        assert_eq!(client.getxattr(node, "user.a", 100).unwrap(), b"value");
        assert_eq!(client.getxattr(node, "user.a", 0).unwrap(), [5, 0, 0, 0, 0, 0, 0, 0], "only the size");
        assert_eq!(client.getxattr(node, "user.a", 4), Err(libc::ERANGE));
        assert_eq!(client.getxattr(node, "user.empty", 100).unwrap(), b"");
        assert_eq!(client.getxattr(node, "user.none", 100), Err(libc::ENODATA));
        let mut names = client.ask(op::LISTXATTR, node, &[&1000u32.to_le_bytes()[..], &[0; 4]].concat()).unwrap();
        names.retain(|b| *b != 0);
        assert!(names == b"user.auser.empty" || names == b"user.emptyuser.a");
        client.ask(op::REMOVEXATTR, node, &cstr("user.a")).unwrap();
        assert_eq!(client.getxattr(node, "user.a", 100), Err(libc::ENODATA));
    }
    let link = client.symlink(disk, "link", "file").unwrap();
    assert_eq!(client.setxattr(link.node, "user.a", b"x"), Err(libc::EPERM), "not on what it points to");
    client.setxattr(file.node, "security.capability", &support::capability()).unwrap();
    client.write(file.node, 0, b"changed").unwrap();
    assert_eq!(client.getxattr(file.node, "security.capability", 100), Err(libc::ENODATA), "a write takes it away");
    assert_eq!(client.setxattr(file.node, "trusted.overlay.opaque", b"y"), Err(libc::EPERM));
    assert_eq!(client.setxattr(file.node, "security.other", b"y"), Err(libc::EPERM));
}

#[test]
fn space_is_allocated_punched_and_copied() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    let fallocate = |client: &mut Client, mode: u32, offset: u64, len: u64| {
        let body = [&[0; 8][..], &offset.to_le_bytes(), &len.to_le_bytes(), &mode.to_le_bytes(), &[0; 4]].concat();
        client.ask(op::FALLOCATE, file.node, &body)
    };
    fallocate(&mut client, 0, 0, 1 << 16).unwrap();
    assert_eq!(client.getattr(file.node).unwrap().size, 1 << 16);
    client.write(file.node, 0, &[7; 8192]).unwrap();
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    fallocate(&mut client, punch, 0, 4096).unwrap();
    assert_eq!(client.read(file.node, 4095, 2).unwrap(), [0, 7]);
    assert_eq!(fallocate(&mut client, 0, u64::MAX, u64::MAX), Err(libc::EINVAL));
    let copy = client.create(ROOT, "copy", 0o644).unwrap();
    let body: Vec<u8> = [0, 4096, copy.node, 0, 10, 100, 0].iter().flat_map(|v: &u64| v.to_le_bytes()).collect();
    assert_eq!(u64_at(&client.ask(op::COPY_FILE_RANGE, file.node, &body).unwrap(), 0), 100);
    assert_eq!(client.read(copy.node, 0, 1000).unwrap(), [[0; 10].to_vec(), vec![7; 100]].concat());
}

#[test]
fn files_and_directories_are_synced() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    client.ask(op::FSYNC, file.node, &[0; 16]).unwrap();
    client.ask(op::FSYNC, file.node, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    let handle = client.opendir(ROOT).unwrap();
    client.ask(op::FSYNCDIR, ROOT, &[&handle.to_le_bytes()[..], &[0; 8]].concat()).unwrap();
}

#[test]
fn statfs_is_the_file_systems() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let out = client.ask(op::STATFS, ROOT, &[]).unwrap();
    assert!(u64_at(&out, 0) > 0, "blocks");
    assert_eq!(support::u32_at(&out, 44), 255, "longest name");
}

#[test]
fn device_nodes_keep_their_numbers_and_are_never_opened() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let node = client.mknod(ROOT, "zero", libc::S_IFCHR | 0o666, 0x0105).unwrap();
    assert_eq!((node.attr.rdev, node.attr.mode), (0x0105, 0o020644));
    assert_eq!(client.read(node.node, 0, 10), Err(libc::EINVAL));
    assert_eq!(client.write(node.node, 0, b"x"), Err(libc::EINVAL));
    assert_eq!(client.setattr(node.node, FATTR_SIZE, (0, 0, 0, 0, 0)), Err(libc::EINVAL));
    assert_eq!(client.opendir(node.node), Err(libc::ENOTDIR));
    let large = client.mknod(ROOT, "large", libc::S_IFBLK | 0o600, 0x1234_56ab).unwrap();
    assert_eq!(large.attr.rdev, 0x1234_56ab);
    // A pipe has no other end: opening it would wait for ever.
    let fifo = client.mknod(ROOT, "fifo", libc::S_IFIFO | 0o666, 0).unwrap();
    assert_eq!(client.read(fifo.node, 0, 10), Err(libc::EINVAL));
}

#[test]
fn create_of_what_is_there_sends_the_guest_to_look_it_up() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    fs::write(stage.shared().join("file"), b"from the host").unwrap();
    client.symlink(ROOT, "link", "file").unwrap();
    for name in ["file", "link"] {
        assert_eq!(client.create(ROOT, name, 0o644), Err(libc::EEXIST));
        let truncate = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
        assert_eq!(client.create_with(ROOT, name, truncate, 0o644, 0), Err(libc::ESTALE));
    }
    assert_eq!(fs::read(stage.shared().join("file")).unwrap(), b"from the host");
}

#[test]
fn a_listing_has_every_entry_once_with_the_number_that_stat_gives() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    for i in 0..500 {
        fs::write(stage.shared().join(format!("file-{i}-{}", "x".repeat(i % 60))), b"").unwrap();
    }
    fs::create_dir(stage.shared().join("dir")).unwrap();
    for plus in [false, true] {
        let entries = client.readdir(plus, ROOT).unwrap();
        let mut names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), entries.len(), "no entry twice");
        assert_eq!(names.len(), 503, "500 files, a directory, . and ..");
        for entry in entries.iter().filter(|e| !e.name.starts_with('.')) {
            let found = client.lookup(ROOT, &entry.name).unwrap();
            assert_eq!(found.attr.ino, entry.ino);
            let node = entry.entry.map(|e| e.node);
            assert_eq!(node, plus.then_some(found.node));
            client.forget(found.node, if plus { 2 } else { 1 });
            assert_eq!(client.getattr(found.node), Err(libc::ESTALE), "references of {} add up", entry.name);
        }
    }
}

#[test]
fn removing_while_listing_skips_nothing() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let dir = client.mkdir(ROOT, "dir", 0o755).unwrap();
    for i in 0..1000 {
        fs::write(stage.shared().join(format!("dir/{i}")), b"").unwrap();
    }
    let handle = client.opendir(dir.node).unwrap();
    let (mut offset, mut seen) = (0, 0);
    loop {
        let page = client.readdir_at(false, dir.node, handle, offset, 4096).unwrap();
        let Some(last) = page.last() else { break };
        offset = last.offset;
        for entry in page.iter().filter(|e| !e.name.starts_with('.')) {
            client.unlink(dir.node, &entry.name).unwrap();
            seen += 1;
        }
    }
    assert_eq!(seen, 1000);
    client.rmdir(ROOT, "dir").unwrap();
}

#[test]
fn what_the_shim_may_change_is_not_cached_and_what_only_the_guest_changes_is() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    assert_eq!(client.lookup(ROOT, "later"), Err(libc::ENOENT));
    assert_eq!(support_negative(&mut client, ROOT), 0, "a name that the shim may still make");
    // The shim mounts it while the server runs.
    stage.tmpfs("later");
    fs::write(stage.shared().join("later/file"), b"content").unwrap();
    let mounted = client.lookup(ROOT, "later").unwrap();
    assert_eq!(mounted.entry_valid, 0);
    assert!(mounted.attr_valid > 3600);
    let file = client.lookup(mounted.node, "file").unwrap();
    assert!(file.entry_valid > 3600 && file.attr_valid > 3600);
    assert!(support_negative(&mut client, mounted.node) > 3600);
    assert_eq!(client.read(file.node, 0, 100).unwrap(), b"content");
    assert_eq!(
        fs::metadata(stage.shared().join("later")).unwrap().permissions().mode() & 0o777,
        mounted.attr.mode & 0o777
    );
}

/// For how long a missing name may be remembered, seconds.
fn support_negative(client: &mut Client, node: u64) -> u64 {
    let out = client.ask(op::LOOKUP, node, &cstr("missing")).unwrap();
    assert_eq!(u64_at(&out, 0), 0, "no node");
    u64_at(&out, 16)
}
