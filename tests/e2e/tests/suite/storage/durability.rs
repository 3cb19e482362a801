//! What a container has written is on the host: after sync, after its end, and after a stop of the shim.

use std::{fs, path::Path};

use caisson_e2e::{Host, Runtime, Setup, host::Image, process, until, wait::STEP};
use rustix::process::Signal;

use super::{volume, with_volume};

caisson_e2e::for_each_runtime!(
    sync_reaches_the_disk in Setup::default().image(Image::Probe).disk(32),
    writes_outlive_a_kill in Setup::default(),
);
caisson_e2e::caisson_only!(writes_outlive_a_stop_of_the_shim in Setup::default());

/// Whether the disk itself (the file below the loop device) holds the text, and not only the page cache of its file system.
fn on_disk(host: &Host, text: &str) -> bool {
    let disk = fs::read(host.directory().join("disk.img")).expect("the disk is a file");
    disk.windows(text.len()).any(|bytes| bytes == text.as_bytes())
}

fn sync_reaches_the_disk(host: &Host) {
    let directory = volume(host);
    let pod = with_volume(host, "sync", &directory).start_idle();
    let ways = [
        ("sync", "sync"),
        ("fsync", "sync FILE"),
        ("fdatasync", "sync -d FILE"),
        ("syncfs", "sync -f FILE"),
        ("dd", "dd if=FILE of=FILE.copy bs=4k conv=fsync 2> /dev/null; sync FILE"),
    ];
    for (place, root) in [("/v", "volume"), ("/", "root")] {
        for (name, way) in ways {
            let text = format!("written on the {root} before {name}");
            let file = Path::new(place).join(format!("file-{name}"));
            let file = file.to_string_lossy();
            let script = format!("printf '{text}' > {file} && {}", way.replace("FILE", &file));
            pod.exec(&format!("{root}-{name}"), &["sh", "-c", &script]).succeeded();
            assert!(on_disk(host, &text), "{name} in {place} has not reached the disk");
        }
    }
    pod.end();
}

const LINES: usize = 100_000;
const SCRIPT: &str = "seq 1 100000 > /v/file; echo ready; cat";

fn is_whole(directory: &Path) {
    let text = fs::read_to_string(directory.join("file")).expect("it is there");
    let expected: String = (1..=LINES).map(|number| format!("{number}\n")).collect();
    assert!(text == expected, "{} bytes of {}", text.len(), expected.len());
}

fn writes_outlive_a_kill(host: &Host) {
    let directory = volume(host);
    let pod = with_volume(host, "killed", &directory).start_ready(SCRIPT);
    assert_eq!(pod.end().code, Some(137));
    is_whole(&directory);
}

fn writes_outlive_a_stop_of_the_shim(host: &Host) {
    assert_eq!(host.runtime, Runtime::Caisson);
    let directory = volume(host);
    let pod = with_volume(host, "stopped", &directory).start_ready(SCRIPT);
    let shims = host.running("containerd-shim-caisson-v2");
    let [shim] = &shims[..] else { panic!("one shim, not {shims:?}") };
    process::signal(shim.pid, Signal::TERM);
    until("the end of every process of the pod", STEP, || {
        (!host.processes().iter().any(|process| process.command.contains(&pod.id))).then_some(())
    });
    is_whole(&directory);
    let id = pod.id.clone();
    pod.finish();
    for what in ["task", "container"] {
        host.ctr_output([what, "delete", &id]);
    }
    host.ctr_output(["snapshot", "--snapshotter", host.snapshotter(), "delete", &id]);
}
