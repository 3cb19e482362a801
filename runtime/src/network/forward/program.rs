//! The BPF program that the kernel asks in the pod's network namespace which socket a new connection goes to; pure.
//!
//! ```text
//!   not TCP                          ──► as without it
//!   IPv4, to 127.0.0.0/8             ──► the socket at 0 in the map
//!   IPv6, to ::1                     ──► the socket at 1
//!   anything else                    ──► as without it
//! ```
//!
//! Where the map has no socket, all is as without the program, too.

use std::os::fd::RawFd;

/// The map's place of the socket for IPv4.
pub(super) const IPV4: u32 = 0;
/// The map's place of the socket for IPv6.
pub(super) const IPV6: u32 = 1;

/// `struct bpf_insn` of include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate }
}

// Registers: 0 is what a call gives and the program's answer, 1 to 5 are a call's arguments, 6 to 9 survive it, 10 is the stack's end.
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const STACK: u8 = 10;

// include/uapi/linux/bpf.h and bpf_common.h.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const STORE_WORD: u8 = 0x62; // BPF_ST | BPF_MEM | BPF_W
const LOAD_CONSTANT: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW, two instructions long
const MAP_DESCRIPTOR: u8 = 1; // BPF_PSEUDO_MAP_FD, in place of a source
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const MOVE_REGISTER: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const ADD: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
const AND: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
const JUMP: u8 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

// enum bpf_func_id.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

// Offsets in struct bpf_sk_lookup. Addresses are in network byte order, so on this little-endian machine the first byte is the lowest.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// Where the map's place lies on the stack.
const PLACE: i16 = -4;

/// The kernel goes on, with the socket that was assigned, or without.
const SK_PASS: i32 = 1;
/// The first byte of 127.0.0.0/8.
const LOOPBACK: i32 = 127;
/// The last word of ::1.
const ONE: i32 = 1i32.to_be();

/// A place that jumps go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Label {
    Ipv4,
    Select,
    Pass,
}

/// A line of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Do(Instruction),
    /// Jump there if the register and the number are so (code).
    Jump(u8, u8, i32, Label),
    Place(Label),
}

/// The program, for the map with this descriptor.
pub(super) fn program(map: RawFd) -> Vec<Instruction> {
    let load = |offset| Line::Do(instruction(LOAD_WORD, 2, CONTEXT, offset, 0));
    let place = |number: u32| Line::Do(instruction(STORE_WORD, STACK, 0, PLACE, number as i32));
    let copy = |to, from| Line::Do(instruction(MOVE_REGISTER, to, from, 0, 0));
    let call = |function| Line::Do(instruction(CALL, 0, 0, 0, function));
    let unless = |value| Line::Jump(JUMP_NOT_EQUAL, 2, value, Label::Pass);
    assemble(&[
        copy(CONTEXT, 1),
        load(PROTOCOL),
        unless(libc::IPPROTO_TCP),
        load(FAMILY),
        Line::Jump(JUMP_EQUAL, 2, libc::AF_INET, Label::Ipv4),
        unless(libc::AF_INET6),
        load(LOCAL_IP6),
        unless(0),
        load(LOCAL_IP6 + 4),
        unless(0),
        load(LOCAL_IP6 + 8),
        unless(0),
        load(LOCAL_IP6 + 12),
        unless(ONE),
        place(IPV6),
        Line::Jump(JUMP, 0, 0, Label::Select),
        Line::Place(Label::Ipv4),
        load(LOCAL_IP4),
        Line::Do(instruction(AND, 2, 0, 0, 0xff)),
        unless(LOOPBACK),
        place(IPV4),
        Line::Place(Label::Select),
        Line::Do(instruction(LOAD_CONSTANT, 1, MAP_DESCRIPTOR, 0, map)),
        Line::Do(instruction(0, 0, 0, 0, 0)),
        copy(2, STACK),
        Line::Do(instruction(ADD, 2, 0, 0, PLACE.into())),
        call(MAP_LOOKUP_ELEM),
        Line::Jump(JUMP_EQUAL, 0, 0, Label::Pass),
        copy(SOCKET, 0),
        copy(1, CONTEXT),
        copy(2, SOCKET),
        Line::Do(instruction(MOVE, 3, 0, 0, 0)),
        // If it fails the connection goes where it would have gone without.
        call(SK_ASSIGN),
        copy(1, SOCKET),
        call(SK_RELEASE),
        Line::Place(Label::Pass),
        Line::Do(instruction(MOVE, 0, 0, 0, SK_PASS)),
        Line::Do(instruction(EXIT, 0, 0, 0, 0)),
    ])
}

