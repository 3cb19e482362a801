//! Starting a stage: the agent's own binary, executed anew.
//!
//! A process enters a pid namespace only at its birth: `unshare` and `setns` change where the *next* child is born. For
//! the first process of a new one the agent's thread changes its own "namespace for children", starts the stage (one
//! posix_spawn, no fork of the agent's memory) and changes back, all without an await in between. A namespace in which
//! others live already a stage enters itself, when it has given up its rights (stage/birth.rs).

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    path::PathBuf,
    process::{Command, Stdio},
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::{handshake::AgentEnd, stage};

/// A stage that could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct LaunchError {
    what: &'static str,
    error: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> LaunchError {
    move |error| LaunchError { what, error: error.into() }
}

/// Where a stage is born.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PidNamespace {
    /// As process 1 of a new one.
    New,
    /// In the agent's; it is not yet the container's process.
    Own,
}

/// Starts stages.
#[derive(Debug)]
pub struct Launcher {
    binary: PathBuf,
    own: File,
}

impl Launcher {
    /// `binary` is the program that calls [`stage::main`] when its first argument is [`stage::ARGUMENT`].
    ///
    /// # Errors
    /// If /proc is not there.
    pub fn new(binary: PathBuf) -> io::Result<Self> {
        Ok(Self { binary, own: File::open("/proc/self/ns/pid")? })
    }

    /// Starts a stage. Returns its pid in the agent's namespace and the socket to it. The child is not waited for here:
    /// that is the reaper's.
    ///
    /// # Errors
    /// If the kernel refuses a process or a namespace.
    pub fn launch(&self, namespace: PidNamespace) -> Result<(i32, AgentEnd), LaunchError> {
        let (ours, theirs) = StdStream::pair().map_err(failed("make the stage's socket"))?;
        let ours = AgentEnd::new(ours).map_err(failed("make the stage's socket"))?;
        if namespace == PidNamespace::New {
            unshare(CloneFlags::CLONE_NEWPID).map_err(failed("make a pid namespace"))?;
        }
        let spawned = Command::new(&self.binary)
            .arg(stage::ARGUMENT)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn();
        let back = setns(&self.own, CloneFlags::CLONE_NEWPID);
        let child = spawned.map_err(failed("start the stage"))?;
        // Without this no further container could be made; it cannot fail for a process that may make them.
        back.map_err(failed("return to the agent's pid namespace"))?;
        let pid = i32::try_from(child.id())
            .map_err(|_| LaunchError { what: "start the stage", error: io::ErrorKind::InvalidData.into() })?;
        Ok((pid, ours))
    }
}
