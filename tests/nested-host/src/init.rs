//! PID 1 of the nested host: loads modules, makes the root and the mounts, and has the command run (see
//! [`crate::command`]).

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, mount_move, move_mount, open_tree};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::frames::{self, Sender};
use crate::job::{self, Job};
use crate::machine::Emulator;
use crate::modules::module_name;
use crate::report::Report;
use crate::{command, host, initrd};

/// Does everything and powers the machine off; what goes wrong is reported.
pub fn run() -> ! {
    let mut report = None;
    let result = boot(&mut report);
    if let Err(error) = result {
        let line = Report::Fail(format!("{error:#}")).to_string();
        eprint!("nested-host init: {line}");
        if let Some(port) = &mut report {
            let _ = port.write_all(line.as_bytes());
        }
    }
    if let Some(port) = &mut report {
        let _ = port.flush();
    }
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    // No power off: a panic (PID 1 ended) ends the emulator as well.
    std::process::exit(1)
}

fn boot(report: &mut Option<Box<dyn Write>>) -> anyhow::Result<()> {
    filesystem("proc", "/proc", "proc", "")?;
    filesystem("sysfs", "/sys", "sysfs", "")?;
    filesystem("devtmpfs", "/dev", "devtmpfs", "")?;
    let job: Job = serde_json::from_slice(&fs::read(job::PATH)?).context(job::PATH)?;
    load_modules(&job).context("kernel modules")?;
    let [port, stdout, stderr] = channels(job.emulator)?;
    let port = report.insert(port);
    let mut say = |report: Report| port.write_all(report.to_string().as_bytes());

    say(Report::Step("root".into()))?;
    root(&job).context("the root file system")?;
    say(Report::Step("mounts".into()))?;
    mounts(&job)?;
    loopback_up().context("the loopback device")?;

    say(Report::Step(host::COMMAND_STEP.into()))?;
    // Command looks its program up in our own PATH, and ours is empty.
    if let Some((_, path)) = job.env.iter().find(|(name, _)| name == "PATH") {
        // SAFETY: this process has one thread.
        unsafe { std::env::set_var("PATH", path) };
    }
    let status = command::run(&job, stdout, stderr)?;
    rustix::fs::sync();
    say(Report::Exit(status))?;
    Ok(())
}

fn filesystem(kind: &str, target: &str, source: &str, options: &str) -> anyhow::Result<()> {
    let options = CString::new(options)?;
    mount(source, target, kind, MountFlags::empty(), &*options).with_context(|| format!("mounting {kind} on {target}"))
}

fn load_modules(job: &Job) -> anyhow::Result<()> {
    let parameters = CString::new(job.kvm.join(" "))?;
    let mut files: Vec<_> = fs::read_dir(initrd::MODULES)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    for path in files {
        // The kernel unpacks what is packed (.ko.xz, .ko.zst) itself.
        const MODULE_INIT_COMPRESSED_FILE: i32 = 4;
        let packed = path.extension().is_some_and(|extension| extension != "ko");
        let flags = if packed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // The name begins with its place in the order, "012-".
        let kvm = module_name(name.split_once('-').map_or(&name, |(_, name)| name)) == job.emulator.kvm_module();
        let parameters = if kvm { &*parameters } else { c"" };
        rustix::system::finit_module(File::open(&path)?, parameters, flags)
            .with_context(|| format!("{}", path.display()))?;
        fs::remove_file(&path)?;
    }
    Ok(())
}

/// Reports, standard output and standard error.
fn channels(emulator: Emulator) -> anyhow::Result<[Box<dyn Write>; 3]> {
    Ok(match emulator {
        Emulator::Qemu => [Box::new(port("report")?), Box::new(port("stdout")?), Box::new(port("stderr")?)],
        Emulator::Bochs => frames::senders(serial_line()?).map(|sender: Sender| Box::new(sender) as _),
    })
}

