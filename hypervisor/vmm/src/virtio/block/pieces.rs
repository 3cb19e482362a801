//! Buffers between guest memory and the disk's thread, which never touches guest memory itself.

/// The most data of one request that is with the thread at a time, bytes; a larger request goes piece by piece.
pub const PIECE: usize = 512 << 10;

/// Allocations above this size are kept for the next request: making them costs more than copying what goes in.
const KEPT_FROM: usize = 64 << 10;
/// How many are kept.
const KEPT: usize = 2;

/// Some bytes in a buffer that may be longer.
#[derive(Debug)]
pub struct Piece {
    buffer: Vec<u8>,
    len: usize,
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or_default()
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.get_mut(..self.len).unwrap_or_default()
    }
}

/// Makes pieces and takes them back.
#[derive(Debug, Default)]
pub struct Pieces(Vec<Vec<u8>>);

impl Pieces {
    /// A piece of `len` bytes, whose content is of no meaning.
    pub fn take(&mut self, len: usize) -> Piece {
        let mut buffer = if len > KEPT_FROM { self.0.pop().unwrap_or_default() } else { Vec::new() };
        if buffer.len() < len {
            // Zeros from the system, instead of a copy of what is not needed.
            buffer = vec![0; len];
        }
        Piece { buffer, len }
    }

    /// A piece is not needed any more.
    pub fn give_back(&mut self, piece: Piece) {
        if piece.buffer.len() > KEPT_FROM && self.0.len() < KEPT {
            self.0.push(piece.buffer);
        }
    }
}
