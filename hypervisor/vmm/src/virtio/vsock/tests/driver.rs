//! A virtio driver for the device's tests: real rings in real guest memory, real sockets on the host's side, and no idea of
//! streams.

use std::{
    collections::HashMap,
    io::{self, IoSliceMut},
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::Duration,
};

use caisson_protos::monitor::{GuestStream, decode};
use event_manager::EventSet;
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType},
};
use tempfile::TempDir;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use crate::virtio::{
    Context, DeviceError, GuestMemory, Poll, PollToken, VirtQueue, VirtioDevice,
    vsock::{
        EVENT, Limits, RX, TX, Vsock, VsockState,
        packet::{HEADER_LEN, Header},
        streams::FIRST_HOST_PORT,
    },
};

pub const CID: u64 = 3;
/// How long a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);
const RING: u16 = 256;
/// Receive buffers, and as many transmit buffers: each takes two descriptors.
pub const SLOTS: u16 = RING / 2;
const MEMORY: usize = 32 << 20;
/// Rings of queue q lie at `q * RINGS`.
const RINGS: u64 = 0x10000;
const RX_BUFFERS: u64 = 1 << 20;
const RX_STRIDE: u64 = 8192;
/// Linux 6.1 posts a header and a page.
pub const RX_PAYLOAD: usize = 4096;
const TX_BUFFERS: u64 = 8 << 20;
const TX_STRIDE: u64 = 0x11000;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;

/// The state of a machine that boots.
pub fn fresh() -> VsockState {
    VsockState { guest_cid: CID, next_host_port: FIRST_HOST_PORT, owes_transport_reset: false }
}

/// Descriptors that the device watches, beyond the listener and the timer.
pub fn watched(driver: &Driver) -> usize {
    driver.poll.watched.len() - 2
}

/// Hundreds of streams need more descriptors than the usual 1024, here for both ends.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read or write `limit`.
    let result = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit)
    };
    assert_eq!(result, 0, "RLIMIT_NOFILE: {}", io::Error::last_os_error());
}

/// Bounds that no test meets by accident.
pub fn limits() -> Limits {
    let long = Duration::from_secs(120);
    Limits { greetings: 8, handshake: long, close: long, quiet: long, restore: long, ..Limits::within(4096) }
}

#[derive(Debug)]
pub struct TestPoll {
    epoll: Epoll,
    pub watched: HashMap<RawFd, PollToken>,
    /// So many of the next calls of `add` fail, as on a host where a user's epoll watches are used up.
    pub refused_adds: usize,
}

impl TestPoll {
    fn ctl(&self, op: ControlOperation, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(op, fd, EpollEvent::new(events, u64::from(token)))
    }
}

impl Poll for TestPoll {
    fn add(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        if self.refused_adds > 0 {
            self.refused_adds -= 1;
            return Err(Errno::NOSPC.into());
        }
        self.ctl(ControlOperation::Add, fd, token, events)?;
        self.watched.insert(fd, token);
        Ok(())
    }

    fn modify(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        self.watched.insert(fd, token);
        self.ctl(ControlOperation::Modify, fd, token, events)
    }

    fn remove(&mut self, fd: RawFd) {
        self.watched.remove(&fd).expect("a watched descriptor");
        self.ctl(ControlOperation::Delete, fd, 0, EventSet::empty()).expect("a watched descriptor is open");
    }
}

/// The driver: rings, and no idea of sockets.
pub struct Driver {
    pub device: Vsock,
    pub memory: GuestMemory,
    pub queues: Vec<VirtQueue>,
    pub poll: TestPoll,
    pub faults: u64,
    available: [u16; 3],
    used: [u16; 3],
    free_tx: Vec<u16>,
    /// Where clients connect.
    pub path: PathBuf,
    /// The parent's end of the guest-streams socket; `None` after it was closed.
    pub parent: Option<OwnedFd>,
    _directory: TempDir,
    /// Interrupts that the transport would have sent.
    pub interrupts: u64,
}

impl Driver {
    pub fn new(limits: Limits) -> Self {
        raise_descriptor_limit();
        Self::with_state(fresh(), limits)
    }

    pub fn with_state(state: VsockState, limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        Self::with_listener(state, limits, directory, listener.into())
    }

    pub fn with_listener(state: VsockState, limits: Limits, directory: TempDir, listener: OwnedFd) -> Self {
        let mut driver = Self::inactive(state, limits, directory, listener);
        driver.activate();
        driver
    }

