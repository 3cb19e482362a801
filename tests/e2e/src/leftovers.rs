//! What there is of pods on this machine: taken before and after, the difference must be nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::process::Process;

/// Everything that could stay of a pod, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    things: BTreeSet<String>,
    descriptors: BTreeMap<String, usize>,
}

impl Leftovers {
    /// Counts descriptors from `now` on.
    pub(crate) fn adopt_descriptors(&mut self, now: &Self) {
        self.descriptors.clone_from(&now.descriptors);
    }

    /// What is here and was not in `before`.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let mut extra: Vec<String> = self.things.difference(&before.things).cloned().collect();
        for (kind, count) in &self.descriptors {
            let had = before.descriptors.get(kind).copied().unwrap_or(0);
            if *count > had {
                extra.push(format!("containerd has {count} descriptors of {kind}, had {had}"));
            }
        }
        extra
    }
}

/// Where to look.
pub(crate) struct Scope<'a> {
    /// Part of the name of everything that this test makes.
    pub tag: &'a str,
    /// The test's directory.
    pub directory: &'a Path,
    /// containerd's process.
    pub containerd: i32,
    /// Processes of pods.
    pub processes: &'a [Process],
    /// The ids of all containers so far.
    pub containers: &'a [String],
    /// containerd's socket.
    pub socket: &'a Path,
}

pub(crate) fn look(scope: &Scope) -> Leftovers {
    let mut things: BTreeSet<String> = scope.processes.iter().map(ToString::to_string).collect();
    for process in ["self", &scope.containerd.to_string()] {
        things.extend(mounts(process, scope.directory).iter().map(|path| format!("mount {}", path.display())));
    }
    things.extend(cgroups(scope.tag).iter().map(|path| format!("cgroup {}", path.display())));
    things.extend(sockets(scope.tag).into_iter().map(|path| format!("socket {path}")));
    // containerd keeps the namespace's own directories, so the account begins below them.
    let tasks = |what: &str| scope.directory.join(what).join("io.containerd.runtime.v2.task").join(scope.tag);
    let runc = Path::new("/run/containerd/runc").join(scope.tag);
    for (directory, depth) in [(tasks("state"), 2), (tasks("root"), 2), (runc, 1)] {
        things.extend(files(&directory, depth).iter().map(|path| format!("file {}", path.display())));
    }
    // Likewise directories in Caisson's state directory that pods share; what is in them is a pod's.
    for entry in fs::read_dir(scope.directory.join("caisson")).into_iter().flatten().flatten() {
        let shared = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let found = if shared { files(&entry.path(), 3) } else { vec![entry.path()] };
        things.extend(found.iter().map(|path| format!("file {}", path.display())));
    }
    for id in scope.containers {
        let path = shim_socket(scope.socket, scope.tag, id);
        if path.exists() {
            things.insert(format!("the shim's socket {} of {id}", path.display()));
        }
    }
    Leftovers { things, descriptors: descriptors(scope.containerd) }
}

/// Where a shim that follows containerd's own convention has its socket.
pub(crate) fn shim_socket(containerd: &Path, namespace: &str, id: &str) -> PathBuf {
    let digest = Sha256::digest(format!("{}/{namespace}/{id}", containerd.display()));
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new("/run/containerd/s").join(name)
}

/// Mount points below `directory` as `process` sees them, in the order of mounting.
pub(crate) fn mounts(process: &str, directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    let point = |line: &str| line.split(' ').nth(4).map(PathBuf::from);
    table.lines().filter_map(point).filter(|path| path.starts_with(directory)).collect()
}

/// Control groups with `tag` in their path, parents first. The namespace's own (its parent directory) is runc's to keep.
pub(crate) fn cgroups(tag: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let path = entry.path();
                if path.to_string_lossy().contains(tag) && path.file_name().is_some_and(|name| name != tag) {
                    found.push(path.clone());
                }
                open.push(path);
            }
        }
    }
    found
}

/// Unix sockets with `tag` in their name.
fn sockets(tag: &str) -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/thread-self/net/unix").unwrap_or_default();
    let name = |line: &str| line.split_whitespace().nth(7).map(str::to_owned);
    table.lines().filter_map(name).filter(|name| name.contains(tag)).collect()
}

/// Everything below `directory`, to a depth.
fn files(directory: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&path, depth - 1));
        }
        found.push(path);
    }
    found
}

/// A process's descriptors by kind: the file's path, or `socket`, `pipe`, and so on.
fn descriptors(pid: i32) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            let target = target.to_string_lossy();
            let kind = target.split_once(":[").map_or(&*target, |(kind, _)| kind);
            // A database of containerd's, opened when it is first needed and then kept.
            if kind.ends_with(".db") {
                continue;
            }
            *count.entry(kind.to_owned()).or_insert(0) += 1;
        }
    }
    count
}
