use std::{
    fs::File,
    io::Write,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{Arc, Condvar, Mutex, mpsc},
};

use proptest::prelude::*;
use rustix::fs::FallocateFlags;
use virtio_bindings::virtio_blk::*;
use virtio_queue::QueueT;
use vm_memory::Bytes;

use super::{request::MAX_DATA, *};
use crate::virtio::testing::Driver;

const SECTORS: u64 = 64;

struct Disk {
    driver: Driver,
    file: File,
}

impl Disk {
    fn new(read_only: bool) -> Self {
        let file = tempfile::tempfile().unwrap();
        // Half a sector more than the guest is to see.
        file.set_len(SECTORS * SECTOR + 256).unwrap();
        let backing: OwnedFd = file.try_clone().unwrap().into();
        let block = Block::new(backing, file.metadata().unwrap().len(), "serial-of-vda", read_only, no_log()).unwrap();
        Self { driver: Driver::new(Box::new(block)), file }
    }

    /// The status and what else was written.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (u32, Vec<u8>) {
        self.driver.offer(0, &message(kind, sector, data), &[room, 1]);
        self.driver.run(0).unwrap();
        let (written, mut bytes) = self.driver.wait_completed(0);
        let status = bytes.pop().unwrap().into();
        assert_eq!(written as usize, if status == VIRTIO_BLK_S_OK || room == 0 { room + 1 } else { 0 });
        (status, bytes)
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> u32 {
        self.request(kind, sector, data, room).0
    }

    fn content(&self, position: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, position).unwrap();
        bytes
    }
}

fn message(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), data].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_read_back_and_lies_in_the_file() {
    let mut disk = Disk::new(false);
    let data: Vec<u8> = (0..1024u32).map(|n| n as u8).collect();
    assert_eq!(disk.status(VIRTIO_BLK_T_OUT, 3, &data, 0), VIRTIO_BLK_S_OK);
    assert_eq!(disk.content(3 * SECTOR, 1024), data);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &[], 1024), (VIRTIO_BLK_S_OK, data));
    assert_eq!(disk.status(VIRTIO_BLK_T_FLUSH, 0, &[], 0), VIRTIO_BLK_S_OK);
}

#[test]
fn nothing_beyond_the_capacity_can_be_reached() {
    let mut disk = Disk::new(false);
    for (sector, sectors) in [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (u64::MAX / SECTOR + 1, 1)] {
        let len = sectors * SECTOR as usize;
        assert_eq!(disk.status(VIRTIO_BLK_T_IN, sector, &[], len), VIRTIO_BLK_S_IOERR, "{sector}");
        assert_eq!(disk.status(VIRTIO_BLK_T_OUT, sector, &vec![1; len], 0), VIRTIO_BLK_S_IOERR, "{sector}");
        let range = segment(sector, sectors as u32, 0);
        assert_eq!(disk.status(VIRTIO_BLK_T_DISCARD, 0, &range, 0), VIRTIO_BLK_S_IOERR);
        assert_eq!(disk.status(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range, 0), VIRTIO_BLK_S_IOERR);
    }
    assert_eq!(disk.content(SECTORS * SECTOR, 256), vec![0; 256]);
    assert_eq!(disk.driver.guest_faults, 16);
}

#[test]
fn odd_lengths_and_data_in_the_wrong_direction_are_refused() {
    let mut disk = Disk::new(false);
    assert_eq!(disk.status(VIRTIO_BLK_T_IN, 0, &[], 511), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_OUT, 0, &[0; 513], 0), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_IN, 0, &[0; 512], 512), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_OUT, 0, &[0; 512], 512), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_FLUSH, 0, &[0; 512], 0), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_GET_ID, 0, &[], 19), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_GET_ID, 0, &[], 21), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_DISCARD, 0, &[0; 15], 0), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(77, 0, &[], 0), VIRTIO_BLK_S_UNSUPP);
}

#[test]
fn a_header_that_is_too_short_is_refused() {
    let mut disk = Disk::new(false);
    disk.driver.offer(0, &[0; 15], &[1]);
    disk.driver.run(0).unwrap();
    assert_eq!(disk.driver.completed(0).unwrap().1, [VIRTIO_BLK_S_IOERR as u8]);
}

