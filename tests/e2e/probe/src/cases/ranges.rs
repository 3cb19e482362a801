//! Parts of files: holes, fallocate, copies inside the kernel, extents, and the time of birth.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, SeekFrom, StatxFlags, copy_file_range, fallocate, ioctl_ficlone, seek, statx,
};

use super::{below, case, done};

const BLOCK: u64 = 4096;

fn file(path: &Path) -> File {
    let options = File::options().read(true).write(true).create(true).truncate(true).open(path);
    options.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// In `directory`.
pub fn all(directory: &Path) {
    holes(&file(&directory.join("holes")));
    allocation(directory);
    copies(directory);
    extents(directory);
}

/// Where data and holes begin; nothing has been written back by then.
fn holes(file: &File) {
    let made = file.set_len(256 * BLOCK).and_then(|()| file.write_all_at(&[1; BLOCK as usize], 128 * BLOCK));
    case("a file with holes", done(made));
    let blocks = |place: SeekFrom| seek(file, place).map(|at| at as f64 / BLOCK as f64);
    case("SEEK_DATA from the start", blocks(SeekFrom::Data(0)));
    case("SEEK_HOLE from the start", blocks(SeekFrom::Hole(0)));
    case("SEEK_HOLE from the data", blocks(SeekFrom::Hole(128 * BLOCK)));
    case("SEEK_DATA behind the data", blocks(SeekFrom::Data(129 * BLOCK)));
    case("SEEK_HOLE behind the data", blocks(SeekFrom::Hole(200 * BLOCK)));
    case("SEEK_DATA behind the end", blocks(SeekFrom::Data(256 * BLOCK)));
    let _ = file.write_all_at(&[1; BLOCK as usize], 130 * BLOCK);
    case("SEEK_DATA after another write", blocks(SeekFrom::Data(129 * BLOCK)));
    case("SEEK_HOLE at the end", blocks(SeekFrom::Hole(255 * BLOCK)));
}

/// Letters of the first byte of each block, `.` for zero.
fn picture(file: &File) -> io::Result<String> {
    let count = file.metadata()?.len() / BLOCK;
    let letter = |block| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, block * BLOCK).map(|()| if byte[0] == 0 { '.' } else { char::from(byte[0]) })
    };
    (0..count).map(letter).collect()
}

fn allocation(directory: &Path) {
    let path = below(directory);
    let fresh = |name: &str| {
        let file = file(&path(name));
        for (block, letter) in (0..8).zip(b"abcdefgh") {
            file.write_all_at(&[*letter; BLOCK as usize], block * BLOCK).expect("there is space");
        }
        file
    };
    let modes = [
        ("no flag", FallocateFlags::empty(), 6),
        ("KEEP_SIZE", FallocateFlags::KEEP_SIZE, 6),
        ("PUNCH_HOLE", FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 2),
        ("PUNCH_HOLE alone", FallocateFlags::PUNCH_HOLE, 2),
        ("ZERO_RANGE", FallocateFlags::ZERO_RANGE, 6),
        ("ZERO_RANGE and KEEP_SIZE", FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 6),
        ("COLLAPSE_RANGE", FallocateFlags::COLLAPSE_RANGE, 2),
        ("INSERT_RANGE", FallocateFlags::INSERT_RANGE, 2),
        ("UNSHARE_RANGE", FallocateFlags::UNSHARE_RANGE, 2),
    ];
    for (name, flags, first) in modes {
        let file = fresh("allocated");
        case(&format!("fallocate, {name}"), done(fallocate(&file, flags, first * BLOCK, 4 * BLOCK)));
        case(&format!("fallocate, {name}: content"), picture(&file));
    }
    let punched = fresh("punched");
    let _ = fallocate(&punched, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 2 * BLOCK, 4 * BLOCK);
    case("a punched hole", seek(&punched, SeekFrom::Hole(0)).map(|at| at / BLOCK));
    case("data behind it", seek(&punched, SeekFrom::Data(2 * BLOCK)).map(|at| at / BLOCK));
    let kept = fresh("kept");
    let _ = fallocate(&kept, FallocateFlags::KEEP_SIZE, 8 * BLOCK, 100 * BLOCK);
    case("blocks beyond the end", kept.metadata().map(|meta| meta.blocks() * 512 >= 108 * BLOCK));
    case("fallocate of more than there is", done(fallocate(&kept, FallocateFlags::empty(), 0, 1 << 40)));
    // What there was may be taken now.
    let _ = fs::remove_file(path("kept"));
}

fn copies(directory: &Path) {
    let path = below(directory);
    let (from, to) = (file(&path("from")), file(&path("to")));
    let content: Vec<u8> = (0..100_000_u32).map(|index| (index % 251) as u8).collect();
    let written = from.write_all_at(&content, 0).and_then(|()| to.write_all_at(&[7; 50_000], 0));
    case("two files", done(written.and_then(|()| fs::read(path("to")))));
    // What is copied has not been written back, and what is overwritten is in the page cache.
    let (mut read, mut write) = (1000, 2000);
    let mut copied = 0;
    let result = loop {
        match copy_file_range(&from, Some(&mut read), &to, Some(&mut write), 90_000 - copied) {
            Ok(0) => break Ok(copied),
            Ok(count) => copied += count,
            Err(error) => break Err(error),
        }
    };
    case("copy_file_range", result);
    case("copy_file_range: offsets", Ok::<_, io::Error>(format!("{read} {write}")));
    let expected = [&[7; 2000], &content[1000..91_000]].concat();
    case("copy_file_range: content", fs::read(path("to")).map(|found| found == expected));
    let (mut read, mut write) = (0, 10);
    case("copy_file_range onto itself", copy_file_range(&from, Some(&mut read), &from, Some(&mut write), 100));
    let (mut read, mut write) = (200_000, 0);
    case("copy_file_range from behind the end", copy_file_range(&from, Some(&mut read), &to, Some(&mut write), 100));
    // ext4 cannot share blocks.
    case("FICLONE", done(ioctl_ficlone(&to, &from)));
}

/// struct fiemap of linux/fiemap.h, with room for some extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [[u64; 7]; 8],
}

/// _IOWR('f', 11, struct fiemap)
const FS_IOC_FIEMAP: u64 = 0xc020_660b;
const FIEMAP_FLAG_SYNC: u32 = 1;

fn extents(directory: &Path) {
    let file = file(&directory.join("mapped"));
    let made = file.set_len(256 * BLOCK).and_then(|()| file.write_all_at(&[1; BLOCK as usize], 128 * BLOCK));
    case("a file to map", done(made));
    let mut map = Fiemap {
        start: 0,
        length: u64::MAX,
        flags: FIEMAP_FLAG_SYNC,
        mapped: 0,
        count: 8,
        reserved: 0,
        extents: [[0; 7]; 8],
    };
    // SAFETY: the kernel writes at most `count` extents behind the head, and there are as many.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) };
    let error = io::Error::last_os_error();
    let mapped = if answer == 0 { Ok(format!("{} at {}", map.mapped, map.extents[0][0] / BLOCK)) } else { Err(error) };
    case("FIEMAP", mapped);
}

/// The time of birth of `file`.
pub fn born(file: &Path) {
    let answer = statx(CWD, file, AtFlags::empty(), StatxFlags::BASIC_STATS | StatxFlags::BTIME);
    let time = answer.map(|answer| {
        let known = answer.stx_mask & StatxFlags::BTIME.bits() != 0;
        if known {
            format!("{}.{:09}", answer.stx_btime.tv_sec, answer.stx_btime.tv_nsec)
        } else {
            "unknown".to_owned()
        }
    });
    case("born", time);
}
