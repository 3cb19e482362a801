//! A user namespace of the container's own.

use std::os::unix::fs::chown;

use caisson_e2e::{
    Host,
    spec::{Given, holds},
};
use caisson_e2e_probe::{Look, Outcome};
use serde_json::json;

caisson_e2e::for_each_runtime!(a_user_namespace);

const OUTSIDE: u32 = 100_000;

fn a_user_namespace(host: &Host) {
    let given = Given::new(host, "userns");
    for name in ["", "etc", "tmp", "bin", "bin/probe"] {
        chown(given.root.join(name), Some(OUTSIDE), Some(OUTSIDE)).expect("root may do so");
    }
    std::fs::write(given.root.join("etc/roots"), "").expect("the test's directory takes files");
    let map = json!([{ "containerID": 0, "hostID": OUTSIDE, "size": 65536 }]);
    let given = given
        .push("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map)
        .ask(&[
            "look=/bin/probe",
            "look=/etc/roots",
            "write=/etc",
            "write=/etc/roots",
            "write=/proc/sys/kernel/hostname",
        ])
        .ask(&["node=c:1:3"]);
    let (spec, report) = given.report();
    holds(&spec, &report);
    let owner = |path: &str| match report.looks[path] {
        Look::File { owner, .. } => owner,
        ref other => panic!("{path}: {other:?}"),
    };
    assert_eq!(owner("/bin/probe"), (0, 0));
    // The host's root is nobody here.
    assert_eq!(owner("/etc/roots"), (65534, 65534));
    assert_eq!(report.writes["/etc"], Outcome::Done);
    assert_eq!(report.writes["/etc/roots"], Outcome::Refused(libc::EACCES));
    assert_eq!(report.nodes["c:1:3"].made, Outcome::Refused(libc::EPERM), "a device node in a user namespace");
}
