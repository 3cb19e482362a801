//! The process that makes a nested host with an Intel processor: Bochs, which interprets VMX as well.
//!
//! ```text
//!   Bochs boots a CD (crate::iso) with the kernel and the initramfs
//!     COM1 ── the kernel's console, and what Bochs itself has to say
//!     COM2 ── frames (crate::frames): reports, standard output, standard error
//! ```
//!
//! The CD and Bochs' configuration are memory files and the lines are pipes, all inherited as descriptors, so that nothing
//! has to be cleaned up. Bochs' clock is its number of instructions: idle time is skipped, and a host that is slow to us
//! is not slow to itself. It has no virtio-fs; the root lies in memory (`--in-ram`).

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::frames::{self, Channel};
use crate::iso::{self, Content, Entry};
use crate::machine::{Channels, Machine, Owned, spawn};

/// A Skylake server: EPT, unrestricted guest, VPID, APIC virtualization, TSC scaling.
const CPU: &str = "corei7_skylake_x";
/// Instructions in a second of the emulated clock, which is also the frequency of the TSC.
const INSTRUCTIONS_PER_SECOND: u32 = 200_000_000;
/// The kernel's command line, but for the TSC's frequency: the processor models name that of the processor that they are
/// modelled on. A host that resets has died: it does so by a triple fault, which ends Bochs.
const KERNEL_ARGUMENTS: &str =
    "console=ttyS0,115200 panic=-1 reboot=t quiet mitigations=off nokaslr tsc=reliable random.trust_cpu=on";

const BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
const VIDEO_BIOS: &str = "/usr/share/bochs/VGABIOS-lgpl-latest";
const BOOT_LOADER: &str = "/usr/lib/ISOLINUX/isolinux.bin";
const BOOT_LOADER_MODULE: &str = "/usr/lib/syslinux/modules/bios/ldlinux.c32";

/// Starts Bochs with the kernel and an initramfs.
pub fn start(machine: &Machine, kernel: &Path, initrd: &File) -> anyhow::Result<(Owned, Channels)> {
    let cd = cd(kernel, initrd).context("making the CD that Bochs boots")?;
    let (console, console_in) = pipe()?;
    let (line, line_in) = pipe()?;
    let (errors, errors_in) = pipe()?;
    let paths = Paths { cd: path(&cd), console: path(&console_in), line: path(&line_in) };
    let configuration = memory_file("bochsrc", configuration(machine, &paths).as_bytes())?;
    // Debian's Bochs has its debugger built in, which waits for the command to go on.
    let debugger = memory_file("debugger", b"c\n")?;

    let mut command = Command::new("bochs");
    command.args(["-q", "-f"]).arg(path(&configuration)).arg("-rc").arg(path(&debugger));
    command.env("TERM", "xterm");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors_in);
    let inherited = [cd.as_fd(), console_in.as_fd(), line_in.as_fd(), configuration.as_fd(), debugger.as_fd()];
    let child = spawn(&mut command, &inherited).context("starting bochs (packages bochs, bochs-term)")?;

    let (report, report_in) = UnixStream::pair()?;
    let (stdout, stdout_in) = UnixStream::pair()?;
    let (stderr, stderr_in) = UnixStream::pair()?;
    // Ours of these ends would keep the channels open.
    drop(command);
    drop(line_in);
    std::thread::spawn(move || watch(File::from(errors), File::from(console_in)));
    std::thread::spawn(move || distribute(File::from(line), [report_in, stdout_in, stderr_in]));
    let channels =
        Channels { report, stdout: Box::new(stdout), stderr: Box::new(stderr), console: Box::new(File::from(console)) };
    Ok((child, channels))
}

/// Gives each frame of the line to its channel, until the line or its order ends. Then the channels end as well.
fn distribute(line: File, [mut report, mut stdout, mut stderr]: [UnixStream; 3]) {
    let (mut line, mut content) = (BufReader::new(line), Vec::new());
    while let Ok(Some(channel)) = frames::receive(&mut line, &mut content) {
        let to = match channel {
            Channel::Report => &mut report,
            Channel::Stdout => &mut stdout,
            Channel::Stderr => &mut stderr,
        };
        // Nobody reads a channel any more when the command has ended.
        let _ = to.write_all(&content);
    }
}

/// Passes what Bochs says to the console, and reads its screen: it is a pseudo-terminal that Bochs makes itself, and when the
/// cursor has moved a thousand times and nobody reads, Bochs stops.
fn watch(errors: File, mut console: File) {
    for line in BufReader::new(errors).split(b'\n') {
        let Ok(mut line) = line else { return };
        if let Some(path) = screen(&String::from_utf8_lossy(&line)).map(ToOwned::to_owned) {
            std::thread::spawn(move || drain_screen(&path));
        }
        line.push(b'\n');
        // The console's reader is gone at the end only.
        let _ = console.write_all(&line);
    }
}

/// The pseudo-terminal that a line of Bochs' names.
fn screen(line: &str) -> Option<&str> {
    line.strip_prefix("Bochs connected to screen \"")?.strip_suffix('"')
}

/// Reads the terminal until its other end is closed.
fn drain_screen(path: &str) -> std::io::Result<()> {
    let mut terminal = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path)?;
    let mut attributes = tcgetattr(&terminal)?;
    // Otherwise what has no end of line is never read.
    attributes.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &attributes)?;
    std::io::copy(&mut terminal, &mut std::io::sink()).map(drop)
}

