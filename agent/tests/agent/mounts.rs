//! The `mounts` of a specification: bind mounts of the host's files, options, places.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
};

use caisson_protos::agent::{BindSource, CreateRequest};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::support::{Pod, request, shell, status};

/// A container with these mounts after the usual ones; a bind mount's source is below `binds/` in the shared directory.
fn with_mounts(script: &str, mounts: &[Value]) -> CreateRequest {
    let mut spec = shell(script);
    let list = spec["mounts"].as_array_mut().unwrap();
    let mut binds = Vec::new();
    for mount in mounts {
        if mount["type"] == "bind" {
            let path = format!("binds/{}", mount["source"].as_str().unwrap());
            binds.push(BindSource { mount: u32::try_from(list.len()).unwrap(), path, ..Default::default() });
        }
        list.push(mount.clone());
    }
    CreateRequest { binds, ..request("c", &spec) }
}

fn bind(source: &str, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

/// A pod with a directory and a file to bind, and a tmpfs below the directory.
async fn pod_with_sources() -> Pod {
    let pod = Pod::start().await;
    let binds = pod.rootfs().join("../binds");
    fs::create_dir_all(binds.join("dir/sub")).unwrap();
    fs::write(binds.join("dir/file"), "in the directory\n").unwrap();
    fs::write(binds.join("conf"), "the file\n").unwrap();
    pod.beside_agent("mount -t tmpfs -o mode=755 below share/binds/dir/sub; touch share/binds/dir/sub/below");
    pod
}

/// The mount at a place, of the text of /proc/self/mountinfo: its options, and how it spreads.
fn mount_at<'t>(mountinfo: &'t str, place: &str) -> (&'t str, Vec<&'t str>) {
    let found = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some(place));
    let line = found.unwrap_or_else(|| panic!("{place} is not mounted: {mountinfo}"));
    let mut words = line.split(' ').skip(5);
    let options = words.next().unwrap();
    (options, words.take_while(|word| *word != "-").collect())
}

