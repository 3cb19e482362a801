//! A test's whole world: a directory, a containerd in it, an image, and the account of what must be gone at the end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use rustix::process::Signal;

use crate::{
    BUSYBOX, DEBIAN, PROBE, archive,
    containerd::{Containerd, Kvm},
    disk::Disk,
    environment::{self, Runtime},
    leftovers::{self, Leftovers},
    network,
    pod::Container,
    process::{self, Running},
    wait,
};

/// Which image a test wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Image {
    /// [`BUSYBOX`]
    #[default]
    Busybox,
    /// [`PROBE`]
    Probe,
    /// [`DEBIAN`]
    Debian,
}

/// What a test wants of its host.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    image: Image,
    disk_mib: Option<usize>,
    kvm: Kvm,
    snapshotter: Option<&'static str>,
    own_network: bool,
}

impl Setup {
    /// Another image than busybox.
    pub fn image(mut self, image: Image) -> Self {
        self.image = image;
        self
    }

    /// containerd's root on an ext4 file system of `mib` MiB instead of the directory's tmpfs: extended attributes,
    /// O_DIRECT, and an end of space that hurts nobody else.
    pub fn disk(mut self, mib: usize) -> Self {
        self.disk_mib = Some(mib);
        self
    }

    /// Something else in place of /dev/kvm.
    pub fn kvm(mut self, kvm: Kvm) -> Self {
        self.kvm = kvm;
        self
    }

    /// A network namespace of its own for containerd and all that the test starts from its own thread: whatever network
    /// plugins do to the host they do there.
    pub fn own_network(mut self) -> Self {
        self.own_network = true;
        self
    }

    /// Another snapshotter than overlayfs.
    pub fn snapshotter(mut self, name: &'static str) -> Self {
        self.snapshotter = Some(name);
        self
    }
}

/// See the module.
pub struct Host {
    /// The runtime that its containers get.
    pub runtime: Runtime,
    /// Its containerd.
    pub containerd: Containerd,
    tag: String,
    directory: PathBuf,
    image: Image,
    snapshotter: &'static str,
    names: Mutex<Vec<String>>,
    before: Mutex<Leftovers>,
    // After containerd in this list, because it is unmounted after containerd's end.
    _disk: Option<Disk>,
    cleanup: Cleanup,
}

// Under `cargo test` tests are threads of one process and would find each other's processes; nextest has a process for each.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs one test: the host, the function, and then the proof that nothing is left.
pub fn test(runtime: Runtime, setup: Setup, body: impl FnOnce(&Host)) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let host = Host::start(runtime, setup);
    body(&host);
    host.finish();
}

impl Host {
    /// Starts one.
    pub fn start(runtime: Runtime, setup: Setup) -> Self {
        // Whatever a shim or containerd leaves behind becomes this process's child and is seen.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("Linux has sub-reapers");
        if setup.own_network {
            network::enter_new();
        }
        let tag = format!("e2e{}", process::own_pid());
        let base = std::env::var_os("CAISSON_E2E_DIR").map_or_else(|| PathBuf::from("/run"), PathBuf::from);
        let directory = base.join(format!("caisson-{tag}"));
        fs::create_dir_all(directory.join("root")).unwrap_or_else(|error| {
            panic!("cannot make {}: {error}: the end-to-end tests need root and a tmpfs", directory.display())
        });
        let cleanup = Cleanup { tag: tag.clone(), directory: directory.clone() };
        let disk = setup.disk_mib.map(|mib| Disk::mount(&directory.join("disk.img"), mib, &directory.join("root")));
        fs::create_dir(directory.join("caisson")).expect("the directory is new");
        fs::write(directory.join("caisson.toml"), configuration(&directory).to_text()).expect("the directory is new");
        let containerd = Containerd::start(&directory, setup.kvm);
        let host = Self {
            runtime,
            containerd,
            tag,
            directory,
            image: setup.image,
            snapshotter: setup.snapshotter.unwrap_or("overlayfs"),
            names: Mutex::default(),
            before: Mutex::default(),
            _disk: disk,
            cleanup,
        };
        host.import();
        host.count_anew();
        host
    }

