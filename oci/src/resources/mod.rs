//! `linux.resources` as typed limits of cgroup v2.
//!
//! The specification has cgroup v1's units, and beside them `unified` names files of cgroup v2. Both are read into the
//! same limits; where they name the same, the file wins, as with runc. The conversions are those that runc documents in
//! docs/cgroup-v2.md. What runc drops without a word on cgroup v2 is refused where somebody could rely on it, and noted
//! where nobody can.
//!
//! ```text
//!   linux.resources ── read.rs, io.rs ──► Limits ── settings.rs ──► Settings ── write.rs ──► the cgroup's files
//!                                           │ shim: the pod's overhead added
//! ```

mod io;
mod read;
#[cfg(any(test, feature = "runc-table"))]
pub mod runc_table;
mod settings;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::cpus::CpuList;
pub use io::{IoLimit, is_io_file};

/// A limit: a number, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// As much as there is.
    Unlimited,
    /// This much.
    To(u64),
}

impl fmt::Display for Limit {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => to.write_str("max"),
            Self::To(number) => write!(to, "{number}"),
        }
    }
}

/// Processor time, as cpu.max has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTime {
    /// Microseconds in each period.
    pub quota: Limit,
    /// Microseconds.
    pub period: u64,
}

impl CpuTime {
    /// What a new cgroup has: Documentation/admin-guide/cgroup-v2.rst.
    pub const DEFAULT: Self = Self { quota: Limit::Unlimited, period: 100_000 };

    /// Reads the text of a file cpu.max. One that cannot be read (there is no such controller) says the default.
    pub fn of_file(text: &str) -> Self {
        let named = CpuTimeChange::parse(text).unwrap_or_default();
        named.over(Self::DEFAULT)
    }
}

impl fmt::Display for CpuTime {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} {}", self.quota, self.period)
    }
}

/// Quota and period share a file; the one that is not named stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTimeChange {
    /// Microseconds in each period.
    pub quota: Option<Limit>,
    /// Microseconds.
    pub period: Option<u64>,
}

impl CpuTimeChange {
    /// `QUOTA [PERIOD]` as cpu.max takes it.
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let quota = match words.next()? {
            "max" => Limit::Unlimited,
            number => Limit::To(number.parse().ok()?),
        };
        let period = match words.next() {
            Some(number) => Some(number.parse().ok().filter(|period| *period > 0)?),
            None => None,
        };
        words.next().is_none().then_some(Self { quota: Some(quota), period })
    }

    fn over(self, present: CpuTime) -> CpuTime {
        CpuTime { quota: self.quota.unwrap_or(present.quota), period: self.period.unwrap_or(present.period) }
    }
}

/// What a container's limits are, or become. None: nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Processes.
    pub pids: Option<Limit>,
    /// Bytes.
    pub memory: Option<Limit>,
    /// Bytes of swap alone.
    pub swap: Option<Limit>,
    /// Bytes that are the last to be reclaimed.
    pub reservation: Option<Limit>,
    /// Whether a limit below what is used is refused.
    pub check_before_update: bool,
    /// Settings of block devices, in their order.
    pub io: Vec<IoLimit>,
    /// Only when nobody else wants the processor.
    pub idle: Option<bool>,
    /// 1 to 10000.
    pub weight: Option<u64>,
    /// Processor time.
    pub time: CpuTimeChange,
    /// Microseconds of unused time that may be saved up.
    pub burst: Option<u64>,
    /// Processors.
    pub cpus: Option<CpuList>,
    /// NUMA nodes.
    pub mems: Option<CpuList>,
    /// Page size (`2MB`) and bytes, with the specification's field.
    pub huge_pages: Vec<(String, Limit, String)>,
    /// Lines for rdma.max, with the specification's field.
    pub rdma: Vec<(String, String)>,
    /// Other files of `unified`.
    pub files: BTreeMap<String, String>,
    /// What has no effect, for the log.
    pub notes: Vec<String>,
    /// Files whose value `unified` has named, for messages.
    unified: BTreeSet<String>,
}

impl Limits {
    /// The container's whole processor time in a cgroup that has `present`; None if it is not to change.
    pub fn time_over(&self, present: CpuTime) -> Option<CpuTime> {
        (self.time != CpuTimeChange::default()).then(|| self.time.over(present))
    }
}

/// What the refusal of a setting means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// An error.
    Must,
    /// Nothing, if the kernel has none of the files.
    IfThere,
    /// Nothing: the same is written once more, later.
    Try,
}

/// One value for one file of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// A file in the cgroup's directory and what to write to it; of several the first one that exists.
    pub choices: Vec<(String, String)>,
    /// The field that asked for it, for messages.
    pub field: String,
    /// Whether it can be done without.
    pub need: Need,
}

impl Setting {
    /// A value that must be taken.
    pub fn new(file: impl Into<String>, value: impl Into<String>, field: impl Into<String>) -> Self {
        Self { choices: vec![(file.into(), value.into())], field: field.into(), need: Need::Must }
    }

    /// The file's controller, `memory` for memory.max.
    pub fn controller(&self) -> &str {
        self.choices.first().and_then(|(file, _)| file.split('.').next()).unwrap_or_default()
    }
}
