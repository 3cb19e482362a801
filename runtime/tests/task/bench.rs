//! A pod on a played guest, served to a ttrpc client as containerd is one, with containerd's events service beside it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use caisson_protos::guest::HOST_SHARE_DIRECTORY;
use caisson_runtime::{
    host::paths::PodPaths,
    network::{Namespace, Policy, Settings, join},
    pod::{
        Limits, Pod, Provision, Provisions,
        network::{CardSlots, Joined, PodNetwork},
    },
    rootfs::share::{Share, enter_mount_namespace},
    shim::{
        events::{Destination, Publisher},
        service,
    },
    vm::{
        dial::Dialer,
        supervisor::{Machine, MachineHandle, MachineOwner, MachineState, machine},
        timeline::{Timeline, now_ns},
    },
};
use caisson_vmm_client::Control;
use containerd_shim_protos::{
    api::{
        CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        Mount, StartRequest, StartResponse, StateRequest, StateResponse, WaitRequest, WaitResponse,
    },
    events::task::{TaskExecAdded, TaskExecStarted, TaskExit},
    shim::events::ForwardRequest,
    shim_async::{Events, TaskClient, create_events},
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use protobuf::{Message, well_known_types::any::Any};
use serde_json::json;
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::unix::pipe::OpenOptions, time::timeout};
use ttrpc::{
    Code,
    asynchronous::{Client, Server, TtrpcContext},
    context::{Context, with_duration},
};

use crate::{
    guest::{self, Guest},
    monitor::{self, Monitor},
    scratch::Scratch,
};

/// How long any one thing may take before the test gives up on it.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A real pod waits longer.
const LIMITS: Limits = {
    let limit = Duration::from_secs(2);
    Limits { call: limit, kill: limit, drain: limit, write_back: limit }
};

/// containerd's events service, which can go away and come back.
#[derive(Default)]
struct Containerd {
    recorded: Mutex<Vec<(String, Any)>>,
    /// Takes each event, but dies before it says so.
    mute: AtomicBool,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap();
        assert_eq!(envelope.namespace, "ns");
        if self.mute.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        self.recorded.lock().unwrap().push((envelope.topic, envelope.event.unwrap()));
        Ok(Empty::new())
    }
}

/// Everything of one test.
pub struct Bench {
    pub task: TaskClient,
    pub client: Client,
    pub guest: Arc<Guest>,
    pub pod: Arc<Pod>,
    pub machine: MachineHandle,
    /// The pod's network namespace.
    pub network: Namespace,
    pub monitor: Arc<Monitor>,
    control: Control,
    owner: Arc<MachineOwner>,
    publisher: Publisher,
    containerd: Arc<Containerd>,
    events_server: tokio::sync::Mutex<Option<Server>>,
    paths: PodPaths,
    directory: TempDir,
    _state: Scratch,
    _servers: Vec<Server>,
}

pub fn within() -> Context {
    with_duration(LIMIT)
}

