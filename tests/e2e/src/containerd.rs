//! A containerd of a test's own: it shares no directory, socket or namespace with another, least of all the machine's.

use std::{
    fs::{self, File},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{environment, wait};

/// What a test finds in place of /dev/kvm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kvm {
    /// The machine's own.
    #[default]
    Real,
    /// No such file.
    Absent,
    /// A device that is not KVM.
    Foreign,
}

/// One running containerd.
pub struct Containerd {
    child: Mutex<Child>,
    directory: PathBuf,
    kvm: Kvm,
    log: PathBuf,
}

/// Plug-ins that no test needs; without them containerd is up in half the time.
const NOT_NEEDED: [&str; 8] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.internal.v1.restart",
];

impl Containerd {
    /// Starts one below `directory` (its root is `directory/root`, its state `directory/state`) and waits until it says that it serves.
    pub fn start(directory: &Path, kvm: Kvm) -> Self {
        let path = |name: &str| directory.join(name);
        let configuration = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = {NOT_NEEDED:?}\n[grpc]\naddress = {:?}\n",
            path("root"),
            path("state"),
            path("c.sock"),
        );
        fs::write(path("containerd.toml"), configuration).expect("the test's directory takes files");
        let log = path("containerd.log");
        let child = Mutex::new(spawn(directory, kvm, &log));
        Self { child, directory: directory.to_owned(), kvm, log }
    }

    /// Ends it and starts another on the same directories, as an upgrade does.
    pub fn restart(&self) {
        self.stop();
        self.start_again();
    }

    /// Kills it and starts another on the same directories, as after a crash.
    pub fn crash(&self) {
        kill(&mut lock(&self.child));
        self.start_again();
    }

    fn start_again(&self) {
        *lock(&self.child) = spawn(&self.directory, self.kvm, &self.log);
    }

    /// Where a test can put programs that it finds before all others.
    pub fn programs(&self) -> PathBuf {
        programs(&self.directory)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        lock(&self.child).id() as i32
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("c.sock")
    }

    /// Everything that it and its shims have logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The last lines of [`Self::log`], without those of its start.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// Ends it in order, or by force if it does not end.
    pub fn stop(&self) {
        crate::process::signal(self.pid(), rustix::process::Signal::TERM);
        for _ in 0..500 {
            if !matches!(lock(&self.child).try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        kill(&mut lock(&self.child));
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        kill(&mut lock(&self.child));
    }
}

fn programs(directory: &Path) -> PathBuf {
    directory.join("bin")
}

fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kill(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn tail(log: &Path) -> String {
    let log = fs::read(log).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().filter(|line| !line.contains("msg=\"loading plugin")).collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Starts the program and waits until it says that it serves.
fn spawn(directory: &Path, kvm: Kvm, log: &Path) -> Child {
    let path = |name: &str| directory.join(name);
    let log_file = File::options().create(true).append(true).open(log).expect("the test's directory takes files");
    let search = std::env::var("PATH").unwrap_or_default();
    let (first, ours) = (programs(directory), environment::bin_dir());
    let search = format!("{}:{}:{search}:/usr/sbin:/usr/bin:/sbin:/bin", first.display(), ours.display());
    let _ = fs::remove_file(path("ready.sock"));
    let ready = UnixDatagram::bind(path("ready.sock")).expect("the test's directory takes sockets");
    ready.set_read_timeout(Some(wait::STEP)).expect("a limit of seconds is valid");
    let mut child = command(kvm)
        .arg("--config")
        .arg(path("containerd.toml"))
        .env("PATH", search)
        .env("CAISSON_CONFIG", path("caisson.toml"))
        .env("NOTIFY_SOCKET", path("ready.sock"))
        .stdin(Stdio::null())
        .stdout(log_file.try_clone().expect("a descriptor can be duplicated"))
        .stderr(log_file)
        .spawn()
        .expect("containerd is installed");
    let mut word = [0; 256];
    loop {
        match ready.recv(&mut word) {
            Ok(count) if word[..count].starts_with(b"READY=1") => return child,
            Ok(_) => {}
            Err(error) => {
                kill(&mut child);
                panic!("containerd did not say READY=1: {error}\n{}", tail(log));
            }
        }
    }
}

/// containerd, if need be in a mount namespace where /dev/kvm is not what it was.
fn command(kvm: Kvm) -> Command {
    let cover = match kvm {
        Kvm::Real => return Command::new("containerd"),
        Kvm::Absent => "",
        Kvm::Foreign => "touch $new/kvm; mount --bind /dev/null $new/kvm;",
    };
    // A /dev of our own: devtmpfs is one for the whole machine, so nothing may be removed there.
    let script = format!(
        "set -e; new=$(mktemp -d); mount -t tmpfs -o dev dev $new
         for name in null zero full random urandom tty ptmx loop-control; do
             [ -e /dev/$name ] || continue; touch $new/$name; mount --bind /dev/$name $new/$name
         done
         mkdir $new/pts $new/shm; mount --bind /dev/pts $new/pts; {cover}
         mount --move $new /dev; rmdir $new; exec containerd \"$@\""
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script, "containerd"]);
    command
}
