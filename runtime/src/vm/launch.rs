//! Starts a pod's machine: opens every file, makes every socket, spawns caisson-vmm and caisson-fsd and sends the whole
//! machine to the monitor, all before the shim serves its first request. This is on the critical path of every
//! container's start, so it runs once from top to bottom without waiting for anything.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use caisson_protos::{
    agent::NetworkInterface,
    guest::{GUEST_CID, HOST_SHARE_TAG, SHARE_TAG},
    monitor::{MAX_MTU, MAX_NETWORKS},
};
use caisson_vmm_client::{
    CallError, Child, Console, Machine, Memory, Network, SpawnError, Vsock, control, packet,
    process::{spawn_file_server, spawn_monitor},
};
use nix::{
    fcntl::OFlag,
    sys::memfd::{MFdFlags, memfd_create},
    unistd::{ftruncate, pipe2},
};

use crate::{
    cgroup::{self, CgroupError, limits::Overhead},
    host::{
        config::Config,
        kvm::{KvmError, check_kvm},
        paths::PodPaths,
        processes::{self, Member},
    },
    network::{self, Card, InvalidBandwidth, Namespace, NetworkError, Policy, Record, Settings, TaskThread},
    pod::network::{CardSlots, Joined, PodNetwork},
    resources::size::{HostSize, MachineSize},
    rootfs::share::{Share, ShareError},
    spec::BundleSpec,
    vm::{
        allotment::Allotment,
        dial::Dialer,
        images::{ImageError, open_initramfs, open_kernel},
        supervisor::Launched,
        timeline::now_ns,
    },
};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The host's KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel or the initramfs cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The shared directory.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The pod's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The pod's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// An annotation.
    #[error(transparent)]
    Bandwidth(#[from] InvalidBandwidth),
    /// A program of ours.
    #[error("{0}: install it (make install) or name it in {config}", config = crate::host::config::DEFAULT_PATH)]
    Spawn(#[from] SpawnError),
    /// The monitor's control socket.
    #[error("the machine cannot start: {0}")]
    Control(#[from] CallError),
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The error.
        source: io::Error,
    },
}

/// The kernel's command line; guest-image/README.md says what each word is for. The monitor adds the devices and, if
/// there is one, the console.
fn command_line(vcpus: u8, console: bool) -> String {
    let console = if console { "loglevel=7 8250.nr_uarts=1" } else { "quiet loglevel=1 8250.nr_uarts=0" };
    let smp = if vcpus == 1 { " noreplace-smp" } else { "" };
    format!(
        "reboot=k panic=-1 {console} rcupdate.rcu_expedited=1 percpu_alloc=page retain_initrd swiotlb=noforce tsc=reliable dummy.numdummies=0 \
         ifb.numifbs=0{smp}"
    )
}

impl LaunchError {
    /// Whether the specification asks for what this host cannot give, or for what a machine cannot have.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Cgroup(error) => error.is_refusal(),
            Self::Network(error) => error.is_refusal(),
            Self::Bandwidth(_) => true,
            _ => false,
        }
    }
}

fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> LaunchError {
    |source| LaunchError::System { what: what.into(), source: source.into() }
}

/// The pod to launch.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// Its id.
    pub id: &'a str,
    /// Its bundle, an absolute path.
    pub bundle: &'a Path,
    /// What its shim listens on.
    pub socket: &'a Path,
    /// The specification of its first container.
    pub spec: &'a BundleSpec,
    /// Its network namespace, if it is there already.
    pub network: Option<&'a Namespace>,
}

/// What was launched.
pub struct Launch {
    /// The processes.
    pub machine: Launched,
    /// What they share with the shim.
    pub share: Share,
    /// What they may use.
    pub allotment: Allotment,
    /// Whether the guest can have bind mounts.
    pub has_host_share: bool,
    /// Its network, of which the guest does not know yet.
    pub network: PodNetwork,
    /// The pid of its first container.
    pub task: TaskThread,
}