    fn import(&self) {
        let busybox = environment::oci_dir().join("busybox.tar");
        let file = match self.image {
            Image::Busybox => busybox,
            Image::Debian => environment::oci_dir().join("debian.tar"),
            Image::Probe => {
                let file = self.directory.join("probe.tar");
                let program = environment::bin_dir().join("caisson-e2e-probe");
                archive::with_program(&busybox, &program, "bin/probe", PROBE, &file);
                file
            }
        };
        let output = self.ctr(["image", "import", "--snapshotter", self.snapshotter]).arg(&file).output();
        let output = output.expect("ctr is installed");
        assert!(output.status.success(), "cannot import {}: {output:?}", file.display());
    }

    /// The image that containers of this host run.
    pub fn image_name(&self) -> &'static str {
        match self.image {
            Image::Busybox => BUSYBOX,
            Image::Probe => PROBE,
            Image::Debian => DEBIAN,
        }
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.tag
    }

    /// Everything of this host lies here.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Caisson's `state_dir`.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.join("caisson")
    }

    /// The snapshotter's name.
    pub fn snapshotter(&self) -> &'static str {
        self.snapshotter
    }

    /// The bundle directory of a container (by its full id).
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.directory.join("state/io.containerd.runtime.v2.task").join(&self.tag).join(id)
    }

    /// A container that is yet to be run. Its id is unique on the machine.
    pub fn container<'a>(&'a self, name: &str) -> Container<'a> {
        let id = format!("{}-{name}", self.tag);
        self.names.lock().expect("no holder panics").push(id.clone());
        Container::new(self, id)
    }

    /// `ctr` with this containerd and namespace, and then `arguments`.
    pub fn ctr<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.containerd.socket()).arg("--namespace").arg(&self.tag).args(arguments);
        command
    }

    /// Runs `ctr` to its end. Gives (exit code, stdout, stderr).
    pub fn ctr_output<const N: usize>(&self, arguments: [&str; N]) -> crate::Finished {
        let mut running = Running::start(&mut self.ctr(arguments));
        running.close_stdin();
        crate::Finished::of(running, wait::STEP)
    }

    /// Caisson's configuration as it was at the start; change it and give it to [`Host::configure`].
    pub fn configuration(&self) -> Configuration {
        configuration(&self.directory)
    }

    /// Replaces Caisson's configuration for the pods to come.
    pub fn configure(&self, text: &str) {
        fs::write(self.directory.join("caisson.toml"), text).expect("the test's directory takes files");
    }

    /// Processes of this host's pods: whatever descends from this test, except containerd and those that only await their parent.
    pub fn processes(&self) -> Vec<process::Process> {
        let keep = [self.containerd.pid()];
        process::descendants(process::own_pid())
            .into_iter()
            .filter(|process| !process.zombie && !keep.contains(&process.pid) && process.name != "ctr")
            .collect()
    }

    /// The processes of pods that run `program` (a file name).
    pub fn running(&self, program: &str) -> Vec<process::Process> {
        let is = |process: &process::Process| process.program().is_some_and(|path| path.ends_with(program));
        self.processes().into_iter().filter(is).collect()
    }

    /// Forgives runc's shim the socket file that it leaves when it is killed: a known weakness, and no measure.
    pub fn forgive_socket_of_runc(&self, id: &str) {
        if self.runtime == Runtime::Runc {
            let _ = fs::remove_file(leftovers::shim_socket(&self.containerd.socket(), &self.tag, id));
        }
    }

    /// What there is of pods now.
    pub fn leftovers(&self) -> Leftovers {
        let names = self.names.lock().expect("no holder panics").clone();
        leftovers::look(&leftovers::Scope {
            tag: &self.tag,
            directory: &self.directory,
            containerd: self.containerd.pid(),
            processes: &self.processes(),
            containers: &names,
            socket: &self.containerd.socket(),
        })
    }

    /// Takes what is here now as what may stay.
    pub fn count_anew(&self) {
        *self.before.lock().expect("no holder panics") = self.leftovers();
    }

    /// Replaces containerd by another on the same directories. The descriptors of the new one count from here.
    pub fn restart_containerd(&self) {
        self.containerd.restart();
        self.count_descriptors_anew();
    }

    /// Kills containerd and starts another on the same directories. The descriptors of the new one count from here.
    pub fn crash_containerd(&self) {
        self.containerd.crash();
        self.count_descriptors_anew();
    }

    fn count_descriptors_anew(&self) {
        let now = self.leftovers();
        self.before.lock().expect("no holder panics").adopt_descriptors(&now);
    }

    /// Waits until nothing of any pod is left.
    ///
    /// # Panics
    /// With what is left after the limit.
    pub fn expect_nothing_left(&self) {
        let begin = std::time::Instant::now();
        loop {
            let extra = self.leftovers().beyond(&self.before.lock().expect("no holder panics"));
            if extra.is_empty() {
                return;
            }
            assert!(begin.elapsed() < wait::STEP, "left behind after {:?}:\n  {}", wait::STEP, extra.join("\n  "));
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// The end of a test that has passed: nothing is left, and nothing outlives containerd.
    pub fn finish(self) {
        self.expect_nothing_left();
        self.containerd.stop();
        wait::until("the end of every process of the test", wait::STEP, || self.processes().is_empty().then_some(()));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- containerd's log, its last lines\n{}\n---", self.containerd.log_tail());
            for process in self.processes() {
                eprintln!("still there: {process}");
            }
        }
        self.containerd.stop();
        self.cleanup.processes();
    }
}

