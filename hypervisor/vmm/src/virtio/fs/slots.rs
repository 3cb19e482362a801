//! The requests that the file server has not answered yet.
//!
//! Neither the driver's numbers nor the server's are trusted: each request travels under a number that this table
//! chose, made of a slot and of a count that never repeats. A reply whose number is not in the table belongs to nobody:
//! it is late (its request went with a reset) or made up.

use serde::{Deserialize, Serialize};

/// A request that waits for its reply: what is needed to find its chain again and to answer it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// The queue that it came by.
    pub queue: u16,
    /// Its chain.
    pub head: u16,
    /// The driver's number for it.
    pub unique: u64,
    /// What it asks for.
    pub opcode: u32,
    /// What it counts against the limit of large requests, bytes.
    pub large: usize,
}

/// See the module's introduction. Grows with the greatest number of requests that were in flight at once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    slots: Vec<Option<(u64, InFlight)>>,
    free: Vec<u16>,
    count: u64,
    /// The number that was given last.
    last: u64,
    /// Sum of [`InFlight::large`].
    large: usize,
}

impl Slots {
    /// Bits of a number that name the slot.
    const SLOT_BITS: u32 = 16;
    /// The most requests in flight: more than both queues have descriptors, so that only a driver that makes one chain
    /// available twice gets there.
    pub const MAX: usize = 1024;

    /// Enters a request and returns its number; `None` if there are [`Self::MAX`] already.
    pub fn insert(&mut self, request: InFlight) -> Option<u64> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < Self::MAX => {
                self.slots.push(None);
                u16::try_from(self.slots.len() - 1).ok()?
            }
            None => return None,
        };
        // 2^48 requests at a million a second last nine years; a wrap would still need the same slot to collide. The
        // number 0 means "no request" to FUSE.
        self.count = (self.count + 1) & (u64::MAX >> Self::SLOT_BITS);
        let number = self.count << Self::SLOT_BITS | u64::from(slot);
        *self.slots.get_mut(usize::from(slot))? = Some((number, request));
        self.last = number;
        self.large = self.large.saturating_add(request.large);
        Some(number)
    }

    /// Removes the request with this number, if it is in flight.
    pub fn take(&mut self, number: u64) -> Option<InFlight> {
        let slot = number as u16;
        let entry = self.slots.get_mut(usize::from(slot))?;
        let (_, request) = entry.take_if(|(entered, _)| *entered == number)?;
        self.free.push(slot);
        self.large = self.large.saturating_sub(request.large);
        Some(request)
    }

    /// The only request in flight. `None` also if it is an older one than the last: to find it would take a search.
    pub fn only(&self) -> Option<InFlight> {
        if self.len() != 1 {
            return None;
        }
        let (number, request) = (*self.slots.get(usize::from(self.last as u16))?)?;
        (number == self.last).then_some(request)
    }

    /// Bytes of large requests in flight.
    pub fn large(&self) -> usize {
        self.large
    }

    /// The request that was entered last, for [`Self::overdue`].
    pub fn newest(&self) -> u64 {
        self.count
    }

    /// The oldest request in flight, if it is `newest` or older.
    pub fn overdue(&self, newest: u64) -> Option<InFlight> {
        let (number, oldest) = self.slots.iter().flatten().min_by_key(|(number, _)| *number)?;
        (number >> Self::SLOT_BITS <= newest).then_some(*oldest)
    }

    /// Removes every request; the numbers go on where they were.
    pub fn drain(&mut self) -> impl Iterator<Item = InFlight> + use<> {
        self.free.clear();
        self.large = 0;
        std::mem::take(&mut self.slots).into_iter().flatten().map(|(_, request)| request)
    }

    /// Requests in flight.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether no request is in flight.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use caisson_protos::monitor;
    use proptest::prelude::*;

    use super::*;

    fn request(head: u16) -> InFlight {
        InFlight { queue: 1, head, unique: u64::from(head) << 20, opcode: 1, large: usize::from(head % 3) }
    }

    #[test]
    fn a_number_from_before_a_reset_finds_nothing_afterwards() {
        let mut slots = Slots::default();
        let late = slots.insert(request(1)).unwrap();
        assert_eq!(slots.drain().collect::<Vec<_>>(), [request(1)]);
        let new = slots.insert(request(2)).unwrap();
        assert_eq!(late as u16, new as u16, "the slot itself is used again");
        assert_eq!(slots.take(late), None);
        assert_eq!(slots.take(new), Some(request(2)));
    }

    #[test]
    fn a_full_table_refuses_and_recovers() {
        let mut slots = Slots::default();
        let numbers: Vec<u64> = (0..Slots::MAX as u16).map(|head| slots.insert(request(head)).unwrap()).collect();
        assert_eq!(slots.insert(request(0)), None);
        assert_eq!(slots.take(numbers[5]), Some(request(5)));
        assert!(slots.insert(request(6)).is_some());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u16),
        Take(usize),
        MadeUp(u64),
        Reset,
        Save,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => any::<u16>().prop_map(Step::Insert),
            4 => any::<usize>().prop_map(Step::Take),
            2 => any::<u64>().prop_map(Step::MadeUp),
            1 => Just(Step::Reset),
            1 => Just(Step::Save),
        ]
    }

    proptest! {
        #[test]
        fn each_number_finds_its_own_request_once(steps in prop::collection::vec(step(), 0..200)) {
            let mut slots = Slots::default();
            let mut model: HashMap<u64, InFlight> = HashMap::new();
            let mut ever = Vec::new();
            for step in steps {
                match step {
                    Step::Insert(head) => {
                        let number = slots.insert(request(head)).unwrap();
                        prop_assert!(number != 0 && !ever.contains(&number));
                        ever.push(number);
                        model.insert(number, request(head));
                    }
                    Step::Take(at) if !ever.is_empty() => {
                        let number = ever[at % ever.len()];
                        prop_assert_eq!(slots.take(number), model.remove(&number));
                    }
                    Step::Take(_) => {}
                    Step::MadeUp(number) => prop_assert_eq!(slots.take(number), model.remove(&number)),
                    Step::Reset => {
                        prop_assert_eq!(slots.drain().count(), model.len());
                        model.clear();
                    }
                    Step::Save => {
                        slots = monitor::decode(&monitor::encode(&slots).unwrap()).unwrap();
                    }
                }
                prop_assert_eq!(slots.len(), model.len());
                prop_assert_eq!(slots.large(), model.values().map(|request| request.large).sum::<usize>());
                if let Some(only) = slots.only() {
                    prop_assert_eq!(model.values().collect::<Vec<_>>(), [&only]);
                }
                let oldest = model.iter().min_by_key(|(number, _)| **number).map(|(_, request)| *request);
                prop_assert_eq!(slots.overdue(slots.newest()), oldest);
                prop_assert_eq!(slots.overdue(0), None);
            }
        }
    }
}
