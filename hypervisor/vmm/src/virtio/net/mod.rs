//! The network device (virtio 1.2, section 5.1) on a tap that the parent has made.
//!
//! ```text
//!   transmitq ─ pop ─► header and addresses checked ─► limit ─► writev ─► tap, one queue of it for each pair
//!   receiveq  ◄─ complete, several chains to a packet ◄─ wanted? ◄─ limit ◄─ readv ─┘
//!   controlq  ─ what is wanted, how many pairs, which offloads
//! ```
//!
//! The packets' headers are the kernel's own, so what guest and kernel agree on (checksums that are not computed yet,
//! segments that are not cut yet) passes through as it is. All happens on the device thread, and each call is bounded in
//! packets and bytes; [`receive`] says what bounds the memory.
//!
//! A tap that disappears takes the link with it, not the machine. The parent can take the link away, too; then the driver sends
//! nothing more, if it keeps to that.

mod control;
mod filter;
mod header;
mod receive;
mod sources;
pub mod tap;
mod timer;
mod transmit;

use std::{io, time::Instant};

use caisson_protos::monitor::{AllowedSources, MAX_MTU, NetworkStats, RateLimit};
use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use slog::Logger;
use virtio_bindings::{virtio_ids::VIRTIO_ID_NET, virtio_net::*};

pub use self::{
    filter::{Mac, ReceiveFilter, is_multicast},
    tap::{Backend, Tap},
};
use self::{receive::Pair, sources::Sources, timer::Timer};
use super::{Context, DeviceError, Poll, PollToken, VirtioDevice, rate::RateLimiter, read_config_bytes};

/// The most queue pairs: as many as a machine has vCPUs.
pub const MAX_PAIRS: usize = 32;
/// The least and the greatest MTU: what IPv4 needs, and what a tap takes.
pub const MTU: std::ops::RangeInclusive<u16> = 68..=MAX_MTU;

/// Chains in a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Commands in the control queue.
const CONTROL_SIZE: u16 = 64;
/// Tokens of the timers, above those of any pair.
const SEND_TIMER: PollToken = 1000;
const RECEIVE_TIMER: PollToken = 1001;

/// What every driver may use.
const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
/// UDP datagrams, cut and joined by the kernel.
const USO_FEATURES: u64 = 1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
/// What a driver can switch off again by VIRTIO_NET_CTRL_GUEST_OFFLOADS.
const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// What a network device is to be.
pub struct Settings {
    /// Its address, not a multicast one.
    pub mac: Mac,
    /// Within [`MTU`].
    pub mtu: u16,
    /// What the guest may send.
    pub send_limit: RateLimit,
    /// What the guest may receive.
    pub receive_limit: RateLimit,
    /// From which addresses the guest may send; None: any.
    pub sources: Option<AllowedSources>,
    /// The kernel cuts and joins UDP datagrams ([`Tap::has_uso`]).
    pub uso: bool,
}

/// All of a network device that must survive a save, apart from its tap. A packet that waits for the driver's buffers does
/// not: a network may lose one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The address that the driver uses.
    pub mac: Mac,
    /// Queue pairs that the driver uses.
    pub active_pairs: u16,
    /// The offloads that the driver has chosen by command, out of those that it has negotiated.
    pub offloads: Option<u64>,
    /// What it wants to receive.
    pub filter: ReceiveFilter,
    /// What it may send. Neither limit is renewed by a reset.
    pub send: RateLimiter,
    /// What it may receive.
    pub receive: RateLimiter,
    /// There is a link, as the parent has said last.
    pub link: bool,
}

/// One network device.
pub struct Net {
    pairs: Vec<Pair>,
    queue_sizes: Vec<u16>,
    features: u64,
    mac: Mac,
    mtu: u16,
    sources: Option<Sources>,
    state: NetState,
    config: [u8; 12],
    /// The driver has not been shown the configuration space as it is.
    config_changed: bool,
    stats: NetworkStats,
    /// Where a packet goes that the driver's buffers have no room for.
    rest: Vec<u8>,
    send_timer: Timer,
    receive_timer: Timer,
    /// The tap is no more.
    gone: bool,
    started: Instant,
    log: Logger,
}

