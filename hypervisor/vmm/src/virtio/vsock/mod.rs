//! Stream sockets between host and guest (virtio 1.2, section 5.10), of the hybrid kind: the guest uses AF_VSOCK, the
//! host Unix sockets, and this device joins them in pairs.
//!
//! ```text
//!   host                         device (this module)                       guest
//!   clients ──► listener.rs ──┐
//!                             ├─► streams.rs: who is there, whose turn ◄─── queue 1 (tx)  packet.rs
//!   parent  ◄── guest.rs ─────┘      └─ connection.rs: the protocol   ────► queue 0 (rx)
//!   sockets ◄─► host.rs                                               ────► queue 2 (event)
//! ```
//!
//! Bytes are copied once in each direction, by the kernel, between a socket and guest memory; those that a socket does not take at
//! once wait here and are copied twice more. Everything that a call brings about is done within it: a REQUEST is answered,
//! data is passed on and credit is returned before the transport looks whether an interrupt is due. Whatever changes a
//! stream ends in [`Vsock::settle`].
//!
//! When the guest has posted no buffer in its receive queue, nothing is read from the host (sockets are watched
//! edge-triggered, so they do not wake the device either), and only then the driver is asked to notify when it has posted one.
//!
//! The process must ignore SIGPIPE, as Rust programs do.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use event_manager::EventSet;
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use slog::Logger;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::timerfd::TimerFd;

use super::{Context, DeviceError, Poll, PollToken, VirtioDevice, read_config_bytes};

mod connection;
mod guest;
mod host;
mod listener;
mod packet;
mod streams;

use host::HostEnd;
use listener::{Caller, Listener};
use streams::{StreamId, Streams};

const QUEUE_SIZES: [u16; 3] = [256, 256, 8];
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Chains handled in one call before others on the device thread have their turn.
const MAX_CHAINS: usize = 256;
/// The same in bytes: some 100 us of copying.
const MAX_BYTES: usize = 1 << 20;
/// The driver only frees what it has transmitted, hence so many chains are reported to it together.
const QUIET_CHAINS: u16 = 32;
/// How long the listener rests when the process has no descriptor for another client.
const LISTENER_REST: Duration = Duration::from_millis(100);
/// Descriptors of the process that streams leave for everything else.
const SPARE_DESCRIPTORS: u64 = 256;

/// Bounds of the device.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Streams, in both directions together.
    streams: usize,
    /// Of these, streams that the guest opened.
    guest_streams: usize,
    /// Host clients that have not finished their CONNECT line.
    greetings: usize,
    /// Time for a host client's line, and then for the guest's answer to it.
    handshake: Duration,
    /// Time for the guest's answer to the end of both directions (Linux' own for it is the same, VSOCK_CLOSE_TIMEOUT).
    close: Duration,
    /// After this time transmitted chains are reported to the driver, however few. It needs to know only to free memory.
    quiet: Duration,
    /// Time for a restored guest to reset its streams.
    restore: Duration,
}

impl Limits {
    /// The bounds of a process that may open so many descriptors: each stream and each greeting takes one.
    fn within(descriptors: u64) -> Self {
        let greetings = 128;
        let streams = descriptors.saturating_sub(SPARE_DESCRIPTORS + greetings).clamp(64, 1024) as usize;
        Self {
            streams,
            guest_streams: streams / 4 * 3,
            greetings: greetings as usize,
            handshake: Duration::from_secs(30),
            close: Duration::from_secs(8),
            quiet: Duration::from_secs(1),
            restore: Duration::from_secs(1),
        }
    }

