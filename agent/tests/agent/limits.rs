//! linux.resources: limits, device rules, and their change by Update.

use serde_json::{Value, json};
use ttrpc::Code;

use crate::support::{Pod, exec_shell, shell, status};

const SLEEP: &str = "exec sleep 1000";

fn has(pod: &Pod, controller: &str) -> bool {
    pod.cgroup_controllers().iter().any(|name| name == controller)
}

/// Controller, resources, file, what the file then says.
fn cases() -> Vec<(&'static str, Value, &'static str, &'static str)> {
    vec![
        ("hugetlb", json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}), "hugetlb.2MB.max", "4194304\n"),
        (
            "hugetlb",
            json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}),
            "hugetlb.2MB.rsvd.max",
            "4194304\n",
        ),
        ("hugetlb", json!({"unified": {"hugetlb.2MB.max": "2097152"}}), "hugetlb.2MB.max", "2097152\n"),
        ("memory", json!({"memory": {"limit": 33554432}}), "memory.max", "33554432\n"),
        ("memory", json!({"memory": {"limit": 33554432, "swap": 33558528}}), "memory.swap.max", "4096\n"),
        ("memory", json!({"memory": {"reservation": 8192}}), "memory.low", "8192\n"),
        ("memory", json!({"unified": {"memory.high": "16777216", "memory.oom.group": "1"}}), "memory.oom.group", "1\n"),
        ("pids", json!({"pids": {"limit": 17}}), "pids.max", "17\n"),
        ("cpu", json!({"cpu": {"shares": 1024}}), "cpu.weight", "39\n"),
        ("cpu", json!({"cpu": {"quota": 20000, "period": 50000}}), "cpu.max", "20000 50000\n"),
        ("cpu", json!({"cpu": {"quota": 20000, "burst": 10000}}), "cpu.max.burst", "10000\n"),
        ("cpu", json!({"cpu": {"idle": 1}}), "cpu.idle", "1\n"),
        ("cpuset", json!({"cpu": {"cpus": "0"}}), "cpuset.cpus", "0\n"),
        ("cpuset", json!({"cpu": {"mems": "0"}}), "cpuset.mems", "0\n"),
        ("io", json!({"blockIO": {"weight": 500}}), "io.weight", "default 4950\n"),
    ]
}

/// Whether this kernel has the file that a case needs: its controller, and where that is optional its option.
fn offered(pod: &Pod, controller: &str, file: &str) -> bool {
    has(pod, controller) && pod.cgroup_file("probe", file).is_some()
}

#[tokio::test]
async fn a_new_container_has_its_limits_or_is_not_made() {
    let pod = Pod::start().await;
    pod.start_sleeper("probe").await;
    let mut enforced = Vec::new();
    for (controller, resources, file, expected) in cases() {
        let mut spec = shell(SLEEP);
        spec["linux"]["resources"] = resources.clone();
        let created = pod.create("c", &spec, None).await;
        if offered(&pod, controller, file) {
            created.unwrap();
            assert_eq!(pod.cgroup_file("c", file).as_deref(), Some(expected), "{resources}");
            pod.delete("c", "").await.unwrap();
            enforced.push(file);
        } else {
            // A limit that cannot be enforced is never dropped.
            let (code, message) = status(created);
            assert_eq!(code, Code::INVALID_ARGUMENT, "{resources}: {message}");
            assert!(message.contains("linux.resources.") && message.contains("no such"), "{message}");
        }
    }
    eprintln!("enforced here: {enforced:?}");
    let rdma = json!({"rdma": {"mlx5_1": {"hcaHandles": 1}}});
    let mut spec = shell(SLEEP);
    spec["linux"]["resources"] = rdma;
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("linux.resources.rdma[\"mlx5_1\"]"), "{message}");
}