#[test]
fn without_room_for_the_status_the_device_stops() {
    let mut disk = Disk::new(false);
    disk.driver.offer(0, &message(VIRTIO_BLK_T_FLUSH, 0, &[]), &[]);
    assert!(matches!(disk.driver.run(0), Err(DeviceError::Protocol(_))));
}

#[test]
fn a_read_only_disk_takes_no_change_whatever_the_guest_sends() {
    let mut disk = Disk::new(true);
    disk.file.write_all_at(&[7; 1024], 0).unwrap();
    assert_eq!(disk.status(VIRTIO_BLK_T_OUT, 0, &[1; 512], 0), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_DISCARD, 0, &segment(0, 1, 0), 0), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.status(VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(0, 1, 1), 0), VIRTIO_BLK_S_IOERR);
    assert_eq!(disk.content(0, 1024), vec![7; 1024]);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 1, &[], 512), (VIRTIO_BLK_S_OK, vec![7; 512]));
}

#[test]
fn discard_gives_blocks_back_and_write_zeroes_makes_zeros() {
    use std::os::unix::fs::MetadataExt;
    let mut disk = Disk::new(false);
    disk.file.write_all_at(&[7; 32 << 10], 0).unwrap();
    let before = disk.file.metadata().unwrap().blocks();
    assert_eq!(disk.status(VIRTIO_BLK_T_DISCARD, 0, &segment(0, 16, 0), 0), VIRTIO_BLK_S_OK);
    assert!(disk.file.metadata().unwrap().blocks() < before, "a hole of 8 KiB");
    let two = [segment(16, 1, 0), segment(18, 1, 1)].concat();
    assert_eq!(disk.status(VIRTIO_BLK_T_WRITE_ZEROES, 0, &two, 0), VIRTIO_BLK_S_OK);
    let expected = [[0; 512], [7; 512], [0; 512], [7; 512]].concat();
    assert_eq!(disk.content(16 * SECTOR, 2048), expected);
    // Flags that nobody knows.
    assert_eq!(disk.status(VIRTIO_BLK_T_DISCARD, 0, &segment(0, 1, 1), 0), VIRTIO_BLK_S_UNSUPP);
    assert_eq!(disk.status(VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(0, 1, 2), 0), VIRTIO_BLK_S_UNSUPP);
}

#[test]
fn the_serial_number_is_padded_with_zeros() {
    let mut disk = Disk::new(false);
    let (status, id) = disk.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, id.as_slice()), (VIRTIO_BLK_S_OK, b"serial-of-vda\0\0\0\0\0\0\0".as_slice()));
}

#[test]
fn a_format_that_the_guest_writes_changes_nothing() {
    let mut disk = Disk::new(false);
    let mut header = vec![0; 512];
    // A qcow2 header with a backing file.
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 11]);
    header[256..267].copy_from_slice(b"/etc/shadow");
    assert_eq!(disk.status(VIRTIO_BLK_T_OUT, 0, &header, 0), VIRTIO_BLK_S_OK);
    let file = disk.file.try_clone().unwrap();
    let size = file.metadata().unwrap().len();
    let again = Block::new(OwnedFd::from(file.try_clone().unwrap()), size, "", false, no_log()).unwrap();
    assert_eq!(again.state.sectors, SECTORS);
    let mut disk = Disk { driver: Driver::new(Box::new(again)), file };
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[], 512), (VIRTIO_BLK_S_OK, header));
}

#[test]
fn one_call_takes_a_bounded_number_of_requests() {
    let mut disk = Disk::new(false);
    for _ in 0..TURN.chains + 1 {
        disk.driver.offer(0, &message(VIRTIO_BLK_T_FLUSH, 0, &[]), &[1]);
    }
    disk.driver.run(0).unwrap();
    assert_eq!(usize::from(disk.driver.queues[0].registers().next_avail()), TURN.chains);
    assert!(disk.driver.queues[0].take_call_again());
    disk.driver.run(0).unwrap();
    for _ in 0..TURN.chains + 1 {
        assert_eq!(disk.driver.wait_completed(0).1, [VIRTIO_BLK_S_OK as u8]);
    }
}

