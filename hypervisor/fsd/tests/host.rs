//! What the host's processes and a guest see of each other's changes, and what a guest cannot change at all.

mod support;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use rustix::{
    mount::{MountFlags, mount_remount},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    process::{Pid, Resource, Rlimit, prlimit},
};
use support::{Client, ROOT, Stage, cstr, end, op, words};

const FATTR_MODE: u32 = 1;
const FATTR_UID: u32 = 1 << 1;
const FATTR_SIZE: u32 = 1 << 3;
const FATTR_MTIME: u32 = 1 << 5;

#[test]
fn nothing_is_remembered_of_what_the_host_changes_too() {
    let stage = Stage::new();
    stage.tmpfs("volume");
    fs::write(stage.shared().join("volume/file"), "old").unwrap();
    let (mut alone, mut shared) = Client::pair(&stage);
    let writeback = 1 << 16;
    assert_eq!((alone.init(u32::MAX).0 & writeback, shared.init(u32::MAX).0 & writeback), (writeback, 0));
    let file = shared.walk("volume/file").unwrap();
    assert_eq!((file.entry_valid, file.attr_valid), (0, 0));
    assert!(alone.walk("volume/file").unwrap().entry_valid > 3600, "the other connection's is its own");
    assert_eq!(shared.read(file.node, 0, 100).unwrap(), b"old");
    fs::write(stage.shared().join("volume/file"), "longer than before").unwrap();
    assert_eq!(shared.getattr(file.node).unwrap().size, 18);
    assert_eq!(shared.read(file.node, 0, 100).unwrap(), b"longer than before");
    let volume = shared.walk("volume").unwrap();
    fs::rename(stage.shared().join("volume/file"), stage.shared().join("volume/renamed")).unwrap();
    assert_eq!(shared.lookup(volume.node, "file"), Err(libc::ENOENT));
    assert_eq!(shared.lookup(volume.node, "renamed").unwrap().node, file.node);
    // Both connections end with the program.
    drop(shared.socket);
    let (status, said) = alone.finish();
    assert!(status.success(), "{said}");
}

#[test]
fn two_connections_have_numbers_users_and_masks_of_their_own() {
    let stage = Stage::new();
    let (mut one, mut two) = Client::pair(&stage);
    one.init(u32::MAX);
    two.init(u32::MAX);
    one.as_user(1000, 1000);
    two.as_user(2000, 2000);
    for n in 0..50 {
        let (a, b) = (format!("a{n}"), format!("b{n}"));
        // Both are on their way at once.
        let create = |name: &str, umask: u32| {
            let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32;
            [words(&[flags, libc::S_IFREG | 0o666, umask, 0]), cstr(name)].concat()
        };
        one.post(op::CREATE, ROOT, &create(&a, 0o077));
        two.post(op::CREATE, ROOT, &create(&b, 0o002));
        one.reply().1.unwrap();
        two.reply().1.unwrap();
        for (name, owner, mode) in [(a, 1000, 0o600), (b, 2000, 0o664)] {
            let made = fs::metadata(stage.shared().join(name)).unwrap();
            assert_eq!((made.uid(), made.mode() & 0o777), (owner, mode));
        }
    }
    let node = one.lookup(ROOT, "a0").unwrap().node;
    assert_eq!(two.getattr(node + 1000), Err(libc::ESTALE));
}

