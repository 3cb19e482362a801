//! Several threads serve a socket: what many processes of a guest ask at once, and requests that wait for a disk.

mod support;

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    sync::{
        Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};

use rustix::{
    mount::{MountFlags, mount},
    net::{SendFlags, send},
};
use support::{Client, ROOT, Stage, cstr, op, u32_at, u64_at, words};

/// How long any answer may take.
const LIMIT: Duration = Duration::from_secs(60);

type Answer = Result<Vec<u8>, i32>;

/// A client that many threads use: one of them takes the replies from the socket and gives each to who waits for it.
struct Shared<'a> {
    client: &'a Client,
    waiting: Mutex<(u64, HashMap<u64, Sender<Answer>>)>,
}

impl<'a> Shared<'a> {
    fn new(client: &'a Client) -> Self {
        Self { client, waiting: Mutex::new((1 << 32, HashMap::new())) }
    }

    fn post(&self, ids: (u32, u32), opcode: u32, node: u64, body: &[u8]) -> Receiver<Answer> {
        let (sender, receiver) = channel();
        let unique = {
            let mut waiting = self.waiting.lock().unwrap();
            waiting.0 += 2;
            let unique = waiting.0;
            waiting.1.insert(unique, sender);
            unique
        };
        let head = [words(&[40 + body.len() as u32, opcode]), unique.to_le_bytes().into(), node.to_le_bytes().into()];
        let packet = [head.concat(), words(&[ids.0, ids.1, 1, 0]), body.to_vec()].concat();
        send(&self.client.socket, &packet, SendFlags::NOSIGNAL).unwrap();
        receiver
    }

    fn ask(&self, ids: (u32, u32), opcode: u32, node: u64, body: &[u8]) -> Answer {
        self.post(ids, opcode, node, body).recv_timeout(LIMIT).expect("a reply")
    }

    fn forget(&self, node: u64, count: u64) {
        drop(self.post((0, 0), op::FORGET, node, &count.to_le_bytes()));
    }

    /// Gives replies to those who wait until the guest's end of the socket is shut down.
    fn deliver(&self) {
        let mut packet = vec![0; (1 << 20) + 4096];
        loop {
            let (_, len) =
                rustix::net::recv(&self.client.socket, &mut packet[..], rustix::net::RecvFlags::empty()).unwrap();
            if len == 0 {
                return;
            }
            let (error, unique) = (u32_at(&packet, 4) as i32, u64_at(&packet, 8));
            let result = if error == 0 { Ok(packet[16..len].to_vec()) } else { Err(-error) };
            let waits = self.waiting.lock().unwrap().1.remove(&unique).expect("one reply to each request");
            let _ = waits.send(result);
        }
    }
}

