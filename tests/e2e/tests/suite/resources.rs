//! What a pod has of its host: the cgroup that its processes live in, the size of its machine, and files of the host.

use std::{
    fs,
    path::{Path, PathBuf},
};

use caisson_e2e::{Host, Pod};

caisson_e2e::caisson_only!(
    processes_live_in_the_cgroup_of_the_specification_with_its_limits,
    limits_make_the_machine,
    no_cgroup_that_cannot_be,
);
caisson_e2e::for_each_runtime!(files_of_the_host_are_the_same_on_both_sides);

const HIERARCHY: &str = "/sys/fs/cgroup";
const MIB: u64 = 1 << 20;

/// The cgroups of the processes of one pod that are none of the shim.
fn cgroups(host: &Host, pod: &Pod) -> Vec<(String, PathBuf)> {
    let shim = host.running("containerd-shim-caisson-v2");
    let shim = shim.iter().find(|process| process.command.contains(&pod.id)).expect("it has a shim").pid;
    let mut found = Vec::new();
    for program in ["caisson-vmm", "caisson-fsd"] {
        for process in host.running(program).into_iter().filter(|process| process.parent == shim) {
            let text = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).expect("it runs");
            let path = text.lines().find_map(|line| line.strip_prefix("0::/")).expect("it is in a cgroup");
            found.push((program.to_owned(), PathBuf::from(path)));
        }
    }
    found
}

fn value(cgroup: &Path, file: &str) -> String {
    let path = Path::new(HIERARCHY).join(cgroup).join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

fn processes_live_in_the_cgroup_of_the_specification_with_its_limits(host: &Host) {
    let id = host.container("systemd").id;
    let styles = [
        ("plain", None, format!("{}/{}", host.namespace(), host.container("plain").id)),
        ("deep", Some("/caisson-e2e/a/b".to_owned()), "caisson-e2e/a/b".to_owned()),
        (
            "systemd",
            Some(format!("caisson-e2e.slice:ctr:{id}")),
            format!("caisson.slice/caisson-e2e.slice/ctr-{id}.scope"),
        ),
    ];
    for (name, path, directory) in styles {
        let mut container = host.container(name);
        for flag in ["--memory-limit", "134217728", "--cpu-quota", "50000", "--cpu-period", "100000"] {
            container = container.flag(flag);
        }
        if let Some(path) = path {
            container = container.flag("--cgroup").flag(path);
        }
        let pod = container.start_idle();
        let directory = PathBuf::from(directory);
        let expected = ["caisson-vmm", "caisson-fsd"].map(|program| (program.to_owned(), directory.clone()));
        assert_eq!(cgroups(host, &pod), expected, "{name}");
        // The limit, what the guest needs, and what its processes need: see the configuration's keys.
        assert_eq!(value(&directory, "memory.max"), ((128 + 64 + 128) * MIB).to_string(), "{name}");
        assert_eq!(value(&directory, "cpu.max"), "75000 100000", "{name}");
        assert_eq!(pod.end().code, Some(137));
        assert!(!Path::new(HIERARCHY).join(&directory).exists(), "{name}: {}", directory.display());
    }
    for left in ["caisson-e2e/a", "caisson-e2e", "caisson.slice/caisson-e2e.slice", "caisson.slice"] {
        fs::remove_dir(Path::new(HIERARCHY).join(left)).unwrap_or_else(|error| panic!("{left}: {error}"));
    }
}

fn limits_make_the_machine(host: &Host) {
    let look = "grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo";
    let size = |text: &str| -> (u64, u64) {
        let mut lines = text.lines();
        let processors = lines.next().and_then(|line| line.parse().ok()).expect("a number of processors");
        let memory = lines.next().and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        (processors, memory.expect("an amount of memory") / 1024)
    };
    host.configure(&host.configuration().set("memory_mib", "256").to_text());
    let (processors, memory) = size(&host.container("default").sh(look).succeeded());
    assert!(processors == 1 && (180..=256).contains(&memory), "{processors} processors, {memory} MiB");
    let limited = host.container("limited").flag("--memory-limit").flag((448 * MIB).to_string());
    let (_, memory) = size(&limited.sh(look).succeeded());
    assert!((400..=512).contains(&memory), "{memory} MiB for a limit of 448 MiB");
    // As many as a quota needs, and never more than the host has.
    let online = fs::read_to_string("/proc/cpuinfo").expect("this is Linux").matches("processor\t").count() as u64;
    let two = host.container("two").flag("--cpu-quota").flag("150000").flag("--cpu-period").flag("100000");
    assert_eq!(size(&two.sh(look).succeeded()).0, online.min(2));
}

fn no_cgroup_that_cannot_be(host: &Host) {
    for path in ["/a/../../b", "/", "/caisson-e2e/cgroup.procs", "a--b.slice:p:x"] {
        let finished = host.container("odd").flag("--cgroup").flag(path).run(&["echo", "never"]);
        assert!(finished.code != Some(0) && finished.stdout.is_empty(), "{path} was accepted: {finished:?}");
        assert!(finished.err().contains("linux.cgroupsPath") && finished.err().contains(path), "{finished:?}");
        host.expect_nothing_left();
    }
}

/// Each side sees at once what the other has written, also to a file that it has read before.
fn files_of_the_host_are_the_same_on_both_sides(host: &Host) {
    let directory = host.directory().join("volume");
    fs::create_dir(&directory).expect("the test's directory takes files");
    fs::write(directory.join("file"), "one").expect("the test's directory takes files");
    let mount = |options: &str, at: &str| format!("type=bind,src={},dst={at},options={options}", directory.display());
    let container = host.container("volume").flag("--mount").flag(mount("rbind:rw", "/volume"));
    let container = container.flag("--mount").flag(mount("rbind:ro", "/fixed"));
    let pod = container.start_ready("cat /volume/file; echo; echo ready; cat");
    pod.wait_for("one\n");
    for text in ["two, which is longer", "3"] {
        fs::write(directory.join("file"), text).expect("the host may write");
        for place in ["/volume/file", "/fixed/file"] {
            assert_eq!(pod.exec(&format!("read-{}{}", text.len(), place.len()), &["cat", place]).succeeded(), text);
        }
    }
    pod.exec("write", &["sh", "-c", "echo from inside > /volume/new; rm /volume/file"]).succeeded();
    assert_eq!(fs::read_to_string(directory.join("new")).expect("it is there"), "from inside\n");
    assert!(!directory.join("file").exists());
    let refused = pod.exec("refused", &["sh", "-c", "echo x > /fixed/new"]);
    assert!(refused.code != Some(0) && refused.err().contains("Read-only file system"), "{refused:?}");
    assert_eq!(fs::read_to_string(directory.join("new")).expect("it is there"), "from inside\n");
    assert_eq!(pod.end().code, Some(137));
    fs::remove_dir_all(&directory).expect("nothing of it is mounted any more");
}
