//! Mounts with every option, the root, masked and read-only paths.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use caisson_e2e::{
    Host,
    spec::{Given, holds},
};
use caisson_e2e_probe::{Look, Outcome, Report};
use serde_json::json;

caisson_e2e::for_each_runtime!(
    new_file_systems,
    directories_and_files_of_the_host,
    a_root_that_is_read_only,
    relative_destinations,
);

const READ_ONLY: Outcome = Outcome::Refused(libc::EROFS);

fn text_at<'a>(report: &'a Report, path: &str) -> &'a str {
    match report.looks.get(path) {
        Some(Look::File { text: Ok(text), .. }) => text,
        other => panic!("{path}: {other:?}"),
    }
}

fn names_at<'a>(report: &'a Report, path: &str) -> Vec<&'a str> {
    match report.looks.get(path) {
        Some(Look::Directory { names: Ok(names), .. }) => names.iter().map(String::as_str).collect(),
        other => panic!("{path}: {other:?}"),
    }
}

fn new_file_systems(host: &Host) {
    let given = Given::new(host, "tmpfs");
    fs::create_dir(given.root.join("etc/below")).expect("the test's directory takes files");
    fs::write(given.root.join("etc/below/file"), "copied up\n").expect("the test's directory takes files");
    fs::write(given.root.join("etc/script"), "#!\n").expect("the test's directory takes files");
    let given = given
        .mount("/small", "tmpfs", "tmpfs", &["size=64k", "mode=0700", "nosuid", "nodev", "noexec", "noatime"])
        .mount("/counted", "tmpfs", "counted", &["nr_inodes=10", "size=1m", "uid=7", "gid=8", "mode=1770"])
        .mount("/fixed", "tmpfs", "tmpfs", &["ro", "nodiratime"])
        .mount("/changed", "tmpfs", "tmpfs", &["ro", "nosuid", "noexec", "suid", "rw", "exec", "strictatime"])
        .mount("/a/deep/place", "tmpfs", "tmpfs", &["mode=755", "dev"])
        .mount("/shared", "tmpfs", "tmpfs", &["shared"])
        .mount("/slave", "tmpfs", "tmpfs", &["rslave"])
        .mount("/private", "tmpfs", "tmpfs", &["rprivate"])
        .mount("/unbindable", "tmpfs", "tmpfs", &["unbindable"])
        .mount("/etc", "tmpfs", "tmpfs", &["tmpcopyup", "mode=755"])
        .ask(&["write=/small", "write=/fixed", "write=/changed", "write=/a/deep/place", "write=/etc"])
        .ask(&["look=/small", "look=/counted", "look=/etc", "look=/etc/below", "look=/etc/below/file"]);
    let (spec, report) = given.report();
    for writable in ["/small", "/changed", "/a/deep/place", "/etc"] {
        assert_eq!(report.writes[writable], Outcome::Done, "{writable}");
    }
    assert_eq!(report.writes["/fixed"], READ_ONLY);
    let mode = |path: &str| match report.looks[path] {
        Look::Directory { mode, owner, .. } => (mode, owner),
        ref other => panic!("{path}: {other:?}"),
    };
    assert_eq!(mode("/small"), (0o700, (0, 0)));
    assert_eq!(mode("/counted"), (0o1770, (7, 8)));
    assert_eq!(names_at(&report, "/etc"), ["below", "script"]);
    assert_eq!(text_at(&report, "/etc/below/file"), "copied up");
    holds(&spec, &report);
}

/// A directory of the host with a file system mounted in it.
struct Below<'a>(&'a Path);

impl<'a> Below<'a> {
    fn mount(point: &'a Path) -> Self {
        let status =
            Command::new("mount").args(["-t", "tmpfs", "below"]).arg(point).status().expect("mount is installed");
        assert!(status.success(), "mount {}: {status}", point.display());
        Self(point)
    }
}