#[tokio::test]
async fn files_and_directories_of_the_host_are_bound() {
    let pod = pod_with_sources().await;
    let script = "cat /data/file /etc/new/conf; echo new > /data/out; echo more >> /etc/new/conf; ls /data/sub; \
                  ls -ld /data /etc/new | cut -c1-10";
    let mounts = [bind("dir", "/data", &["rbind", "rprivate", "rw"]), bind("conf", "/etc/new/conf", &["bind"])];
    let output = pod.run_request(with_mounts(script, &mounts)).await;
    assert_eq!(output.stdout, "in the directory\nthe file\nbelow\ndrwxr-xr-x\ndrwxr-xr-x\n", "{output:?}");
    let binds = pod.rootfs().join("../binds");
    assert_eq!(fs::read_to_string(binds.join("dir/out")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(binds.join("conf")).unwrap(), "the file\nmore\n");
    assert!(fs::metadata(pod.rootfs().join("etc/new/conf")).unwrap().is_file(), "the place was made as a file");
    assert!(fs::metadata(pod.rootfs().join("data")).unwrap().is_dir(), "the place was made as a directory");
    pod.assert_empty();
}

#[tokio::test]
async fn read_only_is_for_the_mount_alone_or_for_all_below() {
    let pod = pod_with_sources().await;
    let script = "touch /data/x && echo top; touch /data/sub/x && echo below";
    for (options, writable) in [
        (&["rbind"][..], "top\nbelow\n"),
        (&["rbind", "ro"], "below\n"),
        (&["rbind", "rro"], ""),
        (&["rbind", "rro", "rrw"], "top\nbelow\n"),
        (&["bind", "ro"], ""),
        (&["bind"], "top\nbelow\n"),
    ] {
        let output = pod.run_request(with_mounts(script, &[bind("dir", "/data", options)])).await;
        assert_eq!(output.stdout, writable, "{options:?}: {output:?}");
    }
    // Without "r" what is mounted below is not there.
    let output = pod.run_request(with_mounts("ls /data/sub", &[bind("dir", "/data", &["bind"])])).await;
    assert_eq!(output.stdout, "x\n", "{output:?}");
}

#[tokio::test]
async fn a_place_in_a_read_only_volume_is_not_made() {
    let pod = pod_with_sources().await;
    let inner = json!({"destination": "/data/none", "type": "tmpfs", "source": "tmpfs"});
    let request = with_mounts("true", &[bind("dir", "/data", &["rbind", "ro"]), inner]);
    let (code, message) = status(pod.create_request(request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("/data/none") && message.contains("Read-only"), "{message}");
    assert!(!pod.rootfs().join("../binds/dir/none").exists());
}

#[tokio::test]
async fn bind_mounts_have_the_flags_that_are_asked_for() {
    let pod = pod_with_sources().await;
    let options = async |options: &[&str], place: &str| {
        let output = pod.run_request(with_mounts("cat /proc/self/mountinfo", &[bind("dir", "/data", options)])).await;
        mount_at(&output.stdout, place).0.to_owned()
    };
    assert_eq!(options(&["rbind", "nosuid", "nodev", "noexec"], "/data").await, "rw,nosuid,nodev,noexec,relatime");
    assert_eq!(options(&["rbind", "nosuid"], "/data/sub").await, "rw,relatime");
    assert_eq!(options(&["rbind", "rnosuid", "rnoexec"], "/data/sub").await, "rw,nosuid,noexec,relatime");
    assert_eq!(options(&["rbind", "noatime", "nosymfollow"], "/data").await, "rw,noatime,nosymfollow");
    assert_eq!(options(&["rbind", "rstrictatime"], "/data/sub").await, "rw");
    assert_eq!(
        options(&["rbind", "rnosuid", "suid"], "/data").await,
        "rw,nosuid,relatime",
        "what is below counts last"
    );
}

#[tokio::test]
async fn mounts_spread_as_asked() {
    let pod = pod_with_sources().await;
    let kinds = async |root: Option<&str>, options: &[&str], place: &str| {
        let mut mount = json!({"destination": "/spread", "type": "tmpfs", "source": "t"});
        mount["options"] = json!(options);
        let mut request = with_mounts("cat /proc/self/mountinfo", &[mount]);
        if let Some(root) = root {
            let mut spec: Value = serde_json::from_slice(&request.spec).unwrap();
            spec["linux"]["rootfsPropagation"] = json!(root);
            request.spec = spec.to_string().into_bytes();
        }
        let output = pod.run_request(request).await;
        mount_at(&output.stdout, place)
            .1
            .iter()
            .map(|word| word.split(':').next().unwrap())
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(kinds(None, &[], "/spread").await, "");
    assert_eq!(kinds(None, &["shared"], "/spread").await, "shared");
    assert_eq!(kinds(None, &["rshared", "private"], "/spread").await, "", "one after the other");
    assert_eq!(kinds(None, &["unbindable"], "/spread").await, "unbindable");
    for root in ["private", "rprivate", "slave", "rslave"] {
        assert_eq!(kinds(Some(root), &[], "/").await, "", "{root}");
    }
    assert_eq!(kinds(Some("shared"), &[], "/").await, "shared");
    assert_eq!(kinds(Some("shared"), &[], "/proc").await, "");
    assert_eq!(kinds(Some("rshared"), &[], "/proc").await, "shared");
    assert_eq!(kinds(Some("unbindable"), &[], "/").await, "unbindable");
    assert_eq!(kinds(Some("runbindable"), &["shared"], "/spread").await, "unbindable");
}

#[tokio::test]
async fn a_tmpfs_takes_the_place_of_what_it_covers() {
    let pod = Pod::start().await;
    let full = pod.rootfs().join("full");
    fs::create_dir_all(full.join("deep")).unwrap();
    fs::write(full.join("deep/file"), "kept\n").unwrap();
    std::os::unix::fs::chown(full.join("deep/file"), Some(7), Some(8)).unwrap();
    fs::set_permissions(&full, fs::Permissions::from_mode(0o711)).unwrap();
    symlink("/etc/passwd", full.join("link")).unwrap();
    let tmpfs =
        |options: &[&str]| json!({"destination": "/full", "type": "tmpfs", "source": "tmpfs", "options": options});
    let script = "stat -c %a /full; cat /full/deep/file && stat -c '%u %g' /full/deep/file; readlink /full/link; touch /full/new";
    let output = pod.run_request(with_mounts(script, &[tmpfs(&["tmpcopyup"])])).await;
    assert_eq!(output.stdout, "711\nkept\n7 8\n/etc/passwd\n", "{output:?}");
    let output = pod.run_request(with_mounts(script, &[tmpfs(&["mode=700"])])).await;
    assert_eq!(output.stdout, "700\n", "{output:?}");
    assert!(!full.join("new").exists());
    let (code, message) =
        status(pod.create_request(with_mounts(script, &[tmpfs(&["tmpcopyup", "nr_inodes=2"])])).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("tmpcopyup") && message.contains("No space"), "{message}");
}

#[tokio::test]
async fn a_file_goes_on_a_file_and_a_directory_on_a_directory() {
    let pod = pod_with_sources().await;
    for (mount, problem) in [
        (bind("conf", "/tmp", &["bind"]), "is no file"),
        (bind("dir", "/etc/passwd", &["bind"]), "Not a directory"),
        (json!({"destination": "/etc/passwd", "type": "tmpfs", "source": "tmpfs"}), "Not a directory"),
        (bind("conf", "/etc/passwd/below", &["bind"]), "Not a directory"),
    ] {
        let (code, message) = status(pod.create_request(with_mounts("true", std::slice::from_ref(&mount))).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{mount}: {message}");
        assert!(message.contains("mounts[7]") && message.contains(problem), "{mount}: {message}");
    }
    pod.assert_empty();
}

#[tokio::test]
async fn a_place_behind_a_link_to_nothing_is_made_inside() {
    let pod = pod_with_sources().await;
    // As images have it for a resolver that is not there.
    symlink("../run/../run/resolve/stub.conf", pod.rootfs().join("etc/resolv.conf")).unwrap();
    symlink("/../../../../above/../here", pod.rootfs().join("up")).unwrap();
    let mounts = [bind("conf", "/etc/resolv.conf", &["bind", "ro"]), bind("dir", "/up/x", &["bind"])];
    let output = pod.run_request(with_mounts("cat /etc/resolv.conf /here/x/file", &mounts)).await;
    assert_eq!(output.stdout, "the file\nin the directory\n", "{output:?}");
    assert!(!pod.rootfs().join("../above").exists() && !pod.rootfs().join("../here").exists());
}

#[tokio::test]
async fn a_source_is_what_the_request_names_and_nothing_else() {
    let pod = pod_with_sources().await;
    symlink("dir", pod.rootfs().join("../binds/link")).unwrap();
    symlink("/etc/passwd", pod.rootfs().join("../binds/away")).unwrap();
    for (source, code) in [
        ("link", Code::INVALID_ARGUMENT),
        ("link/file", Code::INVALID_ARGUMENT),
        ("away", Code::INVALID_ARGUMENT),
        ("none", Code::INVALID_ARGUMENT),
        ("../../share", Code::INVALID_ARGUMENT),
    ] {
        let (found, message) = status(pod.create_request(with_mounts("true", &[bind(source, "/x", &["bind"])])).await);
        assert_eq!(found, code, "{source}: {message}");
    }
    let mut without = with_mounts("true", &[bind("dir", "/x", &["bind"])]);
    without.binds.clear();
    let (code, message) = status(pod.create_request(without).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("mounts[7] (/x).source"), "{message}");
}

#[tokio::test]
async fn ids_of_a_volume_are_mapped_where_its_file_system_can() {
    let pod = pod_with_sources().await;
    let file = pod.rootfs().join("../binds/dir/file");
    std::os::unix::fs::chown(&file, Some(1000), Some(1001)).unwrap();
    let mut mount = bind("dir", "/data", &["rbind", "idmap"]);
    mount["uidMappings"] =
        json!([{"containerID": 1000, "hostID": 3000, "size": 10}, {"containerID": 0, "hostID": 0, "size": 1}]);
    mount["gidMappings"] =
        json!([{"containerID": 1001, "hostID": 4000, "size": 1}, {"containerID": 0, "hostID": 0, "size": 1}]);
    // Whether the tests' own directory can is this machine's to say.
    let request = with_mounts("stat -c '%u %g' /data/file > /data/seen; touch /data/own", std::slice::from_ref(&mount));
    match pod.create_request(request).await {
        Ok(_) => {
            pod.start_process("c", "").await.unwrap();
            assert_eq!(pod.wait("c", "").await.unwrap().exit_status, 0);
            pod.delete("c", "").await.unwrap();
            let seen = pod.rootfs().join("../binds/dir/seen");
            assert_eq!(fs::read_to_string(seen).unwrap(), "3000 4000\n");
            assert_eq!(fs::metadata(pod.rootfs().join("../binds/dir/own")).unwrap().uid(), 0);
        }
        refused => {
            let (code, message) = status(refused);
            assert!(code == Code::INVALID_ARGUMENT && message.contains("uidMappings"), "{message}");
        }
    }

    pod.beside_agent("mkdir share/binds/ram; mount -t ramfs ram share/binds/ram");
    mount["source"] = json!("ram");
    let (code, message) = status(pod.create_request(with_mounts("true", &[mount])).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("mounts[7]") && message.contains("uidMappings"), "{message}");
    pod.assert_empty();
}

#[tokio::test]
async fn a_bound_dev_is_used_as_it_is() {
    let pod = pod_with_sources().await;
    let mut spec = shell("ls /dev | tr '\\n' ' '; cat /etc/hidden");
    spec["linux"]["maskedPaths"] = json!(["/etc/hidden"]);
    spec["mounts"] = json!([{"destination": "/dev", "type": "bind", "source": "x", "options": ["rbind"]}]);
    fs::write(pod.rootfs().join("etc/hidden"), "h").unwrap();
    let mut request = request("c", &spec);
    request.binds = vec![BindSource { mount: 0, path: "binds/dir".into(), ..Default::default() }];
    // There is no null device in it, and the mask needs none of the container's.
    assert_eq!(pod.run_request(request).await.stdout, "file sub ");
}

#[tokio::test]
async fn nested_mounts_are_made_in_their_order() {
    let pod = pod_with_sources().await;
    let tmpfs = |place: &str| json!({"destination": place, "type": "tmpfs", "source": place});
    let mounts =
        [tmpfs("/a"), bind("dir", "/a/b", &["rbind"]), bind("conf", "/a/b/conf", &["bind"]), tmpfs("/a/b/sub/c")];
    let script = "cat /a/b/file /a/b/conf; ls /a/b/sub | tr '\\n' ' '; cut -d' ' -f2 /proc/mounts | grep ^/a | sort | tr '\\n' ' '";
    let output = pod.run_request(with_mounts(script, &mounts)).await;
    let expected = "in the directory\nthe file\nbelow c /a /a/b /a/b/conf /a/b/sub /a/b/sub/c ";
    assert_eq!(output.stdout, expected, "{output:?}");
    // A later mount covers an earlier one.
    let mounts = [bind("dir", "/a/b", &["rbind"]), tmpfs("/a")];
    assert_eq!(pod.run_request(with_mounts("ls /a", &mounts)).await.stdout, "");
}

#[tokio::test]
async fn the_cgroup_mount_is_read_only_if_asked() {
    let pod = Pod::start().await;
    let cgroup = |options: &[&str]| json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options});
    let script = "mkdir /sys/fs/cgroup/inner && echo made; rmdir /sys/fs/cgroup/inner";
    assert_eq!(pod.run_request(with_mounts(script, &[cgroup(&["rw"])])).await.stdout, "made\n");
    let output = pod.run_request(with_mounts(script, &[cgroup(&["ro"])])).await;
    assert!(output.stdout.is_empty() && output.stderr.contains("Read-only file system"), "{output:?}");
}
