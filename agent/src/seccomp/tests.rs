use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    arch::{Architecture, X32_BIT},
    compile::{AUDIT_X86, AUDIT_X86_64, CompileError, MAX_INSTRUCTIONS, compile},
    *,
};

/// One system call, as the kernel shows it to a filter.
#[derive(Clone, Copy, Debug)]
struct Call {
    number: u32,
    arch: u32,
    args: [u64; 6],
}

/// What the kernel makes of a program: net/core/filter.c, as far as seccomp allows its instructions. Also counts the
/// instructions.
fn interpret(program: &[Instruction], call: Call) -> (Action, usize) {
    let mut data = Vec::new();
    data.extend(call.number.to_le_bytes());
    data.extend(call.arch.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    call.args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
    let (mut register, mut at) = (0u32, 0usize);
    for steps in 1..=program.len() {
        let Instruction { code, jt, jf, k } = program[at];
        at += 1;
        let holds = match code {
            0x20 => {
                let place = k as usize;
                register = u32::from_le_bytes(data[place..place + 4].try_into().unwrap());
                continue;
            }
            0x54 => {
                register &= k;
                continue;
            }
            0x05 => {
                at += k as usize;
                continue;
            }
            0x06 => return (Action(k), steps),
            0x15 => register == k,
            0x25 => register > k,
            0x35 => register >= k,
            other => panic!("instruction {other:#x}"),
        };
        at += usize::from(if holds { jt } else { jf });
    }
    panic!("no end")
}

fn holds(condition: &Condition, args: [u64; 6], narrow: bool) -> bool {
    let word = |value: u64| if narrow { value & 0xffff_ffff } else { value };
    let (argument, value) = (word(args[usize::from(condition.argument)]), word(condition.value));
    match condition.comparison {
        Comparison::Equal => argument == value,
        Comparison::NotEqual => argument != value,
        Comparison::Less => argument < value,
        Comparison::LessOrEqual => argument <= value,
        Comparison::Greater => argument > value,
        Comparison::GreaterOrEqual => argument >= value,
        Comparison::Masked { mask } => argument & word(mask) == value & word(mask),
    }
}

/// The meaning of a profile, one rule after the other.
fn evaluate(profile: &Profile, call: Call) -> Action {
    let listed = |arch| profile.architectures.contains(&arch);
    let arch = match call.arch {
        AUDIT_X86_64 if call.number < X32_BIT => Architecture::X86_64,
        AUDIT_X86_64 if listed(Architecture::X32) => Architecture::X32,
        AUDIT_X86_64 if call.number == u32::MAX => return profile.default,
        AUDIT_X86 if listed(Architecture::X86) => Architecture::X86,
        _ => return Action::KILL_THREAD,
    };
    let numbers = |rule: &Rule| [arch.number(&rule.name), arch.multiplexed(&rule.name).map(|other| other.number)];
    let last = profile.rules.iter().flat_map(numbers).flatten().max();
    let lenient = [Action::ALLOW.0, Action::LOG.0, Action::trace(0).0].contains(&(profile.default.0 & 0xffff_0000));
    if !lenient && listed(arch) && last.is_some_and(|last| call.number > last) {
        return Action::errno(38);
    }
    let mut found = Vec::new();
    for rule in profile.rules.iter().filter(|rule| rule.action != profile.default) {
        if arch.number(&rule.name) == Some(call.number) {
            if rule.conditions.is_empty() {
                return rule.action;
            }
            if rule.conditions.iter().all(|condition| holds(condition, call.args, arch.is_narrow())) {
                found.push(rule.action);
            }
        }
        let refuses = !rule.action.is_lenient();
        if let Some(other) = arch.multiplexed(&rule.name)
            && other.number == call.number
            && call.args[0] & 0xffff_ffff == u64::from(other.call)
            && (rule.conditions.is_empty() || refuses)
        {
            found.push(rule.action);
        }
    }
    // include/uapi/linux/seccomp.h: from strict to lenient.
    const ORDER: [u32; 7] = [0x8000_0000, 0x0000_0000, 0x0003_0000, 0x0005_0000, 0x7ff0_0000, 0x7ffc_0000, 0x7fff_0000];
    let rank = |action: &Action| ORDER.iter().position(|known| *known == action.0 & 0xffff_0000).unwrap();
    found.into_iter().min_by_key(rank).unwrap_or(profile.default)
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => Just(Action::ALLOW),
        1 => Just(Action::KILL_PROCESS),
        1 => Just(Action::KILL_THREAD),
        1 => Just(Action::TRAP),
        1 => Just(Action::LOG),
        1 => (0u16..5).prop_map(Action::errno),
        1 => Just(Action::trace(7)),
    ]
}