impl Net {
    /// A device on the queues of a tap, of which there are 1 to [`MAX_PAIRS`], all attached.
    ///
    /// # Errors
    /// No more descriptors, or a tap that does not let its queues be detached.
    pub fn new(backends: Vec<Box<dyn Backend>>, settings: Settings, log: Logger) -> io::Result<Self> {
        let Settings { mac, mtu, send_limit, receive_limit, sources, uso } = settings;
        let mut queue_sizes = vec![QUEUE_SIZE; backends.len() * 2];
        queue_sizes.push(CONTROL_SIZE);
        let multi_queue = if backends.len() > 1 { 1 << VIRTIO_NET_F_MQ } else { 0 };
        let state = NetState {
            mac,
            active_pairs: 1,
            offloads: None,
            filter: ReceiveFilter::default(),
            send: RateLimiter::new(&send_limit),
            receive: RateLimiter::new(&receive_limit),
            link: true,
        };
        let mut net = Self {
            pairs: backends.into_iter().map(|backend| Pair::new(backend, true)).collect(),
            queue_sizes,
            features: FEATURES | multi_queue | if uso { USO_FEATURES } else { 0 },
            mac,
            mtu,
            sources: sources.map(|allowed| Sources::new(mac, &allowed)),
            state,
            config: [0; 12],
            config_changed: false,
            stats: NetworkStats::default(),
            rest: vec![0; receive::MAX_PACKET],
            send_timer: Timer::new()?,
            receive_timer: Timer::new()?,
            gone: false,
            started: Instant::now(),
            log,
        };
        net.config = net.config_space();
        // A driver begins with the first pair, and what is spread to the others would wait for nobody.
        for pair in net.pairs.iter_mut().skip(1) {
            pair.backend.attach(false)?;
            pair.attached = false;
        }
        Ok(net)
    }

    /// What must survive a save.
    pub fn state(&self) -> &NetState {
        &self.state
    }

    /// Takes over a saved state, before [`VirtioDevice::activate`].
    pub fn restore(&mut self, state: NetState) {
        self.state = state;
        self.update_config();
    }

    /// After a change of what the configuration space says.
    fn update_config(&mut self) {
        let config = self.config_space();
        self.config_changed |= config != self.config;
        self.config = config;
    }

    /// `struct virtio_net_config` up to the MTU.
    fn config_space(&self) -> [u8; 12] {
        let [a, b, c, d, e, f] = self.state.mac;
        let up = self.state.link && !self.gone;
        let [s0, s1] = if up { (VIRTIO_NET_S_LINK_UP as u16).to_le_bytes() } else { [0, 0] };
        // At most MAX_PAIRS.
        let [p0, p1] = (self.pairs.len() as u16).to_le_bytes();
        let [m0, m1] = self.mtu.to_le_bytes();
        [a, b, c, d, e, f, s0, s1, p0, p1, m0, m1]
    }

    /// Which queue is for what, which depends on whether the driver uses several pairs (5.1.2).
    fn role(&self, features: u64, queue: usize) -> Role {
        let pairs = if features & 1 << VIRTIO_NET_F_MQ != 0 { self.pairs.len() } else { 1 };
        match queue.checked_sub(pairs * 2) {
            None if queue.is_multiple_of(2) => Role::Receive(queue / 2),
            None => Role::Transmit(queue / 2),
            Some(0) if features & 1 << VIRTIO_NET_F_CTRL_VQ != 0 => Role::Control,
            Some(_) => Role::None,
        }
    }

    /// Tells the host which work may be left to the driver.
    fn set_offloads(&self, features: u64) -> Result<(), DeviceError> {
        let chosen = features & self.state.offloads.unwrap_or(GUEST_OFFLOADS);
        match self.pairs.first() {
            None => Ok(()),
            Some(pair) => pair
                .backend
                .set_offloads(tap_offloads(chosen))
                .map_err(|source| DeviceError::Host { what: "setting the offloads of a tap", source }),
        }
    }