#[tokio::test]
async fn update_changes_the_limits_of_what_runs() {
    let pod = Pod::start().await;
    pod.start_sleeper("probe").await;
    for (controller, resources, file, expected) in cases() {
        pod.start_sleeper("c").await;
        let updated = pod.update("c", &resources).await;
        if offered(&pod, controller, file) {
            updated.unwrap();
            assert_eq!(pod.cgroup_file("c", file).as_deref(), Some(expected), "{resources}");
        } else {
            assert_eq!(status(updated).0, Code::INVALID_ARGUMENT, "{resources}");
        }
        pod.kill("c", "", libc::SIGKILL, false).await.unwrap();
        pod.wait("c", "").await.unwrap();
        pod.delete("c", "").await.unwrap();
    }
    if has(&pod, "cpu") {
        // What is not named stays, and burst may go either way.
        for (cpu, max, burst) in [
            (json!({"quota": 20000, "period": 50000, "burst": 5000}), "20000 50000\n", "5000\n"),
            (json!({"quota": 30000}), "30000 50000\n", "5000\n"),
            (json!({"period": 60000}), "30000 60000\n", "5000\n"),
            (json!({"quota": 60000, "burst": 60000}), "60000 60000\n", "60000\n"),
            (json!({"quota": 2000, "burst": 1000}), "2000 60000\n", "1000\n"),
        ] {
            pod.update("probe", &json!({"cpu": cpu})).await.unwrap();
            assert_eq!(pod.cgroup_file("probe", "cpu.max").as_deref(), Some(max), "{cpu}");
            assert_eq!(pod.cgroup_file("probe", "cpu.max.burst").as_deref(), Some(burst), "{cpu}");
        }
    }
    if has(&pod, "memory") {
        let (code, message) =
            status(pod.update("probe", &json!({"memory": {"limit": 1, "checkBeforeUpdate": true}})).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(message.contains("linux.resources.memory.limit"), "{message}");
    }
}

#[tokio::test]
async fn an_update_that_is_refused_changes_nothing() {
    let pod = Pod::start().await;
    assert!(has(&pod, "hugetlb"), "every kernel that the tests run on has huge pages in cgroup v2");
    pod.start_sleeper("c").await;
    let page = |limit: u64| json!([{"pageSize": "2MB", "limit": limit}]);
    pod.update("c", &json!({"hugepageLimits": page(2097152)})).await.unwrap();
    let refused = json!({
        "hugepageLimits": page(4194304),
        "devices": [{"allow": true, "access": "rwm"}],
        "unified": {"hugetlb.3MB.max": "0"},
    });
    let (code, message) = status(pod.update("c", &refused).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("linux.resources.unified[\"hugetlb.3MB.max\"]"), "{message}");
    for file in ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"] {
        assert_eq!(pod.cgroup_file("c", file).as_deref(), Some("2097152\n"), "{file}");
    }
    let output = pod.run_exec("c", "e", &may_read_the_log(exec_shell(OPEN_KMSG))).await;
    assert_eq!(output.stdout, "", "{output:?}");
    // What the specification's reader refuses comes before anything is tried.
    let (code, message) =
        status(pod.update("c", &json!({"cpu": {"realtimePeriod": 1}, "hugepageLimits": page(0)})).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("linux.resources.cpu.realtimePeriod"), "{message}");
    assert_eq!(pod.cgroup_file("c", "hugetlb.2MB.max").as_deref(), Some("2097152\n"));
    assert_eq!(status(pod.update("c", &json!("words")).await).0, Code::INVALID_ARGUMENT);
}

/// The kernel's log wants a capability of its reader.
fn may_read_the_log(mut process: Value) -> Value {
    for set in ["bounding", "effective", "permitted"] {
        process["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_SYSLOG"));
    }
    process
}

/// Opens the kernel's log, which no container has by default, for reading and for writing.
const OPEN_KMSG: &str = "[ -c /tmp/kmsg ] || mknod /tmp/kmsg c 1 11; \
                         (: < /tmp/kmsg) && echo read; (: >> /tmp/kmsg) && echo write; (: <> /tmp/kmsg) && echo both";

#[tokio::test]
async fn devices_are_the_default_ones_and_the_allowed_ones() {
    let pod = Pod::start().await;
    let rule = |rules: Value| {
        let mut spec = shell(OPEN_KMSG);
        spec["process"] = may_read_the_log(spec["process"].take());
        spec["linux"]["resources"]["devices"] = rules;
        spec
    };
    let deny = json!({"allow": false, "access": "rwm"});
    let kmsg = |access: &str| json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": access});
    for (rules, expected) in [
        (json!([]), ""),
        (json!([deny]), ""),
        (json!([deny, kmsg("r")]), "read\n"),
        (json!([deny, kmsg("w")]), "write\n"),
        (json!([deny, kmsg("rw")]), "read\nwrite\nboth\n"),
        (json!([kmsg("rwm"), deny]), ""),
        (json!([deny, {"allow": true, "type": "c", "major": 1, "access": "rw"}]), "read\nwrite\nboth\n"),
        (json!([deny, {"allow": true, "type": "b", "access": "rw"}]), ""),
        (json!([{"allow": true, "access": "rwm"}]), "read\nwrite\nboth\n"),
        (
            json!([
                {"allow": true, "access": "rwm"},
                {"allow": false, "type": "c", "major": 1, "minor": 11, "access": "w"},
            ]),
            "read\n",
        ),
    ] {
        let output = pod.run(&rule(rules.clone())).await;
        assert_eq!(output.stdout, expected, "{rules}: {output:?}");
        // The kernel's answer to a refused open; a refused mknod would be told otherwise.
        assert!(!output.stderr.contains("mknod"), "{rules}: {output:?}");
        assert_eq!(
            output.stderr.matches("Operation not permitted").count(),
            3 - expected.lines().count(),
            "{output:?}"
        );
    }
    // Nothing that a container always has is lost by refusing everything.
    let mut spec =
        shell("cd /dev; for d in null zero full random urandom; do head -c 1 $d > /dev/null && echo $d; done");
    spec["linux"]["resources"]["devices"] = json!([deny]);
    assert_eq!(pod.run(&spec).await.stdout, "null\nzero\nfull\nrandom\nurandom\n");
    pod.assert_empty();
}

#[tokio::test]
async fn update_replaces_the_device_rules() {
    let pod = Pod::start().await;
    pod.start_sleeper("c").await;
    let deny = json!({"allow": false, "access": "rwm"});
    let kmsg = json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"});
    for (resources, expected) in [
        (json!({"devices": [deny, kmsg]}), "read\n"),
        (json!({"devices": []}), "read\n"),
        (json!({"devices": [{"allow": true, "access": "rwm"}]}), "read\nwrite\nboth\n"),
        (json!({"devices": [deny]}), ""),
    ] {
        pod.update("c", &resources).await.unwrap();
        let output = pod.run_exec("c", "e", &may_read_the_log(exec_shell(OPEN_KMSG))).await;
        assert_eq!(output.stdout, expected, "{resources}: {output:?}");
    }
}
