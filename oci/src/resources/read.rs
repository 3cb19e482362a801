//! From `linux.resources` to limits: processors, memory, processes, huge pages, RDMA, and `unified`.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::{CpuTimeChange, Limit, Limits, io, is_io_file};
use crate::{FieldError, cpus::CpuList, weights};

type Result<T> = std::result::Result<T, FieldError>;

/// Files whose names begin like this belong to the cgroup itself. They move, stop and kill processes, or make the
/// cgroup one that can hold none; only these are limits.
const CGROUP_LIMITS: [&str; 2] = ["cgroup.max.depth", "cgroup.max.descendants"];

impl Limits {
    /// Reads a `linux.resources` object, but for its device rules.
    ///
    /// # Errors
    /// The first field that cannot be honoured.
    pub fn of(resources: &LinuxResources) -> Result<Self> {
        if resources.network().as_ref().is_some_and(|network| *network != Default::default()) {
            return Err(FieldError::new("linux.resources.network", "cgroup v2 has no such limit; remove it"));
        }
        let mut limits = Self::default();
        if let Some(pids) = resources.pids() {
            limits.pids = limit("linux.resources.pids.limit", Some(pids.limit()))?;
        }
        if let Some(memory) = resources.memory() {
            limits.read_memory(memory)?;
        }
        if let Some(block) = resources.block_io() {
            io::read(block, &mut limits.io)?;
        }
        if let Some(cpu) = resources.cpu() {
            limits.read_cpu(cpu)?;
        }
        limits.read_huge_pages(resources)?;
        limits.read_rdma(resources)?;
        limits.read_unified(resources)?;
        if limits.idle == Some(true) && limits.weight.take().is_some() {
            // The kernel takes no weight for an idle cgroup.
            limits.notes.push("linux.resources.cpu.shares has no effect: an idle cgroup has the least weight".into());
        }
        Ok(limits)
    }

    fn read_memory(&mut self, memory: &LinuxMemory) -> Result<()> {
        for (field, set, why) in [
            ("kernel", memory.kernel().is_some_and(|value| value != 0), "counts it in memory.max"),
            ("kernelTCP", memory.kernel_tcp().is_some_and(|value| value != 0), "counts it in memory.max"),
            ("swappiness", memory.swappiness().is_some(), "has it for the whole machine only"),
            ("disableOOMKiller", memory.disable_oom_killer() == Some(true), "always kills when memory runs out"),
            ("useHierarchy", memory.use_hierarchy() == Some(false), "always counts what is below"),
        ] {
            if set {
                let note = format!("linux.resources.memory.{field} has no effect, as with runc: cgroup v2 {why}");
                self.notes.push(note);
            }
        }
        self.memory = limit("linux.resources.memory.limit", memory.limit())?;
        self.reservation = limit("linux.resources.memory.reservation", memory.reservation())?;
        self.swap = swap(self.memory, memory.swap())?;
        self.check_before_update = memory.check_before_update() == Some(true);
        Ok(())
    }

    fn read_cpu(&mut self, cpu: &LinuxCpu) -> Result<()> {
        for (field, set) in [
            ("realtimeRuntime", cpu.realtime_runtime().is_some_and(|value| value != 0)),
            ("realtimePeriod", cpu.realtime_period().is_some_and(|value| value != 0)),
        ] {
            if set {
                let problem = "cgroup v2 divides no realtime among groups; remove it";
                return Err(FieldError::new(format!("linux.resources.cpu.{field}"), problem));
            }
        }
        self.idle = match cpu.idle() {
            None => None,
            Some(idle @ (0 | 1)) => Some(idle == 1),
            Some(other) => {
                return Err(FieldError::new("linux.resources.cpu.idle", format!("{other} is neither 0 nor 1")));
            }
        };
        self.weight = cpu.shares().filter(|shares| *shares != 0).map(weights::cpu);
        // Of a quota every negative number is no limit; 0 is "not set".
        let quota = cpu.quota().filter(|quota| *quota != 0);
        self.time = CpuTimeChange {
            quota: quota.map(|quota| u64::try_from(quota).map_or(Limit::Unlimited, Limit::To)),
            period: cpu.period().filter(|period| *period != 0),
        };
        // 0 takes what was saved up away.
        self.burst = cpu.burst();
        self.cpus = list("linux.resources.cpu.cpus", cpu.cpus().as_deref())?;
        self.mems = list("linux.resources.cpu.mems", cpu.mems().as_deref())?;
        Ok(())
    }

    fn read_huge_pages(&mut self, resources: &LinuxResources) -> Result<()> {
        for (index, page) in resources.hugepage_limits().iter().flatten().enumerate() {
            let field = format!("linux.resources.hugepageLimits[{index}]");
            let size = page.page_size();
            if size.is_empty() || !size.chars().all(|letter| letter.is_ascii_alphanumeric()) {
                let problem = format!("{size:?} is no size such as 2MB or 1GB");
                return Err(FieldError::new(format!("{field}.pageSize"), problem));
            }
            // 0 is a limit here.
            let limit = u64::try_from(page.limit()).map_or(Limit::Unlimited, Limit::To);
            self.huge_pages.push((size.clone(), limit, format!("{field}.limit")));
        }
        Ok(())
    }

