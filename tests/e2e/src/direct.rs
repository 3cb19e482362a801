//! A shim with one container, driven by the Task calls themselves, its events sent to the test.

use std::{fs::File, io, path::PathBuf, sync::mpsc, thread};

use serde_json::Value;

use crate::{
    Host,
    bundle::{self, Bundle, fifo},
    events::Recorder,
    process::Capture,
    shim::Shim,
    task::{Answer, Streams, Task},
    wait::STEP,
};

/// See the module.
pub struct Direct<'a> {
    /// The bundle directory.
    pub bundle: Bundle<'a>,
    /// The shim.
    pub shim: Shim,
    /// Its container, which is yet to be created.
    pub task: Task,
    /// What the shim has published.
    pub events: Recorder,
}

impl<'a> Direct<'a> {
    /// Starts a shim whose container will run `arguments`.
    pub fn start(host: &'a Host, name: &str, arguments: &[&str]) -> Self {
        Self::of(host, name, bundle::specification(arguments))
    }

    /// Starts a shim for `specification`, which gets a control group of the test's.
    pub fn of(host: &'a Host, name: &str, mut specification: Value) -> Self {
        specification["linux"]["cgroupsPath"] = format!("/{}/{name}", host.namespace()).into();
        let events = Recorder::start(name);
        let bundle = Bundle::new(host, name, &specification.to_string()).with_events(&events);
        let shim = bundle.start().unwrap_or_else(|finished| panic!("the shim does not start: {finished:?}"));
        let task = Task::new(&shim, &bundle.id);
        Self { bundle, shim, task, events }
    }

    /// Create, with busybox as the root file system.
    pub fn create(&self, streams: &Streams) -> Answer<u32> {
        self.task.create(self.bundle.create_request(self.bundle.busybox_root()), streams)
    }

    /// Create without streams, and Start.
    pub fn run(&self) -> u32 {
        self.create(&Streams::default()).expect("Create");
        self.task.start("").expect("Start")
    }

    /// Kills all that is in the container and deletes it.
    pub fn kill_and_delete(&self) {
        self.task.kill("", 9, true).expect("Kill of all");
        assert_eq!(self.task.wait("").expect("Wait"), 137);
        assert_eq!(self.task.delete("").expect("Delete"), 137);
    }

    /// A FIFO in the bundle directory, and what will be read from it.
    pub fn output(&self, name: &str) -> (PathBuf, Capture) {
        let path = self.bundle.directory.join(name);
        fifo(&path);
        // Without a writer the open waits, and the shim comes with Create.
        let (send, receive) = mpsc::channel();
        let at = path.clone();
        thread::spawn(move || send.send(File::open(at)));
        (path, Capture::of(Late { receive, file: None }))
    }

    /// The lines of all events so far, in which ID stands for the container.
    pub fn lines(&self) -> Vec<String> {
        self.events.lines().iter().map(|line| line.replace(&self.task.id, "ID")).collect()
    }

    /// Waits for the event `line`, in which ID stands for the container; the pid that it names.
    pub fn wait_for(&self, line: &str) -> u32 {
        self.events.wait_for(&line.replace("ID", &self.task.id), STEP).pid
    }

    /// Ends the shim and makes sure that nothing of it stays.
    pub fn end(self) {
        self.bundle.discard(Some(self.shim));
    }
}

/// A file that somebody else is opening.
struct Late {
    receive: mpsc::Receiver<io::Result<File>>,
    file: Option<File>,
}

impl io::Read for Late {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.file.is_none() {
            self.file = Some(self.receive.recv().map_err(io::Error::other)??);
        }
        self.file.as_mut().map_or(Ok(0), |file| file.read(buffer))
    }
}
