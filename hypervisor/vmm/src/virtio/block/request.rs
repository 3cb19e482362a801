//! What a driver can ask of a block device, parsed and checked before anything is done (virtio 1.2, section 5.2.6).
//!
//! ```text
//!   readable: type u32 | reserved u32 | sector u64 | data of a write, or segments of a discard
//!   writable: data of a read, or the serial number | status u8
//! ```
//!
//! Every rule about lengths and capacity is here, so that the device behind it can do what a [`Request`] says without
//! thinking. Nothing here touches the disk.

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
/// The most data that one read or write may carry. Linux asks for 1.25 MiB unless told otherwise; the bound keeps a
/// request from holding the device thread for long.
pub const MAX_DATA: usize = 64 << 20;
/// The most segments in a discard or write-zeroes request.
pub const MAX_SEGMENTS: u32 = 16;
/// The most sectors in a segment of a discard: 2 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The most sectors in a segment of write-zeroes: 8 MiB, which may really have to be written.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 14;

/// A checked request. Byte positions and lengths lie within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Tell the serial number.
    GetId,
    /// Forget ranges, which are the request's segments.
    Discard,
    /// Make ranges read as zeros, likewise.
    WriteZeroes,
}

/// Why a request is refused. The driver sees the status only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// VIRTIO_BLK_S_IOERR: malformed or out of range.
    Invalid,
    /// VIRTIO_BLK_S_IOERR: the file could not do it.
    Host,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// What the driver is to be told.
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
            VIRTIO_BLK_T_GET_ID if outgoing == 0 && incoming >= SERIAL => Ok(Self::GetId),
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                disk.writable()?;
                let whole = incoming == 0 && outgoing != 0 && outgoing.is_multiple_of(SEGMENT);
                if !whole || outgoing / SEGMENT > MAX_SEGMENTS as usize {
                    return Err(Refusal::Invalid);
                }
                Ok(if kind == VIRTIO_BLK_T_DISCARD { Self::Discard } else { Self::WriteZeroes })
            }
            VIRTIO_BLK_T_FLUSH | VIRTIO_BLK_T_GET_ID => Err(Refusal::Invalid),
            _ => Err(Refusal::Unsupported),
        }
    }

    /// The segment number `index` of a discard or write-zeroes request; `None` after the last. Read once and checked
    /// after reading: the driver may change it under our eyes.
    ///
    /// # Errors
    /// What the driver is to be told.
    pub fn segment(self, readable: &Buffers, index: usize, disk: Geometry) -> Result<Option<Segment>, Refusal> {
        let at = HEADER + index * SEGMENT;
        if at >= readable.len() {
            return Ok(None);
        }
        let mut raw = [0; SEGMENT];
        readable.read(at, &mut raw).map_err(|_| Refusal::Invalid)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = raw;
        let sectors = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes(flags);
        let (limit, allowed) = match self {
            Self::WriteZeroes => (MAX_ZEROES_SECTORS, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
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
        Ok(Some(Segment { position, len, unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 }))
    }
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
