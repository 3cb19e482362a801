//! The Task calls on one container, by name: what `ctr` and containerd make of them is somebody else's test.

use std::{path::PathBuf, thread};

use containerd_shim_protos::{api, shim::oci::ProcessDetails};
use protobuf::{Message, well_known_types::any::Any};
use serde_json::{Value, json};
use ttrpc::Status;

use crate::shim::Shim;

/// The answer to a call, or the status that it was refused with.
pub type Answer<T> = Result<T, Status>;

/// One container of a shim.
#[derive(Clone)]
pub struct Task {
    shim: Shim,
    /// Its id.
    pub id: String,
}

/// Where a process's streams go; an empty path is no stream.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// Standard input.
    pub stdin: PathBuf,
    /// Standard output.
    pub stdout: PathBuf,
    /// Standard error.
    pub stderr: PathBuf,
    /// One terminal instead of three streams.
    pub terminal: bool,
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The type of a process specification, as containerd writes it.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The type of resources in an Update, as containerd writes it.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

fn any(type_url: &str, value: &Value) -> Any {
    Any { type_url: type_url.to_owned(), value: value.to_string().into_bytes(), ..Any::default() }
}

impl Task {
    /// The container `id` of `shim`, whether or not there is one.
    pub fn new(shim: &Shim, id: &str) -> Self {
        Self { shim: shim.clone(), id: id.to_owned() }
    }

    /// Create.
    pub fn create(&self, mut request: api::CreateTaskRequest, streams: &Streams) -> Answer<u32> {
        (request.stdin, request.stdout) = (text(&streams.stdin), text(&streams.stdout));
        (request.stderr, request.terminal) = (text(&streams.stderr), streams.terminal);
        request.id.clone_from(&self.id);
        self.shim.call("Create", &request).map(|created: api::CreateTaskResponse| created.pid)
    }

    /// Start of the container (no `exec`) or of an exec; its pid.
    pub fn start(&self, exec: &str) -> Answer<u32> {
        let request = api::StartRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        self.shim.call("Start", &request).map(|started: api::StartResponse| started.pid)
    }

    /// State.
    pub fn state(&self, exec: &str) -> Answer<api::StateResponse> {
        let request = api::StateRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        self.shim.call("State", &request)
    }

    /// The status in [`Self::state`].
    pub fn status(&self, exec: &str) -> Answer<api::Status> {
        Ok(self.state(exec)?.status.enum_value().expect("a status that is known"))
    }

    /// Wait; the exit status. A process that ended at no known time is an error of the shim's.
    pub fn wait(&self, exec: &str) -> Answer<u32> {
        let request = api::WaitRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        let waited: api::WaitResponse = self.shim.call("Wait", &request)?;
        assert!(waited.exited_at.seconds > 1_600_000_000, "an exit without its time: {waited:?}");
        Ok(waited.exit_status)
    }

    /// Wait on a thread of its own and on a connection of its own.
    pub fn wait_beside(&self, exec: &str) -> thread::JoinHandle<Answer<u32>> {
        let (task, exec) = (Self { shim: self.shim.again(), id: self.id.clone() }, exec.to_owned());
        thread::spawn(move || task.wait(&exec))
    }

    /// Kill.
    pub fn kill(&self, exec: &str, signal: u32, all: bool) -> Answer<()> {
        let request =
            api::KillRequest { id: self.id.clone(), exec_id: exec.to_owned(), signal, all, ..Default::default() };
        self.shim.call("Kill", &request).map(|_: api::Empty| ())
    }

    /// Delete; the exit status.
    pub fn delete(&self, exec: &str) -> Answer<u32> {
        let request = api::DeleteRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        self.shim.call("Delete", &request).map(|deleted: api::DeleteResponse| deleted.exit_status)
    }

    /// Exec of `arguments` under the name `exec`.
    pub fn exec(&self, exec: &str, arguments: &[&str], streams: &Streams) -> Answer<()> {
        let process = json!({
            "args": arguments, "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"],
            "terminal": streams.terminal,
        });
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            terminal: streams.terminal,
            stdin: text(&streams.stdin),
            stdout: text(&streams.stdout),
            stderr: text(&streams.stderr),
            spec: Some(any(PROCESS, &process)).into(),
            ..Default::default()
        };
        self.shim.call("Exec", &request).map(|_: api::Empty| ())
    }

    /// ResizePty.
    pub fn resize(&self, exec: &str, width: u32, height: u32) -> Answer<()> {
        let request = api::ResizePtyRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            width,
            height,
            ..Default::default()
        };
        self.shim.call("ResizePty", &request).map(|_: api::Empty| ())
    }

    /// CloseIO of standard input.
    pub fn close_stdin(&self, exec: &str) -> Answer<()> {
        let request =
            api::CloseIORequest { id: self.id.clone(), exec_id: exec.to_owned(), stdin: true, ..Default::default() };
        self.shim.call("CloseIO", &request).map(|_: api::Empty| ())
    }

    /// Pids: each with the exec that it belongs to, empty for none.
    pub fn pids(&self) -> Answer<Vec<(u32, String)>> {
        let request = api::PidsRequest { id: self.id.clone(), ..Default::default() };
        let pids: api::PidsResponse = self.shim.call("Pids", &request)?;
        let exec = |process: &api::ProcessInfo| {
            process.info.as_ref().map_or_else(String::new, |info| {
                let details = ProcessDetails::parse_from_bytes(&info.value);
                details.expect("runc's details of a process").exec_id
            })
        };
        Ok(pids.processes.iter().map(|process| (process.pid, exec(process))).collect())
    }

    /// Pause.
    pub fn pause(&self) -> Answer<()> {
        let request = api::PauseRequest { id: self.id.clone(), ..Default::default() };
        self.shim.call("Pause", &request).map(|_: api::Empty| ())
    }

    /// Resume.
    pub fn resume(&self) -> Answer<()> {
        let request = api::ResumeRequest { id: self.id.clone(), ..Default::default() };
        self.shim.call("Resume", &request).map(|_: api::Empty| ())
    }

    /// Update to `resources`, as the OCI runtime specification has them.
    pub fn update(&self, resources: &Value) -> Answer<()> {
        let resources = Some(any(RESOURCES, resources)).into();
        let request = api::UpdateTaskRequest { id: self.id.clone(), resources, ..Default::default() };
        self.shim.call("Update", &request).map(|_: api::Empty| ())
    }

    /// Stats: the type of the message and its bytes.
    pub fn stats(&self) -> Answer<Any> {
        let request = api::StatsRequest { id: self.id.clone(), ..Default::default() };
        let stats: api::StatsResponse = self.shim.call("Stats", &request)?;
        Ok(stats.stats.clone().unwrap_or_default())
    }

    /// Connect.
    pub fn connect(&self) -> Answer<api::ConnectResponse> {
        let request = api::ConnectRequest { id: self.id.clone(), ..Default::default() };
        self.shim.call("Connect", &request)
    }

    /// Checkpoint.
    pub fn checkpoint(&self, directory: &std::path::Path) -> Answer<()> {
        let request = api::CheckpointTaskRequest { id: self.id.clone(), path: text(directory), ..Default::default() };
        self.shim.call("Checkpoint", &request).map(|_: api::Empty| ())
    }

    /// Shutdown, which leaves a shim alone that still has a container.
    pub fn shutdown(&self) -> Answer<()> {
        let request = api::ShutdownRequest { id: self.id.clone(), ..Default::default() };
        self.shim.call("Shutdown", &request).map(|_: api::Empty| ())
    }
}
