//! `mounts`, masked and read-only paths, the root, and devices against the report.

use std::collections::BTreeSet;

use caisson_e2e_probe::{Look, Mount, Node, Outcome, Report};
use serde_json::Value;

use super::{Difference, numbers, own_users, same, texts};

pub(super) fn compare(spec: &Value, report: &Report, found: &mut Vec<Difference>) {
    for mount in spec["mounts"].as_array().into_iter().flatten() {
        let point = mount["destination"].as_str().unwrap_or_default();
        match report.mounts.iter().rfind(|seen| seen.point == point) {
            Some(seen) => one(spec, mount, seen, found),
            None => found.push(format!("mounts {point}: nothing is mounted there")),
        }
    }
    root(spec, report, found);
    masked(spec, report, found);
    devices(spec, report, found);
}

fn is_bind(mount: &Value) -> bool {
    mount["type"] == "bind" || texts(&mount["options"]).iter().any(|word| ["bind", "rbind"].contains(word))
}

fn one(spec: &Value, asked: &Value, seen: &Mount, found: &mut Vec<Difference>) {
    let field = format!("mounts {}", seen.point);
    let bind = is_bind(asked);
    if !bind {
        let kind = match asked["type"].as_str().unwrap_or_default() {
            "cgroup" => "cgroup2",
            kind => kind,
        };
        same(&format!("{field} type"), &seen.kind, kind, found);
    }
    let options = texts(&asked["options"]);
    let fixed = texts(&spec["linux"]["readonlyPaths"]).contains(&&*seen.point);
    let (wanted, refused) = flags(&options, fixed);
    for flag in &wanted {
        if !seen.options.contains(*flag) {
            found.push(format!("{field}: no {flag:?} in {:?}", seen.options));
        }
    }
    // What a bind mount shows may have flags of its own, which stay.
    for flag in refused.iter().filter(|flag| !bind && seen.options.contains(**flag)) {
        found.push(format!("{field}: {flag:?} is in {:?}", seen.options));
    }
    for option in options {
        // Group ids are shown as the first user namespace has them.
        let id = option.starts_with("gid=") || option.starts_with("uid=");
        if !(id && own_users(spec))
            && let Some(wanted) = super_option(asked["type"].as_str().unwrap_or_default(), option)
            && !seen.super_options.contains(&wanted)
        {
            found.push(format!("{field}: no {wanted:?} in {:?}", seen.super_options));
        }
    }
    propagation(&field, asked, seen, found);
}

/// The flags that mountinfo must show, and those that it must not, by the last word on each.
fn flags(options: &[&str], fixed: bool) -> (BTreeSet<&'static str>, BTreeSet<&'static str>) {
    const PAIRS: [(&str, &str); 5] = [
        ("nosuid", "suid"),
        ("nodev", "dev"),
        ("noexec", "exec"),
        ("nodiratime", "diratime"),
        ("nosymfollow", "symfollow"),
    ];
    let plain = |word: &&str| -> String { word.strip_prefix('r').unwrap_or(word).to_owned() };
    let last = |set: &str, clear: &str| {
        options.iter().rev().find(|word| [set, clear].contains(*word) || [set, clear].contains(&&*plain(word)))
    };
    let (mut wanted, mut refused) = (BTreeSet::new(), BTreeSet::new());
    for (set, clear) in PAIRS {
        let is_set = last(set, clear).is_some_and(|word| word.contains(set));
        if is_set {
            wanted.insert(set)
        } else {
            refused.insert(set)
        };
    }
    let read_only = options.iter().rev().find(|word| ["ro", "rw", "rro", "rrw"].contains(*word));
    let read_only = fixed || read_only.is_some_and(|word| word.ends_with("ro"));
    wanted.insert(if read_only { "ro" } else { "rw" });
    let times = options.iter().rev().find_map(|word| match *word {
        "noatime" | "rnoatime" => Some("noatime"),
        "strictatime" | "rstrictatime" => Some("strictatime"),
        "relatime" | "rrelatime" => Some("relatime"),
        _ => None,
    });
    // mountinfo shows strictatime as neither of the others.
    for word in ["noatime", "relatime"] {
        if times.unwrap_or("relatime") == word {
            wanted.insert(word)
        } else {
            refused.insert(word)
        };
    }
    (wanted, refused)
}