#[test]
fn what_is_mounted_read_only_stays_as_it_is_whatever_a_guest_sends() {
    let stage = Stage::new();
    let mounted = stage.tmpfs("ro");
    fs::create_dir(mounted.join("dir")).unwrap();
    fs::write(mounted.join("file"), "content").unwrap();
    let before = fs::metadata(mounted.join("file")).unwrap();
    stage.tmpfs("rw");
    mount_remount(&mounted, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
    let mut client = Client::new(&stage);
    let (ro, rw) = (client.lookup(ROOT, "ro").unwrap().node, client.lookup(ROOT, "rw").unwrap().node);
    let (file, dir) = (client.walk("ro/file").unwrap().node, client.walk("ro/dir").unwrap().node);
    let source = client.create(rw, "source", 0o644).unwrap().node;
    client.write(source, 0, b"other").unwrap();
    let erofs = libc::EROFS;
    let failed = |what: &str, result: Result<(), i32>| {
        let error = result.expect_err(what);
        assert!([erofs, libc::EXDEV, libc::ENOTTY].contains(&error), "{what}: {error}");
    };
    failed("write", client.write(file, 0, b"x").map(drop));
    for (what, valid) in
        [("chmod", FATTR_MODE), ("chown", FATTR_UID), ("truncate", FATTR_SIZE), ("utimes", FATTR_MTIME)]
    {
        assert_eq!(client.setattr(file, valid, (1, 1, 0o777, 1, 1)), Err(erofs), "{what}");
        assert!(client.setattr(dir, valid, (1, 1, 0o777, 1, 1)).is_err(), "{what} of a directory");
    }
    failed("setxattr", client.setxattr(file, "user.x", b"x"));
    failed("removexattr", client.ask(op::REMOVEXATTR, file, &cstr("user.x")).map(drop));
    failed("link", client.link(file, ro, "linked").map(drop));
    failed("link out", client.link(file, rw, "linked").map(drop));
    failed("rename", client.rename((ro, "file"), (ro, "renamed"), 0));
    failed("rename out", client.rename((ro, "file"), (rw, "renamed"), 0));
    failed("exchange", client.rename((ro, "file"), (ro, "dir"), libc::RENAME_EXCHANGE));
    failed("create", client.create(ro, "new", 0o644).map(drop));
    let truncate = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
    assert_eq!(client.create_with(ro, "file", truncate, 0o644, 0).map(drop), Err(libc::ESTALE));
    let writing = [(libc::O_WRONLY as u32).to_le_bytes(), [0; 4]].concat();
    assert_eq!(client.ask(op::OPEN, file, &writing), Err(erofs));
    failed("mkdir", client.mkdir(ro, "new", 0o755).map(drop));
    failed("mknod", client.mknod(ro, "new", libc::S_IFREG | 0o644, 0).map(drop));
    failed("symlink", client.symlink(ro, "new", "file").map(drop));
    failed("unlink", client.unlink(ro, "file"));
    failed("rmdir", client.rmdir(ro, "dir"));
    let fallocate = [[0u64, 0, 1 << 20, 0].map(u64::to_le_bytes).concat()].concat();
    failed("fallocate", client.ask(op::FALLOCATE, file, &fallocate).map(drop));
    let copy = [0, 0, file, 0, 0, 5, 0].map(u64::to_le_bytes).concat();
    failed("copy_file_range", client.ask(op::COPY_FILE_RANGE, source, &copy).map(drop));
    failed("ioctl", client.ask(op::IOCTL, file, &[0; 32]).map(drop));
    let after = fs::metadata(mounted.join("file")).unwrap();
    let attributes_of = |metadata: &fs::Metadata| {
        (metadata.mode(), metadata.uid(), metadata.len(), metadata.mtime(), metadata.ctime_nsec(), metadata.nlink())
    };
    assert_eq!(attributes_of(&after), attributes_of(&before));
    assert_eq!(fs::read_to_string(mounted.join("file")).unwrap(), "content");
    assert_eq!(client.read(file, 0, 100).unwrap(), b"content", "and can be read");
    assert_eq!(client.readdir(false, ro).unwrap().len(), 4);
}

#[test]
fn a_link_that_a_guest_plants_leads_nobody_out() {
    let stage = Stage::new();
    let outside = stage.beside("outside");
    let secret = outside.join("secret");
    fs::write(&secret, "secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let before = fs::metadata(&secret).unwrap();
    let mut client = Client::new(&stage);
    let absolute = secret.to_str().unwrap();
    for (name, target) in
        [("absolute", absolute), ("up", "../outside/secret"), ("proc", "/proc/self/fd/3"), ("self", "self")]
    {
        let link = client.symlink(ROOT, name, target).unwrap();
        assert_eq!(client.ask(op::READLINK, link.node, &[]).unwrap(), target.as_bytes());
        // Each would change what the link leads to if anybody followed it.
        for valid in [FATTR_MODE, FATTR_SIZE, FATTR_MTIME, FATTR_UID] {
            let _ = client.setattr(link.node, valid, (0, 1, 0o777, 1, 1));
        }
        let _ = client.setxattr(link.node, "user.x", b"x");
        let _ = client.getxattr(link.node, "user.x", 100);
        assert!(client.write(link.node, 0, b"x").is_err() && client.read(link.node, 0, 10).is_err());
        assert!(client.opendir(link.node).is_err());
        assert!(client.lookup(link.node, "secret").is_err());
        // A hard link to it is another link, not another name of what it leads to.
        let hard = client.link(link.node, ROOT, &format!("{name}-too")).unwrap();
        assert_eq!(hard.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        // A new file in its place is there, and not where it led.
        assert_eq!(client.create(ROOT, name, 0o644), Err(libc::EEXIST));
        client.rename((ROOT, &format!("{name}-too")), (ROOT, "moved"), 0).unwrap();
        client.unlink(ROOT, "moved").unwrap();
    }
    // One that is swapped in between a look and its use: the node stays what it was.
    let dir = client.mkdir(ROOT, "dir", 0o755).unwrap();
    fs::rename(stage.shared().join("dir"), stage.shared().join("away")).unwrap();
    symlink(&outside, stage.shared().join("dir")).unwrap();
    client.create(dir.node, "new", 0o644).unwrap();
    assert!(stage.shared().join("away/new").exists() && !outside.join("new").exists());
    let after = fs::metadata(&secret).unwrap();
    let attributes_of = |metadata: &fs::Metadata| {
        (metadata.mode(), metadata.uid(), metadata.mtime(), metadata.ctime(), metadata.nlink())
    };
    assert_eq!(attributes_of(&after), attributes_of(&before));
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

/// The kernel's limit, which comes before the program's own where an operator has set a low one.
#[test]
fn out_of_descriptors_it_says_so_and_serves_again_after_forgets() {
    let stage = Stage::new();
    for n in 0..200 {
        fs::write(stage.shared().join(n.to_string()), n.to_string()).unwrap();
    }
    let mut client = Client::new(&stage);
    let first = client.lookup(ROOT, "0").unwrap();
    let pid = Pid::from_child(&client.child);
    let open = fs::read_dir(Path::new("/proc").join(client.child.id().to_string()).join("fd")).unwrap().count() as u64;
    let few = Some(open + 20);
    prlimit(Some(pid), Resource::Nofile, Rlimit { current: few, maximum: few }).unwrap();
    let mut known = Vec::new();
    let refused = loop {
        match client.lookup(ROOT, &(known.len() + 1).to_string()) {
            Ok(entry) => known.push(entry),
            Err(errno) => break errno,
        }
    };
    assert_eq!(refused, libc::ENFILE);
    assert!((10..40).contains(&known.len()), "{}", known.len());
    // Whatever needs a descriptor says the same, and what needs none works.
    assert_eq!(client.read(first.node, 0, 10), Err(libc::ENFILE));
    assert_eq!(client.opendir(ROOT), Err(libc::ENFILE));
    assert_eq!(client.create(ROOT, "new", 0o644), Err(libc::ENFILE));
    assert_eq!(client.lookup(ROOT, "199"), Err(libc::ENFILE));
    assert_eq!(client.getattr(first.node).unwrap().size, 1);
    client.setattr(first.node, FATTR_MODE, (0, 0, 0o600, 0, 0)).unwrap();
    for entry in known.drain(..) {
        client.forget(entry.node, 1);
    }
    assert_eq!(client.read(first.node, 0, 10).unwrap(), b"0");
    let last = client.lookup(ROOT, "199").unwrap();
    assert_eq!(client.read(last.node, 0, 10).unwrap(), b"199");
    assert_eq!(client.readdir(true, ROOT).unwrap().len(), 202);
    let (status, said) = client.finish();
    assert!(status.success(), "{said}");
}

#[test]
fn sockets_that_are_one_or_none_are_named() {
    let stage = Stage::new();
    let (alone, shared) = Client::pair(&stage);
    drop((shared.socket, alone.socket));
    let (status, said) = end(alone.child);
    assert!(status.success(), "{said}");
    let arguments = ["--socket-fd", "3", "--root-fd", "4", "--host-socket-fd", "3"];
    let root = fs::File::open(stage.shared()).unwrap().into();
    let (socket, _other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    for (arguments, words) in [
        (arguments, "--socket-fd and --host-socket-fd are the same descriptor, 3"),
        (
            arguments.map(|word| if word == "3" { "4" } else { word }),
            "--socket-fd and --root-fd are the same descriptor, 4",
        ),
    ] {
        let (status, said) = end(support::start(Some(&socket), Some(&root), &arguments));
        assert_eq!(status.code(), Some(1));
        assert!(said.contains(words), "{words}: {said}");
    }
}
