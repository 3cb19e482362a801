//! Bind mounts of host files and directories, as far as the words of the specification go. What a source is, is seen
//! when it is opened ([`crate::rootfs::binds`]).

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use super::FieldError;

/// A file or directory of the host that a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Its position in the specification's `mounts`.
    pub index: u32,
    /// Where the container has it, for messages.
    pub destination: PathBuf,
    /// Where it is on the host; absolute.
    pub source: PathBuf,
    /// With what is mounted below it.
    pub recursive: bool,
    /// Read-only.
    pub read_only: bool,
}

impl Bind {
    /// Its name in messages.
    pub fn field(&self) -> String {
        format!("mounts[{}] ({})", self.index, self.destination.display())
    }
}

/// The most of one container.
const MAX_BINDS: usize = 1000;

pub(super) fn check(spec: &Spec, bundle: &Path) -> Result<Vec<Bind>, FieldError> {
    let mut binds = Vec::new();
    for (index, mount) in (0u32..).zip(spec.mounts().iter().flatten()) {
        let name = |part: &str| format!("mounts[{index}]{part}");
        let has = |word: &str| mount.options().iter().flatten().any(|option| option == word);
        let recursive = has("rbind");
        if mount.typ().as_deref() != Some("bind") && !recursive && !has("bind") {
            continue;
        }
        let source = mount.source().as_ref().filter(|source| !source.as_os_str().is_empty());
        let source = source.ok_or_else(|| FieldError::new(name(".source"), "a bind mount must have one"))?;
        // The last word counts, as with mount(8).
        let last = mount.options().iter().flatten().rev().find(|word| matches!(word.as_str(), "ro" | "rw"));
        binds.push(Bind {
            index,
            // As runc: what is not absolute lies below the root.
            destination: Path::new("/").join(mount.destination()),
            // As runc: what is not absolute lies in the bundle.
            source: bundle.join(source),
            recursive,
            read_only: last.is_some_and(|word| word == "ro") || has("rro"),
        });
    }
    if binds.len() > MAX_BINDS {
        return Err(FieldError::new("mounts", format!("{} bind mounts, at most {MAX_BINDS} are served", binds.len())));
    }
    Ok(binds)
}
