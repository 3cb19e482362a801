//! The process object, names and settings.

use caisson_e2e::{
    Host, Runtime,
    spec::{Given, holds},
};
use serde_json::json;

caisson_e2e::for_each_runtime!(usual, process_of_a_user, process_of_root, newer_fields);

/// What containerd asks for when nobody asks for anything.
fn usual(host: &Host) {
    let (spec, report) = Given::new(host, "usual").report();
    holds(&spec, &report);
    assert_eq!(report.process.pid, 1);
    assert_eq!(report.cgroup, "0::/\n", "its own cgroup is the root of what it sees");
    assert_eq!(report.mounts.iter().filter(|mount| mount.point == "/").count(), 1, "{:?}", report.mounts);
}

fn process_of_a_user(host: &Host) {
    let given = Given::new(host, "user")
        .set("/process/user", json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 2000, 65534], "umask": 0o027 }))
        .set("/process/cwd", json!("/tmp"))
        .set("/process/env", json!(["PATH=/bin", "EMPTY=", "BLANKS= a  b ", "ÜNICODE=ß=1", "LINES=a\nb"]))
        .set("/process/oomScoreAdj", json!(345))
        .set(
            "/process/capabilities",
            json!({
                "bounding": ["CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_CHOWN"],
                "effective": ["CAP_NET_BIND_SERVICE"],
                "inheritable": ["CAP_NET_BIND_SERVICE", "CAP_NET_RAW"],
                "permitted": ["CAP_NET_BIND_SERVICE", "CAP_NET_RAW"],
                "ambient": ["CAP_NET_BIND_SERVICE"],
            }),
        )
        .set(
            "/process/rlimits",
            json!([
                { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
                { "type": "RLIMIT_CPU", "soft": 1000, "hard": 2000 },
                { "type": "RLIMIT_DATA", "soft": 1u64 << 30, "hard": 1u64 << 31 },
                { "type": "RLIMIT_FSIZE", "soft": 1u64 << 32, "hard": u64::MAX },
                { "type": "RLIMIT_LOCKS", "soft": 7, "hard": 8 },
                { "type": "RLIMIT_MEMLOCK", "soft": 65536, "hard": 131_072 },
                { "type": "RLIMIT_MSGQUEUE", "soft": 1000, "hard": 2000 },
                { "type": "RLIMIT_NICE", "soft": 3, "hard": 4 },
                { "type": "RLIMIT_NOFILE", "soft": 333, "hard": 444 },
                { "type": "RLIMIT_NPROC", "soft": 55, "hard": 66 },
                { "type": "RLIMIT_RSS", "soft": 1u64 << 33, "hard": u64::MAX },
                { "type": "RLIMIT_RTPRIO", "soft": 1, "hard": 2 },
                { "type": "RLIMIT_RTTIME", "soft": 100_000, "hard": 200_000 },
                { "type": "RLIMIT_SIGPENDING", "soft": 77, "hard": 88 },
                { "type": "RLIMIT_STACK", "soft": 4 << 20, "hard": 16 << 20 },
                { "type": "RLIMIT_AS", "soft": 1u64 << 34, "hard": u64::MAX },
            ]),
        );
    let (spec, report) = given.ask(&["look=/tmp/a b", "look=/tmp/ß"]).report();
    holds(&spec, &report);
}

fn process_of_root(host: &Host) {
    let given = Given::new(host, "root")
        .set("/hostname", json!("a-name.of-its-own"))
        .set("/process/noNewPrivileges", json!(false))
        .set("/process/cwd", json!("/made/for/it"))
        .set("/process/oomScoreAdj", json!(-10))
        .set(
            "/process/capabilities",
            json!({ "bounding": ["CAP_SYS_ADMIN", "CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"] }),
        )
        .set(
            "/linux/sysctl",
            json!({
                "net.ipv4.ip_unprivileged_port_start": "80",
                "net.ipv4.ping_group_range": "0 2147483647",
                "kernel.shm_rmid_forced": "1",
                "kernel.msgmax": "16384",
                "kernel.sem": "300 32100 40 140",
                "fs.mqueue.msg_max": "20",
            }),
        )
        .set("/linux/rootfsPropagation", json!("rslave"));
    let (spec, report) = given.report();
    holds(&spec, &report);
    // Without the right to make them: not even root's.
    let finished = Given::new(host, "nothing")
        .set("/process/capabilities", json!({}))
        .set("/process/args", json!(["/bin/probe", "call", "133:0"]))
        .run()
        .expect("it is a good specification");
    assert_eq!(
        (finished.status, finished.out.trim()),
        (1, &*libc::EFAULT.to_string()),
        "mknod of no name: {finished:?}"
    );
}

/// Debian's runc 1.1 reads the specification 1.0.2 and leaves aside what is newer; Caisson honours it.
fn newer_fields(host: &Host) {
    let given = Given::new(host, "newer")
        .set("/domainname", json!("example.test"))
        .set("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 }))
        .set("/process/scheduler", json!({ "policy": "SCHED_BATCH", "nice": 7 }))
        .set("/linux/personality", json!({ "domain": "LINUX32" }));
    let (spec, report) = given.report();
    holds(&spec, &report);
    let process = &report.process;
    let seen = (&*report.domainname, process.io_priority.0, process.scheduler.policy, process.scheduler.nice);
    const BEST_EFFORT: u32 = 2;
    const SCHED_BATCH: u32 = 3;
    const PER_LINUX32: u32 = 8;
    let expected = match host.runtime {
        Runtime::Caisson => (("example.test", BEST_EFFORT, SCHED_BATCH, 7), PER_LINUX32),
        Runtime::Runc => (("(none)", 0, 0, 0), 0),
    };
    assert_eq!((seen, process.personality), expected);
    if host.runtime == Runtime::Caisson {
        assert_eq!(process.io_priority, (BEST_EFFORT, 6));
    }
}
