//! containerd's events service in the tests' own hands: it keeps every event in the order of arrival.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::Empty,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    shim::events::ForwardRequest,
    shim_sync::{Events, create_events},
};
use protobuf::Message;
use ttrpc::{Server, TtrpcContext};

/// One event, as far as a test compares it.
#[derive(Clone, PartialEq, Eq)]
pub struct Event {
    /// Its topic, its container, and what else tells it from others: `/tasks/exit one exec 137`.
    pub line: String,
    /// The pid that it names; 0 if it names none.
    pub pid: u32,
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.line, self.pid)
    }
}

#[derive(Default)]
struct Heard {
    events: Mutex<Vec<Event>>,
    arrived: Condvar,
}

/// A server of events on a socket of its own, until it is dropped.
pub struct Recorder {
    heard: Arc<Heard>,
    socket: PathBuf,
    server: Option<Server>,
}

struct Service(Arc<Heard>);

impl Events for Service {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let event = read(&request);
        self.0.events.lock().expect("no holder panics").push(event);
        self.0.arrived.notify_all();
        Ok(Empty::new())
    }
}

impl Recorder {
    /// Listens on a socket that lies beside the tests' directories, since it is nobody's leftover.
    pub fn start(name: &str) -> Self {
        let socket = std::env::temp_dir().join(format!("caisson-events-{}-{name}", std::process::id()));
        let heard = Arc::new(Heard::default());
        let service = create_events(Arc::new(Service(Arc::clone(&heard))));
        let address = format!("unix://{}", socket.display());
        let mut server = Server::new().bind(&address).expect("a free socket").register_service(service);
        server.start().expect("the server of events starts");
        Self { heard, socket, server: Some(server) }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The lines of all events so far, in order.
    pub fn lines(&self) -> Vec<String> {
        self.events().into_iter().map(|event| event.line).collect()
    }

    /// All events so far, in order.
    pub fn events(&self) -> Vec<Event> {
        self.heard.events.lock().expect("no holder panics").clone()
    }

    /// Waits for an event whose line is `line`.
    ///
    /// # Panics
    /// After `limit`, with what came instead.
    pub fn wait_for(&self, line: &str, limit: Duration) -> Event {
        let end = Instant::now() + limit;
        let mut events = self.heard.events.lock().expect("no holder panics");
        loop {
            if let Some(event) = events.iter().find(|event| event.line == line) {
                return event.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {limit:?} in vain for the event {line:?} among {events:?}");
            events = self.heard.arrived.wait_timeout(events, left).expect("no holder panics").0;
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
        let _ = fs::remove_file(&self.socket);
    }
}

/// An event of a type that no test knows is kept with its type, so that it does not go unseen.
fn read(request: &ForwardRequest) -> Event {
    let envelope = &request.envelope;
    let (topic, bytes) = (&envelope.topic, &envelope.event.value);
    let kind = envelope.event.type_url.rsplit(['/', '.']).next().unwrap_or_default();
    let known = match kind {
        "TaskCreate" => parse(bytes, |event: TaskCreate| (event.container_id, event.pid)),
        "TaskStart" => parse(bytes, |event: TaskStart| (event.container_id, event.pid)),
        "TaskExecAdded" => parse(bytes, |event: TaskExecAdded| (join(&event.container_id, &event.exec_id), 0)),
        "TaskExecStarted" => {
            parse(bytes, |event: TaskExecStarted| (join(&event.container_id, &event.exec_id), event.pid))
        }
        "TaskExit" => parse(bytes, |event: TaskExit| {
            let name = if event.id == event.container_id { String::new() } else { event.id };
            (format!("{} {}", join(&event.container_id, &name), event.exit_status), event.pid)
        }),
        "TaskDelete" => parse(bytes, |event: TaskDelete| {
            let name = if event.id == event.container_id { String::new() } else { event.id };
            (format!("{} {}", join(&event.container_id, &name), event.exit_status), event.pid)
        }),
        "TaskOOM" => parse(bytes, |event: TaskOOM| (event.container_id, 0)),
        "TaskPaused" => parse(bytes, |event: TaskPaused| (event.container_id, 0)),
        "TaskResumed" => parse(bytes, |event: TaskResumed| (event.container_id, 0)),
        _ => None,
    };
    let (text, pid) = known.unwrap_or_else(|| (format!("unreadable {}", envelope.event.type_url), 0));
    Event { line: format!("{topic} {text}"), pid }
}

fn parse<E: Message>(bytes: &[u8], described: impl FnOnce(E) -> (String, u32)) -> Option<(String, u32)> {
    E::parse_from_bytes(bytes).ok().map(described)
}

fn join(container: &str, exec: &str) -> String {
    if exec.is_empty() { container.to_owned() } else { format!("{container} {exec}") }
}