/// Values that meet each other, and both halves of a word.
fn value() -> impl Strategy<Value = u64> {
    let edge = select(vec![0u64, 1, 2, 40, 0xffff_ffff, 0x1_0000_0000, 0x1_0000_0001, u64::MAX, 1 << 63]);
    prop_oneof![4 => edge, 1 => any::<u64>()]
}

fn condition() -> impl Strategy<Value = Condition> {
    let comparison = prop_oneof![
        Just(Comparison::Equal),
        Just(Comparison::NotEqual),
        Just(Comparison::Less),
        Just(Comparison::LessOrEqual),
        Just(Comparison::Greater),
        Just(Comparison::GreaterOrEqual),
        value().prop_map(|mask| Comparison::Masked { mask }),
    ];
    (0u8..6, comparison, value()).prop_map(|(argument, comparison, value)| Condition { argument, comparison, value })
}

/// Names with neighbours, on one architecture only, with two ways, and unknown.
const NAMES: [&str; 16] = [
    "read",
    "write",
    "open",
    "close",
    "stat",
    "socket",
    "connect",
    "sendmsg",
    "socketcall",
    "ipc",
    "shmget",
    "semop",
    "execve",
    "clone3",
    "chown32",
    "nonsense",
];

fn profile() -> impl Strategy<Value = Profile> {
    let rule = (select(NAMES.to_vec()), action(), vec(condition(), 0..4)).prop_map(|(name, action, conditions)| Rule {
        name: name.into(),
        action,
        conditions,
    });
    let archs = prop_oneof![
        Just(vec![]),
        Just(vec![Architecture::X86_64]),
        Just(vec![Architecture::X86_64, Architecture::X86]),
        Just(vec![Architecture::X86_64, Architecture::X86, Architecture::X32]),
    ];
    (action(), archs, vec(rule, 0..24)).prop_map(|(default, architectures, rules)| Profile {
        default,
        architectures,
        rules,
    })
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let number = prop_oneof![
        4 => 0u32..4,
        4 => select(vec![41, 42, 46, 59, 102, 117, 212, 359, 362, 370, 435, 436, 600]),
        2 => (0u32..600).prop_map(|number| number | X32_BIT),
        1 => select(vec![u32::MAX, X32_BIT - 1, X32_BIT, 1 << 31]),
        1 => any::<u32>(),
    ];
    let arch = select(vec![AUDIT_X86_64, AUDIT_X86_64, AUDIT_X86, 0xc000_00b7]);
    let args = prop::array::uniform6(value());
    vec((number, arch, args).prop_map(|(number, arch, args)| Call { number, arch, args }), 1..64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn the_program_does_what_the_profile_says(profile in profile(), calls in calls()) {
        match compile(&profile) {
            Ok(program) => {
                for call in calls {
                    let (got, _) = interpret(&program, call);
                    prop_assert_eq!(got, evaluate(&profile, call), "{:?}", call);
                }
            }
            Err(CompileError::Contradiction { .. }) => {}
            Err(error) => prop_assert!(false, "{}", error),
        }
    }
}

fn rule(name: &str, action: Action, conditions: Vec<Condition>) -> Rule {
    Rule { name: name.into(), action, conditions }
}

fn equal(argument: u8, value: u64) -> Condition {
    Condition { argument, comparison: Comparison::Equal, value }
}

fn native(number: u32, args: [u64; 6]) -> Call {
    Call { number, arch: AUDIT_X86_64, args }
}

#[test]
fn far_targets_are_reached() {
    // More checks than a conditional jump can skip, before and after the ones that are asked for.
    let rules = (0..200).map(|n| rule("read", Action::ALLOW, vec![equal(0, n), equal(1, n << 32)]));
    let all = rules.chain([rule("write", Action::LOG, vec![equal(5, 7)])]).collect();
    let profile = Profile { default: Action::errno(1), architectures: vec![], rules: all };
    let program = compile(&profile).unwrap();
    assert!(program.len() > 1000);
    for (call, expected) in [
        (native(0, [0; 6]), Action::ALLOW),
        (native(0, [199, 199 << 32, 0, 0, 0, 0]), Action::ALLOW),
        (native(0, [199, 198 << 32, 0, 0, 0, 0]), Action::errno(1)),
        (native(1, [0, 0, 0, 0, 0, 7]), Action::LOG),
        (native(1, [0, 0, 0, 0, 0, 8]), Action::errno(1)),
        (native(2, [0; 6]), Action::errno(1)),
    ] {
        assert_eq!(interpret(&program, call).0, expected, "{call:?}");
    }
}

#[test]
fn what_cannot_be_expressed_is_said() {
    let rules = (0..2000).map(|n| rule("read", Action::ALLOW, vec![equal(0, n)])).collect();
    let long = Profile { default: Action::errno(1), architectures: vec![], rules };
    assert!(matches!(compile(&long), Err(CompileError::TooLong(length)) if length > MAX_INSTRUCTIONS));
    let rules = vec![rule("read", Action::ALLOW, vec![equal(0, 1)]), rule("read", Action::LOG, vec![equal(0, 1)])];
    let both = Profile { default: Action::errno(1), architectures: vec![], rules };
    assert_eq!(compile(&both), Err(CompileError::Contradiction { name: "read".into() }));
}

#[test]
fn of_several_rules_that_hold_the_strictest_counts() {
    let rules = vec![
        rule("read", Action::ALLOW, vec![equal(0, 1)]),
        rule("read", Action::KILL_PROCESS, vec![equal(1, 1)]),
        rule("read", Action::errno(5), vec![equal(2, 1)]),
        rule("write", Action::errno(9), vec![equal(0, 1)]),
        rule("write", Action::ALLOW, vec![]),
        rule("write", Action::KILL_THREAD, vec![]),
    ];
    let program = compile(&Profile { default: Action::LOG, architectures: vec![], rules }).unwrap();
    for (number, args, expected) in [
        (0, [1, 0, 0, 0, 0, 0], Action::ALLOW),
        (0, [1, 0, 1, 0, 0, 0], Action::errno(5)),
        (0, [1, 1, 1, 0, 0, 0], Action::KILL_PROCESS),
        (0, [0; 6], Action::LOG),
        (1, [1, 0, 0, 0, 0, 0], Action::ALLOW),
    ] {
        assert_eq!(interpret(&program, native(number, args)).0, expected, "{number} {args:?}");
    }
}

#[test]
fn a_newer_call_than_the_profile_knows_is_told_as_missing() {
    let profile = |default, architectures| Profile {
        default,
        architectures,
        rules: vec![rule("read", Action::ALLOW, vec![]), rule("clone3", default, vec![])],
    };
    let at = |profile: &Profile, number| interpret(&compile(profile).unwrap(), native(number, [0; 6])).0;
    let refusing = profile(Action::errno(1), vec![Architecture::X86_64]);
    assert_eq!((at(&refusing, 434), at(&refusing, 435)), (Action::errno(1), Action::errno(1)));
    assert_eq!(at(&refusing, 436), Action::errno(38));
    assert_eq!(at(&profile(Action::KILL_PROCESS, vec![Architecture::X86_64]), 436), Action::errno(38));
    assert_eq!(at(&profile(Action::ALLOW, vec![Architecture::X86_64]), 436), Action::ALLOW);
    // A call that shares a number counts with that, 117, also where its rule says no more than the default.
    for action in [Action::ALLOW, Action::errno(1)] {
        let shared = Profile {
            default: Action::errno(1),
            architectures: vec![Architecture::X86],
            rules: vec![rule("read", Action::ALLOW, vec![]), rule("semop", action, vec![])],
        };
        let program = compile(&shared).unwrap();
        let at = |number, first| interpret(&program, Call { number, arch: AUDIT_X86, args: [first, 0, 0, 0, 0, 0] }).0;
        assert_eq!((at(41, 0), at(117, 1), at(117, 2)), (Action::errno(1), action, Action::errno(1)));
        assert_eq!(at(118, 0), Action::errno(38));
    }
    // Nobody has said which calls the profile's author knew.
    assert_eq!(at(&profile(Action::errno(1), vec![]), 436), Action::errno(1));
}
