//! Which devices a container may use: from rules to the BPF program that the kernel asks at each open and mknod; pure.
//!
//! cgroup v2 has no file for it. The rules mean what they mean to cgroup v1 and, with a program like this one, to runc:
//! first everything is refused; a rule for all devices (`a`) turns that round and forgets what was before; every other
//! rule adds an exception or takes one back. An access is an exception if one of them covers it whole (where all else
//! is refused) or touches it (where all else is allowed).

use std::collections::BTreeMap;

/// What may be done, as bits: BPF_DEVCG_ACC_* of include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access(u8);

impl Access {
    /// Make a node.
    pub const MAKE: Self = Self(1);
    /// Open for reading.
    pub const READ: Self = Self(2);
    /// Open for writing.
    pub const WRITE: Self = Self(4);
    /// Everything.
    pub const ALL: Self = Self(7);

    /// Reads `r`, `w` and `m`, in any order and at least one. None for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let bits = text.chars().try_fold(0, |bits, letter| match letter {
            'r' => Some(bits | Self::READ.0),
            'w' => Some(bits | Self::WRITE.0),
            'm' => Some(bits | Self::MAKE.0),
            _ => None,
        })?;
        (bits != 0).then_some(Self(bits))
    }
}

/// Character or block: BPF_DEVCG_DEV_* of include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A block device.
    Block = 1,
    /// A character device.
    Char = 2,
}

/// Which devices; None stands for every number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pattern {
    /// The kind.
    pub kind: Kind,
    /// The driver.
    pub major: Option<u32>,
    /// Its device.
    pub minor: Option<u32>,
}

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Allow or refuse.
    pub allow: bool,
    /// Which devices; None is all of them, and every access.
    pub devices: Option<Pattern>,
    /// Which access.
    pub access: Access,
}

/// A rule that refuses a part of what a wider one allows, or the other way round: that cannot be expressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("makes a hole in an earlier rule with a wildcard; name the devices one by one")]
pub struct Hole;

/// What may always be used, as runc has it: making any node, and the devices that every container has.
pub const ALWAYS: [Rule; 11] = {
    const fn allow(kind: Kind, major: Option<u32>, minor: Option<u32>, access: Access) -> Rule {
        Rule { allow: true, devices: Some(Pattern { kind, major, minor }), access }
    }
    [
        allow(Kind::Char, None, None, Access::MAKE),
        allow(Kind::Block, None, None, Access::MAKE),
        allow(Kind::Char, Some(1), Some(3), Access::ALL),    // null
        allow(Kind::Char, Some(1), Some(5), Access::ALL),    // zero
        allow(Kind::Char, Some(1), Some(7), Access::ALL),    // full
        allow(Kind::Char, Some(1), Some(8), Access::ALL),    // random
        allow(Kind::Char, Some(1), Some(9), Access::ALL),    // urandom
        allow(Kind::Char, Some(5), Some(0), Access::ALL),    // tty
        allow(Kind::Char, Some(5), Some(2), Access::ALL),    // ptmx
        allow(Kind::Char, Some(136), None, Access::ALL),     // pts
        allow(Kind::Char, Some(10), Some(200), Access::ALL), // net/tun
    ]
};

/// All rules together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    allow: bool,
    /// What is otherwise.
    exceptions: BTreeMap<Pattern, Access>,
}

impl Devices {
    /// Adds a rule after all others.
    ///
    /// # Errors
    /// If it would make a hole in a wildcard.
    pub fn add(&mut self, rule: &Rule) -> Result<(), Hole> {
        let Some(pattern) = rule.devices else {
            *self = Self { allow: rule.allow, exceptions: BTreeMap::new() };
            return Ok(());
        };
        if rule.allow != self.allow {
            self.exceptions.entry(pattern).or_default().0 |= rule.access.0;
            return Ok(());
        }
        let wider = |other: &Pattern| {
            let covers = |other: Option<u32>, own: Option<u32>| other.is_none() || other == own;
            *other != pattern
                && other.kind == pattern.kind
                && covers(other.major, pattern.major)
                && covers(other.minor, pattern.minor)
        };
        if self.exceptions.iter().any(|(other, access)| wider(other) && access.0 & rule.access.0 != 0) {
            return Err(Hole);
        }
        if let Some(access) = self.exceptions.get_mut(&pattern) {
            access.0 &= !rule.access.0;
        }
        self.exceptions.retain(|_, access| access.0 != 0);
        Ok(())
    }

