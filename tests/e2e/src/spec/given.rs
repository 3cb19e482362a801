//! A specification, and a container that is made by it.

use std::{
    fs::{self, File},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use caisson_e2e_probe::Report;
use containerd_shim_protos::api;
use serde_json::{Value, json};

use super::questions;
use crate::{
    Host,
    bundle::{self, Bundle},
    environment,
    process::Capture,
    shim::Shim,
    wait::STEP,
};

/// Capabilities that containers usually have.
pub const USUAL_CAPABILITIES: [&str; 14] = [
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
];

/// A container that is yet to be made.
pub struct Given<'a> {
    host: &'a Host,
    name: String,
    /// Its root directory on the host.
    pub root: PathBuf,
    /// Its specification, for a test to change.
    pub spec: Value,
    asked: Vec<String>,
}

/// What a container left.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit status, as the shim reported it.
    pub status: u32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl<'a> Given<'a> {
    /// The usual specification, and a root directory with nothing but the probe and a few empty directories.
    pub fn new(host: &'a Host, name: &str) -> Self {
        let root = host.directory().join("roots").join(name);
        for directory in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
            fs::create_dir_all(root.join(directory)).expect("the test's directory takes files");
        }
        let sticky = fs::Permissions::from_mode(0o1777);
        fs::set_permissions(root.join("tmp"), sticky).expect("the test's directory takes modes");
        fs::copy(environment::bin_dir().join("caisson-e2e-probe"), root.join("bin/probe")).expect("the probe is built");
        Self { host, name: name.to_owned(), root, spec: usual(), asked: Vec::new() }
    }

    /// Sets the value at a JSON pointer; objects on the way are made.
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let mut place = &mut self.spec;
        for key in pointer.split('/').skip(1) {
            place = match key.parse::<usize>() {
                Ok(index) if place.is_array() => &mut place[index],
                _ => &mut place[key],
            };
        }
        *place = value;
        self
    }

    /// Adds to the list at a JSON pointer.
    pub fn push(mut self, pointer: &str, value: Value) -> Self {
        let list = self.spec.pointer_mut(pointer).and_then(Value::as_array_mut);
        list.unwrap_or_else(|| panic!("the specification has no list {pointer}")).push(value);
        self
    }

    /// Adds a mount.
    pub fn mount(self, destination: &str, kind: &str, source: &str, options: &[&str]) -> Self {
        let mount = json!({ "destination": destination, "type": kind, "source": source, "options": options });
        self.push("/mounts", mount)
    }

    /// Asks the probe for more than what the specification suggests.
    pub fn ask(mut self, words: &[&str]) -> Self {
        self.asked.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Runs the probe in it; it must end well. Gives its report and the specification that it ran under.
    #[track_caller]
    pub fn report(mut self) -> (Value, Report) {
        let mut arguments = vec!["/bin/probe".to_owned(), "report".to_owned()];
        arguments.extend(questions(&self.spec));
        arguments.append(&mut self.asked);
        self.spec["process"]["args"] = json!(arguments);
        let (name, spec) = (self.name.clone(), self.spec.clone());
        let ended = self.run().unwrap_or_else(|status| panic!("{name}: refused: {status:?}"));
        assert_eq!(ended.status, 0, "{name}: {ended:?}");
        let report = serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{name}: {error}: {ended:?}"));
        (spec, report)
    }

    /// Runs what the specification says to its end.
    ///
    /// # Errors
    /// What Create or Start answered instead.
    pub fn run(self) -> Result<Ended, String> {
        let bundle = Bundle::new(self.host, &self.name, &self.config());
        let shim = match bundle.start() {
            Ok(shim) => shim,
            Err(finished) => {
                bundle.discard(None);
                return Err(finished.err());
            }
        };
        let ended = self.through(&bundle, &shim);
        bundle.discard(Some(shim));
        ended
    }

    fn config(&self) -> String {
        let mut spec = self.spec.clone();
        let path = format!("/{}/{}-{}", self.host.namespace(), self.host.namespace(), self.name);
        if spec["linux"]["cgroupsPath"].is_null() {
            spec["linux"]["cgroupsPath"] = json!(path);
        }
        spec.to_string()
    }

    fn through(&self, bundle: &Bundle, shim: &Shim) -> Result<Ended, String> {
        let (stdout, stderr) = (Stream::new(&bundle.directory, "stdout"), Stream::new(&bundle.directory, "stderr"));
        let mut create = bundle.create_request(vec![bundle::bind(&self.root)]);
        create.stdout = stdout.path.to_string_lossy().into_owned();
        create.stderr = stderr.path.to_string_lossy().into_owned();
        let message = |status: ttrpc::Status| status.message().to_owned();
        shim.call::<api::CreateTaskResponse>("Create", &create).map_err(message)?;
        let id = || bundle.id.clone();
        let start = api::StartRequest { id: id(), ..Default::default() };
        let delete = api::DeleteRequest { id: id(), ..Default::default() };
        if let Err(status) = shim.call::<api::StartResponse>("Start", &start) {
            shim.tell("Delete", &delete);
            return Err(status.message().to_owned());
        }
        let (stdout, stderr) = (stdout.only_the_shim_writes(), stderr.only_the_shim_writes());
        let wait = api::WaitRequest { id: id(), ..Default::default() };
        let waited: api::WaitResponse = shim.call("Wait", &wait).map_err(message)?;
        let text = |capture: Capture, what| String::from_utf8_lossy(&capture.wait_for_end(what, STEP)).into_owned();
        let (out, err) = (text(stdout, "standard output"), text(stderr, "standard error"));
        shim.call::<api::DeleteResponse>("Delete", &delete).map_err(message)?;
        Ok(Ended { status: waited.exit_status, out, err })
    }
}

/// A FIFO that the shim is to write to.
struct Stream {
    path: PathBuf,
    reader: File,
    // Without a writer the reader would see an end before the shim has begun.
    writer: File,
}

impl Stream {
    fn new(directory: &Path, name: &str) -> Self {
        let path = directory.join(name);
        bundle::fifo(&path);
        let writer = File::options().read(true).write(true).open(&path).expect("the FIFO opens");
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let reader = File::options().read(true).custom_flags(nonblocking).open(&path).expect("the FIFO opens");
        rustix::io::ioctl_fionbio(&reader, false).expect("a FIFO can be made to wait");
        Self { path, reader, writer }
    }

    fn only_the_shim_writes(self) -> Capture {
        drop(self.writer);
        Capture::of(self.reader)
    }
}

/// A specification as containerd writes them by default.
pub fn usual() -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| -> Value {
        json!({ "destination": destination, "type": kind, "source": kind, "options": options })
    };
    let kinds = ["pid", "ipc", "uts", "mount", "network", "cgroup"];
    let namespaces: Vec<Value> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/probe", "report"],
            "env": ["PATH=/bin", "HOME=/"],
            "cwd": "/",
            "capabilities": {
                "bounding": USUAL_CAPABILITIES,
                "effective": USUAL_CAPABILITIES,
                "permitted": USUAL_CAPABILITIES,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs" },
        "hostname": "given",
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            mount("/run", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": namespaces,
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
