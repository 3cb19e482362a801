//! What a guest reads with CPUID: what KVM supports on this host, with the machine's own topology (one socket, one
//! thread per core) and without what a pod must not have. Pure.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX.
mod leaf1_ecx {
    pub const VMX: u32 = 1 << 5;
    /// The MSR that says what the performance counters can do.
    pub const PDCM: u32 = 1 << 15;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
}
/// Leaf 0x80000007, EDX: the TSC runs at one rate in all states of the processor.
const INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 1, EDX: more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX: nested virtualization, the legacy multi-core bit, performance counters.
mod leaf_ext1_ecx {
    pub const CMP_LEGACY: u32 = 1 << 1;
    pub const SVM: u32 = 1 << 2;
    /// Of cores, of the north bridge, of the last-level cache.
    pub const COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
}
/// Leaf 0, EBX, EDX and ECX: the vendors whose processors number their cores in the extended leaves.
const AMD: [&[u8; 12]; 2] = [b"AuthenticAMD", b"HygonGenuine"];

/// What differs from one vCPU to another and from one machine to another.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// This vCPU's number, which is its APIC id.
    pub id: u8,
    /// vCPUs in all, 1 to 32.
    pub count: u8,
}

impl Topology {
    /// Bits of an APIC id that number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }
}

/// What the guest may keep its time by.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// KVM's local APIC has the TSC deadline mode.
    pub tsc_deadline: bool,
    /// A processor that says that its TSC is invariant may say so to the guest. Linux then prefers the TSC to kvm-clock,
    /// which is wrong where the host itself has given the TSC up.
    pub invariant_tsc: bool,
}

/// Turns what KVM supports into what one vCPU shows.
pub fn entries(supported: &[kvm_cpuid_entry2], topology: Topology, clocks: Clocks) -> Vec<kvm_cpuid_entry2> {
    let max_leaf = supported.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    let (id, count) = (u32::from(topology.id), u32::from(topology.count));
    let amd = supported.iter().any(|entry| entry.function == 0 && AMD.iter().any(|vendor| **vendor == name(entry)));
    let mut entries: Vec<_> = supported
        .iter()
        // Topology leaves are made below; Linux falls back from 0x1f to 0xb.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .map(|entry| {
            let mut entry = *entry;
            match entry.function {
                0x1 => {
                    entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | id << 24;
                    entry.ecx &= !(leaf1_ecx::VMX | leaf1_ecx::PDCM);
                    entry.ecx |= leaf1_ecx::HYPERVISOR;
                    if clocks.tsc_deadline {
                        entry.ecx |= leaf1_ecx::TSC_DEADLINE;
                    }
                    set(&mut entry.edx, HTT, count > 1);
                }
                // Intel's caches: the last one is shared by all cores, the others by nobody.
                0x4 if entry.eax & 0x1f != 0 => {
                    let shared = if entry.eax >> 5 & 7 >= 3 { cores_field(topology) } else { 0 };
                    entry.eax = entry.eax & 0x3fff | shared << 14 | cores_field(topology) << 26;
                }
                // No performance counters, Intel's and AMD's: they would leak what other guests do, and cost exits. They
                // are disabled in KVM as well (crate::kvm), where it can do that; AMD's first four counters have no bit here.
                0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
                0x8000_0001 => {
                    entry.ecx &= !(leaf_ext1_ecx::SVM | leaf_ext1_ecx::COUNTERS);
                    // Reserved on Intel, where Linux would take it for one that has no siblings.
                    set(&mut entry.ecx, leaf_ext1_ecx::CMP_LEGACY, amd && count > 1);
                }
                0x8000_0007 if !clocks.invariant_tsc => entry.edx &= !INVARIANT_TSC,
                0x8000_0008 => entry.ecx = if amd { topology.core_bits() << 12 | (count - 1) } else { 0 },
                // Nested virtualization again: revision and features.
                0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
                // AMD's caches: the last one is shared by all cores.
                0x8000_001d => {
                    let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                    entry.eax = entry.eax & 0x3fff | shared << 14;
                }
                0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
                _ => {}
            }
            entry
        })
        .collect();
    if max_leaf >= 0xb {
        let level = |index, shift, processors, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: index | kind << 8,
            edx: id,
            ..Default::default()
        };
        // Threads, cores, the end.
        entries.extend([level(0, 0, 1, 1), level(1, topology.core_bits(), count, 2), level(2, 0, 0, 0)]);
    }
    entries
}