/// Uses a client of a program with several threads from many threads.
fn with_many<T>(client: &Client, use_it: impl FnOnce(&Shared) -> T) -> T {
    let shared = Shared::new(client);
    std::thread::scope(|scope| {
        scope.spawn(|| shared.deliver());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| use_it(&shared)));
        rustix::net::shutdown(&client.socket, rustix::net::Shutdown::Both).unwrap();
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn create(shared: &Shared, ids: (u32, u32), parent: u64, name: &str) -> Result<u64, i32> {
    let fields = [(libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32, libc::S_IFREG | 0o666, ids.0 & 0o77, 0];
    let made = shared.ask(ids, op::CREATE, parent, &[words(&fields), cstr(name)].concat())?;
    Ok(u64_at(&made, 0))
}

fn write(shared: &Shared, node: u64, offset: u64, data: &[u8], kill: bool) -> Result<Vec<u8>, i32> {
    let mut body = vec![0; 40];
    body[8..16].copy_from_slice(&offset.to_le_bytes());
    body[16..20].copy_from_slice(&(data.len() as u32).to_le_bytes());
    body[20] = if kill { 4 } else { 0 };
    body.extend(data);
    shared.ask((0, 0), op::WRITE, node, &body)
}

fn read(shared: &Shared, node: u64, size: u32) -> Result<Vec<u8>, i32> {
    let mut body = [0; 40];
    body[16..20].copy_from_slice(&size.to_le_bytes());
    shared.ask((0, 0), op::READ, node, &body)
}

fn rename(shared: &Shared, parent: u64, from: &str, to: &str) -> Result<Vec<u8>, i32> {
    let body = [&parent.to_le_bytes()[..], &[0; 8], &cstr(from), &cstr(to)].concat();
    shared.ask((0, 0), op::RENAME2, parent, &body)
}

fn lookup(shared: &Shared, parent: u64, name: &str) -> Result<u64, i32> {
    let found = u64_at(&shared.ask((0, 0), op::LOOKUP, parent, &cstr(name))?, 0);
    if found == 0 { Err(libc::ENOENT) } else { Ok(found) }
}

/// Many processes, each with files of its own and some that all use, on a tmpfs and on an overlay with links.
#[test]
fn many_processes_at_once_see_their_own_files_and_owners() {
    const PROCESSES: u32 = 12;
    const ROUNDS: u32 = 40;
    let stage = Stage::new();
    stage.tmpfs("tmpfs");
    stage.overlay("overlay", ",index=off", |lower| {
        for n in 0..ROUNDS {
            fs::write(lower.join(format!("image{n}")), format!("image {n}")).unwrap();
            fs::hard_link(lower.join(format!("image{n}")), lower.join(format!("link{n}"))).unwrap();
        }
    });
    let mut client = Client::with(&stage, &["--threads", "4", "--max-files", "2000"]);
    client.init(u32::MAX);
    let directories = ["tmpfs", "overlay"].map(|name| client.walk(name).unwrap().node);
    with_many(&client, |shared| {
        std::thread::scope(|scope| {
            for process in 0..PROCESSES {
                let (ids, work) = ((1000 + process, 2000 + process), directories[process as usize % 2]);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let (name, new) = (format!("p{process}r{round}"), format!("p{process}n{round}"));
                        let node = create(shared, ids, work, &name).unwrap();
                        let text = format!("{process} {round}");
                        write(shared, node, 0, text.as_bytes(), round % 2 == 0).unwrap();
                        rename(shared, work, &name, &new).unwrap();
                        assert_eq!(lookup(shared, work, &name), Err(libc::ENOENT));
                        let again = lookup(shared, work, &new).unwrap();
                        assert_eq!(again, node, "{new} is the file that is known");
                        assert_eq!(read(shared, again, 100).unwrap(), text.as_bytes());
                        let attr = shared.ask((0, 0), op::GETATTR, node, &[0; 16]).unwrap();
                        assert_eq!((u32_at(&attr, 16 + 68), u32_at(&attr, 16 + 72)), ids);
                        shared.forget(node, 2);
                        // The file of the image that everybody changes at the same time.
                        let image = format!("image{round}");
                        if let Ok(node) = lookup(shared, directories[1], &image) {
                            write(shared, node, process.into(), b"x", true).unwrap();
                            let same = lookup(shared, directories[1], &image).unwrap();
                            assert_eq!(same, node, "{image} has become another file");
                            shared.forget(node, 2);
                        }
                        let _ = shared.ask((0, 0), op::STATFS, ROOT, &[]);
                    }
                });
            }
            // One lists and syncs meanwhile.
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    for directory in directories {
                        let handle = u64_at(&shared.ask((0, 0), op::OPENDIR, directory, &[0; 8]).unwrap(), 0);
                        let mut body = [0; 40];
                        body[0..8].copy_from_slice(&handle.to_le_bytes());
                        body[16..20].copy_from_slice(&4096u32.to_le_bytes());
                        shared.ask((0, 0), op::READDIR, directory, &body).unwrap();
                        let release = [&handle.to_le_bytes()[..], &[0; 16]].concat();
                        shared.ask((0, 0), op::RELEASEDIR, directory, &release).unwrap();
                    }
                    shared.ask((0, 0), op::SYNCFS, ROOT, &[0; 8]).unwrap();
                }
            });
        });
    });
    for (n, directory) in ["tmpfs", "overlay"].into_iter().enumerate() {
        let path = stage.shared().join(directory);
        for process in (0..PROCESSES).filter(|process| *process as usize % 2 == n) {
            for round in 0..ROUNDS {
                let made = fs::metadata(path.join(format!("p{process}n{round}"))).unwrap();
                let expected = (1000 + process, 2000 + process, 0o666 & !((1000 + process) & 0o77));
                assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), expected);
            }
        }
    }
    let (status, said) = client.finish();
    assert!(status.success(), "{said}");
}

/// Restarting a guest waits for what the threads do, and nothing of before is known afterwards.
#[test]
fn a_restart_among_requests_leaves_nothing_behind() {
    let stage = Stage::new();
    let mut client = Client::with(&stage, &["--threads", "4"]);
    client.init(u32::MAX);
    let file = client.create(ROOT, "file", 0o644).unwrap().node;
    with_many(&client, |shared| {
        let init: Vec<u8> = [words(&[7, 37, 1 << 17, u32::MAX]), vec![0; 48]].concat();
        let asked: Vec<_> = (0..200)
            .map(|n| match n {
                100 => shared.post((0, 0), op::INIT, 0, &init),
                _ => shared.post((0, 0), op::GETATTR, file, &[0; 16]),
            })
            .collect();
        for reply in asked {
            let result = reply.recv_timeout(LIMIT).unwrap();
            assert!(result.is_ok() || result == Err(libc::ESTALE));
        }
        assert_eq!(shared.ask((0, 0), op::GETATTR, file, &[0; 16]), Err(libc::ESTALE));
        assert!(lookup(shared, ROOT, "file").is_ok());
    });
}

