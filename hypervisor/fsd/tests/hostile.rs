//! A guest that sends what no kernel would: the server answers each request once, stays inside, and stays alive.

mod support;

use std::{fs, os::unix::fs::symlink, path::Path};

use proptest::{prelude::*, test_runner::TestRunner};
use rustix::mount::mount_bind;
use support::{Client, ROOT, Stage, cstr, op, words};

const PATHS: [&str; 9] = ["..", ".", "", "/", "/etc", "../etc", "a/b", "dir/..", "dir/"];

#[test]
fn a_name_that_is_a_path_is_refused_by_every_operation() {
    let stage = Stage::new();
    fs::write(stage.beside("outside").join("secret"), b"x").unwrap();
    let mut client = Client::new(&stage);
    let dir = client.mkdir(ROOT, "dir", 0o755).unwrap();
    let file = client.create(dir.node, "file", 0o644).unwrap();
    for parent in [ROOT, dir.node] {
        for path in PATHS {
            let einval = Err(libc::EINVAL);
            assert_eq!(client.lookup(parent, path), Err(libc::EINVAL), "lookup {path:?}");
            assert_eq!(client.create(parent, path, 0o644), Err(libc::EINVAL), "create {path:?}");
            assert_eq!(client.mkdir(parent, path, 0o755), Err(libc::EINVAL), "mkdir {path:?}");
            assert_eq!(client.mknod(parent, path, libc::S_IFREG, 0), Err(libc::EINVAL), "mknod {path:?}");
            assert_eq!(client.symlink(parent, path, "x"), Err(libc::EINVAL), "symlink {path:?}");
            assert_eq!(client.link(file.node, parent, path), Err(libc::EINVAL), "link {path:?}");
            assert_eq!(client.unlink(parent, path), einval, "unlink {path:?}");
            assert_eq!(client.rmdir(parent, path), einval, "rmdir {path:?}");
            assert_eq!(client.rename((parent, path), (parent, "x"), 0), einval, "rename from {path:?}");
            assert_eq!(client.rename((dir.node, "file"), (parent, path), 0), einval, "rename to {path:?}");
        }
    }
    assert_eq!(client.readdir(false, ROOT).unwrap().len(), 3, "nothing but dir, . and ..");
}

#[test]
fn symlinks_are_data_and_are_never_followed() {
    let stage = Stage::new();
    let outside = stage.beside("outside");
    fs::write(outside.join("secret"), b"secret").unwrap();
    let shared = stage.shared();
    let mut client = Client::new(&stage);
    for (name, target) in [
        ("up", Path::new("../outside")),
        ("root", Path::new("/")),
        ("abs", &outside),
        ("proc", Path::new("/proc/self/root")),
    ] {
        symlink(target, shared.join(name)).unwrap();
        let link = client.lookup(ROOT, name).unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(client.ask(op::READLINK, link.node, &[]).unwrap(), target.to_str().unwrap().as_bytes());
        assert_eq!(client.lookup(link.node, "secret"), Err(libc::ENOTDIR), "through {name}");
        assert_eq!(client.create(link.node, "new", 0o644), Err(libc::ENOTDIR), "through {name}");
        assert_eq!(client.opendir(link.node), Err(libc::ENOTDIR), "{name}");
        assert_eq!(client.read(link.node, 0, 10), Err(libc::EINVAL), "{name}");
        let trunc = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
        assert_eq!(client.create_with(ROOT, name, trunc, 0o644, 0), Err(libc::ESTALE), "{name}");
        // Flags that would follow it: create is always exclusive first.
        assert_eq!(
            client.create_with(ROOT, name, libc::O_PATH | libc::O_CREAT | libc::O_EXCL, 0o644, 0),
            Err(libc::EEXIST)
        );
    }
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn a_directory_that_moves_does_not_lead_out() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let dir = client.mkdir(ROOT, "dir", 0o755).unwrap();
    let deep = client.mkdir(dir.node, "deep", 0o755).unwrap();
    client.rename((dir.node, "deep"), (ROOT, "deep"), 0).unwrap();
    assert_eq!(client.lookup(deep.node, ".."), Err(libc::EINVAL));
    assert_eq!(client.rename((ROOT, "dir"), (deep.node, "dir"), 0), Ok(()));
    assert_eq!(client.rename((ROOT, "deep"), (dir.node, "deep"), 0), Err(libc::EINVAL), "into itself");
}

