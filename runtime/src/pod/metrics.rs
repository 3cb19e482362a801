//! What a container has used, as containerd wants it: the agent's numbers, which stand under the names of the guest kernel's cgroup
//! files, in containerd's cgroup v2 metrics message. The numbers are the guest's word and are passed on as they are; how
//! many there are and how long a name is, is bounded here, and a name that nobody knows is dropped.

use std::collections::HashMap;

use caisson_protos::agent;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::{Message, MessageField, MessageFull, well_known_types::any::Any};

use crate::shim::errors::TaskError;

/// At most this many block devices are reported.
const MAX_DEVICES: usize = 256;
/// At most this many sizes of huge pages are reported; x86-64 has two.
const MAX_PAGE_SIZES: usize = 16;
/// Longest name of a page size, bytes, such as 1GB.
const MAX_PAGE_SIZE_NAME: usize = 16;

/// The message, packed as containerd and `ctr` look for it: its type without a host in front.
///
/// # Errors
/// INTERNAL, never as far as the encoder is right.
pub fn packed(stats: &agent::StatsResponse) -> Result<Any, TaskError> {
    let value = metrics(stats).write_to_bytes().map_err(|error| TaskError::internal(error.to_string()))?;
    Ok(Any { type_url: Metrics::descriptor().full_name().to_owned(), value, ..Any::default() })
}

/// A message whose fields have the names of the kernel's counters.
macro_rules! by_name {
    ($message:ident from $counters:expr => $($field:ident),* $(,)?) => {{
        let counters = $counters;
        $message { $($field: counter(counters, stringify!($field)),)* ..$message::default() }
    }};
}

fn counter(counters: &HashMap<String, u64>, name: &str) -> u64 {
    counters.get(name).copied().unwrap_or(0)
}

/// The agent's numbers in containerd's form. Processor, memory and process counts are always there, because there are clients that
/// take them for granted.
pub fn metrics(stats: &agent::StatsResponse) -> Metrics {
    let pids = PidsStat { current: stats.pids_current, limit: stats.pids_max, ..PidsStat::default() };
    let cpu = by_name!(CPUStat from &stats.cpu =>
        usage_usec, user_usec, system_usec, nr_periods, nr_throttled, throttled_usec, nr_bursts, burst_usec);
    let events = by_name!(MemoryEvents from &stats.memory_events => low, high, max, oom, oom_kill, oom_group_kill);
    Metrics {
        pids: MessageField::some(pids),
        cpu: MessageField::some(cpu),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(events),
        io: MessageField::some(IOStat {
            usage: stats.io.iter().take(MAX_DEVICES).map(device).collect(),
            ..IOStat::default()
        }),
        hugetlb: stats.hugetlb.iter().filter_map(huge_pages).take(MAX_PAGE_SIZES).collect(),
        ..Metrics::default()
    }
}

fn memory(stats: &agent::StatsResponse) -> MemoryStat {
    let mut memory = by_name!(MemoryStat from &stats.memory =>
        anon, file, kernel_stack, slab, sock, shmem, file_mapped, file_dirty, file_writeback, anon_thp, inactive_anon,
        active_anon, inactive_file, active_file, unevictable, slab_reclaimable, slab_unreclaimable, pgfault, pgmajfault,
        workingset_refault, workingset_activate, workingset_nodereclaim, pgrefill, pgscan, pgsteal, pgactivate,
        pgdeactivate, pglazyfree, pglazyfreed, thp_fault_alloc, thp_collapse_alloc);
    // Since Linux 5.9 these two stand for anonymous and file pages apart.
    for (sum, name) in [
        (&mut memory.workingset_refault, "workingset_refault"),
        (&mut memory.workingset_activate, "workingset_activate"),
    ] {
        let apart = ["_anon", "_file"].map(|kind| counter(&stats.memory, &format!("{name}{kind}")));
        *sum = apart.into_iter().fold(*sum, u64::saturating_add);
    }
    memory.usage = stats.memory_current;
    memory.usage_limit = stats.memory_max;
    memory.swap_usage = stats.swap_current;
    memory.swap_limit = stats.swap_max;
    memory
}

