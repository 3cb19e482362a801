use std::{fs::File, os::unix::fs::FileExt};

use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;

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
        let block =
            Block::new(file.try_clone().unwrap().into(), file.metadata().unwrap().len(), "serial-of-vda", read_only);
        Self { driver: Driver::new(Box::new(block)), file }
    }

    /// The status and what else was written.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (u32, Vec<u8>) {
        self.driver.offer(0, &message(kind, sector, data), &[room, 1]);
        self.driver.run(0).unwrap();
        let (written, mut bytes) = self.driver.completed(0).unwrap();
        assert_eq!(written as usize, room + 1);
        (bytes.pop().unwrap().into(), bytes)
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
    let again = Block::new(file.try_clone().unwrap().into(), size, "", false);
    assert_eq!(again.state.sectors, SECTORS);
    let mut disk = Disk { driver: Driver::new(Box::new(again)), file };
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[], 512), (VIRTIO_BLK_S_OK, header));
}

#[test]
fn one_call_serves_a_bounded_number_of_requests() {
    let mut disk = Disk::new(false);
    for _ in 0..MAX_REQUESTS + 1 {
        disk.driver.offer(0, &message(VIRTIO_BLK_T_FLUSH, 0, &[]), &[1]);
    }
    disk.driver.run(0).unwrap();
    let served = std::iter::from_fn(|| disk.driver.completed(0)).count();
    assert_eq!(served, MAX_REQUESTS);
    assert!(disk.driver.queues[0].take_call_again());
    disk.driver.run(0).unwrap();
    assert!(disk.driver.completed(0).is_some());
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
