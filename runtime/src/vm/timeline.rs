//! Where a pod's time went: one log line with the moment of each stage, in microseconds since the shim's first
//! process began. It is written once, when the container's first output has passed or it has ended.

use std::sync::{Mutex, PoisonError};

use nix::time::{ClockId, clock_gettime};
use slog::{KV, Key, Logger, Record, Serializer, info};

/// The stages, in the order in which they usually come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// caisson-vmm was spawned, a moment before.
    VmmSpawned,
    /// The shim answers containerd.
    ShimStart,
    /// The vCPUs run.
    VmStarted,
    /// The kernel is up: the agent's main began (by the guest's clock).
    Kernel,
    /// The agent listens.
    AgentReady,
    /// Create was answered by the agent.
    ContainerCreated,
    /// Start was answered by the agent.
    ContainerStarted,
    /// The first byte of output came out of the guest.
    FirstOutput,
}

const KEYS: [Key; 8] = [
    "vmm_spawned_us",
    "shim_start_us",
    "vm_started_us",
    "kernel_us",
    "agent_ready_us",
    "container_created_us",
    "container_started_us",
    "first_output_us",
];

#[derive(Clone, Copy, Debug, Default)]
struct Marks([Option<u64>; KEYS.len()]);

/// See the module's introduction.
#[derive(Debug)]
pub struct Timeline {
    began_ns: u64,
    marks: Mutex<Option<Marks>>,
}

/// CLOCK_MONOTONIC, nanoseconds; the same clock for all processes.
pub fn now_ns() -> u64 {
    // The clock exists on every Linux, so this cannot fail.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or((0, 0), |time| (time.tv_sec(), time.tv_nsec()));
    now.0.cast_unsigned().saturating_mul(1_000_000_000).saturating_add(now.1.cast_unsigned())
}

impl Timeline {
    /// Counts from `began_ns` ([`now_ns`]).
    pub fn new(began_ns: u64) -> Self {
        Self { began_ns, marks: Mutex::new(Some(Marks::default())) }
    }

    /// `stage` was reached now.
    pub fn mark(&self, stage: Stage) {
        self.mark_at(stage, now_ns());
    }

    /// `stage` was reached at `at_ns`. Only the first mark of a stage counts.
    pub fn mark_at(&self, stage: Stage, at_ns: u64) {
        if let Some(marks) = &mut *self.marks.lock().unwrap_or_else(PoisonError::into_inner)
            && let Some(mark) = marks.0.get_mut(stage as usize)
        {
            mark.get_or_insert(at_ns.saturating_sub(self.began_ns) / 1000);
        }
    }

    /// Writes the line, the first time.
    pub fn log(&self, log: &Logger) {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(marks) = marks {
            info!(log, "pod timeline"; marks);
        }
    }
}

impl KV for Marks {
    fn serialize(&self, _: &Record, serializer: &mut dyn Serializer) -> slog::Result {
        for (key, mark) in KEYS.iter().zip(self.0) {
            if let Some(micros) = mark {
                serializer.emit_u64(key, micros)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn one_line_with_the_stages_that_were_reached() {
        let mut file = tempfile::tempfile().unwrap();
        let log = caisson_log::logger("shim", file.try_clone().unwrap(), slog::Level::Info);
        let timeline = Timeline::new(1_000_000);
        timeline.mark_at(Stage::VmStarted, 3_000_000);
        timeline.mark_at(Stage::VmStarted, 9_000_000);
        timeline.mark_at(Stage::ContainerCreated, 5_500_000);
        timeline.log(&log);
        timeline.mark(Stage::FirstOutput);
        timeline.log(&log);
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text.matches("pod timeline").count(), 1);
        assert!(text.contains("vm_started_us=2000") && text.contains("container_created_us=4500"), "{text}");
        assert!(!text.contains("first_output_us"), "{text}");
    }
}
