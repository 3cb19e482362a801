//! Pause, Resume, Update, Stats, WaitOom: what is done to a container as a whole while it runs.

use std::future::pending;

use caisson_protos::agent::{StatsResponse, UpdateRequest};
use slog::info;

use super::{Container, Containers, Error, error::Result};
use crate::{blocking, lifecycle::StateError, spec::resources};

impl Container {
    fn in_state(&self, error: StateError) -> Error {
        Error::State { who: self.id.clone(), error }
    }

    /// Keeps the container from being paused as long as the answer lives.
    ///
    /// # Errors
    /// If it is paused.
    pub(super) async fn going(&self) -> Result<impl Drop + use<'_>> {
        let paused = self.paused.read().await;
        if *paused { Err(self.in_state(StateError::Paused)) } else { Ok(paused) }
    }
}

impl Containers {
    /// Stops every process of a container where it stands.
    ///
    /// # Errors
    /// If it does not run or is paused already; then it stays as it is.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        // Waits for an exec on its way in, which would stop half-way and never answer.
        let mut paused = container.paused.write().await;
        container.init.running().map_err(|error| container.in_state(error))?;
        if *paused {
            return Err(container.in_state(StateError::Paused));
        }
        container.cgroup()?.freeze(true).await?;
        *paused = true;
        info!(self.log, "container paused"; "container" => id);
        Ok(())
    }

    /// Lets the processes of a paused container go on.
    ///
    /// # Errors
    /// If it does not run or is not paused.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        let mut paused = container.paused.write().await;
        container.init.running().map_err(|error| container.in_state(error))?;
        if !*paused {
            return Err(container.in_state(StateError::NotPaused));
        }
        container.cgroup()?.freeze(false).await?;
        *paused = false;
        info!(self.log, "container resumed"; "container" => id);
        Ok(())
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// If one cannot be honoured; then none changes.
    pub async fn update(&self, request: UpdateRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let _alone = container.updating.lock().await;
        let cgroup = container.cgroup()?;
        let (resources, notes) = resources::update(&request.resources, &cgroup.present())?;
        self.note(&request.container_id, &notes);
        // Less memory than is used makes the kernel look for what it can reclaim before it answers.
        let changed = blocking::run(move || cgroup.update(&resources)).await;
        changed.map_err(|error| Error::Io { what: "change the container's limits".into(), error })??;
        info!(self.log, "limits changed"; "container" => &request.container_id);
        Ok(())
    }

    /// What a container has used.
    ///
    /// # Errors
    /// If it is unknown or being created.
    pub fn stats(&self, id: &str) -> Result<StatsResponse> {
        Ok(self.container(id)?.cgroup()?.stats()?)
    }

    /// Waits until the kernel has killed more than `seen` processes of a container for want of memory. Returns how
    /// many.
    ///
    /// # Errors
    /// When the container has ended without.
    pub async fn wait_oom(&self, id: &str, seen: u64) -> Result<u64> {
        let container = self.container(id)?;
        let cgroup = container.cgroup()?;
        let killed = async {
            match cgroup.oom_kills_beyond(seen).await {
                Some(kills) => kills,
                // Nothing will be counted (any more). The container's end is to come.
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            kills = killed => Ok(kills),
            _ = container.init.ended() => match cgroup.oom_kills() {
                // The last kill may have been the end.
                Some(kills) if kills > seen => Ok(kills),
                _ => Err(container.in_state(container.init.wrong_state("running"))),
            },
        }
    }
}
