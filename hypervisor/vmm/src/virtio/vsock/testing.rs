//! A guest for the device's tests: a virtio driver that owns real rings in real guest memory, and on top of it as much of a
//! socket layer as Linux has (credit, half-close, reset). It checks what the device sends as strictly as it can.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, IoSliceMut},
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use caisson_protos::monitor::{GuestStream, decode};
use event_manager::EventSet;
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType},
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::{
    super::{Context, DeviceError, GuestMemory, Poll, PollToken, VirtQueue, VirtioDevice},
    EVENT, Limits, RX, TX, Vsock, VsockState,
    packet::{HEADER_LEN, HOST_CID, Header, Op, Shutdown, TYPE_STREAM},
    streams::{FIRST_HOST_PORT, Ports},
};

pub const CID: u64 = 3;
/// How long a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);
const RING: u16 = 256;
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

pub fn limits() -> Limits {
    Limits { streams: 1024, greetings: 8, handshake: Duration::from_secs(120) }
}

#[derive(Debug)]
pub struct TestPoll {
    epoll: Epoll,
    pub watched: HashMap<RawFd, PollToken>,
}

impl TestPoll {
    fn ctl(&self, op: ControlOperation, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(op, fd, EpollEvent::new(events, u64::from(token)))
    }
}

impl Poll for TestPoll {
    fn add(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        self.ctl(ControlOperation::Add, fd, token, events)?;
        self.watched.insert(fd, token);
        Ok(())
    }

