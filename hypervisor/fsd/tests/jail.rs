//! What is left of the host once the program serves, and how it begins and ends.

mod support;

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{fs::MetadataExt, process::ExitStatusExt},
    },
    process::{Command, Stdio},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use support::{Client, ROOT, Stage, end, start};

const ARGUMENTS: [&str; 4] = ["--socket-fd", "3", "--root-fd", "4"];

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name} in {status}")).trim()
}

#[test]
fn the_server_has_only_the_capabilities_it_needs() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    client.as_user(1000, 1000);
    client.create(ROOT, "file", 0o644).unwrap();
    let tasks = format!("/proc/{}/task", client.child.id());
    let mut threads = 0;
    for task in fs::read_dir(tasks).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, SETGID 6, SETUID 7, MKNOD 27, SETFCAP 31
        let expected = "00000000880000db";
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            assert_eq!(field(&status, set), expected, "{set}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
        assert_eq!(field(&status, "NoNewPrivs:"), "1");
        assert_eq!((field(&status, "Seccomp:"), field(&status, "Seccomp_filters:")), ("2", "1"), "a filter");
        assert_eq!(field(&status, "Uid:"), "0\t0\t0\t0", "root again after a user's request");
        threads += 1;
    }
    assert_eq!(threads, 2);
}

#[test]
fn the_root_directory_is_the_shared_one_and_no_mount_of_the_host_is_left() {
    let stage = Stage::new();
    stage.tmpfs("before");
    fs::write(stage.shared().join("file"), b"").unwrap();
    let client = Client::new(&stage);
    stage.tmpfs("after");
    let proc = format!("/proc/{}", client.child.id());
    let mut names: Vec<_> = fs::read_dir(format!("{proc}/root/")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["after", "before", "file"]);
    let mounts = fs::read_to_string(format!("{proc}/mountinfo")).unwrap();
    let mut points = Vec::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(4);
        let (point, options) = (fields.next().unwrap(), fields.next().unwrap());
        points.push(point);
        if point != "/after" {
            for option in ["nosuid", "nodev", "noexec"] {
                assert!(options.split(',').any(|o| o == option), "{option} for {point}: {options}");
            }
        }
    }
    assert_eq!(points, ["/", "/before", "/after"]);
}

#[test]
fn a_later_mount_appears_and_a_detached_one_goes() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    let mounted = stage.tmpfs("pod");
    fs::write(mounted.join("file"), b"content").unwrap();
    let file = client.walk("pod/file").unwrap();
    // While the guest remembers a file of it, only a lazy unmount succeeds.
    let busy = rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::empty());
    assert_eq!(busy, Err(rustix::io::Errno::BUSY));
    rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(client.walk("pod/file"), Err(libc::ENOENT));
    assert_eq!(client.read(file.node, 0, 10).unwrap(), b"content");
}

#[test]
fn it_ends_well_when_the_socket_closes() {
    let stage = Stage::new();
    let client = Client::new(&stage);
    let (status, said) = client.finish();
    assert_eq!(status.code(), Some(0), "{said}");
}

