//! What is asked of one process: start it, add one, signal it, its terminal and its input; and the watch over its end.

use std::{sync::Arc, time::SystemTime};

use caisson_protos::agent::{ExecRequest, KillRequest, ResizePtyRequest, WaitResponse};
use containerd_shim_protos::{api::ExecProcessRequest, events::task::TaskExecAdded};
use protobuf::MessageField;
use slog::error;
use tokio::time::timeout;
use ttrpc::context::Context;

use super::{LAST_WORDS, Pod, limited, process_request};
use crate::{
    errors::TaskError,
    flags::is_identifier,
    lifecycle::{Exit, KILLED},
    machine::Machine,
    stdio::{Fifos, Stdio},
    tasks::Name,
    timeline::Stage,
};

/// The guest's word on how a process ended: its status is one byte, whatever the guest says. The time is the host's own,
/// because a guest's clock may be anything.
fn exit_of(response: &WaitResponse) -> Exit {
    Exit { status: response.exit_status & 0xff, at: SystemTime::now() }
}

impl Pod {
    /// Waits in the guest for a process's end.
    pub(super) async fn watch_process(self: Arc<Self>, name: Name, machine: Arc<Machine>) {
        match machine.agent.wait(Context::default(), &process_request(&name)).await {
            Ok(response) => {
                self.tasks().exited(&name, exit_of(&response));
                if name.exec.is_empty() {
                    self.timeline.log(&self.log);
                }
            }
            // The machine's end tells all exits, and a process that was deleted is nobody's concern. Otherwise the agent has
            // lost its process or its connection, and nothing in the pod can be relied on any more.
            Err(error) => {
                let is_lost = timeout(LAST_WORDS, self.machine.lost()).await.is_ok();
                if !is_lost && self.is_alive(&name) {
                    let error = TaskError::from_agent("Wait", &error);
                    error!(self.log, "the agent has lost a process"; "process" => name.id(), "error" => %error);
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
        self.tasks().entry(&name)?.process.begin_start()?;
        let started = match self.machine.get() {
            Ok(machine) => {
                let request = process_request(&name);
                let call = machine.agent.start(limited(), &request);
                self.agent_call("Start", call).await.map(|_| machine)
            }
            Err(error) => Err(error),
        };
        match started {
            Ok(machine) => {
                if name.exec.is_empty() {
                    self.timeline.mark(Stage::ContainerStarted);
                } else {
                    tokio::spawn(Arc::clone(self).watch_process(name.clone(), machine));
                }
                let pid = self.tasks().started(&name)?;
                if name.exec.is_empty() {
                    self.run_poststart(&name).await;
                }
                Ok(pid)
            }
            Err(error) => {
                // As a shell has it: 127 no such program, 126 not to be executed; with its machine it was killed.
                let status = match error.code() {
                    ttrpc::Code::NOT_FOUND => 127,
                    ttrpc::Code::INVALID_ARGUMENT => 126,
                    _ => KILLED,
                };
                self.tasks().start_failed(&name, Exit { status, at: SystemTime::now() });
                // containerd takes NOT_FOUND for "no such task".
                let error = match error.code() {
                    ttrpc::Code::NOT_FOUND => TaskError::failed_precondition(error.to_string()),
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
            return Err(TaskError::invalid_argument(format!("exec id {:?} is no identifier", request.exec_id)));
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

    async fn exec_process(self: &Arc<Self>, name: &Name, stdio: &Stdio, process: Vec<u8>) -> Result<(), TaskError> {
        let machine = self.machine.get()?;
        let fifos = Fifos::open(stdio).map_err(|error| TaskError::invalid_argument(error.to_string()))?;
        let connected =
            fifos.connect(&machine.dialer).await.map_err(|error| TaskError::unavailable(error.to_string()))?;
        let exec = ExecRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            process,
            stdio: MessageField::some(connected.ports.clone()),
            ..ExecRequest::default()
        };
        self.agent_call("Exec", machine.agent.exec(limited(), &exec)).await?;
        let mut tasks = self.tasks();
        tasks.prepared(name, machine.pid, connected.copy(None))?;
        let (container_id, exec_id) = (name.container.clone(), name.exec.clone());
        tasks.news().publish(&TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() });
        Ok(())
    }

    /// Task.Kill.
    ///
    /// # Errors
    /// NOT_FOUND if there is nothing to signal.
    pub async fn kill(&self, name: &Name, signal: u32, all: bool) -> Result<(), TaskError> {
        self.tasks().entry(name)?.process.check_kill()?;
        if !(1..=64).contains(&signal) {
            return Err(TaskError::invalid_argument(format!("signal {signal} is none of 1 to 64")));
        }
        let machine = self.machine.get()?;
        let request = KillRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            signal,
            all,
            ..KillRequest::default()
        };
        let killed = self.agent_call("Kill", machine.agent.kill(limited(), &request)).await;
        killed.map(drop).map_err(|error| match error.code() {
            // It ended a moment ago.
            ttrpc::Code::NOT_FOUND | ttrpc::Code::FAILED_PRECONDITION => {
                TaskError::not_found("process already finished")
            }
            _ => error,
        })
    }
    /// Task.ResizePty.
    ///
    /// # Errors
    /// NOT_FOUND, or FAILED_PRECONDITION without a terminal.
    pub async fn resize(&self, name: &Name, width: u32, height: u32) -> Result<(), TaskError> {
        let terminal = self.tasks().entry(name)?.stdio.terminal;
        if !terminal {
            return Err(TaskError::failed_precondition(format!("process {} has no terminal", name.id())));
        }
        let machine = self.machine.get()?;
        let request = ResizePtyRequest {
            container_id: name.container.clone(),
            exec_id: name.exec.clone(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        self.agent_call("ResizePty", machine.agent.resize_pty(limited(), &request)).await.map(drop)
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