    /// The program: it answers 1 if the access is allowed and 0 if not.
    pub fn compile(&self) -> Vec<Instruction> {
        // struct bpf_cgroup_dev_ctx: access in the high and kind in the low half of the first word, major, minor.
        let mut program = vec![
            Instruction::load(KIND, CONTEXT, 0),
            Instruction::new(MOVE_REGISTER, ACCESS, KIND, 0, 0),
            Instruction::new(AND, KIND, 0, 0, 0xffff),
            Instruction::new(SHIFT_RIGHT, ACCESS, 0, 0, 16),
            Instruction::load(MAJOR, CONTEXT, 4),
            Instruction::load(MINOR, CONTEXT, 8),
        ];
        for (pattern, access) in &self.exceptions {
            // Jumps behind the block's answer.
            let mut tests = vec![(JUMP_NOT_EQUAL, KIND, pattern.kind as u32)];
            tests.extend(pattern.major.map(|major| (JUMP_NOT_EQUAL, MAJOR, major)));
            tests.extend(pattern.minor.map(|minor| (JUMP_NOT_EQUAL, MINOR, minor)));
            let mut block: Vec<Instruction> = Vec::new();
            // Nothing is beyond all of them; but something may be asked that is none of them.
            if *access != Access::ALL || self.allow {
                // What is asked beyond the exception, or within it.
                let (bits, jump) = match self.allow {
                    false => (!u32::from(access.0), JUMP_NOT_EQUAL),
                    true => (u32::from(access.0), JUMP_EQUAL),
                };
                block.push(Instruction::new(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
                block.push(Instruction::new(AND, SCRATCH, 0, 0, bits));
                block.push(Instruction::new(jump, SCRATCH, 0, 2, 0));
            }
            block.extend(answer(!self.allow));
            let mut rest = i16::try_from(block.len()).unwrap_or(i16::MAX);
            for (jump, register, value) in tests.into_iter().rev() {
                block.insert(0, Instruction::new(jump, register, 0, rest, value));
                rest = rest.saturating_add(1);
            }
            program.extend(block);
        }
        program.extend(answer(self.allow));
        program
    }
}

fn answer(allow: bool) -> [Instruction; 2] {
    [Instruction::new(MOVE, 0, 0, 0, allow.into()), Instruction::new(EXIT, 0, 0, 0, 0)]
}

/// `struct bpf_insn` of include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: u32,
}

impl Instruction {
    fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Self {
        Self { code, registers: source << 4 | destination, offset, immediate }
    }

    fn load(destination: u8, source: u8, offset: i16) -> Self {
        Self::new(LOAD, destination, source, offset, 0)
    }
}

// Registers: 0 is the answer, 1 comes with the context.
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

// include/uapi/linux/bpf.h and bpf_common.h; all on 32 bits.
const LOAD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xb4; // BPF_ALU | BPF_MOV | BPF_K
const MOVE_REGISTER: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP_EQUAL: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What somebody does with a device.
    #[derive(Clone, Copy, Debug)]
    struct Query {
        kind: Kind,
        major: u32,
        minor: u32,
        access: u8,
    }

    /// What the kernel makes of a program, as far as its instructions are used here.
    fn interpret(program: &[Instruction], query: Query) -> bool {
        let context = [u32::from(query.access) << 16 | query.kind as u32, query.major, query.minor];
        let (mut registers, mut at) = ([0u32; 10], 0usize);
        loop {
            let i = program[at];
            at += 1;
            let (destination, source) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let value = registers[destination];
            let taken = match i.code {
                LOAD => {
                    assert_eq!(source, usize::from(CONTEXT));
                    registers[destination] = context[usize::try_from(i.offset).unwrap() / 4];
                    false
                }
                MOVE => {
                    registers[destination] = i.immediate;
                    false
                }
                MOVE_REGISTER => {
                    registers[destination] = registers[source];
                    false
                }
                AND => {
                    registers[destination] = value & i.immediate;
                    false
                }
                SHIFT_RIGHT => {
                    registers[destination] = value >> i.immediate;
                    false
                }
                JUMP_EQUAL => value == i.immediate,
                JUMP_NOT_EQUAL => value != i.immediate,
                EXIT => return registers[0] != 0,
                other => panic!("instruction {other:#x}"),
            };
            if taken {
                at += usize::try_from(i.offset).unwrap();
            }
        }
    }

