//! What programs expect of a host's file system: full disks, appending, locks, holes, files without names, one inode a file.

mod support;

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs::{self, File},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    sync::Arc,
};

use caisson_fsd::{budget::Budget, files::OpenFiles, handshake::Sharing, tree::Tree};
use rustix::{
    fs::{AtFlags, CWD, FlockOperation, IFlags, StatxFlags, flock, ioctl_getflags, ioctl_setflags, statx},
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_remount},
};
use support::{Client, ROOT, Stage, op, u32_at, u64_at, words};

const WRITE_CACHE: u32 = 1;

/// A tmpfs that holds `pages` pages at `name`.
fn small(stage: &Stage, name: &str, pages: u32) -> std::path::PathBuf {
    let target = stage.shared().join(name);
    fs::create_dir_all(&target).unwrap();
    let size = std::ffi::CString::new(format!("size={}", pages * 4096)).unwrap();
    mount("tmpfs", &target, "tmpfs", MountFlags::empty(), size.as_c_str()).unwrap();
    target
}

#[test]
fn what_is_written_back_is_written_whole_or_an_error_and_other_writes_say_how_much() {
    let stage = Stage::new();
    small(&stage, "small", 16);
    let mut client = Client::new(&stage);
    let directory = client.walk("small").unwrap().node;
    let (back, through) = (
        client.create(directory, "back", 0o644).unwrap().node,
        client.create(directory, "through", 0o644).unwrap().node,
    );
    let data = vec![7; 24 * 4096];
    assert_eq!(client.write_with(back, 0, &data, WRITE_CACHE, 0), Err(libc::ENOSPC), "a part of it is none of it");
    client.setattr(back, 1 << 3, (0, 0, 0, 0, 0)).unwrap();
    assert_eq!(client.write_with(through, 0, &data, 0, 0).unwrap(), 16 * 4096);
    assert_eq!(client.write_with(through, 16 * 4096, &data, 0, 0), Err(libc::ENOSPC));
    assert_eq!(client.write_with(back, 0, &data[..4096], WRITE_CACHE, 0), Err(libc::ENOSPC));
}

#[test]
fn two_writers_that_append_overwrite_nothing() {
    let stage = Stage::new();
    stage.tmpfs("volume");
    let path = stage.shared().join("volume/log");
    fs::write(&path, "").unwrap();
    let (mut alone, mut shared) = Client::pair(&stage);
    alone.init(u32::MAX);
    shared.init(u32::MAX);
    let node = shared.walk("volume/log").unwrap().node;
    let mut host = File::options().append(true).open(&path).unwrap();
    for n in 0..50 {
        std::io::Write::write_all(&mut host, format!("host {n}\n").as_bytes()).unwrap();
        // At the end that the guest knows of, which is older.
        let line = format!("guest {n}\n");
        let written = shared.write_with(node, 0, line.as_bytes(), 0, (libc::O_WRONLY | libc::O_APPEND) as u32);
        assert_eq!(written.unwrap(), line.len());
    }
    let text = fs::read_to_string(&path).unwrap();
    let expected: String = (0..50).map(|n| format!("host {n}\nguest {n}\n")).collect();
    assert_eq!(text, expected);
}

/// struct fuse_lk_in.
fn lock(owner: u64, range: (u64, u64), kind: i32, flags: u32) -> Vec<u8> {
    let wide = [0, owner, range.0, range.1].map(u64::to_le_bytes).concat();
    [wide, words(&[kind as u32, 0, flags, 0])].concat()
}

const ALL: (u64, u64) = (0, i64::MAX as u64);

/// Tries a lock as another process of the host would.
fn host_lock(file: &File, kind: i32, (first, last): (i64, i64)) -> bool {
    let mut lock =
        libc::flock64 { l_type: kind as i16, l_whence: 0, l_start: first, l_len: last - first + 1, l_pid: 0 };
    // SAFETY: the descriptor is open, and the command reads a flock64.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &mut lock) == 0 }
}