/// Makes the pod's directories and its cgroup, mounts its share and launches its machine. `log` becomes the children's
/// standard error.
///
/// # Errors
/// [`LaunchError`] names what failed. Processes that were already started are gone then; directories are not.
pub fn launch(config: &Config, paths: &PodPaths, pod: Pod<'_>, log: BorrowedFd<'_>) -> Result<Launch, LaunchError> {
    check_kvm()?;
    let kernel = open_kernel(&config.kernel)?;
    let initramfs = open_initramfs(&config.initramfs)?;
    let created = paths.create(pod.bundle, pod.socket);
    created.map_err(system(format!("make the pod's directory {}", paths.pod().display())))?;
    let allotment = allot(config, paths, pod)?;
    let MachineSize { vcpus, memory: size } = allotment.size();
    let policy = Policy::new(&config.network, &pod.spec.annotations)?;
    let given = pod.network.map(|namespace| join(namespace, paths, pod.spec, vcpus, policy.clone())).transpose()?;
    let (networks, given) = given.unzip();
    let networks: Vec<Network> = networks.unwrap_or_default();
    let occupied = u8::try_from(networks.len()).unwrap_or(MAX_NETWORKS);
    let empty_network_slots = MAX_NETWORKS.saturating_sub(occupied).min(EMPTY_SLOTS);
    let cgroup = allotment.cgroup().open()?;
    let dialer = Dialer::new(paths.pod()).map_err(system("open the pod's directory"))?;
    let listener = dialer.listen().map_err(system(format!("bind {}", paths.vsock().display())))?;
    let (guest_streams, monitors_streams) = packet::pair().map_err(system("make a socket pair"))?;
    let (monitors_share, servers_share) = packet::pair().map_err(system("make a socket pair"))?;
    let host_share =
        pod.spec.wants_host_share().then(packet::pair).transpose().map_err(system("make a socket pair"))?;
    let has_host_share = host_share.is_some();
    let (monitors_host_share, servers_host_share) = host_share.unzip();
    let (console, output) = console(config.debug_console)?;
    let share = Share::mount(paths)?;

    let image = format!("kernel {} and initramfs {}", config.kernel.display(), config.initramfs.display());
    let spawned_ns = now_ns();
    let (vmm, control) = spawn_monitor(&config.monitor(), log, Some(cgroup.as_fd()))?;
    let machine = Machine {
        vcpus,
        memory: Memory { size, file: Some(memory(size)?), private: false },
        kernel: kernel.into(),
        initramfs: Some(initramfs.into()),
        command_line: command_line(vcpus, config.debug_console),
        console: output.map(|output| Console { output, early: true }),
        vsock: Some(Vsock { guest_cid: GUEST_CID, listener, guest_streams: monitors_streams }),
        disks: Vec::new(),
        shares: [(SHARE_TAG, Some(monitors_share)), (HOST_SHARE_TAG, monitors_host_share)]
            .into_iter()
            .filter_map(|(tag, server)| Some(caisson_vmm_client::Share { tag: tag.into(), server: server? }))
            .collect(),
        networks,
        empty_network_slots,
    };
    let macs = machine.networks.iter().map(|network| network.mac);
    let slots: CardSlots = macs.zip(machine.network_slots()).collect();
    control::configure_and_start(&control, machine)?;

    let root = share.open_view()?;
    let max_files = max_files(config.pod_overhead_memory_mib).to_string();
    let mut arguments = vec!["--socket-fd", "3", "--root-fd", "4", "--max-files", &max_files];
    let mut descriptors = vec![(servers_share.as_fd(), 3), (root.as_fd(), 4)];
    if let Some(socket) = &servers_host_share {
        arguments.extend(["--host-socket-fd", "5"]);
        descriptors.push((socket.as_fd(), 5));
    }
    let fsd = spawn_file_server(&config.file_server(), &arguments, &descriptors, log, Some(cgroup.as_fd()))?;
    let joined = match given {
        Some(joined) => joined,
        // The guest boots while it is made.
        None => new_network(vcpus, policy)?,
    };
    let network = PodNetwork::new(joined, slots);
    let task = network.namespace().task_thread().map_err(system("start a thread in the network namespace"))?;
    record(paths, &vmm, &fsd, &task)?;
    for child in [&vmm, &fsd] {
        // It may be refused to a shim of few rights; then the pod goes a little before its time.
        let _ = processes::set_oom_score(child.pid(), pod.spec.oom_score_adj);
    }
    let machine = Launched { spawned_ns, image, vmm, fsd, control, guest_streams, console, dialer };
    Ok(Launch { machine, share, allotment, has_host_share, network, task })
}

/// How many may come to a machine that runs, unless it has many already. Each costs the guest's kernel a little at boot.
const EMPTY_SLOTS: u8 = 4;

/// What a machine can have of the network.
fn settings(vcpus: u8) -> Settings {
    /// What the other parts of a machine leave of the descriptors that fit into one message (ibidem), which all of the machine's come with.
    const DESCRIPTORS: u16 = 52;
    Settings { queues: vcpus.into(), cards: MAX_NETWORKS.into(), descriptors: DESCRIPTORS }
}