/// The vendor's name in leaf 0.
fn name(entry: &kvm_cpuid_entry2) -> [u8; 12] {
    let mut name = [0; 12];
    let bytes = [entry.ebx, entry.edx, entry.ecx].into_iter().flat_map(u32::to_le_bytes);
    name.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    name
}

/// Leaf 4 counts cores in the size of the id space, less one.
fn cores_field(topology: Topology) -> u32 {
    (1 << topology.core_bits()) - 1
}

fn set(register: &mut u32, bit: u32, value: bool) {
    *register = if value { *register | bit } else { *register & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCKS: Clocks = Clocks { tsc_deadline: true, invariant_tsc: true };

    fn supported() -> Vec<kvm_cpuid_entry2> {
        supported_by(b"AuthenticAMD")
    }

    fn supported_by(vendor: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
        let entry = |function, eax, ecx| kvm_cpuid_entry2 { function, eax, ecx, ..Default::default() };
        let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        vec![
            kvm_cpuid_entry2 { ebx: word(0), edx: word(4), ..entry(0, 0xd, word(8)) },
            entry(1, 0, 1 << 5 | 1 << 15 | 1 << 21),
            entry(0xa, 0x0730_0402, 0),
            entry(0xb, 0, 0),
            entry(0x4000_0000, 0x4000_0001, 0),
            entry(0x8000_0001, 0, 1 << 2 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 28),
            kvm_cpuid_entry2 { edx: 1 << 8, ..entry(0x8000_0007, 0, 0) },
            entry(0x8000_0008, 0, 0),
            entry(0x8000_0022, 1, 0),
        ]
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = entries.iter().filter(|e| e.function == function && e.index == index).collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        *found[0]
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        for id in 0..5 {
            let entries = entries(&supported(), Topology { id, count: 5 }, CLOCKS);
            assert_eq!(find(&entries, 1, 0).ebx >> 24, u32::from(id));
            assert_eq!(find(&entries, 0xb, 1).edx, u32::from(id));
            // Five cores take three bits.
            assert_eq!(find(&entries, 0xb, 1).eax, 3);
            assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 3 << 12 | 4);
        }
    }

    #[test]
    fn there_are_no_performance_counters() {
        for vendor in [b"AuthenticAMD", b"GenuineIntel"] {
            let entries = entries(&supported_by(vendor), Topology { id: 0, count: 2 }, CLOCKS);
            assert_eq!(find(&entries, 1, 0).ecx & 1 << 15, 0);
            assert_eq!(find(&entries, 0xa, 0).eax, 0);
            assert_eq!(find(&entries, 0x8000_0001, 0).ecx & !2, 1 << 22);
            assert_eq!(find(&entries, 0x8000_0022, 0).eax, 0);
        }
    }

    #[test]
    fn only_amd_numbers_cores_in_extended_leaves() {
        for (vendor, legacy, cores) in
            [(b"AuthenticAMD", 2, 2 << 12 | 2), (b"HygonGenuine", 2, 2 << 12 | 2), (b"GenuineIntel", 0, 0)]
        {
            let entries = entries(&supported_by(vendor), Topology { id: 0, count: 3 }, CLOCKS);
            assert_eq!(find(&entries, 0x8000_0001, 0).ecx & 2, legacy);
            assert_eq!(find(&entries, 0x8000_0008, 0).ecx, cores);
        }
    }

    #[test]
    fn the_tsc_is_called_invariant_where_the_host_relies_on_it() {
        for invariant_tsc in [false, true] {
            let entries =
                entries(&supported(), Topology { id: 0, count: 1 }, Clocks { tsc_deadline: true, invariant_tsc });
            assert_eq!(find(&entries, 0x8000_0007, 0).edx & 1 << 8 != 0, invariant_tsc);
        }
    }

    #[test]
    fn the_guest_sees_a_hypervisor_but_has_none_to_offer() {
        let entries = entries(&supported(), Topology { id: 0, count: 1 }, CLOCKS);
        let ecx = find(&entries, 1, 0).ecx;
        assert_eq!(ecx & (1 << 31 | 1 << 24 | 1 << 21), 1 << 31 | 1 << 24 | 1 << 21);
        assert_eq!(ecx & 1 << 5, 0);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & 1 << 2, 0);
        assert_eq!(find(&entries, 0x4000_0000, 0).eax, 0x4000_0001);
    }
}
