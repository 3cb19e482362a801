//! The Intel MP table (MultiProcessor Specification 1.4): processors, the IOAPIC and which interrupt is on which of its
//! pins. It is all that a kernel without ACPI needs to bring up its processors and interrupts, and it is 1 KiB.

use crate::layout::{BASE_MEMORY_END, IOAPIC, LOCAL_APIC, MP_TABLE};

/// Pins of KVM's IOAPIC.
const PINS: u8 = 24;
/// APIC version of both kinds, as KVM's are.
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;

const FLOATING_POINTER: usize = 16;
const HEADER: usize = 44;

/// Entry types.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt kinds.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// The table for processors with APIC ids 0 to `processors - 1`, to be written to [`MP_TABLE`].
pub fn build(processors: u8) -> Vec<u8> {
    let io_apic_id = processors;
    let mut entries = Vec::new();
    for id in 0..processors {
        let bootstrap = if id == 0 { 0b10 } else { 0 };
        // Signature and features are not read by anybody who has CPUID.
        entries.extend([PROCESSOR, id, APIC_VERSION, 0b01 | bootstrap]);
        entries.extend([0; 16]);
    }
    entries.extend([BUS, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([IO_APIC, io_apic_id, APIC_VERSION, 1]);
    entries.extend(IOAPIC.to_le_bytes());
    for pin in 0..PINS {
        // Polarity and trigger as the bus has them: ISA is active high, edge.
        entries.extend([IO_INTERRUPT, INT, 0, 0, ISA_BUS, pin, io_apic_id, pin]);
    }
    for (kind, pin) in [(EXT_INT, 0), (NMI, 1)] {
        entries.extend([LOCAL_INTERRUPT, kind, 0, 0, ISA_BUS, 0, 0xff, pin]);
    }
    let count = u16::from(processors) + 1 + 1 + u16::from(PINS) + 2;

    let mut table = Vec::with_capacity((BASE_MEMORY_END.0 - MP_TABLE.0) as usize);
    table.extend(b"_MP_");
    table.extend((MP_TABLE.0 as u32 + FLOATING_POINTER as u32).to_le_bytes());
    // Length in 16-byte units, version 1.4, checksum, features: a table follows, no IMCR.
    table.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    table.extend(b"PCMP");
    table.extend(((HEADER + entries.len()) as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"CAISSON MICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    checksum(&mut table, 0, FLOATING_POINTER, 10);
    let len = table.len();
    checksum(&mut table, FLOATING_POINTER, len, FLOATING_POINTER + 7);
    table
}

/// Sets the byte `at` so that all bytes from `from` to `to` sum up to 0.
fn checksum(table: &mut [u8], from: usize, to: usize, at: usize) {
    let sum = table.get(from..to).unwrap_or_default().iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = table.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_largest_machine_fits_and_sums_up() {
        let table = build(32);
        assert!(table.len() <= (BASE_MEMORY_END.0 - MP_TABLE.0) as usize, "{}", table.len());
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum(&table[..16]), 0);
        assert_eq!(sum(&table[16..]), 0);
        assert_eq!(usize::from(u16::from_le_bytes([table[20], table[21]])), table.len() - 16);
    }

    #[test]
    fn entries_are_as_many_as_the_header_says() {
        let table = build(3);
        let count = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
        let (mut at, mut seen) = (16 + HEADER, 0);
        while at < table.len() {
            at += if table[at] == PROCESSOR { 20 } else { 8 };
            seen += 1;
        }
        assert_eq!((at, seen), (table.len(), count));
    }
}