/// Makes distances of labels.
fn assemble(lines: &[Line]) -> Vec<Instruction> {
    let is_place = |line: &&Line| matches!(line, Line::Place(_));
    let mut program = Vec::with_capacity(lines.len());
    for line in lines {
        match *line {
            Line::Place(_) => {}
            Line::Do(instruction) => program.push(instruction),
            Line::Jump(code, register, value, label) => {
                let before = lines.iter().take_while(|line| **line != Line::Place(label));
                let target = before.filter(|line| !is_place(line)).count();
                // From the instruction behind this one. The program is short.
                let distance = target.saturating_sub(program.len() + 1) as i16;
                program.push(instruction(code, register, 0, distance, value));
            }
        }
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_go_forward_to_their_labels() {
        let done = |number| instruction(MOVE, 0, 0, 0, number);
        let lines = [
            Line::Jump(JUMP, 0, 0, Label::Pass),
            Line::Do(done(1)),
            Line::Jump(JUMP_EQUAL, 2, 7, Label::Select),
            Line::Place(Label::Select),
            Line::Do(done(2)),
            Line::Place(Label::Pass),
            Line::Do(done(3)),
        ];
        let expected = [instruction(JUMP, 0, 0, 3, 0), done(1), instruction(JUMP_EQUAL, 2, 0, 0, 7), done(2), done(3)];
        assert_eq!(assemble(&lines), expected);
    }

    /// What the kernel makes of the program for one connection: the map's place that it takes the socket from. Addresses are in the
    /// words that the kernel shows, IPv4 in the first.
    fn place(protocol: i32, family: i32, address: [u32; 4]) -> Option<u32> {
        let program = program(3);
        let (mut registers, mut at, mut stacked) = ([0i64; 11], 0usize, 0);
        let context = |offset: i16| match offset {
            FAMILY => family as u32,
            PROTOCOL => protocol as u32,
            LOCAL_IP4 => address[0],
            offset => address[usize::try_from(offset - LOCAL_IP6).unwrap() / 4],
        };
        loop {
            let i = program[at];
            at += 1;
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let jump = usize::try_from(i.offset).unwrap_or(0);
            match i.code {
                LOAD_WORD => registers[to] = context(i.offset).into(),
                STORE_WORD => stacked = i.immediate as u32,
                MOVE => registers[to] = i.immediate.into(),
                MOVE_REGISTER => registers[to] = registers[from],
                ADD => registers[to] += i64::from(i.immediate),
                AND => registers[to] &= i64::from(i.immediate),
                JUMP => at += jump,
                JUMP_EQUAL if registers[to] == i64::from(i.immediate) => at += jump,
                JUMP_NOT_EQUAL if registers[to] != i64::from(i.immediate) => at += jump,
                JUMP_EQUAL | JUMP_NOT_EQUAL => {}
                LOAD_CONSTANT => at += 1,
                CALL if i.immediate == MAP_LOOKUP_ELEM => return Some(stacked),
                EXIT => return None,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn tcp_to_loopback_and_nothing_else_is_taken() {
        let v4 = |protocol, address: [u8; 4]| place(protocol, libc::AF_INET, [u32::from_ne_bytes(address), 0, 0, 0]);
        let v6 = |protocol, address: &str| {
            let octets = address.parse::<std::net::Ipv6Addr>().unwrap().octets();
            let word = |at: usize| u32::from_ne_bytes(octets[at..at + 4].try_into().unwrap());
            place(protocol, libc::AF_INET6, [word(0), word(4), word(8), word(12)])
        };
        assert_eq!(v4(libc::IPPROTO_TCP, [127, 0, 0, 1]), Some(IPV4));
        assert_eq!(v4(libc::IPPROTO_TCP, [127, 255, 255, 254]), Some(IPV4));
        assert_eq!(v6(libc::IPPROTO_TCP, "::1"), Some(IPV6));
        for address in [[128, 0, 0, 1], [10, 0, 0, 127], [0, 0, 0, 127], [126, 255, 255, 255]] {
            assert_eq!(v4(libc::IPPROTO_TCP, address), None, "{address:?}");
        }
        for address in ["::", "::2", "1::1", "0:0:1::1", "::1:0:1", "::1:0:0:1", "::100", "::ffff:127.0.0.1", "fe80::1"]
        {
            assert_eq!(v6(libc::IPPROTO_TCP, address), None, "{address}");
        }
        assert_eq!(v4(libc::IPPROTO_UDP, [127, 0, 0, 1]), None);
        assert_eq!(v6(libc::IPPROTO_UDP, "::1"), None);
        assert_eq!(place(libc::IPPROTO_TCP, libc::AF_VSOCK, [u32::from_ne_bytes([127, 0, 0, 1]); 4]), None);
    }
}
