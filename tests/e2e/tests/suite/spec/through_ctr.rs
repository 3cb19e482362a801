//! Specifications as containerd writes them: `ctr run` with nothing, with much, and with its seccomp profile.

use std::fs;

use caisson_e2e::{
    Host, Runtime, Setup,
    host::Image,
    pod::Container,
    spec::{holds, questions},
};
use caisson_e2e_probe::{Outcome, Report};
use serde_json::{Value, json};

caisson_e2e::for_each_runtime!(
    default_of_ctr in Setup::default().image(Image::Probe),
    seccomp_of_containerd in Setup::default().image(Image::Probe),
);

/// A kernel's first one (include/linux/proc_ns.h).
const FIRST_CGROUP_NAMESPACE: &str = "cgroup:[4026531835]";

/// Starts it idle, and lets a second process report.
fn report(host: &Host, container: Container, words: &[String]) -> (Value, Report) {
    let pod = container.start_idle();
    let config = host.bundle(&pod.id).join("config.json");
    let text = fs::read(&config).unwrap_or_else(|error| panic!("{}: {error}", config.display()));
    let mut spec: Value = serde_json::from_slice(&text).expect("containerd writes JSON");
    let mut arguments = vec!["probe".to_owned(), "report".to_owned()];
    arguments.extend(questions(&spec));
    arguments.extend(words.iter().cloned());
    let told = pod.exec("report", &arguments.iter().map(String::as_str).collect::<Vec<_>>()).succeeded();
    let report = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
    assert_eq!(pod.end().code, Some(137));
    spec["process"]["args"] = json!(arguments);
    (spec, report)
}

fn default_of_ctr(host: &Host) {
    let (spec, report) = report(host, host.container("default"), &[]);
    holds(&spec, &report);
    // ctr asks for no cgroup namespace: with runc that is the host's.
    let seen = &*report.namespaces["cgroup"];
    match host.runtime {
        Runtime::Caisson => assert_ne!(seen, FIRST_CGROUP_NAMESPACE),
        Runtime::Runc => {
            let own = fs::read_link("/proc/self/ns/cgroup").expect("this is Linux");
            assert_eq!(seen, own.to_string_lossy());
        }
    }

    let container = host.container("much");
    let flags = [
        "--cwd=/tmp",
        "--env=COLOUR=grey",
        "--memory-limit=67108864",
        "--cpus=0.5",
        "--read-only",
        "--cap-add=CAP_SYS_TIME",
        "--cap-drop=CAP_CHOWN",
        "--allow-new-privs",
        "--mount=type=tmpfs,src=tmpfs,dst=/tmp,options=noexec:size=1m",
    ];
    let container = flags.iter().fold(container, |container, flag| container.flag(*flag));
    let (spec, report) = self::report(host, container, &[]);
    holds(&spec, &report);
}

/// containerd's default profile (RuntimeDefault of Kubernetes).
fn seccomp_of_containerd(host: &Host) {
    let denied = Outcome::Refused(libc::EPERM);
    let cases = [
        (format!("{}:0x10000000", libc::SYS_unshare), denied),
        (format!("{}:0", libc::SYS_acct), denied),
        (format!("{}:0:0:0", libc::SYS_add_key), denied),
        (format!("{}:0:0:0", libc::SYS_bpf), denied),
        (format!("{}:0:0:0:0:0", libc::SYS_keyctl), denied),
        (format!("{}:0:0", libc::SYS_kexec_load), denied),
        (format!("{}:0:0:0:0:0", libc::SYS_mount), denied),
        (format!("{}:0", libc::SYS_userfaultfd), denied),
        (format!("{}:0:0:0:0:0", libc::SYS_perf_event_open), denied),
        (format!("{}:0:0:0", libc::SYS_finit_module), denied),
        (format!("{}:0xffffffff", libc::SYS_personality), Outcome::Done),
        (format!("{}:0x20008", libc::SYS_personality), Outcome::Done),
        (format!("{}:0x4000000", libc::SYS_personality), denied),
        // Allowed by name: the kernel itself says that there is nothing at that address.
        (format!("{}:0:0", libc::SYS_clone3), Outcome::Refused(libc::ENOSYS)),
        (format!("{}:0", libc::SYS_uname), Outcome::Refused(libc::EFAULT)),
        (format!("{}", libc::SYS_getpid), Outcome::Done),
    ];
    let words: Vec<String> = cases.iter().map(|(call, _)| format!("call={call}")).collect();
    let (spec, report) = report(host, host.container("seccomp").flag("--seccomp"), &words);
    let wrong: Vec<_> = cases.iter().filter(|(call, wanted)| report.calls.get(call) != Some(wanted)).collect();
    assert!(wrong.is_empty(), "not as expected: {wrong:?}: {:?}", report.calls);
    holds(&spec, &report);
}