/// Joins the interfaces of a network namespace that others have made.
fn join(
    namespace: &Namespace,
    paths: &PodPaths,
    spec: &BundleSpec,
    vcpus: u8,
    policy: Policy,
) -> Result<(Vec<Network>, Joined), LaunchError> {
    let file = paths.network();
    let identity = namespace.identity().map_err(system("look at the network namespace"))?;
    let record = Record { identity, path: spec.namespaces.network.clone().unwrap_or_default() };
    // First, so that nothing stays if this process is killed.
    record.write(&file).map_err(system(format!("write {}", file.display())))?;
    let (cards, message, watch) = network::join(namespace.clone(), settings(vcpus))?;
    let interface = |mac: [u8; 6]| message.interfaces.iter().find(move |interface| interface.mac == mac);
    let networks = cards.into_iter().map(|card| (interface(card.mac), card));
    let networks = networks.map(|(interface, card)| device(card, &policy, interface)).collect();
    Ok((networks, Joined { namespace: namespace.clone(), message, watch, policy }))
}

/// A network namespace of the pod's own. Nothing is in it yet.
fn new_network(vcpus: u8, policy: Policy) -> Result<Joined, LaunchError> {
    let namespace = Namespace::new().map_err(system("make a network namespace"))?;
    let (_, message, watch) = network::join(namespace.clone(), settings(vcpus))?;
    Ok(Joined { namespace, message, watch, policy })
}

/// The machine's part of a card; `interface` is the guest's, with its addresses.
pub fn device(card: Card, policy: &Policy, interface: Option<&NetworkInterface>) -> Network {
    Network {
        taps: card.queues,
        mac: card.mac,
        // The interface's own may grow later.
        mtu: MAX_MTU,
        send_limit: policy.send,
        receive_limit: policy.receive,
        sources: policy.sources(interface),
    }
}

/// The machine's size and the pod's cgroup, as the specification asks.
fn allot(config: &Config, paths: &PodPaths, pod: Pod<'_>) -> Result<Allotment, LaunchError> {
    let mount = Path::new(cgroup::MOUNT);
    cgroup::check_mount(mount)?;
    let wanted = pod.spec.cgroups_path.as_deref();
    let directory =
        cgroup::path::directory(wanted, pod.namespace, pod.id, &cgroup::own()).map_err(CgroupError::from)?;
    let size = MachineSize::of(&pod.spec.asked, config, HostSize::read());
    let file = paths.cgroup();
    cgroup::record(&file, mount, &directory).map_err(system(format!("write {}", file.display())))?;
    Ok(Allotment::new(size, Overhead::of(config), mount, &directory, &pod.spec.asked)?)
}

/// A file for guest memory; sparse, so it costs only what the guest touches.
fn memory(size: u64) -> Result<OwnedFd, LaunchError> {
    let what = || format!("reserve {} MiB of guest memory", size >> 20);
    let file = memfd_create(c"caisson-guest", MFdFlags::MFD_CLOEXEC).map_err(system(what()))?;
    let length = i64::try_from(size).map_err(|_| system(what())(io::Error::from_raw_os_error(libc::EFBIG)))?;
    ftruncate(&file, length).map_err(system(what()))?;
    Ok(file)
}

/// Both ends of the console's pipe, the reading one first.
fn console(wanted: bool) -> Result<(Option<OwnedFd>, Option<OwnedFd>), LaunchError> {
    if !wanted {
        return Ok((None, None));
    }
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(system("make a pipe"))?;
    Ok((Some(read), Some(write)))
}

/// How many files a guest may have caisson-fsd know and keep open, where both programs may take `overhead_mib` of memory. A
/// file costs the host's kernel up to 2.5 KiB (docs/decisions/0014): half of the memory is for that.
fn max_files(overhead_mib: u32) -> u64 {
    const FILE: u64 = 2560;
    /// What a guest needs to boot and run one container.
    const LEAST: u64 = 2048;
    ((u64::from(overhead_mib) << 20) / 2 / FILE).max(LEAST)
}

fn record(paths: &PodPaths, vmm: &Child, fsd: &Child, task: &TaskThread) -> Result<(), LaunchError> {
    let path: PathBuf = paths.processes();
    let pids = [("shim", std::process::id()), ("vmm", vmm.pid()), ("fsd", fsd.pid()), (processes::TASK, task.pid())];
    // A process that has already ended needs no record.
    let members: Vec<Member> = pids.iter().filter_map(|(role, pid)| Member::of(role, *pid).ok()).collect();
    processes::record(&path, &members).map_err(system(format!("write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_may_have_open_fits_the_overhead_that_pays_for_it() {
        assert_eq!(max_files(128), 26_214);
        assert_eq!(max_files(0), 2048);
        assert!(max_files(u32::MAX) < 1 << 40);
    }
}
