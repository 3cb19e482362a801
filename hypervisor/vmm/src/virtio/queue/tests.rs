//! Queues against drivers that write anything into their rings, and what they promise to those that do not.

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;

const SIZE: u16 = 8;
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Two regions that touch, and a third beyond a hole.
const REGIONS: [(u64, usize); 3] = [(0, 0x2000), (0x2000, 0x1000), (0x4000, 0x1000)];
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Clone, Copy, Debug)]
struct Raw {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&REGIONS.map(|(start, len)| (GuestAddress(start), len))).unwrap()
}

fn write_table(memory: &GuestMemory, at: u64, table: &[Raw]) {
    for (n, raw) in table.iter().enumerate() {
        let at = GuestAddress(at + n as u64 * 16);
        memory.write_obj(Descriptor::new(raw.address, raw.len, raw.flags, raw.next), at).unwrap();
    }
}

fn queue(memory: &GuestMemory, heads: &[u16]) -> VirtQueue {
    let mut queue = VirtQueue::new(SIZE).unwrap();
    let registers = queue.registers_mut();
    registers.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
    registers.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    registers.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    registers.set_ready(true);
    assert!(queue.is_usable(memory));
    for (n, head) in heads.iter().enumerate() {
        memory.write_obj(*head, GuestAddress(AVAILABLE + 4 + n as u64 * 2)).unwrap();
    }
    memory.write_obj(heads.len() as u16, GuestAddress(AVAILABLE + 2)).unwrap();
    queue
}

fn one(table: &[Raw]) -> Result<(usize, usize), QueueError> {
    let memory = memory();
    write_table(&memory, TABLE, table);
    let chain = queue(&memory, &[0]).pop(&memory)?.expect("one chain is available");
    Ok((chain.readable.len(), chain.writable.len()))
}

const fn raw(address: u64, len: u32, flags: u16, next: u16) -> Raw {
    Raw { address, len, flags, next }
}

#[test]
fn a_chain_has_its_readable_and_writable_bytes() {
    let table = [raw(0x1000, 10, NEXT, 2), raw(0, 0, 0, 0), raw(0x1100, 20, NEXT | WRITE, 3), raw(0x1200, 5, WRITE, 0)];
    assert_eq!(one(&table).unwrap(), (10, 25));
}

#[test]
fn a_range_may_span_two_regions_but_not_a_hole() {
    assert_eq!(one(&[raw(0x1ff0, 0x20, 0, 0)]).unwrap(), (0x20, 0));
    for (address, len) in [(0x2ff0, 0x20), (0x4fff, 2), (0x5000, 1), (u64::MAX, 2), (0x3000, 1), (0x1000, u32::MAX)] {
        let result = one(&[raw(address, len, WRITE, 0)]);
        assert!(matches!(result, Err(QueueError::Address { .. })), "{address:#x} {len:#x}: {result:?}");
    }
}

#[test]
fn several_chains_are_completed_at_once_and_only_then_seen() {
    let memory = memory();
    let mut queue = queue(&memory, &[3, 1, 2]);
    queue.complete(&memory, 3, 7).unwrap();
    queue.complete_all(&memory, &[(1, 10), (2, 20)]).unwrap();
    let used = |at: u64| memory.read_obj::<u32>(GuestAddress(USED + at)).unwrap();
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 3);
    assert_eq!([used(4), used(8), used(12), used(16), used(20), used(24)], [3, 7, 1, 10, 2, 20]);
    // The ring goes round.
    queue.complete_all(&memory, &[(4, 1), (5, 1), (6, 1), (7, 1), (0, 1), (1, 99)]).unwrap();
    assert_eq!([used(4), used(8)], [1, 99]);
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 9);
    queue.complete(&memory, 2, 98).unwrap();
    assert_eq!([used(12), used(16)], [2, 98]);
}

