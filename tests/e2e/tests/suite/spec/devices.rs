//! Device nodes and the rules of the device cgroup.

use caisson_e2e::{
    Host,
    spec::{Given, holds},
};
use caisson_e2e_probe::{Access, Outcome};
use serde_json::json;

caisson_e2e::for_each_runtime!(device_nodes_and_rules);

const DENIED: Outcome = Outcome::Refused(libc::EPERM);

fn device_nodes_and_rules(host: &Host) {
    // Kernel messages are for those with CAP_SYSLOG.
    let new = |name| {
        let sets = ["bounding", "effective", "permitted"];
        let given = Given::new(host, name);
        sets.iter().fold(given, |given, set| given.push(&format!("/process/capabilities/{set}"), json!("CAP_SYSLOG")))
    };
    let given = new("devices")
        .set(
            "/linux/devices",
            json!([
                { "path": "/dev/own", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 5, "gid": 6 },
                { "path": "/dev/deep/er", "type": "c", "major": 1, "minor": 5 },
                { "path": "/dev/pipe", "type": "p", "fileMode": 0o600 },
            ]),
        )
        .push("/linux/resources/devices", json!({ "allow": true, "type": "c", "major": 1, "minor": 11, "access": "r" }))
        .ask(&["node=c:1:3", "node=c:1:8", "node=c:1:1", "node=c:1:4", "node=c:1:11", "node=b:7:0", "node=c:10:229"]);
    let (spec, report) = given.report();
    let access = |read, write| Access { made: Outcome::Done, read, write };
    for usual in ["c:1:3", "c:1:8"] {
        assert_eq!(report.nodes[usual], access(Outcome::Done, Outcome::Done), "{usual}");
    }
    // Nodes may be made, as always; it is their use that is denied.
    for denied in ["c:1:1", "c:1:4", "b:7:0", "c:10:229"] {
        assert_eq!(report.nodes[denied], access(DENIED, DENIED), "{denied}");
    }
    assert_eq!(report.nodes["c:1:11"], access(Outcome::Done, DENIED), "for reading only");
    holds(&spec, &report);

    // Everything, then one thing less; the rules' order counts.
    let rules = json!([
        { "allow": true, "access": "rwm" },
        { "allow": false, "type": "c", "major": 1, "minor": 11, "access": "w" },
    ]);
    let given = new("all-but-one").set("/linux/resources/devices", rules);
    let (spec, report) = given.ask(&["node=c:1:11", "node=c:1:3"]).report();
    assert_eq!(report.nodes["c:1:11"], access(Outcome::Done, DENIED));
    assert_eq!(report.nodes["c:1:3"], access(Outcome::Done, Outcome::Done));
    holds(&spec, &report);
}
