//! Containers and their processes, and what each call does to them.
//!
//! One map of containers, each with its init process and its execs; beside it a map from pids to processes, which the
//! reaper reads. Both change only between two awaits. What a call must do across awaits it does on an [`Arc`] that it
//! holds; the process's [`Lifecycle`](crate::lifecycle::Lifecycle) says whether another call came first.

mod control;
mod create;
mod delete;
mod error;
mod exec;
mod outside;
mod process;
mod share;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_oci::identifier;
use caisson_protos::agent::{KillRequest, ProcessInfo, ResizePtyRequest, Stdio};
pub use error::Error;
use error::Result;
use process::Process;
use share::Mounts;
pub use share::Share;
use slog::{Logger, debug, info, warn};
use tokio::sync::RwLock;

use crate::{
    cgroup::{Cgroup, Cgroups},
    launch::Launcher,
    lifecycle::{Exit, StateError},
    plan::{NamespaceKind, NamespacePlan},
    seccomp::Filter,
    spec::process::Inherited,
    stdio::HostStreams,
    streams::Streams,
    sys,
};

/// One container.
struct Container {
    id: String,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    cgroup: Mutex<Option<Cgroup>>,
    inherited: Inherited,
    seccomp: Option<Filter>,
    /// Whether its processes are stopped. An exec that adds a process holds it for reading.
    paused: RwLock<bool>,
    /// Held by the one Update at a time.
    updating: tokio::sync::Mutex<()>,
    namespaces: NamespacePlan,
}

impl Container {
    fn cgroup(&self) -> Result<Cgroup> {
        let cgroup = lock(&self.cgroup).clone();
        cgroup.ok_or_else(|| Error::State { who: self.id.clone(), error: self.init.wrong_state("running") })
    }
}

/// Every container of the pod.
pub struct Containers {
    share: Mounts,
    cgroups: Cgroups,
    launcher: Launcher,
    streams: Streams,
    map: Mutex<HashMap<String, Arc<Container>>>,
    /// Processes that have not been reaped.
    by_pid: Mutex<HashMap<i32, Arc<Process>>>,
    log: Logger,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks; and a poisoned map must not take the whole pod down.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Containers {
    /// Begins without any.
    pub fn new(share: Share, cgroups: Cgroups, launcher: Launcher, streams: Streams, log: Logger) -> Arc<Self> {
        Arc::new(Self {
            share: Mounts::new(share),
            cgroups,
            launcher,
            streams,
            map: Mutex::default(),
            by_pid: Mutex::default(),
            log,
        })
    }

    /// A child has ended. Called by the reaper for every one.
    pub fn reaped(&self, pid: i32, exit: Exit) {
        // Taken while a process is started, so that one that ends at once is found here.
        let process = lock(&self.by_pid).remove(&pid);
        match process {
            Some(process) => {
                self.end_with(&process);
                process.exited(exit);
            }
            // A stage whose child has taken its place, too.
            None => debug!(self.log, "reaped an orphan"; "pid" => pid, "status" => exit.status),
        }
    }

    /// A container ends with its init process. The kernel kills the others where that was process 1 of a pid namespace; in
    /// the namespace of another container they are killed here, and only they: those of the container's cgroup.
    fn end_with(&self, init: &Arc<Process>) {
        let container = lock(&self.map).values().find(|container| Arc::ptr_eq(&container.init, init)).cloned();
        let Some(container) = container.filter(|container| container.namespaces.joins(NamespaceKind::Pid)) else {
            return;
        };
        let cgroup = lock(&container.cgroup).clone();
        if let Some(Err(error)) = cgroup.map(|cgroup| cgroup.kill()) {
            warn!(self.log, "processes of an ended container are left"; "container" => &container.id, "error" => %error);
        }
    }

    /// Waits for a process's end.
    ///
    /// # Errors
    /// If it is unknown.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<(Exit, i32)> {
        let process = self.process(container, exec)?;
        let exit = process.ended().await;
        Ok((exit, process.pid().unwrap_or(0)))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// NOT_FOUND also for what has ended.
    pub fn kill(&self, request: &KillRequest) -> Result<()> {
        let number = i32::try_from(request.signal).ok().filter(|number| (1..=64).contains(number));
        let number = number.ok_or(Error::Signal(request.signal))?;
        let container = self.container(&request.container_id)?;
        let in_state = |error| Error::State { who: request.container_id.clone(), error };
        if !request.all {
            let process = self.process(&request.container_id, &request.exec_id)?;
            let pid = process.target().map_err(in_state)?;
            return sys::kill(pid, number).map_err(|error| match error.raw_os_error() {
                Some(libc::ESRCH) => in_state(StateError::Finished),
                _ => Error::Io { what: format!("send signal {number} to process {pid}"), error },
            });
        }
        container.init.target().map_err(in_state)?;
        let cgroup = container.cgroup()?;
        if number == libc::SIGKILL {
            return Ok(cgroup.kill()?);
        }
        for pid in cgroup.pids()? {
            // One that has just ended needs no signal.
            let _ = sys::kill(pid, number);
        }
        Ok(())
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// If the process has no terminal.
    pub fn resize(&self, request: &ResizePtyRequest) -> Result<()> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let cells = |field: &'static str, value: u32| u16::try_from(value).map_err(|_| Error::Cells { field, value });
        let (width, height) = (cells("width", request.width)?, cells("height", request.height)?);
        match process.resize(width, height) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::NoTerminal(request.container_id.clone())),
            Err(error) => Err(Error::Io { what: format!("set the terminal's size to {width}x{height}"), error }),
        }
    }

    /// Lists a container's processes.
    ///
    /// # Errors
    /// If the container is unknown or being created.
    pub fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>> {
        let container = self.container(id)?;
        let execs: HashMap<i32, String> = lock(&container.execs)
            .iter()
            .filter_map(|(id, process)| process.target().ok().map(|pid| (pid, id.clone())))
            .collect();
        let info = |pid: i32| {
            let exec_id = execs.get(&pid).cloned().unwrap_or_default();
            u32::try_from(pid).ok().map(|pid| ProcessInfo { pid, exec_id, ..Default::default() })
        };
        Ok(container.cgroup()?.pids()?.into_iter().filter_map(info).collect())
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.map).get(id).cloned().ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    fn process(&self, id: &str, exec: &str) -> Result<Arc<Process>> {
        let container = self.container(id)?;
        if exec.is_empty() {
            return Ok(container.init.clone());
        }
        let process = lock(&container.execs).get(exec).cloned();
        process.ok_or_else(|| Error::NoExec { container: id.to_owned(), exec: exec.to_owned() })
    }

    /// Waits for the streams that a call named.
    async fn host_streams(&self, stdio: &Stdio) -> Result<HostStreams> {
        if stdio.terminal && stdio.stderr_port != 0 {
            return Err(Error::StderrWithTerminal(stdio.stderr_port));
        }
        Ok(HostStreams {
            stdin: self.streams.claim("stdin", stdio.stdin_port).await?,
            stdout: self.streams.claim("stdout", stdio.stdout_port).await?,
            stderr: self.streams.claim("stderr", stdio.stderr_port).await?,
        })
    }

    fn note(&self, id: &str, notes: &[String]) {
        for note in notes {
            info!(self.log, "{}", note; "container" => id);
        }
    }
}

/// Checks a name as containerd does.
fn check_name(field: &'static str, name: &str) -> Result<()> {
    if identifier::is_valid(name) { Ok(()) } else { Err(Error::Name { field, name: name.to_owned() }) }
}

/// For `map_err`: what was tried when the kernel refused.
fn trying(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Io { what: what.into(), error }
}
