//! A stage with file systems in a mount namespace of its own, and a FUSE client that speaks to the real program as the
//! device and the guest's kernel do.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::{
    ffi::{CString, OsStr},
    fs,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, Mode, OFlags, openat},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount},
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair, sockopt},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

/// How long any answer may take, seconds.
const LIMIT: i64 = 30;

pub const ROOT: u64 = 1;

pub mod op;

/// A tmpfs with a shared directory in it, in a mount namespace that ends with the test's thread.
pub struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    pub fn new() -> Self {
        // SAFETY: no FILES flag: the table of descriptors stays as it is.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("a mount namespace (these tests run as root)");
        mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let dir = tempfile::tempdir().unwrap();
        mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        let stage = Self { dir };
        let shared = stage.shared();
        fs::create_dir(&shared).unwrap();
        mount_bind(&shared, &shared).unwrap();
        mount_change(&shared, MountPropagationFlags::SHARED).unwrap();
        stage
    }

    /// The shared directory.
    pub fn shared(&self) -> PathBuf {
        self.dir.path().join("shared")
    }

    /// A directory beside the shared one, made if it is not there.
    pub fn beside(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Mounts a tmpfs at `name` in the shared directory.
    pub fn tmpfs(&self, name: &str) -> PathBuf {
        let target = self.shared().join(name);
        fs::create_dir_all(&target).unwrap();
        mount("tmpfs", &target, "tmpfs", MountFlags::empty(), None).unwrap();
        target
    }

    /// Shares a directory of this machine's disk at `name`: tmpfs has no user.* attributes before Linux 6.6.
    pub fn disk(&self, name: &str) -> tempfile::TempDir {
        let disk = tempfile::tempdir_in("/var/tmp").unwrap();
        let target = self.shared().join(name);
        fs::create_dir_all(&target).unwrap();
        mount_bind(disk.path(), &target).unwrap();
        disk
    }

    /// Mounts an overlay at `name` in the shared directory; `fill` gets its lower directory. Returns the mounted
    /// directory.
    pub fn overlay(&self, name: &str, options: &str, fill: impl FnOnce(&Path)) -> PathBuf {
        let [lower, upper, work] = ["lower", "upper", "work"].map(|part| self.beside(&format!("{name}.{part}")));
        fill(&lower);
        let target = self.shared().join(name);
        fs::create_dir_all(&target).unwrap();
        let data =
            format!("lowerdir={},upperdir={},workdir={}{options}", lower.display(), upper.display(), work.display());
        let data = CString::new(data).unwrap();
        mount("overlay", &target, "overlay", MountFlags::empty(), data.as_c_str()).expect("an overlay mount");
        target
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

/// The program, and its socket.
pub struct Client {
    pub socket: OwnedFd,
    pub child: Child,
    unique: u64,
    pub uid: u32,
    pub gid: u32,
}

/// What LOOKUP and its kin return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub entry_valid: u64,
    pub attr_valid: u64,
    pub attr: Attr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub mtime: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    pub ino: u64,
    pub offset: u64,
    pub kind: u32,
    pub name: String,
    pub entry: Option<Entry>,
}

/// Starts the program on arbitrary descriptors.
pub fn start(socket: Option<&OwnedFd>, root: Option<&OwnedFd>, arguments: &[&str]) -> Child {
    start_with([(socket, 3), (root, 4), (None, 5)], arguments)
}

/// Starts the program with each descriptor, if there is one, at its number.
pub fn start_with(descriptors: [(Option<&OwnedFd>, i32); 3], arguments: &[&str]) -> Child {
    let pass: Vec<(i32, i32)> = descriptors.into_iter().filter_map(|(fd, to)| Some((fd?.as_raw_fd(), to))).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_caisson-fsd"));
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: only system calls that are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            // Out of the way first: one's place may be the other's number.
            let high: Vec<(i32, i32)> =
                pass.iter().map(|(from, to)| (libc::fcntl(*from, libc::F_DUPFD, 100), *to)).collect();
            for (from, to) in high {
                if libc::dup2(from, to) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                libc::close(from);
            }
            // The parent of the tests may have left something there.
            for number in (3..=5).filter(|number| pass.iter().all(|(_, to)| to != number)) {
                libc::close(number);
            }
            Ok(())
        });
    }
    first_of_pids(|| command.spawn()).expect("the program starts")
}