    /// The bounds of this process.
    fn of_process() -> Self {
        Self::within(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
    }
}

/// What of the device survives a save. Streams do not: an event makes the guest reset them when the machine goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    guest_cid: u64,
    /// Where the search for the next host port begins.
    next_host_port: u32,
    /// The event that resets all streams was not delivered to the guest yet.
    owes_transport_reset: bool,
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    state: VsockState,
    listener: Listener,
    guest_streams: OwnedFd,
    streams: Streams<HostEnd>,
    timer: Timer,
    /// The driver was asked to notify when it posts a receive buffer.
    awaits_buffers: bool,
    /// Transmitted chains that were not reported to the driver.
    quiet_chains: u16,
    /// When it has to be.
    signal_by: Option<Instant>,
    /// While set, the guest was restored and has not reset its streams.
    restored: Option<Restored>,
    /// The next deadline of a stream or a greeting, or before.
    next_expiry: Option<Instant>,
    accept_failures: u64,
    limits: Limits,
    log: Logger,
}

/// A guest that has to reset the streams from before its save.
#[derive(Debug)]
struct Restored {
    /// It is not waited for longer.
    until: Instant,
    /// The driver's index of the event queue when the event was delivered: beyond it, the guest has handled the event.
    posted: Option<u16>,
}

impl Vsock {
    /// A device for a machine that boots.
    ///
    /// `listener` and `guest_streams` are those of [`caisson_protos::monitor::VsockConfig`].
    ///
    /// # Errors
    /// If a socket cannot be made non-blocking, or no timer can be had.
    pub fn new(guest_cid: u64, listener: OwnedFd, guest_streams: OwnedFd, log: Logger) -> io::Result<Self> {
        let state = VsockState { guest_cid, next_host_port: streams::FIRST_HOST_PORT, owes_transport_reset: false };
        Self::with_limits(state, listener, guest_streams, log, Limits::of_process())
    }

