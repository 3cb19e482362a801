//! What goes into a root in RAM: programs with the libraries they need, files and folders, and the links on their way.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// Programs that scripts use; those that this machine has come along.
const PROGRAMS: &[&str] = &[
    "bash", "sh", "env", "date", "awk", "timeout", "grep", "seq", "cat", "ls", "mount", "umount", "sleep", "true",
    "mkdir", "rm", "ln", "head", "tail", "sort", "cut", "tr", "wc", "sed", "dirname", "basename", "kill", "ps", "ip",
    "mktemp", "cp", "mv", "stat", "touch", "echo", "tee",
];
/// Files that programs expect.
const FILES: &[&str] = &["/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ld.so.cache"];
const PATH: &[&str] = &["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Every path for the root, folders before what they hold.
pub fn collect(programs: &[String], files: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths = BTreeSet::new();
    let base = PROGRAMS.iter().filter_map(|program| find(program).ok());
    let asked = programs.iter().map(|program| find(program)).collect::<Result<Vec<_>, _>>()?;
    for path in base.chain(asked) {
        for library in libraries(&path)? {
            take(&mut paths, &library)?;
        }
        take(&mut paths, &path)?;
    }
    for file in FILES.iter().map(Path::new).filter(|path| path.exists()).chain(files.iter().map(PathBuf::as_path)) {
        let absolute = std::path::absolute(file)?;
        take(&mut paths, &absolute)?;
        if absolute.is_dir() {
            descend(&mut paths, &absolute)?;
        }
    }
    for folder in ["/usr/bin", "/usr/sbin", "/var/lib", "/root", "/etc", "/mnt"] {
        take(&mut paths, Path::new(folder))?;
    }
    Ok(paths.into_iter().collect())
}

fn find(program: &str) -> anyhow::Result<PathBuf> {
    if program.contains('/') {
        return Ok(std::path::absolute(program)?);
    }
    match PATH.iter().map(|folder| Path::new(folder).join(program)).find(|path| path.exists()) {
        Some(path) => Ok(path),
        None => bail!("no program {program} in {}", PATH.join(":")),
    }
}

/// The libraries and the loader, as ldd prints them; none for a static program or a script.
fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let listing = Command::new("ldd").arg(program).output().context("ldd")?;
    Ok(parse_ldd(&String::from_utf8_lossy(&listing.stdout)))
}

fn parse_ldd(listing: &str) -> Vec<PathBuf> {
    listing.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':')).map(PathBuf::from).collect()
}

/// Adds a path, the folders above it, and wherever symbolic links in it lead.
fn take(paths: &mut BTreeSet<PathBuf>, path: &Path) -> anyhow::Result<()> {
    let mut at = PathBuf::from("/");
    for part in path.components().skip(1) {
        at.push(part);
        let meta = fs::symlink_metadata(&at).with_context(|| format!("{}", path.display()))?;
        let new = paths.insert(at.clone());
        if meta.is_symlink() {
            let to = at.parent().unwrap_or(Path::new("/")).join(fs::read_link(&at)?);
            let real = to.canonicalize().with_context(|| format!("{} leads nowhere", at.display()))?;
            if new {
                take(paths, &std::path::absolute(&to)?)?;
                take(paths, &real)?;
            }
            at = real;
        }
    }
    Ok(())
}

fn descend(paths: &mut BTreeSet<PathBuf>, folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("{}", folder.display()))? {
        let path = entry?.path();
        let kind = fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() {
            paths.insert(path.clone());
            descend(paths, &path)?;
        } else if kind.is_file() || kind.is_symlink() {
            paths.insert(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_listings() {
        let listing = "\tlinux-vdso.so.1 (0x00)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7f)\n\t/lib64/ld.so.2 (0x7f)\n";
        assert_eq!(parse_ldd(listing), ["/lib/x/libc.so.6", "/lib64/ld.so.2"].map(PathBuf::from));
        assert_eq!(parse_ldd("\tnot a dynamic executable\n"), Vec::<PathBuf>::new());
    }

    #[test]
    fn links_and_their_targets_come_along() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().canonicalize().unwrap();
        fs::create_dir(base.join("real")).unwrap();
        fs::write(base.join("real/file"), "x").unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        let mut paths = BTreeSet::new();
        take(&mut paths, &base.join("link/file")).unwrap();
        for name in ["link", "real", "real/file"] {
            assert!(paths.contains(&base.join(name)), "{name} in {paths:?}");
        }
        assert!(take(&mut paths, &base.join("missing")).is_err());
    }
}