fn no_log() -> Logger {
    Logger::root(slog::Discard, slog::o!())
}

/// A backing that does what a test says.
struct Fake {
    /// Sends the name of each call.
    calls: mpsc::Sender<&'static str>,
    /// Each call waits until this is true.
    open: Arc<(Mutex<bool>, Condvar)>,
    /// What fallocate fails with.
    fallocate: Option<i32>,
    block_size: u32,
    /// What a write fails with.
    write: Option<i32>,
    file: File,
}

/// The test's end of it.
struct Control {
    calls: mpsc::Receiver<&'static str>,
    open: Arc<(Mutex<bool>, Condvar)>,
    file: File,
}

const FAKE_SIZE: u64 = 4 << 20;

impl Fake {
    fn new() -> (Self, Control) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(FAKE_SIZE).unwrap();
        let (sender, calls) = mpsc::channel();
        let open = Arc::new((Mutex::new(true), Condvar::new()));
        let control = Control { calls, open: open.clone(), file: file.try_clone().unwrap() };
        (Self { calls: sender, open, fallocate: None, block_size: 512, write: None, file }, control)
    }

    fn called(&self, name: &'static str) {
        let _ = self.calls.send(name);
        let mut open = self.open.0.lock().unwrap();
        while !*open {
            open = self.open.1.wait(open).unwrap();
        }
    }

    fn disk(self, log: Logger) -> Driver {
        Driver::new(Box::new(Block::new(self, FAKE_SIZE, "fake", false, log).unwrap()))
    }
}

