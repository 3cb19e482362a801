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
//!   EIO. When the socket closes, what it answered before is delivered; all other requests fail with ENOTCONN, now and later.
//!   A server that answers nothing for [`PROGRESS_AFTER`] is reported in the log.
//!
//! Each side gives its end a send buffer of [`SEND_BUFFER`] bytes, which takes CAP_NET_ADMIN; the maker of the socket pair may
//! have done it before. With less the device still works, with smaller requests. In INIT's answer the device lowers their
//! size to what the socket carries well ([`wire::init::limits`]).

use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use event_manager::EventSet;
use rustix::{io::Errno, net::sockopt};
use serde::{Deserialize, Serialize};
use slog::{Logger, error, info, warn};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vmm_sys_util::timerfd::TimerFd;

use self::{
    requests::{SMALL, Waiting},
    slots::Slots,
    wire::Reply,
};
use super::{Chain, Context, DeviceError, Poll, PollToken, Turn, VirtioDevice, read_config_bytes};

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod pressure_tests;
mod replies;
mod requests;
pub mod slots;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod wire;

/// The send buffer that each end of the socket pair needs, bytes. Linux reports room once less than a quarter is taken: with ten
/// requests of the greatest size still queued, so that the server never runs dry.
pub const SEND_BUFFER: usize = 4 << 20;

/// The longest tag, bytes (virtio 1.2, 5.11.4).
pub const MAX_TAG: usize = 36;

/// Request queue: Linux takes 4 descriptors off for headers and limits a request to the rest, so 256 pages need 512.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Requests or replies handled in one go, before other devices have their turn.
const BATCH: usize = 64;

/// Bytes of requests or replies after which a batch ends, too: some 100 us of copying.
const BATCH_BYTES: usize = 1 << 20;

/// The same for requests.
const TURN: Turn = Turn { chains: BATCH, bytes: BATCH_BYTES };

/// After this time a request for which the host had no memory is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(2);

/// A request that is in flight for this long is reported.
pub const PROGRESS_AFTER: Duration = Duration::from_secs(30);

const SERVER: PollToken = 0;
const TIMER: PollToken = 1;

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
    /// No timer can be had.
    #[error("timer of the file system with tag {tag:?}: {source}")]
    Timer {
        /// The device's tag.
        tag: String,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// What must survive a save. Requests that wait are sent after a restore. Requests in flight cannot: their replies come from a server that is not there any more, so
/// they are answered with EIO at the next [`VirtioDevice::activate`]. Save when [`FsDevice::in_flight`] is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    slots: Slots,
    waiting: VecDeque<Waiting>,
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
    /// Packets for which the host had no memory; logged at each power of two.
    memory_failures: u64,
    timer: TimerFd,
    alarm: Alarm,
    /// The newest request when the alarm was set: if it or an older one is in flight when it fires, the server stalls.
    newest: u64,
    /// Where small replies are received while several requests are in flight.
    small_reply: Box<[u8; SMALL]>,
    /// Times in a row that the server was found to stall.
    stalls: u32,
    log: Logger,
    /// What sending fails with, for tests: a host without memory cannot be had on demand.
    #[cfg(test)]
    send_failures: VecDeque<Errno>,
}

