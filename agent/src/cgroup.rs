//! cgroup v2: one directory for each container, `<mount>/caisson/<id>`, whatever path the specification names (that
//! one is for the host, where the pod's processes are).

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::errno::Errno;

use crate::spec::resources::Limit;

/// The directory below the mount that holds every container's.
const PARENT: &str = "caisson";
/// Controllers that limits need, where the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// How deep a container's own cgroups are followed.
const MAX_DEPTH: usize = 32;
/// Removing waits this long, in steps, for the kernel to finish the last exits.
const REMOVE_STEP: Duration = Duration::from_millis(2);
const REMOVE_STEPS: u32 = 1000;

/// A cgroup that cannot be made, limited or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The kernel refused.
    #[error("{what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// A limit that the kernel does not take, or has no controller for.
    #[error("{field}: write {value:?} to {file}: {error}")]
    Limit {
        /// The specification's field.
        field: &'static str,
        /// The cgroup's file.
        file: &'static str,
        /// What was written.
        value: String,
        /// What the kernel said.
        error: io::Error,
    },
}

fn io_error<'p>(what: &'static str, path: &'p Path) -> impl FnOnce(io::Error) -> CgroupError + use<'p> {
    move |error| CgroupError::Io { what, path: path.to_owned(), error }
}

/// Never creates: a file that is not there belongs to a controller that is not there.
fn write(file: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(file)?.write_all(value.as_bytes())
}

/// All containers' cgroups.
#[derive(Clone, Debug)]
pub struct Cgroups {
    parent: PathBuf,
}

impl Cgroups {
    /// Prepares the hierarchy mounted at `mount`: the controllers that exist are handed down to the containers.
    ///
    /// # Errors
    /// If the directory cannot be made or the controllers not be read.
    pub fn prepare(mount: &Path) -> Result<Self, CgroupError> {
        let parent = mount.join(PARENT);
        match fs::create_dir(&parent) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io_error("make the cgroup", &parent)(error));
            }
            _ => {}
        }
        let list = mount.join("cgroup.controllers");
        let available = fs::read_to_string(&list).map_err(io_error("read", &list))?;
        let enable: Vec<String> = available
            .split_whitespace()
            .filter(|name| CONTROLLERS.contains(name))
            .map(|name| format!("+{name}"))
            .collect();
        if !enable.is_empty() {
            for directory in [mount, &parent] {
                let file = directory.join("cgroup.subtree_control");
                write(&file, &enable.join(" ")).map_err(io_error("enable controllers in", &file))?;
            }
        }
        Ok(Self { parent })
    }

    /// Makes a container's cgroup and sets its limits; nothing stays if that fails.
    ///
    /// # Errors
    /// If it exists, or the kernel refuses a limit.
    pub fn create(&self, id: &str, limits: &[Limit]) -> Result<Cgroup, CgroupError> {
        let path = self.parent.join(id);
        fs::create_dir(&path).map_err(io_error("make the cgroup", &path))?;
        let cgroup = Cgroup { path };
        for Limit { file, value, field } in limits {
            if let Err(error) = write(&cgroup.path.join(file), value) {
                // It is empty, so this cannot fail for a reason that the caller could mend.
                let _ = fs::remove_dir(&cgroup.path);
                return Err(CgroupError::Limit { field, file, value: value.clone(), error });
            }
        }
        Ok(cgroup)
    }
}

/// One container's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The processes in it and in the cgroups that the container made below.
    ///
    /// # Errors
    /// If the list cannot be read.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        for directory in self.directories() {
            let file = directory.join("cgroup.procs");
            match fs::read_to_string(&file) {
                // 0 stands for a process that this namespace cannot see.
                Ok(text) => {
                    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0))
                }
                // A cgroup below that went away, or holds threads only.
                Err(_) if directory != self.path => {}
                Err(error) => return Err(io_error("read", &file)(error)),
            }
        }
        pids.sort_unstable();
        Ok(pids)
    }

    /// Kills every process in it and below.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let file = self.path.join("cgroup.kill");
        write(&file, "1").map_err(io_error("write", &file))
    }

    /// Removes it and what the container made below, once the last process is gone.
    ///
    /// # Errors
    /// If a process stays.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        let mut steps = 0;
        loop {
            // Deepest first.
            let mut directories = self.directories();
            directories.sort_by_key(|directory| std::cmp::Reverse(directory.components().count()));
            let result = directories.iter().try_for_each(|directory| match fs::remove_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result.map_err(|error| (directory, error)),
            });
            match result {
                Ok(()) => return Ok(()),
                Err((_, error)) if error.raw_os_error() == Some(Errno::EBUSY as i32) && steps < REMOVE_STEPS => {
                    steps += 1;
                    tokio::time::sleep(REMOVE_STEP).await;
                }
                Err((directory, error)) => return Err(io_error("remove the cgroup", directory)(error)),
            }
        }
    }

    fn directories(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut level = vec![self.path.clone()];
        for _ in 0..MAX_DEPTH {
            let entries = level.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten();
            level = entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect();
            if level.is_empty() {
                break;
            }
            found.extend_from_slice(&level);
        }
        found
    }
}