fn device(io: &agent::IoStats) -> IOEntry {
    let counted = by_name!(IOEntry from &io.counters => rbytes, wbytes, rios, wios);
    IOEntry { major: io.major, minor: io.minor, ..counted }
}

fn huge_pages(pages: &agent::HugetlbStats) -> Option<HugeTlbStat> {
    let name = &pages.page_size;
    let is_name = (1..=MAX_PAGE_SIZE_NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric());
    is_name.then(|| HugeTlbStat {
        current: pages.current,
        max: pages.max,
        pagesize: name.clone(),
        ..HugeTlbStat::default()
    })
}

#[cfg(test)]
mod tests {
    use proptest::{collection::hash_map, prelude::*};

    use super::*;

    fn counters(of: &[(&str, u64)]) -> HashMap<String, u64> {
        of.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    #[test]
    fn each_number_lands_in_its_field() {
        let mut stats = agent::StatsResponse::new();
        stats.cpu = counters(&[("usage_usec", 3), ("user_usec", 2), ("system_usec", 1), ("nr_throttled", 7)]);
        stats.memory =
            counters(&[("anon", 4096), ("pgmajfault", 5), ("workingset_refault_anon", 6), ("unheard_of", 9)]);
        stats.memory.insert("workingset_refault_file".into(), u64::MAX);
        stats.memory_events = counters(&[("max", 11), ("oom_kill", 12)]);
        (stats.memory_current, stats.memory_max) = (8192, u64::MAX);
        (stats.swap_current, stats.swap_max) = (13, 14);
        (stats.pids_current, stats.pids_max) = (15, 16);
        let mut disk = agent::IoStats::new();
        (disk.major, disk.minor) = (254, 1);
        disk.counters = counters(&[("rbytes", 17), ("wios", 18)]);
        stats.io.push(disk);
        let mut pages = agent::HugetlbStats::new();
        (pages.page_size, pages.current, pages.max) = ("2MB".into(), 19, 20);
        stats.hugetlb.push(pages);
        let packed = packed(&stats).unwrap();
        assert_eq!(packed.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&packed.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec, metrics.cpu.system_usec), (3, 2, 1));
        assert_eq!(metrics.cpu.nr_throttled, 7);
        assert_eq!((metrics.memory.anon, metrics.memory.pgmajfault), (4096, 5));
        assert_eq!(metrics.memory.workingset_refault, u64::MAX, "saturated, not wrapped");
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (8192, u64::MAX));
        assert_eq!((metrics.memory.swap_usage, metrics.memory.swap_limit), (13, 14));
        assert_eq!((metrics.memory_events.max, metrics.memory_events.oom_kill), (11, 12));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (15, 16));
        let disk = &metrics.io.usage[0];
        assert_eq!((disk.major, disk.minor, disk.rbytes, disk.wios), (254, 1, 17, 18));
        let pages = &metrics.hugetlb[0];
        assert_eq!((pages.pagesize.as_str(), pages.current, pages.max), ("2MB", 19, 20));
    }

    #[test]
    fn what_clients_take_for_granted_is_there_without_numbers() {
        let metrics = metrics(&agent::StatsResponse::new());
        assert!(metrics.pids.is_some() && metrics.cpu.is_some() && metrics.memory.is_some());
    }

    proptest! {
        /// However many devices, page sizes and counters a guest thinks up, the answer stays small.
        #[test]
        fn the_answer_is_bounded(
            cpu in hash_map(".{0,40}", any::<u64>(), 0..50),
            devices in 0usize..2000,
            names in proptest::collection::vec(".{0,40}", 0..100),
        ) {
            let mut stats = agent::StatsResponse::new();
            stats.cpu = cpu;
            stats.io = vec![agent::IoStats { major: u64::MAX, minor: u64::MAX, ..agent::IoStats::new() }; devices];
            stats.hugetlb = names
                .into_iter()
                .map(|page_size| agent::HugetlbStats { page_size, ..agent::HugetlbStats::new() })
                .collect();
            let packed = packed(&stats).unwrap();
            prop_assert!(packed.value.len() < 64 * 1024, "{} bytes", packed.value.len());
            let metrics = Metrics::parse_from_bytes(&packed.value).unwrap();
            prop_assert_eq!(metrics.io.usage.len(), devices.min(MAX_DEVICES));
        }
    }
}
