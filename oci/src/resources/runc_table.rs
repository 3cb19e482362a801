//! What runc (1.1 and, for burst, idle and reserved huge pages, 1.2: libcontainer/cgroups/fs2 and update.go) writes for
//! which `linux.resources`, on a kernel with all controllers. The tests of this crate, of the shim and of the agent hold
//! what they write against it.

use std::collections::BTreeMap;

use super::{Need, Setting};

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// `linux.resources`, JSON.
    pub resources: &'static str,
    /// cpu.max before, as the container has it.
    pub cpu_max: &'static str,
    /// Whether the kernel has the BFQ scheduler.
    pub bfq: bool,
    /// File and value; None if runc or the kernel refuses it.
    pub written: Option<&'static [(&'static str, &'static str)]>,
}

const NEW: &str = "max 100000";

const fn case(resources: &'static str, written: &'static [(&'static str, &'static str)]) -> Case {
    Case { resources, cpu_max: NEW, bfq: false, written: Some(written) }
}

const fn refused(resources: &'static str) -> Case {
    Case { resources, cpu_max: NEW, bfq: false, written: None }
}

const fn update(
    resources: &'static str,
    cpu_max: &'static str,
    written: &'static [(&'static str, &'static str)],
) -> Case {
    Case { resources, cpu_max, bfq: false, written: Some(written) }
}

const fn bfq(resources: &'static str, written: &'static [(&'static str, &'static str)]) -> Case {
    Case { resources, cpu_max: NEW, bfq: true, written: Some(written) }
}