    /// The meaning of the rules, one after the other; None if one makes a hole.
    fn evaluate(rules: &[Rule], query: Query) -> Option<bool> {
        let mut allowed = false;
        let mut exceptions: Vec<(Pattern, u8)> = Vec::new();
        for rule in rules {
            let Some(pattern) = rule.devices else {
                (allowed, exceptions) = (rule.allow, Vec::new());
                continue;
            };
            if rule.allow != allowed {
                exceptions.push((pattern, rule.access.0));
                continue;
            }
            let wild = [
                Pattern { major: None, ..pattern },
                Pattern { minor: None, ..pattern },
                Pattern { major: None, minor: None, ..pattern },
            ];
            for (other, access) in &mut exceptions {
                if *other == pattern {
                    *access &= !rule.access.0;
                } else if wild.contains(other) && *access & rule.access.0 != 0 {
                    return None;
                }
            }
        }
        let matches = |pattern: &Pattern| {
            pattern.kind == query.kind
                && pattern.major.is_none_or(|major| major == query.major)
                && pattern.minor.is_none_or(|minor| minor == query.minor)
        };
        let all = exceptions.iter().filter(|(pattern, _)| matches(pattern));
        let exception = all.clone().any(|(pattern, _)| {
            let whole = all.clone().filter(|(other, _)| other == pattern).fold(0, |sum, (_, access)| sum | access);
            let within = whole & query.access;
            whole != 0 && if allowed { within != 0 } else { within == query.access }
        });
        Some(allowed != exception)
    }

    fn number() -> impl Strategy<Value = u32> {
        prop_oneof![4 => 0u32..4, 1 => Just(136), 1 => Just(u32::MAX), 1 => Just(1 << 31)]
    }

    fn kind() -> impl Strategy<Value = Kind> {
        prop_oneof![Just(Kind::Char), Just(Kind::Block)]
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let pattern = (kind(), proptest::option::of(number()), proptest::option::of(number()))
            .prop_map(|(kind, major, minor)| Pattern { kind, major, minor });
        (any::<bool>(), proptest::option::weighted(0.9, pattern), 1u8..8).prop_map(|(allow, devices, bits)| Rule {
            allow,
            devices,
            access: Access(bits),
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn the_program_does_what_the_rules_say(
            rules in proptest::collection::vec(rule(), 0..12),
            queries in proptest::collection::vec((kind(), number(), number(), 0u8..8), 1..32),
        ) {
            let mut devices = Devices::default();
            let added = rules.iter().try_for_each(|rule| devices.add(rule));
            let program = devices.compile();
            for (kind, major, minor, access) in queries {
                let query = Query { kind, major, minor, access };
                match evaluate(&rules, query) {
                    Some(allowed) => {
                        prop_assert!(added.is_ok());
                        prop_assert_eq!(interpret(&program, query), allowed, "{:?}", query);
                    }
                    None => prop_assert_eq!(added, Err(Hole)),
                }
            }
        }
    }

    #[test]
    fn every_container_has_its_devices_and_no_other() {
        let mut devices = Devices::default();
        ALWAYS.iter().try_for_each(|rule| devices.add(rule)).unwrap();
        let program = devices.compile();
        let char = |major, minor, access: Access| Query { kind: Kind::Char, major, minor, access: access.0 };
        for (query, allowed) in [
            (char(1, 3, Access::ALL), true),
            (char(136, 77, Access::ALL), true),
            (char(1, 1, Access::READ), false),
            (char(1, 1, Access::MAKE), true),
            (char(10, 229, Access::WRITE), false),
            (Query { kind: Kind::Block, ..char(254, 0, Access::READ) }, false),
            (Query { kind: Kind::Block, ..char(254, 0, Access::MAKE) }, true),
        ] {
            assert_eq!(interpret(&program, query), allowed, "{query:?}");
        }
    }

    #[test]
    fn access_is_read_letter_by_letter() {
        assert_eq!(Access::parse("mwr"), Some(Access::ALL));
        assert_eq!(Access::parse("r"), Some(Access::READ));
        assert_eq!((Access::parse(""), Access::parse("x"), Access::parse("rx")), (None, None, None));
    }
}