/// Not even when the socket stays open and requests of other users have changed the serving thread's identity. Linux takes the
/// thread that started it for its parent.
#[test]
fn it_does_not_outlive_its_parent() {
    let stage = Stage::new();
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let root = openat(CWD, stage.shared(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    // In this thread's mount namespace, as `root` is.
    let parent = std::thread::spawn(move || {
        let mut client = Client::adopt(ours, start(Some(&theirs), Some(&root), &ARGUMENTS));
        client.init(u32::MAX);
        client.as_user(1000, 1000);
        client.create(ROOT, "file", 0o644).unwrap();
        client
    });
    let client = parent.join().unwrap();
    let (status, _) = end(client.child);
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

#[test]
fn it_has_namespaces_of_its_own() {
    let stage = Stage::new();
    let client = Client::new(&stage);
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "uts"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).unwrap();
        assert_ne!(of(&client.child.id().to_string()), of("thread-self"), "{kind}");
    }
    let status = fs::read_to_string(format!("/proc/{}/status", client.child.id())).unwrap();
    assert_eq!(field(&status, "NSpid:").split('\t').nth(1), Some("1"));
    let limits = fs::read_to_string(format!("/proc/{}/limits", client.child.id())).unwrap();
    let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(cores.split_whitespace().nth(4), Some("0"), "{cores}");
}

#[test]
fn no_directory_that_it_has_open_has_one_above_it() {
    let stage = Stage::new();
    let client = Client::new(&stage);
    let process = format!("/proc/{}", client.child.id());
    let descriptors = fs::read_dir(format!("{process}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let mut directories = 0;
    for place in descriptors.chain([format!("{process}/cwd").into(), format!("{process}/root").into()]) {
        if !fs::metadata(&place).is_ok_and(|of| of.is_dir()) {
            continue;
        }
        directories += 1;
        let identity = |path: std::path::PathBuf| {
            let of = fs::metadata(path).unwrap();
            (of.dev(), of.ino())
        };
        let above = identity(place.join("../../.."));
        assert_eq!(above, identity(place.clone()), "{} is {:?}", place.display(), fs::read_link(&place));
    }
    assert!(directories > 3, "the shared directory, the table of descriptors, and both again");
    let names = fs::read_dir(format!("{process}/cwd/..")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names = names.peekable();
    assert!(names.peek().is_some());
    assert!(names.all(|name| name.to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))));
}

/// Started in any other way it would see all processes of the host.
#[test]
fn it_insists_on_a_pid_namespace() {
    let stage = Stage::new();
    let (_ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap();
    let root = openat(CWD, stage.shared(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let number = |fd: &OwnedFd| std::os::fd::AsRawFd::as_raw_fd(fd).to_string();
    let arguments = ["--socket-fd", &number(&theirs), "--root-fd", &number(&root)];
    let mut command = Command::new(env!("CARGO_BIN_EXE_caisson-fsd"));
    let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("is not the first of a pid namespace"), "{said}");
}

#[test]
fn bad_descriptors_are_named() {
    let stage = Stage::new();
    let pair = |kind| socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    let (_end, socket) = pair(SocketType::SEQPACKET);
    let (_other, stream) = pair(SocketType::STREAM);
    let root = openat(CWD, stage.shared(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let null: OwnedFd = fs::File::open("/dev/null").unwrap().into();
    type Case<'a> = (&'a str, Option<&'a OwnedFd>, Option<&'a OwnedFd>, &'a [&'a str]);
    let cases: [Case; 10] = [
        ("--socket-fd 3: Bad file descriptor", None, Some(&root), &ARGUMENTS),
        ("--root-fd 4: Bad file descriptor", Some(&socket), None, &ARGUMENTS),
        ("not a SOCK_SEQPACKET socket", Some(&stream), Some(&root), &ARGUMENTS),
        ("(os error 88)", Some(&null), Some(&root), &ARGUMENTS),
        ("--root-fd: not a directory", Some(&socket), Some(&null), &ARGUMENTS),
        ("same descriptor", Some(&socket), Some(&root), &["--socket-fd", "3", "--root-fd", "3"]),
        ("--root-fd is missing", Some(&socket), Some(&root), &["--socket-fd", "3"]),
        ("not a number", Some(&socket), Some(&root), &["--socket-fd", "x"]),
        ("--max-files needs a number", Some(&socket), Some(&root), &["--max-files"]),
        ("unknown argument", Some(&socket), Some(&root), &["--help-me"]),
    ];
    for (expected, socket, root, arguments) in cases {
        let (status, said) = end(start(socket, root, arguments));
        assert_eq!(status.code(), Some(1), "{expected}: {said}");
        assert!(said.contains(expected), "{said:?} does not say {expected:?}");
    }
}
