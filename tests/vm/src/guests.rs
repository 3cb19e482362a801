//! Guests of a few instructions. Each begins in 64-bit mode with the first GiB mapped one to one, rsi at the zero page, and
//! no stack, no interrupts and no exception handlers: the first exception is a triple fault.

use std::arch::global_asm;

/// Declares guest code: position independent, as the assembler's text.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident, $start:ident, $end:ident, $($line:literal),+ $(,)?) => {
        global_asm!(
            ".pushsection .rodata",
            concat!(".global ", stringify!($start)),
            concat!(stringify!($start), ":"),
            $($line,)+
            concat!(".global ", stringify!($end)),
            concat!(stringify!($end), ":"),
            ".popsection",
        );

        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both labels stand in this order in one read-only section, with the code between them.
            unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        }
    };
}

guest!(
    /// Powers off.
    power_off, caisson_guest_power_off, caisson_guest_power_off_end,
    "mov dx, 0x510", "mov al, 1", "out dx, al", "9: hlt", "jmp 9b",
);
guest!(
    /// Resets through the keyboard controller.
    keyboard_reset, caisson_guest_keyboard, caisson_guest_keyboard_end,
    "1: in al, 0x64", "test al, 2", "jnz 1b", "mov al, 0xfe", "out 0x64, al", "9: hlt", "jmp 9b",
);
guest!(
    /// Resets through port 0xcf9, as Linux does: announce, then do.
    port_reset, caisson_guest_cf9, caisson_guest_cf9_end,
    "mov dx, 0xcf9", "mov al, 2", "out dx, al", "mov al, 6", "out dx, al", "9: hlt", "jmp 9b",
);
guest!(
    /// An exception without a handler.
    triple_fault, caisson_guest_triple, caisson_guest_triple_end,
    "ud2",
);
guest!(
    /// Runs in a circle.
    spin, caisson_guest_spin, caisson_guest_spin_end,
    "1: pause", "jmp 1b",
);
guest!(
    /// Executes what is not RAM and not a device: KVM must emulate an instruction that it cannot fetch.
    jump_into_nothing, caisson_guest_nothing, caisson_guest_nothing_end,
    // Map 3 GiB one to one through the third page table page, then go there.
    "mov rax, 0xc0000083", "mov [0xb000], rax", "mov rax, cr3", "mov cr3, rax", "xor eax, eax", "jmp rax",
);
guest!(
    /// Writes "ok\n" to the serial port for ever.
    chatter, caisson_guest_chatter, caisson_guest_chatter_end,
    "mov dx, 0x3f8", "1: mov al, 0x6f", "out dx, al", "mov al, 0x6b", "out dx, al", "mov al, 10", "out dx, al", "jmp 1b",
);
guest!(
    /// Prints the command line from the zero page, then powers off.
    print_command_line, caisson_guest_cmdline, caisson_guest_cmdline_end,
    "mov esi, [rsi + 0x228]", "mov dx, 0x3f8",
    "1: mov al, [rsi]", "test al, al", "jz 2f", "out dx, al", "inc rsi", "jmp 1b",
    "2: mov al, 10", "out dx, al", "mov dx, 0x510", "mov al, 1", "out dx, al", "9: hlt", "jmp 9b",
);
guest!(
    /// Prints the bytes of the initramfs, then powers off.
    print_initramfs, caisson_guest_initramfs, caisson_guest_initramfs_end,
    "mov ecx, [rsi + 0x21c]", "mov esi, [rsi + 0x218]", "mov dx, 0x3f8",
    "1: test ecx, ecx", "jz 2f", "mov al, [rsi]", "out dx, al", "inc rsi", "dec ecx", "jmp 1b",
    "2: mov dx, 0x510", "mov al, 1", "out dx, al", "9: hlt", "jmp 9b",
);
guest!(
    /// Changes its own first bytes in memory and powers off: the kernel file must not change.
    write_own_code, caisson_guest_own, caisson_guest_own_end,
    "mov rax, 0xdeadbeefdeadbeef", "mov [0x100000], rax", "mov dx, 0x510", "mov al, 1", "out dx, al", "9: hlt", "jmp 9b",
);
guest!(
    /// Writes half a million random bytes, words and double words to random places in the first 16 device pages, reads some
    /// back, and powers off. The devices' registers are the upper quarter of the fourth GiB, so they get mapped first.
    scribble_registers, caisson_guest_scribble, caisson_guest_scribble_end,
    // A 2 MiB page for 0xd0000000 in place of the second 2 MiB of RAM.
    "mov rax, 0xd0000083", "mov [0xb008], rax", "mov rax, cr3", "mov cr3, rax",
    "mov r8, 0x9e3779b97f4a7c15", "mov r9d, 20000",
    "1:",
    // xorshift64
    "mov rax, r8", "shl rax, 13", "xor r8, rax", "mov rax, r8", "shr rax, 7", "xor r8, rax",
    "mov rax, r8", "shl rax, 17", "xor r8, rax",
    // A place: page from bits 0..4, offset below 0x200 from bits 8..17.
    "mov rbx, r8", "and ebx, 0xf000", "mov rcx, r8", "shr rcx, 20", "and ecx, 0x1ff", "add rbx, rcx", "add rbx, 0x200000",
    // A value: mostly small.
    "mov rdx, r8", "shr rdx, 32", "bt r8, 30", "jc 2f", "and edx, 0xf",
    "2:",
    // Mostly aligned double words, which is what registers take.
    "bt r8, 31", "jc 3f", "and rbx, -4", "mov [rbx], edx", "mov eax, [rbx]", "jmp 5f",
    "3: bt r8, 29", "jc 4f", "mov [rbx], dx", "mov ax, [rbx]", "jmp 5f",
    "4: mov [rbx], dl", "mov rax, [rbx]",
    "5: dec r9d", "jnz 1b",
    "mov dx, 0x510", "mov al, 1", "out dx, al", "9: hlt", "jmp 9b",
);
guest!(
    /// The same in the first 16 device pages without an end, double words only.
    scribble_registers_for_ever, caisson_guest_scribble_ever, caisson_guest_scribble_ever_end,
    "mov rax, 0xd0000083", "mov [0xb008], rax", "mov rax, cr3", "mov cr3, rax",
    "mov r8, 0x9e3779b97f4a7c15",
    "1:",
    "mov rax, r8", "shl rax, 13", "xor r8, rax", "mov rax, r8", "shr rax, 7", "xor r8, rax",
    "mov rax, r8", "shl rax, 17", "xor r8, rax",
    "mov rbx, r8", "and ebx, 0xf000", "mov rcx, r8", "shr rcx, 20", "and ecx, 0x1fc", "add rbx, rcx", "add rbx, 0x200000",
    "mov rdx, r8", "shr rdx, 32", "and edx, 0xf",
    "mov [rbx], edx", "mov eax, [rbx]",
    "jmp 1b",
);
guest!(
    /// Writes random values to all ports that do not end the machine, reads them all, then powers off.
    scribble_ports, caisson_guest_ports, caisson_guest_ports_end,
    "mov r8, 0x9e3779b97f4a7c15", "xor r9d, r9d",
    "1:",
    "mov rax, r8", "shl rax, 13", "xor r8, rax", "mov rax, r8", "shr rax, 7", "xor r8, rax",
    "mov rax, r8", "shl rax, 17", "xor r8, rax",
    "mov edx, r9d", "in al, dx", "in ax, dx", "in eax, dx",
    "cmp edx, 0x64", "je 2f", "cmp edx, 0xcf9", "je 2f", "cmp edx, 0x510", "je 2f",
    "mov rax, r8", "out dx, al", "out dx, ax", "out dx, eax",
    "2: inc r9d", "cmp r9d, 0x2000", "jb 1b",
    "mov dx, 0x510", "mov al, 1", "out dx, al", "9: hlt", "jmp 9b",
);
