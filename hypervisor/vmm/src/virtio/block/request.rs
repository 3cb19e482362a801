//! What a driver can ask of a block device, parsed and checked before anything is done (virtio 1.2, section 5.2.6).
//!
//! ```text
//!   readable: type u32 | reserved u32 | sector u64 | data of a write, or segments of a discard
//!   writable: data of a read, or the serial number | status u8
//! ```
//!
//! Every rule about lengths and capacity is here, so that the device behind it can do what a [`Request`] says without
//! further checks. Nothing here touches the disk.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::virtio::{Buffers, Chain};

/// Bytes in a sector, always.
pub const SECTOR: u64 = 512;
/// Length of the request header.
pub const HEADER: usize = 16;
/// Length of one discard or write-zeroes segment.
const SEGMENT: usize = 16;
/// Bytes of a serial number.
pub const SERIAL: usize = 20;
/// The most data that one read or write may carry. Linux asks for 1.25 MiB unless it is configured otherwise.
pub const MAX_DATA: usize = 64 << 20;
/// The most segments in a discard or write-zeroes request.
pub const MAX_SEGMENTS: u32 = 16;
/// The most sectors in a segment of a discard: 2 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The most sectors in a segment of write-zeroes: 8 MiB, which may really have to be written.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 14;

/// A checked request. Byte positions and lengths lie within the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Fill the first `len` writable bytes from the disk.
    Read {
        /// Byte on the disk.
        position: u64,
        /// Bytes, a multiple of the sector.
        len: usize,
    },
    /// Write `len` readable bytes after the header to the disk.
    Write {
        /// Byte on the disk.
        position: u64,
        /// Bytes, a multiple of the sector.
        len: usize,
    },
    /// Make everything written so far durable.
    Flush,
    /// Report the serial number.
    GetId,
    /// Give the blocks of these ranges back.
    Discard(Vec<Segment>),
    /// Make these ranges read as zeros.
    WriteZeroes(Vec<Segment>),
}

/// Why a request is refused. The driver sees the status only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// VIRTIO_BLK_S_IOERR: malformed or out of range.
    Invalid,
    /// VIRTIO_BLK_S_UNSUPP: a type that this device does not know, or was not offered.
    Unsupported,
}

/// What a disk can do.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Size in sectors.
    pub sectors: u64,
    /// Writes of all kinds are refused.
    pub read_only: bool,
}

/// One range of a discard or write-zeroes request, within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Byte on the disk.
    pub position: u64,
    /// Bytes.
    pub len: u64,
    /// The range need not stay allocated.
    pub unmap: bool,
}

impl Request {
    /// Reads and checks a request. The chain must have a status byte; its position is the last writable byte.
    ///
    /// # Errors
    /// The status for the driver.
    pub fn parse(chain: &Chain, disk: Geometry) -> Result<Self, Refusal> {
        let mut header = [0; HEADER];
        chain.readable.read(0, &mut header).map_err(|_| Refusal::Invalid)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let outgoing = chain.readable.len().saturating_sub(HEADER);
        let incoming = chain.writable.len().checked_sub(1).ok_or(Refusal::Invalid)?;
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                Ok(Self::Read { position: disk.data_position(sector, incoming, outgoing)?, len: incoming })
            }
            VIRTIO_BLK_T_OUT => {
                disk.writable()?;
                Ok(Self::Write { position: disk.data_position(sector, outgoing, incoming)?, len: outgoing })
            }
            VIRTIO_BLK_T_FLUSH if outgoing == 0 && incoming == 0 => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID if outgoing == 0 && incoming == SERIAL => Ok(Self::GetId),
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                disk.writable()?;
                let whole = incoming == 0 && outgoing != 0 && outgoing.is_multiple_of(SEGMENT);
                if !whole || outgoing / SEGMENT > MAX_SEGMENTS as usize {
                    return Err(Refusal::Invalid);
                }
                let segments = (0..outgoing / SEGMENT)
                    .map(|index| segment(&chain.readable, index, kind, disk))
                    .collect::<Result<_, _>>()?;
                Ok(if kind == VIRTIO_BLK_T_DISCARD { Self::Discard(segments) } else { Self::WriteZeroes(segments) })
            }
            VIRTIO_BLK_T_FLUSH | VIRTIO_BLK_T_GET_ID => Err(Refusal::Invalid),
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Bytes between guest memory and the disk.
    pub fn data_len(&self) -> usize {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => *len,
            _ => 0,
        }
    }

    /// What it is called in the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::GetId => "get-id",
            Self::Discard(_) => "discard",
            Self::WriteZeroes(_) => "write-zeroes",
        }
    }
}

/// The segment number `index` of a discard or write-zeroes request. Read once and checked after reading: the driver may
/// change it meanwhile.
fn segment(readable: &Buffers, index: usize, kind: u32, disk: Geometry) -> Result<Segment, Refusal> {
    let mut raw = [0; SEGMENT];
    readable.read(HEADER + index * SEGMENT, &mut raw).map_err(|_| Refusal::Invalid)?;
    let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = raw;
    let sectors = u32::from_le_bytes([c0, c1, c2, c3]);
    let flags = u32::from_le_bytes(flags);
    let (limit, allowed) = match kind {
        VIRTIO_BLK_T_WRITE_ZEROES => (MAX_ZEROES_SECTORS, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
        _ => (MAX_DISCARD_SECTORS, 0),
    };
    // Unknown flags: 5.2.6.2 wants UNSUPP.
    if flags & !allowed != 0 {
        return Err(Refusal::Unsupported);
    }
    if sectors > limit {
        return Err(Refusal::Invalid);
    }
    let len = u64::from(sectors) * SECTOR;
    let position = disk.position(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]), len)?;
    Ok(Segment { position, len, unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 })
}

impl Geometry {
    fn writable(self) -> Result<(), Refusal> {
        if self.read_only { Err(Refusal::Invalid) } else { Ok(()) }
    }

    /// The byte at which `len` bytes from `sector` on begin, if all of them are on the disk.
    fn position(self, sector: u64, len: u64) -> Result<u64, Refusal> {
        let size = self.sectors.checked_mul(SECTOR).ok_or(Refusal::Invalid)?;
        let position = sector.checked_mul(SECTOR).ok_or(Refusal::Invalid)?;
        match position.checked_add(len) {
            Some(end) if end <= size => Ok(position),
            _ => Err(Refusal::Invalid),
        }
    }

    fn data_position(self, sector: u64, len: usize, other_direction: usize) -> Result<u64, Refusal> {
        if other_direction != 0 || !len.is_multiple_of(SECTOR as usize) || len > MAX_DATA {
            return Err(Refusal::Invalid);
        }
        self.position(sector, len as u64)
    }
}
