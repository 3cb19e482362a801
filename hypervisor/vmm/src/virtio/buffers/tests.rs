//! A chain's bytes against a plain vector.

use std::os::fd::AsFd;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::virtio::GuestMemory;

fn memory() -> GuestMemory {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let bytes: Vec<u8> = (0..0x1000u32).map(|n| (n % 251) as u8).collect();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    memory
}

/// Ranges of memory, one after the other, and what they hold.
fn buffers<'m>(memory: &'m GuestMemory, ranges: &[(u16, u8)]) -> (Buffers<'m>, Vec<u8>) {
    let (mut buffers, mut expected) = (Buffers::default(), Vec::new());
    for (start, len) in ranges {
        let start = u64::from(start % 0xf00);
        let slice = GuestMemoryBackend::get_slice(memory, GuestAddress(start), usize::from(*len)).unwrap();
        assert!(buffers.push(slice));
        expected.extend((start..start + u64::from(*len)).map(|n| (n % 251) as u8));
    }
    (buffers, expected)
}

fn ranges() -> impl Strategy<Value = Vec<(u16, u8)>> {
    proptest::collection::vec(any::<(u16, u8)>(), 0..20)
}

#[test]
fn a_chain_never_exceeds_what_a_used_length_can_say() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 30)]).unwrap();
    let slice = || GuestMemoryBackend::get_slice(&memory, GuestAddress(0), 1 << 30).unwrap();
    let mut buffers = Buffers::default();
    assert!((0..3).all(|_| buffers.push(slice())));
    assert!(!buffers.push(slice()), "4 GiB");
    assert_eq!(buffers.len(), 3 << 30);
}

#[test]
fn a_read_beyond_the_end_copies_nothing() {
    let memory = memory();
    let (buffers, _) = buffers(&memory, &[(0, 10)]);
    let mut bytes = [0xee; 8];
    assert_eq!(buffers.read(3, &mut bytes), Err(BufferError { have: 10, need: 11 }));
    assert_eq!(bytes, [0xee; 8]);
    assert!(buffers.read(usize::MAX, &mut bytes).is_err());
}

proptest! {
    #[test]
    fn reads_see_the_ranges_as_one_run(ranges in ranges(), offset in 0usize..3000, len in 0usize..3000) {
        let memory = memory();
        let (buffers, expected) = buffers(&memory, &ranges);
        prop_assert_eq!(buffers.len(), expected.len());
        let mut bytes = vec![0; len];
        match expected.get(offset..offset + len) {
            Some(there) => {
                buffers.read(offset, &mut bytes).unwrap();
                prop_assert_eq!(&bytes, there);
            }
            None => prop_assert!(buffers.read(offset, &mut bytes).is_err()),
        }
    }

    #[test]
    fn files_and_packets_carry_the_same_bytes(ranges in ranges(), offset in 0usize..2000, len in 0usize..2000) {
        let memory = memory();
        let (buffers, expected) = buffers(&memory, &ranges);
        let file = tempfile::tempfile().unwrap();
        let Some(there) = expected.get(offset..offset + len) else {
            prop_assert!(buffers.write_to(file.as_fd(), Some(0), offset, len).is_err());
            return Ok(());
        };
        prop_assert_eq!(buffers.write_to(file.as_fd(), Some(7), offset, len).unwrap(), len);
        let mut bytes = vec![0; len];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 7).unwrap();
        prop_assert_eq!(&bytes, there);

        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let header = vec![0xaa; expected.len().min(5)];
        buffers.send_packet(ours.as_fd(), &header).unwrap();
        let mut packet = vec![0; expected.len() + 1];
        let n = theirs.recv(&mut packet).unwrap();
        prop_assert_eq!(n, expected.len());
        prop_assert_eq!(&packet[..header.len()], &header[..]);
        prop_assert_eq!(&packet[header.len()..n], &expected[header.len()..]);
    }

    /// In `head`, then in the chain as far as that goes, then in the rest.
    #[test]
    fn a_packet_is_read_in_one_piece(lens in proptest::collection::vec(1u8..50, 1..10), head in 0usize..40, len in 1usize..600) {
        let memory = memory();
        let mut at = 0;
        let ranges: Vec<(u16, u8)> = lens.iter().map(|len| { let range = (at, *len); at += u16::from(*len) + 3; range }).collect();
        let (first, second) = ranges.split_at(ranges.len() / 2);
        let (mut chain, _) = buffers(&memory, first);
        prop_assert!(chain.append(&buffers(&memory, second).0));

        let packet: Vec<u8> = (0..len).map(|n| (n % 241) as u8).collect();
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        ours.send(&packet).unwrap();
        let (mut head, mut rest) = (vec![0; head], vec![0; 600]);
        let received = chain.read_packet(theirs.as_fd(), &mut head, &mut rest).unwrap();
        prop_assert_eq!(received.len, len);
        prop_assert_eq!(received.in_chain, len.min(chain.len().max(head.len())));
        let mut bytes = head[..head.len().min(len)].to_vec();
        let mut middle = vec![0; received.in_chain.saturating_sub(head.len())];
        if !middle.is_empty() {
            chain.read(head.len(), &mut middle).unwrap();
        }
        bytes.extend(middle);
        bytes.extend(&rest[..len - received.in_chain]);
        prop_assert_eq!(&bytes, &packet);

        // And back, with other bytes in the place of the first ones.
        let own = vec![0xee; chain.len().min(20)];
        chain.write_packet(theirs.as_fd(), &own).unwrap();
        let mut back = vec![0; chain.len() + 1];
        let n = ours.recv(&mut back).unwrap();
        prop_assert_eq!(n, chain.len());
        prop_assert_eq!(&back[..own.len()], &own[..]);
        let mut expected = vec![0; n - own.len()];
        chain.read(own.len(), &mut expected).unwrap();
        prop_assert_eq!(&back[own.len()..n], &expected[..]);
    }

    #[test]
    fn writes_land_where_reads_find_them(start in 0u16..0x800, lens in proptest::collection::vec(1u8..50, 1..10), offset in 0usize..300, data in proptest::collection::vec(any::<u8>(), 0..300)) {
        let memory = memory();
        // Disjoint ranges, in order.
        let mut at = start;
        let ranges: Vec<(u16, u8)> = lens.iter().map(|len| { let range = (at, *len); at += u16::from(*len) + 3; range }).collect();
        let (buffers, mut expected) = buffers(&memory, &ranges);
        let fits = expected.get_mut(offset..offset + data.len()).map(|part| part.copy_from_slice(&data)).is_some();
        prop_assert_eq!(buffers.write(offset, &data).is_ok(), fits);
        let mut all = vec![0; expected.len()];
        buffers.read(0, &mut all).unwrap();
        prop_assert_eq!(all, expected);
    }
}