/// A file system whose fsync ends when the test says so: FUSE, served by this process. It has one file.
struct Stuck {
    started: Receiver<()>,
    release: Sender<()>,
}

impl Stuck {
    fn mount(stage: &Stage) -> Option<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").ok()?;
        let target = stage.shared().join("stuck");
        fs::create_dir(&target).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        mount("stuck", &target, "fuse", MountFlags::empty(), options.as_c_str()).ok()?;
        let ((send_started, started), (release, released)) = (channel(), channel());
        std::thread::spawn(move || serve_stuck(device, &send_started, &released));
        Some(Self { started, release })
    }
}

fn serve_stuck(mut device: File, started: &Sender<()>, released: &Receiver<()>) {
    let mut packet = vec![0; 1 << 17];
    let mut held = Vec::new();
    let reply = |device: &mut File, unique: u64, error: i32, body: &[u8]| {
        let head = words(&[16 + body.len() as u32, error as u32]);
        let _ = device.write_all(&[head, unique.to_le_bytes().into(), body.to_vec()].concat());
    };
    // ino, size, blocks, three times, three parts of a second, mode, nlink, uid, gid, rdev, blksize, flags
    let attr = |ino: u64| {
        let mode = if ino == 1 { libc::S_IFDIR | 0o755 } else { libc::S_IFREG | 0o644 };
        [ino.to_le_bytes().to_vec(), vec![0; 52], words(&[mode, 1, 0, 0, 0, 4096, 0])].concat()
    };
    while let Ok(len) = device.read(&mut packet) {
        if len < 40 {
            return;
        }
        let (opcode, unique, node) = (u32_at(&packet, 4), u64_at(&packet, 8), u64_at(&packet, 16));
        match opcode {
            op::INIT => {
                let out = [words(&[7, 31, 1 << 16, 0, 0, 1 << 16, 1, 0]), vec![0; 32]].concat();
                reply(&mut device, unique, 0, &out);
            }
            op::LOOKUP => reply(&mut device, unique, 0, &[2u64.to_le_bytes().to_vec(), vec![0; 32], attr(2)].concat()),
            op::GETATTR => reply(&mut device, unique, 0, &[vec![0; 16], attr(node)].concat()),
            op::OPEN => reply(&mut device, unique, 0, &[0; 16]),
            op::FSYNC => {
                held.push(unique);
                started.send(()).unwrap();
                // The first waits; who comes then has waited in this process's queue.
                if held.len() == 1 {
                    let _ = released.recv();
                }
                for unique in held.drain(..) {
                    reply(&mut device, unique, 0, &[]);
                }
                // The rest is answered at once.
                held.push(0);
            }
            op::FORGET | op::BATCH_FORGET => {}
            _ => reply(&mut device, unique, -libc::ENOSYS, &[]),
        }
    }
}

#[test]
fn what_waits_for_a_disk_stops_nobody_else() {
    let stage = Stage::new();
    let Some(stuck) = Stuck::mount(&stage) else {
        eprintln!("no /dev/fuse here");
        return;
    };
    let volume = stage.tmpfs("volume");
    fs::write(volume.join("file"), "content").unwrap();
    let mut client = Client::with(&stage, &["--threads", "3"]);
    client.init(u32::MAX);
    let (slow, fast) = (client.walk("stuck/file").unwrap().node, client.walk("volume/file").unwrap().node);
    with_many(&client, |shared| {
        // More than there are threads.
        let waiting: Vec<_> = (0..8).map(|_| shared.post((0, 0), op::FSYNC, slow, &[0; 16])).collect();
        stuck.started.recv_timeout(LIMIT).unwrap();
        for _ in 0..100 {
            assert_eq!(read(shared, fast, 100).unwrap(), b"content");
            shared.ask((0, 0), op::GETATTR, fast, &[0; 16]).unwrap();
        }
        assert!(waiting.iter().all(|reply| reply.try_recv().is_err()), "none of them has been synced yet");
        stuck.release.send(()).unwrap();
        for reply in waiting {
            reply.recv_timeout(LIMIT).unwrap().unwrap();
        }
    });
}
