//! What is left of the host once the program serves, and how it begins and ends.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    os::fd::OwnedFd,
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

/// Not even when the socket stays open and requests of other users have changed the serving thread's identity.
#[test]
fn it_does_not_outlive_its_parent() {
    let stage = Stage::new();
    let mut client = Client::new(&stage);
    drop(client.child.kill());
    end(client.child);
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap();
    let root = openat(CWD, stage.shared(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let script = format!(
        "{} --socket-fd {} --root-fd {} & echo $!; wait",
        env!("CARGO_BIN_EXE_caisson-fsd"),
        std::os::fd::AsRawFd::as_raw_fd(&theirs),
        std::os::fd::AsRawFd::as_raw_fd(&root),
    );
    let mut shell = Command::new("sh").arg("-c").arg(script).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let pid = rustix::process::Pid::from_raw(line.trim().parse().unwrap()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    client = Client::adopt(ours, shell);
    client.init(u32::MAX);
    client.as_user(1000, 1000);
    client.create(ROOT, "file", 0o644).unwrap();
    client.child.kill().unwrap();
    let waits = &mut [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(waits, Some(&limit)), Ok(1), "waited 30 s for it to die with its parent");
    client.child.wait().unwrap();
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
