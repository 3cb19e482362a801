//! The agent's library behind Unix sockets, for tests: `caisson-agent-local <directory>`.
//!
//! The directory holds `share/` (in place of the virtio-fs mount) and `cgroup/` (a mounted cgroup2); the agent makes
//! `agent.sock` and `stdio.sock` in it, and `ready` last. A connection to stdio.sock begins with the port that a vsock
//! peer would have, four bytes, little-endian. To be run as PID 1 of a pid namespace, as in a guest.
//!
//! `caisson-agent-local attack` is a hostile program inside a container: see [`attack`].

use std::{convert::Infallible, env, fs, io, path::Path, path::PathBuf, process::ExitCode};

use caisson_agent::{
    cgroup::Cgroups,
    containers::{Containers, Share},
    launch::Launcher,
    reaper::Reaper,
    service, stage,
    streams::Streams,
    transport::{Accept, ByteStream},
};
use tokio::{io::AsyncReadExt, net::UnixListener};

struct Plain(UnixListener);

impl Accept for Plain {
    async fn accept(&mut self) -> io::Result<(Box<dyn ByteStream>, u32)> {
        let (stream, _) = self.0.accept().await?;
        Ok((Box::new(stream), 0))
    }
}

struct Numbered(UnixListener);

impl Accept for Numbered {
    async fn accept(&mut self) -> io::Result<(Box<dyn ByteStream>, u32)> {
        let (mut stream, _) = self.0.accept().await?;
        let port = stream.read_u32_le().await?;
        Ok((Box::new(stream), port))
    }
}

fn main() -> ExitCode {
    let argument = env::args_os().nth(1).expect("a directory, or \"stage\"");
    if argument == stage::ARGUMENT {
        return stage::main().into();
    }
    if argument == "attack" {
        attack();
    }
    let Err(error) = run(Path::new(&argument));
    eprintln!("{error:#}");
    ExitCode::FAILURE
}

/// Stops every process that appears in its pid namespace, once, as soon as it can (ptrace(2)), and appends to /tmp/got what
/// it could make that do: its user and its permitted capabilities, if those are of this program's user namespace.
fn attack() -> ! {
    use std::{collections::HashSet, io::Write, ptr::null_mut};
    let mut got = fs::File::create("/tmp/got").expect("the container can write");
    let users = |who: &str| fs::read_link(format!("/proc/{who}/ns/user"));
    let own = users("self").expect("a user namespace");
    let mut met = HashSet::from([std::process::id() as i32]);
    loop {
        let names = fs::read_dir("/proc").expect("a /proc").flatten().map(|entry| entry.file_name());
        for pid in names.filter_map(|name| name.to_str()?.parse::<i32>().ok()) {
            // SAFETY: these requests take no memory of ours.
            let request = |request| unsafe { libc::ptrace(request, pid, null_mut::<u8>(), null_mut::<u8>()) };
            if !met.insert(pid) || request(libc::PTRACE_SEIZE) != 0 || request(libc::PTRACE_INTERRUPT) != 0 {
                continue;
            }
            let mut status = 0;
            // SAFETY: the kernel writes one integer.
            let waited = unsafe { libc::waitpid(pid, &mut status, libc::__WALL) };
            if waited != pid || !libc::WIFSTOPPED(status) {
                // It has ended before.
                continue;
            }
            let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let field = |name| text.lines().find_map(|line| line.strip_prefix(name)?.split_ascii_whitespace().next());
            if let (Some(user), Some(capabilities)) = (field("Uid:"), field("CapPrm:")) {
                let met = match users(&pid.to_string()) {
                    Ok(namespace) if namespace == own => Some(capabilities),
                    // It was killed meanwhile.
                    Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => None,
                    _ => Some("elsewhere"),
                };
                if let Some(capabilities) = met {
                    writeln!(got, "{user} {capabilities}").expect("the container can write");
                }
            }
            request(libc::PTRACE_DETACH);
        }
    }
}

fn run(directory: &Path) -> anyhow::Result<Infallible> {
    // As in a guest, where the agent's descriptors must never reach a container: one that is open here would show.
    let log = caisson_log::logger("agent", fs::File::create(directory.join("log"))?, slog::Level::Debug);
    caisson_log::bridge(log.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let calls = Plain(UnixListener::bind(directory.join("agent.sock"))?);
        let stdio = Numbered(UnixListener::bind(directory.join("stdio.sock"))?);
        let reaper = Reaper::new()?;
        let cgroups = Cgroups::prepare(&directory.join("cgroup"))?;
        let launcher = Launcher::new(PathBuf::from("/proc/self/exe"))?;
        let streams = Streams::default();
        let share = Share::Directory(directory.join("share"));
        let containers = Containers::new(share, cgroups, launcher, streams.clone(), log.clone());
        let power_off = Box::new(|| std::process::exit(0));
        let _server = service::serve(calls, stdio, streams, containers.clone(), power_off, log).await?;
        fs::write(directory.join("ready"), "")?;
        reaper.run(containers).await;
        anyhow::bail!("the runtime tells of no more children")
    })
}