#[test]
fn locks_of_shared_files_are_the_hosts() {
    let stage = Stage::new();
    stage.tmpfs("volume");
    let path = stage.shared().join("volume/file");
    fs::write(&path, "content").unwrap();
    let (mut alone, mut shared) = Client::pair(&stage);
    alone.init(u32::MAX);
    shared.init(u32::MAX);
    let node = shared.walk("volume/file").unwrap().node;
    let host = File::options().read(true).write(true).open(&path).unwrap();
    // The guest's are seen by the host and by the guest's other owners.
    shared.ask(op::SETLK, node, &lock(1, (10, 19), libc::F_WRLCK, 0)).unwrap();
    assert!(!host_lock(&host, libc::F_RDLCK, (19, 19)) && host_lock(&host, libc::F_WRLCK, (20, 29)));
    assert_eq!(shared.ask(op::SETLK, node, &lock(2, (0, 10), libc::F_RDLCK, 0)), Err(libc::EAGAIN));
    // The host's by the guest.
    assert_eq!(shared.ask(op::SETLK, node, &lock(1, (29, 40), libc::F_WRLCK, 0)), Err(libc::EAGAIN));
    let found = shared.ask(op::GETLK, node, &lock(1, (0, 100), libc::F_RDLCK, 0)).unwrap();
    assert_eq!((u64_at(&found, 0), u64_at(&found, 8), u32_at(&found, 16)), (20, 29, libc::F_WRLCK as u32));
    let found = shared.ask(op::GETLK, node, &lock(2, (15, 15), libc::F_RDLCK, 0)).unwrap();
    assert_eq!((u64_at(&found, 0), u64_at(&found, 8)), (10, 19));
    assert!(host_lock(&host, libc::F_UNLCK, (20, 29)));
    let found = shared.ask(op::GETLK, node, &lock(1, (0, 100), libc::F_WRLCK, 0)).unwrap();
    assert_eq!(u32_at(&found, 16), libc::F_UNLCK as u32, "its own does not count");
    // Given back in parts.
    shared.ask(op::SETLK, node, &lock(1, (10, 14), libc::F_UNLCK, 0)).unwrap();
    assert!(host_lock(&host, libc::F_WRLCK, (10, 14)) && !host_lock(&host, libc::F_WRLCK, (15, 15)));
    shared.ask(op::SETLK, node, &lock(1, ALL, libc::F_UNLCK, 0)).unwrap();
    assert!(host_lock(&host, libc::F_WRLCK, (15, 19)));
    // flock(2) is another kind.
    shared.ask(op::SETLK, node, &lock(1, ALL, libc::F_WRLCK, 1)).unwrap();
    assert!(flock(&host, FlockOperation::NonBlockingLockShared).is_err());
    assert_eq!(shared.ask(op::SETLK, node, &lock(2, ALL, libc::F_RDLCK, 1)), Err(libc::EAGAIN));
    // They end with the file that the guest has forgotten, and with the guest.
    shared.forget(node, 1);
    shared.getattr(ROOT).unwrap();
    assert!(flock(&host, FlockOperation::NonBlockingLockExclusive).is_ok());
    flock(&host, FlockOperation::Unlock).unwrap();
    let node = shared.walk("volume/file").unwrap().node;
    shared.ask(op::SETLK, node, &lock(1, ALL, libc::F_RDLCK, 1)).unwrap();
    shared.init(u32::MAX);
    assert!(flock(&host, FlockOperation::NonBlockingLockExclusive).is_ok());
    // Not where the guest is alone, nor what is malformed.
    let own = alone.create(ROOT, "own", 0o644).unwrap().node;
    assert_eq!(alone.ask(op::SETLK, own, &lock(1, ALL, libc::F_WRLCK, 0)), Err(libc::ENOSYS));
    let node = shared.walk("volume/file").unwrap().node;
    for bad in [lock(1, (9, 3), libc::F_WRLCK, 0), lock(1, (u64::MAX, 3), libc::F_WRLCK, 0), lock(1, ALL, 77, 0)] {
        assert_eq!(shared.ask(op::SETLK, node, &bad), Err(libc::EINVAL));
    }
}

#[test]
fn a_guest_cannot_hold_more_descriptors_for_locks_than_its_share() {
    let stage = Stage::new();
    stage.tmpfs("volume");
    fs::write(stage.shared().join("volume/file"), "").unwrap();
    let (_alone, mut shared) = Client::pair(&stage);
    shared.init(u32::MAX);
    let node = shared.walk("volume/file").unwrap().node;
    let refused = (0..2000).find_map(|owner| {
        shared.ask(op::SETLK, node, &lock(owner, (owner, owner), libc::F_WRLCK, 0)).err().map(|errno| (owner, errno))
    });
    assert_eq!(refused, Some((1024, libc::ENOLCK)));
    shared.ask(op::SETLK, node, &lock(7, ALL, libc::F_UNLCK, 0)).unwrap();
    shared.ask(op::SETLK, node, &lock(5000, (5000, 5000), libc::F_WRLCK, 0)).unwrap();
}

