//! cgroup v2: one directory for each container, `<mount>/caisson/<id>`, whatever path the specification names (that
//! one is for the host, where the pod's processes are).
//!
//! - this file: making, freezing, killing, removing;
//! - [`stats`]: what was used, from the kernel's files (parsing is pure); `oom`: who was killed for want of memory;
//! - [`devices`]: which devices may be used, as a BPF program (compiling is pure); [`bpf`]: bpf(2);
//! - [`watch`]: waiting for what the kernel tells through its event files.

pub mod bpf;
pub mod devices;
mod oom;
pub mod stats;
pub mod watch;

use std::{
    fs,
    io::{self, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use caisson_oci::{CpuTime, write as limits};
use nix::errno::Errno;

use self::{devices::Devices, watch::Watch};
use crate::spec::resources::{Present, Resources};

/// The directory below the mount that holds every container's.
const PARENT: &str = "caisson";
/// Controllers that limits and numbers need, where the kernel has them.
const CONTROLLERS: [&str; 7] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"];
/// How deep a container's own cgroups are followed.
const MAX_DEPTH: usize = 32;
/// How long the kernel may take to stop every process, or to be done with the last one. One that sleeps in the kernel
/// (waiting for the file server) holds both up.
const EVENT_LIMIT: Duration = Duration::from_secs(10);

/// How often a cgroup that is said to be empty may turn out not to be.
const ATTEMPTS: u32 = 10;

/// What is kept for the agent: a part of the machine's memory, within bounds (bytes).
const KEPT_PART: u64 = 32;
const KEPT_LEAST: u64 = 8 << 20;
const KEPT_MOST: u64 = 64 << 20;

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
    #[error(transparent)]
    Limit(caisson_oci::write::WriteError),
    /// The device program does not go in.
    #[error("linux.resources.devices: {what}: {error}")]
    Devices {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// What was waited for did not come.
    #[error("{path}: {what} took more than {} s", EVENT_LIMIT.as_secs())]
    Late {
        /// What was waited for.
        what: &'static str,
        /// The cgroup.
        path: PathBuf,
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

    /// Keeps some of the machine's memory and processes out of all containers' reach: when one of them has taken the rest, the kernel
    /// reclaims and kills among them, or refuses them a fork, and the agent still gets what it needs at once. Without the
    /// controllers nothing is kept.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn keep_for_agent(&self) -> Result<(), CgroupError> {
        let meminfo = Path::new("/proc/meminfo");
        let text = fs::read_to_string(meminfo).map_err(io_error("read", meminfo))?;
        let file = self.parent.join("memory.max");
        match reach_of_containers(&text) {
            Some(bytes) if file.exists() => write(&file, &bytes.to_string()).map_err(io_error("write", &file))?,
            _ => {}
        }
        let limit = |name: &str| {
            let file = Path::new("/proc/sys/kernel").join(name);
            let text = fs::read_to_string(&file).map_err(io_error("read", &file))?;
            Ok(text.trim().parse().unwrap_or(u32::MAX))
        };
        let file = self.parent.join("pids.max");
        if file.exists() {
            let tasks = tasks_of_containers(limit("pid_max")?, limit("threads-max")?);
            write(&file, &tasks.to_string()).map_err(io_error("write", &file))?;
        }
        Ok(())
    }

    /// Makes a container's cgroup and sets its limits; nothing stays if that fails.
    ///
    /// # Errors
    /// If it exists, or the kernel refuses a limit.
    pub fn create(&self, id: &str, resources: &Resources) -> Result<Cgroup, CgroupError> {
        let path = self.parent.join(id);
        fs::create_dir(&path).map_err(io_error("make the cgroup", &path))?;
        let cgroup = Cgroup { path, program: Arc::default() };
        let limited = cgroup
            .allow(&resources.devices)
            .and_then(|()| limits::set(&cgroup.path, &resources.settings).map_err(CgroupError::Limit));
        if let Err(error) = limited {
            // It is empty, so this cannot fail for a reason that the caller could mend.
            let _ = fs::remove_dir(&cgroup.path);
            return Err(error);
        }
        Ok(cgroup)
    }
}

/// How much memory the containers may have together, bytes, from the text of /proc/meminfo before there is any: what is
/// available, but for [`KEPT_PART`] of the whole.
fn reach_of_containers(meminfo: &str) -> Option<u64> {
    let kib = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let kept = (kib("MemTotal")? / KEPT_PART).clamp(KEPT_LEAST, KEPT_MOST);
    kib("MemAvailable")?.checked_sub(kept)
}

/// How many tasks the containers may have together: what the kernel has numbers and room for, but for some of the agent's own (its
/// threads, and a stage for each process that begins).
fn tasks_of_containers(pid_max: u32, threads_max: u32) -> u32 {
    let all = pid_max.min(threads_max);
    all - (all / 8).clamp(1, 256)
}

/// One container's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// The device program that is attached.
    program: Arc<Mutex<Option<OwnedFd>>>,
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

    /// Kills every process in it and below, frozen ones too.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let file = self.path.join("cgroup.kill");
        write(&file, "1").map_err(io_error("write", &file))
    }

    /// Stops every process in it and below, or lets them go on, and waits until it is so.
    ///
    /// # Errors
    /// If a process does not stop in time; they all go on then.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let file = self.path.join("cgroup.freeze");
        write(&file, if frozen { "1" } else { "0" }).map_err(io_error("write", &file))?;
        let what = if frozen { "freezing" } else { "thawing" };
        let result = self.wait_for("frozen", u64::from(frozen), what).await;
        if frozen && result.is_err() {
            let _ = write(&file, "0");
        }
        result
    }

    /// Waits until a line of cgroup.events has a value.
    async fn wait_for(&self, key: &str, value: u64, what: &'static str) -> Result<(), CgroupError> {
        let file = self.path.join("cgroup.events");
        let found = async {
            let watch = Watch::open(&file)?;
            watch.until(|text| (stats::flat(text).get(key) == Some(&value)).then_some(())).await
        };
        match tokio::time::timeout(EVENT_LIMIT, found).await {
            Ok(result) => result.map_err(io_error("read", &file)),
            Err(_) => Err(CgroupError::Late { what, path: self.path.clone() }),
        }
    }

    /// What an Update has to know.
    pub fn present(&self) -> Present {
        let read = |name: &str| fs::read_to_string(self.path.join(name)).unwrap_or_default();
        Present {
            time: CpuTime::of_file(&read("cpu.max")),
            memory_current: stats::single(&read("memory.current")).unwrap_or(0),
        }
    }

    /// Changes limits; what `resources` does not name stays. Nothing changes if one is refused.
    ///
    /// # Errors
    /// If the kernel refuses one. May block while the kernel reclaims memory.
    pub fn update(&self, resources: &Resources) -> Result<(), CgroupError> {
        let undo = limits::change(&self.path, &resources.settings).map_err(CgroupError::Limit)?;
        if resources.names_devices
            && let Err(error) = self.allow(&resources.devices)
        {
            undo.apply();
            return Err(error);
        }
        Ok(())
    }

    /// Replaces the device program.
    fn allow(&self, devices: &Devices) -> Result<(), CgroupError> {
        let failed = |what| move |error| CgroupError::Devices { what, error };
        let program = bpf::load_device_program(&devices.compile()).map_err(failed("load the program"))?;
        let directory = fs::File::open(&self.path).map_err(io_error("open", &self.path))?;
        let mut attached = self.program.lock().unwrap_or_else(PoisonError::into_inner);
        bpf::attach_device_program(&directory, &program, attached.as_ref()).map_err(failed("attach the program"))?;
        *attached = Some(program);
        Ok(())
    }

    /// Removes it and what the container made below, once the last process is gone.
    ///
    /// # Errors
    /// If a process stays.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        let mut attempts = 0;
        loop {
            self.wait_for("populated", 0, "waiting for the last process to be gone").await?;
            // Deepest first.
            let mut directories = self.directories();
            directories.sort_by_key(|directory| std::cmp::Reverse(directory.components().count()));
            let result = directories.iter().try_for_each(|directory| match fs::remove_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result.map_err(|error| (directory, error)),
            });
            match result {
                Ok(()) => return Ok(()),
                // Populated again, or one more below: a process that was not killed yet, which the next wait is for.
                Err((_, error)) if error.raw_os_error() == Some(Errno::EBUSY as i32) && attempts < ATTEMPTS => {
                    attempts += 1;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_memory_stays_for_the_agent() {
        let meminfo = |total: u64, available: u64| {
            format!("MemTotal:       {} kB\nMemFree:  1 kB\nMemAvailable:   {} kB\n", total >> 10, available >> 10)
        };
        for (total, available, reach) in [
            (256 << 20, 230 << 20, Some(222 << 20)),
            (1 << 30, 1000 << 20, Some(968 << 20)),
            (1 << 40, 1 << 39, Some((1 << 39) - (64 << 20))),
            (64 << 20, 1 << 20, None),
        ] {
            assert_eq!(reach_of_containers(&meminfo(total, available)), reach, "{total}");
        }
        assert_eq!(reach_of_containers("MemTotal: x kB\n"), None);
    }

    #[test]
    fn some_tasks_stay_for_the_agent() {
        assert_eq!(tasks_of_containers(32768, 1900), 1900 - 237);
        assert_eq!(tasks_of_containers(32768, 100_000), 32768 - 256);
        assert_eq!(tasks_of_containers(1, 1), 0);
    }
}