/// What the timer is set for. One of them is enough: reports of a stall may come late while memory is short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Alarm {
    #[default]
    Off,
    /// To send again what the host had no memory for.
    Retry,
    /// To see whether the server answers. Not stopped when it does, so it costs one system call in each
    /// [`PROGRESS_AFTER`], however many requests there are.
    Progress,
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
        let timer = TimerFd::new().map_err(|source| FsError::Timer { tag: tag.to_owned(), source: source.into() })?;
        Ok(Self {
            config,
            socket,
            send_buffer,
            state: FsState::default(),
            link: Link::Idle,
            strange_packets: 0,
            memory_failures: 0,
            timer,
            alarm: Alarm::Off,
            newest: 0,
            small_reply: Box::new([0; SMALL]),
            stalls: 0,
            log,
            #[cfg(test)]
            send_failures: VecDeque::new(),
        })
    }

    /// What must survive a save.
    pub fn state(&self) -> &FsState {
        &self.state
    }

    /// Takes over a saved state, before [`VirtioDevice::activate`].
    pub fn restore(&mut self, state: FsState) {
        self.state = state;
    }

    /// Requests that were sent and that the server has not answered.
    pub fn in_flight(&self) -> usize {
        self.state.slots.len()
    }

    /// The server is gone: fails everything that waits for it.
    fn close(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if self.link == Link::Closed {
            return Ok(());
        }
        self.link = Link::Closed;
        self.unwatch(context.poll);
        error!(self.log, "the file server is gone, its files are lost to the guest";
            "requests_failed" => self.state.slots.len() + self.state.waiting.len());
        let in_flight = self.fail_in_flight(context, libc::ENOTCONN);
        in_flight.and(self.fail_waiting(context))
    }

    /// Each is answered, whatever is wrong with another; the first error is returned.
    fn fail_in_flight(&mut self, context: &mut Context, errno: i32) -> Result<(), DeviceError> {
        let mut result = Ok(());
        for request in self.state.slots.drain() {
            let queue = usize::from(request.queue);
            let Some(ring) = context.queues.get(queue) else { continue };
            let failed = match ring.chain(context.memory, request.head) {
                Ok(chain) => answer(context, queue, &chain, Reply::error(request.unique, errno)),
                Err(error) => Err(error.into()),
            };
            result = result.and(failed);
        }
        result
    }

    /// Watches the socket for what the state of the link asks for.
    fn watch(&self, poll: &mut dyn Poll) -> Result<(), DeviceError> {
        let events = if self.link == Link::Full { EventSet::IN | EventSet::OUT } else { EventSet::IN };
        poll.modify(self.socket.as_raw_fd(), SERVER, events)
            .map_err(|source| DeviceError::Host { what: "watching the file server's socket", source })
    }

    fn unwatch(&mut self, poll: &mut dyn Poll) {
        poll.remove(self.socket.as_raw_fd());
        poll.remove(self.timer.as_raw_fd());
        self.alarm = Alarm::Off;
        let _ = self.timer.clear();
    }

    /// A request was sent: its reply is expected in time.
    fn expect_progress(&mut self) -> Result<(), DeviceError> {
        if self.alarm != Alarm::Off {
            return Ok(());
        }
        self.newest = self.state.slots.newest();
        self.arm(Alarm::Progress)
    }

    fn arm(&mut self, alarm: Alarm) -> Result<(), DeviceError> {
        if self.alarm == alarm {
            return Ok(());
        }
        let after = if alarm == Alarm::Retry { RETRY_AFTER } else { PROGRESS_AFTER };
        self.timer
            .reset(after, None)
            .map_err(|error| DeviceError::Host { what: "set the timer of a file system", source: error.into() })?;
        self.alarm = alarm;
        Ok(())
    }

    fn alarm_fired(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let _ = self.timer.clear();
        match std::mem::take(&mut self.alarm) {
            Alarm::Off => {}
            Alarm::Retry => self.send_waiting(context)?,
            Alarm::Progress => self.report_stall(),
        }
        if self.link != Link::Closed && !self.state.slots.is_empty() {
            self.expect_progress()?;
        }
        Ok(())
    }

    fn report_stall(&mut self) {
        match self.state.slots.overdue(self.newest) {
            Some(oldest) => {
                self.stalls = self.stalls.saturating_add(1);
                if self.stalls.is_power_of_two() {
                    warn!(self.log, "the file server does not answer, programs in the guest wait for it";
                        "seconds" => PROGRESS_AFTER.as_secs() * u64::from(self.stalls), "opcode" => oldest.opcode,
                        "in_flight" => self.state.slots.len(), "waiting" => self.state.waiting.len());
                }
            }
            None if self.stalls > 0 => {
                self.stalls = 0;
                info!(self.log, "the file server answers again");
            }
            None => {}
        }
    }
}

/// Makes room for several requests of the greatest size, if it may; returns what there is.
fn raise_send_buffer(socket: &OwnedFd) -> Result<usize, Errno> {
    if sockopt::socket_send_buffer_size(socket)? < SEND_BUFFER {
        // Linux doubles the value, to account for its own needs.
        if sockopt::set_socket_send_buffer_size_force(socket, SEND_BUFFER / 2).is_err() {
            // Without CAP_NET_ADMIN, as much as net.core.wmem_max allows.
            let _ = sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER / 2);
        }
    }
    sockopt::socket_send_buffer_size(socket)
}

/// Completes a request with a reply whose body, if any, is in the chain already.
fn answer(context: &mut Context, queue: usize, chain: &Chain, reply: Reply) -> Result<(), DeviceError> {
    // A chain without room for the header gets nothing; its fault was counted.
    let written = chain.writable.write(0, &reply.bytes()).map_or(0, |()| reply.len);
    Ok(context.complete(queue, chain.head, written)?)
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

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if self.link == Link::Idle {
            let fd = self.socket.as_raw_fd();
            let added = context.poll.add(fd, SERVER, EventSet::IN);
            added.map_err(|source| DeviceError::Host { what: "watching the file server's socket", source })?;
            if let Err(source) = context.poll.add(self.timer.as_raw_fd(), TIMER, EventSet::IN) {
                context.poll.remove(fd);
                return Err(DeviceError::Host { what: "watching the timer of a file system", source });
            }
            self.link = Link::Open;
        }
        // Only a restored state has any in flight or waiting.
        self.fail_in_flight(context, libc::EIO)?;
        if self.link == Link::Closed {
            self.fail_waiting(context)?;
        }
        self.send_waiting(context)?;
        self.forward_queues(context)
    }

    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        self.forward_queue(context, queue)
    }

    fn descriptor_ready(
        &mut self,
        context: &mut Context,
        token: PollToken,
        events: EventSet,
    ) -> Result<(), DeviceError> {
        if matches!(self.link, Link::Idle | Link::Closed) {
            return Ok(());
        }
        if token == TIMER {
            return self.alarm_fired(context);
        }
        let was_full = self.link == Link::Full;
        if events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
            self.receive(context)?;
        }
        if self.link == Link::Full && events.contains(EventSet::OUT) {
            self.link = Link::Open;
            self.watch(context.poll)?;
        }
        self.send_waiting(context)?;
        // There is room, or no server any more: either way, what is in the queues moves on.
        if was_full && self.link != Link::Full {
            self.forward_queues(context)?;
        }
        Ok(())
    }

    fn reset(&mut self, poll: &mut dyn Poll) {
        // Replies to these come under numbers that nobody knows any more.
        self.state.slots.drain().for_each(drop);
        self.state.waiting.clear();
        if matches!(self.link, Link::Open | Link::Full) {
            self.unwatch(poll);
            self.link = Link::Idle;
        }
    }
}
