//! `linux.resources`: the container's own cgroup files.

use caisson_e2e::{
    Host,
    spec::{Given, holds},
};
use serde_json::json;

caisson_e2e::for_each_runtime!(resources);

const MIB: u64 = 1024 * 1024;

fn resources(host: &Host) {
    let given = Given::new(host, "limits")
        .set("/linux/resources/memory", json!({ "limit": 64 * MIB, "reservation": 32 * MIB, "swap": 96 * MIB }))
        .set("/linux/resources/pids", json!({ "limit": 123 }))
        .set(
            "/linux/resources/cpu",
            json!({ "shares": 512, "quota": 50_000, "period": 200_000, "cpus": "0", "mems": "0" }),
        )
        .set("/linux/resources/unified", json!({ "memory.high": (48 * MIB).to_string(), "memory.oom.group": "1" }));
    let (spec, report) = given.report();
    holds(&spec, &report);
    assert_eq!(report.process.processors, "0");

    let given = Given::new(host, "no-limits")
        .set("/linux/resources/memory", json!({ "limit": -1, "swap": -1 }))
        .set("/linux/resources/pids", json!({ "limit": -1 }))
        .set("/linux/resources/cpu", json!({ "quota": -1, "shares": 1024 }));
    let (spec, report) = given.report();
    holds(&spec, &report);
}
