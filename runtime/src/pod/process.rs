//! What is asked of one process: start it, add one, signal it, its terminal and its input; and the watch over its end.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use caisson_protos::agent::{ExecRequest, KillRequest, ResizePtyRequest, WaitResponse};
use containerd_shim_protos::{api::ExecProcessRequest, events::task::TaskExecAdded};
use protobuf::MessageField;
use slog::{error, warn};
use tokio::time::timeout;
use ttrpc::{Code, context::Context};

use super::{LOSS_LIMIT, Pod, no_deadline, process_request};
use crate::{
    pod::{
        lifecycle::{Exit, KILLED, Refusal},
        tasks::Name,
    },
    shim::{
        errors::{Silence, TaskError},
        flags::is_identifier,
    },
    stdio::{Opened, Patience, Place, Stdio, logger::Owner},
    vm::{supervisor::Machine, timeline::Stage},
};

/// How long the last output of a process may take on its way through the machine.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// The same for an exec, whose output may stay open behind it.
const LAST_OUTPUT_OF_EXEC: Duration = Duration::from_millis(50);
/// How long the exits of a container's execs may come behind its own.
const LAST_EXECS: Duration = Duration::from_secs(1);

/// The guest's word on how a process ended: its status is one byte, whatever the guest says. The time is the host's own,
/// because a guest's clock may be anything.
fn exit_of(response: &WaitResponse) -> Exit {
    Exit { status: response.exit_status & 0xff, at: SystemTime::now() }
}

impl Pod {
    /// How long the output of a process that has ended is waited for. Nothing of a container outlives its init process, but an exec
    /// may leave others running that go on writing.
    pub(super) fn patience(&self, name: &Name) -> Patience {
        let total = if name.exec.is_empty() { Duration::MAX } else { self.limits.drain };
        Patience { total, ..self.limits.drain.into() }
    }

    /// Waits in the guest for a process's end.
    pub(super) async fn watch_process(self: Arc<Self>, name: Name, machine: Arc<Machine>) {
        match machine.agent.wait(Context::default(), &process_request(&name)).await {
            Ok(response) => {
                let exit = exit_of(&response);
                if name.exec.is_empty() {
                    // With the init process the execs were killed; their exits are published first.
                    let execs_ended = self.tasks().execs_ended(&name.container);
                    if timeout(LAST_EXECS, execs_ended).await.is_err() {
                        warn!(self.log, "execs outlive their container"; "container" => &name.container);
                    }
                    self.timeline.log(&self.log);
                }
                // Clients stop reading when the exit is reported.
                let writer = if name.exec.is_empty() { LAST_OUTPUT } else { LAST_OUTPUT_OF_EXEC };
                let patience = Patience { writer, ..self.patience(&name) };
                let drained =
                    self.tasks().entry(&name).ok().and_then(|entry| Some(entry.copies.as_ref()?.drained(patience)));
                if let Some(drained) = drained {
                    drained.await;
                }
                self.tasks().exited(&name, exit);
            }
            // The machine's end publishes all exits, and a process that was deleted needs none. Otherwise the agent has
            // lost its process or its connection, and nothing in the pod can be relied on any more.
            Err(error) => {
                let is_lost = timeout(LOSS_LIMIT, self.machine.lost()).await.is_ok();
                if !is_lost && self.is_alive(&name) {
                    let error = TaskError::from_agent("Wait", &error);
                    error!(self.log, "the agent cannot wait for a live process: its machine is stopped"; "process" => name.id(), "error" => %error);
                    self.machine.stop().await;
                }
            }
        }
    }

    /// Task.Start.
    ///
    /// # Errors
    /// NOT_FOUND, FAILED_PRECONDITION, or why the program does not run.
    pub async fn start(self: &Arc<Self>, name: Name) -> Result<u32, TaskError> {
        let limit = {
            let mut tasks = self.tasks();
            tasks.begin_start(&name)?;
            if let Some(copies) = &tasks.entry(&name)?.copies {
                copies.start_input();
            }
            if name.exec.is_empty() { tasks.container(&name.container)?.start_limit } else { self.limits.call }
        };
        let started = match self.machine.get() {
            Ok(machine) => {
                if name.exec.is_empty() {
                    self.settle_network().await;
                }
                let request = process_request(&name);
                let call = machine.agent.start(no_deadline(), &request);
                self.agent_call_within("Start", limit, call).await.map(|_| machine)
            }
            Err(error) => Err(error),
        };
        match started {
            Ok(machine) if name.exec.is_empty() => {
                self.timeline.mark(Stage::ContainerStarted);
                let pid = self.tasks().started(&name)?;
                self.watch_oom(&name.container, machine);
                self.run_poststart(&name).await;
                Ok(pid)
            }
            Ok(machine) => {
                tokio::spawn(Arc::clone(self).watch_process(name.clone(), machine));
                self.tasks().started(&name)
            }
            Err(error) => {
                if error.silence() == Some(Silence::Deadline) {
                    self.end_unanswered(&name).await;
                }
                // As a shell has it: 127 no such program, 126 not to be executed; with its machine it was killed.
                let status = match error.code() {
                    Code::NOT_FOUND => 127,
                    Code::INVALID_ARGUMENT => 126,
                    _ => KILLED,
                };
                self.tasks().start_failed(&name, Exit { status, at: SystemTime::now() });
                // containerd takes NOT_FOUND for "no such task".
                let error = match error.code() {
                    Code::NOT_FOUND => TaskError::failed_precondition(error.to_string()),
                    _ => error,
                };
                Err(error.context(if name.exec.is_empty() {
                    "cannot start the container"
                } else {
                    "cannot start the exec"
                }))
            }
        }
    }

