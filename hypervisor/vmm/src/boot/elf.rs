//! An ELF vmlinux as a plan: which bytes of the file belong at which guest address. Pure; the file's bytes are not
//! trusted, and every address and length is checked here against the file and the guest's memory.
//!
//! ```text
//!   file      …│head│ whole pages            │tail│…        where offset ≡ address modulo the page size:
//!                │          │                   │            whole pages are mapped, only the odd bytes
//!   guest     …│head│ mapped, private        │tail│ bss│     of the first and last page are copied
//! ```

use crate::layout::{HIGH_MEMORY, IDENTITY_MAP_END, PAGE_SIZE};

/// Bytes of the ELF header.
pub const HEADER_SIZE: usize = 64;
/// Bytes of one program header.
pub const PROGRAM_HEADER_SIZE: usize = 56;
/// More than any kernel has (Linux has 5).
const MAX_PROGRAM_HEADERS: u16 = 64;

const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const PT_LOAD: u32 = 1;

/// A kernel that cannot be booted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ElfError {
    /// Not even a header.
    #[error("kernel file of {0} bytes is too short for an ELF header: is it truncated?")]
    NoHeader(u64),
    /// Another format.
    #[error("kernel is not an ELF file but {0}: an uncompressed vmlinux is needed")]
    NotElf(&'static str),
    /// ELF, but not for this machine.
    #[error("kernel is not a 64-bit little-endian x86-64 executable: an uncompressed vmlinux is needed")]
    NotX86,
    /// Program headers of another size, none, or too many.
    #[error("kernel has {count} program headers of {size} bytes: not a vmlinux")]
    ProgramHeaders {
        /// Their number.
        count: u16,
        /// The size of each.
        size: u16,
    },
    /// The file ends too early.
    #[error("kernel file has {have} bytes but its headers promise {need}: it is truncated")]
    Truncated {
        /// Size of the file.
        have: u64,
        /// What the headers say.
        need: u64,
    },
    /// More in the file than in memory, or addresses that wrap around.
    #[error("kernel segment {0} is malformed: its sizes contradict each other")]
    Segment(usize),
    /// It would overlap what the boot protocol needs, or not fit.
    #[error(
        "kernel segment at {start:#x}..{end:#x} does not fit between {:#x} and {limit:#x}: give the machine more memory",
        HIGH_MEMORY.0
    )]
    Place {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
        /// End of the place.
        limit: u64,
    },
    /// Two segments claim the same memory.
    #[error("kernel segments overlap at {0:#x}")]
    Overlap(u64),
    /// The entry point is not in a segment.
    #[error("kernel entry point {0:#x} lies outside its segments")]
    Entry(u64),
}

/// One loadable segment; all of it in bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub address: u64,
    /// Bytes in memory; those beyond `file_size` are zero.
    pub memory_size: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub file_size: u64,
}

/// A kernel that fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Guest address of the first instruction.
    pub entry: u64,
    /// Sorted by address.
    pub segments: Vec<Segment>,
}

/// Where the program headers are.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    entry: u64,
    /// Offset in the file.
    pub program_headers: u64,
    /// Bytes of all of them.
    pub program_headers_len: usize,
}

/// Bytes of the file that belong at a guest address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Guest address.
    pub address: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// How a segment gets into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// Odd bytes at the beginning, copied.
    pub head: Option<Piece>,
    /// Whole pages, mapped.
    pub mapped: Option<Piece>,
    /// Odd bytes at the end, copied.
    pub tail: Option<Piece>,
}

impl Header {
    /// Checks the file's first bytes.
    ///
    /// # Errors
    /// See [`ElfError`].
    pub fn parse(header: &[u8; HEADER_SIZE], file_size: u64) -> Result<Self, ElfError> {
        let magic = header.get(..4).unwrap_or_default();
        if magic != b"\x7fELF" {
            return Err(ElfError::NotElf(format_of(header)));
        }
        // Class 64-bit, little endian.
        if header.get(4..6) != Some(&[2, 1])
            || u16_at(header, 18) != MACHINE_X86_64
            || u16_at(header, 16) != TYPE_EXECUTABLE
        {
            return Err(ElfError::NotX86);
        }
        let (size, count) = (u16_at(header, 54), u16_at(header, 56));
        if usize::from(size) != PROGRAM_HEADER_SIZE || count == 0 || count > MAX_PROGRAM_HEADERS {
            return Err(ElfError::ProgramHeaders { count, size });
        }
        let program_headers = u64_at(header, 32);
        let program_headers_len = PROGRAM_HEADER_SIZE * usize::from(count);
        let need = program_headers.saturating_add(program_headers_len as u64);
        if need > file_size {
            return Err(ElfError::Truncated { have: file_size, need });
        }
        Ok(Self { entry: u64_at(header, 24), program_headers, program_headers_len })
    }

