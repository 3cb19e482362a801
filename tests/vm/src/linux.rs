//! Linux guests whose PID 1 is `caisson-vm-guest`, running one scenario.

use std::io::PipeReader;

use caisson_protos::monitor::ExitReason;
use caisson_vmm_client::Machine;
use cpio::newc::{Builder, ModeFileType, trailer};

use crate::{
    environment::{program, vmlinux},
    kernel,
    monitor::{Monitor, machine, read_until, with_console},
};

/// Parameters of every guest: quiet, restart at once on a panic, nothing of a PC that we have not.
const PARAMETERS: &str = "quiet panic=-1 reboot=k i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd";

/// A running guest.
pub struct Guest {
    /// Its monitor.
    pub monitor: Monitor,
    /// Its console.
    pub console: PipeReader,
}

/// A machine that will run `scenario`, with 128 MiB, one vCPU and a console; change it, then [`Guest::start`] it.
pub fn scenario(scenario: &str) -> (Machine, PipeReader) {
    let mut machine = machine(std::fs::File::open(vmlinux()).expect("vmlinux").into());
    machine.memory.size = 128 << 20;
    machine.command_line = format!("{PARAMETERS} caisson.test={scenario}");
    machine.initramfs = Some(kernel::descriptor(&initramfs()));
    let console = with_console(&mut machine);
    (machine, console)
}

/// The init program and the folders it mounts on.
fn initramfs() -> Vec<u8> {
    let init = std::fs::read(program("caisson-vm-guest")).expect("caisson-vm-guest");
    let mut archive = Vec::new();
    let mut entry = |name: &str, mode: u32, kind, content: &[u8]| {
        let mut writer =
            Builder::new(name).mode(mode).set_mode_file_type(kind).write(&mut archive, content.len() as u32);
        std::io::Write::write_all(&mut writer, content).expect("writing to memory");
        writer.finish().expect("the announced length");
    };
    for folder in ["proc", "sys", "dev", "share"] {
        entry(folder, 0o755, ModeFileType::Directory, &[]);
    }
    entry("init", 0o755, ModeFileType::Regular, &init);
    trailer(&mut archive).expect("writing to memory");
    archive
}

impl Guest {
    /// Starts it.
    pub fn start((machine, console): (Machine, PipeReader)) -> Self {
        let mut monitor = Monitor::spawn();
        monitor.start(machine);
        Self { monitor, console }
    }

    /// Reads the console until the scenario has ended; gives everything it said.
    pub fn verdict(&mut self) -> String {
        read_until(&mut self.console, "the guest's verdict", |text| {
            text.contains("guest: passed\r\n") || text.contains("guest: failed") && text.ends_with('\n')
        })
    }

    /// Waits until the scenario has passed and the machine is off; gives what it said.
    pub fn passes(mut self) -> String {
        let said = self.verdict();
        assert!(said.contains("guest: passed"), "the guest said:\n{said}");
        assert_eq!(self.monitor.exit_reason(), ExitReason::PoweredOff);
        said
    }
}

/// The rest of the line after `guest: <name> `.
pub fn fact(said: &str, name: &str) -> String {
    let prefix = format!("guest: {name} ");
    let line = said.lines().find_map(|line| line.strip_prefix(&prefix));
    line.unwrap_or_else(|| panic!("no {name} in:\n{said}")).trim().to_owned()
}