#[test]
fn hard_links_and_renames_do_not_cross_mounts() {
    let stage = Stage::new();
    stage.tmpfs("a");
    stage.tmpfs("b");
    let mut client = Client::new(&stage);
    let (a, b) = (client.lookup(ROOT, "a").unwrap(), client.lookup(ROOT, "b").unwrap());
    let file = client.create(a.node, "file", 0o644).unwrap();
    assert_eq!(client.link(file.node, b.node, "file"), Err(libc::EXDEV));
    assert_eq!(client.rename((a.node, "file"), (b.node, "file"), 0), Err(libc::EXDEV));
    assert_eq!(client.rmdir(ROOT, "a"), Err(libc::EBUSY), "a mount point");
    let other = client.create(b.node, "file", 0o644).unwrap();
    assert_ne!(other.node, file.node, "equal inode numbers of two file systems are two files");
}

#[test]
fn nodes_and_handles_that_were_never_given_are_stale() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    let dir = client.mkdir(ROOT, "dir", 0o755).unwrap();
    let handle = client.opendir(dir.node).unwrap();
    for node in [0, file.node + 100, u64::MAX, 1 << 63] {
        for opcode in [
            op::LOOKUP,
            op::GETATTR,
            op::SETATTR,
            op::READLINK,
            op::READ,
            op::WRITE,
            op::STATFS,
            op::OPENDIR,
            op::UNLINK,
            op::FSYNC,
        ] {
            let body = if [op::LOOKUP, op::UNLINK].contains(&opcode) { cstr("x") } else { vec![0; 88] };
            assert_eq!(client.ask(opcode, node, &body), Err(libc::ESTALE), "opcode {opcode} on node {node}");
        }
        assert_eq!(client.link(node, ROOT, "x"), Err(libc::ESTALE));
        client.forget(node, 1);
    }
    for made_up in [0, handle + 1, u64::MAX] {
        assert_eq!(client.readdir_at(false, dir.node, made_up, 0, 4096), Err(libc::EBADF));
        assert_eq!(client.readdir_at(true, dir.node, made_up, 0, 4096), Err(libc::EBADF));
    }
    assert_eq!(client.readdir_at(false, ROOT, handle, 0, 4096), Err(libc::EBADF), "another node's handle");
    // Forgetting too often or the root does no harm.
    client.forget(ROOT, u64::MAX);
    client.forget(file.node, u64::MAX);
    client.forget(file.node, 1);
    assert!(client.lookup(ROOT, "file").is_ok());
}

#[test]
fn sizes_and_counts_beyond_all_measure_are_refused_or_cut() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    client.write(file.node, 0, b"0123456789").unwrap();
    assert_eq!(client.read(file.node, 0, u32::MAX).unwrap(), b"0123456789");
    assert_eq!(client.read(file.node, u64::MAX, 10), Err(libc::EINVAL));
    assert_eq!(client.write(file.node, u64::MAX, b"x"), Err(libc::EINVAL));
    // WRITE that announces more than it brings writes what it brings.
    let mut body = [0; 43];
    body[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    body[40..].copy_from_slice(b"abc");
    client.ask(op::WRITE, file.node, &body).unwrap();
    assert_eq!(client.read(file.node, 0, 100).unwrap(), b"abc3456789");
    assert_eq!(client.getxattr(file.node, "security.none", u32::MAX), Err(libc::ENODATA));
    assert_eq!(client.ask(op::LISTXATTR, file.node, &[0xff; 8]).unwrap(), b"");
    assert_eq!(client.setxattr(file.node, "user.big", &vec![0; 1 << 20]), Err(libc::E2BIG));
    let handle = client.opendir(ROOT).unwrap();
    assert!(client.readdir_at(false, ROOT, handle, 0, u32::MAX).is_err());
    assert!(client.readdir_at(false, ROOT, handle, u64::MAX, 4096).is_err());
    assert!(client.readdir_at(true, ROOT, handle, 0, 1).unwrap().is_empty());
    let long = "x".repeat(256);
    assert_eq!(client.lookup(ROOT, &long), Err(libc::ENAMETOOLONG));
    assert_eq!(client.create(ROOT, &"x".repeat(100_000), 0o644), Err(libc::ENAMETOOLONG));
    assert_eq!(client.symlink(ROOT, "link", &"x".repeat(5000)), Err(libc::ENAMETOOLONG));
    assert!(client.setattr(file.node, 1 << 3, (u64::MAX, 0, 0, 0, 0)).is_err());
    client.post(op::BATCH_FORGET, 0, &words(&[u32::MAX, 0]));
    assert_eq!(client.getattr(file.node).unwrap().size, 10);
}

