//! The guest's half of a pod without a machine: a monitor that speaks CONNECT on a Unix socket, and an agent that serves the
//! real protocol and runs a few programs that it only plays.
//!
//! | program         | what it does                                                    |
//! |-----------------|-----------------------------------------------------------------|
//! | `echo WORDS`    | writes them to stdout, `to stderr` to stderr, exits with 0      |
//! | `cat`           | copies stdin to stdout until its end, exits with 0              |
//! | `sleep`         | waits for a signal                                              |
//! | `flood`         | writes to stdout for ever, even after it was killed             |
//! | `quick`         | exits with 7 before Start is answered                           |
//! | `missing`       | is none                                                         |
//! | `uncreatable`   | is refused by Create                                            |
//! | `liar`          | exits with a status that is none                                |
//! | `count N`       | writes N lines with their numbers to stdout, exits with 0       |

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use caisson_protos::{
    agent::{
        BindDevicesRequest, ConfigureNetworkRequest, ContainerRequest, CreateRequest, CreateResponse, Empty,
        ExecRequest, KillRequest, PidsResponse, ProcessInfo, ProcessRequest, ResizePtyRequest, StartResponse,
        StatsResponse, Stdio, UpdateRequest, WaitOomRequest, WaitOomResponse, WaitResponse,
    },
    agent_ttrpc::{Agent, create_agent},
    guest::{AGENT_PORT, STDIO_PORT},
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Notify, watch},
};
use ttrpc::{
    Code,
    asynchronous::{Server, TtrpcContext},
    error::get_rpc_status,
};

type Key = (String, String);

#[derive(Clone)]
struct Process {
    args: Vec<String>,
    stdio: Stdio,
    exit: watch::Sender<Option<u32>>,
}

/// The agent, and what it was asked.
#[derive(Default)]
pub struct Guest {
    streams: Mutex<HashMap<u32, UnixStream>>,
    processes: Mutex<HashMap<Key, Process>>,
    /// Calls in order, as `Verb container/exec`.
    pub calls: Mutex<Vec<String>>,
    /// Creates as they came.
    pub creates: Mutex<Vec<CreateRequest>>,
    /// How the network is to be, the last word.
    pub network: watch::Sender<Option<ConfigureNetworkRequest>>,
    /// Cuts the agent's connections.
    pub hang_up: Arc<Notify>,
    /// How often the kernel has killed for want of memory.
    pub kills: watch::Sender<u64>,
    /// The answer to Stats.
    pub stats: Mutex<StatsResponse>,
    /// Calls that are refused, by their name, with the code.
    pub refuse: Mutex<HashMap<&'static str, Code>>,
    /// So many processes are listed, if it is not 0.
    pub many: Mutex<usize>,
    /// Calls that are never answered, by their name.
    pub silent: Mutex<std::collections::HashSet<&'static str>>,
    /// While it is false, Pause and Resume are not answered.
    pub moves: watch::Sender<bool>,
}

/// Serves `vsock.sock` and the agent in `directory`. The server must be kept.
pub async fn serve(directory: &Path) -> (Arc<Guest>, Server) {
    let guest = Arc::new(Guest { moves: watch::Sender::new(true), ..Guest::default() });
    let agent = directory.join("agent.sock");
    let service = create_agent(Arc::clone(&guest) as Arc<dyn Agent + Send + Sync>);
    let mut server = Server::new().bind(&format!("unix://{}", agent.display())).unwrap().register_service(service);
    server.start().await.unwrap();
    let listener = UnixListener::bind(directory.join("vsock.sock")).unwrap();
    let accepting = Arc::clone(&guest);
    tokio::spawn(async move {
        let mut next_port = 1000;
        while let Ok((stream, _)) = listener.accept().await {
            next_port += 1;
            tokio::spawn(accept(stream, next_port, Arc::clone(&accepting), agent.clone()));
        }
    });
    (guest, server)
}

async fn accept(stream: UnixStream, port: u32, guest: Arc<Guest>, agent: std::path::PathBuf) {
    // One byte at a time would do as well: the line is all that comes before the answer.
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).await.unwrap();
    let mut stream = reader.into_inner();
    let wanted: u32 = line.trim().strip_prefix("CONNECT ").unwrap().parse().unwrap();
    if wanted == STDIO_PORT {
        // Known before it is answered for, as in the agent, which waits for the stream.
        let answer = format!("OK {port}\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        guest.streams.lock().unwrap().insert(port, stream);
    } else if wanted == AGENT_PORT {
        let mut agent = UnixStream::connect(agent).await.unwrap();
        stream.write_all(format!("OK {port}\n").as_bytes()).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut stream, &mut agent) => {}
            () = guest.hang_up.notified() => {}
        }
    }
}