fn cd(kernel: &Path, initrd: &File) -> anyhow::Result<File> {
    let read = |path: &str, package: &str| std::fs::read(path).with_context(|| format!("{path} (package {package})"));
    let loader = read(BOOT_LOADER, "isolinux")?;
    let module = read(BOOT_LOADER_MODULE, "syslinux-common")?;
    let kernel = File::open(kernel).with_context(|| kernel.display().to_string())?;
    let menu = format!(
        "DEFAULT linux
PROMPT 0
LABEL linux
 KERNEL /vmlinuz
 \
         APPEND initrd=/initrd {KERNEL_ARGUMENTS} tsc_early_khz={}
",
        INSTRUCTIONS_PER_SECOND / 1000
    );
    let entries = [
        Entry { name: "ISOLINUX.CFG", content: Content::Bytes(menu.as_bytes()) },
        Entry { name: "LDLINUX.C32", content: Content::Bytes(&module) },
        Entry { name: "VMLINUZ", content: Content::File(&kernel) },
        Entry { name: "INITRD", content: Content::File(initrd) },
    ];
    let mut out = BufWriter::with_capacity(1 << 20, memory_file("cd", &[])?);
    iso::write(&mut out, &loader, &entries)?;
    Ok(out.into_inner()?)
}

/// What the configuration names, as paths that Bochs can open.
struct Paths {
    cd: String,
    console: String,
    line: String,
}

/// Bochs' configuration file (bochsrc(5)).
fn configuration(machine: &Machine, paths: &Paths) -> String {
    let Paths { cd, console, line } = paths;
    let cpu = machine.cpu.as_deref().unwrap_or(CPU);
    let memory = machine.mem_mib;
    format!(
        "config_interface: textconfig\n\
         display_library: term\n\
         memory: guest={memory}, host={memory}\n\
         romimage: file={BIOS}\n\
         vgaromimage: file={VIDEO_BIOS}\n\
         cpu: model={cpu}, count=1, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
         clock: sync=none, time0=local\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=cdrom, path={cd}, status=inserted\n\
         boot: cdrom\n\
         com1: enabled=1, mode=file, dev={console}\n\
         com2: enabled=1, mode=file, dev={line}\n\
         log: {console}\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=ignore\n"
    )
}

fn pipe() -> anyhow::Result<(OwnedFd, OwnedFd)> {
    pipe_with(PipeFlags::CLOEXEC).context("a pipe")
}

fn memory_file(name: &str, content: &[u8]) -> anyhow::Result<File> {
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).context("a memory file")?);
    file.write_all(content)?;
    Ok(file)
}

/// How a process that inherits this descriptor can open it anew.
fn path(fd: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Emulator;

    #[test]
    fn the_configuration_has_what_was_asked_for() {
        let machine = Machine { emulator: Emulator::Bochs, cpu: Some("tigerlake".into()), exact: false, mem_mib: 1500 };
        let paths = Paths { cd: "/cd".into(), console: "/console".into(), line: "/line".into() };
        let text = configuration(&machine, &paths);
        for (option, value) in [
            ("memory:", "guest=1500, host=1500"),
            ("cpu:", "model=tigerlake, count=1"),
            ("ata0-master:", "path=/cd,"),
            ("com1:", "dev=/console"),
            ("com2:", "dev=/line"),
            ("panic:", "action=fatal"),
        ] {
            let line = text.lines().find(|line| line.starts_with(option)).unwrap_or_else(|| panic!("no {option}"));
            assert!(line.contains(value), "{line}");
        }
        let default = configuration(&Machine { cpu: None, ..machine }, &paths);
        assert!(default.contains(&format!("model={CPU},")), "{default}");
    }

    #[test]
    fn the_screen_is_found_in_what_bochs_says() {
        assert_eq!(screen("Bochs connected to screen \"/dev/pts/3\""), Some("/dev/pts/3"));
        assert_eq!(screen("Bochs is exiting with the following message:"), None);
    }

    #[test]
    fn a_screen_that_is_read_takes_more_than_a_terminal_holds() {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let bochs = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&bochs).unwrap();
        unlockpt(&bochs).unwrap();
        let path = ptsname(&bochs, Vec::new()).unwrap().into_string().unwrap();
        let (said, says) = pipe().unwrap();
        let (_console, console_in) = pipe().unwrap();
        let watcher = std::thread::spawn(move || watch(File::from(said), File::from(console_in)));
        writeln!(File::from(says), "Bochs connected to screen \"{path}\"").unwrap();
        watcher.join().unwrap();
        File::from(bochs).write_all(&[b'x'; 100_000]).unwrap();
    }

    #[test]
    fn frames_reach_their_channels_and_the_end_of_the_line_ends_them() {
        use std::io::Read;
        let (reader, writer) = pipe().unwrap();
        let (report, report_in) = UnixStream::pair().unwrap();
        let (stdout, stdout_in) = UnixStream::pair().unwrap();
        let (stderr, stderr_in) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || distribute(File::from(reader), [report_in, stdout_in, stderr_in]));
        let [mut r, mut o, mut e] = frames::senders(File::from(writer));
        o.write_all(b"out").unwrap();
        e.write_all(b"err").unwrap();
        r.write_all(b"exit 0\n").unwrap();
        drop((r, o, e));
        thread.join().unwrap();
        for (mut stream, expected) in [(report, "exit 0\n"), (stdout, "out"), (stderr, "err")] {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert_eq!(text, expected);
        }
    }
}