    /// Checks the program headers against the file and against RAM below `memory_end`.
    ///
    /// # Errors
    /// See [`ElfError`].
    pub fn plan(self, program_headers: &[u8], file_size: u64, memory_end: u64) -> Result<Kernel, ElfError> {
        let limit = memory_end.min(IDENTITY_MAP_END.0);
        let mut segments = Vec::new();
        for (index, header) in program_headers.chunks_exact(PROGRAM_HEADER_SIZE).enumerate() {
            let segment = Segment {
                address: u64_at(header, 24),
                memory_size: u64_at(header, 40),
                offset: u64_at(header, 8),
                file_size: u64_at(header, 32),
            };
            if u32_at(header, 0) != PT_LOAD || segment.memory_size == 0 {
                continue;
            }
            if segment.file_size > segment.memory_size {
                return Err(ElfError::Segment(index));
            }
            let need = segment.offset.checked_add(segment.file_size).ok_or(ElfError::Segment(index))?;
            if need > file_size {
                return Err(ElfError::Truncated { have: file_size, need });
            }
            let end = segment.address.checked_add(segment.memory_size).ok_or(ElfError::Segment(index))?;
            if segment.address < HIGH_MEMORY.0 || end > limit {
                return Err(ElfError::Place { start: segment.address, end, limit });
            }
            segments.push(segment);
        }
        segments.sort_by_key(|segment| segment.address);
        if let Some(overlap) = segments.windows(2).find_map(|pair| match pair {
            [a, b] if a.end() > b.address => Some(b.address),
            _ => None,
        }) {
            return Err(ElfError::Overlap(overlap));
        }
        if !segments.iter().any(|segment| (segment.address..segment.end()).contains(&self.entry)) {
            return Err(ElfError::Entry(self.entry));
        }
        Ok(Kernel { entry: self.entry, segments })
    }
}

impl Kernel {
    /// First address after the kernel.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.end())
    }
}

impl Segment {
    /// First address after the segment. Does not overflow: [`Header::plan`] has checked it.
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.memory_size)
    }

    /// Splits the segment's bytes in the file into what is mapped and what must be copied.
    pub fn pieces(&self) -> Pieces {
        let (start, end) = (self.address, self.address + self.file_size);
        let first_page = start.next_multiple_of(PAGE_SIZE);
        let last_page = end - end % PAGE_SIZE;
        let piece = |from: u64, to: u64| {
            (from < to).then(|| Piece { address: from, offset: self.offset + (from - start), len: to - from })
        };
        if self.offset % PAGE_SIZE != start % PAGE_SIZE || first_page >= last_page {
            return Pieces { head: piece(start, end), mapped: None, tail: None };
        }
        Pieces { head: piece(start, first_page), mapped: piece(first_page, last_page), tail: piece(last_page, end) }
    }
}

fn format_of(header: &[u8]) -> &'static str {
    match header {
        [b'M', b'Z', ..] => "a compressed bzImage",
        [0x1f, 0x8b, ..] => "gzip",
        [0xfd, b'7', b'z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        _ => "something else",
    }
}

