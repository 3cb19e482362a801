//! Who belongs to a pod, written down for the day its shim is killed: `delete` then ends what is left. A pid
//! alone names nobody for long, so each stands beside its process's start time, and the signal goes through a pidfd that
//! was opened before the start time was compared.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use caisson_vmm_client::process::open_pidfd;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::Pid,
};

/// What containerd has as the first container's pid: a thread of the shim, which ends with it.
pub const TASK: &str = "task";

/// One process of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// shim, vmm, fsd or [`TASK`].
    pub role: String,
    /// Its pid.
    pub pid: u32,
    /// Clock ticks since the host's boot (field 22 of /proc/PID/stat).
    pub started: u64,
}

impl Member {
    /// The living process `pid`.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn of(role: &str, pid: u32) -> io::Result<Self> {
        Ok(Self { role: role.to_owned(), pid, started: start_time(pid)? })
    }
}

/// Writes the pod's list.
///
/// # Errors
/// What the file system says.
pub fn record(path: &Path, members: &[Member]) -> io::Result<()> {
    let lines: String =
        members.iter().map(|member| format!("{} {} {}\n", member.role, member.pid, member.started)).collect();
    fs::write(path, lines)
}

/// Reads a pod's list; no file is an empty list, and an invalid line is skipped.
pub fn recorded(path: &Path) -> Vec<Member> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(parse_line).collect()
}

/// Sets how willingly the kernel kills `pid` when memory is short, -1000 (never) to 1000.
///
/// # Errors
/// EACCES for less than the process was started with, without CAP_SYS_RESOURCE.
pub fn set_oom_score(pid: u32, score: i32) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
}

/// Makes this process one step easier to kill than containerd, which started it: of the two its loss costs less.
///
/// # Errors
/// If /proc is not there.
pub fn raise_own_oom_score() -> io::Result<()> {
    let born_with = fs::read_to_string("/proc/self/oom_score_adj")?;
    let score: i32 = born_with.trim().parse().map_err(io::Error::other)?;
    set_oom_score(std::process::id(), score.saturating_add(1).min(1000))
}

fn parse_line(line: &str) -> Option<Member> {
    let mut words = line.split(' ');
    let member =
        Member { role: words.next()?.into(), pid: words.next()?.parse().ok()?, started: words.next()?.parse().ok()? };
    (words.next().is_none() && member.pid > 1).then_some(member)
}

fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::other(format!("unexpected /proc/{pid}/stat")))
}

/// The program's name, in parentheses, may hold anything; the fields behind it are numbers.
fn parse_start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Kills those of `members` that still live (processes, not threads) and waits until they are gone, at most `limit`. The pids that outlive it.
pub fn end(members: &[Member], limit: Duration) -> Vec<u32> {
    let deadline = Instant::now() + limit;
    let mut living: Vec<(u32, OwnedFd)> =
        members.iter().filter_map(|member| Some((member.pid, kill(member)?))).collect();
    while !living.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let millis = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut waiting: Vec<PollFd> =
            living.iter().map(|(_, pidfd)| PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut waiting, millis);
        let ended: Vec<bool> = waiting.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let mut ended = ended.into_iter();
        living.retain(|_| !ended.next().unwrap_or(false));
        if left.is_zero() {
            break;
        }
    }
    living.into_iter().map(|(pid, _)| pid).collect()
}

fn kill(member: &Member) -> Option<OwnedFd> {
    let pidfd = open_pidfd(Pid::from_raw(i32::try_from(member.pid).ok()?)).ok()?;
    if start_time(member.pid).ok()? != member.started {
        return None;
    }
    // SAFETY: pidfd_send_signal reads no memory of ours when its third argument is null.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    (sent == 0).then_some(pidfd)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_recorded_process_is_ended_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("processes");
        let (mut ours, mut other) = (sleeper(), sleeper());
        let mut stranger = Member::of("fsd", other.id()).unwrap();
        stranger.started += 1;
        record(&list, &[Member::of("vmm", ours.id()).unwrap(), stranger]).unwrap();
        let members = recorded(&list);
        assert_eq!(members.len(), 2);
        let reaper = std::thread::spawn(move || ours.wait().unwrap());
        assert_eq!(end(&members, Duration::from_secs(10)), Vec::<u32>::new());
        assert!(!reaper.join().unwrap().success());
        assert_eq!(other.try_wait().unwrap(), None, "its start time is another");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    fn sleeper() -> std::process::Child {
        Command::new("/bin/sleep").arg("1000").spawn().unwrap()
    }

    #[test]
    fn a_program_cannot_forge_its_start_time_by_its_name() {
        let stat = "7 (a) R 9 9 (9) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(parse_start_time(stat), Some(4711));
        assert!(recorded(Path::new("/no/such")).is_empty());
        assert_eq!(parse_line("vmm 1 5"), None, "never init");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_skipped(text in ".{0,100}") {
            let _ = parse_line(&text);
            let _ = parse_start_time(&text);
        }
    }
}
