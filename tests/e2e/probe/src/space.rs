//! Bytes: holes, mapped memory, direct I/O, and a large file whose hash the host checks.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};
use sha2::{Digest, Sha256};

use crate::step;

const PAGE: usize = 4096;

/// Every check on contents, and `large`, a file of `mib` MiB, whose SHA-256 is printed as `sha256 HEX`.
pub fn check(directory: &Path, mib: usize) -> Result<()> {
    step("sparse", || sparse(&directory.join("sparse")))?;
    step("mmap", || mapped(&directory.join("mapped")))?;
    step("O_DIRECT", || direct(&directory.join("direct")))?;
    step("large", || large(&directory.join("large"), mib))
}

fn sparse(path: &Path) -> Result<()> {
    let file = File::create_new(path)?;
    file.write_all_at(b"end", 64 * 1024 * 1024)?;
    file.sync_all()?;
    let meta = file.metadata()?;
    ensure!(meta.len() == 64 * 1024 * 1024 + 3, "its length is {}", meta.len());
    ensure!(meta.blocks() * 512 < 1024 * 1024, "it takes {} blocks", meta.blocks());
    let file = File::open(path)?;
    let mut bytes = [1; PAGE];
    file.read_exact_at(&mut bytes, 1024 * 1024)?;
    ensure!(bytes.iter().all(|byte| *byte == 0), "a hole is not zero");
    Ok(())
}

fn mapped(path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    file.set_len(4 * PAGE as u64)?;
    let flags = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), 4 * PAGE, flags.0, flags.1, &file, 0) }
        .context("map it shared and writable")?;
    // SAFETY: the mapping is 4 pages of a file of 4 pages, readable and writable, nobody else in this process knows its
    // address, and it is unmapped only after the last use of the slice.
    let memory = unsafe { std::slice::from_raw_parts_mut(address.cast::<u8>(), 4 * PAGE) };
    memory[PAGE..PAGE + 6].copy_from_slice(b"mapped");
    // SAFETY: address and length are the mapping's.
    unsafe { rustix::mm::msync(address, 4 * PAGE, MsyncFlags::SYNC) }.context("write it back")?;
    let mut bytes = [0; 6];
    file.read_exact_at(&mut bytes, PAGE as u64)?;
    ensure!(&bytes == b"mapped", "a store does not show in read(): {bytes:?}");
    file.write_all_at(b"written", 2 * PAGE as u64)?;
    ensure!(&memory[2 * PAGE..2 * PAGE + 7] == b"written", "a write() does not show in memory");
    // SAFETY: address and length are the mapping's, and `memory` is not used any more.
    unsafe { rustix::mm::munmap(address, 4 * PAGE) }?;
    Ok(())
}

fn direct(path: &Path) -> Result<()> {
    let flag = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file =
        OpenOptions::new().read(true).write(true).create_new(true).custom_flags(flag).open(path).context("open")?;
    let mut memory = vec![0_u8; 5 * PAGE];
    let start = memory.as_ptr().align_offset(PAGE);
    let block = memory.get_mut(start..start + 4 * PAGE).context("a page in five pages")?;
    block.iter_mut().enumerate().for_each(|(index, byte)| *byte = (index % 251) as u8);
    let wanted = block.to_vec();
    file.write_all_at(block, 0).context("write")?;
    block.fill(0);
    file.read_exact_at(block, 0).context("read")?;
    ensure!(block == wanted, "other bytes than written");
    ensure!(fs::read(path)? == wanted, "other bytes through the page cache");
    Ok(())
}

fn large(path: &Path, mib: usize) -> Result<()> {
    let mut file = File::create_new(path)?;
    let mut written = Sha256::new();
    let mut block = vec![0_u8; 1024 * 1024];
    // A cheap generator: no two blocks alike, no page a copy of another.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..mib {
        for word in block.chunks_exact_mut(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            word.copy_from_slice(&state.to_le_bytes());
        }
        written.update(&block);
        file.write_all(&block)?;
    }
    file.sync_all()?;
    let written = written.finalize();
    let mut read = Sha256::new();
    let file = File::open(path)?;
    for index in 0..mib {
        file.read_exact_at(&mut block, index as u64 * 1024 * 1024)?;
        read.update(&block);
    }
    ensure!(read.finalize() == written, "it reads other bytes than were written");
    println!("sha256 {}", written.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    Ok(())
}
