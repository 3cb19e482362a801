//! The virtio file system device (virtio 1.2, section 5.11): carries FUSE requests from the driver to a file server in
//! another process, and the replies back.
//!
//! ```text
//!  hiprio queue 0 ─┐ pop  ┌─────────┐  one packet per request   ┌─────────────┐
//!  request queue 1 ┴────► │ Request │ ────────────────────────► │             │
//!                  check, │ Slots   │  SOCK_SEQPACKET           │ file server │
//!                renumber │         │ ◄──────────────────────── │             │
//!  used rings  ◄───────── └─────────┘  one packet per reply     └─────────────┘
//! ```
//!
//! The server never sees guest memory and this device never sees a file. A message's bytes go from guest memory to the
//! socket in one system call and come back the same way; the device itself holds nothing but headers, so it needs no
//! buffer. It stays between two parties that it does not trust:
//!
//! - The driver may send anything. The header's length must be the chain's, which bounds a request; a request that
//!   is not forwarded is answered with EINVAL.
//! - The server may answer anything, late or twice. A reply must bear a number from [`slots`]; a malformed one becomes
//!   EIO. When the socket closes, all requests fail with ENOTCONN, now and later.
//!
//! Each side gives its end a send buffer of [`SEND_BUFFER`] bytes, which takes CAP_NET_ADMIN; whoever makes the socket pair may
//! have done it before. With less the device still works: it lowers the request size in INIT's answer to what fits.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use event_manager::EventSet;
use rustix::{
    io::Errno,
    net::{RecvFlags, recv, sockopt},
};
use serde::{Deserialize, Serialize};
use slog::{Logger, error, warn};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use self::{
    slots::{InFlight, Slots},
    wire::{Kind, REPLY_HEADER, REQUEST_HEADER, Reply, Request},
};
use super::{Chain, Context, DeviceError, Poll, PollToken, VirtioDevice, read_config_bytes};

#[cfg(test)]
mod hostile_tests;
pub mod slots;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod wire;

/// The send buffer that each end of the socket pair needs for requests of 1 MiB with several in flight, bytes.
pub const SEND_BUFFER: usize = 4 << 20;

/// The longest tag, bytes (virtio 1.2, 5.11.4).
pub const MAX_TAG: usize = 36;

/// Request queue: Linux takes 4 descriptors off for headers and limits a request to the rest, so 256 pages need 512.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Requests or replies handled in one go, before other devices have their turn.
const BATCH: usize = 64;

const SERVER: PollToken = 0;

/// A device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// No tag, or a long one.
    #[error("file system tag {0:?} has {len} bytes, not 1 to {MAX_TAG}", len = .0.len())]
    Tag(String),
    /// The descriptor is not a socket.
    #[error("file server descriptor for tag {tag:?}: {source}")]
    Socket {
        /// The device's tag.
        tag: String,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// What must survive a save. Requests in flight cannot: their replies come from a server that is not there any more, so
/// they are answered with EIO at the next [`VirtioDevice::activate`]. Save when [`FsDevice::in_flight`] is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    slots: Slots,
}

/// See the module's introduction.
pub struct FsDevice {
    config: [u8; MAX_TAG + 4],
    socket: OwnedFd,
    /// Of our end of the socket, bytes.
    send_buffer: usize,
    state: FsState,
    link: Link,
    /// Malformed packets of the server; logged at each power of two.
    strange_packets: u64,
    log: Logger,
}

/// The state of the connection to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// The driver is not live.
    Idle,
    /// Watched for replies.
    Open,
    /// Watched for replies and for room, since a request did not fit.
    Full,
    /// The server closed it.
    Closed,
}

impl FsDevice {
    /// A device that the guest mounts by `tag` and whose requests the server at the other end of `socket` answers.
    ///
    /// # Errors
    /// If the tag is empty or longer than [`MAX_TAG`], or the descriptor is no socket.
    pub fn new(tag: &str, socket: OwnedFd, log: Logger) -> Result<Self, FsError> {
        let mut config = [0; MAX_TAG + 4];
        match config.get_mut(..tag.len()) {
            Some(place) if (1..=MAX_TAG).contains(&tag.len()) => place.copy_from_slice(tag.as_bytes()),
            _ => return Err(FsError::Tag(tag.to_owned())),
        }
        // One request queue.
        config[MAX_TAG..].copy_from_slice(&1u32.to_le_bytes());
        let send_buffer = raise_send_buffer(&socket)
            .map_err(|source| FsError::Socket { tag: tag.to_owned(), source: source.into() })?;
        let state = FsState::default();
        Ok(Self { config, socket, send_buffer, state, link: Link::Idle, strange_packets: 0, log })
    }

    /// What must survive a save.
    pub fn state(&self) -> &FsState {
        &self.state
    }

    /// Takes over a saved state, before [`VirtioDevice::activate`].
    pub fn restore(&mut self, state: FsState) {
        self.state = state;
    }

    /// Requests that the server has not answered.
    pub fn in_flight(&self) -> usize {
        self.state.slots.len()
    }