impl Guest {
    fn note(&self, verb: &str, container: &str, exec: &str) {
        self.calls.lock().unwrap().push(format!("{verb} {container}/{exec}"));
    }

    /// Waits for ever if the test says so.
    async fn answers(&self, verb: &'static str) {
        if self.silent.lock().unwrap().contains(verb) {
            std::future::pending::<()>().await;
        }
    }

    /// Refuses if the test says so.
    fn check(&self, verb: &str) -> ttrpc::Result<()> {
        match self.refuse.lock().unwrap().get(verb) {
            Some(code) => Err(get_rpc_status(*code, format!("the guest refuses {verb}"))),
            None => Ok(()),
        }
    }

    fn add(&self, key: Key, process: &Value, stdio: Stdio) {
        let args = process["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap().to_owned()).collect();
        self.processes.lock().unwrap().insert(key, Process { args, stdio, exit: watch::Sender::new(None) });
    }

    fn process(&self, container: &str, exec: &str) -> ttrpc::Result<Process> {
        let key = (container.to_owned(), exec.to_owned());
        let missing = || get_rpc_status(Code::NOT_FOUND, format!("no process {container}/{exec}"));
        self.processes.lock().unwrap().get(&key).cloned().ok_or_else(missing)
    }

    async fn claim(&self, port: u32) -> Option<UnixStream> {
        if port == 0 {
            return None;
        }
        loop {
            if let Some(stream) = self.streams.lock().unwrap().remove(&port) {
                return Some(stream);
            }
            tokio::task::yield_now().await;
        }
    }

    async fn play(&self, process: &Process) {
        let stdin = self.claim(process.stdio.stdin_port).await;
        let stdout = self.claim(process.stdio.stdout_port).await;
        let stderr = self.claim(process.stdio.stderr_port).await;
        let (exit, args) = (process.exit.clone(), process.args.clone());
        let play = async move {
            let program = args[0].as_str();
            match program {
                "echo" => {
                    if let Some(mut stdout) = stdout {
                        stdout.write_all(format!("{}\n", args[1..].join(" ")).as_bytes()).await.unwrap();
                    }
                    if let Some(mut stderr) = stderr {
                        stderr.write_all(b"to stderr\n").await.unwrap();
                    }
                    exit.send_replace(Some(0));
                }
                "cat" => {
                    let mut all = Vec::new();
                    stdin.unwrap().read_to_end(&mut all).await.unwrap();
                    stdout.unwrap().write_all(&all).await.unwrap();
                    exit.send_replace(Some(0));
                }
                "flood" => {
                    let mut stdout = stdout.unwrap();
                    while stdout.write_all(&[b'x'; 4096]).await.is_ok() {}
                }
                "count" => {
                    let mut stdout = stdout.unwrap();
                    for line in 0..args[1].parse::<u32>().unwrap() {
                        stdout.write_all(format!("{line}\n").as_bytes()).await.unwrap();
                    }
                    exit.send_replace(Some(0));
                }
                "quick" => drop(exit.send_replace(Some(7))),
                "liar" => drop(exit.send_replace(Some(u32::MAX))),
                _ => {
                    let _ = exit.subscribe().wait_for(Option::is_some).await;
                }
            }
        };
        if process.args[0] == "quick" { play.await } else { drop(tokio::spawn(play)) }
    }
}

#[async_trait]
impl Agent for Guest {
    async fn create(&self, _: &TtrpcContext, request: CreateRequest) -> ttrpc::Result<CreateResponse> {
        self.note("Create", &request.container_id, "");
        assert_eq!(request.rootfs, format!("{}/rootfs", request.container_id));
        let spec: Value = serde_json::from_slice(&request.spec).unwrap();
        self.creates.lock().unwrap().push(request.clone());
        if spec["process"]["args"][0] == "uncreatable" {
            return Err(get_rpc_status(Code::INVALID_ARGUMENT, "the guest cannot have it"));
        }
        self.add((request.container_id, String::new()), &spec["process"], request.stdio.unwrap());
        self.answers("Create").await;
        Ok(CreateResponse { pid: 42, ..CreateResponse::default() })
    }

