//! What a container sees: namespaces, mounts, devices, names.

use std::{fs, os::unix::fs::MetadataExt};

use serde_json::json;
use ttrpc::Code;

use crate::support::{Pod, exec_shell, shell, status};

#[tokio::test]
async fn a_container_has_its_own_namespaces() {
    let pod = Pod::start().await;
    let script = "for n in mnt pid ipc uts cgroup; do readlink /proc/self/ns/$n; done";
    let inside = pod.run(&shell(script)).await.stdout;
    for (namespace, line) in ["mnt", "pid", "ipc", "uts", "cgroup"].into_iter().zip(inside.lines()) {
        let outside = fs::read_link(format!("/proc/{}/ns/{namespace}", pod.agent_pid())).unwrap();
        assert!(line.starts_with(namespace), "{line}");
        assert_ne!(line, outside.to_str().unwrap());
    }
    assert_eq!(inside.lines().count(), 5);
    let network = pod.run(&shell("readlink /proc/self/ns/net")).await.stdout;
    assert_eq!(network.trim(), fs::read_link(format!("/proc/{}/ns/net", pod.agent_pid())).unwrap().to_str().unwrap());
}

#[tokio::test]
async fn init_is_process_one_and_sees_only_its_own() {
    let pod = Pod::start().await;
    let output = pod.run(&shell("echo $$; ls -d /proc/[0-9]*; cat /proc/1/cgroup; ls /")).await;
    let mut lines = output.stdout.lines();
    assert_eq!(lines.next(), Some("1"));
    let processes: Vec<_> = lines.by_ref().take_while(|line| line.starts_with("/proc/")).collect();
    assert!(processes.contains(&"/proc/1") && processes.len() <= 2, "{processes:?}");
    assert!(output.stdout.contains("0::/\n"), "its cgroup is the root of its namespace: {}", output.stdout);
    assert!(output.stdout.ends_with("bin\ndev\netc\nhome\nproc\nroot\nrun\nsys\ntmp\n"), "{}", output.stdout);
}

#[tokio::test]
async fn an_exec_is_in_the_same_namespaces_and_cgroup() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let script = "for n in mnt pid ipc uts cgroup net; do [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] || echo $n differs; done; \
                  cat /proc/self/cgroup; cat /proc/self/oom_score_adj; pwd";
    let output = pod.run_exec("c", "e", &exec_shell(script)).await;
    let cgroup = output.stdout.lines().find(|line| line.starts_with("0::"));
    assert_eq!(cgroup, Some("0::/"), "{output:?}");
    assert!(output.stdout.ends_with("\n0\n/\n") && !output.stdout.contains("differs"), "{output:?}");
}

#[tokio::test]
async fn names_are_the_containers_own() {
    let pod = Pod::start().await;
    let mut spec = shell("hostname; cat /proc/sys/kernel/domainname");
    spec["hostname"] = json!("inner");
    spec["domainname"] = json!("example");
    let before = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(pod.run(&shell("hostname")).await.stdout, "c\n", "without a name it has its container's");
    assert_eq!(pod.run(&spec).await.stdout, "inner\nexample\n");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), before);
}

