//! Kills for want of memory: one loop for each container that runs asks the agent for the next one, as many times as there are.
//! As containerd's own shim does, it publishes what has happened since it last looked as one event. The guest is not trusted
//! with the pace: the next question waits until containerd has taken the last event, and a moment longer.

use std::{sync::Arc, time::Duration};

use caisson_protos::agent::WaitOomRequest;
use slog::{debug, warn};
use tokio::time::{sleep, timeout};
use ttrpc::context::Context;

use super::Pod;
use crate::{shim::errors::TaskError, vm::supervisor::Machine};

/// Shortest time between two events of one container.
const PAUSE: Duration = Duration::from_millis(100);
/// How long Delete waits until the last OOM kill is reported.
const LAST_KILL: Duration = Duration::from_secs(2);

impl Pod {
    /// Begins to watch a container that was started.
    pub(super) fn watch_oom(self: &Arc<Self>, id: &str, machine: Arc<Machine>) {
        let watch = Arc::clone(self).tell_kills(id.to_owned(), machine);
        if let Ok(container) = self.tasks().container(id) {
            container.oom_watch.spawn(watch);
        }
    }

    /// Waits until every OOM kill in a container that has ended is reported.
    pub(super) async fn ooms_reported(&self, id: &str) {
        let watch = self.tasks().container(id).map(|container| std::mem::take(&mut container.oom_watch));
        if let Ok(mut watch) = watch
            && timeout(LAST_KILL, watch.join_next()).await.is_err()
        {
            warn!(self.log, "the agent did not answer about OOM kills"; "container" => id);
        }
    }

    async fn tell_kills(self: Arc<Self>, id: String, machine: Arc<Machine>) {
        let events = self.tasks().events().clone();
        let mut seen = 0;
        loop {
            let request = WaitOomRequest { container_id: id.clone(), seen, ..WaitOomRequest::default() };
            match machine.agent.wait_oom(Context::default(), &request).await {
                Ok(answer) if answer.kills > seen => seen = answer.kills,
                Ok(answer) => {
                    warn!(self.log, "the agent reported an OOM kill twice"; "container" => &id, "kills" => answer.kills);
                    return;
                }
                // The container has ended, or the machine has.
                Err(error) => {
                    let error = TaskError::from_agent("WaitOom", &error);
                    debug!(self.log, "no more kills for want of memory"; "container" => &id, "because" => %error);
                    return;
                }
            }
            self.tasks().out_of_memory(&id);
            events.delivered().await;
            sleep(PAUSE).await;
        }
    }
}
