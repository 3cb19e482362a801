//! The requests and replies of one device: one packet in, one packet out.
//!
//! The monitor has checked each packet's length and numbered it; everything else of it is the guest's and may be anything.
//! Every request but FORGET gets exactly one reply, because the guest waits for it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fuse_backend_rs::{
    abi::fuse_abi::Opcode,
    api::server::Server,
    transport::{FuseBuf, FuseDevWriter, Reader},
};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send, sockopt},
};
use slog::{Logger, debug};

use crate::{
    controls::control,
    handshake::{self, HEADER_ROOM, MAX_DATA},
    identity,
    service::Service,
    slow::Slow,
    tree::Tree,
    wire::{Answer, MAX_ANSWER, Request},
};

const REQUEST_HEADER: usize = 40;
const REPLY_HEADER: usize = 16;
/// The longest request that may take long, bytes.
const MAX_SLOW: usize = 256;
/// How often, and after which pause, a short reply is sent again that the host had no memory for: ten seconds in all.
const SEND_TRIES: u32 = 500;
const SEND_PAUSE: Duration = Duration::from_millis(20);
/// The send buffer that we try for, bytes.
const SEND_BUFFER: usize = 4 << 20;

/// A request's header (struct fuse_in_header).
struct Header {
    len: usize,
    opcode: u32,
    unique: u64,
    node: u64,
    uid: u32,
    gid: u32,
}

/// Serves a tree over a socket, by any number of threads at once.
pub struct Session {
    socket: OwnedFd,
    send_buffer: usize,
    server: Server<Arc<Service>>,
    service: Arc<Service>,
    /// Whether the guest and we have agreed on the longer form of SETXATTR.
    extended: AtomicBool,
    /// Held while a request is carried out; exclusively by those that forget everything.
    requests: RwLock<()>,
    slow: Slow<Vec<u8>>,
    log: Logger,
}

impl Session {
    /// A session over a SOCK_SEQPACKET socket, which `threads` threads will serve ([`Self::run`]).
    ///
    /// # Errors
    /// If the descriptor is not a socket.
    pub fn new(socket: OwnedFd, tree: Tree, threads: usize, log: Logger) -> Result<Self, Errno> {
        let send_buffer = sockopt::socket_send_buffer_size(&socket)?;
        let service = Arc::new(Service { tree });
        Ok(Self {
            socket,
            send_buffer,
            server: Server::new(service.clone()),
            service,
            extended: AtomicBool::new(false),
            requests: RwLock::new(()),
            slow: Slow::new(threads),
            log,
        })
    }

    /// Where it logs.
    pub fn log(&self) -> &Logger {
        &self.log
    }