    /// Attaches and watches the pairs that the driver uses, and no others.
    fn attach(&mut self, poll: &mut dyn Poll) -> Result<(), DeviceError> {
        let active = usize::from(self.state.active_pairs);
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let attach = index < active;
            if !attach {
                pair.unwatch(poll);
            }
            if pair.attached != attach && !self.gone {
                pair.backend
                    .attach(attach)
                    .map_err(|source| DeviceError::Host { what: "attaching or detaching a queue of a tap", source })?;
                pair.attached = attach;
            }
            if attach && !self.gone {
                pair.watch(receive::token(index), poll)?;
            }
        }
        Ok(())
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
    None,
}

/// The kernel's flags for what the driver does itself. Those for segments mean nothing without the one for checksums.
fn tap_offloads(features: u64) -> u32 {
    let flag = |feature: u32, flag: u32| if features & 1 << feature != 0 { flag } else { 0 };
    if features & 1 << VIRTIO_NET_F_GUEST_CSUM == 0 {
        return 0;
    }
    let tcp = flag(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4) | flag(VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6);
    let ecn = if tcp != 0 { flag(VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN) } else { 0 };
    let udp = flag(VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4) | flag(VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6);
    // The kernel knows them together only.
    let udp = if udp == libc::TUN_F_USO4 | libc::TUN_F_USO6 { udp } else { 0 };
    libc::TUN_F_CSUM | tcp | ecn | udp
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn needs_queue(&self, queue: usize) -> bool {
        // The first pair.
        queue < 2
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if !self.gone {
            self.set_offloads(context.features)?;
        }
        for (timer, token) in [(&self.send_timer, SEND_TIMER), (&self.receive_timer, RECEIVE_TIMER)] {
            context
                .poll
                .add(timer.fd(), token, EventSet::IN)
                .map_err(|source| DeviceError::Host { what: "watching a timer", source })?;
        }
        self.attach(context.poll)
    }

    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        match self.role(context.features, queue) {
            Role::Receive(pair) => self.receive(context, pair),
            Role::Transmit(pair) => self.transmit(context, pair),
            Role::Control => self.control(context, queue),
            Role::None => Ok(()),
        }
    }

    fn descriptor_ready(&mut self, context: &mut Context, token: PollToken, _: EventSet) -> Result<(), DeviceError> {
        match token {
            SEND_TIMER => self.transmit_again(context),
            RECEIVE_TIMER => self.receive_again(context),
            // An error of the tap shows in the attempt to read.
            pair => self.receive(context, usize::try_from(pair).unwrap_or(usize::MAX)),
        }
    }

    fn network_stats(&self) -> Option<NetworkStats> {
        Some(self.stats)
    }

    fn set_sources(&mut self, sources: &AllowedSources) -> bool {
        let bound = self.sources.is_some();
        if bound {
            self.sources = Some(Sources::new(self.mac, sources));
        }
        bound
    }

    fn set_link(&mut self, up: bool) -> bool {
        self.state.link = up;
        self.update_config();
        true
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn reset(&mut self, poll: &mut dyn Poll) {
        for timer in [&mut self.send_timer, &mut self.receive_timer] {
            poll.remove(timer.fd());
            timer.stop();
        }
        let NetState { mac, active_pairs, offloads, filter, .. } = &mut self.state;
        (*mac, *active_pairs, *offloads, *filter) = (self.mac, 1, None, ReceiveFilter::default());
        self.pairs.iter_mut().for_each(|pair| pair.unwatch(poll));
        for pair in self.pairs.iter_mut().skip(1).filter(|pair| pair.attached) {
            // A tap that refuses is gone, and the next driver will find that.
            let _ = pair.backend.attach(false);
            pair.attached = false;
        }
        self.update_config();
    }
}

#[cfg(test)]
mod tests;