impl Drop for Below<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// A directory that is removed when dropped.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn directories_and_files_of_the_host(host: &Host) {
    let given = Given::new(host, "binds");
    // Not in the test's own directory, where a mount would be taken for something that a pod has left.
    let shared = Removed(host.directory().with_extension("of-the-host"));
    let shared = &shared.0;
    let below = shared.join("below");
    fs::create_dir_all(&below).expect("the test's directory takes files");
    fs::write(shared.join("file"), "of the host\n").expect("the test's directory takes files");
    fs::write(shared.join("resolv.conf"), "nameserver 192.0.2.1\n").expect("the test's directory takes files");
    fs::write(given.root.join("etc/resolv.conf"), "of the image\n").expect("the test's directory takes files");
    let mounted = Below::mount(&below);
    fs::write(below.join("deeper"), "mounted below\n").expect("the test's directory takes files");
    let (directory, file) = (shared.to_string_lossy(), shared.join("resolv.conf"));
    let file = file.to_string_lossy();
    let given = given
        .mount("/rw", "bind", &directory, &["rbind", "rw"])
        .mount("/ro", "bind", &directory, &["rbind", "ro"])
        .mount("/rro", "bind", &directory, &["rbind", "rro"])
        .mount("/plain", "", &directory, &["bind", "nosuid", "nodev", "noexec", "ro"])
        .mount("/etc/resolv.conf", "bind", &file, &["bind", "ro"])
        .mount("/new/file", "bind", &file, &["bind"])
        .ask(&["write=/rw", "write=/rw/file", "write=/rw/below", "look=/rw/below/deeper", "look=/rw"])
        .ask(&["write=/ro", "write=/ro/file", "look=/ro/file", "look=/ro/below/deeper"])
        .ask(&["write=/rro", "write=/rro/file", "write=/rro/below", "look=/rro/below/deeper"])
        .ask(&["write=/plain", "look=/plain", "look=/plain/below"])
        .ask(&["look=/etc/resolv.conf", "write=/etc/resolv.conf", "look=/new/file", "write=/new/file"]);
    let (spec, report) = given.report();
    for writable in ["/rw", "/rw/file", "/rw/below", "/new/file"] {
        assert_eq!(report.writes[writable], Outcome::Done, "{writable}");
    }
    for fixed in ["/ro", "/ro/file", "/rro", "/rro/file", "/rro/below", "/plain", "/etc/resolv.conf"] {
        assert_eq!(report.writes[fixed], READ_ONLY, "{fixed}");
    }
    assert_eq!(names_at(&report, "/rw"), ["below", "file", "resolv.conf"]);
    assert_eq!(names_at(&report, "/plain/below"), [""; 0], "a plain bind mount leaves out what is mounted below");
    for deeper in ["/rw/below/deeper", "/ro/below/deeper", "/rro/below/deeper"] {
        assert_eq!(text_at(&report, deeper), "mounted below");
    }
    assert_eq!(text_at(&report, "/ro/file"), "of the host");
    assert_eq!(text_at(&report, "/etc/resolv.conf"), "nameserver 192.0.2.1");
    assert_eq!(text_at(&report, "/new/file"), "nameserver 192.0.2.1");
    holds(&spec, &report);
    drop(mounted);

    // What the container wrote is the host's at once and for good.
    let given = Given::new(host, "writes").mount("/rw", "bind", &directory, &["rbind"]);
    let ended = given.set("/process/args", json!(["/bin/probe", "files", "/rw/work", "20", "1"])).run();
    // Some checks need what a tmpfs does not have (O_DIRECT); those on names and links come before.
    let told = ended.expect("it is a good specification").out;
    assert!(told.contains("ok hard link"), "{told}");
    assert_eq!(fs::read(shared.join("work/created")).expect("it is there"), b"made in the guest\n");
    // A source that is not there is refused by its name.
    let missing = Given::new(host, "missing").mount("/x", "bind", "/no/such/source", &["rbind"]).run();
    let told = missing.expect_err("there is no such source");
    assert!(told.contains("/no/such/source"), "{told}");
}

fn a_root_that_is_read_only(host: &Host) {
    let given = Given::new(host, "read-only");
    for (path, text) in [("etc/secret", "hidden\n"), ("etc/secrets/one", "hidden\n"), ("etc/fixed/one", "kept\n")] {
        let path = given.root.join(path);
        fs::create_dir_all(path.parent().expect("it has a parent")).expect("the test's directory takes files");
        fs::write(path, text).expect("the test's directory takes files");
    }
    // What the mounts need must be there: nothing can be made in a root that is read-only.
    let given = given
        .set("/root/readonly", json!(true))
        .push("/linux/maskedPaths", json!("/etc/secret"))
        .push("/linux/maskedPaths", json!("/etc/secrets"))
        .push("/linux/maskedPaths", json!("/no/such/path"))
        .push("/linux/readonlyPaths", json!("/run/fixed"))
        .push("/linux/readonlyPaths", json!("/no/such/path"))
        .mount("/run/fixed", "tmpfs", "tmpfs", &[])
        .ask(&["look=/etc/secret", "look=/etc/secrets", "look=/etc/fixed/one", "look=/proc/keys"])
        .ask(&["write=/etc/fixed", "write=/etc/fixed/one", "write=/tmp", "write=/run", "write=/dev"])
        .ask(&["write=/proc/sys/kernel/hostname", "write=/sys/kernel", "write=/proc/self/comm"]);
    let (spec, report) = given.report();
    assert_eq!(text_at(&report, "/etc/secret"), "");
    assert_eq!(names_at(&report, "/etc/secrets"), [""; 0]);
    assert_eq!(text_at(&report, "/etc/fixed/one"), "kept");
    for fixed in ["/etc/fixed", "/etc/fixed/one", "/tmp", "/proc/sys/kernel/hostname"] {
        assert_eq!(report.writes[fixed], READ_ONLY, "{fixed}");
    }
    for writable in ["/run", "/dev", "/proc/self/comm"] {
        assert_eq!(report.writes[writable], Outcome::Done, "{writable}");
    }
    assert_ne!(report.writes["/sys/kernel"], Outcome::Done);
    holds(&spec, &report);
}

/// They are taken from the root on, as runc takes them.
fn relative_destinations(host: &Host) {
    let given = Given::new(host, "relative");
    let shared = host.directory().join("shared");
    fs::create_dir(&shared).expect("the test's directory takes files");
    fs::write(shared.join("file"), "of the host\n").expect("the test's directory takes files");
    let given = given
        .mount("relative/place", "tmpfs", "tmpfs", &["size=64k"])
        .mount("tmp/shared", "bind", &shared.to_string_lossy(), &["rbind", "ro"])
        .ask(&["write=/relative/place", "look=/tmp/shared/file", "write=/tmp/shared"]);
    let (_, report) = given.report();
    assert_eq!(report.writes["/relative/place"], Outcome::Done);
    assert_eq!(report.writes["/tmp/shared"], READ_ONLY);
    assert_eq!(text_at(&report, "/tmp/shared/file"), "of the host");
    let points: Vec<&str> = report.mounts.iter().map(|mount| &*mount.point).collect();
    assert!(points.contains(&"/relative/place") && points.contains(&"/tmp/shared"), "{points:?}");
}
