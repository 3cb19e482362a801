//! The block device (virtio 1.2, section 5.2) on a raw file. The file's content is never looked at: whatever a guest
//! writes into its first sectors, it stays a raw disk.
//!
//! Requests are served one after the other on the device thread, straight between guest memory and the file.

mod request;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use event_manager::EventSet;
use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use serde::{Deserialize, Serialize};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
        VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
};

use self::request::{
    Geometry, MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_ZEROES_SECTORS, Refusal, Request, SECTOR, SERIAL, Segment,
};
use super::{Chain, Context, DeviceError, Poll, PollToken, VirtioDevice, read_config_bytes};

const QUEUE_SIZES: [u16; 1] = [128];
/// Data descriptors in a request: the queue without header and status.
const SEG_MAX: u32 = 126;
/// Requests served before others on the device thread have their turn.
const MAX_REQUESTS: usize = 32;
/// Zeros are written in pieces of this size where the file cannot make them itself.
const ZEROES: usize = 64 << 10;

/// All of a disk that must survive a save, apart from its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in sectors, fixed when the machine was built.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// What the driver reads as serial number, padded with zeros.
    pub serial: [u8; SERIAL],
}

/// One disk.
#[derive(Debug)]
pub struct Block {
    file: OwnedFd,
    state: BlockState,
    config: [u8; 60],
}

impl Block {
    /// A disk on `file`, which has `size` bytes; an incomplete last sector is left out. `serial` is cut after 20 bytes.
    pub fn new(file: OwnedFd, size: u64, serial: &str, read_only: bool) -> Self {
        let mut id = [0; SERIAL];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let state = BlockState { sectors: size / SECTOR, read_only, serial: id };
        let config = config_space(&state);
        Self { file, state, config }
    }

    fn geometry(&self) -> Geometry {
        Geometry { sectors: self.state.sectors, read_only: self.state.read_only }
    }

    /// Serves one request and writes its status; gives the number of bytes written.
    fn serve(&self, chain: &Chain, faults: &mut u64) -> Result<usize, DeviceError> {
        // Without a status byte there is no way to answer: the driver is broken.
        let status_at =
            chain.writable.len().checked_sub(1).ok_or(DeviceError::Protocol("block request without a status byte"))?;
        let status = match Request::parse(chain, self.geometry()).and_then(|request| self.perform(request, chain)) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Refusal::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Refusal::Host) => VIRTIO_BLK_S_IOERR,
            Err(Refusal::Invalid) => {
                *faults += 1;
                VIRTIO_BLK_S_IOERR
            }
        };
        chain.writable.write(status_at, &[status as u8])?;
        // The driver finds the status at the end of what it offered, whatever lies before it.
        Ok(status_at + 1)
    }

    fn perform(&self, request: Request, chain: &Chain) -> Result<(), Refusal> {
        let file = self.file.as_fd();
        match request {
            Request::Read { position, len } => {
                transfer(position, len, |at, done, rest| chain.writable.read_from(file, Some(at), done, rest))
                    .map_err(|_| Refusal::Host)
            }
            Request::Write { position, len } => transfer(position, len, |at, done, rest| {
                chain.readable.write_to(file, Some(at), request::HEADER + done, rest)
            })
            .map_err(|_| Refusal::Host),
            Request::Flush if self.state.read_only => Ok(()),
            Request::Flush => fdatasync(file).map_err(|_| Refusal::Host),
            Request::GetId => chain.writable.write(0, &self.state.serial).map_err(|_| Refusal::Invalid),
            Request::Discard | Request::WriteZeroes => {
                let mut index = 0;
                while let Some(segment) = request.segment(&chain.readable, index, self.geometry())? {
                    let done = match request {
                        Request::Discard => self.discard(segment),
                        _ => self.write_zeroes(segment),
                    };
                    done.map_err(|_| Refusal::Host)?;
                    index += 1;
                }
                Ok(())
            }
        }
    }

    fn discard(&self, segment: Segment) -> io::Result<()> {
        match self.fallocate(FallocateFlags::PUNCH_HOLE, segment) {
            // A discard is advice: a file that cannot forget keeps its bytes.
            Err(error) if unsupported(&error) => Ok(()),
            done => done,
        }
    }

    fn write_zeroes(&self, segment: Segment) -> io::Result<()> {
        let way = if segment.unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.fallocate(way, segment) {
            Err(error) if unsupported(&error) => {
                let zeroes = vec![0; ZEROES];
                // Bounded by MAX_ZEROES_SECTORS, so it fits into usize.
                transfer(segment.position, segment.len as usize, |at, _, rest| {
                    let piece = zeroes.get(..rest.min(ZEROES)).unwrap_or(&zeroes);
                    Ok(rustix::io::pwrite(&self.file, piece, at)?)
                })
            }
            done => done,
        }
    }

    fn fallocate(&self, way: FallocateFlags, segment: Segment) -> io::Result<()> {
        if segment.len == 0 {
            return Ok(());
        }
        Ok(fallocate(&self.file, way | FallocateFlags::KEEP_SIZE, segment.position, segment.len)?)
    }
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
        let common = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH;
        if self.state.read_only {
            common | 1 << VIRTIO_BLK_F_RO
        } else {
            common | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, _context: &mut Context) -> Result<(), DeviceError> {
        Ok(())
    }

    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        super::serve(context, queue, MAX_REQUESTS, |context, chain| self.serve(chain, context.guest_faults))
    }

    fn descriptor_ready(&mut self, _: &mut Context, _: PollToken, _: EventSet) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self, _poll: &mut dyn Poll) {}
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
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &MAX_SEGMENTS.to_le_bytes());
    // discard_sector_alignment: one page of the file.
    put(44, &8u32.to_le_bytes());
    put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
    put(52, &MAX_SEGMENTS.to_le_bytes());
    put(56, &[1]);
    config
}

/// Repeats a read or write that may move less than asked until `len` bytes are through.
/// `step` gets the position in the file, the bytes done and the bytes left.
fn transfer(position: u64, len: usize, mut step: impl FnMut(u64, usize, usize) -> io::Result<usize>) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match step(position + done as u64, done, len - done) {
            // The file became shorter than it was.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

#[cfg(test)]
mod tests;
