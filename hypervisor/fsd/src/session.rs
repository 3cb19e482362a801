//! The conversation with the device: one packet in, one packet out.
//!
//! The monitor has checked each packet's length and numbered it; everything else of it is the guest's and may be anything.
//! Every request but FORGET gets exactly one reply, because the guest waits for it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
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
    filesystem::Service,
    handshake::{self, HEADER_ROOM, MAX_DATA},
    tree::Tree,
    wire::{Answer, MAX_ANSWER, Request},
};

const REQUEST_HEADER: usize = 40;
const REPLY_HEADER: usize = 16;
/// The commands of ioctl(2) that lsattr and chattr use (include/uapi/linux/fs.h).
const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
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

/// Serves a tree over a socket.
pub struct Session {
    socket: OwnedFd,
    send_buffer: usize,
    server: Server<std::sync::Arc<Service>>,
    service: std::sync::Arc<Service>,
    log: Logger,
}

impl Session {
    /// A session over a SOCK_SEQPACKET socket.
    ///
    /// # Errors
    /// If the descriptor is not a socket.
    pub fn new(socket: OwnedFd, tree: Tree, log: Logger) -> Result<Self, Errno> {
        let send_buffer = sockopt::socket_send_buffer_size(&socket)?;
        let service = std::sync::Arc::new(Service::new(tree));
        Ok(Self { socket, send_buffer, server: Server::new(service.clone()), service, log })
    }

    /// Where it logs.
    pub fn log(&self) -> &Logger {
        &self.log
    }

    /// Serves until the other end closes.
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
        let body = request.get(REQUEST_HEADER..).unwrap_or(&[]);
        let is = |opcode: Opcode| header.opcode == opcode as u32;
        if header.len != request.len() {
            return if is(Opcode::Forget) || is(Opcode::BatchForget) {
                Ok(())
            } else {
                self.fail(&header, libc::EINVAL)
            };
        }
        if is(Opcode::Init) {
            let mut tree = self.service.tree();
            tree.clear();
            return match handshake::answer(body, self.send_buffer, tree.sharing()) {
                Ok(answer) => self.answer(&header, &answer),
                Err(errno) => self.fail(&header, errno),
            };
        }
        if let Some(parsed) = Request::parse(header.opcode, body) {
            return match parsed.ok_or(Errno::INVAL).and_then(|request| self.carry_out(&header, request)) {
                Ok(answer) => self.answer(&header, answer.bytes()),
                Err(errno) => self.fail(&header, errno.raw_os_error()),
            };
        }
        // Both are never answered by the crate; the device waits for an answer to everything.
        if is(Opcode::Interrupt) || is(Opcode::NotifyReply) {
            return self.fail(&header, libc::ENOSYS);
        }
        let (Ok(reader), Ok(writer)) = (
            Reader::<()>::from_fuse_buffer(FuseBuf::new(request)),
            FuseDevWriter::new(self.socket.as_fd().as_raw_fd(), reply),
        ) else {
            return self.fail(&header, libc::EIO);
        };
        match self.server.handle_message(reader, writer.into(), None, None) {
            Ok(_) => Ok(()),
            // Malformed; some such are answered already, then the device drops this second answer.
            Err(error) => {
                debug!(self.log, "malformed request"; "opcode" => header.opcode, "error" => %error);
                if is(Opcode::Forget) || is(Opcode::BatchForget) { Ok(()) } else { self.fail(&header, libc::EINVAL) }
            }
        }
    }

    /// What the crate does not know.
    fn carry_out(&self, header: &Header, request: Request) -> Result<Answer, Errno> {
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
            Request::Ioctl { command: FS_IOC_GETFLAGS, .. } => Answer::ioctl(Some(service.flags(node, None)?)),
            Request::Ioctl { command: FS_IOC_SETFLAGS, value: Some(flags) } => {
                service.flags(node, Some(flags))?;
                Answer::ioctl(None)
            }
            Request::Ioctl { .. } => return Err(Errno::NOTTY),
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
        send(&self.socket, packet.get(..len).ok_or(Errno::MSGSIZE)?, SendFlags::NOSIGNAL).map(drop)
    }
}

impl Header {
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
