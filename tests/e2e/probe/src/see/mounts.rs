//! /proc/self/mountinfo (proc_pid_mountinfo(5)).

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use caisson_e2e_probe::Mount;

/// Every row.
pub fn parse(table: &str) -> Result<Vec<Mount>> {
    table.lines().map(|line| row(line).with_context(|| format!("mountinfo has the row {line:?}"))).collect()
}

fn row(line: &str) -> Option<Mount> {
    let (of_mount, of_file_system) = line.split_once(" - ")?;
    let mut words = of_mount.split(' ');
    let id = words.next()?.parse().ok()?;
    let parent = words.next()?.parse().ok()?;
    let device = words.next()?.to_owned();
    let root = unescape(words.next()?);
    let point = unescape(words.next()?);
    let options = list(words.next()?);
    // `master:7` and the like; the group's number means nothing to a test.
    let propagation = words.map(|word| word.split(':').next().unwrap_or_default().to_owned()).collect();
    let mut words = of_file_system.split(' ');
    let kind = words.next()?.to_owned();
    let source = unescape(words.next()?);
    let super_options = list(words.next()?);
    Some(Mount { id, parent, device, root, point, options, propagation, kind, source, super_options })
}

fn list(words: &str) -> BTreeSet<String> {
    words.split(',').map(str::to_owned).collect()
}

/// Blanks and backslashes are written as a backslash and three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let byte = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match byte {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_taken_apart() {
        let row = "36 35 98:0 /mnt1 /with\\040blank rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue";
        let mounts = parse(row).unwrap();
        let words = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!((mounts[0].id, mounts[0].parent, &*mounts[0].point), (36, 35, "/with blank"));
        assert_eq!(words(&mounts[0].options), "noatime rw");
        assert_eq!(words(&mounts[0].propagation), "master shared");
        assert_eq!(words(&mounts[0].super_options), "errors=continue rw");
        assert!(parse("36 35 98:0 /").is_err());
    }

    #[test]
    fn a_row_without_propagation_is_private() {
        let mounts = parse("1 0 0:1 / / ro - tmpfs back\\134slash rw").unwrap();
        assert!(mounts[0].propagation.is_empty());
        assert_eq!(mounts[0].source, "back\\slash");
    }
}