/// Starts a process as the first one of a pid namespace, where the shim does it by a flag of clone3.
pub fn first_of_pids(start: impl FnOnce() -> std::io::Result<Child>) -> std::io::Result<Child> {
    let ours = fs::File::open("/proc/thread-self/ns/pid")?;
    // SAFETY: no FILES flag: the table of descriptors stays as it is.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
    let child = start();
    // Linux lets a thread with another namespace for its children make no threads.
    move_into_link_name_space(ours.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    child
}

impl Client {
    /// Serves the stage and agrees on everything with INIT.
    pub fn new(stage: &Stage) -> Self {
        let mut client = Self::unready(stage);
        client.init(u32::MAX);
        client
    }

    pub fn unready(stage: &Stage) -> Self {
        Self::with(stage, &[])
    }

    /// With more arguments.
    pub fn with(stage: &Stage, more: &[&str]) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        // The program raises its own end's.
        sockopt::set_socket_send_buffer_size_force(&ours, 4 << 20).unwrap();
        let root =
            openat(CWD, stage.shared(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        // One thread, unless the test wants more: replies come in the order of the requests then.
        let arguments = [&["--socket-fd", "3", "--root-fd", "4", "--threads", "1"], more].concat();
        let child = start(Some(&theirs), Some(&root), &arguments);
        Self { socket: ours, child, unique: 0, uid: 0, gid: 0 }
    }

    /// One program that serves the stage by two sockets: the second is that of a guest which shares it with the host.
    /// Both are ready; the second client's program is `true`.
    pub fn pair(stage: &Stage) -> (Self, Self) {
        let sockets = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let ((ours, theirs), (ours_too, theirs_too)) = (sockets(), sockets());
        let root =
            openat(CWD, stage.shared(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let arguments = ["--socket-fd", "3", "--root-fd", "4", "--host-socket-fd", "5", "--threads", "1"];
        let descriptors = [(Some(&theirs), 3), (Some(&root), 4), (Some(&theirs_too), 5)];
        let child = start_with(descriptors, &arguments);
        let other = Command::new("true").stderr(Stdio::piped()).spawn().unwrap();
        (Self::adopt(ours, child), Self::adopt(ours_too, other))
    }

    /// A program that somebody else started.
    pub fn adopt(socket: OwnedFd, child: Child) -> Self {
        Self { socket, child, unique: 0, uid: 0, gid: 0 }
    }

    /// INIT as Linux 6.1 sends it; returns flags, max_write and max_pages.
    pub fn init(&mut self, flags: u32) -> (u32, u32, u32) {
        let body: Vec<u8> = [7, 37, 1 << 17, flags].iter().flat_map(|v: &u32| v.to_le_bytes()).chain([0; 48]).collect();
        let out = self.ask(op::INIT, 0, &body).expect("INIT");
        (u32_at(&out, 12), u32_at(&out, 20), u32::from(u16::from_le_bytes([out[28], out[29]])))
    }

    pub fn as_user(&mut self, uid: u32, gid: u32) {
        (self.uid, self.gid) = (uid, gid);
    }

    /// Sends a request and returns its number.
    pub fn post(&mut self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        self.unique += 2;
        let len = (40 + body.len()) as u32;
        self.packet(len, opcode, node, body);
        self.unique
    }

    fn packet(&self, len: u32, opcode: u32, node: u64, body: &[u8]) {
        let mut bytes = Vec::with_capacity(40 + body.len());
        bytes.extend(len.to_le_bytes());
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        for id in [self.uid, self.gid, 1, 0] {
            bytes.extend(id.to_le_bytes());
        }
        bytes.extend(body);
        send(&self.socket, &bytes, SendFlags::NOSIGNAL).expect("the program takes requests");
    }

    /// Sends a packet whose header gives another length; the number is the next one's.
    pub fn post_with_length(&mut self, len: u32, opcode: u32, node: u64, body: &[u8]) -> u64 {
        self.unique += 2;
        self.packet(len, opcode, node, body);
        self.unique
    }

    /// The next reply: its number, and its body or error.
    pub fn reply(&mut self) -> (u64, Result<Vec<u8>, i32>) {
        let mut packet = vec![0; (1 << 20) + 4096];
        let mut waits = [PollFd::new(&self.socket, PollFlags::IN)];
        let ready = poll(&mut waits, Some(&Timespec { tv_sec: LIMIT, tv_nsec: 0 })).unwrap();
        assert!(ready > 0, "waited {LIMIT} s for a reply to request {}", self.unique);
        let (_, len) = recv(&self.socket, &mut packet[..], RecvFlags::empty()).expect("a reply");
        assert!(len >= 16, "the program ended instead of replying to request {}", self.unique);
        packet.truncate(len);
        assert_eq!(u32_at(&packet, 0) as usize, len, "the reply's own length");
        let error = u32_at(&packet, 4) as i32;
        let body = packet.split_off(16);
        (u64_at(&packet, 8), if error == 0 { Ok(body) } else { Err(-error) })
    }

    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let number = self.post(opcode, node, body);
        let (answered, result) = self.reply();
        assert_eq!(answered, number, "one reply to each request, in order");
        result
    }

    fn ask_entry(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Entry, i32> {
        Ok(entry(&self.ask(opcode, node, body)?))
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        match self.ask_entry(op::LOOKUP, parent, &cstr(name)) {
            Ok(entry) if entry.node == 0 => Err(libc::ENOENT),
            result => result,
        }
    }

    /// Looks a path up, component by component.
    pub fn walk(&mut self, path: &str) -> Result<Entry, i32> {
        let mut found = Entry { node: ROOT, entry_valid: 0, attr_valid: 0, attr: self.getattr(ROOT)? };
        for name in path.split('/').filter(|name| !name.is_empty()) {
            found = self.lookup(found.node, name)?;
        }
        Ok(found)
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        self.post(op::FORGET, node, &count.to_le_bytes());
    }

    pub fn getattr(&mut self, node: u64) -> Result<Attr, i32> {
        Ok(attr(&self.ask(op::GETATTR, node, &[0; 16])?[16..]))
    }

    /// SETATTR: which (FATTR_*), and (size, mtime, mode, uid, gid).
    pub fn setattr(&mut self, node: u64, valid: u32, new: (u64, u64, u32, u32, u32)) -> Result<Attr, i32> {
        let mut body = [0; 88];
        body[0..4].copy_from_slice(&valid.to_le_bytes());
        body[16..24].copy_from_slice(&new.0.to_le_bytes());
        body[32..40].copy_from_slice(&new.1.to_le_bytes());
        body[40..48].copy_from_slice(&new.1.to_le_bytes());
        body[68..72].copy_from_slice(&new.2.to_le_bytes());
        body[76..80].copy_from_slice(&new.3.to_le_bytes());
        body[80..84].copy_from_slice(&new.4.to_le_bytes());
        Ok(attr(&self.ask(op::SETATTR, node, &body)?[16..]))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<Entry, i32> {
        self.ask_entry(op::MKDIR, parent, &[&mode.to_le_bytes()[..], &0o022u32.to_le_bytes(), &cstr(name)].concat())
    }

    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<Entry, i32> {
        let fields = [mode, rdev, 0o022, 0];
        self.ask_entry(op::MKNOD, parent, &[words(&fields), cstr(name)].concat())
    }

    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<Entry, i32> {
        self.ask_entry(op::SYMLINK, parent, &[cstr(name), cstr(target)].concat())
    }

    pub fn link(&mut self, node: u64, parent: u64, name: &str) -> Result<Entry, i32> {
        self.ask_entry(op::LINK, parent, &[&node.to_le_bytes()[..], &cstr(name)].concat())
    }

    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<Entry, i32> {
        self.create_with(parent, name, libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, mode, 0o022)
    }

    pub fn create_with(&mut self, parent: u64, name: &str, flags: i32, mode: u32, umask: u32) -> Result<Entry, i32> {
        let fields = [flags as u32, mode | libc::S_IFREG, umask, 0];
        self.ask_entry(op::CREATE, parent, &[words(&fields), cstr(name)].concat())
    }

    pub fn write(&mut self, node: u64, offset: u64, data: &[u8]) -> Result<usize, i32> {
        self.write_with(node, offset, data, 0, 0)
    }

    pub fn write_with(
        &mut self,
        node: u64,
        offset: u64,
        data: &[u8],
        write_flags: u32,
        flags: u32,
    ) -> Result<usize, i32> {
        let mut body = vec![0; 40];
        body[8..16].copy_from_slice(&offset.to_le_bytes());
        body[16..20].copy_from_slice(&(data.len() as u32).to_le_bytes());
        body[20..24].copy_from_slice(&write_flags.to_le_bytes());
        body[32..36].copy_from_slice(&flags.to_le_bytes());
        body.extend(data);
        Ok(u32_at(&self.ask(op::WRITE, node, &body)?, 0) as usize)
    }

    pub fn read(&mut self, node: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.read_with(node, offset, size, 0)
    }

    pub fn read_with(&mut self, node: u64, offset: u64, size: u32, flags: u32) -> Result<Vec<u8>, i32> {
        let mut body = [0; 40];
        body[8..16].copy_from_slice(&offset.to_le_bytes());
        body[16..20].copy_from_slice(&size.to_le_bytes());
        body[32..36].copy_from_slice(&flags.to_le_bytes());
        self.ask(op::READ, node, &body)
    }

    pub fn rename(&mut self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), i32> {
        let body = [&to.0.to_le_bytes()[..], &flags.to_le_bytes(), &[0; 4], &cstr(from.1), &cstr(to.1)].concat();
        self.ask(op::RENAME2, from.0, &body).map(drop)
    }

    pub fn unlink(&mut self, parent: u64, name: &str) -> Result<(), i32> {
        self.ask(op::UNLINK, parent, &cstr(name)).map(drop)
    }

    pub fn rmdir(&mut self, parent: u64, name: &str) -> Result<(), i32> {
        self.ask(op::RMDIR, parent, &cstr(name)).map(drop)
    }

    pub fn setxattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        self.setxattr_with(node, name, value, 0)
    }

    /// With flags of the longer form (FUSE_SETXATTR_*).
    pub fn setxattr_with(&mut self, node: u64, name: &str, value: &[u8], more: u32) -> Result<(), i32> {
        let body = [words(&[value.len() as u32, 0, more, 0]), cstr(name), value.to_vec()].concat();
        self.ask(op::SETXATTR, node, &body).map(drop)
    }

    pub fn getxattr(&mut self, node: u64, name: &str, size: u32) -> Result<Vec<u8>, i32> {
        self.ask(op::GETXATTR, node, &[&size.to_le_bytes()[..], &[0; 4], &cstr(name)].concat())
    }

    pub fn opendir(&mut self, node: u64) -> Result<u64, i32> {
        Ok(u64_at(&self.ask(op::OPENDIR, node, &[0; 8])?, 0))
    }

    /// One request's worth of a directory.
    pub fn readdir_at(
        &mut self,
        plus: bool,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<Dirent>, i32> {
        let mut body = [0; 40];
        body[0..8].copy_from_slice(&handle.to_le_bytes());
        body[8..16].copy_from_slice(&offset.to_le_bytes());
        body[16..20].copy_from_slice(&size.to_le_bytes());
        let bytes = self.ask(if plus { op::READDIRPLUS } else { op::READDIR }, node, &body)?;
        assert!(bytes.len() <= size as usize);
        let mut rest = &bytes[..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let head = if plus { 128 } else { 0 };
            let found = plus.then(|| entry(rest));
            let dirent = &rest[head..];
            let name_len = u32_at(dirent, 16) as usize;
            entries.push(Dirent {
                ino: u64_at(dirent, 0),
                offset: u64_at(dirent, 8),
                kind: u32_at(dirent, 20),
                name: OsStr::from_bytes(&dirent[24..24 + name_len]).to_string_lossy().into_owned(),
                entry: found,
            });
            rest = &rest[head + (24 + name_len).next_multiple_of(8)..];
        }
        Ok(entries)
    }

    /// A whole directory by pages, as Linux reads it.
    pub fn readdir(&mut self, plus: bool, node: u64) -> Result<Vec<Dirent>, i32> {
        let handle = self.opendir(node)?;
        let mut all: Vec<Dirent> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |last| last.offset);
            let page = self.readdir_at(plus, node, handle, offset, 4096)?;
            if page.is_empty() {
                break;
            }
            all.extend(page);
        }
        self.ask(op::RELEASEDIR, node, &[&handle.to_le_bytes()[..], &[0; 16]].concat())?;
        Ok(all)
    }

    /// Closes the socket and waits for the end.
    pub fn finish(self) -> (ExitStatus, String) {
        let Self { socket, child, .. } = self;
        drop(socket);
        end(child)
    }
}

/// Waits for the program's end and returns what it said.
pub fn end(child: Child) -> (ExitStatus, String) {
    let pidfd =
        rustix::process::pidfd_open(rustix::process::Pid::from_child(&child), rustix::process::PidfdFlags::empty())
            .unwrap();
    let ready = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&Timespec { tv_sec: LIMIT, tv_nsec: 0 })).unwrap();
    assert!(ready > 0, "waited {LIMIT} s for the program's end");
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The security.capability attribute that `setcap cap_net_raw+ep` sets.
pub fn capability() -> Vec<u8> {
    [&0x0200_0001u32.to_le_bytes()[..], &(1u32 << 13).to_le_bytes(), &[0; 12]].concat()
}

pub fn cstr(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn entry(bytes: &[u8]) -> Entry {
    Entry {
        node: u64_at(bytes, 0),
        entry_valid: u64_at(bytes, 16),
        attr_valid: u64_at(bytes, 24),
        attr: attr(&bytes[40..]),
    }
}

fn attr(bytes: &[u8]) -> Attr {
    Attr {
        ino: u64_at(bytes, 0),
        size: u64_at(bytes, 8),
        mtime: u64_at(bytes, 32),
        mode: u32_at(bytes, 60),
        nlink: u32_at(bytes, 64),
        uid: u32_at(bytes, 68),
        gid: u32_at(bytes, 72),
        rdev: u32_at(bytes, 76),
    }
}
