//! PID 1 of the nested host: makes the root, starts the command, carries its output out.
//!
//! The command writes to pipes, not to the virtio-serial ports themselves, because a port can be opened only once
//! (`echo > /dev/stderr` would fail).

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, mount, mount_move};

use crate::job::{self, Job};
use crate::report::Report;
use crate::{host, initrd};

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
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    // No power off: a panic (PID 1 ended) makes QEMU stop as well.
    std::process::exit(1)
}

fn boot(report: &mut Option<File>) -> anyhow::Result<()> {
    filesystem("proc", "/proc", "proc", "")?;
    filesystem("sysfs", "/sys", "sysfs", "")?;
    filesystem("devtmpfs", "/dev", "devtmpfs", "")?;
    load_modules().context("kernel modules")?;
    let port = report.insert(port("report")?);
    let mut say = |report: Report| port.write_all(report.to_string().as_bytes());
    let stdout = self::port("stdout")?;
    let stderr = self::port("stderr")?;
    let job: Job = serde_json::from_slice(&fs::read(job::PATH)?).context(job::PATH)?;

    say(Report::Step("root".into()))?;
    root(&job).context("the root file system")?;
    say(Report::Step("mounts".into()))?;
    mounts(&job)?;
    loopback_up().context("the loopback device")?;

    say(Report::Step(host::COMMAND_STEP.into()))?;
    let status = command(&job, stdout, stderr)?;
    rustix::fs::sync();
    say(Report::Exit(status))?;
    Ok(())
}

fn filesystem(kind: &str, target: &str, source: &str, options: &str) -> anyhow::Result<()> {
    let options = CString::new(options)?;
    mount(source, target, kind, MountFlags::empty(), &*options).with_context(|| format!("mounting {kind} on {target}"))
}

fn load_modules() -> anyhow::Result<()> {
    let mut files: Vec<_> = fs::read_dir(initrd::MODULES)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    for path in files {
        // The kernel unpacks what is packed (.ko.xz, .ko.zst) itself.
        const MODULE_INIT_COMPRESSED_FILE: i32 = 4;
        let packed = path.extension().is_some_and(|extension| extension != "ko");
        let flags = if packed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
        rustix::system::finit_module(File::open(&path)?, c"", flags).with_context(|| format!("{}", path.display()))?;
        fs::remove_file(&path)?;
    }
    Ok(())
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

/// Runs the command, carries its output, reaps whatever it leaves behind; returns its exit status.
fn command(job: &Job, stdout: File, stderr: File) -> anyhow::Result<u8> {
    let (program, arguments) = job.command.split_first().context("the job has no command")?;
    let (out, out_in) = io::pipe()?;
    let (err, err_in) = io::pipe()?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(job.env.iter().cloned());
    command.current_dir(if job.cwd.is_dir() { &job.cwd } else { Path::new("/") });
    command.stdin(Stdio::null()).stdout(out_in).stderr(err_in);
    // Command looks its program up in our own PATH; ours is empty.
    if let Some((_, path)) = job.env.iter().find(|(name, _)| name == "PATH") {
        // SAFETY: this process has one thread.
        unsafe { std::env::set_var("PATH", path) };
    }
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let mut stderr = stderr;
            writeln!(stderr, "nested-host: {program}: {error}")?;
            return Ok(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 });
        }
    };
    drop(command);
    pump([(out, stdout), (err, stderr)], child.id())
}

/// Copies each pipe to its port until the command has ended and what it had written is out. Daemons that outlive it
/// keep the pipes open, so the end of a pipe is not waited for.
fn pump(mut streams: [(io::PipeReader, File); 2], command: u32) -> anyhow::Result<u8> {
    let ended = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(command.cast_signed()).context("a child's pid")?,
        rustix::process::PidfdFlags::empty(),
    )?;
    for (pipe, _) in &streams {
        rustix::io::ioctl_fionbio(pipe, true)?;
    }
    let mut status = None;
    let mut buffer = vec![0; 64 << 10];
    let mut open = [true, true];
    loop {
        let mut ready = vec![PollFd::from_borrowed_fd(ended.as_fd(), PollFlags::IN)];
        ready.extend(
            streams.iter().zip(open).filter(|(_, open)| *open).map(|((p, _), _)| PollFd::new(p, PollFlags::IN)),
        );
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        // Look for the end before reading: then nothing that the command wrote can come after the last read.
        while let Some((pid, how)) = reap()? {
            if pid == command {
                status = Some(how);
            }
        }
        for (n, (pipe, port)) in streams.iter_mut().enumerate() {
            while open[n] {
                match rustix::io::read(&*pipe, &mut buffer[..]) {
                    Ok(0) => open[n] = false,
                    Ok(length) => port.write_all(&buffer[..length])?,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(error) => return Err(error).context("reading the command's output"),
                }
            }
        }
        if let Some(how) = status {
            return Ok(how.code().unwrap_or_else(|| 128 + how.signal().unwrap_or(0)) as u8);
        }
    }
}

/// One child that has ended, ours or an orphan.
fn reap() -> anyhow::Result<Option<(u32, ExitStatus)>> {
    use rustix::process::{WaitOptions, wait};
    match wait(WaitOptions::NOHANG) {
        Ok(Some((pid, status))) => {
            Ok(Some((pid.as_raw_nonzero().get().cast_unsigned(), ExitStatus::from_raw(status.as_raw()))))
        }
        Ok(None) | Err(rustix::io::Errno::CHILD | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error).context("waiting for children"),
    }
}
