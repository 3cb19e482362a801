//! A file on storage that hangs: a FUSE file system of one file, whose server answers nothing beyond the first MiB.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::mpsc::{Receiver, channel},
    thread::JoinHandle,
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Bytes in the file.
pub const SIZE: u64 = 4 << 20;
/// Reads from here on are never answered.
pub const HANGS_FROM: u64 = 1 << 20;

// include/uapi/linux/fuse.h
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const ENOSYS: i32 = 38;
const REQUEST_HEADER: usize = 40;
const MAX_WRITE: u32 = 128 << 10;
const NODE: u64 = 2;

/// The file system, mounted.
pub struct Hung {
    folder: tempfile::TempDir,
    server: Option<JoinHandle<()>>,
    hanging: Receiver<()>,
}

impl Hung {
    /// Mounts it; takes root.
    pub fn mount() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let device = File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let options = std::ffi::CString::new(options).expect("no zero in it");
        mount("caisson-test", folder.path(), "fuse", MountFlags::NOSUID | MountFlags::NODEV, &*options)
            .expect("mounting FUSE");
        let (hangs, hanging) = channel();
        let server = std::thread::spawn(move || serve(device, || hangs.send(()).unwrap_or_default()));
        Self { folder, server: Some(server), hanging }
    }

    /// The file, opened to be read.
    pub fn open(&self) -> File {
        File::open(self.path()).expect("the file")
    }

    /// Waits until somebody reads what is never answered.
    pub fn wait_for_reader(&self) {
        self.hanging.recv_timeout(crate::environment::LIMIT).expect("a read that hangs");
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("file")
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        // FORCE ends all requests; DETACH takes it away although the file is open somewhere.
        let _ = unmount(self.folder.path(), UnmountFlags::FORCE);
        let _ = unmount(self.folder.path(), UnmountFlags::DETACH);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// Until the file system is unmounted.
fn serve(mut device: File, hangs: impl Fn()) {
    let mut buffer = vec![0; MAX_WRITE as usize + 4096];
    while let Ok(len) = device.read(&mut buffer) {
        let request = &buffer[..len];
        let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().expect("eight bytes"));
        let unique = long(8);
        let answer = match word(4) {
            FORGET | INTERRUPT => continue,
            INIT => Ok(init()),
            LOOKUP => Ok([words(&[NODE, 0, u64::MAX, u64::MAX, 0]), attributes(NODE)].concat()),
            GETATTR => Ok([words(&[u64::MAX, 0]), attributes(long(16))].concat()),
            // FOPEN_DIRECT_IO: each read comes here.
            OPEN => Ok(words(&[0, 1])),
            READ if long(REQUEST_HEADER + 8) < HANGS_FROM => Ok(vec![0; word(REQUEST_HEADER + 16) as usize]),
            READ => {
                hangs();
                continue;
            }
            _ => Err(ENOSYS),
        };
        let (error, body) = answer.map_or_else(|errno| (-errno, Vec::new()), |body| (0, body));
        let mut reply = (16 + body.len() as u32).to_le_bytes().to_vec();
        reply.extend(error.to_le_bytes());
        reply.extend(unique.to_le_bytes());
        reply.extend(body);
        // A request may have been interrupted meanwhile.
        let _ = device.write(&reply);
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Version 7.31, no features.
fn init() -> Vec<u8> {
    let mut body = Vec::new();
    for word in [7, 31, 0, 0, 0, MAX_WRITE, 1] {
        body.extend(word.to_le_bytes());
    }
    body.resize(64, 0);
    body
}

fn attributes(node: u64) -> Vec<u8> {
    let (mode, links): (u32, u32) = if node == NODE { (0o100_600, 1) } else { (0o40_755, 2) };
    let mut attributes = words(&[node, SIZE, SIZE / 512, 0, 0, 0, 0]);
    // The nanoseconds of the third time, then mode and links, owners, device, block size, flags.
    for word in [0, mode, links, 0, 0, 0, 4096, 0] {
        attributes.extend(word.to_le_bytes());
    }
    attributes
}
