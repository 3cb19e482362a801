//! `linux.seccomp`: every action, every comparison.

use caisson_e2e::{
    Host,
    spec::{Given, holds},
};
use caisson_e2e_probe::Outcome;
use serde_json::{Value, json};

caisson_e2e::for_each_runtime!(seccomp_profile);

/// A call with one argument, as a word for the probe.
fn call(number: i64, argument: u64) -> String {
    format!("{number}:{argument:#x}")
}

/// personality(2) with each of these, which are no personalities that anything here uses.
const EXACT: u64 = 0x1111;
const MASKED: u64 = 0x5_2000;
/// More than 32 bits hold.
const LARGE: u64 = 0x1_0000_0005;

fn seccomp_profile(host: &Host) {
    let compare = |value: u64, second: u64, operator: &str| -> Value {
        json!({ "index": 0, "value": value, "valueTwo": second, "op": operator })
    };
    let rule = |names: &[&str], action: &str, errno: Option<i32>, arguments: &[Value]| -> Value {
        let mut rule = json!({ "names": names, "action": action, "args": arguments });
        if let Some(errno) = errno {
            rule["errnoRet"] = json!(errno);
        }
        rule
    };
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            rule(&["acct", "no_such_system_call"], "SCMP_ACT_ERRNO", None, &[]),
            rule(&["swapoff"], "SCMP_ACT_ERRNO", Some(libc::EXDEV), &[]),
            rule(&["chroot"], "SCMP_ACT_KILL_PROCESS", None, &[]),
            rule(&["swapon"], "SCMP_ACT_KILL", None, &[]),
            rule(&["umount2"], "SCMP_ACT_TRAP", None, &[]),
            rule(&["sethostname"], "SCMP_ACT_LOG", None, &[]),
            rule(&["setdomainname"], "SCMP_ACT_TRACE", Some(libc::EDOM), &[]),
            rule(&["personality"], "SCMP_ACT_ERRNO", Some(libc::ENOTTY), &[compare(EXACT, 0, "SCMP_CMP_EQ")]),
            rule(&["personality"], "SCMP_ACT_ERRNO", Some(libc::ENOTEMPTY), &[
                compare(0xf_0000, 0x5_0000, "SCMP_CMP_MASKED_EQ"),
            ]),
            // The comparisons are unsigned and of 64 bits.
            rule(&["getpgid"], "SCMP_ACT_ERRNO", Some(101), &[compare(5, 0, "SCMP_CMP_LT")]),
            rule(&["sched_getscheduler"], "SCMP_ACT_ERRNO", Some(102), &[compare(5, 0, "SCMP_CMP_LE")]),
            rule(&["getsid"], "SCMP_ACT_ERRNO", Some(103), &[compare(0, 0, "SCMP_CMP_NE")]),
            rule(&["sched_get_priority_min"], "SCMP_ACT_ERRNO", Some(105), &[compare(LARGE, 0, "SCMP_CMP_GE")]),
            rule(&["sched_get_priority_max"], "SCMP_ACT_ERRNO", Some(106), &[compare(LARGE, 0, "SCMP_CMP_GT")]),
            // Two on one argument: either is enough.
            rule(&["setfsuid"], "SCMP_ACT_KILL_PROCESS", None, &[
                compare(50, 0, "SCMP_CMP_EQ"),
                compare(60, 0, "SCMP_CMP_EQ"),
            ]),
            // Both arguments must be as they say.
            rule(&["getpriority"], "SCMP_ACT_ERRNO", Some(104), &[
                json!({ "index": 0, "value": 1, "op": "SCMP_CMP_EQ" }),
                json!({ "index": 1, "value": 7, "op": "SCMP_CMP_EQ" }),
            ]),
        ],
    });
    let one = Outcome::Refused;
    let cases = [
        (call(libc::SYS_acct, 0), one(libc::EPERM)),
        (call(libc::SYS_swapoff, 0), one(libc::EXDEV)),
        (call(libc::SYS_chroot, 0), Outcome::Killed(libc::SIGSYS)),
        (call(libc::SYS_swapon, 0), Outcome::Killed(libc::SIGSYS)),
        (call(libc::SYS_umount2, 0), Outcome::Killed(libc::SIGSYS)),
        // Logged, and then refused by the kernel itself for want of the capability.
        (call(libc::SYS_sethostname, 0), one(libc::EPERM)),
        // Without a tracer there is no such call.
        (call(libc::SYS_setdomainname, 0), one(libc::ENOSYS)),
        (call(libc::SYS_personality, EXACT), one(libc::ENOTTY)),
        (call(libc::SYS_personality, EXACT + 1), Outcome::Done),
        (call(libc::SYS_personality, MASKED), one(libc::ENOTEMPTY)),
        (call(libc::SYS_getpgid, 4), one(101)),
        (call(libc::SYS_getpgid, 0x7fff_fff0), one(libc::ESRCH)),
        (call(libc::SYS_sched_getscheduler, 5), one(102)),
        (call(libc::SYS_sched_getscheduler, 0x7fff_fff0), one(libc::ESRCH)),
        (call(libc::SYS_sched_get_priority_min, LARGE - 1), one(libc::EINVAL)),
        (call(libc::SYS_sched_get_priority_min, LARGE), one(105)),
        (call(libc::SYS_sched_get_priority_min, 0x2_0000_0000), one(105)),
        (call(libc::SYS_sched_get_priority_min, 0x7fff_fff0), one(libc::EINVAL)),
        // The kernel itself takes 32 bits of it, and 5 is a policy.
        (call(libc::SYS_sched_get_priority_max, LARGE), Outcome::Done),
        (call(libc::SYS_sched_get_priority_max, LARGE + 1), one(106)),
        (call(libc::SYS_setfsuid, 50), Outcome::Killed(libc::SIGSYS)),
        (call(libc::SYS_setfsuid, 55), Outcome::Done),
        (call(libc::SYS_setfsuid, 60), Outcome::Killed(libc::SIGSYS)),
        (call(libc::SYS_getsid, 0), Outcome::Done),
        (call(libc::SYS_getsid, 1), one(103)),
        (format!("{}:1:7", libc::SYS_getpriority), one(104)),
        (format!("{}:0:0", libc::SYS_getpriority), Outcome::Done),
        (format!("{}:0:7777777", libc::SYS_getpriority), one(libc::ESRCH)),
    ];
    let mut given = Given::new(host, "seccomp").set("/linux/seccomp", profile);
    for (call, _) in &cases {
        given = given.ask(&[&format!("call={call}")]);
    }
    let (spec, report) = given.report();
    let wrong: Vec<_> = cases.iter().filter(|(call, wanted)| report.calls.get(call) != Some(wanted)).collect();
    assert!(wrong.is_empty(), "not as expected: {wrong:?}: {:?}", report.calls);
    holds(&spec, &report);

    // Everything is forbidden that is not allowed; the first process itself is not there to be asked.
    let strict = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::ENOTBLK,
        "syscalls": [{ "names": ["execve", "exit_group", "write"], "action": "SCMP_ACT_ALLOW" }],
    });
    let refused = Given::new(host, "strict").set("/linux/seccomp", strict).run();
    // The runtime's own last steps may be forbidden as well; then Start says so.
    assert!(refused.as_ref().map_or(true, |ended| ended.status != 0), "{refused:?}");
}
