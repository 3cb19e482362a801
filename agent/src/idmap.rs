//! What the users and groups of a user namespace are outside of it; pure.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// `count` ids from `inside` on are those from `outside` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// The first id in the namespace.
    pub inside: u32,
    /// The first id outside.
    pub outside: u32,
    /// How many, at least one.
    pub count: u32,
}

/// The users and groups of a user namespace. Both empty: the ids are the guest's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMaps {
    /// Users.
    pub uids: Vec<IdMapping>,
    /// Groups.
    pub gids: Vec<IdMapping>,
}

impl IdMaps {
    /// Whether there is no mapping at all.
    pub fn is_empty(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty()
    }

    /// What the user is outside; None if it does not exist there.
    pub fn uid(&self, inside: u32) -> Option<u32> {
        if self.is_empty() { Some(inside) } else { outside(&self.uids, inside) }
    }

    /// What the group is outside; None if it does not exist there.
    pub fn gid(&self, inside: u32) -> Option<u32> {
        if self.is_empty() { Some(inside) } else { outside(&self.gids, inside) }
    }
}

fn outside(list: &[IdMapping], inside: u32) -> Option<u32> {
    list.iter().find_map(|mapping| {
        let place = inside.checked_sub(mapping.inside).filter(|place| *place < mapping.count)?;
        mapping.outside.checked_add(place)
    })
}

/// The list as /proc/PID/uid_map and gid_map take it.
pub fn kernel_text(list: &[IdMapping]) -> String {
    list.iter().fold(String::new(), |mut text, IdMapping { inside, outside, count }| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{inside} {outside} {count}");
        text
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn maps(uids: &[(u32, u32, u32)]) -> IdMaps {
        let list = |&(inside, outside, count): &_| IdMapping { inside, outside, count };
        IdMaps { uids: uids.iter().map(list).collect(), gids: vec![IdMapping { inside: 0, outside: 7, count: 1 }] }
    }

    #[test]
    fn ids_are_found_in_their_ranges_only() {
        let maps = maps(&[(0, 100_000, 10), (1000, 500, 1)]);
        assert_eq!(maps.uid(9), Some(100_009));
        assert_eq!(maps.uid(10), None);
        assert_eq!(maps.uid(1000), Some(500));
        assert_eq!((maps.gid(0), maps.gid(1)), (Some(7), None));
        assert_eq!(IdMaps::default().uid(12), Some(12));
    }

    #[test]
    fn the_kernel_reads_one_mapping_in_a_line() {
        assert_eq!(kernel_text(&maps(&[(0, 100, 1), (1, 5, 2)]).uids), "0 100 1\n1 5 2\n");
    }

    proptest! {
        #[test]
        fn what_is_mapped_is_in_a_range(inside: u32, outside: u32, count: u32, id: u32) {
            let found = maps(&[(inside, outside, count)]).uid(id);
            prop_assert!(found.is_none_or(|found| found - outside < count && id - inside == found - outside));
        }
    }
}
