//! Many pods, one after the other and side by side: the last costs what the first did, and nothing adds up.

use std::fs;

use caisson_e2e::{Finished, Host, process::Running, sizes, wait::long};

caisson_e2e::caisson_only!(in_a_row, side_by_side);

fn in_a_row(host: &Host) {
    let count = sizes::size(20, 200);
    let one = |index: usize| {
        let finished = host.container(&format!("row-{index}")).run(&["echo", "pod", &index.to_string()]);
        assert_eq!(finished.succeeded(), format!("pod {index}\n"));
        host.expect_nothing_left();
    };
    // containerd's own caches and heap fill during the first pods.
    let (warm, rest) = (count / 4, count - count / 4);
    (0..warm).for_each(one);
    let before = Counts::of(host);
    (warm..warm + rest).for_each(one);
    Counts::of(host).assert_flat(&before);
}

fn side_by_side(host: &Host) {
    let rounds = sizes::size(1, 4);
    for round in 0..rounds {
        let pods: Vec<Running> = (0..8)
            .map(|index| {
                let container = host.container(&format!("side-{round}-{index}"));
                Running::start(&mut container.command(&["sh", "-c", &format!("echo ready; cat; exit {index}")]))
            })
            .collect();
        // All eight run at the same time before the first may end.
        for pod in &pods {
            pod.stdout.wait_for("a pod's first line", long(), |text| text.contains("ready\n").then_some(()));
        }
        assert_eq!(host.running("caisson-vmm").len(), 8);
        for (index, mut pod) in pods.into_iter().enumerate() {
            pod.write(format!("{index}\n").as_bytes());
            pod.close_stdin();
            let finished = Finished::of(pod, long());
            assert_eq!(finished.code, Some(index as i32), "{finished:?}");
            assert_eq!(finished.out(), format!("ready\n{index}\n"));
        }
        host.expect_nothing_left();
    }
}

/// What would grow if pods left something that has no name.
struct Counts {
    containerd_descriptors: usize,
    containerd_kib: usize,
    // Memory files that a lost descriptor keeps alive count as shared memory.
    shared_kib: usize,
    open_files: usize,
}

impl Counts {
    fn of(host: &Host) -> Self {
        let pid = host.containerd.pid();
        let field = |file: &str, name: &str| -> usize {
            let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"));
            let line =
                text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name} in {file}"));
            line.trim().trim_end_matches(" kB").parse().unwrap_or_else(|error| panic!("{line}: {error}"))
        };
        let open = fs::read_to_string("/proc/sys/fs/file-nr").expect("this is Linux");
        Self {
            containerd_descriptors: fs::read_dir(format!("/proc/{pid}/fd")).expect("containerd runs").count(),
            containerd_kib: field(&format!("/proc/{pid}/status"), "VmRSS:"),
            shared_kib: field("/proc/meminfo", "Shmem:"),
            open_files: open.split_whitespace().next().and_then(|word| word.parse().ok()).expect("it is a number"),
        }
    }

    fn assert_flat(&self, before: &Self) {
        let flat = |what: &str, now: usize, before: usize, slack: usize| {
            assert!(now <= before + slack, "{what} grew from {before} to {now}");
        };
        flat("containerd's descriptors", self.containerd_descriptors, before.containerd_descriptors, 0);
        // Go's heap breathes: it may double before it collects.
        flat("containerd's memory (KiB)", self.containerd_kib, before.containerd_kib, 24 * 1024);
        // The metadata database and logs lie on a tmpfs; a single lost guest would be 128 MiB.
        flat("shared memory (KiB)", self.shared_kib, before.shared_kib, 16 * 1024);
        // The kernel counts in batches for each processor.
        flat("open files of the machine", self.open_files, before.open_files, 128);
    }
}