#[test]
fn holes_are_told_from_data() {
    let stage = Stage::new();
    stage.tmpfs("volume");
    let path = stage.shared().join("volume/sparse");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(&[1; 4096], 512 << 10).unwrap();
    let mut client = Client::new(&stage);
    let node = client.walk("volume/sparse").unwrap().node;
    let mut seek = |offset: u64, whence: i32| {
        let body = [[0, offset].map(u64::to_le_bytes).concat(), words(&[whence as u32, 0])].concat();
        client.ask(op::LSEEK, node, &body).map(|found| u64_at(&found, 0))
    };
    assert_eq!(seek(0, libc::SEEK_DATA), Ok(512 << 10));
    assert_eq!(seek(512 << 10, libc::SEEK_HOLE), Ok((512 << 10) + 4096));
    assert_eq!(seek(600 << 10, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, libc::SEEK_END), Err(libc::EINVAL));
}

#[test]
fn a_file_is_made_without_a_name_and_gets_one_later() {
    let stage = Stage::new();
    let disk = stage.disk("volume");
    let mut client = Client::new(&stage);
    client.as_user(1000, 1000);
    let directory = client.walk("volume").unwrap().node;
    let body = [words(&[libc::O_RDWR as u32, libc::S_IFREG | 0o666, 0o022, 0]), b"/\0".to_vec()].concat();
    let made = client.ask(op::TMPFILE, directory, &body).unwrap();
    let node = u64_at(&made, 0);
    client.write(node, 0, b"content").unwrap();
    assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 0);
    client.link(node, directory, "named").unwrap();
    let named = fs::metadata(disk.path().join("named")).unwrap();
    assert_eq!((named.uid(), named.mode() & 0o7777, named.nlink()), (1000, 0o644, 1));
    assert_eq!(fs::read(disk.path().join("named")).unwrap(), b"content");
}

#[test]
fn times_of_birth_and_flags_are_the_hosts() {
    let stage = Stage::new();
    let disk = stage.disk("volume");
    fs::write(disk.path().join("file"), "12345").unwrap();
    let mut client = Client::new(&stage);
    let node = client.walk("volume/file").unwrap().node;
    let reply = client.ask(op::STATX, node, &[0; 24]).unwrap();
    // The standard library has no times of birth with musl.
    let file = disk.path().join("file");
    let born = statx(CWD, file, AtFlags::empty(), StatxFlags::BTIME).unwrap().stx_btime;
    // struct fuse_statx_out: 32 bytes, then struct fuse_statx, in which size is at 40 and btime at 80.
    assert_eq!(u64_at(&reply, 32 + 40), 5);
    assert_eq!((u64_at(&reply, 32 + 80), u32_at(&reply, 32 + 88)), (born.tv_sec as u64, born.tv_nsec));
    // struct fuse_ioctl_in of lsattr(1); nodump (0x40) is a flag that needs no capability.
    let get = [vec![0; 12], words(&[0x8008_6601]), vec![0; 8], words(&[0, 8])].concat();
    let flags = u32_at(&client.ask(op::IOCTL, node, &get).unwrap(), 16);
    let set = [vec![0; 12], words(&[0x4008_6602]), vec![0; 8], words(&[8, 0, flags | 0x40, 0])].concat();
    client.ask(op::IOCTL, node, &set).unwrap();
    assert_eq!(u32_at(&client.ask(op::IOCTL, node, &get).unwrap(), 16), flags | 0x40);
    client.ask(op::SYNCFS, ROOT, &[0; 8]).unwrap();
}