/// The second serial port, without the terminal that Linux makes of it. The first is the console.
fn serial_line() -> anyhow::Result<File> {
    let path = "/dev/ttyS1";
    let line = OpenOptions::new().read(true).write(true).open(path).context(path)?;
    let mut attributes = tcgetattr(&line).context(path)?;
    attributes.make_raw();
    attributes.set_speed(115_200).context(path)?;
    tcsetattr(&line, OptionalActions::Now, &attributes).context(path)?;
    Ok(line)
}

/// Opens the virtio-serial port of this name as soon as the driver has made its node.
fn port(name: &str) -> anyhow::Result<File> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let path = entry.path().join("name");
            let node = Path::new("/dev").join(entry.file_name());
            if fs::read_to_string(path).is_ok_and(|found| found.trim_end() == name) && node.exists() {
                return OpenOptions::new().write(true).open(&node).with_context(|| format!("{}", node.display()));
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    bail!("no virtio-serial port '{name}' within 30 s")
}

/// Makes /new and turns it into the root.
fn root(job: &Job) -> anyhow::Result<()> {
    if job.in_ram {
        filesystem("tmpfs", "/new", "root", "size=75%,mode=755")?;
        move_tree(Path::new(initrd::PAYLOAD), Path::new("/new"))?;
    } else {
        mount("root", "/ro", "virtiofs", MountFlags::RDONLY, None).context("mounting this machine's files")?;
        filesystem("tmpfs", "/rw", "upper", "size=80%,mode=755")?;
        fs::create_dir("/rw/upper")?;
        fs::create_dir("/rw/work")?;
        filesystem("overlay", "/new", "root", "lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work")?;
    }
    for folder in ["proc", "sys", "dev"] {
        let target = format!("/new/{folder}");
        fs::create_dir_all(&target)?;
        mount_move(format!("/{folder}"), &target).with_context(|| format!("moving /{folder}"))?;
    }
    // A real root rather than a chroot: container runtimes inside use pivot_root.
    std::env::set_current_dir("/new")?;
    mount_move(".", "/").context("moving the new root")?;
    rustix::process::chroot(".").context("entering the new root")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// Copies a tree of folders, files and links, and frees each file as it goes: both trees lie in memory.
fn move_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let meta = entry.metadata()?;
        if meta.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
        } else if meta.is_dir() {
            fs::create_dir(&target)?;
            move_tree(&source, &target)?;
            fs::set_permissions(&target, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
        } else {
            fs::copy(&source, &target).with_context(|| format!("{}", source.display()))?;
            fs::remove_file(&source)?;
        }
    }
    Ok(())
}

fn mounts(job: &Job) -> anyhow::Result<()> {
    // The folder in which the command starts is there wherever it lies, also below what is about to be covered.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let start = open_tree(CWD, &job.cwd, flags).ok();
    for (kind, target, options) in [
        ("tmpfs", "/run", "mode=755"),
        ("tmpfs", "/tmp", "mode=1777"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
        ("mqueue", "/dev/mqueue", ""),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ] {
        fs::create_dir_all(target).with_context(|| target.to_owned())?;
        filesystem(kind, target, kind, options)?;
    }
    if let Some(start) = start.filter(|_| !job.cwd.exists()) {
        fs::create_dir_all(&job.cwd)?;
        move_mount(&start, c"", CWD, &job.cwd, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .with_context(|| format!("uncovering {}", job.cwd.display()))?;
    }
    for (link, to) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        std::os::unix::fs::symlink(to, format!("/dev/{link}"))?;
    }
    for (n, folder) in job.rw.iter().enumerate() {
        fs::create_dir_all(folder)?;
        mount(format!("rw{n}"), folder, "virtiofs", MountFlags::empty(), None)
            .with_context(|| format!("mounting {}", folder.display()))?;
    }
    Ok(())
}

fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: libc::IFF_UP as libc::c_short },
    };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives across the call; the descriptor is an open socket.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
