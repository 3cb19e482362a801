//! Sets of byte ranges of a file: what one owner has locked.

use std::collections::BTreeMap;

/// Ranges, each from its first byte to its last; they neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there would be one more without `first..=last`.
    pub fn are_split_by(&self, first: u64, last: u64) -> bool {
        let before = self.0.range(..first).next_back();
        before.is_some_and(|(_, end)| *end > last)
    }

    /// Adds `first..=last`.
    pub fn insert(&mut self, first: u64, last: u64) {
        if first > last {
            return;
        }
        let (mut first, mut last) = (first, last);
        // What begins at or before the byte behind this range may touch it.
        let near: Vec<_> = self.0.range(..=last.saturating_add(1)).rev().map(|(from, to)| (*from, *to)).collect();
        for (from, to) in near {
            if to.saturating_add(1) < first {
                break;
            }
            self.0.remove(&from);
            (first, last) = (first.min(from), last.max(to));
        }
        self.0.insert(first, last);
    }

    /// Takes `first..=last` out.
    pub fn remove(&mut self, first: u64, last: u64) {
        if first > last {
            return;
        }
        let inside: Vec<_> = self.0.range(..=last).rev().map(|(from, to)| (*from, *to)).collect();
        for (from, to) in inside {
            if to < first {
                break;
            }
            self.0.remove(&from);
            if from < first {
                self.0.insert(from, first - 1);
            }
            if to > last {
                self.0.insert(last + 1, to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_hold_the_bytes_that_were_added_and_not_taken_out(
            steps in prop::collection::vec((any::<bool>(), 0u64..40, 0u64..40), 0..40)
        ) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for (add, first, last) in steps {
                if add {
                    ranges.insert(first, last);
                    model.extend(first..=last);
                } else {
                    ranges.remove(first, last);
                    model.retain(|byte| !(first..=last).contains(byte));
                }
                let held: BTreeSet<u64> = ranges.0.iter().flat_map(|(first, last)| *first..=*last).collect();
                prop_assert_eq!(&held, &model);
                prop_assert_eq!(ranges.is_empty(), model.is_empty());
                let all: Vec<_> = ranges.0.iter().collect();
                prop_assert!(all.windows(2).all(|two| *two[0].1 + 1 < *two[1].0), "{:?}", all);
            }
        }

        #[test]
        fn any_ends_are_taken(steps in prop::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 0..20)) {
            let mut ranges = Ranges::default();
            for (add, first, last) in steps {
                if add { ranges.insert(first, last) } else { ranges.remove(first, last) }
            }
            ranges.insert(0, u64::MAX);
            ranges.remove(0, u64::MAX);
            prop_assert!(ranges.is_empty());
        }
    }
}