#[test]
fn a_file_is_one_whatever_mounts_it_is_reached_by_and_the_writable_one_counts() {
    let stage = Stage::new();
    let volume = stage.tmpfs("volume");
    fs::create_dir(volume.join("sub")).unwrap();
    fs::write(volume.join("sub/file"), "content").unwrap();
    for name in ["ro", "again"] {
        let target = stage.shared().join(name);
        fs::create_dir(&target).unwrap();
        mount_bind(volume.join("sub"), &target).unwrap();
    }
    mount_remount(stage.shared().join("ro"), MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
    let (_alone, mut shared) = Client::pair(&stage);
    shared.init(u32::MAX);
    let nodes = ["ro/file", "again/file", "volume/sub/file"].map(|path| shared.walk(path).unwrap().node);
    assert_eq!(nodes, [nodes[0]; 3]);
    shared.write(nodes[0], 0, b"CONTENT").unwrap();
    assert_eq!(fs::read(volume.join("sub/file")).unwrap(), b"CONTENT");
    // A directory has one name in the guest's tree.
    assert_ne!(shared.walk("again").unwrap().node, shared.walk("volume/sub").unwrap().node);
    // A link is made on the mount of the new name.
    let again = shared.walk("again").unwrap().node;
    shared.link(nodes[0], again, "linked").unwrap();
    let ro = shared.walk("ro").unwrap().node;
    assert_eq!(shared.link(nodes[0], ro, "refused").map(drop), Err(libc::EROFS));
}

#[test]
fn files_of_two_volumes_have_different_numbers() {
    let stage = Stage::new();
    for name in ["one", "two"] {
        let volume = stage.tmpfs(name);
        fs::write(volume.join("file"), name).unwrap();
    }
    let (_alone, mut shared) = Client::pair(&stage);
    shared.init(u32::MAX);
    let [one, two] = ["one/file", "two/file"].map(|path| shared.walk(path).unwrap());
    let host = fs::metadata(stage.shared().join("one/file")).unwrap().ino();
    assert_eq!(host, fs::metadata(stage.shared().join("two/file")).unwrap().ino(), "fresh file systems begin alike");
    assert_eq!(one.attr.ino, host, "the first volume has the host's");
    assert_ne!(two.attr.ino, host);
    let directory = shared.walk("two").unwrap();
    for plus in [false, true] {
        let listed = shared.readdir(plus, directory.node).unwrap();
        assert_eq!(listed.iter().find(|entry| entry.name == "file").unwrap().ino, two.attr.ino);
    }
}

/// struct fuse_ioctl_in with this command and data.
fn ioctl(command: u32, data: &[u8], size: u32) -> Vec<u8> {
    [vec![0; 12], words(&[command]), vec![0; 8], words(&[data.len() as u32, size]), data.to_vec()].concat()
}

#[test]
fn extended_flags_are_the_hosts_and_a_files_project_stays() {
    let stage = Stage::new();
    let disk = stage.disk("volume");
    fs::write(disk.path().join("file"), "12345").unwrap();
    let mut client = Client::new(&stage);
    let node = client.walk("volume/file").unwrap().node;
    let (get, set, get_flags) = (0x801c_581f, 0x401c_5820, 0x8008_6601);
    // Behind struct fuse_ioctl_out: struct fsxattr, whose first word are the flags and whose fourth is the project.
    let mut attributes = client.ask(op::IOCTL, node, &ioctl(get, &[], 28)).unwrap().split_off(16);
    assert_eq!(attributes.len(), 28);
    attributes[0] |= 0x80;
    client.ask(op::IOCTL, node, &ioctl(set, &attributes, 0)).unwrap();
    let flags = client.ask(op::IOCTL, node, &ioctl(get_flags, &[], 8)).unwrap();
    assert_eq!(u32_at(&flags, 16) & 0x40, 0x40, "nodump by its other name");
    attributes[12] ^= 1;
    assert_eq!(client.ask(op::IOCTL, node, &ioctl(set, &attributes, 0)), Err(libc::EPERM));
    assert_eq!(client.ask(op::IOCTL, node, &ioctl(set, &attributes[..27], 0)), Err(libc::EINVAL));
    assert_eq!(client.ask(op::IOCTL, node, &ioctl(0x5401, &[], 0)), Err(libc::ENOTTY));
}

/// Sets flags of a file (chattr) as the host's root.
fn chattr(path: &std::path::Path, change: impl FnOnce(IFlags) -> IFlags) {
    let file = File::open(path).unwrap();
    ioctl_setflags(&file, change(ioctl_getflags(&file).unwrap())).unwrap();
}

#[test]
fn a_file_that_can_only_be_appended_to_is_opened_for_nothing_else() {
    let stage = Stage::new();
    let disk = stage.disk("volume");
    let path = disk.path().join("log");
    fs::write(&path, "begin ").unwrap();
    chattr(&path, |flags| flags | IFlags::APPEND);
    let mut client = Client::new(&stage);
    let node = client.walk("volume/log").unwrap().node;
    let open = |flags: i32| [(flags as u32).to_le_bytes(), [0; 4]].concat();
    let append = libc::O_WRONLY | libc::O_APPEND;
    let results = (
        client.ask(op::OPEN, node, &open(libc::O_RDWR)),
        client.ask(op::OPEN, node, &open(append)).map(|opened| u32_at(&opened, 8)),
        client.write_with(node, 3, b"more", 0, append as u32),
        client.write_with(node, 0, b"over", 0, libc::O_WRONLY as u32),
        client.write_with(node, 0, b"over", WRITE_CACHE, append as u32),
        client.setattr(node, 1 << 3, (0, 0, 0, 0, 0)).map(drop),
    );
    chattr(&path, |flags| flags - IFlags::APPEND);
    let direct_io = 1;
    let refused = libc::EPERM;
    assert_eq!(results, (Err(refused), Ok(direct_io), Ok(4), Err(refused), Err(refused), Err(refused)));
    assert_eq!(fs::read(&path).unwrap(), b"begin more");
}

#[test]
fn what_the_guest_has_written_the_host_can_execute_when_it_is_closed() {
    let stage = Stage::new();
    let volume = stage.tmpfs("volume");
    let (_alone, mut shared) = Client::pair(&stage);
    shared.init(u32::MAX);
    let directory = shared.walk("volume").unwrap().node;
    let program = fs::read("/bin/true").unwrap();
    let node = shared.create_with(directory, "true", libc::O_WRONLY | libc::O_CREAT, 0o755, 0).unwrap().node;
    shared.write(node, 0, &program).unwrap();
    let run = || std::process::Command::new(volume.join("true")).status().map_err(|error| error.raw_os_error());
    assert_eq!(run().map(drop), Err(Some(libc::ETXTBSY)));
    shared.ask(op::FLUSH, node, &[0; 24]).unwrap();
    assert!(run().unwrap().success());
    // Another program of the guest still has it open.
    shared.write(node, 0, &program).unwrap();
    assert_eq!(run().map(drop), Err(Some(libc::ETXTBSY)));
    shared.ask(op::FLUSH, node, &[0; 24]).unwrap();
    assert!(run().unwrap().success());
}

#[test]
fn an_acl_takes_setgid_away_where_linux_does() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let file = client.create(ROOT, "file", 0o644).unwrap().node;
    let acl = [
        2u32.to_le_bytes().to_vec(),
        [1u16, 6, 0xffff, 0xffff, 4, 5, 0xffff, 0xffff, 0x20, 4, 0xffff, 0xffff].map(u16::to_le_bytes).concat(),
    ]
    .concat();
    for (without_setgid, mode) in [(0, 0o2654), (1, 0o654)] {
        client.setattr(file, 1, (0, 0, 0o2755, 0, 0)).unwrap();
        client.setxattr_with(file, "system.posix_acl_access", &acl, without_setgid).unwrap();
        assert_eq!(client.getattr(file).unwrap().mode & 0o7777, mode);
    }
}

