//! Where things lie in the guest's physical address space.
//!
//! ```text
//!        0 ┌───────────────────────┐
//!          │ RAM: GDT, zero page,  │  what the boot protocol needs, below 640 KiB
//!          │ page tables, cmdline  │
//!  0x9fc00 ├───────────────────────┤
//!          │ MP table (1 KiB)      │  reserved in the memory map
//!  0xa0000 ├───────────────────────┤
//!          │ not in the memory map │
//!    1 MiB ├───────────────────────┤
//!          │ RAM: kernel … initramfs (at the end)
//!    3 GiB ├───────────────────────┤  or the end of RAM
//!          │ devices: virtio-mmio, IOAPIC, local APIC
//!    4 GiB ├───────────────────────┤
//!          │ the rest of RAM       │
//!          └───────────────────────┘
//! ```

use caisson_protos::guest::MAX_SLOTS;
use vm_memory::GuestAddress;

/// The page size of host and guest, bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Boot GDT.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `struct boot_params`, the "zero page".
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Boot page tables: three pages.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// The Intel MP table, in the last KiB of base memory, where every kernel looks for it.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// End of base memory; the MP table must end here.
pub const BASE_MEMORY_END: GuestAddress = GuestAddress(0xa_0000);
/// Where RAM begins again and a kernel may lie.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// Up to here the boot page tables map memory one to one; the kernel must lie below.
pub const IDENTITY_MAP_END: GuestAddress = GuestAddress(1 << 30);

/// RAM that does not fit below is moved to [`MMIO_GAP_END`].
pub const MMIO_GAP_START: GuestAddress = GuestAddress(3 << 30);
/// First address after the gap.
pub const MMIO_GAP_END: GuestAddress = GuestAddress(4 << 30);

/// The first virtio-mmio slot; each takes one page.
pub const VIRTIO_MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// The IOAPIC, where KVM has it.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC, where KVM has it.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs for itself on Intel processors; above them is only the firmware's place, which we have not.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The serial port's interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// The interrupts of virtio devices, in order: IOAPIC pins that no legacy device (timer, keyboard, cascade, serial
/// ports, clock, coprocessor) claims.
pub const VIRTIO_IRQS: [u32; MAX_SLOTS as usize] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