/// The code and words of a refusal.
pub fn refusal<T>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        Err(other) => panic!("no status: {other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

impl Bench {
    /// A pod whose machine is ready.
    pub async fn new() -> Self {
        let bench = Self::booting().await;
        bench.boot().await;
        bench
    }

    /// A pod whose machine is ready, in this network namespace.
    pub async fn within(network: Namespace) -> Self {
        let bench = Self::booting_within(network).await;
        bench.boot().await;
        bench
    }

    async fn boot(&self) {
        let dialer = Arc::new(Dialer::new(self.directory.path()).unwrap());
        let machine = Machine::connect(dialer, self.control.clone()).await.unwrap();
        self.owner.set(MachineState::Ready(Arc::new(machine)));
    }

    /// A pod whose machine is still on its way.
    pub async fn booting() -> Self {
        Self::booting_within(Namespace::new().expect("these tests run as root")).await
    }

    async fn booting_within(network: Namespace) -> Self {
        let host = enter_mount_namespace().expect("these tests run as root");
        let (directory, state) = (tempfile::tempdir().unwrap(), Scratch::new());
        let (guest, agent) = guest::serve(directory.path()).await;
        let paths = PodPaths::new(state.path(), "ns", "pod");
        paths.create(Path::new("/bundle"), Path::new("/socket")).unwrap();
        let share = Share::mount(&paths).unwrap();

        let containerd = Arc::new(Containerd::default());
        let events = directory.path().join("events.sock").display().to_string();

        let log = caisson_log::logger("shim", std::io::sink(), slog::Level::Debug);
        let (handle, owner): (MachineHandle, MachineOwner) = machine();
        let owner = Arc::new(owner);
        let stopper = Arc::clone(&owner);
        tokio::spawn(async move {
            stopper.stop_wanted().await;
            stopper.set(MachineState::Lost("the machine was stopped".into()));
        });
        let publisher = Publisher::start(Destination::Ttrpc(events), "ns", log.clone());
        let timeline = Arc::new(Timeline::new(now_ns()));
        let settings = Settings { queues: 1, cards: 8, descriptors: 8 };
        let (_, message, watch) = join(network.clone(), settings).unwrap();
        let joined = Joined { namespace: network.clone(), message, watch, policy: Policy::default() };
        let (monitor, control) = monitor::serve();
        let provision = Provision::Ready(Box::new(Provisions {
            share,
            first: None,
            host,
            allotment: None,
            has_host_share: true,
            network: PodNetwork::new(joined, CardSlots::new()),
        }));
        let pod = Pod::new(handle.clone(), provision, publisher.clone(), LIMITS, timeline, log);
        let socket = format!("unix://{}", directory.path().join("task.sock").display());
        let mut server = Server::new().bind(&socket).unwrap().register_service(service::services(&pod));
        server.start().await.unwrap();
        let client = Client::connect(&socket).await.unwrap();
        let task = TaskClient::new(client.clone());
        let bench = Self {
            task,
            client,
            guest,
            pod,
            machine: handle,
            network,
            monitor,
            control,
            owner,
            publisher,
            containerd,
            events_server: tokio::sync::Mutex::default(),
            paths,
            directory,
            _state: state,
            _servers: vec![agent, server],
        };
        bench.start_containerd().await;
        bench
    }

    /// containerd's events service comes up, at the place where it always is.
    pub async fn start_containerd(&self) {
        let events = self.directory.path().join("events.sock");
        let _ = fs::remove_file(&events);
        self.containerd.mute.store(false, Ordering::Relaxed);
        let service = create_events(Arc::clone(&self.containerd) as Arc<dyn Events + Send + Sync>);
        let address = format!("unix://{}", events.display());
        let mut server = Server::new().bind(&address).unwrap().register_service(service);
        server.start().await.unwrap();
        *self.events_server.lock().await = Some(server);
    }

    /// containerd dies: its sockets are there still, but nobody answers.
    pub async fn stop_containerd(&self) {
        if let Some(mut server) = self.events_server.lock().await.take() {
            server.shutdown().await.unwrap();
        }
    }

    /// containerd hangs: what it was sent it neither answers nor keeps.
    pub fn mute_containerd(&self) {
        self.containerd.mute.store(true, Ordering::Relaxed);
    }

    /// A connection of its own, as a restarted containerd makes it.
    pub async fn connect(&self) -> TaskClient {
        let socket = format!("unix://{}", self.directory.path().join("task.sock").display());
        TaskClient::new(Client::connect(&socket).await.unwrap())
    }

    /// The machine ends.
    pub fn lose_machine(&self, reason: &str) {
        self.owner.set(MachineState::Lost(reason.into()));
    }

    /// Where a bundle is, and where its test may leave files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// As [`Self::request`], with a specification that `change` has changed.
    pub fn request_with(
        &self,
        id: &str,
        args: &[&str],
        change: impl FnOnce(&mut serde_json::Value),
    ) -> CreateTaskRequest {
        let request = self.request(id, args);
        let path = Path::new(&request.bundle).join("config.json");
        let mut spec = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut spec);
        fs::write(path, spec.to_string()).unwrap();
        request
    }

    /// What is in a place of the shared directory as caisson-fsd sees it.
    pub fn seen(&self, place: &str) -> PathBuf {
        self.paths.view().join(place)
    }

    /// The containers that have a place in the shared directory.
    pub fn shared(&self) -> Vec<String> {
        let entries = fs::read_dir(self.paths.shared()).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name != HOST_SHARE_DIRECTORY).collect()
    }

    pub fn pod_directory_exists(&self) -> bool {
        self.paths.pod().exists()
    }

    /// Waits until containerd has every event; topic, container or exec id, exit status.
    pub async fn events(&self) -> Vec<String> {
        self.publisher.flush(LIMIT).await;
        let events = self.containerd.recorded.lock().unwrap();
        let line = |(topic, event): &(String, Any)| match topic.as_str() {
            "/tasks/exit" => {
                let exit = TaskExit::parse_from_bytes(&event.value).unwrap();
                format!("{topic} {} {}", exit.id, exit.exit_status)
            }
            "/tasks/exec-added" => {
                let added = TaskExecAdded::parse_from_bytes(&event.value).unwrap();
                format!("{topic} {}", added.exec_id)
            }
            "/tasks/exec-started" => {
                let started = TaskExecStarted::parse_from_bytes(&event.value).unwrap();
                format!("{topic} {}", started.exec_id)
            }
            _ => topic.clone(),
        };
        events.iter().map(line).collect()
    }

    /// Gives containerd so long to take what waits for it.
    pub async fn flush(&self, limit: Duration) {
        self.publisher.flush(limit).await;
    }

    /// A place of the test's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn fifo(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    fn process(args: &[&str]) -> serde_json::Value {
        json!({ "user": { "uid": 0, "gid": 0 }, "args": args, "cwd": "/" })
    }

    /// A bundle with a root that is a bind mount of a directory, and a request to create it.
    pub fn request(&self, id: &str, args: &[&str]) -> CreateTaskRequest {
        let bundle: PathBuf = self.directory.path().join("bundles").join(id);
        let layer = bundle.join("layer");
        fs::create_dir_all(&layer).unwrap();
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": Self::process(args),
            "root": { "path": "rootfs" },
            "linux": { "namespaces": [
                { "type": "mount" }, { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }
            ] },
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let mount = Mount {
            type_: "bind".into(),
            source: layer.display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
            ..Mount::default()
        };
        CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            rootfs: vec![mount],
            ..CreateTaskRequest::default()
        }
    }

    pub async fn create(&self, request: &CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        self.task.create(within(), request).await
    }

    pub async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<StartResponse> {
        let request = StartRequest { id: id.into(), exec_id: exec.into(), ..StartRequest::default() };
        self.task.start(within(), &request).await
    }

    pub async fn exec(&self, id: &str, exec: &str, args: &[&str], stdout: &str) -> ttrpc::Result<Empty> {
        let value = Self::process(args).to_string().into_bytes();
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            stdout: stdout.into(),
            spec: protobuf::MessageField::some(Any { value, ..Any::default() }),
            ..ExecProcessRequest::default()
        };
        self.task.exec(within(), &request).await
    }

    pub async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        let request = WaitRequest { id: id.into(), exec_id: exec.into(), ..WaitRequest::default() };
        self.task.wait(within(), &request).await
    }

    pub async fn kill(&self, id: &str, exec: &str, signal: u32) -> ttrpc::Result<Empty> {
        let request = KillRequest { id: id.into(), exec_id: exec.into(), signal, ..KillRequest::default() };
        self.task.kill(within(), &request).await
    }

    pub async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: id.into(), exec_id: exec.into(), ..DeleteRequest::default() };
        self.task.delete(within(), &request).await
    }

    pub async fn state(&self, id: &str, exec: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest { id: id.into(), exec_id: exec.into(), ..StateRequest::default() };
        self.task.state(within(), &request).await
    }
}

/// Reads a FIFO to its end, as a client does. Call it before the other side opens the FIFO.
pub fn reader(path: &str) -> tokio::task::JoinHandle<Vec<u8>> {
    let mut fifo = OpenOptions::new().open_receiver(path).unwrap();
    tokio::spawn(async move {
        let mut bytes = Vec::new();
        timeout(LIMIT, fifo.read_to_end(&mut bytes)).await.expect("the FIFO ends").unwrap();
        bytes
    })
}
