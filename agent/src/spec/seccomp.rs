//! `linux.seccomp` as a filter: what the words of the specification mean. The compiler is [`crate::seccomp`].

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag as Flag, LinuxSeccompOperator,
    LinuxSyscall,
};

use super::{Result, SpecError};
use crate::seccomp::{
    Action, Comparison, Condition, Filter, Profile, Rule,
    arch::{Architecture, is_known},
    compile::compile,
};

const FIELD: &str = "linux.seccomp";
/// How many arguments a system call has.
const ARGUMENTS: u8 = 6;

// SECCOMP_FILTER_FLAG_* of include/uapi/linux/seccomp.h.
const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;

pub(super) fn plan(seccomp: &LinuxSeccomp, notes: &mut Vec<String>) -> Result<Filter> {
    let profile = profile(seccomp, notes)?;
    let flags = flags(seccomp.flags().as_deref())?;
    if seccomp.listener_path().is_some() || seccomp.listener_metadata().is_some() {
        notes.push(format!("{FIELD}.listenerPath has no effect: no action of the profile notifies"));
    }
    let program = compile(&profile).map_err(|error| SpecError::new(FIELD, error.to_string()))?;
    Ok(Filter { flags, program })
}

fn profile(seccomp: &LinuxSeccomp, notes: &mut Vec<String>) -> Result<Profile> {
    let default = action(
        &format!("{FIELD}.defaultAction"),
        &format!("{FIELD}.defaultErrnoRet"),
        seccomp.default_action(),
        seccomp.default_errno_ret(),
    )?;
    let mut rules = Vec::new();
    let mut unknown: Vec<&str> = Vec::new();
    for (index, syscall) in seccomp.syscalls().iter().flatten().enumerate() {
        let field = format!("{FIELD}.syscalls[{index}]");
        let (action, alternatives) = (one_action(&field, syscall)?, conditions(&field, syscall)?);
        if syscall.names().is_empty() || syscall.names().iter().any(String::is_empty) {
            return Err(SpecError::new(format!("{field}.names"), "names no system call"));
        }
        unknown.extend(syscall.names().iter().map(String::as_str).filter(|name| !is_known(name)));
        for name in syscall.names() {
            rules.extend(alternatives.iter().map(|conditions| Rule {
                name: name.clone(),
                action,
                conditions: conditions.clone(),
            }));
        }
    }
    if !unknown.is_empty() {
        notes.push(format!("{FIELD}.syscalls: no such system calls, skipped: {}", unknown.join(" ")));
    }
    let architectures = seccomp.architectures().iter().flatten().filter_map(|arch| architecture(*arch)).collect();
    Ok(Profile { default, architectures, rules })
}

/// One that this machine cannot have programs of needs no rules.
fn architecture(arch: Arch) -> Option<Architecture> {
    match arch {
        Arch::ScmpArchNative | Arch::ScmpArchX86_64 => Some(Architecture::X86_64),
        Arch::ScmpArchX86 => Some(Architecture::X86),
        Arch::ScmpArchX32 => Some(Architecture::X32),
        _ => None,
    }
}

fn one_action(field: &str, syscall: &LinuxSyscall) -> Result<Action> {
    action(&format!("{field}.action"), &format!("{field}.errnoRet"), syscall.action(), syscall.errno_ret())
}

fn action(field: &str, errno_field: &str, action: LinuxSeccompAction, errno: Option<u32>) -> Result<Action> {
    use LinuxSeccompAction as Oci;
    let number = || {
        let number = errno.unwrap_or(libc::EPERM.unsigned_abs());
        u16::try_from(number).map_err(|_| SpecError::new(errno_field, format!("{number} exceeds 65535")))
    };
    let action = match action {
        Oci::ScmpActErrno => return number().map(Action::errno),
        Oci::ScmpActTrace => return number().map(Action::trace),
        Oci::ScmpActNotify => {
            let problem = "SCMP_ACT_NOTIFY is not supported: who would be asked is outside of the machine";
            return Err(SpecError::new(field, problem));
        }
        Oci::ScmpActKill | Oci::ScmpActKillThread => Action::KILL_THREAD,
        Oci::ScmpActKillProcess => Action::KILL_PROCESS,
        Oci::ScmpActTrap => Action::TRAP,
        Oci::ScmpActLog => Action::LOG,
        Oci::ScmpActAllow => Action::ALLOW,
    };
    match errno {
        Some(errno) => {
            let problem = format!("{errno}: only SCMP_ACT_ERRNO and SCMP_ACT_TRACE have a number");
            Err(SpecError::new(errno_field, problem))
        }
        None => Ok(action),
    }
}