/// How the kernel shows an option of a file system; None if it does not, or nobody asks.
fn super_option(kind: &str, option: &str) -> Option<String> {
    let (key, value) = option.split_once('=')?;
    match (kind, key) {
        ("tmpfs", "size") => {
            let (digits, unit) =
                value.split_at(value.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(value.len()));
            let number: u64 = digits.parse().ok()?;
            let kib = match unit {
                "" => number / 1024,
                "k" | "K" => number,
                "m" | "M" => number * 1024,
                "g" | "G" => number * 1024 * 1024,
                _ => return None,
            };
            Some(format!("size={kib}k"))
        }
        ("tmpfs", "mode") => {
            Some(value.trim_start_matches('0')).filter(|mode| *mode != "1777").map(|mode| format!("mode={mode}"))
        }
        ("tmpfs", "nr_inodes" | "uid" | "gid") => Some(option.to_owned()),
        ("devpts", "mode" | "ptmxmode") => Some(format!("{key}={}", value.trim_start_matches('0'))),
        ("devpts", "gid") => Some(option.to_owned()),
        _ => None,
    }
}

fn propagation(field: &str, asked: &Value, seen: &Mount, found: &mut Vec<Difference>) {
    let kind = texts(&asked["options"]).iter().rev().find_map(|word| match *word {
        "shared" | "rshared" => Some("shared"),
        "unbindable" | "runbindable" => Some("unbindable"),
        "private" | "rprivate" => Some("private"),
        _ => None,
    });
    let is = ["shared", "unbindable"].into_iter().find(|kind| seen.propagation.contains(*kind));
    // Slaves of a mount that is not shared are private, and that is not the specification's to say.
    same(&format!("{field} propagation"), is.unwrap_or("private"), kind.unwrap_or("private"), found);
}

fn root(spec: &Value, report: &Report, found: &mut Vec<Difference>) {
    const READ_ONLY: Outcome = Outcome::Refused(libc::EROFS);
    let Some(write) = report.writes.get("/") else { return };
    let user = spec["process"]["user"]["uid"].as_u64() == Some(0);
    let read_only = spec["root"]["readonly"].as_bool() == Some(true);
    match (read_only, user) {
        (true, _) => same("root.readonly", write, &READ_ONLY, found),
        (false, true) => same("root.readonly", write, &Outcome::Done, found),
        (false, false) => {}
    }
}

fn masked(spec: &Value, report: &Report, found: &mut Vec<Difference>) {
    for path in texts(&spec["linux"]["maskedPaths"]) {
        let hidden = match report.looks.get(path) {
            Some(Look::Refused(error)) => *error == libc::ENOENT,
            Some(Look::Directory { names, .. }) => names.as_ref().is_ok_and(Vec::is_empty),
            Some(Look::File { text, .. }) => text.as_ref().is_ok_and(String::is_empty),
            None => false,
        };
        if !hidden {
            found.push(format!("linux.maskedPaths {path}: it shows {:?}", report.looks.get(path)));
        }
    }
    for path in texts(&spec["linux"]["readonlyPaths"]) {
        if report.looks.get(path) == Some(&Look::Refused(libc::ENOENT)) {
            continue;
        }
        if !matches!(report.writes.get(path), Some(Outcome::Refused(_))) {
            found.push(format!("linux.readonlyPaths {path}: writing it is {:?}", report.writes.get(path)));
        }
        let mount = report.mounts.iter().rfind(|mount| mount.point == path);
        if mount.is_none_or(|mount| !mount.options.contains("ro")) {
            found.push(format!("linux.readonlyPaths {path}: {mount:?}"));
        }
    }
}

/// What every container has: path, minor number of the memory devices (major 1), or of tty (5, 0).
const DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

fn devices(spec: &Value, report: &Report, found: &mut Vec<Difference>) {
    let node =
        |kind, (major, minor), mode, (uid, gid)| Node { kind, major, minor, mode, uid, gid, target: String::new() };
    let mut wanted: Vec<(&str, Node)> =
        DEVICES.iter().map(|(path, major, minor)| (*path, node('c', (*major, *minor), 0o666, (0, 0)))).collect();
    for device in spec["linux"]["devices"].as_array().into_iter().flatten() {
        let number = |key: &str| numbers(&Value::Array(vec![device[key].clone()])).first().copied();
        let kind = match device["type"].as_str() {
            Some("b") => 'b',
            Some("p") => 'p',
            _ => 'c',
        };
        let numbers = (number("major").unwrap_or_default(), number("minor").unwrap_or_default());
        let owner = (number("uid").unwrap_or_default(), number("gid").unwrap_or_default());
        let path = device["path"].as_str().unwrap_or_default();
        wanted.push((path, node(kind, numbers, number("fileMode").unwrap_or(0o666), owner)));
    }
    for (path, node) in wanted {
        let mut seen = report.devices.get(path).cloned();
        // In a user namespace the nodes are those of the first one, and so are their owners.
        if let Some(seen) = seen.as_mut().filter(|_| own_users(spec)) {
            (seen.uid, seen.gid) = (node.uid, node.gid);
        }
        same(&format!("device {path}"), &seen, &Some(node), found);
    }
    for (path, target) in LINKS {
        let seen = report.devices.get(path).map(|node| &*node.target);
        same(&format!("link {path}"), &seen, &Some(target), found);
    }
}
