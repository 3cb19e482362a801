//! Task.Delete: a process that has ended, or a container that was never started, goes out of the guest and out of the book.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use caisson_protos::agent::KillRequest;
use containerd_shim_protos::{api::DeleteResponse, events::task::TaskDelete};
use slog::{debug, error};
use tokio::{task::JoinSet, time::timeout};

use super::{Pod, no_deadline, process_request};
use crate::{
    pod::{
        lifecycle::{Exit, KILLED},
        tasks::Name,
    },
    shim::{
        errors::{Silence, TaskError},
        events::timestamp,
    },
};

/// How long the end of a pod that was not asked for by its client waits for output in all.
const END_LIMIT: Duration = Duration::from_secs(10);

impl Pod {
    /// Task.Delete.
    ///
    /// # Errors
    /// NOT_FOUND, also after a Delete that came first, or FAILED_PRECONDITION while it runs.
    pub async fn delete(&self, name: &Name) -> Result<DeleteResponse, TaskError> {
        let deleting = Arc::clone(&self.tasks().entry(name)?.deleting);
        let _turn = deleting.lock().await;
        let (unstarted, pid) = {
            let mut tasks = self.tasks();
            let entry = tasks.entry(name)?;
            (entry.process.begin_delete()?, tasks.pid(name))
        };
        let deleted = self.delete_in_guest(name, unstarted).await;
        if unstarted && name.exec.is_empty() {
            self.tasks().killed_unstarted(&name.container, SystemTime::now());
        }
        if let Err(error) = deleted {
            if let Ok(entry) = self.tasks().entry(name) {
                entry.process.delete_failed(SystemTime::now());
            }
            return Err(error);
        }
        let copies = self.tasks().entry(name)?.copies.take();
        if let Some(copies) = copies {
            copies.end(&self.log).await;
        }
        let (exit, hooks) = {
            let mut tasks = self.tasks();
            let exit = tasks.entry(name)?.process.exit().unwrap_or(Exit { status: KILLED, at: SystemTime::now() });
            let is_init = name.exec.is_empty();
            let hooks = if is_init { tasks.container(&name.container)?.hooks.take() } else { None };
            (exit, hooks)
        };
        // Before its end is published.
        self.remove(name).await;
        self.run_poststop(hooks).await;
        let tasks = self.tasks();
        if name.exec.is_empty() {
            tasks.events().publish(&TaskDelete {
                container_id: name.container.clone(),
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..TaskDelete::default()
            });
        }
        let exited_at = timestamp(exit.at);
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..DeleteResponse::default() })
    }

    /// What output is still on its way reaches its readers, and loggers end, as at a Delete of every process.
    pub(super) async fn end_streams(&self) {
        let (stall, mut ending) = (self.limits.drain, JoinSet::new());
        for copies in self.tasks().take_copies() {
            let log = self.log.clone();
            ending.spawn(async move {
                let _ = timeout(END_LIMIT, copies.drained(stall.into())).await;
                copies.end(&log).await;
            });
        }
        while ending.join_next().await.is_some() {}
    }

    /// Ends a process of which nobody knows what became of it, because the agent did not answer in time, and makes sure of it: by
    /// the agent's word, or by the machine's end.
    pub(super) async fn end_unanswered(&self, name: &Name) {
        let Ok(machine) = self.machine.get() else { return };
        let request = process_request(name);
        let kill = KillRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            signal: 9,
            all: name.exec.is_empty(),
            ..KillRequest::default()
        };
        let ended = async {
            let killed = self.agent_call("Kill", machine.agent.kill(no_deadline(), &kill)).await;
            if !killed.is_err_and(|error| error.code() == ttrpc::Code::NOT_FOUND) {
                self.agent_call("Wait", machine.agent.wait(no_deadline(), &request)).await?;
            }
            Ok::<_, TaskError>(())
        };
        if !matches!(timeout(self.limits.kill, ended).await, Ok(Ok(()))) {
            error!(self.log, "the agent does not answer: its machine is ended"; "process" => name.id());
            self.machine.stop().await;
        }
    }

    /// After a Create that was not answered in time: ends whatever exists of the container in the guest.
    pub(super) async fn end_uncreated(&self, name: &Name) {
        let Ok(machine) = self.machine.get() else { return };
        let request =
            KillRequest { container_id: name.container.clone(), signal: 9, all: true, ..KillRequest::default() };
        let process = process_request(name);
        let deleted = async {
            self.agent_call("Kill", machine.agent.kill(no_deadline(), &request)).await?;
            self.agent_call("Wait", machine.agent.wait(no_deadline(), &process)).await?;
            self.agent_call("Delete", machine.agent.delete(no_deadline(), &process)).await
        };
        // NOT_FOUND proves nothing here: the agent may still be making it.
        if !matches!(timeout(self.limits.kill, deleted).await, Ok(Ok(_))) {
            error!(self.log, "the agent does not answer: its machine is ended"; "container" => &name.container);
            self.machine.stop().await;
        }
    }

    async fn delete_in_guest(&self, name: &Name, unstarted: bool) -> Result<(), TaskError> {
        let Ok(machine) = self.machine.get() else { return Ok(()) };
        if unstarted && name.exec.is_empty() {
            let request =
                KillRequest { container_id: name.container.clone(), signal: 9, all: true, ..KillRequest::default() };
            let _ = self.agent_call("Kill", machine.agent.kill(no_deadline(), &request)).await;
            let request = process_request(name);
            let ended = machine.agent.wait(no_deadline(), &request);
            let _ = self.agent_call_within("Wait", self.limits.kill, ended).await;
        }
        let drained = self.tasks().entry(name)?.copies.as_ref().map(|copies| copies.drained(self.patience(name)));
        if let Some(drained) = drained
            && !unstarted
            && !drained.await
        {
            debug!(self.log, "output left unread"; "process" => name.id());
        }
        if name.exec.is_empty() {
            self.ooms_reported(&name.container).await;
        }
        let request = process_request(name);
        match self.agent_call("Delete", machine.agent.delete(no_deadline(), &request)).await {
            Ok(_) => Ok(()),
            // Nothing of it is there: a start that failed, or the machine's end. A deadline proves neither.
            Err(error) if error.code() == ttrpc::Code::NOT_FOUND || error.silence() == Some(Silence::Lost) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