/// Takes away what a failed test has left, so that the next one starts clean.
struct Cleanup {
    tag: String,
    directory: PathBuf,
}

impl Cleanup {
    fn processes(&self) {
        for _ in 0..100 {
            let left: Vec<_> =
                process::descendants(process::own_pid()).into_iter().filter(|process| !process.zombie).collect();
            if left.is_empty() {
                return;
            }
            left.iter().for_each(|process| process::signal(process.pid, Signal::KILL));
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        for mount in leftovers::mounts("self", &self.directory).into_iter().rev() {
            let _ = rustix::mount::unmount(mount.as_path(), rustix::mount::UnmountFlags::DETACH);
        }
        for cgroup in leftovers::cgroups(&self.tag).into_iter().rev() {
            let _ = fs::remove_dir(cgroup);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Caisson's config.toml as key and value, in order.
#[derive(Clone, Debug)]
pub struct Configuration(Vec<(String, String)>);

impl Configuration {
    /// Sets `key` to `value`, which is written as it is (strings come with their quotes).
    pub fn set(mut self, key: &str, value: impl Into<String>) -> Self {
        self.0.retain(|(name, _)| name != key);
        self.0.push((key.to_owned(), value.into()));
        self
    }

    /// The file's text, a line for each key.
    pub fn to_text(&self) -> String {
        self.0.iter().map(|(key, value)| format!("{key} = {value}\n")).collect()
    }
}

fn configuration(directory: &Path) -> Configuration {
    let quoted = |path: PathBuf| format!("{path:?}");
    let (bin, image) = (environment::bin_dir(), environment::image_dir());
    Configuration(Vec::new())
        .set("kernel", quoted(image.join("vmlinux")))
        .set("initramfs", quoted(image.join("initramfs")))
        .set("vcpus", "1")
        .set("memory_mib", "128")
        .set("state_dir", quoted(directory.join("caisson")))
        .set("log_level", "\"info\"")
        .set("monitor", quoted(bin.join("caisson-vmm")))
        // A boot of a second takes half a minute where the processors are emulated and shared.
        .set("boot_timeout_s", "150")
        .set("file_server", quoted(bin.join("caisson-fsd")))
}
