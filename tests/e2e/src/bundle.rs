//! A shim driven by hand, as containerd would drive it: for what containerd itself would never let through.
//!
//! ```text
//! containerd                                   the test
//!   bundle directory: config.json, log (FIFO)    Bundle::new
//!   shim start → its address                     Bundle::start
//!   Create, Start, ... on the address            Shim::call
//!   Shutdown; shim delete; bundle removed        Bundle::discard
//! ```

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use containerd_shim_protos::api;
use serde_json::{Value, json};

use crate::{
    Finished, Host, Runtime, archive, environment,
    events::Recorder,
    process::{Capture, Running},
    shim::Shim,
    wait::{STEP, until},
};

/// A bundle directory and the shim that was started in it.
pub struct Bundle<'a> {
    host: &'a Host,
    /// The container's id.
    pub id: String,
    /// The bundle directory.
    pub directory: PathBuf,
    /// What the shim has logged.
    pub log: Capture,
    /// Where the shim sends its events.
    events: PathBuf,
}

/// The least specification that runs `arguments`, for a test to spoil.
pub fn specification(arguments: &[&str]) -> Value {
    let namespaces: Vec<Value> =
        ["pid", "ipc", "uts", "mount", "network"].iter().map(|kind| json!({ "type": kind })).collect();
    json!({
        "ociVersion": "1.0.2",
        "process": { "args": arguments, "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"] },
        "root": { "path": "rootfs" },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": { "namespaces": namespaces },
    })
}

impl<'a> Bundle<'a> {
    /// Makes the directory with `config` as its config.json, whatever that is.
    pub fn new(host: &'a Host, name: &str, config: &str) -> Self {
        let id = host.container(name).id;
        let directory = host.directory().join("bundles").join(&id);
        fs::create_dir_all(directory.join("rootfs")).expect("the test's directory takes files");
        fs::write(directory.join("config.json"), config).expect("the test's directory takes files");
        let log = directory.join("log");
        fifo(&log);
        // Open at both ends, so that neither the shim's open nor this one waits for the other.
        let reader = File::options().read(true).write(true).open(&log).expect("the FIFO opens");
        let events = PathBuf::from(format!("{}.ttrpc", host.containerd.socket().display()));
        Self { host, id, directory, log: Capture::of(reader), events }
    }

    /// Has the shim send its events to `recorder` instead of containerd.
    pub fn with_events(mut self, recorder: &Recorder) -> Self {
        self.events = recorder.socket().to_owned();
        self
    }

    /// A root file system of its own with busybox in it, as Create wants it.
    pub fn busybox_root(&self) -> Vec<api::Mount> {
        let root = self.directory.join("busybox");
        archive::unpack(&environment::oci_dir().join("busybox.tar"), &root);
        vec![bind(&root)]
    }

    fn shim_command(&self) -> Command {
        let program = match self.host.runtime {
            Runtime::Caisson => environment::bin_dir().join("containerd-shim-caisson-v2"),
            Runtime::Runc => PathBuf::from("containerd-shim-runc-v2"),
        };
        let socket = self.host.containerd.socket();
        let mut command = Command::new(program);
        command.current_dir(&self.directory);
        command.env("TTRPC_ADDRESS", &self.events);
        command.env("CAISSON_CONFIG", self.host.directory().join("caisson.toml"));
        command.args(["-namespace", self.host.namespace(), "-id", &self.id, "-publish-binary", "containerd"]);
        command.arg("-address").arg(socket);
        command
    }

    /// `start`: gives the shim, or what the failed call left on its streams.
    pub fn start(&self) -> Result<Shim, Finished> {
        let mut running = Running::start(self.shim_command().arg("start"));
        running.close_stdin();
        let finished = Finished::of(running, STEP);
        if finished.code == Some(0) { Ok(Shim::at(finished.out().trim())) } else { Err(finished) }
    }

    /// A Create of this bundle with `rootfs`, for a test to spoil.
    pub fn create_request(&self, rootfs: Vec<api::Mount>) -> api::CreateTaskRequest {
        let bundle = self.directory.to_string_lossy().into_owned();
        api::CreateTaskRequest { id: self.id.clone(), bundle, rootfs, ..Default::default() }
    }

    /// What containerd does after a failure: Shutdown, the shim's end, `delete`, no directory.
    pub fn discard(self, shim: Option<Shim>) {
        if let Some(shim) = shim {
            // The answer may be lost, because the shim ends.
            let request = api::ShutdownRequest { id: self.id.clone(), now: true, ..Default::default() };
            shim.tell("Shutdown", &request);
        }
        until(&format!("the end of the shim of {}", self.id), STEP, || {
            let mine = |process: &crate::process::Process| process.command.contains(&self.id);
            (!self.host.processes().iter().any(mine)).then_some(())
        });
        let mut delete = self.shim_command();
        delete.arg("-bundle").arg(&self.directory).arg("delete");
        let mut running = Running::start(&mut delete);
        running.close_stdin();
        let finished = Finished::of(running, STEP);
        // runc's fails if the shim never came to a Create; it is the mounts and directories that count.
        let excused = self.host.runtime == Runtime::Runc;
        assert!(finished.code == Some(0) || excused, "shim delete: {finished:?}");
        // Fails if anything in it is still mounted.
        fs::remove_dir_all(&self.directory).unwrap_or_else(|error| panic!("{}: {error}", self.directory.display()));
        self.host.expect_nothing_left();
    }
}

/// A root file system for Create: the directory `source` of this machine, writable.
pub fn bind(source: &Path) -> api::Mount {
    let source = source.to_string_lossy().into_owned();
    let options = vec!["rbind".to_owned(), "rw".to_owned()];
    api::Mount { type_: "bind".to_owned(), source, options, ..Default::default() }
}

/// Makes a FIFO.
pub fn fifo(path: &Path) {
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, 0o600.into(), 0).expect("the test's directory takes FIFOs");
}
