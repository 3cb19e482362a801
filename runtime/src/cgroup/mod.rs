//! The pod's cgroup on the host: caisson-vmm and caisson-fsd live in the directory that the specification names
//! ([`path`]), with its limits and an overhead ([`limits`]). The shim itself stays where containerd has put it, as
//! runc's does.
//!
//! The directories are made on the file system itself, for systemd's names as well (docs/decisions/0007). As runc does,
//! parents are made if they are missing and stay when the pod is gone; the pod's own directory is removed.

pub mod limits;
pub mod path;

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::FileExt,
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::statfs::{CGROUP2_SUPER_MAGIC, statfs},
};

use caisson_oci::{Need, Setting};

use crate::host::paths::allow_missing;

/// Where the hierarchy is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// The controllers that limits need; those that a host lacks are only missed by who asks for them.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// A killed process leaves its cgroup a moment after it is gone; that long removing waits.
const REMOVE_LIMIT: Duration = Duration::from_secs(1);
/// More than cgroup.events has, bytes.
const MAX_EVENTS: usize = 256;

/// A cgroup that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The specification's path.
    #[error(transparent)]
    Path(#[from] path::PathError),
    /// The old version, or none.
    #[error(
        "{0} is not cgroup v2, in which a pod's processes and limits are kept: boot with systemd.unified_cgroup_hierarchy=1 or mount it there"
    )]
    NotVersion2(PathBuf),
    /// Somebody is in there.
    #[error("the cgroup {0} of linux.cgroupsPath has processes already: each pod needs one of its own")]
    Busy(PathBuf),
    /// A limit of a controller that is not there.
    #[error(
        "{field}: the cgroup {path} has no controller {controller} (it has {available:?}): enable it in the host's kernel and in the cgroups above, or set no such limit"
    )]
    Controller {
        /// The specification's field.
        field: String,
        /// The directory.
        path: PathBuf,
        /// The missing one.
        controller: String,
        /// Those that are there.
        available: String,
    },
    /// A value that the kernel does not take.
    #[error("{field}: cannot write {value:?} to {path}: {source}")]
    Limit {
        /// The specification's field.
        field: String,
        /// What was written.
        value: String,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot {what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

fn system<'p>(what: &'static str, path: &'p Path) -> impl FnOnce(io::Error) -> CgroupError + use<'p> {
    move |source| CgroupError::System { what, path: path.to_owned(), source }
}

/// Checks that cgroup v2 is mounted at `mount`.
///
/// # Errors
/// [`CgroupError::NotVersion2`].
pub fn check_mount(mount: &Path) -> Result<(), CgroupError> {
    match statfs(mount) {
        Ok(found) if found.filesystem_type() == CGROUP2_SUPER_MAGIC => Ok(()),
        _ => Err(CgroupError::NotVersion2(mount.to_owned())),
    }
}

/// The calling process's own cgroup as the kernel names it; `/` if it does not say.
pub fn own() -> String {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned()
}

/// A pod's cgroup. Dropped, it is removed.
#[derive(Debug)]
pub struct HostCgroup {
    path: PathBuf,
}

impl CgroupError {
    /// Whether the specification asks for what this host cannot give, or its kernel fails.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::System { .. } | Self::NotVersion2(_))
    }
}

impl HostCgroup {
    /// Makes `directory` below the hierarchy at `mount` and writes its limits. Its parents hand down what controllers
    /// there are.
    ///
    /// # Errors
    /// See [`CgroupError`]; then the directory is gone again.
    pub fn create(mount: &Path, directory: &Path, settings: &[Setting]) -> Result<Self, CgroupError> {
        let path = mount.join(directory);
        let mut level = mount.to_owned();
        for name in directory {
            enable(&level);
            level.push(name);
            match fs::create_dir(&level) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && level.is_dir() => {}
                made => made.map_err(system("make the cgroup", &level))?,
            }
        }
        if is_populated(&path)? {
            return Err(CgroupError::Busy(path));
        }
        let cgroup = Self { path };
        cgroup.apply(settings)?;
        Ok(cgroup)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, open: to spawn processes into.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(&self) -> Result<File, CgroupError> {
        File::open(&self.path).map_err(system("open", &self.path))
    }

    /// Writes limits; if one cannot be written, none changes.
    ///
    /// # Errors
    /// [`CgroupError::Controller`] or [`CgroupError::Limit`], before anything is written if a controller is missing.
    pub fn apply(&self, settings: &[Setting]) -> Result<(), CgroupError> {
        if settings.is_empty() {
            return Ok(());
        }
        let file = self.path.join("cgroup.controllers");
        let available = fs::read_to_string(&file).map_err(system("read", &file))?;
        let available = available.trim();
        // Without a controller there is nothing that its limit could be taken from.
        let needed: Vec<_> = settings.iter().filter(|setting| !self.is_void(setting)).cloned().collect();
        for setting in &needed {
            if !available.split(' ').any(|controller| controller == setting.controller()) {
                return Err(CgroupError::Controller {
                    field: setting.field.clone(),
                    path: self.path.clone(),
                    controller: setting.controller().to_owned(),
                    available: available.to_owned(),
                });
            }
        }
        let written = caisson_oci::write::change(&self.path, &needed);
        written.map(drop).map_err(|refused| CgroupError::Limit {
            path: self.path.join(&refused.file),
            field: refused.field,
            value: refused.value,
            source: refused.error,
        })
    }

    /// Whether a setting asks for no limit where the file does not exist, or for no swap where the kernel has no swap accounting.
    fn is_void(&self, setting: &Setting) -> bool {
        setting.choices.iter().all(|(file, value)| {
            let none = value == "max" || value.starts_with("max ") || setting.need == Need::IfThere;
            (none || file == "memory.swap.max" && value == "0") && !self.path.join(file).exists()
        })
    }

    /// Removes it, once its processes are gone; they are the pod's, which has ended.
    ///
    /// # Errors
    /// EBUSY if something stays in it.
    pub fn remove(self) -> Result<(), CgroupError> {
        let path = self.path.clone();
        std::mem::forget(self);
        remove(&path)
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        // An error is not reported here: `remove` reports it.
        let _ = remove(&self.path);
    }
}

/// Writes down where a pod's cgroup will be, for the day its shim is killed.
///
/// # Errors
/// What the file system says.
pub fn record(file: &Path, mount: &Path, directory: &Path) -> io::Result<()> {
    fs::write(file, mount.join(directory).as_os_str().as_bytes())
}

/// Reads what [`record`] wrote; None if there is nothing to remove.
pub fn recorded(file: &Path) -> Option<PathBuf> {
    let path = PathBuf::from(OsString::from_vec(fs::read(file).ok()?));
    path.is_absolute().then_some(path)
}

/// Removes the cgroup at `path`, an absolute path, waiting a second at most for processes that have just been killed.
/// One that is not there is fine.
///
/// # Errors
/// EBUSY if something stays in it.
pub fn remove(path: &Path) -> Result<(), CgroupError> {
    let mut removed = allow_missing(fs::remove_dir(path));
    if removed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy) {
        removed = wait_until_empty(path).and_then(|()| allow_missing(fs::remove_dir(path)));
    }
    removed.map_err(system("remove the cgroup", path))
}

