//! `linux.resources` of the specification as the host understands it: what a pod's machine is made of ([`size`]), which
//! limits its processes get on the host ([`crate::cgroup`]), and what is left for the agent ([`guest`]). Pure.
//!
//! The specification speaks cgroup v1, and beside it `unified` names files of cgroup v2: both say the same here, the
//! file wins as it does with runc.

pub mod cpus;
pub mod guest;
pub mod size;

use caisson_protos::weights;
use oci_spec::runtime::LinuxResources;

use cpus::CpuList;

/// A value that the host cannot use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct ResourceError {
    /// The specification's name of it.
    pub field: String,
    /// The value, and what is wrong with it.
    pub message: String,
}

impl ResourceError {
    pub(crate) fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

/// A limit: a number, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// As much as there is.
    Unlimited,
    /// This much.
    To(u64),
}

impl Limit {
    /// Negative is no limit.
    fn of(value: i64) -> Self {
        u64::try_from(value).map_or(Self::Unlimited, Self::To)
    }
}

/// The kernel's default period of cpu.max, microseconds (Documentation/admin-guide/cgroup-v2.rst).
pub const DEFAULT_PERIOD: u64 = 100_000;

/// Processor time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTime {
    /// Microseconds in each period.
    pub quota: Limit,
    /// Microseconds.
    pub period: u64,
}

/// What a container asks for of what the host also limits. None: nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// cpu.quota and cpu.period, or unified cpu.max.
    pub time: Option<CpuTime>,
    /// Microseconds that may be saved up.
    pub burst: Option<u64>,
    /// cpu.shares as a weight (1 to 10000), or unified cpu.weight.
    pub weight: Option<u64>,
    /// Only when nobody else wants the processor.
    pub idle: Option<bool>,
    /// Processors of the host.
    pub cpus: Option<CpuList>,
    /// NUMA nodes of the host.
    pub mems: Option<CpuList>,
    /// Bytes.
    pub memory: Option<Limit>,
    /// Bytes of swap alone.
    pub swap: Option<Limit>,
    /// Bytes that are the last to be taken away.
    pub reservation: Option<Limit>,
    /// Processes.
    pub pids: Option<Limit>,
    /// Lines for files of the io controller: file, line, the specification's field.
    pub io: Vec<(String, String, String)>,
}

/// Fields of blockIO that throttle a device: the word of io.max and the field's name.
const THROTTLES: [(&str, &str); 4] = [
    ("rbps", "throttleReadBpsDevice"),
    ("wbps", "throttleWriteBpsDevice"),
    ("riops", "throttleReadIOPSDevice"),
    ("wiops", "throttleWriteIOPSDevice"),
];

impl Asked {
    /// Reads it.
    ///
    /// # Errors
    /// [`ResourceError`] names the field whose value is none.
    pub fn of(resources: &LinuxResources) -> Result<Self, ResourceError> {
        let mut asked = Self::default();
        asked.read_cpu(resources)?;
        asked.read_memory(resources)?;
        // 0 is "not set", as runc has it.
        asked.pids = resources.pids().map(|pids| pids.limit()).filter(|limit| *limit != 0).map(Limit::of);
        asked.read_block_io(resources)?;
        asked.read_unified(resources)?;
        Ok(asked)
    }

    fn read_cpu(&mut self, resources: &LinuxResources) -> Result<(), ResourceError> {
        let Some(cpu) = resources.cpu() else { return Ok(()) };
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        if quota.is_some() || period.is_some() {
            let quota = quota.map_or(Limit::Unlimited, Limit::of);
            self.time = Some(CpuTime { quota, period: period.unwrap_or(DEFAULT_PERIOD) });
        }
        self.burst = cpu.burst().filter(|burst| *burst != 0);
        self.weight = cpu.shares().filter(|shares| *shares != 0).map(weights::cpu);
        self.idle = cpu.idle().map(|idle| idle != 0);
        let list = |field: &str, text: &Option<String>| {
            let text = text.as_deref().filter(|text| !text.trim().is_empty());
            text.map(|text| CpuList::parse(&format!("linux.resources.cpu.{field}"), text)).transpose()
        };
        self.cpus = list("cpus", cpu.cpus())?;
        self.mems = list("mems", cpu.mems())?;
        Ok(())
    }