#[test]
fn what_is_not_served_is_refused() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    assert_eq!(client.ask(op::IOCTL, file.node, &[0; 32]), Err(libc::ENOTTY));
    for opcode in [op::GETLK, op::INTERRUPT, 7, 48, 49, 53, 4096, u32::MAX] {
        assert_eq!(client.ask(opcode, file.node, &[0; 64]), Err(libc::ENOSYS), "opcode {opcode}");
    }
    // Unmounting forgets everything; the root is still there.
    client.ask(op::DESTROY, 0, &[]).unwrap();
    assert_eq!(client.getattr(file.node), Err(libc::ESTALE));
    assert!(client.lookup(ROOT, "file").is_ok());
}

#[test]
fn a_restarted_guest_starts_with_nothing() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap();
    let handle = client.opendir(ROOT).unwrap();
    client.init(u32::MAX);
    assert_eq!(client.getattr(file.node), Err(libc::ESTALE));
    assert_eq!(client.readdir_at(false, ROOT, handle, 0, 4096), Err(libc::EBADF));
}

#[test]
fn a_guest_that_remembers_too_many_files_gets_enfile_and_keeps_those_it_has() {
    let stage = Stage::new();
    for i in 0..1000 {
        fs::write(stage.shared().join(format!("{i}")), format!("{i}")).unwrap();
    }
    let mut client = Client::with(&stage, &["--max-files", "400"]);
    client.init(u32::MAX);
    let mut known = Vec::new();
    let refused = loop {
        match client.lookup(ROOT, &format!("{}", known.len())) {
            Ok(entry) => known.push(entry),
            Err(errno) => break errno,
        }
        assert!(known.len() < 1000, "no limit");
    };
    assert_eq!(refused, libc::ENFILE);
    assert_eq!(known.len(), 400);
    // All that it knows still works, opening included.
    for (i, entry) in known.iter().enumerate() {
        assert_eq!(client.read(entry.node, 0, 10).unwrap(), format!("{i}").as_bytes());
    }
    assert_eq!(client.opendir(ROOT), Err(libc::ENFILE));
    for entry in &known[50..80] {
        client.forget(entry.node, 1);
    }
    let mut handles = vec![client.opendir(ROOT).unwrap()];
    let listed = client.readdir(true, ROOT).unwrap();
    assert_eq!(listed.len(), 1002, "a listing is whole, if without nodes");
    for entry in listed.iter().filter_map(|entry| entry.entry).filter(|entry| entry.node != 0) {
        client.forget(entry.node, 1);
    }
    let refused = loop {
        match client.opendir(ROOT) {
            Ok(handle) => handles.push(handle),
            Err(errno) => break errno,
        }
        assert!(handles.len() < 20, "directories count as well");
    };
    assert_eq!(refused, libc::ENFILE);
    while client.mknod(ROOT, &format!("filler{}", handles.len()), libc::S_IFREG | 0o600, 0).is_ok() {
        handles.push(0);
    }
    assert_eq!(client.read(known[0].node, 0, 10).unwrap(), b"0");
    assert_eq!(client.create(ROOT, "new", 0o644), Err(libc::ENFILE));
    assert_eq!(client.mkdir(ROOT, "new", 0o755), Err(libc::ENFILE));
    assert!(!stage.shared().join("new").exists(), "a file that the guest cannot have was made");
    // And what it gives back it can have again.
    client.forget(known[5].node, 2);
    assert!(client.lookup(ROOT, "999").is_ok());
    client.ask(op::RELEASEDIR, ROOT, &[&handles[0].to_le_bytes()[..], &[0; 16]].concat()).unwrap();
    assert!(client.opendir(ROOT).is_ok());
    // The process cannot have many more descriptors than that.
    let limits = fs::read_to_string(format!("/proc/{}/limits", client.child.id())).unwrap();
    let open = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let hard: usize = open.split_whitespace().nth(4).unwrap().parse().unwrap();
    assert!((400..800).contains(&hard), "{open}");
}