/// Waits, [`REMOVE_LIMIT`] at most, until no process is in a cgroup or below it. The kernel tells a change as an
/// exceptional condition of cgroup.events (Documentation/admin-guide/cgroup-v2.rst, "\[Un\]populated Notification").
fn wait_until_empty(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + REMOVE_LIMIT;
    let events = match File::open(path.join("cgroup.events")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let mut text = [0; MAX_EVENTS];
    loop {
        let length = events.read_at(&mut text, 0)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if !says_populated(&String::from_utf8_lossy(text.get(..length).unwrap_or_default())) || left.is_zero() {
            return Ok(());
        }
        let mut changed = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        // A signal that interrupts it only makes another round.
        let _ = poll(&mut changed, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
    }
}

/// Hands controllers down from `directory`: each by itself, because one that cannot be would take the others with it.
/// What is then missing below is reported when it is asked for.
fn enable(directory: &Path) {
    let read = |name| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let (available, enabled) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    for name in CONTROLLERS.into_iter().filter(|name| has(&available, name) && !has(&enabled, name)) {
        let file = OpenOptions::new().write(true).open(directory.join("cgroup.subtree_control"));
        let _ = file.and_then(|mut file| file.write_all(format!("+{name}").as_bytes()));
    }
}

/// Whether a process is in a cgroup or below it.
fn is_populated(path: &Path) -> Result<bool, CgroupError> {
    let file = path.join("cgroup.events");
    Ok(says_populated(&fs::read_to_string(&file).map_err(system("read", &file))?))
}

/// Whether cgroup.events names a process.
fn says_populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

#[cfg(test)]
pub(crate) mod tests;
