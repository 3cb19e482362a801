//! Processes that the kernel killed because memory ran out: `oom_kill` in memory.events. It counts the kills in the
//! cgroup and below, no matter whose memory ran out (the container's own limit or the machine's).

use std::{fs, path::PathBuf};

use super::{Cgroup, stats::flat, watch::Watch};

impl Cgroup {
    fn events(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    /// How many there were; None if the kernel does not count.
    pub fn oom_kills(&self) -> Option<u64> {
        kills(&fs::read_to_string(self.events()).ok()?)
    }

    /// Waits until there are more than `seen`. None if the kernel does not count, or the cgroup goes away.
    pub async fn oom_kills_beyond(&self, seen: u64) -> Option<u64> {
        let watch = Watch::open(&self.events()).ok()?;
        watch.until(|text| kills(text).filter(|kills| *kills > seen)).await.ok()
    }
}

fn kills(events: &str) -> Option<u64> {
    flat(events).get("oom_kill").copied()
}
