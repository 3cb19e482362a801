//! Events for containerd: each goes to its ttrpc events service (the socket in TTRPC_ADDRESS), one after the other in
//! the order in which they happened. While containerd is away they wait, and a new connection is tried again
//! and again, at growing distances. One whose answer was lost is sent again: containerd may get it twice, but never not at all.
//!
//! At most [`CAPACITY`] wait; what comes then is lost, the newest first, with a log line. It takes a containerd that is away for
//! thousands of ends of processes, which only it could have started: kills for want of memory, which a guest could have without
//! end, wait one at a time ([`crate::pod`]). The shim's own end waits for the last ones only so long ([`Publisher::flush`]).

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use caisson_vmm_client::Child;
use containerd_shim_protos::{
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::EventsClient,
    topics,
};
use protobuf::{
    Message, MessageField, MessageFull,
    well_known_types::{any::Any, timestamp::Timestamp},
};
use slog::{Logger, debug, error, warn};
use tokio::{
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};
use ttrpc::{asynchronous::Client, context};

/// Most events that wait for containerd.
pub const CAPACITY: usize = 4096;
/// How long containerd may take to accept one event.
const LIMIT: Duration = Duration::from_secs(5);
/// Pauses between attempts while containerd is away.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// An event and the topic it goes out under.
pub trait Event: MessageFull {
    /// The topic.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ty => $topic:ident),* $(,)?) => {
        $(impl Event for $event {
            const TOPIC: &'static str = topics::$topic;
        })*
    };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
}

/// Seconds and nanoseconds as protobuf writes them.
pub fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

/// Where events go.
#[derive(Clone, Debug)]
pub enum Destination {
    /// containerd's ttrpc socket, a path.
    Ttrpc(String),
    /// containerd's `publish` command, for a containerd that did not say where its ttrpc socket is.
    Command {
        /// containerd's binary.
        program: PathBuf,
        /// Its gRPC socket.
        address: String,
    },
}

/// Takes events; cheap to clone.
#[derive(Clone, Debug)]
pub struct Publisher {
    queue: mpsc::Sender<Envelope>,
    namespace: Arc<str>,
    log: Logger,
    waiting: Arc<AtomicUsize>,
    idle: Arc<Notify>,
}

impl Publisher {
    /// Starts the task that delivers.
    pub fn start(destination: Destination, namespace: &str, log: Logger) -> Self {
        let (queue, envelopes) = mpsc::channel(CAPACITY);
        let publisher = Self { queue, namespace: namespace.into(), log, waiting: Arc::default(), idle: Arc::default() };
        let delivery = Delivery {
            destination,
            client: None,
            log: publisher.log.clone(),
            waiting: Arc::clone(&publisher.waiting),
            idle: Arc::clone(&publisher.idle),
        };
        tokio::spawn(delivery.run(envelopes));
        publisher
    }

    /// containerd's namespace, in which all this happens.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Queues one event; never waits.
    pub fn publish<E: Event>(&self, event: &E) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return error!(self.log, "event lost"; "topic" => E::TOPIC, "error" => %error),
        };
        // containerd names types without a host in front.
        let any = Any { type_url: E::descriptor().full_name().to_owned(), value, ..Any::default() };
        let envelope = Envelope {
            timestamp: timestamp(SystemTime::now()),
            namespace: self.namespace.as_ref().to_owned(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(any),
            ..Envelope::default()
        };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if self.queue.try_send(envelope).is_err() {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            error!(self.log, "event lost: too many wait for containerd"; "topic" => E::TOPIC, "waiting" => CAPACITY);
        }
    }

    /// Waits until every event has been delivered.
    pub async fn delivered(&self) {
        loop {
            let idle = self.idle.notified();
            if self.waiting.load(Ordering::Relaxed) == 0 {
                break;
            }
            idle.await;
        }
    }

    /// Waits until every event has been delivered, but no longer than `limit`.
    pub async fn flush(&self, limit: Duration) {
        if timeout(limit, self.delivered()).await.is_err() {
            warn!(self.log, "events undelivered at exit"; "waiting" => self.waiting.load(Ordering::Relaxed));
        }
    }
}

struct Delivery {
    destination: Destination,
    client: Option<EventsClient>,
    log: Logger,
    waiting: Arc<AtomicUsize>,
    idle: Arc<Notify>,
}

