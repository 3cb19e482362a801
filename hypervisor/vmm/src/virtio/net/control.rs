//! The control queue (virtio 1.2, section 5.1.6.5): one command to a chain, answered by one byte.
//!
//! A guest may choose what it receives, how many queues it uses and which of the offloads that it has negotiated are in use. Its
//! address it may change unless it is bound to it.

use virtio_bindings::virtio_net::*;

use super::{
    super::{BufferError, Buffers, Chain, Context, DeviceError, Served, Turn, serve},
    Net,
    filter::{MAX_ADDRESSES, Mac, is_multicast},
};

/// Commands that are obeyed before others on the device thread have their turn; what is read of each is bounded.
const TURN: Turn = Turn { chains: 16, bytes: usize::MAX };
/// Class and command.
const COMMAND: usize = 2;

/// A command that is not obeyed.
struct Refused;

impl From<BufferError> for Refused {
    fn from(_: BufferError) -> Self {
        Self
    }
}

impl Net {
    /// Obeys what is in the control queue `queue`.
    ///
    /// # Errors
    /// The device then needs a reset.
    pub(super) fn control(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        serve(context, queue, TURN, |context, chain| self.answer(context, chain))?;
        Ok(())
    }

    fn answer(&mut self, context: &mut Context, chain: &Chain) -> Result<Served, DeviceError> {
        let answer = match self.obey(context, &chain.readable) {
            Ok(()) => VIRTIO_NET_OK,
            Err(Refused) => {
                *context.guest_faults += 1;
                VIRTIO_NET_ERR
            }
        };
        // Without a place for the answer, nobody waits for it.
        Ok(Served::Written(chain.writable.write(0, &[answer as u8]).map_or(0, |()| 1)))
    }

    fn obey(&mut self, context: &mut Context, request: &Buffers) -> Result<(), Refused> {
        let mut command = [0; COMMAND];
        request.read(0, &mut command)?;
        let [class, command] = command.map(u32::from);
        match class {
            VIRTIO_NET_CTRL_RX => self.set_mode(command, byte(request)?),
            VIRTIO_NET_CTRL_MAC if command == VIRTIO_NET_CTRL_MAC_TABLE_SET => self.set_tables(request),
            VIRTIO_NET_CTRL_MAC if command == VIRTIO_NET_CTRL_MAC_ADDR_SET => self.set_mac(request),
            VIRTIO_NET_CTRL_MQ if command == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
                if context.features & 1 << VIRTIO_NET_F_MQ == 0 {
                    return Err(Refused);
                }
                let mut pairs = [0; 2];
                request.read(COMMAND, &mut pairs)?;
                self.set_pairs(context, u16::from_le_bytes(pairs))
            }
            VIRTIO_NET_CTRL_GUEST_OFFLOADS if command == VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET => {
                let mut wanted = [0; 8];
                request.read(COMMAND, &mut wanted)?;
                let wanted = u64::from_le_bytes(wanted);
                if context.features & 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS == 0 || wanted & !context.features != 0 {
                    return Err(Refused);
                }
                self.state.offloads = Some(wanted);
                self.set_offloads(context.features).map_err(|_| Refused)
            }
            _ => Err(Refused),
        }
    }

    fn set_mode(&mut self, command: u32, value: u8) -> Result<(), Refused> {
        let filter = &mut self.state.filter;
        let switch = match command {
            VIRTIO_NET_CTRL_RX_PROMISC => &mut filter.promiscuous,
            VIRTIO_NET_CTRL_RX_ALLMULTI => &mut filter.all_multicast,
            VIRTIO_NET_CTRL_RX_ALLUNI => &mut filter.all_unicast,
            VIRTIO_NET_CTRL_RX_NOMULTI => &mut filter.no_multicast,
            VIRTIO_NET_CTRL_RX_NOUNI => &mut filter.no_unicast,
            VIRTIO_NET_CTRL_RX_NOBCAST => &mut filter.no_broadcast,
            _ => return Err(Refused),
        };
        *switch = value != 0;
        Ok(())
    }

    /// Two tables, unicast and multicast, each with the number of its addresses before them.
    fn set_tables(&mut self, request: &Buffers) -> Result<(), Refused> {
        let (unicast, next) = table(request, COMMAND)?;
        let (multicast, _) = table(request, next)?;
        (self.state.filter.unicast, self.state.filter.multicast) = (unicast, multicast);
        Ok(())
    }

    fn set_mac(&mut self, request: &Buffers) -> Result<(), Refused> {
        let mut mac: Mac = [0; 6];
        request.read(COMMAND, &mut mac)?;
        let bound = self.sources.is_some() && mac != self.mac;
        if bound || is_multicast(mac) || mac == Mac::default() {
            return Err(Refused);
        }
        self.state.mac = mac;
        self.update_config();
        Ok(())
    }

    /// The driver uses the first `count` queue pairs.
    fn set_pairs(&mut self, context: &mut Context, count: u16) -> Result<(), Refused> {
        if count == 0 || usize::from(count) > self.pairs.len() {
            return Err(Refused);
        }
        self.state.active_pairs = count;
        self.attach(context.poll).map_err(|_| Refused)
    }
}

fn byte(request: &Buffers) -> Result<u8, Refused> {
    let mut value = [0; 1];
    request.read(COMMAND, &mut value)?;
    let [value] = value;
    Ok(value)
}

/// The addresses of a table at byte `at`, None if they are too many, and where it ends.
fn table(request: &Buffers, at: usize) -> Result<(Option<Vec<Mac>>, usize), Refused> {
    let mut count = [0; 4];
    request.read(at, &mut count)?;
    let count = usize::try_from(u32::from_le_bytes(count)).map_err(|_| Refused)?;
    let start = at + count_size();
    let end = count.checked_mul(size_of::<Mac>()).and_then(|len| start.checked_add(len)).ok_or(Refused)?;
    if end > request.len() {
        return Err(Refused);
    }
    if count > MAX_ADDRESSES {
        return Ok((None, end));
    }
    let mut table = vec![Mac::default(); count];
    for (n, mac) in table.iter_mut().enumerate() {
        request.read(start + n * size_of::<Mac>(), mac)?;
    }
    Ok((Some(table), end))
}

const fn count_size() -> usize {
    size_of::<u32>()
}