    /// The device of a saved machine. As soon as it is activated, it tells the guest that all streams are gone.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn restore(saved: &VsockState, listener: OwnedFd, guest_streams: OwnedFd, log: Logger) -> io::Result<Self> {
        let state = VsockState { owes_transport_reset: true, ..saved.clone() };
        Self::with_limits(state, listener, guest_streams, log, Limits::of_process())
    }

    fn with_limits(
        state: VsockState,
        listener: OwnedFd,
        guest_streams: OwnedFd,
        log: Logger,
        limits: Limits,
    ) -> io::Result<Self> {
        Ok(Self {
            listener: Listener::new(listener, limits.greetings)?,
            guest_streams,
            streams: Streams::new(limits.streams, limits.guest_streams, state.next_host_port),
            timer: Timer::new()?,
            awaits_buffers: false,
            quiet_chains: 0,
            signal_by: None,
            restored: None,
            next_expiry: None,
            accept_failures: 0,
            state,
            limits,
            log,
        })
    }

    /// What must survive a save.
    pub fn save(&self) -> VsockState {
        VsockState { next_host_port: self.streams.next_host_port(), ..self.state.clone() }
    }

    fn accept(&mut self, poll: &mut dyn Poll) {
        let deadline = Instant::now() + self.limits.handshake;
        match self.listener.accept(deadline, poll) {
            Ok(callers) => {
                self.expires_at(deadline);
                callers.into_iter().for_each(|caller| self.request(caller, poll));
            }
            Err(error) => {
                self.accept_failures += 1;
                if self.accept_failures.is_power_of_two() {
                    slog::warn!(self.log, "cannot accept a vsock client, trying again"; "error" => %error,
                        "so_far" => self.accept_failures);
                }
                self.listener.rest(Instant::now() + LISTENER_REST, poll);
            }
        }
    }

    /// Requests a client's stream from the guest.
    fn request(&mut self, caller: Caller, poll: &mut dyn Poll) {
        let deadline = Instant::now() + self.limits.handshake;
        let host = HostEnd::new(caller.socket, caller.watched, Some(deadline));
        let id = match self.streams.open_from_host(caller.port, host) {
            Ok(id) => id,
            Err(mut host) => return host.close(poll),
        };
        if let Some(stream) = self.streams.get_mut(id)
            && let Err(error) = stream.host.watch(Source::Stream(id).token(), poll)
        {
            slog::warn!(self.log, "cannot watch a vsock client"; "error" => %error);
            stream.host.close(poll);
            self.streams.remove(id);
            return;
        }
        self.settle(id, poll);
    }

    fn stream_ready(&mut self, id: StreamId, events: EventSet, poll: &mut dyn Poll) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        stream.host.note(events);
        if events.contains(EventSet::OUT) && stream.host.has_spill() {
            match stream.host.flush(poll) {
                // Bounded by the window.
                Ok(taken) => stream.connection.delivered(u32::try_from(taken).unwrap_or(u32::MAX)),
                Err(host::ReadClosed) => stream.connection.host_read_closed(),
            }
        }
        if stream.host.is_closed() && stream.connection.is_requesting() {
            // Nobody waits for the answer any more.
            stream.connection.expire();
        }
        // What is still to be read goes to the guest first; its end then says that the host does not read any more, too.
        if stream.host.is_closed() && (stream.host.has_spill() || stream.connection.host_to_guest_over()) {
            stream.host.drop_spill();
            stream.connection.host_read_closed();
        }
        self.settle(id, poll);
    }

    /// Does what a change of a stream entails: ends directions of the socket, ends the stream, gives it a turn.
    fn settle(&mut self, id: StreamId, poll: &mut dyn Poll) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        let (connection, host) = (&stream.connection, &mut stream.host);
        match (connection.guest_to_host_over(), connection.host_to_guest_over()) {
            (true, true) => host.close(poll),
            (true, false) => host.shut_write(),
            (false, true) => host.shut_read(),
            (false, false) => {}
        }
        let (gone, over) = (connection.is_gone(), connection.is_over());
        let has_data = host.is_readable() && connection.wants_host_data();
        let has_packet = connection.owes_control() || (has_data && (connection.sendable() > 0 || host.may_be_at_end()));
        if connection.awaits_reset() && host.deadline.is_none() {
            let deadline = Instant::now() + self.limits.close;
            host.deadline = Some(deadline);
            self.expires_at(deadline);
        }
        if over {
            self.streams.remove(id);
        } else if gone {
            self.streams.forget_ports(id);
        } else if has_packet {
            self.streams.enqueue(id);
        }
    }

    /// Something has to be ended at that time.
    fn expires_at(&mut self, deadline: Instant) {
        self.next_expiry = Some(self.next_expiry.map_or(deadline, |next| next.min(deadline)));
    }

    fn timer_fired(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.timer.fired();
        let now = Instant::now();
        let due = |time: Option<Instant>| time.is_some_and(|time| time <= now);
        if due(self.signal_by) {
            self.signal_transmitted(context);
        }
        if due(self.restored.as_ref().map(|restored| restored.until)) {
            self.go_on(context)?;
        }
        if due(self.next_expiry) {
            self.expire(now, context.poll);
        }
        self.listener
            .watch(now, context.poll)
            .map_err(|source| DeviceError::Host { what: "watch the vsock listener", source })
    }

    /// Ends what has waited for too long.
    fn expire(&mut self, now: Instant, poll: &mut dyn Poll) {
        self.next_expiry = self.listener.expire(now, poll);
        for id in self.streams.ids() {
            let Some(stream) = self.streams.get_mut(id) else { continue };
            let Some(deadline) = stream.host.deadline else { continue };
            if deadline <= now {
                stream.connection.expire();
                stream.host.deadline = None;
                self.settle(id, poll);
            } else {
                self.expires_at(deadline);
            }
        }
    }

    /// Sees to it that the timer fires for the next of all deadlines.
    fn arm_timer(&mut self) -> Result<(), DeviceError> {
        let restored = self.restored.as_ref().map(|restored| restored.until);
        let times = [self.signal_by, restored, self.next_expiry, self.listener.rests_until()];
        times.into_iter().flatten().min().map_or(Ok(()), |time| self.timer.fire_at(time))
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.state.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.awaits_buffers = true;
        (self.quiet_chains, self.signal_by) = (0, None);
        if self.state.owes_transport_reset {
            self.restored = Some(Restored { until: Instant::now() + self.limits.restore, posted: None });
            // Of what was transmitted before the save the driver may not know.
            if let Some(queue) = context.queues.get_mut(TX) {
                queue.signal_always();
            }
        }
        self.listener
            .watch(Instant::now(), context.poll)
            .and_then(|()| context.poll.add(self.timer.fd(), Source::Timer.token(), EventSet::IN))
            .map_err(|source| DeviceError::Host { what: "watch the vsock device's descriptors", source })?;
        self.announce_reset(context)?;
        self.take_packets(context)?;
        self.arm_timer()
    }

    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        match queue {
            EVENT => self.announce_reset(context)?,
            // Packets of the guest may have waited until their refusals could be sent.
            _ => self.take_packets(context)?,
        }
        self.arm_timer()
    }

    fn descriptor_ready(
        &mut self,
        context: &mut Context,
        token: PollToken,
        events: EventSet,
    ) -> Result<(), DeviceError> {
        match Source::from_token(token) {
            Source::Listener => self.accept(context.poll),
            Source::Timer => self.timer_fired(context)?,
            Source::Greeting(number) => {
                let ended = events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
                if let Some(caller) = self.listener.read_line(number, ended, context.poll) {
                    self.request(caller, context.poll);
                }
            }
            Source::Stream(id) => self.stream_ready(id, events, context.poll),
        }
        self.send_packets(context)?;
        self.arm_timer()
    }

    fn open_streams(&self) -> u32 {
        u32::try_from(self.streams.len()).unwrap_or(u32::MAX)
    }

    fn has_undelivered(&self) -> bool {
        self.streams.any(HostEnd::has_spill)
    }

    fn reset(&mut self, poll: &mut dyn Poll) {
        self.listener.reset(poll);
        self.streams.clear().iter_mut().for_each(|host| host.close(poll));
        poll.remove(self.timer.fd());
        self.timer.fired();
        (self.signal_by, self.restored, self.next_expiry) = (None, None, None);
        // A driver that starts anew has no streams.
        self.state.owes_transport_reset = false;
    }
}