impl Backing for Fake {
    fn block_size(&self) -> u32 {
        self.block_size
    }
    fn read_at(&self, data: &mut [u8], position: u64) -> io::Result<usize> {
        self.called("read");
        self.file.read_at(data, position)
    }
    fn write_at(&self, data: &[u8], position: u64) -> io::Result<usize> {
        self.called("write");
        match self.write {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => self.file.write_at(data, position),
        }
    }
    fn fallocate(&self, _: FallocateFlags, _: u64, _: u64) -> io::Result<()> {
        self.called("fallocate");
        self.fallocate.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
    fn sync(&self) -> io::Result<()> {
        self.called("sync");
        Ok(())
    }
}

#[test]
fn a_driver_learns_the_block_size_if_it_is_not_a_sector() {
    for (own, reported) in [(512, None), (4096, Some(4096)), (8192, None), (0, None), (1536, None)] {
        let (mut fake, _control) = Fake::new();
        fake.block_size = own;
        let block = Block::new(fake, FAKE_SIZE, "", false, no_log()).unwrap();
        let mut config = [0; 4];
        block.read_config(20, &mut config);
        let has = block.features() & 1 << VIRTIO_BLK_F_BLK_SIZE != 0;
        assert_eq!(has.then(|| u32::from_le_bytes(config)), reported, "{own}");
        assert_eq!(block.state().sectors, FAKE_SIZE / SECTOR, "the size is in sectors in any case");
    }
}

impl Control {
    fn set_open(&self, open: bool) {
        *self.open.0.lock().unwrap() = open;
        self.open.1.notify_all();
    }
}

fn one(driver: &mut Driver, kind: u32, sector: u64, data: &[u8], room: usize) -> (u32, Vec<u8>) {
    driver.offer(0, &message(kind, sector, data), &[room, 1]);
    driver.run(0).unwrap();
    let (_, mut bytes) = driver.wait_completed(0);
    (bytes.pop().unwrap().into(), bytes)
}

#[test]
fn what_a_block_device_with_large_sectors_cannot_zero_is_written() {
    for errno in [libc::EINVAL, libc::EOPNOTSUPP, libc::ENODEV] {
        let (mut fake, control) = Fake::new();
        fake.fallocate = Some(errno);
        let mut driver = fake.disk(no_log());
        control.file.write_all_at(&[7; 4096], 0).unwrap();
        assert_eq!(one(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(1, 1, 0), 0).0, VIRTIO_BLK_S_OK);
        assert_eq!(one(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(3, 1, 1), 0).0, VIRTIO_BLK_S_OK);
        assert_eq!(one(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &segment(4, 1, 0), 0).0, VIRTIO_BLK_S_OK);
        let content = one(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 2560).1;
        assert_eq!(content, [[7; 512], [0; 512], [7; 512], [0; 512], [7; 512]].concat());
    }
    let (mut fake, _control) = Fake::new();
    fake.fallocate = Some(libc::EIO);
    let mut driver = fake.disk(no_log());
    assert_eq!(one(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment(1, 1, 0), 0).0, VIRTIO_BLK_S_IOERR);
}

#[test]
fn without_flush_each_change_is_durable_before_it_is_completed() {
    for flush in [false, true] {
        let (fake, control) = Fake::new();
        let mut driver = fake.disk(no_log());
        if !flush {
            driver.features &= !(1 << VIRTIO_BLK_F_FLUSH);
        }
        let two_pieces = vec![1; PIECE + 512];
        for (kind, data) in [
            (VIRTIO_BLK_T_OUT, two_pieces),
            (VIRTIO_BLK_T_WRITE_ZEROES, segment(0, 1, 0)),
            (VIRTIO_BLK_T_DISCARD, segment(0, 1, 0)),
        ] {
            assert_eq!(one(&mut driver, kind, 0, &data, 0).0, VIRTIO_BLK_S_OK);
            let calls: Vec<_> = control.calls.try_iter().collect();
            assert_eq!(calls.iter().filter(|call| **call == "sync").count(), usize::from(!flush), "{calls:?}");
            assert_eq!(calls.last() == Some(&"sync"), !flush, "{calls:?}");
        }
    }
}

#[test]
fn a_large_request_goes_piece_by_piece() {
    let (fake, control) = Fake::new();
    let mut driver = fake.disk(no_log());
    let data: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 251) as u8).collect();
    assert_eq!(one(&mut driver, VIRTIO_BLK_T_OUT, 1, &data, 0).0, VIRTIO_BLK_S_OK);
    assert_eq!(control.calls.try_iter().count(), data.len() / PIECE);
    assert_eq!(one(&mut driver, VIRTIO_BLK_T_IN, 1, &[], data.len()), (VIRTIO_BLK_S_OK, data));
}

#[test]
fn a_file_that_does_not_answer_gets_a_bounded_number_of_bytes() {
    let (fake, control) = Fake::new();
    control.set_open(false);
    let mut driver = fake.disk(no_log());
    for _ in 0..8 {
        driver.offer(0, &message(VIRTIO_BLK_T_IN, 0, &[]), &[PIECE, 1]);
    }
    driver.run(0).unwrap();
    driver.run(0).unwrap();
    assert_eq!(usize::from(driver.queues[0].registers().next_avail()), MAX_AHEAD / PIECE);
    assert!(driver.completed(0).is_none());
    control.set_open(true);
    for _ in 0..8 {
        assert_eq!(driver.wait_completed(0).0 as usize, PIECE + 1);
    }
}

#[test]
fn a_reset_waits_for_nothing_and_its_requests_are_never_heard_of_again() {
    let (fake, control) = Fake::new();
    control.set_open(false);
    control.file.write_all_at(&[7; 512], 0).unwrap();
    let mut driver = fake.disk(no_log());
    for _ in 0..3 {
        driver.offer(0, &message(VIRTIO_BLK_T_IN, 0, &[]), &[512, 1]);
    }
    driver.run(0).unwrap();
    assert_eq!(control.calls.recv().unwrap(), "read");
    driver.reset();
    // One for the new life; the two that had not begun are never done.
    driver.offer(0, &message(VIRTIO_BLK_T_FLUSH, 0, &[]), &[1]);
    driver.run(0).unwrap();
    control.set_open(true);
    assert_eq!(driver.wait_completed(0), (1, vec![VIRTIO_BLK_S_OK as u8]));
    assert_eq!(control.calls.try_iter().collect::<Vec<_>>(), ["sync"]);
    assert!(driver.completed(0).is_none());
    let mut buffer = [0; 3 * 513];
    driver.memory.read_slice(&mut buffer, driver.first_buffer()).unwrap();
    assert_eq!(buffer[16..16 + 513], [0; 513], "guest memory is as it was");
}

