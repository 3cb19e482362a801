//! Finding and entering the program.

use std::{
    convert::Infallible,
    ffi::{CString, OsStr},
    io::Read,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{errno::Errno, unistd::execve};
use rustix::fs::{FileType, OFlags, fstat};

use super::{inroot::Root, seccomp};
use crate::plan::{Failure, FailureKind, ProcessPlan};

/// As much of /etc/passwd as is read; the image could make it endless.
const MAX_PASSWD: u64 = 1024 * 1024;

/// The program's environment: of a name given twice the last value counts; HOME comes from the container's
/// /etc/passwd if it is missing or empty, as with runc.
pub(super) fn environment(process: &ProcessPlan, root: &Root) -> Vec<CString> {
    let mut env = without_repetition(&process.env);
    let given = env.iter().position(|entry| entry.starts_with("HOME="));
    if given.is_none_or(|place| env.get(place).is_some_and(|entry| entry == "HOME=")) {
        let home = read_passwd(root).and_then(|text| home_of(&text, process.user.uid)).unwrap_or_else(|| "/".into());
        let home = format!("HOME={home}");
        match given.and_then(|place| env.get_mut(place)) {
            Some(empty) => *empty = home,
            None => env.push(home),
        }
    }
    env.into_iter().filter_map(|entry| CString::new(entry).ok()).collect()
}

fn without_repetition(env: &[String]) -> Vec<String> {
    let mut result: Vec<String> = Vec::with_capacity(env.len() + 1);
    let mut places = std::collections::HashMap::new();
    for entry in env {
        let name = entry.split('=').next().unwrap_or_default();
        match places.get(name).and_then(|place: &usize| result.get_mut(*place)) {
            Some(earlier) => entry.clone_into(earlier),
            None => {
                places.insert(name, result.len());
                result.push(entry.clone());
            }
        }
    }
    result
}

fn read_passwd(root: &Root) -> Option<String> {
    // Not blocking: the image may have put a pipe there.
    let file = root.open(Path::new("/etc/passwd"), OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY).ok()?;
    if !FileType::from_raw_mode(fstat(&file).ok()?.st_mode).is_file() {
        return None;
    }
    let mut text = Vec::new();
    std::fs::File::from(file).take(MAX_PASSWD).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// The home directory of a user in the text of /etc/passwd: `name:password:uid:gid:comment:home:shell`.
fn home_of(passwd: &str, uid: u32) -> Option<String> {
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2).and_then(|field| field.parse().ok()) == Some(uid))
        .and_then(|fields| fields.get(5).map(|home| (*home).to_owned()))
        .filter(|home| !home.is_empty() && !home.contains('\0'))
}

/// Enters the program. Returns only if that failed.
pub(super) fn exec(process: &ProcessPlan, env: &[CString]) -> Result<Infallible, Failure> {
    let name = process.args.first().map_or("", String::as_str);
    let program = find(name, env)?;
    let args: Vec<CString> = process.args.iter().filter_map(|arg| CString::new(arg.as_str()).ok()).collect();
    let failed = |errno| {
        let kind =
            if matches!(errno, Errno::ENOENT | Errno::ENOTDIR) { FailureKind::NotFound } else { FailureKind::Invalid };
        Failure::new(kind, format!("exec: {name:?}: {}", errno.desc().to_lowercase()))
    };
    let program = CString::new(program.as_os_str().as_bytes()).map_err(|_| failed(Errno::EINVAL))?;
    // As late as can be: the profile need allow nothing but the program's entry.
    if process.no_new_privileges {
        seccomp::install(process)?;
    }
    execve(&program, &args, env).map_err(failed)
}

fn find(name: &str, env: &[CString]) -> Result<PathBuf, Failure> {
    if name.contains('/') {
        return Ok(name.into());
    }
    let path = env.iter().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH=")).unwrap_or_default();
    path.split(|byte| *byte == b':')
        // An empty entry would mean the working directory; runc does not search that either.
        .filter(|directory| !directory.is_empty())
        .map(|directory| Path::new(OsStr::from_bytes(directory)).join(name))
        .find(|candidate| {
            rustix::fs::stat(candidate)
                .is_ok_and(|found| FileType::from_raw_mode(found.st_mode).is_file() && found.st_mode & 0o111 != 0)
        })
        .ok_or_else(|| {
            Failure::new(FailureKind::NotFound, format!("exec: {name:?}: executable file not found in $PATH"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_name_given_twice_the_last_value_counts() {
        let env = ["A=1", "B=2", "A=3", "C=x=y"].map(String::from);
        assert_eq!(without_repetition(&env), ["A=3", "B=2", "C=x=y"]);
    }

    #[test]
    fn home_is_found_by_user_number() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbroken:line\nuser:x:1000:1000::/home/user:/bin/sh\nempty:x:7:7:::\n";
        assert_eq!(home_of(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_of(passwd, 1000).as_deref(), Some("/home/user"));
        assert_eq!(home_of(passwd, 7), None);
        assert_eq!(home_of(passwd, 2), None);
    }

    proptest::proptest! {
        #[test]
        fn any_passwd_text_is_read_without_panic(text: String, uid: u32) {
            let _ = home_of(&text, uid);
        }
    }
}
