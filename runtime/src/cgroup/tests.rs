//! On the version 2 hierarchy of this machine, wherever it is mounted; some machines have all controllers in version 1,
//! so limits that need one are tested with what there is.

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    process::{Command, id},
};

use caisson_vmm_client::Child;
use tokio::time::timeout;

use super::*;

/// A place of its own below the mount; removed with its parents at the end.
pub(crate) struct Place {
    pub(crate) mount: PathBuf,
    pub(crate) directory: PathBuf,
}

impl Place {
    pub(crate) fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            Some(words.next()?).filter(|_| words.next() == Some("cgroup2"))
        });
        let mount = PathBuf::from(mount.expect("these tests need cgroup v2 somewhere"));
        Self { mount, directory: format!("caisson-test-{}-{name}/parent/pod", id()).into() }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.mount.join(&self.directory)
    }

    fn create(&self, settings: &[Setting]) -> Result<HostCgroup, CgroupError> {
        HostCgroup::create(&self.mount, &self.directory, settings)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for directory in self.directory.ancestors().filter(|directory| !directory.as_os_str().is_empty()) {
            let _ = fs::remove_dir(self.mount.join(directory));
        }
    }
}

fn setting(file: &str, value: &str, field: &str) -> Setting {
    Setting::new(file, value, field)
}

#[tokio::test]
async fn a_process_is_in_it_from_its_first_instruction_and_it_goes_when_that_is_gone() {
    let place = Place::new("life");
    let cgroup = place.create(&[]).unwrap();
    assert_eq!(cgroup.path(), place.path());
    let output = tempfile::NamedTempFile::new().unwrap();
    let (born, log) = (cgroup.open().unwrap(), output.reopen().unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = ["-c", "cat /proc/self/cgroup >&2; read line <&3"];
    let descriptors = [(theirs.as_fd(), 3)];
    let mut child =
        Child::spawn_in(Path::new("/bin/sh"), &script, &descriptors, log.as_fd(), Some(born.as_fd())).unwrap();
    drop(theirs);
    let inside = fs::read_to_string(place.path().join("cgroup.procs")).unwrap();
    assert!(inside.lines().any(|pid| pid == child.pid().to_string()), "{inside}");
    assert!(!inside.lines().any(|pid| pid == id().to_string()), "the parent stays where it was");
    assert!(matches!(place.create(&[]), Err(CgroupError::Busy(path)) if path == place.path()));
    assert!(place.path().exists(), "a refused one touches nothing");
    drop(ours);
    timeout(Duration::from_secs(20), child.wait()).await.expect("the shell ends").unwrap();
    cgroup.remove().unwrap();
    assert!(!place.path().exists());
    let said = fs::read_to_string(output.path()).unwrap();
    let expected = format!("0::/{}", place.directory.display());
    assert!(said.lines().any(|line| line == expected), "{expected} in {said}");
}

#[test]
fn what_a_crash_left_is_found_by_its_record_and_removed_when_its_processes_are_dead() {
    let place = Place::new("crash");
    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("cgroup");
    record(&file, &place.mount, &place.directory).unwrap();
    let cgroup = place.create(&[]).unwrap();
    let mut left = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
    fs::write(place.path().join("cgroup.procs"), left.id().to_string()).unwrap();
    std::mem::forget(cgroup);
    left.kill().unwrap();
    remove(&recorded(&file).unwrap()).unwrap();
    assert!(!place.path().exists());
    left.wait().unwrap();
    remove(&recorded(&file).unwrap()).expect("gone is fine");
    assert_eq!(recorded(&state.path().join("none")), None);
}

#[test]
fn what_somebody_is_in_is_not_removed_and_nobody_waits_for_ever() {
    let place = Place::new("busy");
    let cgroup = place.create(&[]).unwrap();
    let mut stays = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
    fs::write(place.path().join("cgroup.procs"), stays.id().to_string()).unwrap();
    let message = cgroup.remove().unwrap_err().to_string();
    stays.kill().unwrap();
    stays.wait().unwrap();
    assert!(message.contains("remove the cgroup") && message.contains("busy"), "{message}");
    remove(&place.path()).unwrap();
}

#[test]
fn a_limit_without_its_controller_is_refused_by_name_and_nothing_stays() {
    let place = Place::new("controller");
    let limits = [setting("nosuch.max", "5", "linux.resources.nosuch.limit")];
    let message = place.create(&limits).unwrap_err().to_string();
    for word in ["linux.resources.nosuch.limit", "no controller nosuch", "parent/pod"] {
        assert!(message.contains(word), "{word}: {message}");
    }
    assert!(!place.path().exists());
    place.create(&[setting("nosuch.max", "max", "f")]).expect("no limit needs no controller");
}

#[test]
fn a_value_that_the_kernel_refuses_is_reported_with_field_and_file() {
    let place = Place::new("value");
    let cgroup = place.create(&[]).unwrap();
    let controllers = fs::read_to_string(place.path().join("cgroup.controllers")).unwrap();
    // As many of these as the machine has in version 2.
    for (controller, file) in [("memory", "memory.max"), ("pids", "pids.max"), ("cpu", "cpu.weight")] {
        if controllers.split_whitespace().any(|word| word == controller) {
            cgroup.apply(&[setting(file, "100", "f")]).unwrap();
            assert!(fs::read_to_string(place.path().join(file)).is_ok());
            let message = cgroup.apply(&[setting(file, "much", "the.field")]).unwrap_err().to_string();
            assert!(
                message.contains("the.field") && message.contains("\"much\"") && message.contains(file),
                "{message}"
            );
        }
    }
    // The kernel's own file takes no such word, whatever controllers there are.
    let path = place.path().join("cgroup.freeze");
    assert!(fs::write(&path, "much").is_err());
}

#[test]
fn another_file_system_is_not_version_2() {
    let message = check_mount(Path::new("/proc")).unwrap_err().to_string();
    assert!(message.contains("/proc is not cgroup v2"), "{message}");
    assert!(check_mount(Path::new("/no/such")).is_err());
    check_mount(&Place::new("mount").mount).unwrap();
}