#[test]
fn each_file_system_is_synced() {
    let stage = Stage::new();
    for name in ["one", "two"] {
        let volume = stage.tmpfs(name);
        for n in 0..50 {
            std::os::unix::fs::symlink("target", volume.join(format!("link{n}"))).unwrap();
        }
        std::os::unix::net::UnixListener::bind(volume.join("socket")).unwrap();
    }
    let root = File::open(stage.shared()).unwrap().into();
    let proc_fds = File::open("/proc/self/fd").unwrap().into();
    let files = Arc::new(OpenFiles::new(Budget::new(1000)));
    let tree = Tree::new(root, proc_fds, files, 0, Sharing::WithHost).unwrap();
    let volumes = [c"one", c"two"].map(|name| tree.lookup(ROOT, name).unwrap().inode);
    for volume in volumes {
        for n in 0..50 {
            tree.lookup(volume, &CString::new(format!("link{n}")).unwrap()).unwrap();
        }
        tree.lookup(volume, c"socket").unwrap();
    }
    let mut devices = BTreeSet::new();
    let synced = tree.each_file_system(|file| {
        devices.insert(file.metadata().unwrap().dev());
        Err(Errno::NOSPC)
    });
    assert_eq!(synced, Err(Errno::NOSPC), "an error of one is reported, and the others are synced");
    let expected = ["one", "two"].map(|name| fs::metadata(stage.shared().join(name)).unwrap().dev());
    assert_eq!(devices, BTreeSet::from(expected));
}