    fn inactive(state: VsockState, limits: Limits, directory: TempDir, listener: OwnedFd) -> Self {
        let path = directory.path().join("vsock");
        let flags = SocketFlags::CLOEXEC;
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let log = slog::Logger::root(slog::Discard, slog::o!());
        let device = Vsock::with_limits(state, listener, near, log, limits).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let queues = (0..3u64)
            .map(|index| {
                let mut queue = VirtQueue::new(RING).unwrap();
                let registers = queue.registers_mut();
                registers.set_size(if index == 2 { 8 } else { RING });
                registers.set_desc_table_address(Some((index * RINGS) as u32), Some(0));
                registers.set_avail_ring_address(Some((index * RINGS + 0x4000) as u32), Some(0));
                registers.set_used_ring_address(Some((index * RINGS + 0x8000) as u32), Some(0));
                registers.set_event_idx(true);
                registers.set_ready(true);
                assert!(queue.is_usable(&memory));
                queue
            })
            .collect();
        let poll = TestPoll { epoll: Epoll::new().unwrap(), watched: HashMap::new(), refused_adds: 0 };
        Self {
            device,
            memory,
            queues,
            poll,
            faults: 0,
            available: [0; 3],
            used: [0; 3],
            free_tx: (0..SLOTS).collect(),
            path,
            parent: Some(far),
            _directory: directory,
            interrupts: 0,
        }
    }

    /// Saves the machine and restores it: another device over the same memory and rings, and new sockets.
    pub fn restored(self, limits: Limits) -> Self {
        let state = VsockState { owes_transport_reset: true, ..self.device.save() };
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let mut driver = Self::inactive(state, limits, directory, listener.into());
        for (queue, saved) in driver.queues.iter_mut().zip(&self.queues) {
            queue.registers_mut().set_next_avail(saved.registers().next_avail());
            queue.registers_mut().set_next_used(saved.registers().next_used());
        }
        (driver.memory, driver.available, driver.used) = (self.memory, self.available, self.used);
        driver.free_tx = self.free_tx;
        driver.activate();
        driver
    }

    pub fn activate(&mut self) {
        self.call(|device, context| device.activate(context)).unwrap();
    }

    /// Resets the device, but leaves the rings as they are.
    pub fn reset(&mut self) {
        self.device.reset(&mut self.poll);
    }

