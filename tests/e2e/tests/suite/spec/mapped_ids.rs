//! Volumes whose owners are mapped (`idmap`, `uidMappings`, `gidMappings` of a mount). Debian's runc 1.1 has nothing of the
//! kind, so what runc 1.2 does on a file system that can is written down here.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown, lchown},
    path::{Path, PathBuf},
    process::Command,
};

use caisson_e2e::{Host, spec::Given};
use serde_json::{Value, json};

caisson_e2e::caisson_only!(owners_of_a_volume_are_mapped, a_volume_has_the_containers_own_users);

/// A container with busybox.
fn given<'a>(host: &'a Host, name: &str, script: &str) -> Given<'a> {
    let given = Given::new(host, name);
    fs::copy("/bin/busybox", given.root.join("bin/busybox")).expect("Debian's busybox-static is installed");
    given.set("/process/args", json!(["/bin/busybox", "sh", "-ec", script]))
}

fn mapping(ranges: &[(u32, u32, u32)]) -> Value {
    let one = |&(inside, outside, size): &_| json!({ "containerID": inside, "hostID": outside, "size": size });
    ranges.iter().map(one).collect()
}

fn owner(path: &Path) -> (u32, u32) {
    let of = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (of.uid(), of.gid())
}

fn run(given: Given) -> String {
    let ended = given.run().expect("it is served");
    assert_eq!((ended.status, &*ended.err), (0, ""), "{ended:?}");
    ended.out
}

/// Adds the volume at /v with mapped ids, and at /plain without.
fn with_volume<'a>(given: Given<'a>, directory: &Path) -> Given<'a> {
    let source = directory.to_str().expect("a plain name");
    given.mount("/plain", "bind", source, &["rbind"]).push(
        "/mounts",
        json!({
            "destination": "/v",
            "type": "bind",
            "source": source,
            "options": ["rbind", "idmap"],
            "uidMappings": mapping(&[(0, 0, 1), (1000, 3000, 10)]),
            "gidMappings": mapping(&[(0, 0, 1), (1001, 4000, 10)]),
        }),
    )
}

/// A file system mounted in a directory of the host.
struct Below(PathBuf);

impl Below {
    fn mount(point: PathBuf) -> Self {
        fs::create_dir(&point).expect("a new directory");
        let mount = Command::new("mount").args(["-t", "tmpfs", "below"]).arg(&point).status();
        assert!(mount.as_ref().is_ok_and(|status| status.success()), "mount {}: {mount:?}", point.display());
        Self(point)
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// A directory that is removed when dropped.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn owners_of_a_volume_are_mapped(host: &Host) {
    // Not in the host's directory, in which a mount counts as left behind.
    let removed = Removed(std::env::temp_dir().join(format!("mapped-ids-{}", std::process::id())));
    let directory = removed.0.clone();
    fs::create_dir(&directory).expect("a new directory");
    chown(&directory, Some(1000), Some(1001)).expect("root may do so");
    let _below = Below::mount(directory.join("below"));
    for (name, uid, gid) in [("theirs", 1000, 1001), ("foreign", 5, 6), ("below/theirs", 1001, 1002)] {
        fs::write(directory.join(name), "from the host\n").expect("it is written");
        lchown(directory.join(name), Some(uid), Some(gid)).expect("root may do so");
    }
    // All that makes a file, as the user that the owner is mapped to.
    let script = "cd /v
        busybox() { /bin/busybox \"$@\"; }
        busybox stat -c '%n %u %g' theirs foreign /plain/theirs below/theirs
        echo appended >> theirs
        echo made > made
        busybox mkdir directory
        echo deep > directory/deep
        busybox ln -s made link
        busybox mkfifo fifo
        busybox ln made hard
        busybox mv directory/deep moved
        busybox stat -c '%n %u %g' made directory link fifo hard moved
        busybox rm hard";
    let user = given(host, "user", script)
        .set("/process/user", json!({ "uid": 3000, "gid": 4000 }))
        .set("/process/capabilities", json!({}));
    let mut expected =
        "theirs 3000 4000\nforeign 65534 65534\n/plain/theirs 1000 1001\nbelow/theirs 3001 4001\n".to_owned();
    for name in ["made", "directory", "link", "fifo", "hard", "moved"] {
        expected.push_str(&format!("{name} 3000 4000\n"));
    }
    assert_eq!(run(with_volume(user, &directory)), expected);
    for name in ["made", "directory", "link", "fifo", "moved"] {
        assert_eq!(owner(&directory.join(name)), (1000, 1001), "{name} on the host");
    }
    assert_eq!(fs::read_to_string(directory.join("theirs")).unwrap(), "from the host\nappended\n");

    // The guest's root is the host's here, gives files to whom the volume knows, and nobody else.
    let script = "cd /v
        echo roots > roots
        /bin/busybox chown 3001:4001 made
        /bin/busybox chown 77 made 2>/dev/null || echo refused
        /bin/busybox stat -c '%u %g' made";
    assert_eq!(run(with_volume(given(host, "root", script), &directory)), "refused\n3001 4001\n");
    assert_eq!(owner(&directory.join("roots")), (0, 0));
    assert_eq!(owner(&directory.join("made")), (1001, 1002));

    // A user whom the volume does not know makes nothing, even where everybody may.
    fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("root may do so");
    let stranger = given(host, "stranger", "(echo x > /v/strange) 2>/dev/null || echo refused")
        .set("/process/user", json!({ "uid": 5000, "gid": 5000 }))
        .set("/process/capabilities", json!({}));
    assert_eq!(run(with_volume(stranger, &directory)), "refused\n");
    assert!(!directory.join("strange").exists());
}

fn a_volume_has_the_containers_own_users(host: &Host) {
    const OUTSIDE: u32 = 100_000;
    let directory = host.directory().join("volume");
    fs::create_dir(&directory).expect("a new directory");
    fs::write(directory.join("roots"), "").expect("it is written");
    let script = "/bin/busybox stat -c '%u %g' /v/roots; echo made > /v/made; /bin/busybox chown 7:8 /v/roots";
    let given = given(host, "userns", script);
    for name in ["", "bin", "bin/busybox"] {
        chown(given.root.join(name), Some(OUTSIDE), Some(OUTSIDE)).expect("root may do so");
    }
    let given = given
        .push("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", mapping(&[(0, OUTSIDE, 65536)]))
        .set("/linux/gidMappings", mapping(&[(0, OUTSIDE, 65536)]))
        .mount("/v", "bind", directory.to_str().expect("a plain name"), &["rbind", "ridmap"]);
    assert_eq!(run(given), "0 0\n");
    assert_eq!(owner(&directory.join("made")), (0, 0));
    assert_eq!(owner(&directory.join("roots")), (7, 8));
}