/// Little-endian numbers; what lies beyond the end reads as 0 (the callers' sizes are fixed).
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: u64 = 1 << 24;
    const MEMORY: u64 = 1 << 26;

    fn program_header(segment: Segment) -> Vec<u8> {
        let mut bytes = vec![0; PROGRAM_HEADER_SIZE];
        bytes[0] = 1;
        bytes[8..16].copy_from_slice(&segment.offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&segment.address.to_le_bytes());
        bytes[32..40].copy_from_slice(&segment.file_size.to_le_bytes());
        bytes[40..48].copy_from_slice(&segment.memory_size.to_le_bytes());
        bytes
    }

    fn header(entry: u64) -> Header {
        Header { entry, program_headers: 64, program_headers_len: 0 }
    }

    const GOOD: Segment = Segment { address: 0x10_0000, memory_size: 0x3000, offset: 0x1000, file_size: 0x2001 };

    fn plan(segments: &[Segment]) -> Result<Kernel, ElfError> {
        let bytes: Vec<u8> = segments.iter().flat_map(|segment| program_header(*segment)).collect();
        header(0x10_0000).plan(&bytes, FILE, MEMORY)
    }

    #[test]
    fn a_good_kernel_is_mapped_but_for_its_tail() {
        let kernel = plan(&[GOOD]).unwrap();
        assert_eq!(kernel.end(), 0x10_3000);
        let pieces = kernel.segments[0].pieces();
        assert_eq!(pieces.head, None);
        assert_eq!(pieces.mapped, Some(Piece { address: 0x10_0000, offset: 0x1000, len: 0x2000 }));
        assert_eq!(pieces.tail, Some(Piece { address: 0x10_2000, offset: 0x3000, len: 1 }));
    }

    #[test]
    fn a_segment_that_is_not_page_congruent_is_copied() {
        let pieces = Segment { offset: 0x1008, ..GOOD }.pieces();
        assert_eq!(pieces.head, Some(Piece { address: 0x10_0000, offset: 0x1008, len: 0x2001 }));
        assert_eq!((pieces.mapped, pieces.tail), (None, None));
    }

    #[test]
    fn each_fault_has_its_own_error() {
        let with = |change: fn(&mut Segment)| {
            let mut segment = GOOD;
            change(&mut segment);
            plan(&[segment]).unwrap_err()
        };
        assert!(matches!(with(|s| s.offset = FILE - 1), ElfError::Truncated { .. }));
        assert!(matches!(with(|s| s.offset = u64::MAX), ElfError::Segment(0)));
        assert!(matches!(with(|s| s.file_size = s.memory_size + 1), ElfError::Segment(0)));
        assert!(matches!(with(|s| s.address = 0x1000), ElfError::Place { .. }));
        assert!(matches!(with(|s| s.address = MEMORY - 0x1000), ElfError::Place { .. }));
        assert!(matches!(with(|s| s.address = u64::MAX), ElfError::Segment(0)));
        assert!(matches!(with(|s| s.address = 0x20_0000), ElfError::Entry(0x10_0000)));
        assert!(matches!(plan(&[GOOD, GOOD]), Err(ElfError::Overlap(0x10_0000))));
        assert!(matches!(plan(&[]), Err(ElfError::Entry(_))));
    }

    #[test]
    fn other_formats_are_named() {
        let mut bytes = [0; HEADER_SIZE];
        bytes[..2].copy_from_slice(b"MZ");
        assert_eq!(Header::parse(&bytes, 64).unwrap_err(), ElfError::NotElf("a compressed bzImage"));
    }

    proptest! {
        #[test]
        fn whatever_a_plan_accepts_is_in_bounds_and_complete(
            address in 0..MEMORY * 2, memory_size in 0..MEMORY, offset in 0..FILE * 2, file_size in 0..FILE * 2,
        ) {
            let segment = Segment { address, memory_size, offset, file_size };
            let Ok(kernel) = header(address).plan(&program_header(segment), FILE, MEMORY) else { return Ok(()) };
            prop_assert!(kernel.end() <= MEMORY);
            let Pieces { head, mapped, tail } = segment.pieces();
            let (mut at, mut from) = (address, offset);
            for piece in [head, mapped, tail].into_iter().flatten() {
                prop_assert_eq!((piece.address, piece.offset), (at, from));
                at += piece.len;
                from += piece.len;
            }
            prop_assert_eq!(at, address + file_size);
            prop_assert!(from <= FILE);
            if let Some(mapped) = mapped {
                prop_assert_eq!((mapped.address % 4096, mapped.offset % 4096, mapped.len % 4096), (0, 0, 0));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            start in proptest::array::uniform32(any::<u8>()), rest in proptest::collection::vec(any::<u8>(), 0..400), size in any::<u64>(),
        ) {
            let mut bytes = [0; HEADER_SIZE];
            bytes[..32].copy_from_slice(&start);
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            bytes[16] = 2;
            bytes[18] = 62;
            bytes[54] = 56;
            bytes[56] = 3;
            let _ = Header::parse(&bytes, size).map(|header| header.plan(&rest, size, size));
        }
    }
}