/// The alternatives, each a list of conditions that must all hold. Like libseccomp's, a rule looks at an argument only
/// once; where the specification does so twice, each condition stands for itself, as runc has it.
fn conditions(field: &str, syscall: &LinuxSyscall) -> Result<Vec<Vec<Condition>>> {
    let mut all = Vec::new();
    for (index, arg) in syscall.args().iter().flatten().enumerate() {
        all.push(condition(&format!("{field}.args[{index}]"), arg)?);
    }
    let repeated = (0..ARGUMENTS).any(|place| all.iter().filter(|condition| condition.argument == place).count() > 1);
    if repeated {
        return Ok(all.into_iter().map(|condition| vec![condition]).collect());
    }
    // In one order, so that the same conditions are recognised.
    all.sort_by_key(|condition| condition.argument);
    Ok(vec![all])
}

fn condition(field: &str, arg: &LinuxSeccompArg) -> Result<Condition> {
    use LinuxSeccompOperator as Oci;
    let argument = u8::try_from(arg.index()).ok().filter(|index| *index < ARGUMENTS).ok_or_else(|| {
        SpecError::new(format!("{field}.index"), format!("{} is not between 0 and {}", arg.index(), ARGUMENTS - 1))
    })?;
    let comparison = match arg.op() {
        Oci::ScmpCmpNe => Comparison::NotEqual,
        Oci::ScmpCmpLt => Comparison::Less,
        Oci::ScmpCmpLe => Comparison::LessOrEqual,
        Oci::ScmpCmpEq => Comparison::Equal,
        Oci::ScmpCmpGe => Comparison::GreaterOrEqual,
        Oci::ScmpCmpGt => Comparison::Greater,
        Oci::ScmpCmpMaskedEq => {
            let mask = arg.value();
            let value = arg.value_two().unwrap_or(0) & mask;
            return Ok(Condition { argument, comparison: Comparison::Masked { mask }, value });
        }
    };
    Ok(Condition { argument, comparison, value: arg.value() })
}

