//! Guest memory, and files mapped into it.
//!
//! RAM is one or two mappings (below and above the device gap) of anonymous memory or of the file that the parent
//! gave. A file such as the kernel is then mapped privately over a part of it: its pages stay shared with every other
//! machine through the page cache until this guest writes to them. KVM knows guest memory by its host address, so it neither
//! sees nor needs to see what is mapped there.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    MmapRegion, mmap::MmapRegionBuilder,
};

use crate::{
    layout::{MMIO_GAP_END, MMIO_GAP_START, PAGE_SIZE},
    virtio::GuestMemory,
};

const MIN_SIZE: u64 = 32 << 20;
const MAX_SIZE: u64 = 1 << 40;

/// Guest memory that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Out of bounds.
    #[error("guest memory of {0} bytes: use a multiple of 4096 from 32 MiB to 1 TiB")]
    Size(u64),
    /// The file is too short; a guest that touched its missing end would kill the monitor.
    #[error("guest memory file has {have} bytes, the machine needs {need}: extend it first")]
    FileTooShort {
        /// The file's size.
        have: u64,
        /// The configured size.
        need: u64,
    },
    /// mmap said no.
    #[error("cannot map {len} bytes of guest memory: {source}: is there a limit on address space or locked memory?")]
    Map {
        /// Bytes.
        len: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// A file cannot be laid there.
    #[error("{len} bytes at {address:#x} are not a range of whole pages in guest memory")]
    Range {
        /// Guest address.
        address: u64,
        /// Bytes.
        len: u64,
    },
}

/// What RAM is made of.
#[derive(Debug)]
pub struct Backing {
    /// A memfd or regular file; its size was asked when it came.
    pub file: File,
    /// That size, bytes.
    pub file_size: u64,
    /// Map it copy-on-write.
    pub private: bool,
}

/// Maps `size` bytes of RAM.
///
/// # Errors
/// See [`MemoryError`].
pub fn create(size: u64, backing: Option<Backing>) -> Result<GuestMemory, MemoryError> {
    if !size.is_multiple_of(PAGE_SIZE) || !(MIN_SIZE..=MAX_SIZE).contains(&size) {
        return Err(MemoryError::Size(size));
    }
    let (file, private) = match backing {
        Some(Backing { file_size, .. }) if file_size < size => {
            return Err(MemoryError::FileTooShort { have: file_size, need: size });
        }
        Some(backing) => (Some(std::sync::Arc::new(backing.file)), backing.private),
        None => (None, true),
    };
    let mut regions = Vec::with_capacity(2);
    for (start, offset, len) in regions_of(size) {
        let map = |error: io::Error| MemoryError::Map { len, source: error };
        let sharing = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let anonymous = if file.is_none() { libc::MAP_ANONYMOUS } else { 0 };
        // Sizes were checked against MAX_SIZE, so they fit into usize on a 64-bit host.
        let mut builder = MmapRegionBuilder::<()>::new(len as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | anonymous | libc::MAP_NORESERVE);
        if let Some(file) = &file {
            builder = builder.with_file_offset(FileOffset::from_arc(file.clone(), offset));
        }
        let region: MmapRegion = builder.build().map_err(|e| map(io::Error::other(e)))?;
        keep_out_of_dumps(&region).map_err(map)?;
        let region = GuestRegionMmap::new(region, start).ok_or(MemoryError::Range { address: start.0, len })?;
        regions.push(region);
    }
    GuestMemory::from_regions(regions).map_err(|e| MemoryError::Map { len: size, source: io::Error::other(e) })
}

/// Start, offset in the memory file, and length of each region of `size` bytes of RAM.
pub fn regions_of(size: u64) -> impl Iterator<Item = (GuestAddress, u64, u64)> {
    let low = size.min(MMIO_GAP_START.0);
    let high = (size > low).then_some((MMIO_GAP_END, low, size - low));
    [(GuestAddress(0), 0, low)].into_iter().chain(high)
}

