//! The block device (virtio 1.2, section 5.2) on a raw file. The file's content is never looked at: whatever a guest
//! writes into its first sectors, it stays a raw disk.
//!
//! ```text
//!   queue ─ pop, parse, copy what is written ──► engine: the disk's own thread ──► file
//!     ▲                                             │
//!     └─ status, copy what was read, complete ◄─────┘ eventfd
//! ```
//!
//! The device thread never waits for the file, and the disk's thread never sees guest memory ([`engine`] says what
//! that is good for). At most [`MAX_AHEAD`] bytes and a piece are on their way at a time, which bounds the memory that a
//! disk takes, and the bytes that one turn copies.

mod backing;
mod engine;
mod pieces;
mod request;

use std::{collections::BTreeMap, io, ops::RangeInclusive};

use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use slog::Logger;
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
};

pub use self::backing::Backing;
use self::{
    engine::{Done, Engine, Work},
    pieces::{PIECE, Pieces},
    request::{
        Geometry, HEADER, MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_ZEROES_SECTORS, Refusal, Request, SECTOR, SERIAL,
    },
};
use super::{Chain, Context, DeviceError, Poll, PollToken, Served, Turn, VirtioDevice, read_config_bytes};

const QUEUE_SIZES: [u16; 1] = [128];
/// The only queue.
const REQUESTS: usize = 0;
/// Data descriptors in a request: the queue without header and status.
const SEG_MAX: u32 = 126;
/// What is taken from the queue before others on the device thread have their turn.
const TURN: Turn = Turn { chains: 32, bytes: 1 << 20 };
/// Block sizes that are reported to the guest, bytes.
const BLOCK_SIZES: RangeInclusive<u32> = SECTOR as u32..=4096;
/// No further request is taken while so many bytes are with the disk's thread.
pub const MAX_AHEAD: usize = 1 << 20;

/// All of a disk that must survive a save, apart from its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in sectors, fixed when the machine was built.
    pub sectors: u64,
    /// The file's own block size, bytes; what a driver of Linux takes: a power of two from [`SECTOR`] to a page.
    pub block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// What the driver reads as serial number, padded with zeros.
    pub serial: [u8; SERIAL],
    /// Requests that were taken from the queue and are not completed, by the first descriptor of their chains. All
    /// of them can be done twice: a restored disk begins again at `done`.
    pub in_flight: BTreeMap<u16, InFlight>,
}

/// A request on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// What the driver asked for.
    pub request: Request,
    /// Data bytes that are through.
    pub done: usize,
}

/// One disk.
#[derive(Debug)]
pub struct Block {
    engine: Engine,
    state: BlockState,
    config: [u8; 60],
    /// Bytes with the engine.
    ahead: usize,
    pieces: Pieces,
    /// Requests that the file failed; logged at each power of two.
    failures: u64,
    log: Logger,
}

impl Block {
    /// A disk on `backing`, which has `size` bytes; an incomplete last sector is left out. `serial` is cut after 20 bytes.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub fn new(backing: impl Backing, size: u64, serial: &str, read_only: bool, log: Logger) -> io::Result<Self> {
        let mut id = [0; SERIAL];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        // With a size of its own that is not reported, the guest would look for the partition table in the wrong place.
        let block_size = Some(backing.block_size()).filter(|size| size.is_power_of_two() && BLOCK_SIZES.contains(size));
        let block_size = block_size.unwrap_or(*BLOCK_SIZES.start());
        let state =
            BlockState { sectors: size / SECTOR, block_size, read_only, serial: id, in_flight: BTreeMap::new() };
        let config = config_space(&state);
        let engine = Engine::start(backing)?;
        Ok(Self { engine, state, config, ahead: 0, pieces: Pieces::default(), failures: 0, log })
    }

    /// What must survive a save.
    pub fn state(&self) -> &BlockState {
        &self.state
    }

    /// Takes over a saved state, before [`VirtioDevice::activate`].
    pub fn restore(&mut self, state: BlockState) {
        self.config = config_space(&state);
        self.state = state;
    }

    fn geometry(&self) -> Geometry {
        Geometry { sectors: self.state.sectors, read_only: self.state.read_only }
    }

    /// Begins one request of the driver.
    fn begin(&mut self, context: &mut Context, chain: &Chain) -> Result<Served, DeviceError> {
        if self.ahead >= MAX_AHEAD {
            return Ok(Served::Refused);
        }
        status_position(chain)?;
        let status = match Request::parse(chain, self.geometry()) {
            Ok(Request::GetId) => {
                chain.writable.write(0, &self.state.serial)?;
                VIRTIO_BLK_S_OK
            }
            Ok(Request::Flush) if self.state.read_only => VIRTIO_BLK_S_OK,
            Ok(request) => {
                if self.state.in_flight.insert(chain.head, InFlight { request, done: 0 }).is_some() {
                    return Err(DeviceError::Protocol("a block request was made available twice"));
                }
                self.submit(context.features, chain)?;
                return Ok(Served::Taken);
            }
            Err(Refusal::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Refusal::Invalid) => {
                *context.guest_faults += 1;
                VIRTIO_BLK_S_IOERR
            }
        };
        Ok(Served::Written(write_status(chain, status)?))
    }

    /// Hands the next piece of the request in `chain` to the engine.
    fn submit(&mut self, features: u64, chain: &Chain) -> Result<(), DeviceError> {
        let Some(InFlight { request, done }) = self.state.in_flight.get(&chain.head) else { return Ok(()) };
        let len = request.data_len().saturating_sub(*done).min(PIECE);
        let is_last = done + len >= request.data_len();
        // A driver that cannot flush takes what is completed for durable (5.2.6.2).
        let sync = features & 1 << VIRTIO_BLK_F_FLUSH == 0 && is_last;
        let work = match request {
            Request::Read { position, .. } => {
                Work::Read { position: position + *done as u64, piece: self.pieces.take(len) }
            }
            Request::Write { position, .. } => {
                let mut piece = self.pieces.take(len);
                chain.readable.read(HEADER + done, piece.bytes_mut())?;
                Work::Write { position: position + *done as u64, piece, sync }
            }
            Request::Discard(segments) => Work::Discard { segments: segments.clone(), sync },
            Request::WriteZeroes(segments) => Work::WriteZeroes { segments: segments.clone(), sync },
            Request::Flush | Request::GetId => Work::Flush,
        };
        self.ahead += len;
        self.engine.submit(chain.head, work);
        Ok(())
    }

    /// The engine has finished a piece: goes on with the next or completes the request.
    fn finish(&mut self, context: &mut Context, done: Done) -> Result<(), DeviceError> {
        let Some(in_flight) = self.state.in_flight.get_mut(&done.head) else { return Ok(()) };
        let Some(ring) = context.queues.get(REQUESTS) else { return Ok(()) };
        // The driver may have changed it since: all is checked again.
        let chain = ring.chain(context.memory, done.head)?;
        let result = match done.work {
            Work::Read { piece, .. } => {
                let len = piece.bytes().len();
                if done.result.is_ok() {
                    chain.writable.write(in_flight.done, piece.bytes())?;
                }
                self.pieces.give_back(piece);
                done.result.map(|()| len)
            }
            Work::Write { piece, .. } => {
                let len = piece.bytes().len();
                self.pieces.give_back(piece);
                done.result.map(|()| len)
            }
            Work::Discard { .. } | Work::WriteZeroes { .. } | Work::Flush => done.result.map(|()| 0),
        };
        self.ahead = self.ahead.saturating_sub(in_flight.request.data_len().saturating_sub(in_flight.done).min(PIECE));
        let status = match result {
            Ok(len) => {
                in_flight.done += len;
                if in_flight.done < in_flight.request.data_len() {
                    return self.submit(context.features, &chain);
                }
                VIRTIO_BLK_S_OK
            }
            Err(error) => {
                self.failures += 1;
                if self.failures.is_power_of_two() {
                    slog::warn!(self.log, "disk request failed"; "request" => in_flight.request.name(),
                        "serial" => serial_text(&self.state.serial), "failures" => self.failures, "error" => %error);
                }
                VIRTIO_BLK_S_IOERR
            }
        };
        self.state.in_flight.remove(&done.head);
        let written = write_status(&chain, status)?;
        Ok(context.complete(REQUESTS, done.head, written)?)
    }
}

