//! QEMU without one of its mistakes. Its SVM delivers some interrupts to the innermost guest twice, the second time into the
//! handler of the first, which has forbidden interrupts: the guest then spins on a lock that it holds itself, or worse.
//!
//! ```text
//!   helper_vmrun (target/i386/tcg/sysemu/svm_helper.c, 7.2 to 10.0), for an interrupt that the hypervisor injects:
//!
//!     the vector is written to the processor's exception_index, as for exceptions     ◄── and stays there
//!     the interrupt is delivered; the guest is in its handler
//!     ...
//!     the processor is wanted outside, before the guest has left to its hypervisor: a timer is due (when instructions are
//!       counted), or somebody kicks it
//!     ─► cpu_exec finds a vector in exception_index and delivers it
//! ```
//!
//! The delivery needs that number nowhere: an interrupt gets its vector as an argument. So the one store is taken out of a copy
//! of the program, which lies in memory and is gone with the process. It is found by what stands behind it: three fields
//! of an event that the compiler writes in a row, and the constant that says that a device has sent it. Where that
//! is not found just once, this is another QEMU, and it runs as it is (docs/decisions/0006-emulated-hosts.md).

use std::{
    env,
    fs::File,
    io::{self, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};
use rustix::fs::{MemfdFlags, memfd_create};

const NAME: &str = "qemu-system-x86_64";
/// How far behind the fields the constant may stand: a test of the log's level lies between.
const NEAR: usize = 32;

/// A mended QEMU. Dropped after its start, it goes on.
pub struct Mended {
    program: PathBuf,
    /// The mended copy; None: the program as it is.
    copy: Option<File>,
}

impl Mended {
    /// The first QEMU on the search path.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn find() -> anyhow::Result<Self> {
        let search = env::var_os("PATH").unwrap_or_default();
        let Some(program) = env::split_paths(&search).map(|place| place.join(NAME)).find(|program| program.is_file())
        else {
            bail!("no {NAME}: install qemu-system-x86");
        };
        let program = program.canonicalize().with_context(|| format!("find {}", program.display()))?;
        let mut bytes = std::fs::read(&program).with_context(|| format!("read {}", program.display()))?;
        let copy = if mend(&mut bytes) {
            Some(in_memory(&bytes).context("a copy of QEMU in memory")?)
        } else {
            eprintln!("nested-host: {} is one that this program cannot mend: it may hang", program.display());
            None
        };
        Ok(Self { program, copy })
    }

    /// A command that runs it.
    pub fn command(&self) -> Command {
        let Some(copy) = &self.copy else { return Command::new(&self.program) };
        let mut command = Command::new(format!("/proc/self/fd/{}", copy.as_raw_fd()));
        // What it would look for beside itself.
        let prefix = self.program.parent().and_then(Path::parent).unwrap_or(Path::new("/usr"));
        command.arg0(NAME).env("QEMU_MODULE_DIR", prefix.join("lib/x86_64-linux-gnu/qemu"));
        for place in ["share/qemu", "share/seabios"] {
            command.arg("-L").arg(prefix.join(place));
        }
        command
    }
}

fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(NAME, MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}

/// The store: its length, and the instruction without effect of that length (Intel SDM volume 2, NOP). A prefix before it,
/// for the upper registers, means nothing before this one's own.
const STORE: usize = 6;
const NOTHING: [u8; STORE] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Takes the store out of a program. False if it is not there just once.
fn mend(program: &mut [u8]) -> bool {
    let mut found = (0..program.len()).filter(|at| is_store(&program[*at..]).is_some());
    let (Some(at), None) = (found.next(), found.next()) else { return false };
    program[at..at + STORE].copy_from_slice(&NOTHING);
    true
}

/// Whether `code` begins with it:
///
/// ```text
///   89 /r disp32              mov  reg, exception_index
///   c7 /0 disp32 00000000     movl $0, exception_is_int
///   48 c7 /0 disp32 ffffffff  movq $-1, exception_next_eip
///   ...
///   ba 01000000               mov  $1, %edx                 from a device: the third argument of the delivery
/// ```
fn is_store(code: &[u8]) -> Option<()> {
    let is_field = |modrm: u8, any_register: bool| {
        // A displacement of 32 bits from a register, without an index; for an immediate value the other field is 0.
        modrm & 0xc0 == 0x80 && modrm & 7 != 4 && (any_register || modrm & 0x38 == 0)
    };
    (code.first()? == &0x89 && is_field(*code.get(1)?, true)).then_some(())?;
    let rest = code.get(STORE..)?;
    let rest = rest.strip_prefix(&[0x41]).unwrap_or(rest);
    (rest.first()? == &0xc7 && is_field(*rest.get(1)?, false) && rest.get(6..10)? == [0; 4]).then_some(())?;
    let rest = rest.get(10..)?;
    (matches!(rest.first()?, 0x48 | 0x49) && rest.get(1)? == &0xc7).then_some(())?;
    (is_field(*rest.get(2)?, false) && rest.get(7..11)? == [0xff; 4]).then_some(())?;
    let near = rest.get(11..)?;
    near.get(..NEAR).unwrap_or(near).windows(5).any(|window| window == [0xba, 1, 0, 0, 0]).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: [u8; STORE] = [0x89, 0xb3, 0x54, 0xef, 0xff, 0xff];
    const BEHIND: [u8; 34] = [
        0xc7, 0x83, 0x84, 0x33, 0, 0, 0, 0, 0, 0, // movl
        0x48, 0xc7, 0x83, 0x88, 0x33, 0, 0, 0xff, 0xff, 0xff, 0xff, // movq
        0xf6, 0x05, 0xba, 0x45, 0xb6, 0, 2, 0x90, // testb
        0xba, 1, 0, 0, 0,
    ];

    fn program(store: &[u8]) -> Vec<u8> {
        [&[0x90; 20][..], store, &BEHIND, &[0xc3; 9]].concat()
    }

    #[test]
    fn the_store_goes_and_nothing_else_changes() {
        for prefix in [&[][..], &[0x44]] {
            let before = program(&[prefix, &CODE].concat());
            let mut after = before.clone();
            assert!(mend(&mut after));
            assert_eq!(after, program(&[prefix, &NOTHING].concat()));
            assert!(!mend(&mut after), "there is no second one");
        }
    }

    #[test]
    fn what_is_not_it_or_there_twice_stays() {
        let twice = [program(&CODE), program(&CODE)].concat();
        let exception = program(&CODE).iter().map(|byte| if *byte == 0xba { 0xb9 } else { *byte }).collect::<Vec<_>>();
        for mut program in [twice, exception, CODE.to_vec(), Vec::new(), program(&[0x8b, 0xb3, 0x54, 0xef, 0, 0])] {
            let before = program.clone();
            assert!(!mend(&mut program));
            assert_eq!(program, before);
        }
    }
}