/// Lays `len` bytes of `file` from `offset` on over guest memory at `address`, privately: the guest may write, the file never changes.
/// All three must be multiples of the page size. The caller has checked that the file is long enough; its last page may be
/// incomplete, the rest of that page reads as zeros.
///
/// # Errors
/// [`MemoryError::Range`] if this is not a range of whole pages in one region, or [`MemoryError::Map`].
pub fn map_file(
    memory: &GuestMemory,
    address: GuestAddress,
    len: u64,
    file: BorrowedFd,
    offset: u64,
) -> Result<(), MemoryError> {
    let range = || MemoryError::Range { address: address.0, len };
    if [address.0, len, offset].iter().any(|n| !n.is_multiple_of(PAGE_SIZE)) || len == 0 {
        return Err(range());
    }
    let region = memory.find_region(address).ok_or_else(range)?;
    let start = address.unchecked_offset_from(region.start_addr());
    if start.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(range());
    }
    let host = region.get_host_address(MemoryRegionAddress(start)).map_err(|_| range())?;
    let offset = libc::off64_t::try_from(offset).map_err(|_| range())?;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range lies in the region's own mapping (checked above), which this call replaces in part. Nobody
    // holds a Rust reference into guest memory, only volatile access goes there; and the region unmaps the whole range
    // at its end, whatever it consists of.
    let mapped = unsafe {
        libc::mmap64(host.cast(), len as usize, libc::PROT_READ | libc::PROT_WRITE, flags, file.as_raw_fd(), offset)
    };
    if mapped == libc::MAP_FAILED {
        return Err(MemoryError::Map { len, source: io::Error::last_os_error() });
    }
    // SAFETY: the range that was mapped just now; the advice changes no byte of it.
    let advised = unsafe { libc::madvise(mapped, len as usize, libc::MADV_DONTDUMP) };
    if advised == 0 { Ok(()) } else { Err(MemoryError::Map { len, source: io::Error::last_os_error() }) }
}

/// A core file of the monitor holds nothing of the guest's.
fn keep_out_of_dumps(region: &MmapRegion) -> io::Result<()> {
    // SAFETY: the region's own mapping; the advice changes no byte of it.
    let advised = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP) };
    if advised == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for size in [0, 4096, MIN_SIZE - 4096, MIN_SIZE + 1, MAX_SIZE + 4096, u64::MAX] {
            assert!(matches!(create(size, None), Err(MemoryError::Size(_))), "{size}");
        }
    }

    #[test]
    fn memory_beyond_the_gap_moves_above_it() {
        let memory = create(5 << 30, None).unwrap();
        let regions: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(regions, [(0, 3 << 30), (4 << 30, 2 << 30)]);
        memory.write_obj(7u8, GuestAddress((6 << 30) - 1)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn a_short_memory_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIN_SIZE - 1).unwrap();
        let backing = Backing { file, file_size: MIN_SIZE - 1, private: false };
        assert!(matches!(create(MIN_SIZE, Some(backing)), Err(MemoryError::FileTooShort { .. })));
    }

    #[test]
    fn a_private_file_never_changes() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"template").unwrap();
        file.set_len(MIN_SIZE).unwrap();
        let backing = Backing { file: file.try_clone().unwrap(), file_size: MIN_SIZE, private: true };
        let memory = create(MIN_SIZE, Some(backing)).unwrap();
        memory.write_slice(b"changed!", GuestAddress(0)).unwrap();
        let mut content = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).unwrap();
        assert_eq!(&content, b"template");
    }

    #[test]
    fn a_mapped_file_is_read_and_its_rest_is_zero() {
        let memory = create(MIN_SIZE, None).unwrap();
        memory.write_slice(&[0xff; 8192], GuestAddress(0x10_0000)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4099]).unwrap();
        map_file(&memory, GuestAddress(0x10_0000), 8192, file.as_fd(), 0).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_0000 + 4098)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_0000 + 4099)).unwrap(), 0);
        memory.write_obj(1u8, GuestAddress(0x10_0000)).unwrap();
    }

    #[test]
    fn no_byte_of_the_guest_is_in_a_core_file() {
        let memory = create(MIN_SIZE, None).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        map_file(&memory, GuestAddress(0x10_0000), 8192, file.as_fd(), 0).unwrap();
        let start = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut inside, mut found) = (false, 0);
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            if let Some((from, _)) = range {
                let from = u64::from_str_radix(from, 16).unwrap();
                inside = (start..start + MIN_SIZE).contains(&from);
            } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
                found += 1;
                assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
            }
        }
        assert!(found >= 3, "before the file, the file, after it: {found}");
    }

    #[test]
    fn a_file_is_never_mapped_outside_memory() {
        let memory = create(MIN_SIZE, None).unwrap();
        let file = tempfile::tempfile().unwrap();
        for (address, len) in
            [(MIN_SIZE, 4096), (MIN_SIZE - 4096, 8192), (1, 4096), (0, 1), (0, 0), (4096, u64::MAX - 4095)]
        {
            let result = map_file(&memory, GuestAddress(address), len, file.as_fd(), 0);
            assert!(matches!(result, Err(MemoryError::Range { .. })), "{address:#x} {len}");
        }
    }
}
