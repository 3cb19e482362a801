//! What is to be removed and what is to be added.

/// What one kind of thing (addresses, routes, neighbours) needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Difference<T> {
    pub remove: Vec<T>,
    pub add: Vec<T>,
}

/// Compares what is wanted with what is there. Of that, only what is in `ours` may be removed, and what stands in the way of something
/// wanted (`clash`). `like` says whether two are the same.
pub(super) fn difference<T: Clone>(
    wanted: &[T],
    there: &[T],
    ours: impl Fn(&T) -> bool,
    like: impl Fn(&T, &T) -> bool,
    clash: impl Fn(&T, &T) -> bool,
) -> Difference<T> {
    let goes = |one: &&T| {
        let kept = wanted.iter().any(|wanted| like(wanted, one));
        !kept && (ours(one) || wanted.iter().any(|wanted| clash(wanted, one)))
    };
    let comes = |wanted: &&T| !there.iter().any(|one| like(wanted, one));
    Difference {
        remove: there.iter().filter(goes).cloned().collect(),
        add: wanted.iter().filter(comes).cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::{collection::btree_set, prelude::*};

    use super::*;

    /// Things with a key and a value: at most one value is there for a key.
    type Thing = (u8, u8);

    fn things() -> impl Strategy<Value = Vec<Thing>> {
        btree_set((0u8..12, 0u8..3), 0..10).prop_map(|all| {
            let mut keys = BTreeSet::new();
            all.into_iter().filter(|(key, _)| keys.insert(*key)).collect()
        })
    }

    proptest! {
        #[test]
        fn afterwards_all_that_is_wanted_is_there_and_only_ours_is_gone(wanted in things(), there in things(), ours in things()) {
            let like = |one: &Thing, other: &Thing| one == other;
            let clash = |one: &Thing, other: &Thing| one.0 == other.0;
            let difference = difference(&wanted, &there, |one| ours.contains(one), like, clash);
            let mut after: Vec<Thing> = there.iter().filter(|one| !difference.remove.contains(one)).copied().collect();
            for one in &difference.add {
                prop_assert!(!after.iter().any(|other| clash(one, other)), "{one:?} is in the way of itself");
                after.push(*one);
            }
            for one in &wanted {
                prop_assert!(after.contains(one));
            }
            for one in &there {
                let in_the_way = wanted.iter().any(|wanted| clash(wanted, one));
                prop_assert_eq!(after.contains(one), wanted.contains(one) || !(ours.contains(one) || in_the_way));
            }
            // Nothing is left to do.
            let again = super::difference(&wanted, &after, |one| wanted.contains(one), like, clash);
            prop_assert!(again.remove.is_empty() && again.add.is_empty());
        }
    }
}