    /// Serves until the other end closes. A packet reaches one of the threads that do so; replies go in the order in which
    /// they are ready.
    ///
    /// # Errors
    /// If the socket fails otherwise.
    pub fn run(&self) -> Result<(), Errno> {
        // Zeroed by the kernel at first use, so that a guest with small requests costs small memory.
        let mut request = vec![0; MAX_DATA + HEADER_ROOM];
        let mut reply = vec![0; MAX_DATA + HEADER_ROOM];
        loop {
            match recv(&self.socket, &mut request[..], RecvFlags::TRUNC) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Ok(()),
                Ok((_, len)) => match self.serve(request.get_mut(..len), &mut reply) {
                    Ok(()) => {}
                    Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                    Err(errno) => return Err(errno),
                },
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Serves one request; `None` is one that was too long.
    fn serve(&self, request: Option<&mut [u8]>, reply: &mut [u8]) -> Result<(), Errno> {
        let Some(request) = request else { return Ok(()) };
        let Some(header) = Header::parse(request) else { return Ok(()) };
        if header.len != request.len() {
            return if header.wants_reply() { self.fail(&header, libc::EINVAL) } else { Ok(()) };
        }
        if !header.may_take_long() {
            return self.carry_out(&header, request, reply);
        }
        // None of them is longer; what is put aside has a bound.
        if request.len() > MAX_SLOW {
            return self.fail(&header, libc::EINVAL);
        }
        let serve = |mut request: Vec<u8>| match Header::parse(&request) {
            Some(header) => self.carry_out(&header, &mut request, reply),
            None => Ok(()),
        };
        self.slow.run(request.to_vec(), serve).unwrap_or_else(|_| self.fail(&header, libc::ENOMEM))
    }

    fn carry_out(&self, header: &Header, request: &mut [u8], reply: &mut [u8]) -> Result<(), Errno> {
        let body = request.get(REQUEST_HEADER..).unwrap_or(&[]);
        if header.is(Opcode::Init) {
            let _alone = self.requests.write().unwrap_or_else(|poisoned| poisoned.into_inner());
            self.service.tree.clear();
            return match handshake::answer(body, self.send_buffer, self.service.tree.sharing()) {
                Ok(answer) => {
                    self.extended.store(handshake::is_extended(&answer), Ordering::Relaxed);
                    self.answer(header, &answer)
                }
                Err(errno) => self.fail(header, errno),
            };
        }
        let (_alone, _with_others) = if header.is(Opcode::Destroy) {
            (Some(self.requests.write().unwrap_or_else(|poisoned| poisoned.into_inner())), None)
        } else {
            (None, Some(self.requests.read().unwrap_or_else(|poisoned| poisoned.into_inner())))
        };
        // WRITE leaves the thread without one.
        if !header.is(Opcode::Write)
            && let Err(errno) = identity::with_all()
        {
            return self.fail(header, errno.raw_os_error());
        }
        if let Some(parsed) = Request::parse(header.opcode, body, self.extended.load(Ordering::Relaxed)) {
            return match parsed.ok_or(Errno::INVAL).and_then(|request| self.decoded(header, request)) {
                Ok(answer) => self.answer(header, answer.bytes()),
                Err(errno) => self.fail(header, errno.raw_os_error()),
            };
        }
        // Both are never answered by the crate; the device waits for an answer to everything.
        if header.is(Opcode::Interrupt) || header.is(Opcode::NotifyReply) {
            return self.fail(header, libc::ENOSYS);
        }
        let (Ok(reader), Ok(writer)) = (
            Reader::<()>::from_fuse_buffer(FuseBuf::new(request)),
            FuseDevWriter::new(self.socket.as_fd().as_raw_fd(), reply),
        ) else {
            return self.fail(header, libc::EIO);
        };
        match self.server.handle_message(reader, writer.into(), None, None) {
            Ok(_) => Ok(()),
            Err(_) if !header.wants_reply() => Ok(()),
            // The reply could not be sent.
            Err(fuse_backend_rs::Error::EncodeMessage(error)) => {
                debug!(self.log, "a reply was not sent"; "opcode" => header.opcode, "error" => %error);
                self.fail(header, libc::EIO)
            }
            // Malformed; some such are answered already, then the device drops this second answer.
            Err(error) => {
                debug!(self.log, "malformed request"; "opcode" => header.opcode, "error" => %error);
                self.fail(header, libc::EINVAL)
            }
        }
    }

    /// What the crate does not know.
    fn decoded(&self, header: &Header, request: Request) -> Result<Answer, Errno> {
        let (service, node) = (&self.service, header.node);
        Ok(match request {
            Request::CopyFileRange { from, to_node, to, len } => {
                Answer::copied(service.copy_range((node, from), (to_node, to), len)?)
            }
            Request::Syncfs => {
                service.sync_file_systems()?;
                Answer::default()
            }
            Request::Tmpfile { mode, umask } => {
                Answer::created(&service.create_unnamed((header.uid, header.gid), node, mode, umask)?)
            }
            Request::Statx => {
                let (stat, ino, timeout) = service.statx(node)?;
                Answer::statx(&stat, ino, timeout)
            }
            Request::Ioctl { command, data } => {
                Answer::ioctl(&control(command, &data, || service.open_for_ioctl(node))?)
            }
            Request::Setxattr { name, value, flags, without_setgid } => {
                service.set_attribute(node, (&name, &value), flags, without_setgid)?;
                Answer::default()
            }
        })
    }

    fn fail(&self, header: &Header, errno: i32) -> Result<(), Errno> {
        self.send(header.unique, -errno, &[])
    }

    fn answer(&self, header: &Header, body: &[u8]) -> Result<(), Errno> {
        self.send(header.unique, 0, body)
    }

    fn send(&self, unique: u64, error: i32, body: &[u8]) -> Result<(), Errno> {
        let mut packet = [0; REPLY_HEADER + MAX_ANSWER];
        let len = REPLY_HEADER + body.len();
        let fields = [&(len as u32).to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes(), body];
        let mut rest = &mut packet[..];
        for field in fields {
            let (place, later) = rest.split_at_mut_checked(field.len()).ok_or(Errno::MSGSIZE)?;
            place.copy_from_slice(field);
            rest = later;
        }
        let packet = packet.get(..len).ok_or(Errno::MSGSIZE)?;
        let mut tries = 0;
        loop {
            match send(&self.socket, packet, SendFlags::NOSIGNAL) {
                // The host is short of memory, which passes; without this reply the pod would end.
                Err(Errno::NOBUFS | Errno::NOMEM) if tries < SEND_TRIES => {
                    tries += 1;
                    std::thread::sleep(SEND_PAUSE);
                }
                Err(Errno::INTR) => {}
                sent => return sent.map(drop),
            }
        }
    }
}

impl Header {
    fn is(&self, opcode: Opcode) -> bool {
        self.opcode == opcode as u32
    }

    fn wants_reply(&self) -> bool {
        !self.is(Opcode::Forget) && !self.is(Opcode::BatchForget)
    }

    /// Whether it may wait for a disk for long.
    fn may_take_long(&self) -> bool {
        const SYNCFS: u32 = 50;
        let slow = [Opcode::Fsync, Opcode::Fsyncdir, Opcode::Fallocate, Opcode::CopyFileRange];
        slow.into_iter().any(|opcode| self.is(opcode)) || self.opcode == SYNCFS
    }

    fn parse(request: &[u8]) -> Option<Self> {
        if request.len() < REQUEST_HEADER {
            return None;
        }
        let word = u64_at(request, 0)?;
        Some(Self {
            len: (word & 0xffff_ffff) as usize,
            opcode: (word >> 32) as u32,
            unique: u64_at(request, 8)?,
            node: u64_at(request, 16)?,
            uid: u64_at(request, 24)? as u32,
            gid: (u64_at(request, 24)? >> 32) as u32,
        })
    }
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Makes room for several replies of the greatest size. Without CAP_NET_ADMIN the socket stays as it is, and INIT's answer
/// makes requests smaller.
pub fn raise_send_buffer(socket: impl AsFd) {
    if sockopt::socket_send_buffer_size(&socket).is_ok_and(|now| now < SEND_BUFFER) {
        // Linux doubles the value, to account for its own needs.
        let _ = sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER / 2);
    }
}

/// Checks that a descriptor is a packet socket.
///
/// # Errors
/// What it is instead.
pub fn check_socket(socket: impl AsFd) -> io::Result<()> {
    match sockopt::socket_type(socket) {
        Ok(rustix::net::SocketType::SEQPACKET) => Ok(()),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a SOCK_SEQPACKET socket")),
        Err(errno) => Err(errno.into()),
    }
}
