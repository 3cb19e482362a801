//! A guest for the device's tests: on top of the driver as much of a socket layer as Linux has (credit, half-close,
//! reset). It checks what the device sends as strictly as it can.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use caisson_protos::monitor::GuestStream;

use super::driver::{CID, Driver, PATIENCE, SLOTS, limits};
use crate::virtio::vsock::{
    Limits, RX, VsockState,
    packet::{HOST_CID, Header, Op, Shutdown, TYPE_STREAM},
    streams::Ports,
};

/// A guest socket.
#[derive(Debug, Default)]
pub struct Socket {
    pub established: bool,
    pub reset: bool,
    reset_by_guest: bool,
    /// What the host will not do any more.
    pub host_over: Shutdown,
    /// Bytes received and not yet read by the application.
    pub inbox: Vec<u8>,
    /// Bytes that the application has written and that are not sent yet.
    pub outbox: Vec<u8>,
    /// To be told the host when the outbox is empty.
    pub closing: Shutdown,
    reported_over: Shutdown,
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
            withheld: (0..SLOTS).collect(),
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
        let socket = self.socket(ports);
        if socket.host_over.receive {
            return;
        }
        socket.outbox.extend(bytes);
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
            if socket.outbox.is_empty() && socket.closing.union(socket.reported_over) != socket.reported_over {
                socket.reported_over = socket.closing;
                let flags = socket.reported_over.to_flags();
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
        if socket.reset_by_guest {
            // On its way before the device took our RST.
            return;
        }
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
                if socket.host_over.receive {
                    // EPIPE for the application.
                    socket.outbox.clear();
                }
                // Linux answers the end of both directions by itself once everything was read.
                if socket.host_over.is_both() && socket.inbox.is_empty() {
                    (socket.reset, socket.reset_by_guest) = (true, true);
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
            assert!(Instant::now() < limit, "waited for {what}; open: {:#?}", self.open_streams());
            self.driver.dispatch(Duration::from_millis(1));
        }
    }

    /// The device's streams, for a failed test to show.
    fn open_streams(&mut self) -> Vec<String> {
        let streams = &mut self.driver.device.streams;
        let ids = streams.ids();
        let stream =
            ids.into_iter().filter_map(|id| streams.get_mut(id).map(|s| format!("{:?} {:?}", s.ports, s.connection)));
        stream.collect()
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
