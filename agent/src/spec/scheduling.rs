//! When and where a process runs: `process.scheduler`, `process.ioPriority` and `process.execCPUAffinity`.
//!
//! oci-spec's own types spell some of the specification's flags otherwise than the specification, and check the
//! affinity with a regular expression.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::{Result, SpecError};
use crate::plan::{AffinityPlan, SchedulerPlan};

/// More processors than any machine of ours has: CPU_SETSIZE of sched.h, which is also what the kernel is asked with.
const MAX_PROCESSORS: usize = 1024;

/// The `scheduler` object.
#[derive(Debug, Deserialize)]
pub(super) struct Scheduler {
    policy: String,
    #[serde(default)]
    nice: i32,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    runtime: u64,
    #[serde(default)]
    deadline: u64,
    #[serde(default)]
    period: u64,
}

/// The `ioPriority` object.
#[derive(Debug, Deserialize)]
pub(super) struct IoPriority {
    class: String,
    #[serde(default)]
    priority: i64,
}

/// The `execCPUAffinity` object.
#[derive(Debug, Deserialize)]
pub(super) struct Affinity {
    initial: Option<String>,
    r#final: Option<String>,
}

/// include/uapi/linux/sched.h.
const POLICIES: [(&str, u32); 7] = [
    ("SCHED_OTHER", 0),
    ("SCHED_FIFO", 1),
    ("SCHED_RR", 2),
    ("SCHED_BATCH", 3),
    ("SCHED_ISO", 4),
    ("SCHED_IDLE", 5),
    ("SCHED_DEADLINE", 6),
];
/// The same.
const FLAGS: [(&str, u64); 7] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
    ("SCHED_FLAG_UTIL_CLAMP_MIN", 0x20),
    ("SCHED_FLAG_UTIL_CLAMP_MAX", 0x40),
];
/// include/uapi/linux/ioprio.h.
const IO_CLASSES: [(&str, u16); 3] = [("IOPRIO_CLASS_RT", 1), ("IOPRIO_CLASS_BE", 2), ("IOPRIO_CLASS_IDLE", 3)];
/// IOPRIO_CLASS_SHIFT of the same.
const IO_CLASS_SHIFT: u16 = 13;

fn named<T: Copy>(field: String, word: &str, known: &[(&str, T)]) -> Result<T> {
    known.iter().find(|(name, _)| *name == word).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        SpecError::new(field, format!("{word:?} is not one of {}", names.join(", ")))
    })
}

pub(super) fn scheduler(field: &str, asked: &Scheduler) -> Result<SchedulerPlan> {
    let policy = named(format!("{field}.policy"), &asked.policy, &POLICIES)?;
    let flags = asked.flags.iter().map(|flag| named(format!("{field}.flags"), flag, &FLAGS));
    let flags = flags.collect::<Result<Vec<u64>>>()?.into_iter().fold(0, |all, flag| all | flag);
    if !(-20..=19).contains(&asked.nice) {
        return Err(SpecError::new(format!("{field}.nice"), format!("{} is not between -20 and 19", asked.nice)));
    }
    let only = |name: &str, policies: &str| {
        let problem = format!("goes with {policies} only, not with {}", asked.policy);
        Err(SpecError::new(format!("{field}.{name}"), problem))
    };
    if asked.priority != 0 && !matches!(asked.policy.as_str(), "SCHED_FIFO" | "SCHED_RR") {
        return only("priority", "SCHED_FIFO and SCHED_RR");
    }
    if asked.policy != "SCHED_DEADLINE" {
        for (name, value) in [("runtime", asked.runtime), ("deadline", asked.deadline), ("period", asked.period)] {
            if value != 0 {
                return only(name, "SCHED_DEADLINE");
            }
        }
    }
    let priority = u32::try_from(asked.priority)
        .map_err(|_| SpecError::new(format!("{field}.priority"), format!("{} is negative", asked.priority)))?;
    Ok(SchedulerPlan {
        policy,
        flags,
        nice: asked.nice,
        priority,
        runtime: asked.runtime,
        deadline: asked.deadline,
        period: asked.period,
    })
}

