//! What Linux's 64-bit boot protocol wants to find in memory (Documentation/x86/boot.rst): the zero page with the memory map,
//! a GDT with the two boot segments, and page tables that map the first GiB one to one.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::{
    layout::{BASE_MEMORY_END, COMMAND_LINE, GDT, HIGH_MEMORY, MP_TABLE, PAGE_SIZE, PAGE_TABLES, ZERO_PAGE},
    virtio::GuestMemory,
};

/// Selector of the code segment (__BOOT_CS).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segment (__BOOT_DS).
pub const DATA_SELECTOR: u16 = 0x18;
/// The GDT: two empty entries, flat 64-bit code, flat data.
pub const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Offsets in `struct boot_params` (arch/x86/include/uapi/asm/bootparam.h).
mod offset {
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const HEADER: usize = 0x202;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const E820_TABLE: usize = 0x2d0;
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ENTRY: usize = 20;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Page table bits: present, writable.
const TABLE: u64 = 0b11;
/// Present, writable, 2 MiB page.
const LARGE_PAGE: u64 = 0b1000_0011;

/// An initramfs in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Guest address, below 4 GiB.
    pub address: u32,
    /// Bytes.
    pub size: u32,
}

/// Writes everything.
///
/// # Errors
/// If memory is too small for it; no memory that [`crate::memory::create`] makes is.
pub fn write(
    memory: &GuestMemory,
    command_line_len: usize,
    initramfs: Option<Initramfs>,
) -> Result<(), GuestMemoryError> {
    memory.write_slice(&zero_page(&memory_map(memory), command_line_len, initramfs), ZERO_PAGE)?;
    memory.write_slice(&words(&GDT_ENTRIES), GDT)?;
    let tables = PAGE_TABLES.0;
    memory.write_obj((tables + PAGE_SIZE) | TABLE, PAGE_TABLES)?;
    memory.write_obj((tables + 2 * PAGE_SIZE) | TABLE, GuestAddress(tables + PAGE_SIZE))?;
    let directory: Vec<u64> = (0..512).map(|n| n << 21 | LARGE_PAGE).collect();
    memory.write_slice(&words(&directory), GuestAddress(tables + 2 * PAGE_SIZE))
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Start, length and type of each range.
fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, MP_TABLE.0, E820_RAM), (MP_TABLE.0, BASE_MEMORY_END.0 - MP_TABLE.0, E820_RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_MEMORY.0);
        map.push((start, region.start_addr().0 + region.len() - start, E820_RAM));
    }
    map
}

fn zero_page(map: &[(u64, u64, u32)], command_line_len: usize, initramfs: Option<Initramfs>) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE as usize];
    let mut put = |at: usize, value: &[u8]| {
        if let Some(field) = page.get_mut(at..at + value.len()) {
            field.copy_from_slice(value);
        }
    };
    put(offset::BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(offset::HEADER, b"HdrS");
    put(offset::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(offset::KERNEL_ALIGNMENT, &0x100_0000u32.to_le_bytes());
    put(offset::CMD_LINE_PTR, &(COMMAND_LINE.0 as u32).to_le_bytes());
    put(offset::CMDLINE_SIZE, &(command_line_len as u32).to_le_bytes());
    if let Some(initramfs) = initramfs {
        put(offset::RAMDISK_IMAGE, &initramfs.address.to_le_bytes());
        put(offset::RAMDISK_SIZE, &initramfs.size.to_le_bytes());
    }
    for (index, (start, len, kind)) in map.iter().enumerate() {
        let at = offset::E820_TABLE + index * E820_ENTRY;
        put(at, &start.to_le_bytes());
        put(at + 8, &len.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    put(offset::E820_ENTRIES, &[map.len() as u8]);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_ram_and_leaves_the_mp_table_out() {
        let memory = crate::memory::create(4 << 30, None).unwrap();
        assert_eq!(
            memory_map(&memory),
            [
                (0, 0x9_fc00, E820_RAM),
                (0x9_fc00, 0x400, E820_RESERVED),
                (0x10_0000, (3 << 30) - 0x10_0000, E820_RAM),
                (4 << 30, 1 << 30, E820_RAM),
            ]
        );
    }

    #[test]
    fn what_is_written_does_not_overlap() {
        let ranges = [
            (GDT.0, 32),
            (ZERO_PAGE.0, PAGE_SIZE),
            (PAGE_TABLES.0, 3 * PAGE_SIZE),
            (COMMAND_LINE.0, 2048),
            (MP_TABLE.0, 0x400),
        ];
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