    /// Task.Exec.
    ///
    /// # Errors
    /// NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, or why it cannot be.
    pub async fn exec(self: &Arc<Self>, request: ExecProcessRequest) -> Result<(), TaskError> {
        if !is_identifier(&request.exec_id) {
            return Err(TaskError::invalid_argument(format!(
                "exec id {:?} is not a valid identifier",
                request.exec_id
            )));
        }
        let name = Name::new(&request.id, &request.exec_id);
        let stdio = Stdio::new(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        self.tasks().add_exec(&name, stdio.clone())?;
        let added = self.exec_process(&name, &stdio, request.spec.value.clone()).await;
        if added.is_err() {
            drop(self.tasks().remove(&name));
        }
        added
    }

    /// Opens the host's side of a process's streams.
    pub(super) async fn open_streams(&self, name: &Name, stdio: &Stdio) -> Result<Opened, TaskError> {
        let Some(host) = &self.host else {
            // There is none because there is no machine; that is the error to report.
            return Err(self
                .machine
                .ready()
                .await
                .err()
                .unwrap_or_else(|| TaskError::unavailable("the pod has ended")));
        };
        let namespace = self.tasks().events().namespace().to_owned();
        let owner = Owner { id: name.id(), namespace: &namespace };
        let log = self.log.new(slog::o!("process" => name.id().to_owned()));
        Ok(Opened::open(stdio, Place { owner, host, log }).await?)
    }

    async fn exec_process(self: &Arc<Self>, name: &Name, stdio: &Stdio, process: Vec<u8>) -> Result<(), TaskError> {
        let machine = self.machine.get()?;
        let connected = self.open_streams(name, stdio).await?.connect(&machine.dialer).await?;
        let exec = ExecRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            process,
            stdio: MessageField::some(connected.ports.clone()),
            ..ExecRequest::default()
        };
        self.agent_call("Exec", machine.agent.exec(no_deadline(), &exec)).await?;
        let mut tasks = self.tasks();
        let pid = tasks.pid(&Name::new(&name.container, ""));
        tasks.prepared(name, pid, connected.copy(None))?;
        let (container_id, exec_id) = (name.container.clone(), name.exec.clone());
        tasks.events().publish(&TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() });
        Ok(())
    }

    /// Task.Kill. `all` is for containers: an exec is signalled alone. Signal 0 only asks whether there is something to signal.
    ///
    /// # Errors
    /// NOT_FOUND if there is not, FAILED_PRECONDITION if there is not yet, INVALID_ARGUMENT.
    pub async fn kill(&self, name: &Name, signal: u32, all: bool) -> Result<(), TaskError> {
        let all = all && name.exec.is_empty();
        match self.tasks().entry(name)?.process.check_kill() {
            // It went down with its init process.
            Err(Refusal::Finished) if all => return Ok(()),
            checked => checked?,
        }
        if signal > 64 {
            return Err(TaskError::invalid_argument(format!("invalid signal {signal}: it must be 1 to 64")));
        }
        if signal == 0 {
            return Ok(());
        }
        let request = KillRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            signal,
            all,
            ..KillRequest::default()
        };
        let killed = match self.machine.get() {
            Ok(machine) => self.agent_call("Kill", machine.agent.kill(no_deadline(), &request)).await,
            Err(error) => Err(error),
        };
        let Err(error) = killed else { return Ok(()) };
        // It ended a moment ago, by itself or with its machine.
        let finished = matches!(error.code(), Code::NOT_FOUND | Code::FAILED_PRECONDITION) || self.machine.is_lost();
        match (finished, all) {
            (false, _) => Err(error),
            (true, true) => Ok(()),
            (true, false) => Err(Refusal::Finished.into()),
        }
    }

    /// Task.ResizePty. Without a terminal there is nothing to do, which is no error for containerd's own shim either.
    ///
    /// # Errors
    /// NOT_FOUND, FAILED_PRECONDITION if it has ended, INVALID_ARGUMENT.
    pub async fn resize(&self, name: &Name, width: u32, height: u32) -> Result<(), TaskError> {
        {
            let mut tasks = self.tasks();
            let entry = tasks.entry(name)?;
            if !entry.stdio.terminal {
                return Ok(());
            }
            entry.process.check_resize()?;
        }
        for (what, cells) in [("width", width), ("height", height)] {
            if cells > u16::MAX.into() {
                return Err(TaskError::invalid_argument(format!(
                    "terminal {what} {cells} is out of range: at most 65535"
                )));
            }
        }
        let machine = self.machine.get()?;
        let request = ResizePtyRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        self.agent_call("ResizePty", machine.agent.resize_pty(no_deadline(), &request)).await.map(drop)
    }

    /// Task.CloseIO.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub fn close_stdin(&self, name: &Name) -> Result<(), TaskError> {
        if let Some(copies) = &self.tasks().entry(name)?.copies {
            copies.close_stdin();
        }
        Ok(())
    }
}
