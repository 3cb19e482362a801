//! Block devices from inside. The host has put known bytes on them and looks at what is there afterwards.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd, unix::fs::FileExt},
};

const MIB: u64 = 1 << 20;

// include/uapi/linux/fs.h
const BLKFLSBUF: libc::c_int = 0x1261;
const BLKDISCARD: libc::c_int = 0x1277;
const BLKZEROOUT: libc::c_int = 0x127f;

/// vda: 8 MiB, writable, byte n is n / 4096. vdb: 1 MiB and a bit, read-only, all 0x42. vdc: 64 KiB, writable, empty serial.
pub fn use_all_kinds() {
    assert_eq!(attribute("vda", "size"), "16384");
    assert_eq!(attribute("vda", "serial"), "the-first-disk-of-it");
    assert_eq!(attribute("vda", "ro"), "0");
    assert_eq!(attribute("vdb", "size"), "2048");
    assert_eq!(attribute("vdb", "serial"), "second");
    assert_eq!(attribute("vdb", "ro"), "1");
    assert_eq!(attribute("vdc", "size"), "128");
    assert_eq!(attribute("vdc", "serial"), "");

    let first = open("vda");
    for page in [0, 1, 255, 256, 2047] {
        assert_eq!(page_at(&first, page), [page as u8; 4096], "page {page}");
    }
    // Sixteen writes of one MiB each would be one request each; read back past the cache.
    let data: Vec<u8> = (0..MIB).map(|n| (n % 251) as u8).collect();
    for n in 2..4 {
        first.write_all_at(&data, n * MIB).expect("writing vda");
    }
    first.sync_all().expect("flushing vda");
    forget_cache(&first);
    for n in 2..4 {
        let mut back = vec![0; MIB as usize];
        first.read_exact_at(&mut back, n * MIB).expect("reading vda");
        assert!(back == data, "MiB {n} came back changed");
    }
    range_call(&first, BLKDISCARD, 4 * MIB, MIB).expect("discarding on vda");
    range_call(&first, BLKZEROOUT, 5 * MIB, MIB).expect("zeroing on vda");
    forget_cache(&first);
    assert_eq!(page_at(&first, 5 * 256), [0; 4096]);
    // A file system's or another format's first bytes change nothing: the disk stays what it is.
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    first.write_all_at(&header, 0).expect("writing vda");
    first.sync_all().expect("flushing vda");
    forget_cache(&first);
    let mut back = [0; 512];
    first.read_exact_at(&mut back, 0).expect("reading vda");
    assert_eq!(back, header);
    assert_eq!(attribute("vda", "size"), "16384");

    let second = File::open("/dev/vdb").expect("/dev/vdb");
    assert_eq!(page_at(&second, 255), [0x42; 4096]);
    let refused = fs::OpenOptions::new().write(true).open("/dev/vdb").and_then(|disk| {
        disk.write_all_at(&[1; 4096], 0)?;
        disk.sync_all()
    });
    assert!(refused.is_err(), "a read-only disk took a write");
    assert!(first.write_all_at(&[1; 4096], 8 * MIB).is_err(), "a write beyond the end succeeded");

    open("vdc").write_all_at(&[0xcc; 4096], 0).expect("writing vdc");
    open("vdc").sync_all().expect("flushing vdc");
}

/// Disk n holds the byte n, everywhere.
pub fn count() {
    let mut names: Vec<String> = fs::read_dir("/sys/block")
        .expect("/sys/block")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("vd"))
        .collect();
    names.sort();
    println!("guest: disks {}", names.join(" "));
    for (n, name) in names.iter().enumerate() {
        let disk = open(name);
        assert_eq!(page_at(&disk, 0), [n as u8; 4096], "{name}");
        disk.write_all_at(&[n as u8 + 100; 4096], 4096).expect(name);
        disk.sync_all().expect(name);
    }
}

/// vda never answers reads from `hangs_from` on; vdb is sound.
pub fn one_hangs(hangs_from: u64) -> ! {
    std::thread::spawn(move || {
        let hung = File::open("/dev/vda").expect("/dev/vda");
        let result = hung.read_exact_at(&mut [0; 4096], hangs_from);
        panic!("a read that hangs came back: {result:?}");
    });
    while attribute("vda", "inflight").split_whitespace().all(|count| count == "0") {
        std::thread::yield_now();
    }
    let sound = open("vdb");
    sound.write_all_at(&[0xdd; 4096], 4096).expect("writing vdb");
    sound.sync_all().expect("flushing vdb");
    forget_cache(&sound);
    assert_eq!(page_at(&sound, 1), [0xdd; 4096]);
    println!("guest: the others work");
    loop {
        std::thread::park();
    }
}

fn open(name: &str) -> File {
    fs::OpenOptions::new().read(true).write(true).open(format!("/dev/{name}")).expect(name)
}

fn attribute(disk: &str, name: &str) -> String {
    let path = format!("/sys/block/{disk}/{name}");
    fs::read_to_string(&path).expect(&path).trim().to_owned()
}

fn page_at(disk: &File, page: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    disk.read_exact_at(&mut bytes, page * 4096).expect("reading a disk");
    bytes
}

fn forget_cache(disk: &File) {
    // SAFETY: takes no argument.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), BLKFLSBUF as _, 0) };
    assert_eq!(result, 0, "BLKFLSBUF: {}", std::io::Error::last_os_error());
}

fn range_call(disk: &File, call: libc::c_int, start: u64, len: u64) -> std::io::Result<()> {
    let range = [start, len];
    // SAFETY: both calls read two u64.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), call as _, range.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
