//! `process` against the report.

use std::collections::BTreeSet;

use caisson_e2e_probe::Report;
use serde_json::Value;

use super::{Difference, numbers, same, texts};

/// What it is if nothing else is asked for.
const USUAL_UMASK: u32 = 0o022;

/// The last of the descriptors that every process has.
const STANDARD_ERROR: u32 = 2;

/// The signals that programs use (1 to 31, as bits 0 to 30), without the one that Rust's own runtime ignores before
/// `main` (SIGPIPE). What lies above is the C library's, whose first numbers Go programs hand down ignored.
const SIGNALS: u64 = 0x7fff_ffff & !(1 << (libc::SIGPIPE - 1));

pub(super) fn compare(asked: &Value, report: &Report, found: &mut Vec<Difference>) {
    let seen = &report.process;
    let number = |value: &Value| value.as_u64().unwrap_or_default() as u32;
    same("process.args", &seen.arguments, &texts(&asked["args"])[..], found);
    same("process.cwd", &seen.directory, asked["cwd"].as_str().unwrap_or_default(), found);
    for variable in texts(&asked["env"]) {
        if !seen.environment.iter().any(|has| has == variable) {
            found.push(format!("process.env: {variable:?} is not in {:?}", seen.environment));
        }
    }
    let user = &asked["user"];
    same("process.user.uid", &seen.uids, &[number(&user["uid"]); 4][..], found);
    same("process.user.gid", &seen.gids, &[number(&user["gid"]); 4][..], found);
    let groups = |list: &[u32]| list.iter().copied().collect::<BTreeSet<u32>>();
    let wanted = groups(&numbers(&user["additionalGids"]));
    // Some take the first group into the list as well, as initgroups(3) does.
    let mut seen_groups = groups(&seen.groups);
    if !wanted.contains(&number(&user["gid"])) {
        seen_groups.remove(&number(&user["gid"]));
    }
    same("process.user.additionalGids", &seen_groups, &wanted, found);
    let umask = user["umask"].as_u64().map_or(USUAL_UMASK, |mask| mask as u32);
    same("process.user.umask", &seen.umask, &umask, found);
    for limit in asked["rlimits"].as_array().into_iter().flatten() {
        let kind = limit["type"].as_str().unwrap_or_default();
        // The kernel's infinity is all ones.
        let finite = |value: &Value| value.as_u64().filter(|number| *number != u64::MAX);
        let wanted = Some((finite(&limit["soft"]), finite(&limit["hard"])));
        same(&format!("process.rlimits {kind}"), &seen.limits.get(kind).copied(), &wanted, found);
    }
    if let Some(score) = asked["oomScoreAdj"].as_i64() {
        same("process.oomScoreAdj", &i64::from(seen.oom_score_adj), &score, found);
    }
    let no_new = asked["noNewPrivileges"].as_bool().unwrap_or_default();
    same("process.noNewPrivileges", &seen.no_new_privileges, &no_new, found);
    same("securebits", &seen.secure_bits, &0, found);
    same("blocked signals", &seen.blocked_signals, &0, found);
    same("ignored signals", &(seen.ignored_signals & SIGNALS), &0, found);
    let leaked: Vec<_> = seen.descriptors.iter().filter(|(number, _)| **number > STANDARD_ERROR).collect();
    if !leaked.is_empty() {
        found.push(format!("open descriptors beside the standard ones: {leaked:?}"));
    }
    if asked["capabilities"].is_object() {
        capabilities(asked, report, found);
    }
}

fn capabilities(asked: &Value, report: &Report, found: &mut Vec<Difference>) {
    let set = |name: &str| -> BTreeSet<String> {
        texts(&asked["capabilities"][name]).into_iter().map(str::to_owned).collect()
    };
    let root = asked["user"]["uid"].as_u64() == Some(0);
    // exec computes these two anew (capabilities(7)): for root from the bounding and inheritable sets, for others from
    // the ambient.
    let after_exec = if root { set("bounding").union(&set("inheritable")).cloned().collect() } else { set("ambient") };
    let seen = &report.capabilities;
    let sets = [
        ("bounding", &seen.bounding, set("bounding")),
        ("inheritable", &seen.inheritable, set("inheritable")),
        ("ambient", &seen.ambient, set("ambient")),
        ("permitted", &seen.permitted, after_exec.clone()),
        ("effective", &seen.effective, after_exec),
    ];
    for (name, seen, wanted) in sets {
        same(&format!("process.capabilities.{name}"), seen, &wanted, found);
    }
}
