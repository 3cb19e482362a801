//! Classic BPF, written from its end: it only jumps forward, so the targets of a jump are there before the jump.

use std::collections::HashMap;

use super::{Comparison, Condition, Instruction};

/// Offsets in `struct seccomp_data` of include/uapi/linux/seccomp.h: int nr; u32 arch; u64 ip; `u64 args[6]`.
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCH: u32 = 4;
const ARGS: u32 = 16;

// include/uapi/linux/bpf_common.h.
pub(super) const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
pub(super) const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
pub(super) const RETURN: u16 = 0x06; // BPF_RET | BPF_K
pub(super) const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
pub(super) const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
pub(super) const JUMP_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
pub(super) const JUMP_GREATER_OR_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K

/// How far a conditional jump may skip, less one: when both of its targets are too far, making the second nearer pushes
/// the first away.
const REACH: usize = u8::MAX as usize - 1;

/// A place in the program: how many instructions there were when it was made, so counted from the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label(usize);

/// A program in the making.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    reversed: Vec<Instruction>,
    /// Where each value was last returned.
    returns: HashMap<u32, Label>,
}

impl Assembler {
    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Label {
        self.reversed.push(Instruction { code, jt, jf, k });
        Label(self.reversed.len())
    }

    /// The finished program, which begins with what was written last.
    pub fn finish(mut self) -> Vec<Instruction> {
        self.reversed.reverse();
        self.reversed
    }

    pub fn ret(&mut self, value: u32) -> Label {
        let label = self.push(RETURN, 0, 0, value);
        self.returns.insert(value, label);
        label
    }

    /// How many instructions one that is written now would skip to reach `target`.
    fn distance(&self, target: Label) -> usize {
        self.reversed.len().saturating_sub(target.0)
    }

    /// Something near that does what `target` does: a copy of it if it ends the program, a long jump otherwise.
    fn nearer(&mut self, target: Label) -> Label {
        match target.0.checked_sub(1).and_then(|place| self.reversed.get(place)).copied() {
            Some(end) if end.code == RETURN => match self.returns.get(&end.k) {
                Some(copy) if self.distance(*copy) < REACH => *copy,
                _ => self.ret(end.k),
            },
            // A program that the kernel takes has 4096 instructions; `compile` checks that.
            _ => self.push(JUMP, 0, 0, u32::try_from(self.distance(target)).unwrap_or(u32::MAX)),
        }
    }

    /// A conditional jump.
    pub fn jump(&mut self, code: u16, k: u32, mut yes: Label, mut no: Label) -> Label {
        if yes == no {
            return yes;
        }
        if self.distance(yes) > REACH {
            yes = self.nearer(yes);
        }
        if self.distance(no) > REACH {
            no = self.nearer(no);
        }
        let offset = |target| u8::try_from(self.distance(target)).unwrap_or(u8::MAX);
        self.push(code, offset(yes), offset(no), k)
    }

    /// An instruction after which the program goes on at `next`.
    pub fn then(&mut self, code: u16, k: u32, next: Label) -> Label {
        if self.distance(next) > 0 {
            let skipped = u32::try_from(self.distance(next)).unwrap_or(u32::MAX);
            self.push(JUMP, 0, 0, skipped);
        }
        self.push(code, 0, 0, k)
    }

    /// Goes on at `yes` if the condition holds, at `no` otherwise. `narrow`: the argument has 32 bits.
    pub fn condition(&mut self, condition: &Condition, narrow: bool, yes: Label, no: Label) -> Label {
        let (argument, value) = (condition.argument, condition.value);
        match condition.comparison {
            Comparison::Equal => self.equal(argument, value, u64::MAX, narrow, yes, no),
            Comparison::NotEqual => self.equal(argument, value, u64::MAX, narrow, no, yes),
            Comparison::Masked { mask } => self.equal(argument, value & mask, mask, narrow, yes, no),
            Comparison::Greater => self.ordered(argument, JUMP_GREATER, value, narrow, yes, no),
            Comparison::LessOrEqual => self.ordered(argument, JUMP_GREATER, value, narrow, no, yes),
            Comparison::GreaterOrEqual => self.ordered(argument, JUMP_GREATER_OR_EQUAL, value, narrow, yes, no),
            Comparison::Less => self.ordered(argument, JUMP_GREATER_OR_EQUAL, value, narrow, no, yes),
        }
    }

    fn equal(&mut self, argument: u8, value: u64, mask: u64, narrow: bool, yes: Label, no: Label) -> Label {
        let mut next = yes;
        for half in halves(narrow) {
            let (value, mask) = (half.of(value), half.of(mask));
            // No bit counts: whatever it is, it is equal.
            if mask == 0 {
                continue;
            }
            next = self.jump(JUMP_EQUAL, value, next, no);
            if mask != u32::MAX {
                next = self.then(AND, mask, next);
            }
            next = self.then(LOAD, half.offset(argument), next);
        }
        next
    }

    /// `code` compares the low halves; of the high halves a greater one decides, and only equal ones ask the low
    /// halves.
    fn ordered(&mut self, argument: u8, code: u16, value: u64, narrow: bool, yes: Label, no: Label) -> Label {
        let low = self.jump(code, Half::Low.of(value), yes, no);
        let low = self.then(LOAD, Half::Low.offset(argument), low);
        if narrow {
            return low;
        }
        let high = Half::High.of(value);
        let equal = self.jump(JUMP_EQUAL, high, low, no);
        let greater = self.jump(JUMP_GREATER, high, yes, equal);
        self.then(LOAD, Half::High.offset(argument), greater)
    }
}

/// A BPF register has 32 bits, an argument 64.
#[derive(Clone, Copy)]
enum Half {
    Low,
    High,
}

impl Half {
    fn of(self, value: u64) -> u32 {
        // Each is meant to lose the other half.
        match self {
            Self::Low => value as u32,
            Self::High => (value >> 32) as u32,
        }
    }

    /// x86 stores the low half first.
    fn offset(self, argument: u8) -> u32 {
        let half = match self {
            Self::Low => 0,
            Self::High => 4,
        };
        ARGS + 8 * u32::from(argument) + half
    }
}

fn halves(narrow: bool) -> &'static [Half] {
    if narrow { &[Half::Low] } else { &[Half::Low, Half::High] }
}
