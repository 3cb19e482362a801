//! Exec: one more process in a container that is created or runs.

use std::sync::Arc;

use caisson_protos::agent::ExecRequest;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use slog::info;

use super::{
    Container, Containers, Error, check_name,
    error::Result,
    lock,
    process::{Pending, Process},
};
use crate::{
    handshake::AgentEnd,
    launch::PidNamespace,
    lifecycle::{Exit, Lifecycle, Phase},
    plan::{ExecPlan, Plan, ProcessPlan},
    reaper::now_ns,
    spec,
    stdio::HostStreams,
    sys,
};

impl Containers {
    /// Adds a process to a created or running container; it does not exist before its Start.
    ///
    /// # Errors
    /// If the container does not run, the name is taken or the `process` object cannot be honoured.
    pub async fn exec(&self, request: ExecRequest) -> Result<()> {
        let (id, exec) = (request.container_id, request.exec_id);
        check_name("exec_id", &exec)?;
        let container = self.container(&id)?;
        container.init.created().map_err(|error| Error::State { who: id.clone(), error })?;
        drop(container.going().await?);
        let stdio = request.stdio.unwrap_or_default();
        let (mut plan, notes) = spec::process::exec(&request.process, stdio.terminal, &container.inherited)?;
        plan.seccomp.clone_from(&container.seccomp);
        self.note(&id, &notes);
        let taken = || Error::Exists(exec.clone());
        if lock(&container.execs).contains_key(&exec) {
            return Err(taken());
        }
        let streams = self.host_streams(&stdio).await?;
        let pending = Pending::Exec(Box::new(plan), streams);
        let process = Arc::new(Process::new(Lifecycle::exec(), Some(pending)));
        match lock(&container.execs).entry(exec.clone()) {
            std::collections::hash_map::Entry::Occupied(_) => Err(taken()),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(process);
                info!(self.log, "exec added"; "container" => &id, "exec" => &exec);
                Ok(())
            }
        }
    }

    /// Makes the process of an exec, ready to enter its program.
    pub(super) async fn prepare_exec(
        &self,
        container: &Container,
        process: &Arc<Process>,
        plan: ProcessPlan,
        streams: HostStreams,
    ) -> Result<AgentEnd> {
        let init = container.init.created().map_err(|error| Error::State { who: container.id.clone(), error })?;
        // The init process is a child that has not been reaped, so its number is still its own.
        let pidfd = Pid::from_raw(init)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|error| Error::Io { what: format!("open process {init}"), error: error.into() })?;
        let cgroup = container.cgroup()?.path().to_owned();
        let (_, mut stage) = self.launch(process, PidNamespace::Own)?;
        let namespaces = container.namespaces.clone();
        let plan = Plan::Exec(Box::new(ExecPlan { cgroup, namespaces, process: plan }));
        self.bring_up(process, &mut stage, &plan, vec![pidfd], streams).await?;
        Ok(stage)
    }

    /// A Wait for a process that could not be made must not last for ever: if there is a process its end is reported
    /// by the reaper, otherwise here.
    pub(super) fn abandon(process: &Process) {
        match process.target() {
            Ok(pid) => drop(sys::kill(pid, libc::SIGKILL)),
            Err(_) => process.exited(Exit { status: 126, at_ns: now_ns() }),
        }
    }

    /// An exec that was never started has no process to end; it ends by being deleted.
    pub(super) fn end_unstarted(process: &Process) {
        if process.phase() == Phase::Added {
            process.exited(Exit { status: 0, at_ns: now_ns() });
        }
    }
}