impl Delivery {
    async fn run(mut self, mut envelopes: mpsc::Receiver<Envelope>) {
        while let Some(envelope) = envelopes.recv().await {
            let mut pause = FIRST_PAUSE;
            loop {
                // A connection that stood idle may have died with an earlier containerd: the next may be there already.
                let stale = self.client.is_some();
                let Err(error) = self.deliver(&envelope).await else { break };
                self.client = None;
                if stale {
                    continue;
                }
                warn!(self.log, "cannot deliver events to containerd"; "topic" => &envelope.topic, "error" => error);
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            debug!(self.log, "event"; "topic" => &envelope.topic);
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.idle.notify_waiters();
        }
    }

    async fn deliver(&mut self, envelope: &Envelope) -> Result<(), String> {
        match &self.destination {
            Destination::Ttrpc(path) => {
                let client = match &self.client {
                    Some(client) => client,
                    None => {
                        let address = format!("unix://{}", path.trim_start_matches("unix://"));
                        let client = Client::connect(&address).await.map_err(|error| error.to_string())?;
                        self.client.insert(EventsClient::new(client))
                    }
                };
                let request =
                    ForwardRequest { envelope: MessageField::some(envelope.clone()), ..ForwardRequest::default() };
                match client.forward(context::with_duration(LIMIT), &request).await {
                    Ok(_) => Ok(()),
                    // containerd has it and refuses it: trying again would not help.
                    Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::INVALID_ARGUMENT => {
                        warn!(self.log, "containerd refuses an event"; "topic" => &envelope.topic, "error" => status.message());
                        Ok(())
                    }
                    Err(error) => Err(error.to_string()),
                }
            }
            Destination::Command { program, address } => publish_by_command(program, address, envelope).await,
        }
    }
}

/// `containerd --address A publish --topic T --namespace N`, the event on its standard input.
async fn publish_by_command(program: &Path, address: &str, envelope: &Envelope) -> Result<(), String> {
    use std::io::Write;
    let event = envelope.event.write_to_bytes().map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.args(["--address", address, "publish", "--topic", &envelope.topic, "--namespace", &envelope.namespace]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    // At most a few KiB: fits into the pipe whether it is read or not.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(&event));
    let mut child = Child::adopt(child).map_err(|error| format!("cannot watch {}: {error}", program.display()))?;
    written.map_err(|error| format!("cannot write to {}: {error}", program.display()))?;
    // Dropped, it is killed.
    match timeout(LIMIT, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("{} publish: {status}", program.display())),
        Ok(Err(error)) => Err(format!("{} publish: {error}", program.display())),
        Err(_) => Err(format!("{} publish did not end within {LIMIT:?}", program.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::well_known_types::empty::Empty;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    #[derive(Default)]
    struct Containerd {
        topics: Mutex<Vec<(String, String, String)>>,
        fail_first: AtomicUsize,
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            if self.fail_first.load(Ordering::Relaxed) > 0 {
                self.fail_first.fetch_sub(1, Ordering::Relaxed);
                return Err(ttrpc::Error::Others("not now".into()));
            }
            let envelope = request.envelope.unwrap();
            let event = envelope.event.unwrap();
            self.topics.lock().unwrap().push((envelope.topic, envelope.namespace, event.type_url));
            Ok(Empty::new())
        }
    }

    fn log() -> Logger {
        caisson_log::logger("shim", std::io::sink(), slog::Level::Error)
    }

    #[tokio::test]
    async fn events_wait_for_containerd_and_arrive_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("c.sock").display().to_string();
        let publisher = Publisher::start(Destination::Ttrpc(socket.clone()), "ns", log());
        publisher.publish(&TaskStart { container_id: "one".into(), ..TaskStart::default() });
        for _ in 0..20 {
            publisher.publish(&TaskExecAdded::default());
            publisher.publish(&TaskExecStarted::default());
        }
        publisher.publish(&TaskExit::default());
        let containerd = Arc::new(Containerd { fail_first: AtomicUsize::new(2), ..Containerd::default() });
        let service = create_events(Arc::clone(&containerd) as Arc<dyn Events + Send + Sync>);
        let mut server = Server::new().bind(&format!("unix://{socket}")).unwrap().register_service(service);
        server.start().await.unwrap();
        publisher.flush(Duration::from_secs(20)).await;
        let topics = containerd.topics.lock().unwrap().clone();
        assert_eq!(topics.len(), 42);
        assert_eq!(topics[0], ("/tasks/start".into(), "ns".into(), "containerd.events.TaskStart".into()));
        assert!(
            topics[1..41].chunks(2).all(|two| two[0].0 == "/tasks/exec-added" && two[1].0 == "/tasks/exec-started")
        );
        assert_eq!(topics[41].0, "/tasks/exit");
    }

    #[tokio::test]
    async fn without_a_ttrpc_socket_the_publish_command_gets_the_event() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let (program, said) = (directory.path().join("containerd"), directory.path().join("said"));
        // The first time containerd is away.
        let script = format!(
            "#!/bin/sh\n[ -e {0}.tried ] || {{ > {0}.tried; exit 1; }}\necho \"$@\" > {0}; cat >> {0}\n",
            said.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let publisher = Publisher::start(Destination::Command { program, address: "/a.sock".into() }, "ns", log());
        publisher.publish(&TaskDelete { container_id: "one".into(), ..TaskDelete::default() });
        timeout(Duration::from_secs(20), publisher.delivered()).await.expect("the command ran");
        let recorded = std::fs::read(&said).unwrap();
        let line = b"--address /a.sock publish --topic /tasks/delete --namespace ns\n";
        let event = Any::parse_from_bytes(recorded.strip_prefix(line).unwrap()).unwrap();
        assert_eq!(event.type_url, "containerd.events.TaskDelete");
        assert_eq!(TaskDelete::parse_from_bytes(&event.value).unwrap().container_id, "one");
    }
}