#[tokio::test]
async fn mounts_have_their_options() {
    let pod = Pod::start().await;
    let mut spec = shell("cat /proc/self/mountinfo");
    spec["mounts"].as_array_mut().unwrap().extend([
        json!({"destination": "/new/deep/tmp", "type": "tmpfs", "source": "mine", "options": ["ro", "noatime", "size=1m", "rshared"]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"]}),
    ]);
    let output = pod.run(&spec).await;
    let mount = |path: &str| {
        let found = output.stdout.lines().find(|line| line.split(' ').nth(4) == Some(path));
        found.unwrap_or_else(|| panic!("{path} is not mounted: {output:?}")).to_owned()
    };
    let options = |path: &str| mount(path).split(' ').nth(5).unwrap().to_owned();
    assert_eq!(options("/proc"), "rw,nosuid,nodev,noexec,relatime");
    assert_eq!(options("/sys"), "ro,nosuid,nodev,noexec,relatime");
    assert_eq!(options("/dev"), "rw,nosuid");
    assert_eq!(options("/new/deep/tmp"), "ro,noatime");
    assert!(mount("/new/deep/tmp").contains(" shared:"), "{}", mount("/new/deep/tmp"));
    assert!(mount("/new/deep/tmp").contains("tmpfs mine") && mount("/new/deep/tmp").contains("size=1024k"));
    assert!(mount("/sys/fs/cgroup").contains("- cgroup2 cgroup"), "{}", mount("/sys/fs/cgroup"));
    assert!(mount("/dev/pts").contains("gid=5,mode=620,ptmxmode=666"), "{}", mount("/dev/pts"));
    // Nothing of the agent's own tree shows.
    let places: Vec<_> = output.stdout.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    let own = |place: &&str| ["/proc", "/dev", "/sys", "/run", "/new"].iter().any(|top| place.starts_with(top));
    let foreign: Vec<_> = places.iter().copied().filter(|place| *place != "/" && !own(place)).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    assert_eq!(places.iter().filter(|place| **place == "/").count(), 1, "{places:?}");
    let first = output.stdout.lines().next().unwrap();
    assert_eq!(first.split(' ').nth(4), Some("/"));
}

#[tokio::test]
async fn masked_and_readonly_paths_hold() {
    let pod = Pod::start().await;
    fs::create_dir(pod.rootfs().join("secret")).unwrap();
    fs::write(pod.rootfs().join("secret/key"), "k").unwrap();
    fs::write(pod.rootfs().join("etc/hidden"), "h").unwrap();
    fs::create_dir(pod.rootfs().join("frozen")).unwrap();
    let mut spec = shell(
        "ls /secret; cat /etc/hidden; echo x > /frozen/f; echo x > /frozen/sub/f; echo 1 > /proc/sys/kernel/hostname; \
         wc -c < /proc/timer_list; touch /secret/new",
    );
    spec["linux"]["maskedPaths"].as_array_mut().unwrap().extend([
        json!("/secret"),
        json!("/etc/hidden"),
        json!("/absent"),
    ]);
    spec["linux"]["readonlyPaths"].as_array_mut().unwrap().extend([json!("/frozen"), json!("/absent")]);
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/frozen/sub", "type": "tmpfs", "source": "tmpfs"}));
    let output = pod.run(&spec).await;
    assert_eq!(output.stdout, "0\n", "{output:?}");
    assert_eq!(output.stderr.matches("Read-only file system").count(), 4, "{output:?}");
}

#[tokio::test]
async fn a_readonly_root_still_has_writable_mounts() {
    let pod = Pod::start().await;
    let mut spec = shell("touch /new; touch /run/new && echo run; touch /dev/shm/new && echo shm");
    spec["root"]["readonly"] = json!(true);
    let output = pod.run(&spec).await;
    assert_eq!(output.stdout, "run\nshm\n", "{output:?}");
    assert!(output.stderr.contains("Read-only file system"), "{output:?}");
    assert!(!pod.rootfs().join("new").exists());
}

#[tokio::test]
async fn the_root_is_written_through_to_the_host() {
    let pod = Pod::start().await;
    pod.run(&shell("echo data > /tmp/file; chown 1000:1001 /tmp/file; chmod 640 /tmp/file")).await;
    let file = pod.rootfs().join("tmp/file");
    let meta = fs::metadata(&file).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (1000, 1001, 0o640));
    assert_eq!(fs::read_to_string(file).unwrap(), "data\n");
}

#[tokio::test]
async fn the_default_devices_work() {
    let pod = Pod::start().await;
    let script = "cd /dev; ls -l null zero full random urandom tty | awk '{print $1, $5, $6, $10}'; \
                  for l in fd stdin stdout stderr core ptmx; do readlink $l; done; echo x > null; head -c 4 zero | wc -c; head -c 4 urandom | wc -c; \
                  echo x > full || echo full";
    let output = pod.run(&shell(script)).await;
    let node = |numbers, name| format!("crw-rw-rw- {numbers} {name}\n");
    let mut expected = String::new();
    for (numbers, name) in
        [("1, 7", "full"), ("1, 3", "null"), ("1, 8", "random"), ("5, 0", "tty"), ("1, 9", "urandom"), ("1, 5", "zero")]
    {
        expected += &node(numbers, name);
    }
    expected += "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n/proc/kcore\npts/ptmx\n4\n4\nfull\n";
    assert_eq!(output.stdout, expected, "{output:?}");
}

#[tokio::test]
async fn own_devices_are_made_as_asked() {
    let pod = Pod::start().await;
    let mut spec = shell("ls -ln /dev/mine /dev/pipe | awk '{print $1, $3, $4, $5}'; echo x > /dev/mine && echo ok");
    spec["linux"]["devices"] = json!([
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"path": "/dev/pipe", "type": "p", "fileMode": 0o600, "major": 0, "minor": 0},
    ]);
    let output = pod.run(&spec).await;
    assert_eq!(output.stdout, "crw-r----- 5 6 1,\nprw------- 0 0 0\nok\n", "{output:?}");
}

#[tokio::test]
async fn kernel_settings_are_the_containers_own() {
    let pod = Pod::start().await;
    let mut spec = shell("cat /proc/sys/kernel/shmmni /proc/sys/fs/mqueue/queues_max");
    spec["linux"]["sysctl"] = json!({"kernel.shmmni": "123", "fs.mqueue.queues_max": "17"});
    assert_eq!(pod.run(&spec).await.stdout, "123\n17\n");
    spec["linux"]["sysctl"] = json!({"kernel.shmmni": "words"});
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("kernel/shmmni") && message.contains("words"), "{message}");
}