/// Without the padding.
fn serial_text(serial: &[u8]) -> String {
    serial.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect()
}

/// The last writable byte. Without one there is no way to answer: the driver is broken.
fn status_position(chain: &Chain) -> Result<usize, DeviceError> {
    chain.writable.len().checked_sub(1).ok_or(DeviceError::Protocol("block request without a status byte"))
}

/// Gives the number of bytes that the driver may take for written: those from the first on (2.7.8.2), of which a failed
/// request promises none.
fn write_status(chain: &Chain, status: u32) -> Result<usize, DeviceError> {
    let position = status_position(chain)?;
    chain.writable.write(position, &[status as u8])?;
    Ok(if status == VIRTIO_BLK_S_OK || position == 0 { position + 1 } else { 0 })
}

impl VirtioDevice for Block {
    fn name(&self) -> &'static str {
        "block"
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let mut common = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH;
        if self.state.block_size != *BLOCK_SIZES.start() {
            common |= 1 << VIRTIO_BLK_F_BLK_SIZE;
        }
        if self.state.read_only {
            common | 1 << VIRTIO_BLK_F_RO
        } else {
            common | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        context
            .poll
            .add(self.engine.event(), 0, EventSet::IN)
            .map_err(|source| DeviceError::Host { what: "watching a disk's thread", source })?;
        // Only a restored state has any in flight.
        let heads: Vec<u16> = self.state.in_flight.keys().copied().collect();
        for head in heads {
            let Some(ring) = context.queues.get(REQUESTS) else { break };
            let chain = ring.chain(context.memory, head)?;
            self.submit(context.features, &chain)?;
        }
        Ok(())
    }

    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        super::serve(context, queue, TURN, |context, chain| self.begin(context, chain))?;
        Ok(())
    }

    fn descriptor_ready(&mut self, context: &mut Context, _: PollToken, _: EventSet) -> Result<(), DeviceError> {
        for done in self.engine.take_done() {
            self.finish(context, done)?;
        }
        // There is room again.
        self.queue_ready(context, REQUESTS)
    }

    fn reset(&mut self, poll: &mut dyn Poll) {
        poll.remove(self.engine.event());
        self.engine.cancel();
        self.state.in_flight.clear();
        self.ahead = 0;
    }
}

/// `struct virtio_blk_config` up to the write-zeroes fields.
fn config_space(state: &BlockState) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |offset: usize, value: &[u8]| {
        if let Some(field) = config.get_mut(offset..offset + value.len()) {
            field.copy_from_slice(value);
        }
    };
    put(0, &state.sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &state.block_size.to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &MAX_SEGMENTS.to_le_bytes());
    // discard_sector_alignment: one page of the file.
    put(44, &8u32.to_le_bytes());
    put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
    put(52, &MAX_SEGMENTS.to_le_bytes());
    put(56, &[1]);
    config
}

#[cfg(test)]
mod tests;
