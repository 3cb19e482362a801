//! Which frames a driver wants (virtio 1.2, section 5.1.6.5.1 and 5.1.6.5.2): by destination address, as a pure function.

use serde::{Deserialize, Serialize};

/// An Ethernet address.
pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
/// The most addresses in each table; with more, the driver gets all of that kind and chooses itself.
pub const MAX_ADDRESSES: usize = 64;

/// What the driver has asked for. At the beginning, everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveFilter {
    /// Everything.
    pub promiscuous: bool,
    /// Every multicast address.
    pub all_multicast: bool,
    /// Every unicast address.
    pub all_unicast: bool,
    /// No multicast address.
    pub no_multicast: bool,
    /// No unicast address.
    pub no_unicast: bool,
    /// No broadcasts.
    pub no_broadcast: bool,
    /// Unicast addresses beside the device's own; None: too many.
    pub unicast: Option<Vec<Mac>>,
    /// Multicast addresses; None: too many.
    pub multicast: Option<Vec<Mac>>,
}

impl Default for ReceiveFilter {
    fn default() -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
        }
    }
}

impl ReceiveFilter {
    /// Whether a driver whose device has the address `own` wants a frame for `destination`.
    pub fn accepts(&self, own: Mac, destination: Mac) -> bool {
        let lists = |table: &Option<Vec<Mac>>| table.as_ref().is_none_or(|table| table.contains(&destination));
        if self.promiscuous {
            true
        } else if destination == BROADCAST {
            !self.no_broadcast
        } else if is_multicast(destination) {
            !self.no_multicast && (self.all_multicast || lists(&self.multicast))
        } else {
            !self.no_unicast && (self.all_unicast || destination == own || lists(&self.unicast))
        }
    }
}

/// Whether a frame with this destination goes to many.
pub fn is_multicast(mac: Mac) -> bool {
    mac.first().is_some_and(|byte| byte & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn quiet() -> ReceiveFilter {
        ReceiveFilter { promiscuous: false, ..ReceiveFilter::default() }
    }

    #[test]
    fn a_new_driver_gets_everything() {
        assert!([OWN, OTHER, GROUP, BROADCAST].iter().all(|mac| ReceiveFilter::default().accepts(OWN, *mac)));
    }

    #[test]
    fn each_switch_does_what_it_says() {
        let wants = |filter: ReceiveFilter| [OWN, OTHER, GROUP, BROADCAST].map(|mac| filter.accepts(OWN, mac));
        assert_eq!(wants(quiet()), [true, false, false, true]);
        assert_eq!(wants(ReceiveFilter { all_unicast: true, ..quiet() }), [true, true, false, true]);
        assert_eq!(wants(ReceiveFilter { all_multicast: true, ..quiet() }), [true, false, true, true]);
        assert_eq!(wants(ReceiveFilter { no_broadcast: true, ..quiet() }), [true, false, false, false]);
        assert_eq!(
            wants(ReceiveFilter { no_unicast: true, all_unicast: true, ..quiet() }),
            [false, false, false, true]
        );
        let none = ReceiveFilter { no_multicast: true, all_multicast: true, multicast: None, ..quiet() };
        assert_eq!(wants(none), [true, false, false, true]);
        assert_eq!(wants(ReceiveFilter { unicast: Some(vec![OTHER]), ..quiet() }), [true, true, false, true]);
        assert_eq!(wants(ReceiveFilter { multicast: Some(vec![GROUP]), ..quiet() }), [true, false, true, true]);
        assert_eq!(wants(ReceiveFilter { unicast: None, multicast: None, ..quiet() }), [true, true, true, true]);
    }
}