    /// Forwards what the driver made available in one queue, until it is empty, the socket full or [`BATCH`] done.
    fn forward_queue(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        if let Some(ring) = context.queues.get_mut(queue) {
            ring.disable_notification(context.memory)?;
        }
        for _ in 0..BATCH {
            // The driver need not notify while the socket is full: both queues are looked at again when there is room.
            if self.link == Link::Full {
                return Ok(());
            }
            match context.pop(queue)? {
                Some(chain) => self.forward(context, queue, chain)?,
                None => {
                    let Some(ring) = context.queues.get_mut(queue) else { return Ok(()) };
                    if !ring.enable_notification(context.memory)? {
                        return Ok(());
                    }
                }
            }
        }
        if let Some(ring) = context.queues.get_mut(queue) {
            ring.call_again();
        }
        Ok(())
    }

    /// Forwards one request, or answers it, or puts it back if the socket is full.
    fn forward(&mut self, context: &mut Context, queue: usize, chain: Chain) -> Result<(), DeviceError> {
        let mut header = [0; REQUEST_HEADER];
        if chain.readable.read(0, &mut header).is_err() {
            *context.guest_faults += 1;
            return Ok(context.complete(queue, chain.head, 0)?);
        }
        let request = Request::new(header);
        let kind = match request.check(chain.readable.len(), chain.writable.len()) {
            Ok(kind) => kind,
            Err(_) => {
                *context.guest_faults += 1;
                return answer(context, queue, &chain, Reply::error(request.unique(), libc::EINVAL));
            }
        };
        if self.link == Link::Closed {
            return answer(context, queue, &chain, Reply::error(request.unique(), libc::ENOTCONN));
        }
        let number = match kind {
            // Not answered, so not entered.
            Kind::Forget => 0,
            Kind::Init | Kind::Other => {
                let in_flight = InFlight {
                    queue: queue as u16,
                    head: chain.head,
                    unique: request.unique(),
                    init: kind == Kind::Init,
                };
                match self.state.slots.insert(in_flight) {
                    Some(number) => number,
                    None => {
                        *context.guest_faults += 1;
                        return answer(context, queue, &chain, Reply::error(request.unique(), libc::EIO));
                    }
                }
            }
        };
        match send(&chain, self.socket.as_fd(), &request.renumbered(number)) {
            Ok(()) if kind == Kind::Forget => Ok(context.complete(queue, chain.head, 0)?),
            Ok(()) => Ok(()),
            Err(Errno::AGAIN) => {
                self.state.slots.take(number);
                if let Some(ring) = context.queues.get_mut(queue) {
                    ring.unpop();
                }
                self.link = Link::Full;
                self.watch(context.poll, EventSet::IN | EventSet::OUT)
            }
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                self.state.slots.take(number);
                self.close(context)?;
                answer(context, queue, &chain, Reply::error(request.unique(), libc::ENOTCONN))
            }
            // Longer than the send buffer or in more pieces than Linux takes (the driver's fault), or no memory now.
            Err(errno) => {
                self.state.slots.take(number);
                answer(context, queue, &chain, Reply::error(request.unique(), errno.raw_os_error()))
            }
        }
    }

    /// Delivers what the server sent.
    fn receive(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        for _ in 0..BATCH {
            let mut header = [0; REPLY_HEADER];
            let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
            match recv(&self.socket, &mut header, flags) {
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                // An empty packet and the end look alike; no server sends the former.
                Err(_) | Ok((_, 0)) => return self.close(context),
                Ok((_, len)) => {
                    let request = if len < REPLY_HEADER { None } else { self.take(&header) };
                    match request {
                        Some(request) => self.deliver(context, request)?,
                        None => self.discard(len, &header),
                    }
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, header: &[u8; REPLY_HEADER]) -> Option<InFlight> {
        self.state.slots.take(Reply::parse(header).unique)
    }

    /// Receives the packet that comes next into the chain of its request.
    fn deliver(&mut self, context: &mut Context, request: InFlight) -> Result<(), DeviceError> {
        let queue = usize::from(request.queue);
        let Some(ring) = context.queues.get(queue) else { return Ok(()) };
        let chain = ring.chain(context.memory, request.head)?;
        let mut header = [0; REPLY_HEADER];
        let reply = match chain.writable.receive_packet(self.socket.as_fd(), &mut header) {
            Ok(received) => Reply::parse(&header).settle(received, chain.writable.len(), request.unique),
            Err(error) => {
                // The driver changed its descriptors meanwhile and left no room for a header.
                if error.kind() == std::io::ErrorKind::InvalidInput {
                    *context.guest_faults += 1;
                    self.discard_packet();
                }
                Reply::error(request.unique, libc::EIO)
            }
        };
        if request.init && reply.error == 0 {
            self.lower_limits(&chain, reply.len);
        }
        answer(context, queue, &chain, reply)
    }

    /// Lowers the size of requests in INIT's answer to what our end of the socket can send.
    fn lower_limits(&self, chain: &Chain, len: usize) {
        let (bytes, pages) = wire::init::limits(self.send_buffer);
        let room = &chain.writable;
        if len >= wire::init::MAX_WRITE + size_of_val(&bytes)
            && room.read_obj::<u32>(wire::init::MAX_WRITE).is_ok_and(|offered| offered > bytes)
        {
            let _ = room.write(wire::init::MAX_WRITE, &bytes.to_le_bytes());
        }
        if len >= wire::init::MAX_PAGES + size_of_val(&pages)
            && room.read_obj::<u16>(wire::init::MAX_PAGES).is_ok_and(|offered| offered > pages)
        {
            let _ = room.write(wire::init::MAX_PAGES, &pages.to_le_bytes());
        }
    }

    /// Drops the next packet of the server: its number belongs to no request.
    fn discard(&mut self, len: usize, header: &[u8; REPLY_HEADER]) {
        self.discard_packet();
        self.strange_packets += 1;
        if self.strange_packets.is_power_of_two() {
            warn!(self.log, "the file server sent a reply to no request"; "bytes" => len,
                "number" => Reply::parse(header).unique, "so_far" => self.strange_packets);
        }
    }

    fn discard_packet(&self) {
        let _ = recv(&self.socket, &mut [0; 1], RecvFlags::DONTWAIT);
    }

    /// The server is gone: fails everything that waits for it.
    fn close(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if self.link == Link::Closed {
            return Ok(());
        }
        self.link = Link::Closed;
        context.poll.remove(self.socket.as_raw_fd());
        error!(self.log, "the file server is gone, its files are lost to the guest";
            "requests_failed" => self.state.slots.len());
        self.fail_all(context, libc::ENOTCONN)
    }

    fn fail_all(&mut self, context: &mut Context, errno: i32) -> Result<(), DeviceError> {
        for request in self.state.slots.drain() {
            let queue = usize::from(request.queue);
            let Some(ring) = context.queues.get(queue) else { continue };
            let chain = ring.chain(context.memory, request.head)?;
            answer(context, queue, &chain, Reply::error(request.unique, errno))?;
        }
        Ok(())
    }

    fn watch(&self, poll: &mut dyn Poll, events: EventSet) -> Result<(), DeviceError> {
        let fd = self.socket.as_raw_fd();
        poll.modify(fd, SERVER, events)
            .map_err(|source| DeviceError::Host { what: "watching the file server's socket", source })
    }
}

/// Makes room for several requests of the greatest size, if it may; returns what there is.
fn raise_send_buffer(socket: &OwnedFd) -> Result<usize, Errno> {
    if sockopt::socket_send_buffer_size(socket)? < SEND_BUFFER {
        // Linux doubles the value, to account for its own needs.
        let _ = sockopt::set_socket_send_buffer_size_force(socket, SEND_BUFFER / 2);
    }
    sockopt::socket_send_buffer_size(socket)
}

/// Completes a request with a reply whose body, if any, is in the chain already.
fn answer(context: &mut Context, queue: usize, chain: &Chain, reply: Reply) -> Result<(), DeviceError> {
    // A chain without room for the header gets nothing; its fault was counted.
    let written = chain.writable.write(0, &reply.bytes()).map_or(0, |()| reply.len);
    Ok(context.complete(queue, chain.head, written)?)
}

fn send(chain: &Chain, socket: BorrowedFd, header: &[u8; REQUEST_HEADER]) -> Result<(), Errno> {
    loop {
        match chain.readable.send_packet(socket, header).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL)) {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

impl VirtioDevice for FsDevice {
    fn name(&self) -> &'static str {
        "fs"
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if self.link == Link::Idle {
            let fd = self.socket.as_raw_fd();
            let added = context.poll.add(fd, SERVER, EventSet::IN);
            added.map_err(|source| DeviceError::Host { what: "watching the file server's socket", source })?;
            self.link = Link::Open;
        }
        // Only a restored state has any.
        self.fail_all(context, libc::EIO)?;
        (0..QUEUE_SIZES.len()).try_for_each(|queue| self.forward_queue(context, queue))
    }

    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        self.forward_queue(context, queue)
    }

    fn descriptor_ready(
        &mut self,
        context: &mut Context,
        _token: PollToken,
        events: EventSet,
    ) -> Result<(), DeviceError> {
        if matches!(self.link, Link::Idle | Link::Closed) {
            return Ok(());
        }
        let was_full = self.link == Link::Full;
        if events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
            self.receive(context)?;
        }
        if self.link == Link::Full && events.contains(EventSet::OUT) {
            self.link = Link::Open;
            self.watch(context.poll, EventSet::IN)?;
        }
        // There is room, or no server any more: either way, what waits in the queues moves on.
        if was_full && self.link != Link::Full {
            (0..QUEUE_SIZES.len()).try_for_each(|queue| self.forward_queue(context, queue))?;
        }
        Ok(())
    }

    fn reset(&mut self, poll: &mut dyn Poll) {
        // Replies to these come under numbers that nobody knows any more.
        self.state.slots.drain().for_each(drop);
        if matches!(self.link, Link::Open | Link::Full) {
            poll.remove(self.socket.as_raw_fd());
            self.link = Link::Idle;
        }
    }
}
