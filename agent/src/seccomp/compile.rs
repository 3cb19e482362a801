//! From a profile to the program.
//!
//! The kernel interprets it at each system call (unless it has found out that the call is always allowed), so the way
//! to an answer is short: the numbers are put into ranges with the same outcome, and a binary search finds the range.
//! RuntimeDefault's 300 calls are some 60 ranges, so 6 comparisons.

use std::collections::HashMap;

use super::{
    Action, Instruction, Profile,
    arch::{Architecture, X32_BIT},
    assemble::{ARCH, Assembler, JUMP_EQUAL, JUMP_GREATER_OR_EQUAL, LOAD, Label, NUMBER},
    table::{Outcome, Table, table},
};

/// BPF_MAXINSNS of include/uapi/linux/bpf_common.h.
pub const MAX_INSTRUCTIONS: usize = 4096;
/// AUDIT_ARCH_X86_64 of include/uapi/linux/audit.h: EM_X86_64, 64 bits, little-endian.
pub const AUDIT_X86_64: u32 = 0xc000_003e;
/// AUDIT_ARCH_I386 of the same: EM_386, little-endian.
pub const AUDIT_X86: u32 = 0x4000_0003;
/// What a tracer sets a call's number to that shall not be made.
const NO_CALL: u32 = u32::MAX;

/// A profile that no program can express.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// Nobody can say which one counts.
    #[error("two rules for {name:?} have the same conditions and different actions")]
    Contradiction {
        /// The call.
        name: String,
    },
    /// The kernel takes no longer ones.
    #[error("its program has {0} instructions, the kernel takes {MAX_INSTRUCTIONS}; use fewer conditions")]
    TooLong(usize),
}

/// Compiles a profile.
///
/// # Errors
/// If its rules contradict each other, or are too many.
pub fn compile(profile: &Profile) -> Result<Vec<Instruction>, CompileError> {
    let listed = |arch| profile.architectures.contains(&arch);
    let mut part = Part { assembler: Assembler::default(), made: HashMap::new(), profile };
    let kill = part.always(Action::KILL_THREAD);

    let mut other = kill;
    if listed(Architecture::X86) {
        let ranges = part.ranges(&table(profile, Architecture::X86)?, Architecture::X86, 0);
        let x86 = part.numbers(&ranges);
        other = part.assembler.jump(JUMP_EQUAL, AUDIT_X86, x86, other);
    }
    let mut ranges = part.ranges(&table(profile, Architecture::X86_64)?, Architecture::X86_64, 0);
    ranges.retain(|(first, _)| *first < X32_BIT);
    if listed(Architecture::X32) {
        ranges.extend(part.ranges(&table(profile, Architecture::X32)?, Architecture::X32, X32_BIT));
    } else {
        // The same entry with one bit set, so an architecture of its own that is not in the filter.
        let default = part.always(profile.default);
        ranges.extend([(X32_BIT, kill), (NO_CALL, default)]);
    }
    let native = part.numbers(&ranges);
    let start = part.assembler.jump(JUMP_EQUAL, AUDIT_X86_64, native, other);
    part.assembler.then(LOAD, ARCH, start);

    let program = part.assembler.finish();
    if program.len() > MAX_INSTRUCTIONS {
        return Err(CompileError::TooLong(program.len()));
    }
    Ok(program)
}

/// First number of a range (it ends before the next one's) and where it leads.
type Range = (u32, Label);

struct Part<'p> {
    assembler: Assembler,
    /// What there is of each outcome already.
    made: HashMap<(Outcome, bool), Label>,
    profile: &'p Profile,
}

impl Part<'_> {
    fn always(&mut self, action: Action) -> Label {
        self.outcome(&Outcome::Always(action), false)
    }

    fn outcome(&mut self, outcome: &Outcome, narrow: bool) -> Label {
        let key = (outcome.clone(), narrow);
        if let Some(label) = self.made.get(&key) {
            return *label;
        }
        let label = match outcome {
            Outcome::Always(action) => self.assembler.ret(action.0),
            Outcome::Checks(checks) => {
                let mut otherwise = self.always(self.profile.default);
                for (conditions, action) in checks.iter().rev() {
                    let mut holds = self.always(*action);
                    for condition in conditions.iter().rev() {
                        holds = self.assembler.condition(condition, narrow, holds, otherwise);
                    }
                    otherwise = holds;
                }
                otherwise
            }
        };
        self.made.insert(key, label);
        label
    }

    /// The ranges of one table from `first` on; nothing below is asked for.
    fn ranges(&mut self, table: &Table, arch: Architecture, first: u32) -> Vec<Range> {
        let default = self.always(self.profile.default);
        let mut ranges = vec![(first, default)];
        let mut add = |start: u32, label: Label| match ranges.last_mut() {
            Some((last, there)) if *last == start => *there = label,
            Some((_, there)) if *there == label => {}
            _ => ranges.push((start, label)),
        };
        for (number, outcome) in &table.outcomes {
            add(*number, self.outcome(outcome, arch.is_narrow()));
            add(number.saturating_add(1), default);
        }
        // What runc puts before a filter of libseccomp's: only for architectures that are named.
        if let Some(last) = table.last
            && !self.profile.default.is_lenient()
            && self.profile.architectures.contains(&arch)
        {
            let unknown = self.always(Action::errno(libc::ENOSYS as u16));
            add(last.saturating_add(1), unknown);
        }
        ranges
    }

    /// A binary search; the number need not be loaded yet.
    fn numbers(&mut self, ranges: &[Range]) -> Label {
        let search = self.search(ranges);
        self.assembler.then(LOAD, NUMBER, search)
    }

    fn search(&mut self, ranges: &[Range]) -> Label {
        let (low, high) = ranges.split_at(ranges.len() / 2);
        match (low, high) {
            ([], [(_, label), ..]) => *label,
            (_, [(start, _), ..]) => {
                let (start, above) = (*start, self.search(high));
                let below = self.search(low);
                self.assembler.jump(JUMP_GREATER_OR_EQUAL, start, above, below)
            }
            // There is always a range.
            (_, []) => self.always(self.profile.default),
        }
    }
}