pub(super) fn io_priority(field: &str, asked: &IoPriority) -> Result<u16> {
    let class = named(format!("{field}.class"), &asked.class, &IO_CLASSES)?;
    match u16::try_from(asked.priority) {
        Ok(priority) if priority < 8 => Ok((class << IO_CLASS_SHIFT) | priority),
        _ => Err(SpecError::new(format!("{field}.priority"), format!("{} is not between 0 and 7", asked.priority))),
    }
}

pub(super) fn affinity(field: &str, asked: &Affinity) -> Result<AffinityPlan> {
    let list = |name: &str, text: &Option<String>| match text.as_deref() {
        None | Some("") => Ok(Vec::new()),
        Some(text) => processors(text).ok_or_else(|| {
            let problem = format!("{text:?} is no list of processors below {MAX_PROCESSORS} as \"0-3,7\"");
            SpecError::new(format!("{field}.{name}"), problem)
        }),
    };
    Ok(AffinityPlan { before: list("initial", &asked.initial)?, after: list("final", &asked.r#final)? })
}

fn processors(text: &str) -> Option<Vec<usize>> {
    let number = |word: &str| {
        let digits = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        word.parse().ok().filter(|number: &usize| digits && *number < MAX_PROCESSORS)
    };
    // Each once, however long the text.
    let mut all = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scheduled(json: serde_json::Value) -> Result<SchedulerPlan> {
        scheduler("s", &serde_json::from_value(json).unwrap())
    }

    #[test]
    fn policies_and_flags_have_the_kernels_numbers() {
        let plan = scheduled(serde_json::json!({
            "policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN"],
            "runtime": 1, "deadline": 2, "period": 3,
        }));
        let expected = SchedulerPlan { policy: 6, flags: 5, runtime: 1, deadline: 2, period: 3, ..Default::default() };
        assert_eq!(plan.unwrap(), expected);
        let plan = scheduled(serde_json::json!({"policy": "SCHED_BATCH", "nice": -20})).unwrap();
        assert_eq!(plan, SchedulerPlan { policy: 3, nice: -20, ..Default::default() });
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        for (json, field) in [
            (serde_json::json!({"policy": "SCHED_FAST"}), "s.policy"),
            (serde_json::json!({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_X"]}), "s.flags"),
            (serde_json::json!({"policy": "SCHED_OTHER", "nice": 20}), "s.nice"),
            (serde_json::json!({"policy": "SCHED_OTHER", "priority": 1}), "s.priority"),
            (serde_json::json!({"policy": "SCHED_FIFO", "priority": -1}), "s.priority"),
            (serde_json::json!({"policy": "SCHED_FIFO", "period": 1}), "s.period"),
        ] {
            assert_eq!(scheduled(json.clone()).unwrap_err().field, field, "{json}");
        }
    }

    #[test]
    fn io_classes_stand_above_their_priority() {
        let planned = |class: &str, priority: i64| io_priority("i", &IoPriority { class: class.into(), priority });
        assert_eq!(planned("IOPRIO_CLASS_BE", 7).unwrap(), 2 << 13 | 7);
        assert_eq!(planned("IOPRIO_CLASS_IDLE", 0).unwrap(), 3 << 13);
        assert_eq!(planned("IOPRIO_CLASS_RT", 8).unwrap_err().field, "i.priority");
        assert_eq!(planned("IOPRIO_CLASS_RT", -1).unwrap_err().field, "i.priority");
        assert_eq!(planned("RT", 1).unwrap_err().field, "i.class");
    }

    #[test]
    fn processors_are_lists_of_ranges() {
        assert_eq!(processors("0-3,7"), Some(vec![0, 1, 2, 3, 7]));
        assert_eq!(processors("3,0-1,1-3"), Some(vec![0, 1, 2, 3]));
        for bad in ["", ",", "1-", "-1", "2-1", "+1", "a", "1 ", "1024", "0-99999999999"] {
            assert_eq!(processors(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_list_is_read_or_refused(text in "[-0-9,]{0,12}") {
            let limit = MAX_PROCESSORS;
            prop_assert!(processors(&text).is_none_or(|list| list.iter().all(|number| *number < limit)));
        }
    }
}
