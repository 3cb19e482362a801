//! `mkinitramfs AGENT OUT`: the guest's whole user space, an archive that holds the agent and the folders it mounts on.
//!
//! The archive is an uncompressed "newc" cpio, because the monitor maps it into the guest as it is: unpacking costs the
//! guest time, and compressed bytes could not be shared. It is padded to whole pages for the same reason. Nothing of the
//! machine that makes it gets in (no time, owner, inode or order of a directory): the same agent gives the same bytes.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, bail};
use cpio::newc::{Builder, trailer};

/// Mount points, parents first. The agent makes whatever else it needs.
const FOLDERS: &[&str] = &["dev", "proc", "run", "sys", "tmp"];
const PAGE: usize = 4096;

const S_IFREG: u32 = 0o100000;
const S_IFDIR: u32 = 0o040000;
const S_IFCHR: u32 = 0o020000;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [agent, out] = arguments.as_slice() else {
        bail!("usage: mkinitramfs AGENT OUT");
    };
    let (agent, out) = (Path::new(agent), Path::new(out));
    let binary = std::fs::read(agent).with_context(|| format!("the agent {}", agent.display()))?;
    if !is_static_elf(&binary) {
        bail!("the agent {} is no static x86-64 ELF program; build it for x86_64-unknown-linux-musl", agent.display());
    }
    let archive = assemble(&binary)?;
    // A reader sees the old file or the new one, never a part.
    let new = out.with_extension("new");
    std::fs::write(&new, &archive).with_context(|| format!("writing {}", new.display()))?;
    std::fs::rename(&new, out).with_context(|| format!("writing {}", out.display()))?;
    Ok(())
}

/// The archive with this binary as `/init`.
fn assemble(init: &[u8]) -> io::Result<Vec<u8>> {
    let size = u32::try_from(init.len()).map_err(|_| io::Error::other("the agent is over 4 GiB"))?;
    let mut archive = Vec::with_capacity(init.len() + PAGE);
    let mut inode = 0;
    let mut node = |name: &str, mode: u32| {
        inode += 1;
        Builder::new(name).ino(inode).nlink(1).mode(mode)
    };
    for folder in FOLDERS {
        node(folder, S_IFDIR | 0o755).write(&mut archive, 0).finish()?;
    }
    // The kernel opens it as init's first descriptors, before init could mount /dev.
    node("dev/console", S_IFCHR | 0o600).rdev_major(5).rdev_minor(1).write(&mut archive, 0).finish()?;
    let mut file = node("init", S_IFREG | 0o755).write(&mut archive, size);
    file.write_all(init)?;
    file.finish()?;
    trailer(&mut archive)?;
    archive.resize(archive.len().next_multiple_of(PAGE), 0);
    Ok(archive)
}

/// An ELF file for x86-64 that asks for no interpreter: the guest has no dynamic loader.
fn is_static_elf(binary: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let half = |at: usize| binary.get(at..at + 2).and_then(|b| b.try_into().ok()).map(u16::from_le_bytes);
    let quad = |at: usize| binary.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let elf64_x86 = binary.starts_with(b"\x7fELF\x02\x01") && half(18) == Some(62);
    let (Some(table), Some(entry), Some(count)) = (quad(32), half(54), half(56)) else { return false };
    let Ok(table) = usize::try_from(table) else { return false };
    elf64_x86
        && (0..usize::from(count)).all(|n| {
            let at = table.checked_add(n * usize::from(entry));
            let kind = at.and_then(|at| binary.get(at..at.checked_add(4)?)).and_then(|b| b.try_into().ok());
            kind.map(u32::from_le_bytes).is_some_and(|kind| kind != PT_INTERP)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;
    use std::io::Read;

    #[test]
    fn same_input_same_bytes() {
        let agent = vec![7; 12345];
        let first = assemble(&agent).unwrap();
        assert_eq!(first, assemble(&agent).unwrap());
        assert_eq!(first.len() % PAGE, 0);
    }

    #[test]
    fn holds_the_agent_the_console_and_mount_points_only() {
        let agent: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        let archive = assemble(&agent).unwrap();
        let mut rest = archive.as_slice();
        let mut found = Vec::new();
        loop {
            let mut reader = Reader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                break;
            }
            assert_eq!((entry.mtime(), entry.uid(), entry.gid()), (0, 0, 0));
            found.push(format!("{} {:o}", entry.name(), entry.mode()));
            if entry.name() == "dev/console" {
                assert_eq!((entry.rdev_major(), entry.rdev_minor()), (5, 1));
            }
            if entry.name() == "init" {
                let mut content = Vec::new();
                reader.read_to_end(&mut content).unwrap();
                assert_eq!(content, agent);
            }
            rest = reader.finish().unwrap();
        }
        let expected =
            ["dev 40755", "proc 40755", "run 40755", "sys 40755", "tmp 40755", "dev/console 20600", "init 100755"];
        assert_eq!(found, expected);
    }

    #[test]
    fn only_static_programs_are_taken() {
        assert!(!is_static_elf(b""));
        assert!(!is_static_elf(b"#!/bin/sh\n"));
        // This test itself is an ordinary dynamic program where it is built for glibc.
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(is_static_elf(&own), cfg!(target_feature = "crt-static"));
        assert!(!is_static_elf(&own[..100]));
    }
}