/// The table.
pub const CASES: &[Case] = &[
    case("{}", &[]),
    case(r#"{"cpu": {"quota": 0, "period": 0, "shares": 0, "cpus": "", "mems": ""}}"#, &[]),
    case(r#"{"memory": {"limit": 0, "reservation": 0, "swap": 0}, "pids": {"limit": 0}}"#, &[]),
    case(r#"{"blockIO": {"weight": 0}, "network": {}}"#, &[]),
    // Processor time: of quota and period the one that is not named stays.
    case(r#"{"cpu": {"quota": 50000, "period": 200000}}"#, &[("cpu.max", "50000 200000")]),
    case(r#"{"cpu": {"quota": 50000}}"#, &[("cpu.max", "50000 100000")]),
    case(r#"{"cpu": {"period": 200000}}"#, &[("cpu.max", "max 200000")]),
    case(r#"{"cpu": {"quota": -1}}"#, &[("cpu.max", "max 100000")]),
    update(r#"{"cpu": {"period": 60000}}"#, "20000 50000", &[("cpu.max", "20000 60000")]),
    update(r#"{"cpu": {"quota": 30000}}"#, "20000 50000", &[("cpu.max", "30000 50000")]),
    update(r#"{"cpu": {"quota": -1}}"#, "20000 50000", &[("cpu.max", "max 50000")]),
    update(r#"{"cpu": {"quota": 1000, "period": 2000}}"#, "20000 50000", &[("cpu.max", "1000 2000")]),
    update(r#"{"cpu": {"shares": 1024}}"#, "20000 50000", &[("cpu.weight", "39")]),
    update(r#"{"unified": {"cpu.max": "30000"}}"#, "20000 50000", &[("cpu.max", "30000 50000")]),
    // Bursts, 0 included.
    case(r#"{"cpu": {"quota": 50000, "burst": 1000}}"#, &[("cpu.max", "50000 100000"), ("cpu.max.burst", "1000")]),
    update(r#"{"cpu": {"burst": 0}}"#, "20000 50000", &[("cpu.max.burst", "0")]),
    update(
        r#"{"cpu": {"burst": 0, "quota": 1000}}"#,
        "20000 50000",
        &[("cpu.max", "1000 50000"), ("cpu.max.burst", "0")],
    ),
    // Weights.
    case(r#"{"cpu": {"shares": 2}}"#, &[("cpu.weight", "1")]),
    case(r#"{"cpu": {"shares": 262144}}"#, &[("cpu.weight", "10000")]),
    case(r#"{"cpu": {"idle": 0, "shares": 1024}}"#, &[("cpu.idle", "0"), ("cpu.weight", "39")]),
    case(r#"{"cpu": {"idle": 1}}"#, &[("cpu.idle", "1")]),
    refused(r#"{"cpu": {"idle": 2}}"#),
    case(r#"{"cpu": {"cpus": "0-1", "mems": "0"}}"#, &[("cpuset.cpus", "0-1"), ("cpuset.mems", "0")]),
    // Memory; swap is counted alone.
    case(r#"{"memory": {"limit": 1000}}"#, &[("memory.max", "1000")]),
    case(r#"{"memory": {"limit": -1}}"#, &[("memory.max", "max"), ("memory.swap.max", "max")]),
    case(r#"{"memory": {"limit": -1, "swap": -1}}"#, &[("memory.max", "max"), ("memory.swap.max", "max")]),
    case(r#"{"memory": {"limit": 1000, "swap": 1500}}"#, &[("memory.max", "1000"), ("memory.swap.max", "500")]),
    case(r#"{"memory": {"limit": 1000, "swap": 1000}}"#, &[("memory.max", "1000"), ("memory.swap.max", "0")]),
    case(r#"{"memory": {"limit": 1000, "swap": -1}}"#, &[("memory.max", "1000"), ("memory.swap.max", "max")]),
    case(r#"{"memory": {"swap": -1}}"#, &[("memory.swap.max", "max")]),
    case(r#"{"memory": {"reservation": 500}}"#, &[("memory.low", "500")]),
    case(r#"{"memory": {"reservation": -1}}"#, &[("memory.low", "max")]),
    refused(r#"{"memory": {"limit": 1000, "swap": 999}}"#),
    refused(r#"{"memory": {"limit": 1000, "swap": -2}}"#),
    refused(r#"{"memory": {"swap": 999}}"#),
    refused(r#"{"memory": {"limit": -1, "swap": 999}}"#),
    refused(r#"{"memory": {"limit": -2}}"#),
    case(
        r#"{"unified": {"memory.max": "1048576", "memory.high": "1G"}}"#,
        &[("memory.high", "1G"), ("memory.max", "1048576")],
    ),
    // Processes.
    case(r#"{"pids": {"limit": 42}}"#, &[("pids.max", "42")]),
    case(r#"{"pids": {"limit": -1}}"#, &[("pids.max", "max")]),
    refused(r#"{"pids": {"limit": -2}}"#),
    // Block devices.
    case(r#"{"blockIO": {"weight": 10}}"#, &[("io.weight", "1")]),
    case(r#"{"blockIO": {"weight": 500}}"#, &[("io.weight", "4950")]),
    case(r#"{"blockIO": {"weight": 1000}}"#, &[("io.weight", "10000")]),
    bfq(r#"{"blockIO": {"weight": 10}}"#, &[("io.bfq.weight", "10")]),
    bfq(r#"{"blockIO": {"weight": 1000}}"#, &[("io.bfq.weight", "1000")]),
    bfq(
        r#"{"blockIO": {"weightDevice": [{"major": 8, "minor": 16, "weight": 300}]}}"#,
        &[("io.bfq.weight", "8:16 300")],
    ),
    refused(r#"{"blockIO": {"weight": 9}}"#),
    refused(r#"{"blockIO": {"weight": 1001}}"#),
    case(
        r#"{"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}]}}"#,
        &[("io.max", "8:0 rbps=1000")],
    ),
    case(
        r#"{"blockIO": {"throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 30}]}}"#,
        &[("io.max", "8:0 wiops=30")],
    ),
    // Huge pages and RDMA, which a pod has in its guest only.
    case(
        r#"{"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}"#,
        &[("hugetlb.2MB.max", "4194304"), ("hugetlb.2MB.rsvd.max", "4194304")],
    ),
    case(
        r#"{"rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}}}"#,
        &[("rdma.max", "mlx5_1 hca_handle=3 hca_object=10000")],
    ),
];

/// What a kernel with all controllers holds after these settings: the last value of each file.
pub fn effect(settings: &[Setting], bfq: bool) -> BTreeMap<String, String> {
    let settings = settings.iter().filter(|setting| setting.need != Need::Try);
    let exists = |file: &str| bfq || file != "io.bfq.weight";
    settings.filter_map(|setting| setting.choices.iter().find(|(file, _)| exists(file)).cloned()).collect()
}

impl Case {
    /// What runc writes; None if it is refused.
    pub fn expected(&self) -> Option<BTreeMap<String, String>> {
        let pairs = self.written?.iter();
        Some(pairs.map(|(file, value)| ((*file).to_owned(), (*value).to_owned())).collect())
    }
}