#[test]
fn each_mount_by_which_a_file_is_known_counts() {
    let stage = Stage::new();
    let volume = stage.tmpfs("volume");
    fs::write(volume.join("file"), "content").unwrap();
    for i in 0..15 {
        let target = stage.shared().join(format!("{i}"));
        fs::create_dir(&target).unwrap();
        mount_bind(&volume, &target).unwrap();
    }
    // A directory for each mount, the file once, and its descriptors on all but the first.
    let mut client = Client::with(&stage, &["--max-files", "20"]);
    client.init(u32::MAX);
    let refused = (0..15).find(|i| client.walk(&format!("{i}/file")) == Err(libc::ENFILE));
    assert_eq!(refused, Some(10));
    client.walk("3/file").unwrap();
}

#[test]
fn a_guest_cannot_have_more_ranges_locked_than_its_share() {
    let stage = Stage::new();
    stage.tmpfs("volume");
    fs::write(stage.shared().join("volume/file"), "").unwrap();
    let (_alone, mut shared) = Client::pair(&stage);
    shared.init(u32::MAX);
    let node = shared.walk("volume/file").unwrap().node;
    let mut lock = |first: u64, last: u64, kind: i32| {
        let wide = [0, 1, first, last].map(u64::to_le_bytes).concat();
        shared.ask(op::SETLK, node, &[wide, words(&[kind as u32, 0, 0, 0])].concat()).map(drop)
    };
    lock(0, 1 << 20, libc::F_WRLCK).unwrap();
    let refused = (1..20_000).find(|n| lock(2 * n, 2 * n, libc::F_UNLCK) == Err(libc::ENOLCK));
    assert_eq!(refused, Some(16384));
    assert_eq!(lock(1 << 21, 1 << 21, libc::F_WRLCK), Err(libc::ENOLCK));
    lock(0, i64::MAX as u64, libc::F_UNLCK).unwrap();
    lock(1 << 21, 1 << 21, libc::F_WRLCK).unwrap();
}

#[test]
fn lengths_that_lie_are_refused() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    for len in [0, 39, 40, 44, 46, 1 << 20, u32::MAX] {
        let number = client.post_lie(len, op::LOOKUP, ROOT, b"file\0");
        assert_eq!(client.reply(), (number, Err(libc::EINVAL)), "length {len}");
    }
    client.post_lie(10, op::FORGET, ROOT, &[0; 8]);
    assert_eq!(client.ask(op::LOOKUP, ROOT, b"no end"), Err(libc::EINVAL));
}

/// Any opcode with any body: each gets its answer, and the server is there afterwards.
#[test]
fn arbitrary_requests_are_answered_and_survived() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap().node;
    let dir = client.mkdir(ROOT, "dir", 0o755).unwrap().node;
    let handle = client.opendir(dir).unwrap();
    let number = || prop_oneof![Just(0u64), Just(handle), Just(file), 0u64..5000, any::<u64>(), Just(u64::MAX)];
    let body = (
        prop::collection::vec(number(), 0..12),
        prop::collection::vec(prop_oneof![Just(0u8), Just(b'/'), Just(b'.'), any::<u8>()], 0..40),
    );
    let request = (0u32..54, prop_oneof![Just(file), Just(dir), Just(ROOT), any::<u64>()], body);
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() });
    let client = std::cell::RefCell::new(client);
    let strange = std::cell::Cell::new(0);
    runner
        .run(&request, |(opcode, node, (numbers, text))| {
            if [op::FORGET, op::BATCH_FORGET].contains(&opcode) {
                return Ok(());
            }
            let mut client = client.borrow_mut();
            let body = [numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>(), text].concat();
            let sent = client.post(opcode, node, &body);
            let (answered, _) = client.reply();
            prop_assert_eq!(answered, sent);
            // A malformed request may be answered twice; the device drops the second. Ask something whose answer is known.
            let check = client.post(op::STATFS, ROOT, &[]);
            let (mut answered, mut result) = client.reply();
            if answered == sent {
                strange.set(strange.get() + 1);
                (answered, result) = client.reply();
            }
            prop_assert_eq!(answered, check);
            prop_assert!(result.is_ok());
            Ok(())
        })
        .unwrap();
    let (status, said) = client.into_inner().finish();
    assert!(status.success(), "{said}");
    assert_eq!(fs::read_dir(stage.shared().parent().unwrap()).unwrap().count(), 1, "nothing appeared outside");
}
