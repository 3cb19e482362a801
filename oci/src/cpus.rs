//! Lists of processors or memory nodes as cpuset writes them: `0-3,7`.

use std::fmt;

use crate::FieldError;

/// The highest number that is read (the kernel's NR_CPUS on x86-64 is 8192 at most).
const MAX: u32 = 8191;

/// A list of processors or memory nodes, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList {
    /// Sorted, apart from each other, both ends included.
    ranges: Vec<(u32, u32)>,
}

impl CpuList {
    /// Reads `text`, which is the value of `field`.
    ///
    /// # Errors
    /// [`FieldError`] names the field and what stands there.
    pub fn parse(field: &str, text: &str) -> Result<Self, FieldError> {
        let wrong = || {
            let message = format!("{text:?} is no list of numbers and ranges like \"0-3,7\", of 0 to {MAX}");
            FieldError::new(field, message)
        };
        let number = |text: &str| text.trim().parse::<u32>().ok().filter(|number| *number <= MAX);
        let mut ranges = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first).ok_or_else(wrong)?, number(last).ok_or_else(wrong)?);
            if first > last {
                return Err(wrong());
            }
            ranges.push((first, last));
        }
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        if merged.is_empty() { Err(wrong()) } else { Ok(Self { ranges: merged }) }
    }

    /// How many.
    pub fn count(&self) -> u32 {
        self.ranges.iter().map(|(first, last)| last - first + 1).sum()
    }

    /// The highest number.
    pub fn highest(&self) -> u32 {
        self.ranges.last().map_or(0, |(_, last)| *last)
    }

    /// The first `count` there are, at least one.
    pub fn first(count: u32) -> Self {
        Self { ranges: vec![(0, count.saturating_sub(1))] }
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last { write!(to, "{comma}{first}")? } else { write!(to, "{comma}{first}-{last}")? }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_that_are_none_are_refused_with_their_text() {
        for text in ["", ",", "-", "1-", "-1", "3-1", "a", "8192", "0-99999999999", "1:2", "0 1"] {
            let refused = CpuList::parse("f", text).unwrap_err();
            assert!(refused.to_string().contains(&format!("{text:?}")), "{refused}");
        }
        assert_eq!(CpuList::parse("f", " 0 , 2-3,").unwrap().to_string(), "0,2-3");
    }

    proptest! {
        #[test]
        fn a_list_counts_what_it_names(parts in proptest::collection::vec((0u32..200, 0u32..20), 1..10)) {
            let text: Vec<_> = parts.iter().map(|(first, more)| format!("{first}-{}", first + more)).collect();
            let named: BTreeSet<u32> = parts.iter().flat_map(|(first, more)| *first..=first + more).collect();
            let list = CpuList::parse("f", &text.join(",")).unwrap();
            prop_assert_eq!(list.count() as usize, named.len());
            prop_assert_eq!(Some(&list.highest()), named.last());
            prop_assert_eq!(CpuList::parse("f", &list.to_string()).unwrap(), list);
        }
    }
}
