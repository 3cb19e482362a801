//! An agent for one test, and what a shim would do with it.

use std::{
    fs,
    future::Future,
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio as StdStdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use caisson_protos::{
    agent::{
        ContainerRequest, CreateRequest, ExecRequest, KillRequest, ProcessRequest, ResizePtyRequest, StatsResponse,
        Stdio, UpdateRequest, WaitOomRequest, WaitResponse,
    },
    agent_ttrpc::AgentClient,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use ttrpc::{Code, asynchronous::Client, context};

/// No step of a test takes this long unless something hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Waits for `work`, and says what it waited for when that does not come.
pub async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.unwrap_or_else(|_| panic!("waited {LIMIT:?} for {what}"))
}

/// An agent, its shared directory with one root file system, and a client.
pub struct Pod {
    directory: tempfile::TempDir,
    cgroup: PathBuf,
    agent: Child,
    client: AgentClient,
    next_port: AtomicU32,
}

/// A process's far ends.
#[derive(Default)]
pub struct Streams {
    pub stdin: Option<UnixStream>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
}

/// What a finished process left.
#[derive(Debug)]
pub struct Output {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

const TOOLS: &str = "sh cat echo id true false sleep stty ls mkdir mount umount ln hostname kill env pwd stat touch head \
                     seq sha256sum dd tail grep awk chmod chown mknod readlink test printf wc ps tr sed cp rm find yes mv rmdir uname ionice tty sort cut";

impl Pod {
    /// Starts an agent and waits until it is ready.
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::create_dir_all(path.join("share")).unwrap();
        fs::create_dir_all(path.join("cgroup")).unwrap();
        make_rootfs(&path.join("share/rootfs"));
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mount = cgroup2_mount();
        for controller in ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"] {
            // As in a guest, where the kernel has them; with cgroup v1 beside they are taken, and then go without.
            let _ = fs::write(mount.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        let cgroup = mount.join(format!("caisson-test-{}-{number}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        // The agent's binary lies on a read-only mount, as in a guest.
        let script = "set -e; cd \"$1\"; mount -t proc proc /proc; mount --bind \"$2\" cgroup; cp \"$3\" agent; \
                      mount --bind agent agent; mount -o remount,bind,ro agent; exec \"$1/agent\" \"$1\"";
        let agent = Command::new("unshare")
            .args([
                "--pid",
                "--fork",
                "--mount",
                "--propagation",
                "private",
                "--kill-child",
                "--",
                "/bin/sh",
                "-c",
                script,
                "sh",
            ])
            .args([path, cgroup.as_path(), Path::new(env!("CARGO_BIN_EXE_caisson-agent-local"))])
            .stdin(StdStdio::null())
            .spawn()
            .unwrap();
        let ready = path.join("ready");
        let socket = format!("unix://{}", path.join("agent.sock").display());
        let appears = async {
            while !ready.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Client::connect(&socket).await.unwrap()
        };
        let client = AgentClient::new(within("the agent to be ready", appears).await);
        Self { directory, cgroup, agent, client, next_port: AtomicU32::new(5000) }
    }

    /// The root file system as the host sees it.
    pub fn rootfs(&self) -> PathBuf {
        self.directory.path().join("share/rootfs")
    }

    /// The agent's own lines.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Opens a stream as the shim does and returns its port.
    pub async fn stream(&self) -> (u32, UnixStream) {
        let port = self.next_port.fetch_add(1, Ordering::Relaxed);
        let mut stream = UnixStream::connect(self.directory.path().join("stdio.sock")).await.unwrap();
        stream.write_u32_le(port).await.unwrap();
        (port, stream)
    }

    /// Three streams, or two for a terminal.
    pub async fn stdio(&self, terminal: bool) -> (Stdio, Streams) {
        let (stdout_port, stdout) = self.stream().await;
        let (stdin_port, stdin) = self.stream().await;
        if terminal {
            let stdio = Stdio { stdin_port, stdout_port, terminal, ..Default::default() };
            return (stdio, Streams { stdin: Some(stdin), stdout: Some(stdout), ..Streams::default() });
        }
        let (stderr_port, stderr) = self.stream().await;
        let stdio = Stdio { stdin_port, stdout_port, stderr_port, ..Default::default() };
        (stdio, Streams { stdin: Some(stdin), stdout: Some(stdout), stderr: Some(stderr) })
    }

    pub async fn create(&self, id: &str, spec: &Value, stdio: Option<Stdio>) -> ttrpc::Result<u32> {
        self.create_request(CreateRequest { stdio: stdio.into(), ..request(id, spec) }).await
    }

    pub async fn create_request(&self, request: CreateRequest) -> ttrpc::Result<u32> {
        let what = format!("Create of {}", request.container_id);
        Ok(within(&what, self.client.create(context::with_timeout(0), &request)).await?.pid)
    }

    pub async fn start_process(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let what = format!("Start of {id} {exec}");
        Ok(within(&what, self.client.start(context::with_timeout(0), &process(id, exec))).await?.pid)
    }

    pub async fn exec(&self, id: &str, exec: &str, process: &Value, stdio: Option<Stdio>) -> ttrpc::Result<()> {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: process.to_string().into_bytes(),
            stdio: stdio.into(),
            ..Default::default()
        };
        within("Exec", self.client.exec(context::with_timeout(0), &request)).await.map(drop)
    }

    pub async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        let what = format!("the end of {id} {exec}");
        within(&what, self.client.wait(context::with_timeout(0), &process(id, exec))).await
    }

    pub async fn kill(&self, id: &str, exec: &str, signal: i32, all: bool) -> ttrpc::Result<()> {
        let signal = u32::try_from(signal).unwrap();
        let request = KillRequest { container_id: id.into(), exec_id: exec.into(), signal, all, ..Default::default() };
        within("Kill", self.client.kill(context::with_timeout(0), &request)).await.map(drop)
    }

    pub async fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> ttrpc::Result<()> {
        let request =
            ResizePtyRequest { container_id: id.into(), exec_id: exec.into(), width, height, ..Default::default() };
        within("ResizePty", self.client.resize_pty(context::with_timeout(0), &request)).await.map(drop)
    }

    pub async fn pids(&self, id: &str) -> ttrpc::Result<Vec<(u32, String)>> {
        let response = within("Pids", self.client.pids(context::with_timeout(0), &container(id))).await?;
        Ok(response.processes.into_iter().map(|process| (process.pid, process.exec_id)).collect())
    }

    pub async fn pause(&self, id: &str) -> ttrpc::Result<()> {
        within("Pause", self.client.pause(context::with_timeout(0), &container(id))).await.map(drop)
    }

    pub async fn resume(&self, id: &str) -> ttrpc::Result<()> {
        within("Resume", self.client.resume(context::with_timeout(0), &container(id))).await.map(drop)
    }

    pub async fn update(&self, id: &str, resources: &Value) -> ttrpc::Result<()> {
        let resources = resources.to_string().into_bytes();
        let request = UpdateRequest { container_id: id.into(), resources, ..Default::default() };
        within("Update", self.client.update(context::with_timeout(0), &request)).await.map(drop)
    }

    pub async fn stats(&self, id: &str) -> ttrpc::Result<StatsResponse> {
        within("Stats", self.client.stats(context::with_timeout(0), &container(id))).await
    }

    pub async fn wait_oom(&self, id: &str, seen: u64) -> ttrpc::Result<u64> {
        let request = WaitOomRequest { container_id: id.into(), seen, ..Default::default() };
        let what = format!("WaitOom of {id} after {seen}");
        Ok(within(&what, self.client.wait_oom(context::with_timeout(0), &request)).await?.kills)
    }

    /// What a file of a container's cgroup says; None if this kernel has no such file.
    pub fn cgroup_file(&self, id: &str, file: &str) -> Option<String> {
        fs::read_to_string(self.cgroup.join("caisson").join(id).join(file)).ok()
    }

    pub async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        within("Delete", self.client.delete(context::with_timeout(0), &process(id, exec))).await
    }

    /// Creates, starts, waits and deletes a container without input.
    pub async fn run(&self, spec: &Value) -> Output {
        self.run_request(request("c", spec)).await
    }

    /// The same with whatever a request can say.
    pub async fn run_request(&self, request: CreateRequest) -> Output {
        let (stdio, mut streams) = self.stdio(false).await;
        let id = request.container_id.clone();
        self.create_request(CreateRequest { stdio: Some(stdio).into(), ..request }).await.unwrap();
        drop(streams.stdin.take());
        self.start_process(&id, "").await.unwrap();
        let output = self.finish(&id, "", streams).await;
        self.delete(&id, "").await.unwrap();
        output
    }

    /// Runs a script on this machine, in the agent's mount namespace and in its directory.
    pub fn beside_agent(&self, script: &str) {
        let target = self.agent_pid().to_string();
        let script = format!("cd '{}'; {script}", self.directory.path().display());
        let status = Command::new("nsenter").args(["--target", &target, "--mount", "sh", "-ec", &script]).status();
        assert!(status.unwrap().success(), "{script}");
    }

    /// Runs one exec to its end.
    pub async fn run_exec(&self, id: &str, exec: &str, process: &Value) -> Output {
        let (stdio, mut streams) = self.stdio(false).await;
        self.exec(id, exec, process, Some(stdio)).await.unwrap();
        drop(streams.stdin.take());
        self.start_process(id, exec).await.unwrap();
        let output = self.finish(id, exec, streams).await;
        self.delete(id, exec).await.unwrap();
        output
    }

    async fn finish(&self, id: &str, exec: &str, streams: Streams) -> Output {
        let (stdout, stderr, ended) =
            tokio::join!(read_all(streams.stdout), read_all(streams.stderr), self.wait(id, exec));
        Output { status: ended.unwrap().exit_status, stdout, stderr }
    }

    /// Starts a container that runs until it is killed.
    pub async fn start_sleeper(&self, id: &str) {
        self.create(id, &shell("exec sleep 1000"), None).await.unwrap();
        self.start_process(id, "").await.unwrap();
    }

    /// Nothing of any container is left: no cgroup, no process but the agent, no descriptor but its own.
    pub fn assert_empty(&self) {
        let cgroups: Vec<_> = fs::read_dir(self.cgroup.join("caisson"))
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .map(|entry| entry.file_name())
            .collect();
        assert!(cgroups.is_empty(), "cgroups left: {cgroups:?}");
        assert_eq!(children(self.agent_pid()), Vec::<u32>::new(), "processes left");
    }

    /// The controllers that containers of this agent can have.
    pub fn cgroup_controllers(&self) -> Vec<String> {
        let list = fs::read_to_string(self.cgroup.join("caisson/cgroup.subtree_control")).unwrap();
        list.split_whitespace().map(str::to_owned).collect()
    }

    /// The agent's pid as this test sees it.
    pub fn agent_pid(&self) -> u32 {
        children(self.agent.id())[0]
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "--- the agent's log\n{}",
                fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
            );
        }
        // PID 1 of the namespace dies with it and takes everything along.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let deadline = std::time::Instant::now() + LIMIT;
        while remove_cgroup(&self.cgroup).is_err() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn remove_cgroup(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_cgroup(&entry.path())?;
    }
    fs::remove_dir(path)
}

fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup2 is mounted");
    line.split(' ').nth(1).unwrap().into()
}

fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn make_rootfs(root: &Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "home/user"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for tool in TOOLS.split_whitespace() {
        symlink("busybox", root.join("bin").join(tool)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}

/// A request for a container that others can add to.
pub fn request(id: &str, spec: &Value) -> CreateRequest {
    CreateRequest {
        container_id: id.into(),
        spec: spec.to_string().into_bytes(),
        rootfs: "rootfs".into(),
        ..Default::default()
    }
}

fn process(id: &str, exec: &str) -> ProcessRequest {
    ProcessRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() }
}

/// Everything that comes through a stream until its end.
pub async fn read_all(stream: Option<UnixStream>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        within("the end of an output stream", stream.read_to_end(&mut bytes)).await.unwrap();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What containerd's default specification says, with this program.
pub fn spec(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ]);
    json!({
        "ociVersion": "1.0.2-dev",
        "process": process_spec(args, &capabilities),
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": "/default",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

fn process_spec(args: &[&str], capabilities: &Value) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": true,
    })
}

/// The same with a shell script.
pub fn shell(script: &str) -> Value {
    spec(&["sh", "-c", script])
}

/// The `process` object of an exec.
pub fn exec_shell(script: &str) -> Value {
    shell(script)["process"].take()
}

/// A call's status.
pub fn status<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other:?}"),
    }
}