    fn read_memory(&mut self, resources: &LinuxResources) -> Result<(), ResourceError> {
        let Some(memory) = resources.memory() else { return Ok(()) };
        self.memory = memory.limit().filter(|limit| *limit != 0).map(Limit::of);
        self.reservation = memory.reservation().filter(|low| *low != 0).map(Limit::of);
        // The specification's swap is memory and swap together; v2 counts swap alone.
        self.swap = match (memory.swap().filter(|swap| *swap != 0).map(Limit::of), self.memory) {
            (None, _) => None,
            (Some(Limit::Unlimited), _) => Some(Limit::Unlimited),
            (Some(Limit::To(both)), Some(Limit::To(limit))) if both >= limit => Some(Limit::To(both - limit)),
            (Some(Limit::To(both)), limit) => {
                let limit = match limit {
                    Some(Limit::To(limit)) => format!("a limit of {limit}"),
                    _ => "no limit".into(),
                };
                let message = format!("{both} bytes (memory and swap together) does not go with {limit}");
                return Err(ResourceError::new("linux.resources.memory.swap", message));
            }
        };
        Ok(())
    }

    fn read_block_io(&mut self, resources: &LinuxResources) -> Result<(), ResourceError> {
        let Some(block) = resources.block_io() else { return Ok(()) };
        let field = |name: &str| format!("linux.resources.blockIO.{name}");
        let leaf = block.leaf_weight().filter(|weight| *weight != 0).map(|weight| ("leafWeight", weight));
        let mut leaves = block.weight_device().iter().flatten().filter_map(|device| device.leaf_weight());
        if let Some((name, weight)) = leaf.or_else(|| leaves.next().map(|weight| ("weightDevice.leafWeight", weight))) {
            let message = format!("{weight}: cgroup v2 has no such weight; remove it");
            return Err(ResourceError::new(field(name), message));
        }
        let mut add = |file: &str, line: String, name: &str| self.io.push((file.to_owned(), line, field(name)));
        if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
            add("io.weight", format!("default {}", weights::io(weight)), "weight");
        }
        for device in block.weight_device().iter().flatten() {
            if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
                let line = format!("{}:{} {}", device.major(), device.minor(), weights::io(weight));
                add("io.weight", line, "weightDevice");
            }
        }
        let lists = [
            block.throttle_read_bps_device(),
            block.throttle_write_bps_device(),
            block.throttle_read_iops_device(),
            block.throttle_write_iops_device(),
        ];
        for ((word, name), list) in THROTTLES.into_iter().zip(lists) {
            for device in list.iter().flatten() {
                // As with runc, 0 takes a limit away.
                let rate = if device.rate() == 0 { "max".into() } else { device.rate().to_string() };
                add("io.max", format!("{}:{} {word}={rate}", device.major(), device.minor()), name);
            }
        }
        Ok(())
    }

    fn read_unified(&mut self, resources: &LinuxResources) -> Result<(), ResourceError> {
        let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
        // A map has no order, and messages should not change from run to run.
        unified.sort();
        for (file, value) in unified {
            let field = format!("linux.resources.unified[{file:?}]");
            let wrong = || ResourceError::new(&field, format!("{value:?} is no value of this file"));
            let text = value.trim();
            let limit = || if text == "max" { Ok(Limit::Unlimited) } else { text.parse().map(Limit::To) };
            match file.as_str() {
                "cpu.max" => self.time = Some(cpu_max(text, self.time).ok_or_else(wrong)?),
                "cpu.max.burst" => self.burst = Some(text.parse().map_err(|_| wrong())?),
                "cpu.weight" => self.weight = Some(text.parse().map_err(|_| wrong())?),
                "cpu.idle" => self.idle = Some(text != "0"),
                "cpuset.cpus" if !text.is_empty() => self.cpus = Some(CpuList::parse(&field, text)?),
                "cpuset.mems" if !text.is_empty() => self.mems = Some(CpuList::parse(&field, text)?),
                "memory.max" => self.memory = Some(limit().map_err(|_| wrong())?),
                "memory.swap.max" => self.swap = Some(limit().map_err(|_| wrong())?),
                "memory.low" => self.reservation = Some(limit().map_err(|_| wrong())?),
                "pids.max" => self.pids = Some(limit().map_err(|_| wrong())?),
                // Devices are the host's.
                file if is_io_file(file) => {
                    let lines = value.lines().map(|line| (file.to_owned(), line.to_owned(), field.clone()));
                    self.io.extend(lines);
                }
                // The guest's.
                _ => {}
            }
        }
        Ok(())
    }
}

/// Whether a file of `unified` is about block devices, which are the host's; and nothing but a file's name.
pub(crate) fn is_io_file(file: &str) -> bool {
    file.strip_prefix("io.").is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'.'))
}

