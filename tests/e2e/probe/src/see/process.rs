//! The program's own process.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e_probe::{Capabilities, Process, Scheduler, names};
use rustix::process::Resource;

use super::read;

const LIMITS: [(&str, Resource); 16] = [
    ("RLIMIT_CPU", Resource::Cpu),
    ("RLIMIT_FSIZE", Resource::Fsize),
    ("RLIMIT_DATA", Resource::Data),
    ("RLIMIT_STACK", Resource::Stack),
    ("RLIMIT_CORE", Resource::Core),
    ("RLIMIT_RSS", Resource::Rss),
    ("RLIMIT_NPROC", Resource::Nproc),
    ("RLIMIT_NOFILE", Resource::Nofile),
    ("RLIMIT_MEMLOCK", Resource::Memlock),
    ("RLIMIT_AS", Resource::As),
    ("RLIMIT_LOCKS", Resource::Locks),
    ("RLIMIT_SIGPENDING", Resource::Sigpending),
    ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
    ("RLIMIT_NICE", Resource::Nice),
    ("RLIMIT_RTPRIO", Resource::Rtprio),
    ("RLIMIT_RTTIME", Resource::Rttime),
];

/// /proc/self/status: key to value.
pub struct Status(BTreeMap<String, String>);

impl Status {
    pub fn read() -> Result<Self> {
        let text = read("/proc/self/status")?;
        let row = |line: &str| line.split_once(':').map(|(key, value)| (key.to_owned(), value.trim().to_owned()));
        Ok(Self(text.lines().filter_map(row).collect()))
    }

    fn text(&self, key: &str) -> Result<&str> {
        self.0.get(key).map(String::as_str).with_context(|| format!("/proc/self/status has no {key}"))
    }

    fn numbers(&self, key: &str) -> Result<Vec<u32>> {
        let parse = |word: &str| word.parse().with_context(|| format!("{key} in /proc/self/status is {word:?}"));
        self.text(key)?.split_whitespace().map(parse).collect()
    }

    fn number(&self, key: &str) -> Result<u32> {
        self.numbers(key)?.first().copied().with_context(|| format!("{key} in /proc/self/status is empty"))
    }

    fn mask(&self, key: &str) -> Result<u64> {
        let text = self.text(key)?;
        u64::from_str_radix(text, 16).with_context(|| format!("{key} in /proc/self/status is {text:?}"))
    }
}

pub fn capabilities(status: &Status) -> Result<Capabilities> {
    let set = |key: &str| -> Result<BTreeSet<String>> { Ok(names::capabilities(status.mask(key)?).collect()) };
    Ok(Capabilities {
        bounding: set("CapBnd")?,
        effective: set("CapEff")?,
        inheritable: set("CapInh")?,
        permitted: set("CapPrm")?,
        ambient: set("CapAmb")?,
    })
}

/// What is open now, but for the descriptor that looks.
pub fn descriptors() -> Result<BTreeMap<u32, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").context("list /proc/self/fd")? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().parse().context("/proc/self/fd has only numbers")?;
        // The listing's own descriptor shows as the directory itself.
        if let Ok(target) = fs::read_link(entry.path()).map(|path| path.to_string_lossy().into_owned())
            && !(target.starts_with("/proc/") && target.ends_with("/fd"))
        {
            found.insert(number, target);
        }
    }
    Ok(found)
}

pub fn process(status: &Status, descriptors: BTreeMap<u32, String>) -> Result<Process> {
    let umask = u32::from_str_radix(status.text("Umask")?, 8).context("Umask is octal")?;
    let score = read("/proc/self/oom_score_adj")?;
    let limits = LIMITS.map(|(name, resource)| {
        let limit = rustix::process::getrlimit(resource);
        (name.to_owned(), (limit.current, limit.maximum))
    });
    Ok(Process {
        pid: status.number("Pid")? as i32,
        parent: status.number("PPid")? as i32,
        arguments: std::env::args_os().map(lossy).collect(),
        environment: std::env::vars_os().map(|(name, value)| format!("{}={}", lossy(name), lossy(value))).collect(),
        directory: lossy(std::env::current_dir().context("the working directory")?.into_os_string()),
        uids: status.numbers("Uid")?,
        gids: status.numbers("Gid")?,
        groups: status.numbers("Groups")?,
        umask,
        limits: limits.into_iter().collect(),
        oom_score_adj: score.trim().parse().with_context(|| format!("oom_score_adj is {score:?}"))?,
        scheduler: scheduler()?,
        io_priority: io_priority()?,
        processors: status.text("Cpus_allowed_list")?.to_owned(),
        personality: personality()?,
        no_new_privileges: status.number("NoNewPrivs")? == 1,
        secure_bits: rustix::thread::capabilities_secure_bits().context("prctl(PR_GET_SECUREBITS)")?.bits(),
        seccomp: status.number("Seccomp")?,
        blocked_signals: status.mask("SigBlk")?,
        ignored_signals: status.mask("SigIgn")?,
        descriptors,
    })
}

fn lossy(text: OsString) -> String {
    text.to_string_lossy().into_owned()
}

fn scheduler() -> Result<Scheduler> {
    // struct sched_attr in its first version (include/uapi/linux/sched/types.h): 48 bytes.
    let mut bytes = [0_u8; 48];
    // SAFETY: the kernel writes at most the given 48 bytes, which `bytes` has.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, bytes.as_mut_ptr(), bytes.len(), 0) };
    ensure!(result == 0, "sched_getattr: {}", std::io::Error::last_os_error());
    let short = |at: usize| bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).map(u32::from_ne_bytes);
    let long = |at: usize| bytes.get(at..at + 8).and_then(|part| part.try_into().ok()).map(u64::from_ne_bytes);
    let fields = || {
        Some(Scheduler {
            policy: short(4)?,
            flags: long(8)?,
            nice: short(16)? as i32,
            priority: short(20)?,
            runtime: long(24)?,
            deadline: long(32)?,
            period: long(40)?,
        })
    };
    fields().context("struct sched_attr has 48 bytes")
}

fn io_priority() -> Result<(u32, u32)> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: it takes two numbers.
    let value = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) };
    ensure!(value >= 0, "ioprio_get: {}", std::io::Error::last_os_error());
    // IOPRIO_CLASS_SHIFT and the level's bits of include/uapi/linux/ioprio.h.
    Ok((value as u32 >> 13, value as u32 & 0x7))
}

fn personality() -> Result<u32> {
    let text = read("/proc/self/personality")?;
    u32::from_str_radix(text.trim(), 16).with_context(|| format!("/proc/self/personality is {text:?}"))
}