    pub fn memory_at(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn memory_mut(&mut self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn call(
        &mut self,
        call: impl FnOnce(&mut Vsock, &mut Context) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut context = Context {
            memory: &self.memory,
            queues: &mut self.queues,
            poll: &mut self.poll,
            features: 0,
            guest_faults: &mut self.faults,
        };
        let result = call(&mut self.device, &mut context);
        let mut due = false;
        for queue in &mut self.queues {
            due |= queue.take_signal(&self.memory).unwrap_or(false);
        }
        self.interrupts += u64::from(due);
        result
    }

    /// As the transport does, until the device has no more to do for now.
    pub fn notify(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.call(|device, context| device.queue_ready(context, queue))?;
        loop {
            let again: Vec<usize> = (0..3).filter(|&queue| self.queues[queue].take_call_again()).collect();
            if again.is_empty() {
                return Ok(());
            }
            for queue in again {
                self.call(|device, context| device.queue_ready(context, queue))?;
            }
        }
    }

    /// Handles what is ready among host descriptors; waits up to `timeout` for it. Returns how many events there were.
    pub fn dispatch(&mut self, timeout: Duration) -> usize {
        self.try_dispatch(timeout).unwrap()
    }

    pub fn try_dispatch(&mut self, timeout: Duration) -> Result<usize, DeviceError> {
        let mut events = [EpollEvent::default(); 64];
        let count = match self.poll.epoll.wait(timeout.as_millis() as i32, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("epoll: {error}"),
        };
        for event in &events[..count] {
            let (token, set) = (event.data() as PollToken, event.event_set());
            self.call(|device, context| device.descriptor_ready(context, token, set))?;
        }
        Ok(count)
    }

    fn ring(queue: usize) -> u64 {
        queue as u64 * RINGS
    }

    /// Writes descriptor `index` of `queue`.
    pub fn descriptor(&mut self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(Self::ring(queue) + u64::from(index) * 16);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Makes a chain available, without a notification.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let base = Self::ring(queue) + 0x4000;
        let size = if queue == EVENT { 8 } else { RING };
        let slot = u64::from(self.available[queue] % size);
        self.memory.write_obj(head, GuestAddress(base + 4 + slot * 2)).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory.write_obj(self.available[queue], GuestAddress(base + 2)).unwrap();
    }

    /// Sets the driver's index to what it should not be.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.memory.write_obj(index, GuestAddress(Self::ring(queue) + 0x4002)).unwrap();
    }

    /// Whether the device asked to be notified of the last chain offered.
    pub fn wants_notification(&self, queue: usize) -> bool {
        let size = if queue == EVENT { 8 } else { u64::from(RING) };
        let event: u16 = self.memory.read_obj(GuestAddress(Self::ring(queue) + 0x8000 + 4 + size * 8)).unwrap();
        event.wrapping_add(1) == self.available[queue]
    }

    /// The next completed chain of `queue`: head and length.
    pub fn completed(&mut self, queue: usize) -> Option<(u16, u32)> {
        let base = Self::ring(queue) + 0x8000;
        let index: u16 = self.memory.read_obj(GuestAddress(base + 2)).unwrap();
        if index == self.used[queue] {
            return None;
        }
        let size = if queue == EVENT { 8 } else { RING };
        let at = base + 4 + u64::from(self.used[queue] % size) * 8;
        self.used[queue] = self.used[queue].wrapping_add(1);
        // The driver wants an interrupt for the next one.
        self.memory
            .write_obj(self.used[queue], GuestAddress(Self::ring(queue) + 0x4000 + 4 + u64::from(size) * 2))
            .unwrap();
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head as u16, len))
    }

    /// Posts receive buffer `slot`: a header and a page, as two descriptors.
    pub fn post(&mut self, slot: u16) {
        let at = RX_BUFFERS + u64::from(slot) * RX_STRIDE;
        self.descriptor(RX, slot * 2, at, HEADER_LEN as u32, DESC_WRITE | DESC_NEXT, slot * 2 + 1);
        self.descriptor(RX, slot * 2 + 1, at + HEADER_LEN as u64, RX_PAYLOAD as u32, DESC_WRITE, 0);
        self.offer(RX, slot * 2);
    }

    /// The next packet from the device with its payload, and the receive buffer that it used.
    pub fn receive(&mut self) -> Option<(Header, Vec<u8>, u16)> {
        let (head, len) = self.completed(RX)?;
        let slot = head / 2;
        let at = RX_BUFFERS + u64::from(slot) * RX_STRIDE;
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let payload = bytes.split_off(HEADER_LEN);
        Some((Header::from_bytes(bytes[..].try_into().unwrap()), payload, slot))
    }

    /// Sends a packet: a header and a payload as two descriptors. False if the transmit queue is full.
    pub fn try_send(&mut self, header: &Header, payload: &[u8]) -> bool {
        while let Some((head, _)) = self.completed(TX) {
            self.free_tx.push(head / 2);
        }
        let Some(slot) = self.free_tx.pop() else { return false };
        let at = TX_BUFFERS + u64::from(slot) * TX_STRIDE;
        self.memory.write_slice(&header.to_bytes(), GuestAddress(at)).unwrap();
        self.memory.write_slice(payload, GuestAddress(at + HEADER_LEN as u64)).unwrap();
        let next = if payload.is_empty() { 0 } else { DESC_NEXT };
        self.descriptor(TX, slot * 2, at, HEADER_LEN as u32, next, slot * 2 + 1);
        self.descriptor(TX, slot * 2 + 1, at + HEADER_LEN as u64, payload.len() as u32, 0, 0);
        self.offer(TX, slot * 2);
        true
    }

    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        assert!(self.try_send(header, payload), "the device left no room in the transmit queue");
        self.notify(TX).unwrap();
    }

    /// The next stream that the device announces to the parent.
    pub fn announced(&mut self) -> Option<(GuestStream, UnixStream)> {
        let parent = self.parent.as_ref()?;
        let mut packet = [0; 64];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut packet)];
        let len = match rustix::net::recvmsg(parent, &mut slices, &mut control, RecvFlags::DONTWAIT) {
            Ok(message) => message.bytes,
            Err(Errno::AGAIN) => return None,
            Err(error) => panic!("guest streams: {error}"),
        };
        let mut rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let far = rights.next().and_then(|mut all| all.next()).expect("a descriptor beside each announcement");
        Some((decode(&packet[..len]).unwrap(), UnixStream::from(far)))
    }

    /// A client at the device's listener that has said where it wants to go.
    pub fn client(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(&self.path).unwrap();
        io::Write::write_all(&mut client, format!("CONNECT {port}\n").as_bytes()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }
}