    fn read_rdma(&mut self, resources: &LinuxResources) -> Result<()> {
        let mut rdma: Vec<_> = resources.rdma().iter().flatten().collect();
        // A map has no order, and messages should not change from run to run.
        rdma.sort_by_key(|(device, _)| *device);
        for (device, limit) in rdma {
            let field = format!("linux.resources.rdma[{device:?}]");
            if device.is_empty() || device.contains(|c: char| c.is_whitespace() || c == '\0') {
                return Err(FieldError::new(field, "is no device's name"));
            }
            let numbers = [("hca_handle", limit.hca_handles()), ("hca_object", limit.hca_objects())];
            let set: String =
                numbers.iter().filter_map(|(key, value)| value.map(|value| format!(" {key}={value}"))).collect();
            if set.is_empty() {
                return Err(FieldError::new(field, "names neither hcaHandles nor hcaObjects"));
            }
            self.rdma.push((format!("{device}{set}"), field));
        }
        Ok(())
    }

    fn read_unified(&mut self, resources: &LinuxResources) -> Result<()> {
        let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
        unified.sort();
        for (file, value) in unified {
            let field = unified_field(file);
            let controller = file.split_once('.').map(|(controller, _)| controller).unwrap_or_default();
            if controller.is_empty() || file.contains('/') || file.contains('\0') {
                return Err(FieldError::new(field, "is not the name of a cgroup file, as memory.high"));
            }
            if controller == "cgroup" && !CGROUP_LIMITS.contains(&file.as_str()) {
                return Err(FieldError::new(field, "is no limit: it is for the runtime to write"));
            }
            let wrong = || FieldError::new(&field, format!("{value:?} is no value of this file"));
            let text = value.trim();
            match file.as_str() {
                "cpu.max" => {
                    let named = CpuTimeChange::parse(text).ok_or_else(wrong)?;
                    self.time = CpuTimeChange { period: named.period.or(self.time.period), ..named };
                }
                "cpu.max.burst" => self.burst = Some(text.parse().map_err(|_| wrong())?),
                "cpu.weight" => {
                    let weight = text.parse().ok().filter(|weight| (1..=10_000).contains(weight));
                    self.weight = Some(weight.ok_or_else(wrong)?);
                }
                "cpu.idle" => {
                    self.idle = Some(match text {
                        "0" => false,
                        "1" => true,
                        _ => return Err(wrong()),
                    });
                }
                "cpuset.cpus" if !text.is_empty() => self.cpus = Some(CpuList::parse(&field, text)?),
                "cpuset.mems" if !text.is_empty() => self.mems = Some(CpuList::parse(&field, text)?),
                "memory.max" => self.memory = Some(bytes(text).ok_or_else(wrong)?),
                "memory.swap.max" => self.swap = Some(bytes(text).ok_or_else(wrong)?),
                "memory.low" => self.reservation = Some(bytes(text).ok_or_else(wrong)?),
                "pids.max" if text == "max" => self.pids = Some(Limit::Unlimited),
                "pids.max" => self.pids = Some(Limit::To(text.parse().map_err(|_| wrong())?)),
                name if is_io_file(name) => io::lines(name, value, &field, &mut self.io),
                _ => {
                    self.files.insert(file.clone(), value.clone());
                    continue;
                }
            }
            self.unified.insert(file.clone());
        }
        Ok(())
    }
}

/// The name of a file of `unified` in messages.
pub(super) fn unified_field(file: &str) -> String {
    format!("linux.resources.unified[{file:?}]")
}

/// 0 is "not set" and -1 no limit, as runc has it.
fn limit(field: &str, value: Option<i64>) -> Result<Option<Limit>> {
    match value {
        None | Some(0) => Ok(None),
        Some(-1) => Ok(Some(Limit::Unlimited)),
        Some(value) => match u64::try_from(value) {
            Ok(value) => Ok(Some(Limit::To(value))),
            Err(_) => Err(FieldError::new(field, format!("{value} is negative; -1 is no limit"))),
        },
    }
}

/// The specification's swap is memory and swap together; v2 counts swap alone.
fn swap(memory: Option<Limit>, both: Option<i64>) -> Result<Option<Limit>> {
    match (memory, both.filter(|both| *both != 0)) {
        // Without a limit of memory, and with none named for swap, neither has a limit.
        (Some(Limit::Unlimited), None) | (_, Some(-1)) => Ok(Some(Limit::Unlimited)),
        (_, None) => Ok(None),
        (memory, Some(both)) => {
            let alone = match (memory, u64::try_from(both)) {
                (Some(Limit::To(memory)), Ok(both)) => both.checked_sub(memory),
                _ => None,
            };
            if let Some(alone) = alone {
                return Ok(Some(Limit::To(alone)));
            }
            let with = match memory {
                Some(Limit::To(memory)) => format!("a limit of {memory}"),
                _ => "no limit".into(),
            };
            let problem = format!("{both} bytes (memory and swap together) does not go with {with}");
            Err(FieldError::new("linux.resources.memory.swap", problem))
        }
    }
}

fn list(field: &str, text: Option<&str>) -> Result<Option<CpuList>> {
    let text = text.filter(|text| !text.trim().is_empty());
    text.map(|text| CpuList::parse(field, text)).transpose()
}

/// `max`, or a number with one of the kernel's units, as memory.max takes it (memparse of lib/cmdline.c).
fn bytes(text: &str) -> Option<Limit> {
    if text == "max" {
        return Some(Limit::Unlimited);
    }
    let units = "KMGTPE";
    let last = text.chars().last()?.to_ascii_uppercase();
    let (digits, shift) = match units.find(last) {
        Some(place) => (text.get(..text.len().checked_sub(1)?)?, u32::try_from(place).ok()?.checked_add(1)?),
        None => (text, 0),
    };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1024u64.checked_pow(shift)?).map(Limit::To)
}
