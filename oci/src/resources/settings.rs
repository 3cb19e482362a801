//! From limits to settings, in the order in which they are written: runc's.

use super::{CpuTime, Limit, Limits, Need, Setting, read::unified_field};
use crate::FieldError;

impl Limits {
    /// Checks what `memory.checkBeforeUpdate` asks for, in a cgroup whose memory.current says `used`.
    ///
    /// # Errors
    /// Names a limit that is not above what is used.
    pub fn check_memory(&self, used: u64) -> Result<(), FieldError> {
        let Some(Limit::To(memory)) = self.memory.filter(|_| self.check_before_update) else { return Ok(()) };
        let both = match self.swap {
            Some(Limit::To(swap)) => Some(memory.saturating_add(swap)),
            _ => None,
        };
        for (field, value) in [("swap", both), ("limit", Some(memory))] {
            if let Some(value) = value.filter(|value| *value <= used) {
                let problem = format!("{value} is not above what is used now, {used} bytes");
                return Err(FieldError::new(format!("linux.resources.memory.{field}"), problem));
            }
        }
        Ok(())
    }

    /// The settings for a cgroup whose cpu.max says `present`.
    pub fn settings(&self, present: CpuTime) -> Vec<Setting> {
        let mut settings = Vec::new();
        let set = |file: &str, value: String, name: &str| Setting::new(file, value, self.field(file, name));
        let limit = |file: &str, value: Option<Limit>, name: &str| Some(set(file, value?.to_string(), name));
        settings.extend(limit("pids.max", self.pids, "pids.limit"));
        settings.extend(limit("memory.swap.max", self.swap, "memory.swap"));
        settings.extend(limit("memory.max", self.memory, "memory.limit"));
        settings.extend(limit("memory.low", self.reservation, "memory.reservation"));
        settings.extend(self.io.iter().map(|io| Setting {
            choices: io.choices.clone(),
            field: io.field.clone(),
            need: Need::Must,
        }));
        // What takes nothing away and gives nothing needs no kernel that has it.
        let optional = |no_effect: bool, setting: Setting| {
            if no_effect { Setting { need: Need::IfThere, ..setting } } else { setting }
        };
        if let Some(idle) = self.idle {
            settings.push(optional(!idle, set("cpu.idle", u8::from(idle).to_string(), "cpu.idle")));
        }
        if let Some(weight) = self.weight {
            settings.push(set("cpu.weight", weight.to_string(), "cpu.shares"));
        }
        let burst = self.burst.map(|burst| optional(burst == 0, set("cpu.max.burst", burst.to_string(), "cpu.burst")));
        if let Some(time) = self.time_over(present) {
            // The kernel wants burst <= quota at every moment: which one comes first depends on what they were.
            settings.extend(burst.clone().map(|burst| Setting { need: Need::Try, ..burst }));
            let name = if self.time.quota.is_some() { "cpu.quota" } else { "cpu.period" };
            settings.push(set("cpu.max", time.to_string(), name));
        }
        settings.extend(burst);
        for (file, list, name) in [("cpuset.cpus", &self.cpus, "cpu.cpus"), ("cpuset.mems", &self.mems, "cpu.mems")] {
            settings.extend(list.as_ref().map(|list| set(file, list.to_string(), name)));
        }
        for (size, limit, field) in &self.huge_pages {
            let file = |kind: &str| Setting::new(format!("hugetlb.{size}{kind}.max"), limit.to_string(), field);
            settings.push(file(""));
            // What is mapped but not yet touched. Kernels before 5.7 do not count it.
            settings.push(optional(true, file(".rsvd")));
        }
        settings.extend(self.rdma.iter().map(|(line, field)| Setting::new("rdma.max", line, field)));
        // Last, as with runc: who writes files by their names overrides the rest.
        settings.extend(self.files.iter().map(|(file, value)| Setting::new(file, value, unified_field(file))));
        settings
    }

    /// What asks for the value of a file, for messages.
    fn field(&self, file: &str, name: &str) -> String {
        if self.unified.contains(file) { unified_field(file) } else { format!("linux.resources.{name}") }
    }
}
