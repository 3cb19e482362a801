//! A guest's end from within, brought about from outside: root on the host writes instructions that do not exist over
//! the guest's program or kernel, through the monitor's memory. Nobody inside could do that, and nobody outside without
//! these rights.

use std::{
    collections::HashSet,
    fs::{self, File},
    os::unix::fs::FileExt,
};

use rustix::fs::{SeekFrom, seek};

use crate::environment::image_dir;

const PAGE: usize = 4096;
/// UD2, which every processor refuses.
const UNDEFINED: [u8; 2] = [0x0f, 0x0b];

/// A part of a process's address space.
struct Region {
    start: u64,
    end: u64,
}

/// The regions of `pid` that map a file whose name holds `name`.
fn regions(pid: i32, name: &str) -> Vec<Region> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let region = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(Region { start: number(start)?, end: number(end)? })
    };
    let found: Vec<Region> = maps.lines().filter(|line| line.contains(name)).filter_map(region).collect();
    assert!(!found.is_empty(), "process {pid} maps no {name}:\n{maps}");
    found
}

/// Ends the agent: its program's pages in the guest's memory, wherever they lie, cannot be run any more. The guest's
/// first process has died then, and its kernel panics.
pub fn spoil_agent(monitor: i32) {
    let initramfs = fs::read(image_dir().join("initramfs")).expect("there is an initramfs");
    let begin = initramfs.windows(4).position(|bytes| bytes == b"\x7fELF").expect("the agent is in the initramfs");
    let pages: HashSet<&[u8]> = initramfs[begin..].chunks_exact(PAGE).filter(|page| busy(page)).map(mark).collect();
    let undefined = UNDEFINED.repeat(PAGE / 2);
    let (mut spoilt, mut block) = (0, vec![0; 1 << 20]);
    // Each region leads to the whole file.
    let regions = regions(monitor, "memfd:caisson-guest");
    let path = format!("/proc/{monitor}/map_files/{:x}-{:x}", regions[0].start, regions[0].end);
    let file = File::options().read(true).write(true).open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    // Only what the guest has touched: the rest is a hole.
    let mut at = 0;
    while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
        let hole = seek(&file, SeekFrom::Hole(data)).expect("a file ends in a hole");
        at = (data + block.len() as u64).min(hole);
        let here = &mut block[..(at - data) as usize];
        file.read_exact_at(here, data).expect("the guest's memory can be read");
        for (index, page) in here.chunks_exact(PAGE).enumerate() {
            if pages.contains(mark(page)) {
                let place = data + (index * PAGE) as u64;
                file.write_all_at(&undefined, place).expect("the guest's memory can be written");
                spoilt += 1;
            }
        }
    }
    assert!(spoilt > 100, "{spoilt} pages of the agent were found in the guest: it is not there yet");
}

/// Whether a page holds enough to be told from others.
fn busy(page: &[u8]) -> bool {
    mark(page).iter().filter(|byte| **byte != 0).count() > 8
}

/// Sixteen bytes from a page's middle: enough to know it by, and quickly compared.
fn mark(page: &[u8]) -> &[u8] {
    &page[PAGE / 2..PAGE / 2 + 16]
}

/// Ends the kernel: its table of handlers is emptied, so that the next interrupt or exception is a triple fault.
pub fn spoil_kernel(monitor: i32) {
    let path = format!("/proc/{monitor}/mem");
    let memory = File::options().read(true).write(true).open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (mut found, mut page) = (0, [0; PAGE]);
    // Known before the first is written: the monitor may be gone right after.
    let regions: Vec<Region> =
        ["memfd:caisson-guest", "/vmlinux"].into_iter().flat_map(|name| regions(monitor, name)).collect();
    for Region { start, end } in regions {
        for place in (start..end).step_by(PAGE) {
            if memory.read_exact_at(&mut page, place).is_ok() && is_handler_table(&page) {
                memory.write_all_at(&[0; PAGE], place).expect("the guest's memory can be written");
                found += 1;
            }
        }
    }
    assert!(found > 0, "the guest's kernel has no table of handlers yet");
}

/// An IDT of 64-bit Linux (AMD64 Architecture Programmer's Manual, volume 2, 4.8.4): 256 gates of 16 bytes, each present, for the
/// kernel's code segment, to an address in the kernel's half.
fn is_handler_table(page: &[u8; PAGE]) -> bool {
    page.chunks_exact(16).take(32).all(|gate| gate[2..4] == [0x10, 0] && gate[5] & 0x9e == 0x8e && gate[11] == 0xff)
}