    fn modify(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> io::Result<()> {
        self.watched.insert(fd, token);
        self.ctl(ControlOperation::Modify, fd, token, events)
    }

    fn remove(&mut self, fd: RawFd) {
        if self.watched.remove(&fd).is_some() {
            self.ctl(ControlOperation::Delete, fd, 0, EventSet::empty()).expect("a watched descriptor is open");
        }
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
    _directory: tempfile::TempDir,
    /// Interrupts that the transport would have sent.
    pub interrupts: u64,
}

impl Driver {
    pub fn new(limits: Limits) -> Self {
        Self::with_state(
            VsockState { guest_cid: CID, next_host_port: FIRST_HOST_PORT, owes_transport_reset: false },
            limits,
        )
    }

    pub fn with_state(state: VsockState, limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let flags = SocketFlags::CLOEXEC;
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let log = slog::Logger::root(slog::Discard, slog::o!());
        let device = Vsock::with_limits(state, listener.into(), near, log, limits).unwrap();
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
        let poll = TestPoll { epoll: Epoll::new().unwrap(), watched: HashMap::new() };
        let mut driver = Self {
            device,
            memory,
            queues,
            poll,
            faults: 0,
            available: [0; 3],
            used: [0; 3],
            free_tx: (0..RING / 2).collect(),
            path,
            parent: Some(far),
            _directory: directory,
            interrupts: 0,
        };
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
        let mut events = [EpollEvent::default(); 64];
        let count = match self.poll.epoll.wait(timeout.as_millis() as i32, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("epoll: {error}"),
        };
        for event in &events[..count] {
            let (token, set) = (event.data() as PollToken, event.event_set());
            self.call(|device, context| device.descriptor_ready(context, token, set)).unwrap();
        }
        count
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

    /// Posts receive buffer `slot` of 128: a header and a page, as two descriptors.
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

/// A guest socket.
#[derive(Debug, Default)]
pub struct Socket {
    pub established: bool,
    pub reset: bool,
    /// What the host will not do any more.
    pub host_over: Shutdown,
    /// Bytes received and not yet read by the application.
    pub inbox: Vec<u8>,
    /// Bytes that the application has written and that are not sent yet.
    pub outbox: Vec<u8>,
    /// To be told the host when the outbox is empty.
    pub closing: Shutdown,
    told: Shutdown,
    received: u32,
    forwarded: u32,
    reported: u32,
    sent: u32,
    host_window: u32,
    host_forwarded: u32,
    pub credit_requests: u32,
}

/// The guest's socket layer.
pub struct Guest {
    pub driver: Driver,
    pub sockets: HashMap<Ports, Socket>,
    pub listening: Vec<u32>,
    /// Streams that the host opened, in order.
    pub accepted: VecDeque<Ports>,
    next_port: u32,
    /// Size of each socket's buffer.
    pub window: u32,
    /// Receive buffers are not posted again while set.
    pub withhold: bool,
    withheld: Vec<u16>,
    /// Packets from the device, of each kind.
    pub counts: HashMap<u16, u32>,
    /// RSTs for ports that are no socket.
    pub stray_resets: u32,
}

impl Guest {
    pub fn new() -> Self {
        Self::with(limits())
    }

    pub fn with(limits: Limits) -> Self {
        Self::on(Driver::new(limits))
    }

    pub fn with_state(state: VsockState, limits: Limits) -> Self {
        Self::on(Driver::with_state(state, limits))
    }

    fn on(driver: Driver) -> Self {
        let mut guest = Self {
            driver,
            sockets: HashMap::new(),
            listening: Vec::new(),
            accepted: VecDeque::new(),
            next_port: 50_000,
            window: 256 * 1024,
            withhold: false,
            withheld: (0..RING / 2).collect(),
            counts: HashMap::new(),
            stray_resets: 0,
        };
        guest.post();
        guest
    }

    /// Posts every receive buffer that was withheld.
    pub fn post(&mut self) {
        let mut wanted = false;
        for slot in std::mem::take(&mut self.withheld) {
            self.driver.post(slot);
            wanted |= self.driver.wants_notification(RX);
        }
        if wanted {
            self.driver.notify(RX).unwrap();
        }
    }

    pub fn count(&self, op: Op) -> u32 {
        self.counts.get(&(op as u16)).copied().unwrap_or(0)
    }

    pub fn packet(&self, ports: Ports, op: Op) -> Header {
        let (window, forwarded) = (self.window, self.sockets.get(&ports).map_or(0, |socket| socket.forwarded));
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: window,
            fwd_cnt: forwarded,
            ..Header::default()
        }
    }

    fn say(&mut self, ports: Ports, op: Op, flags: u32, payload: &[u8]) {
        let header = Header { flags, len: payload.len() as u32, ..self.packet(ports, op) };
        if let Some(socket) = self.sockets.get_mut(&ports) {
            socket.reported = socket.forwarded;
        }
        self.driver.send(&header, payload);
    }

    pub fn connect(&mut self, host_port: u32) -> Ports {
        let ports = Ports { host: host_port, guest: self.next_port };
        self.next_port += 1;
        self.sockets.insert(ports, Socket::default());
        self.say(ports, Op::Request, 0, &[]);
        self.take();
        ports
    }

    pub fn socket(&mut self, ports: Ports) -> &mut Socket {
        self.sockets.get_mut(&ports).expect("a socket")
    }

    pub fn write(&mut self, ports: Ports, bytes: &[u8]) {
        self.socket(ports).outbox.extend(bytes);
        self.push(ports);
        self.take();
    }

    /// The application reads up to `max` bytes.
    pub fn read(&mut self, ports: Ports, max: usize) -> Vec<u8> {
        let window = self.window;
        let socket = self.socket(ports);
        let count = max.min(socket.inbox.len());
        let bytes = socket.inbox.drain(..count).collect();
        socket.forwarded = socket.forwarded.wrapping_add(count as u32);
        // Linux: tell when the host may believe that less than 64 KiB are free.
        let believed = window - socket.received.wrapping_sub(socket.reported);
        if count > 0 && believed < 64 * 1024 && !socket.reset {
            self.say(ports, Op::CreditUpdate, 0, &[]);
            self.take();
        }
        bytes
    }

    /// Shuts directions down, after everything written has been sent.
    pub fn shutdown(&mut self, ports: Ports, what: Shutdown) {
        let socket = self.socket(ports);
        socket.closing = socket.closing.union(what);
        self.push(ports);
        self.take();
    }

    pub fn close(&mut self, ports: Ports) {
        self.shutdown(ports, Shutdown { receive: true, send: true });
    }

    /// Drops the socket with an RST.
    pub fn abort(&mut self, ports: Ports) {
        self.say(ports, Op::Reset, 0, &[]);
        self.sockets.remove(&ports);
    }

    /// Sends what credit allows, then the shutdown.
    pub fn push(&mut self, ports: Ports) {
        loop {
            let Some(socket) = self.sockets.get_mut(&ports) else { return };
            if !socket.established || socket.reset {
                return;
            }
            let credit = socket.host_window.saturating_sub(socket.sent.wrapping_sub(socket.host_forwarded));
            let count = socket.outbox.len().min(credit as usize).min(64 * 1024);
            if count > 0 {
                let payload: Vec<u8> = socket.outbox.drain(..count).collect();
                socket.sent = socket.sent.wrapping_add(count as u32);
                self.say(ports, Op::Data, 0, &payload);
                self.take();
                continue;
            }
            if socket.outbox.is_empty() && socket.closing.union(socket.told) != socket.told {
                socket.told = socket.closing;
                let flags = socket.told.to_flags();
                self.say(ports, Op::Shutdown, flags, &[]);
                self.take();
            }
            return;
        }
    }

    /// Takes in what the device has sent.
    pub fn take(&mut self) {
        while let Some((header, payload, slot)) = self.driver.receive() {
            self.withheld.push(slot);
            self.packet_in(&header, payload);
        }
        if !self.withhold && !self.withheld.is_empty() {
            self.post();
        }
    }

    fn packet_in(&mut self, header: &Header, payload: Vec<u8>) {
        assert_eq!((header.dst_cid, header.len as usize), (CID, payload.len()));
        *self.counts.entry(header.op).or_default() += 1;
        let ports = Ports { host: header.src_port, guest: header.dst_port };
        let op = Op::from_number(header.op).expect("a known operation");
        let window = self.window;
        let Some(socket) = self.sockets.get_mut(&ports) else {
            match op {
                Op::Request if self.listening.contains(&ports.guest) => {
                    let socket = Socket { established: true, host_window: header.buf_alloc, ..Socket::default() };
                    self.sockets.insert(ports, socket);
                    self.accepted.push_back(ports);
                    self.say(ports, Op::Response, 0, &[]);
                }
                Op::Reset => self.stray_resets += 1,
                _ => self.say(ports, Op::Reset, 0, &[]),
            }
            return;
        };
        assert!(!socket.reset, "{op:?} after the reset of {ports:?}");
        let freed = header.fwd_cnt.wrapping_sub(socket.host_forwarded);
        assert!(freed <= socket.sent.wrapping_sub(socket.host_forwarded), "fwd_cnt ran backwards or ahead");
        (socket.host_window, socket.host_forwarded) =
            if op == Op::Reset { (0, socket.host_forwarded) } else { (header.buf_alloc, header.fwd_cnt) };
        match op {
            Op::Request => panic!("REQUEST for a socket that exists"),
            Op::Response => {
                assert!(!std::mem::replace(&mut socket.established, true), "a second RESPONSE");
            }
            Op::Reset => socket.reset = true,
            Op::Shutdown => {
                socket.host_over = socket.host_over.union(Shutdown::from_flags(header.flags));
                // Linux answers the end of both directions by itself once everything was read.
                if socket.host_over.is_both() && socket.inbox.is_empty() {
                    socket.reset = true;
                    self.say(ports, Op::Reset, 0, &[]);
                    return;
                }
            }
            Op::Data => {
                assert!(socket.established && !payload.is_empty());
                assert!(!socket.host_over.send, "data after SHUTDOWN(send)");
                socket.received = socket.received.wrapping_add(payload.len() as u32);
                assert!(socket.received.wrapping_sub(socket.forwarded) <= window, "more data than credit");
                socket.inbox.extend(payload);
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => {
                socket.credit_requests += 1;
                self.say(ports, Op::CreditUpdate, 0, &[]);
            }
        }
        self.push(ports);
    }

    /// Runs the machine until `done`, at most [`PATIENCE`].
    pub fn run_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let limit = Instant::now() + PATIENCE;
        loop {
            self.take();
            if done(self) {
                return;
            }
            assert!(Instant::now() < limit, "waited for {what}");
            self.driver.dispatch(Duration::from_millis(10));
        }
    }

    /// Accepts the next stream that the host opens.
    pub fn accept(&mut self) -> Ports {
        self.run_until("a stream from the host", |guest| !guest.accepted.is_empty());
        self.accepted.pop_front().unwrap()
    }

    /// The next stream that the device announced to the parent.
    pub fn announced(&mut self) -> (GuestStream, UnixStream) {
        let (stream, socket) = self.driver.announced().expect("an announcement");
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        (stream, socket)
    }

    /// Reads one line from a host socket while the machine runs.
    pub fn read_line(&mut self, client: &mut UnixStream) -> String {
        let mut line = Vec::new();
        client.set_nonblocking(true).unwrap();
        self.run_until("a line on the host socket", |_| {
            let mut byte = [0];
            loop {
                match io::Read::read(client, &mut byte) {
                    Ok(0) => return true,
                    Ok(_) => line.push(byte[0]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                    Err(error) => panic!("host socket: {error}"),
                }
                if byte[0] == b'\n' {
                    return true;
                }
            }
        });
        client.set_nonblocking(false).unwrap();
        String::from_utf8(line).unwrap()
    }

    /// A client of the host whose stream the guest has accepted.
    pub fn open(&mut self, port: u32) -> (UnixStream, Ports) {
        if !self.listening.contains(&port) {
            self.listening.push(port);
        }
        let mut client = self.driver.client(port);
        let ports = self.accept();
        assert_eq!(self.read_line(&mut client), format!("OK {}\n", ports.host));
        (client, ports)
    }
}