    async fn configure_network(&self, _: &TtrpcContext, request: ConfigureNetworkRequest) -> ttrpc::Result<Empty> {
        self.calls.lock().unwrap().push("ConfigureNetwork".into());
        self.check("ConfigureNetwork")?;
        self.network.send_replace(Some(request));
        Ok(Empty::new())
    }

    async fn bind_devices(&self, _: &TtrpcContext, request: BindDevicesRequest) -> ttrpc::Result<Empty> {
        self.calls.lock().unwrap().push(format!("BindDevices {:?} {:?}", request.bind, request.unbind));
        self.check("BindDevices")?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        self.note("Exec", &request.container_id, &request.exec_id);
        let process = serde_json::from_slice(&request.process).unwrap();
        self.add((request.container_id, request.exec_id), &process, request.stdio.unwrap());
        Ok(Empty::new())
    }

    async fn start(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<StartResponse> {
        self.note("Start", &request.container_id, &request.exec_id);
        let process = self.process(&request.container_id, &request.exec_id)?;
        if process.args[0] == "missing" {
            process.exit.send_replace(Some(127));
            return Err(get_rpc_status(Code::NOT_FOUND, "exec: \"missing\": no such file"));
        }
        self.play(&process).await;
        self.answers("Start").await;
        Ok(StartResponse { pid: 42, ..StartResponse::default() })
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let mut exit = process.exit.subscribe();
        let exit_status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(WaitResponse { exit_status, exited_at_ns: 1, pid: 42, ..WaitResponse::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.note(&format!("Kill({}, {})", request.signal, request.all), &request.container_id, &request.exec_id);
        let process = self.process(&request.container_id, &request.exec_id)?;
        self.answers("Kill").await;
        process.exit.send_replace(Some(128 + request.signal));
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.note("Pause", &request.container_id, "");
        self.moves.subscribe().wait_for(|moves| *moves).await.unwrap();
        self.check("Pause")?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.note("Resume", &request.container_id, "");
        self.moves.subscribe().wait_for(|moves| *moves).await.unwrap();
        self.check("Resume")?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let resources = String::from_utf8(request.resources).unwrap();
        self.note(&format!("Update({resources})"), &request.container_id, "");
        self.check("Update")?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        self.check("Stats")?;
        self.process(&request.container_id, "")?;
        Ok(self.stats.lock().unwrap().clone())
    }

    async fn wait_oom(&self, _: &TtrpcContext, request: WaitOomRequest) -> ttrpc::Result<WaitOomResponse> {
        let process = self.process(&request.container_id, "")?;
        let (mut kills, mut exit) = (self.kills.subscribe(), process.exit.subscribe());
        let more = |kills: &u64| *kills > request.seen;
        tokio::select! {
            biased;
            kills = kills.wait_for(more) => Ok(WaitOomResponse { kills: *kills.unwrap(), ..WaitOomResponse::new() }),
            _ = exit.wait_for(Option::is_some) => Err(get_rpc_status(Code::FAILED_PRECONDITION, "it has ended")),
        }
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.note(&format!("Resize({}x{})", request.width, request.height), &request.container_id, &request.exec_id);
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        self.check("Pids")?;
        let many = *self.many.lock().unwrap();
        if many > 0 {
            let processes = vec![ProcessInfo::default(); many];
            return Ok(PidsResponse { processes, ..PidsResponse::default() });
        }
        let processes = self.processes.lock().unwrap();
        let of_container = processes.keys().filter(|(container, _)| *container == request.container_id);
        let info = |(pid, (_, exec)): (u32, &Key)| ProcessInfo { pid, exec_id: exec.clone(), ..ProcessInfo::default() };
        Ok(PidsResponse { processes: (42..).zip(of_container).map(info).collect(), ..PidsResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.calls.lock().unwrap().push("Shutdown".into());
        self.answers("Shutdown").await;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        self.note("Delete", &request.container_id, &request.exec_id);
        self.answers("Delete").await;
        self.process(&request.container_id, &request.exec_id)?;
        self.processes.lock().unwrap().remove(&(request.container_id, request.exec_id));
        Ok(WaitResponse::new())
    }
}
