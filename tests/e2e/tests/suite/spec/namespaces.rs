//! Namespaces of one container that another of its pod joins, and clocks of a container's own. Debian's runc knows no time
//! namespaces, and its shims each have one container here: these are Caisson's alone.

use std::fs;

use caisson_e2e::{
    Host,
    bundle::{Bundle, specification},
    direct::Direct,
    task::{Streams, Task},
    wait::STEP,
};
use serde_json::json;

caisson_e2e::caisson_only!(the_first_containers, clocks);

const NAMES: &str =
    "hostname; cat /proc/1/comm; for kind in ipc net pid uts mnt; do readlink /proc/self/ns/$kind; done";

/// What [`NAMES`] prints, once it is all there.
fn whole(text: &str) -> Option<String> {
    (text.lines().count() == 7).then(|| text.to_owned())
}

fn the_first_containers(host: &Host) {
    let mut spec = specification(&["sleep", "100000"]);
    spec["hostname"] = "first".into();
    let pod = Direct::of(host, "joined", spec);
    let pid = pod.run();
    let (stdout, out) = pod.output("names");
    pod.task.exec("names", &["sh", "-c", NAMES], &Streams { stdout, ..Streams::default() }).expect("Exec");
    pod.task.start("names").expect("Start of an exec");
    assert_eq!(pod.task.wait("names").expect("Wait"), 0);
    let firsts = out.wait_for("the first's namespaces", STEP, whole);

    let mut spec = specification(&["sh", "-c", NAMES]);
    let joined = |kind: &str, file: &str| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") });
    spec["linux"]["namespaces"] = json!([
        joined("pid", "pid"), joined("ipc", "ipc"), joined("uts", "uts"), joined("network", "net"), { "type": "mount" },
    ]);
    let second = Bundle::new(host, "joiner", &spec.to_string());
    let task = Task::new(&pod.shim, &second.id);
    let (stdout, out) = pod.output("seconds");
    let streams = Streams { stdout, ..Streams::default() };
    task.create(second.create_request(second.busybox_root()), &streams).expect("Create of the second");
    task.start("").expect("Start of the second");
    assert_eq!(task.wait("").expect("Wait"), 0);
    let seconds = out.wait_for("the second's namespaces", STEP, whole);
    let (firsts, seconds): (Vec<&str>, Vec<&str>) = (firsts.lines().collect(), seconds.lines().collect());
    assert_eq!(seconds[..2], ["first", "sleep"]);
    assert_eq!(seconds[..6], firsts[..6]);
    assert_ne!(seconds[6], firsts[6], "the mount namespace is its own");
    task.delete("").expect("Delete of the second");

    pod.kill_and_delete();
    pod.end();
    fs::remove_dir_all(&second.directory).expect("nothing is mounted in it");
}

fn clocks(host: &Host) {
    const DAY: f64 = 86_400.0;
    let mut spec = specification(&["cat", "/proc/uptime"]);
    spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({ "type": "time" }));
    spec["linux"]["timeOffsets"] = json!({ "boottime": { "secs": DAY as i64 }, "monotonic": { "secs": 5 } });
    let pod = Direct::of(host, "clocks", spec);
    let (stdout, out) = pod.output("stdout");
    pod.create(&Streams { stdout, ..Streams::default() }).expect("Create");
    pod.task.start("").expect("Start");
    assert_eq!(pod.task.wait("").expect("Wait"), 0);
    let uptime = out.wait_for("the time since the boot", STEP, |text| {
        text.split_once('\n')?.0.split(' ').next()?.parse::<f64>().ok()
    });
    assert!((DAY..DAY + 600.0).contains(&uptime), "{uptime}");
    pod.task.delete("").expect("Delete");
    pod.end();
}