#[test]
fn a_failed_request_is_logged_with_its_error() {
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let lines = Lines::default();
    let (mut fake, _control) = Fake::new();
    fake.write = Some(libc::ENOSPC);
    let mut driver = fake.disk(caisson_log::logger("vmm", lines.clone(), slog::Level::Info));
    for _ in 0..3 {
        assert_eq!(one(&mut driver, VIRTIO_BLK_T_OUT, 0, &[1; 512], 0).0, VIRTIO_BLK_S_IOERR);
    }
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(text.contains("disk request failed") && text.contains("os error 28") && text.contains("write"), "{text}");
    assert_eq!(text.lines().count(), 2, "the first and the second of three: {text}");
}

#[test]
fn a_restored_disk_goes_on_where_it_was() {
    let (fake, control) = Fake::new();
    control.file.write_all_at(&[7; 512], PIECE as u64).unwrap();
    let mut block = Block::new(fake, FAKE_SIZE, "fake", false, no_log()).unwrap();
    let mut state = block.state().clone();
    let len = PIECE + 512;
    state.in_flight.insert(0, InFlight { request: Request::Read { position: 0, len }, done: PIECE });
    block.restore(state);
    let mut driver = Driver::new(Box::new(block));
    driver.offer(0, &message(VIRTIO_BLK_T_IN, 0, &[]), &[len, 1]);
    driver.queues[0].pop(&driver.memory).unwrap();
    driver.run(0).unwrap();
    let (written, bytes) = driver.wait_completed(0);
    assert_eq!(written as usize, len + 1);
    assert_eq!(bytes[PIECE..], [vec![7; 512], vec![0]].concat());
    assert_eq!(control.calls.try_iter().count(), 1);
}

#[test]
fn a_request_that_is_made_available_twice_stops_the_device() {
    let (fake, control) = Fake::new();
    control.set_open(false);
    let mut driver = fake.disk(no_log());
    driver.offer(0, &message(VIRTIO_BLK_T_FLUSH, 0, &[]), &[1]);
    driver.offer_again(0, 0);
    assert!(matches!(driver.run(0), Err(DeviceError::Protocol(_))));
    control.set_open(true);
}

proptest! {
    #[test]
    fn arbitrary_requests_stay_on_the_disk(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0..SECTORS + 8, any::<u64>()],
        data in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..64),
            (0..SECTORS + 8, any::<u16>(), 0u32..3).prop_map(|(s, n, f)| segment(s, n.into(), f)),
            (0usize..4).prop_map(|n| vec![9; n * 512]),
        ],
        room in prop_oneof![Just(0), Just(512), Just(20), 0usize..2000],
        read_only in any::<bool>(),
    ) {
        let mut disk = Disk::new(read_only);
        disk.file.write_all_at(&vec![7; 4096], 0).unwrap();
        let before = disk.content(0, (SECTORS * SECTOR) as usize);
        let (status, bytes) = disk.request(kind, sector, &data, room);
        prop_assert!(status <= VIRTIO_BLK_S_UNSUPP);
        let after = disk.content(0, (SECTORS * SECTOR) as usize);
        prop_assert_eq!(disk.file.metadata().unwrap().len(), SECTORS * SECTOR + 256);
        prop_assert_eq!(disk.content(SECTORS * SECTOR, 256), vec![0; 256]);
        if read_only || status != VIRTIO_BLK_S_OK && !matches!(kind, VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) {
            prop_assert_eq!(&before, &after);
        }
        if status == VIRTIO_BLK_S_OK && kind == VIRTIO_BLK_T_IN {
            let at = (sector * SECTOR) as usize;
            prop_assert_eq!(&bytes[..], &after[at..at + room]);
        }
        prop_assert!(room <= MAX_DATA);
    }
}