/// What a watched descriptor is, as a token: two bits of kind, thirty of number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Listener,
    Timer,
    Greeting(u32),
    Stream(StreamId),
}

impl Source {
    const NUMBER_MASK: u32 = (1 << StreamId::BITS) - 1;

    fn token(self) -> PollToken {
        let (kind, number) = match self {
            Self::Listener => (0, 0),
            Self::Timer => (1, 0),
            Self::Greeting(number) => (2, number & Self::NUMBER_MASK),
            Self::Stream(id) => (3, id.number()),
        };
        kind << StreamId::BITS | number
    }

    fn from_token(token: PollToken) -> Self {
        match token >> StreamId::BITS {
            0 => Self::Listener,
            1 => Self::Timer,
            2 => Self::Greeting(token & Self::NUMBER_MASK),
            _ => Self::Stream(StreamId::from_number(token)),
        }
    }

    /// The number of the greeting after `number`.
    fn next_greeting(number: u32) -> u32 {
        (number + 1) & Self::NUMBER_MASK
    }
}

/// Fires for the next deadline. It is not stopped when that is met, so it costs at most two system calls in each time limit,
/// however many streams come and go.
#[derive(Debug)]
struct Timer {
    timer: TimerFd,
    due: Option<Instant>,
}

impl Timer {
    fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, due: None })
    }

    fn fd(&self) -> i32 {
        self.timer.as_raw_fd()
    }

    /// Makes it fire at `deadline` or before.
    fn fire_at(&mut self, deadline: Instant) -> Result<(), DeviceError> {
        if self.due.is_some_and(|due| due <= deadline) {
            return Ok(());
        }
        // Zero would stop it.
        let rest = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.due = Some(deadline);
        self.timer
            .reset(rest, None)
            .map_err(|error| DeviceError::Host { what: "set the vsock timer", source: error.into() })
    }

    fn fired(&mut self) {
        self.due = None;
        let _ = self.timer.clear();
    }
}

#[cfg(test)]
mod tests;