/// `QUOTA [PERIOD]` as cpu.max takes it; without a period the one that there is.
fn cpu_max(text: &str, now: Option<CpuTime>) -> Option<CpuTime> {
    let mut words = text.split_whitespace();
    let quota = match words.next()? {
        "max" => Limit::Unlimited,
        number => Limit::To(number.parse().ok()?),
    };
    let period = match words.next() {
        Some(number) => number.parse().ok().filter(|period| *period > 0)?,
        None => now.map_or(DEFAULT_PERIOD, |now| now.period),
    };
    words.next().is_none().then_some(CpuTime { quota, period })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    pub(crate) fn asked(json: serde_json::Value) -> Result<Asked, ResourceError> {
        Asked::of(&serde_json::from_value(json).unwrap())
    }

    #[test]
    fn both_languages_say_the_same_and_the_file_wins() {
        let old = asked(json!({
            "cpu": { "quota": 150_000, "period": 50_000, "shares": 1024, "cpus": "0-2", "mems": "0" },
            "memory": { "limit": 1000, "swap": 1500, "reservation": 10 },
            "pids": { "limit": 7 },
        }))
        .unwrap();
        let new = asked(json!({
            "cpu": { "quota": 5, "shares": 2 },
            "unified": {
                "cpu.max": "150000 50000", "cpu.weight": "39", "cpuset.cpus": "0,1-2", "cpuset.mems": "0",
                "memory.max": "1000", "memory.swap.max": "500", "memory.low": "10", "pids.max": "7", "memory.high": "9",
            },
        }))
        .unwrap();
        assert_eq!(old, new);
        assert_eq!(old.time, Some(CpuTime { quota: Limit::To(150_000), period: 50_000 }));
        assert_eq!(old.swap, Some(Limit::To(500)));
    }

    #[test]
    fn zero_says_nothing_and_negative_is_no_limit() {
        let nothing = json!({ "cpu": { "quota": 0, "shares": 0, "cpus": "" }, "memory": { "limit": 0, "swap": 0 }, "pids": { "limit": 0 } });
        assert_eq!(asked(nothing).unwrap(), Asked::default());
        let unlimited = asked(json!({ "cpu": { "quota": -1 }, "memory": { "limit": -1, "swap": -1 } })).unwrap();
        assert_eq!(unlimited.time, Some(CpuTime { quota: Limit::Unlimited, period: DEFAULT_PERIOD }));
        assert_eq!((unlimited.memory, unlimited.swap), (Some(Limit::Unlimited), Some(Limit::Unlimited)));
    }

    #[test]
    fn values_that_are_none_are_refused_by_name() {
        for (json, field) in [
            (json!({ "memory": { "limit": 1000, "swap": 999 } }), "linux.resources.memory.swap"),
            (json!({ "memory": { "swap": 999 } }), "linux.resources.memory.swap"),
            (json!({ "cpu": { "cpus": "0-" } }), "linux.resources.cpu.cpus"),
            (json!({ "cpu": { "mems": "x" } }), "linux.resources.cpu.mems"),
            (json!({ "unified": { "cpu.max": "1 0" } }), "linux.resources.unified[\"cpu.max\"]"),
            (json!({ "unified": { "memory.max": "much" } }), "linux.resources.unified[\"memory.max\"]"),
            (json!({ "blockIO": { "leafWeight": 10 } }), "linux.resources.blockIO.leafWeight"),
            (
                json!({ "blockIO": { "weightDevice": [{ "major": 8, "minor": 0, "leafWeight": 7 }] } }),
                "linux.resources.blockIO.weightDevice.leafWeight",
            ),
        ] {
            assert_eq!(asked(json).unwrap_err().field, field);
        }
    }

    #[test]
    fn block_devices_are_the_hosts() {
        let asked = asked(json!({ "blockIO": {
            "weight": 1000,
            "weightDevice": [{ "major": 8, "minor": 0, "weight": 10 }],
            "throttleWriteBpsDevice": [{ "major": 8, "minor": 0, "rate": 4096 }, { "major": 8, "minor": 1, "rate": 0 }],
        }, "unified": { "io.latency": "8:0 target=1\n8:1 target=2", "io.../x": "1" } }))
        .unwrap();
        let lines: Vec<_> = asked.io.iter().map(|(file, line, _)| format!("{file} {line}")).collect();
        let expected = [
            "io.weight default 10000",
            "io.weight 8:0 1",
            "io.max 8:0 wbps=4096",
            "io.max 8:1 wbps=max",
            "io.latency 8:0 target=1",
            "io.latency 8:1 target=2",
        ];
        assert_eq!(lines, expected);
    }

    proptest! {
        #[test]
        fn any_numbers_are_read_or_refused(
            quota: Option<i64>, period: Option<u64>, shares: Option<u64>, limit: Option<i64>, swap: Option<i64>,
            file in "(cpu|cpuset|memory|io|pids)\\.[a-z.]{1,8}", value in ".{0,12}",
        ) {
            let read = asked(json!({
                "cpu": { "quota": quota, "period": period, "shares": shares },
                "memory": { "limit": limit, "swap": swap },
                "unified": { file: value },
            }));
            if let Ok(Asked { weight: Some(weight), .. }) = read && shares.is_some_and(|shares| shares > 0) {
                prop_assert!(weight > 0);
            }
        }
    }
}