fn flags(flags: Option<&[Flag]>) -> Result<u32> {
    let Some(flags) = flags else {
        // What runc does where nothing is said: a filter is no reason to slow a program down.
        return Ok(FLAG_SPEC_ALLOW);
    };
    let mut bits = 0;
    for flag in flags {
        bits |= match flag {
            // A stage has one thread.
            Flag::SeccompFilterFlagTsync => 0,
            Flag::SeccompFilterFlagLog => FLAG_LOG,
            Flag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
            Flag::SeccompFilterFlagWaitKillableRecv => {
                let problem =
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV goes with SCMP_ACT_NOTIFY, which is not supported";
                return Err(SpecError::new(format!("{FIELD}.flags"), problem));
            }
        };
    }
    Ok(bits)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parsed(json: Value) -> Result<Filter> {
        plan(&serde_json::from_value(json).unwrap(), &mut Vec::new())
    }

    fn profile_of(json: Value) -> Profile {
        profile(&serde_json::from_value(json).unwrap(), &mut Vec::new()).unwrap()
    }

    /// What containerd 1.6.20 writes for `ctr run --seccomp`.
    const RUNTIME_DEFAULT: &str = include_str!("../../tests/runtime-default.json");

    #[test]
    fn the_profile_of_containerd_is_short_and_known() {
        let seccomp = serde_json::from_str(RUNTIME_DEFAULT).unwrap();
        let mut notes = Vec::new();
        let filter = plan(&seccomp, &mut notes).unwrap();
        assert_eq!(notes, [""; 0]);
        assert_eq!(filter.flags, FLAG_SPEC_ALLOW);
        // 360 calls on each of three architectures.
        assert!(filter.program.len() < 550, "{} instructions", filter.program.len());
    }

    #[test]
    fn each_word_has_its_meaning() {
        let rule = |action: &str| json!({"names": ["read"], "action": action});
        let actions = [
            ("SCMP_ACT_KILL", Action::KILL_THREAD),
            ("SCMP_ACT_KILL_THREAD", Action::KILL_THREAD),
            ("SCMP_ACT_KILL_PROCESS", Action::KILL_PROCESS),
            ("SCMP_ACT_TRAP", Action::TRAP),
            ("SCMP_ACT_ERRNO", Action::errno(1)),
            ("SCMP_ACT_TRACE", Action::trace(1)),
            ("SCMP_ACT_LOG", Action::LOG),
            ("SCMP_ACT_ALLOW", Action::ALLOW),
        ];
        for (name, expected) in actions {
            let profile = profile_of(json!({"defaultAction": name, "syscalls": [rule(name)]}));
            assert_eq!((profile.default, profile.rules[0].action), (expected, expected), "{name}");
        }
        let profile = profile_of(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "architectures": ["SCMP_ARCH_NATIVE", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64"],
            "syscalls": [{"names": ["read", "nonsense"], "action": "SCMP_ACT_TRACE", "errnoRet": 7, "args": [
                {"index": 5, "value": 1, "op": "SCMP_CMP_NE"},
                {"index": 4, "value": 2, "op": "SCMP_CMP_LT"},
                {"index": 3, "value": 3, "op": "SCMP_CMP_LE"},
                {"index": 2, "value": 4, "op": "SCMP_CMP_EQ"},
                {"index": 1, "value": 5, "op": "SCMP_CMP_GE"},
                {"index": 0, "value": 0xf0, "valueTwo": 0x13, "op": "SCMP_CMP_MASKED_EQ"},
            ]}],
        }));
        use Architecture::{X32, X86, X86_64};
        assert_eq!((profile.default, profile.architectures), (Action::errno(38), vec![X86_64, X86, X32]));
        let expected = [
            (Comparison::Masked { mask: 0xf0 }, 0x10),
            (Comparison::GreaterOrEqual, 5),
            (Comparison::Equal, 4),
            (Comparison::LessOrEqual, 3),
            (Comparison::Less, 2),
            (Comparison::NotEqual, 1),
        ];
        let expected: Vec<_> = (0..)
            .zip(expected)
            .map(|(argument, (comparison, value))| Condition { argument, comparison, value })
            .collect();
        assert_eq!(profile.rules[0], Rule { name: "read".into(), action: Action::trace(7), conditions: expected });
        assert_eq!(profile.rules.len(), 2);
    }

    #[test]
    fn what_has_no_effect_is_noted() {
        let json = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": "/run/listener.sock",
            "syscalls": [{"names": ["nonsense", "read"], "action": "SCMP_ACT_LOG"}],
        });
        let mut notes = Vec::new();
        plan(&serde_json::from_value(json).unwrap(), &mut notes).unwrap();
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0].ends_with("skipped: nonsense") && notes[1].contains("listenerPath"), "{notes:?}");
    }

    #[test]
    fn two_conditions_on_one_argument_are_alternatives() {
        let args =
            json!([{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 2, "op": "SCMP_CMP_GT"}]);
        let syscalls = json!([{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": args}]);
        let rules = profile_of(json!({"defaultAction": "SCMP_ACT_KILL", "syscalls": syscalls})).rules;
        let comparisons: Vec<_> = rules.iter().map(|rule| (rule.conditions.len(), rule.conditions[0].value)).collect();
        assert_eq!(comparisons, [(1, 1), (1, 2)]);
    }

    #[test]
    fn flags_are_the_kernels() {
        let with = |flags: Value| parsed(json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": flags}));
        assert_eq!(with(json!([])).unwrap().flags, 0);
        let all = ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"];
        assert_eq!(with(json!(all)).unwrap().flags, 6);
        let error = with(json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])).unwrap_err();
        assert_eq!(error.field, "linux.seccomp.flags");
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_its_name() {
        let rule = |rule: Value| json!({"defaultAction": "SCMP_ACT_KILL", "syscalls": [rule]});
        let arg = |arg: Value| rule(json!({"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [arg]}));
        let contradicting: Vec<_> = ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG"]
            .iter()
            .map(|action| {
                json!({"names": ["read"], "action": action, "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]})
            })
            .collect();
        for (json, field) in [
            (json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp.defaultAction"),
            (json!({"defaultAction": "SCMP_ACT_KILL", "defaultErrnoRet": 1}), "linux.seccomp.defaultErrnoRet"),
            (json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 65536}), "linux.seccomp.defaultErrnoRet"),
            (rule(json!({"names": ["read"], "action": "SCMP_ACT_NOTIFY"})), "linux.seccomp.syscalls[0].action"),
            (rule(json!({"names": [""], "action": "SCMP_ACT_LOG"})), "linux.seccomp.syscalls[0].names"),
            (arg(json!({"index": 6, "value": 0, "op": "SCMP_CMP_EQ"})), "linux.seccomp.syscalls[0].args[0].index"),
            (json!({"defaultAction": "SCMP_ACT_KILL", "syscalls": contradicting}), "linux.seccomp"),
        ] {
            assert_eq!(parsed(json.clone()).unwrap_err().field, field, "{json}");
        }
    }
}
