//! Trials: device nodes and system calls that the container may be forbidden.

use std::{fs, io, os::unix::process::ExitStatusExt, process::Command};

use anyhow::{Context, Result, bail};
use caisson_e2e_probe::{Access, Outcome};
use rustix::fs::{CWD, FileType};

use super::paths::{open, outcome};

/// In a file system that takes device nodes.
const NODE: &str = "/dev/made-by-the-probe";

/// Makes the node `KIND:MAJOR:MINOR`, opens it both ways, and removes it.
pub fn node(text: &str) -> Result<Access> {
    let mut words = text.split(':');
    let kind = match words.next() {
        Some("c") => FileType::CharacterDevice,
        Some("b") => FileType::BlockDevice,
        _ => bail!("{text:?} is no KIND:MAJOR:MINOR"),
    };
    let mut number = || words.next().and_then(|word| word.parse().ok()).context("a node has two numbers");
    let device = rustix::fs::makedev(number()?, number()?);
    let made = outcome(rustix::fs::mknodat(CWD, NODE, kind, 0o666.into(), device).map_err(io::Error::from));
    if made != Outcome::Done {
        return Ok(Access { made, read: made, write: made });
    }
    let access = Access { made, read: outcome(open(NODE, false)), write: outcome(open(NODE, true)) };
    fs::remove_file(NODE).context("remove the node again")?;
    Ok(access)
}

/// The exit code of `probe call` that says: refused, and the error's number is on standard output.
const REFUSED: i32 = 1;

/// Makes the system call in a process of its own, because it may be killed for it.
pub fn in_a_child(text: &str) -> Result<Outcome> {
    let output = Command::new("/proc/self/exe").args(["call", text]).output().context("start another of myself")?;
    let status = output.status;
    if let Some(signal) = status.signal() {
        return Ok(Outcome::Killed(signal));
    }
    let told = String::from_utf8_lossy(&output.stdout);
    match status.code() {
        Some(0) => Ok(Outcome::Done),
        Some(REFUSED) if !told.is_empty() => Ok(Outcome::Refused(told.trim().parse().context("an error's number")?)),
        _ => bail!("call {text}: {status}: {told}{}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// `probe call NUMBER:ARGUMENT...`: makes the system call, with up to six numbers (decimal, or hexadecimal with 0x).
pub fn call(text: &str) -> Result<()> {
    let mut words = [0_i64; 7];
    for (at, word) in text.split(':').enumerate() {
        let slot = words.get_mut(at).with_context(|| format!("{text:?} has more than six arguments"))?;
        *slot = match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16)? as i64,
            None => word.parse()?,
        };
    }
    let [number, a, b, c, d, e, f] = words;
    // SAFETY: the process is made for this one call and holds nothing; the test gives numbers that point nowhere.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 {
        let error = io::Error::last_os_error().raw_os_error().unwrap_or(-1);
        println!("{error}");
        std::process::exit(REFUSED);
    }
    Ok(())
}
