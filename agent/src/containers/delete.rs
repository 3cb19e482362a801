//! Delete, and what a failed Create leaves to be cleared.

use std::time::Duration;

use slog::{info, warn};

use super::{Container, Containers, Error, error::Result, lock};
use crate::{
    blocking,
    lifecycle::{Exit, Phase},
    sys,
};

/// How long a killed process may take to be gone.
pub(super) const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long writing back may take.
const SYNC_LIMIT: Duration = Duration::from_secs(60);

impl Containers {
    /// Forgets an ended process; for an init process the whole container.
    ///
    /// # Errors
    /// If it still runs.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<(Exit, i32)> {
        let container = self.container(id)?;
        let process = self.process(id, exec)?;
        if !exec.is_empty() {
            Self::end_unstarted(&process);
            let exit = process.stopped().map_err(|error| Error::State { who: exec.to_owned(), error })?;
            lock(&container.execs).remove(exec);
            return Ok((exit, process.pid().unwrap_or(0)));
        }
        // One that was created but never started is not running; as with runc it can go.
        if process.phase() != Phase::Created {
            process.stopped().map_err(|error| Error::State { who: id.to_owned(), error })?;
        }
        if !process.begin_delete() {
            return Err(Error::Deleting(id.to_owned()));
        }
        let cleared = self.clear(&container).await;
        // A full disk must not keep a container from being deleted: a program that wanted the bytes safe has called
        // fsync and got the error.
        if let Err(error) = self.write_back().await {
            warn!(self.log, "a deleted container's last writes are lost"; "container" => id, "error" => %error);
        }
        lock(&self.map).remove(id);
        for exec in lock(&container.execs).values() {
            // Nobody can start it any more, and someone may wait for its end.
            Self::end_unstarted(exec);
        }
        if let Err(error) = &cleared {
            warn!(self.log, "a deleted container left something"; "container" => id, "error" => %error);
        }
        cleared?;
        info!(self.log, "container deleted"; "container" => id);
        Ok((process.ended().await, process.pid().unwrap_or(0)))
    }

    /// Kills what is left of a container and removes its cgroup. Its mounts go with its last process.
    pub(super) async fn clear(&self, container: &Container) -> Result<()> {
        if let Ok(pid) = container.init.target() {
            // It may have ended in this very moment.
            let _ = sys::kill(pid, libc::SIGKILL);
        }
        let Some(cgroup) = lock(&container.cgroup).take() else { return Ok(()) };
        cgroup.kill()?;
        if container.init.pid().is_some() {
            let late = |_| Error::TimedOut { what: "killing the container", seconds: KILL_LIMIT.as_secs() };
            tokio::time::timeout(KILL_LIMIT, container.init.ended()).await.map_err(late)?;
        }
        Ok(cgroup.remove().await?)
    }

    /// Brings what the containers wrote to the host's file system: what the guest still holds of the container's files must be
    /// there before the host unmounts or copies its root. Linux writes back a file system at the least, so this is for those of
    /// all containers; and for FUSE that includes the server's own syncfs(2).
    async fn write_back(&self) -> Result<()> {
        let roots = self.share.roots();
        let failed = |error| Error::Io { what: "write the container's files back".into(), error };
        let work = blocking::run(move || {
            roots.iter().try_for_each(|root| Ok(rustix::fs::syncfs(std::fs::File::open(root)?)?))
        });
        match tokio::time::timeout(SYNC_LIMIT, work).await {
            Ok(Ok(result)) => result.map_err(failed),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => {
                Err(Error::TimedOut { what: "writing the container's files back", seconds: SYNC_LIMIT.as_secs() })
            }
        }
    }
}
