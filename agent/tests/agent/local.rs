//! The agent's library behind Unix sockets, for tests: `caisson-agent-local <directory>`.
//!
//! The directory holds `share/` (in place of the virtio-fs mount) and `cgroup/` (a mounted cgroup2); the agent makes
//! `agent.sock` and `stdio.sock` in it, and `ready` last. A connection to stdio.sock begins with the port that a vsock
//! peer would have, four bytes, little-endian. To be run as PID 1 of a pid namespace, as in a guest.

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
    let Err(error) = run(Path::new(&argument));
    eprintln!("{error:#}");
    ExitCode::FAILURE
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
