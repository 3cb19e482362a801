//! What a process's memory is made of, from /proc/PID/smaps.
//!
//! *Proportional* memory (PSS) counts a page that several processes map by each one's share. A monitor's own memory
//! is its PSS without what is the guest's: the mappings of the guest's memory file, and the kernel and initramfs files
//! that are mapped into it. The rest is the monitor's text, heap, stacks and rings.

use std::{fs, path::Path};

use anyhow::{Context, Result};

const MIB: f64 = 1024.0 * 1024.0;

/// Memory of one process, MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Resident, all of it.
    pub rss: f64,
    /// Proportional, all of it.
    pub pss: f64,
    /// Proportional, of the guest's memory and of the files mapped into it.
    pub guest_pss: f64,
}

impl Memory {
    /// Of the process `pid`; `guest_files` are the kernel and the initramfs.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn of(pid: i32, guest_files: &[&Path]) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let smaps = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Ok(parse(&smaps, guest_files))
    }
}

fn parse(smaps: &str, guest_files: &[&Path]) -> Memory {
    let mut memory = Memory::default();
    let mut guest = false;
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Rss:").and_then(kib) {
            memory.rss += kib * 1024.0 / MIB;
        } else if let Some(kib) = line.strip_prefix("Pss:").and_then(kib) {
            memory.pss += kib * 1024.0 / MIB;
            memory.guest_pss += if guest { kib * 1024.0 / MIB } else { 0.0 };
        } else if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            // A mapping's heading: addresses, rights, offset, device, inode, and the file's name if it has one.
            let name = line.splitn(6, ' ').nth(5).unwrap_or_default().trim();
            let name = name.strip_suffix(" (deleted)").unwrap_or(name);
            guest = name.starts_with("/memfd:caisson-guest") || guest_files.iter().any(|file| Path::new(name) == *file);
        }
    }
    memory
}

fn kib(text: &str) -> Option<f64> {
    text.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_part_is_told_apart() {
        let smaps = "7f00-7f01 rw-s 00000000 00:01 12                         /memfd:caisson-guest (deleted)\n\
                     Rss:                4096 kB\nPss:                2048 kB\nPss_Dirty:          2048 kB\n\
                     7f01-7f02 r--p 00000000 00:02 13                         /image/vmlinux\n\
                     Rss:                1024 kB\nPss:                1024 kB\n\
                     7f02-7f03 rw-p 00000000 00:00 0                          [heap]\n\
                     Rss:                 512 kB\nPss:                 512 kB\n\
                     7f03-7f04 rw-p 00000000 00:00 0 \n\
                     Rss:                 512 kB\nPss:                 256 kB\n";
        let memory = parse(smaps, &[Path::new("/image/vmlinux")]);
        assert_eq!(memory, Memory { rss: 6.0, pss: 3.75, guest_pss: 3.0 });
    }
}