#[test]
fn the_driver_is_interrupted_where_it_asked_for_it() {
    let memory = memory();
    let wants = |index: u16| memory.write_obj(index, GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
    let mut queue = queue(&memory, &[]);
    queue.registers_mut().set_event_idx(true);
    assert!(!queue.take_signal(&memory).unwrap(), "nothing was completed");
    // At the completion of number 0, 2, 5 and 20.
    wants(0);
    queue.complete(&memory, 0, 0).unwrap();
    assert!(queue.take_signal(&memory).unwrap());
    wants(2);
    queue.complete(&memory, 0, 0).unwrap();
    assert!(!queue.take_signal(&memory).unwrap(), "number 1");
    queue.complete_all(&memory, &[(0, 0), (0, 0)]).unwrap();
    assert!(queue.take_signal(&memory).unwrap(), "numbers 2 and 3");
    wants(5);
    queue.complete_quietly(&memory, 0, 0).unwrap();
    queue.complete_quietly(&memory, 0, 0).unwrap();
    assert!(!queue.take_signal(&memory).unwrap(), "quietly");
    queue.signal_completed();
    assert!(queue.take_signal(&memory).unwrap(), "numbers 4 and 5");
    wants(20);
    queue.complete_all(&memory, &[(0, 0); 8]).unwrap();
    assert!(!queue.take_signal(&memory).unwrap(), "numbers 6 to 13");
    queue.complete_all(&memory, &[(0, 0); 8]).unwrap();
    assert!(queue.take_signal(&memory).unwrap(), "numbers 14 to 21");
}

#[test]
fn malformed_chains_are_told_apart() {
    assert!(matches!(one(&[raw(0x1000, 1, NEXT, 0)]), Err(QueueError::Unterminated(0))), "a loop");
    assert!(matches!(one(&[raw(0x1000, 1, NEXT, SIZE)]), Err(QueueError::Unterminated(0))), "beyond the table");
    let mixed = [raw(0x1000, 1, NEXT | WRITE, 1), raw(0x1000, 1, 0, 0)];
    assert!(matches!(one(&mixed), Err(QueueError::Order(0))));
    assert!(matches!(one(&[raw(0x1000, 17, INDIRECT, 0)]), Err(QueueError::Unterminated(0))), "not whole descriptors");
    assert!(matches!(one(&[raw(0x1000, 0, INDIRECT, 0)]), Err(QueueError::Unterminated(0))), "an empty table");
}

#[test]
fn an_indirect_table_has_no_more_descriptors_than_the_queue() {
    for (count, fits) in [(SIZE, true), (SIZE + 1, false)] {
        let memory = memory();
        let table: Vec<_> = (1..=count).map(|n| raw(0x1000, 1, if n < count { NEXT } else { 0 }, n)).collect();
        write_table(&memory, 0xc00, &table);
        write_table(&memory, TABLE, &[raw(0xc00, u32::from(count) * 16, INDIRECT, 0)]);
        let mut queue = queue(&memory, &[0]);
        let popped = queue.pop(&memory).map(|chain| chain.map(|chain| chain.readable.len()));
        let again = queue.chain(&memory, 0).map(|chain| chain.readable.len());
        if fits {
            assert_eq!((popped.unwrap(), again.unwrap()), (Some(count.into()), count.into()));
        } else {
            assert!(matches!(popped, Err(QueueError::Descriptors { head: 0, size: SIZE })), "{popped:?}");
            assert!(matches!(again, Err(QueueError::Descriptors { head: 0, size: SIZE })), "{again:?}");
        }
    }
}

#[test]
fn a_zero_length_descriptor_is_nothing() {
    assert_eq!(one(&[raw(0x1000, 0, NEXT, 1), raw(0x1000, 3, WRITE, 0)]).unwrap(), (0, 3));
}

#[test]
fn an_available_index_that_ran_away_is_an_error() {
    let memory = memory();
    let mut queue = queue(&memory, &[0]);
    memory.write_obj(SIZE + 1, GuestAddress(AVAILABLE + 2)).unwrap();
    assert!(matches!(queue.pop(&memory), Err(QueueError::Ring(_))));
}

#[test]
fn what_is_put_back_comes_again() {
    let memory = memory();
    write_table(&memory, TABLE, &[raw(0x1000, 1, 0, 0), raw(0x1000, 2, 0, 0)]);
    let mut queue = queue(&memory, &[0, 1]);
    assert_eq!(queue.pop(&memory).unwrap().unwrap().head, 0);
    queue.unpop();
    assert_eq!(queue.pop(&memory).unwrap().unwrap().head, 0);
    assert_eq!(queue.pop(&memory).unwrap().unwrap().head, 1);
    assert!(queue.pop(&memory).unwrap().is_none());
}

#[test]
fn with_event_index_the_driver_is_interrupted_when_it_asked_for_it() {
    let memory = memory();
    write_table(&memory, TABLE, &[raw(0x1000, 1, 0, 0)]);
    let mut queue = queue(&memory, &[0, 0, 0]);
    queue.registers_mut().set_event_idx(true);
    assert!(!queue.take_signal(&memory).unwrap(), "nothing completed");
    // used_event: tell me when the second is done.
    memory.write_obj(1u16, GuestAddress(AVAILABLE + 4 + u64::from(SIZE) * 2)).unwrap();
    queue.complete(&memory, 0, 0).unwrap();
    assert!(!queue.take_signal(&memory).unwrap());
    queue.complete(&memory, 0, 0).unwrap();
    assert!(queue.take_signal(&memory).unwrap());
    assert!(!queue.take_signal(&memory).unwrap(), "once");
}

fn descriptor() -> impl Strategy<Value = Raw> {
    let address = prop_oneof![
        4 => 0x1000u64..0x1f00,
        2 => Just(0xc00),
        1 => 0x1ff0u64..0x2010,
        1 => 0x2fe0u64..0x3010,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0u32..64, 2 => (0u32..6).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![6 => Just(NEXT), 3 => Just(NEXT | WRITE), 3 => Just(WRITE), 2 => Just(0), 2 => Just(INDIRECT), 1 => 0u16..8];
    (address, len, flags, 0..SIZE + 1).prop_map(|(address, len, flags, next)| raw(address, len, flags, next))
}

fn lies_in_memory(memory: &GuestMemory, pointer: *const u8, len: usize) -> bool {
    memory.iter().any(|region| {
        let start = region.as_ptr() as usize;
        let at = pointer as usize;
        at >= start && at + len <= start + region.len() as usize
    })
}

/// Address in this process and length of each piece.
fn pieces(buffers: &Buffers) -> Vec<(*const u8, usize)> {
    buffers.pieces().map(|slice| (slice.ptr_guard().as_ptr(), slice.len())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_the_rings_hold_chains_are_in_memory_and_end(
        table in proptest::collection::vec(descriptor(), SIZE as usize),
        indirect in proptest::collection::vec(descriptor(), 6),
        heads in proptest::collection::vec(0..SIZE + 1, 0..=SIZE as usize),
    ) {
        let memory = memory();
        write_table(&memory, TABLE, &table);
        write_table(&memory, 0xc00, &indirect);
        let mut queue = queue(&memory, &heads);
        for _ in 0..=heads.len() {
            let Ok(Some(chain)) = queue.pop(&memory) else { break };
            for (pointer, len) in pieces(&chain.readable).into_iter().chain(pieces(&chain.writable)) {
                prop_assert!(len > 0 && lies_in_memory(&memory, pointer, len));
            }
            // Walking it again finds the same.
            let again = queue.chain(&memory, chain.head).unwrap();
            prop_assert_eq!(pieces(&again.readable), pieces(&chain.readable));
            prop_assert_eq!(pieces(&again.writable), pieces(&chain.writable));
            queue.complete(&memory, chain.head, 0).unwrap();
        }
        prop_assert!(queue.take_signal(&memory).is_ok());
    }

    #[test]
    fn arbitrary_bytes_in_all_of_memory_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0x1000), available in 0u16..20) {
        let memory = memory();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut queue = queue(&memory, &[]);
        memory.write_obj(available, GuestAddress(AVAILABLE + 2)).unwrap();
        for _ in 0..SIZE {
            let Ok(Some(chain)) = queue.pop(&memory) else { break };
            let _ = queue.chain(&memory, chain.head);
            let _ = queue.complete(&memory, chain.head, u32::MAX);
            let _ = queue.enable_notification(&memory);
        }
    }
}
