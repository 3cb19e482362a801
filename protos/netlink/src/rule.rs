//! Rules, which say what table of routes is used.

use std::fmt;

use crate::{
    message::{Message, attributes, u8_at, u32_at},
    uapi::{FR_ACT_TO_TBL, FRA_PRIORITY, FRA_PROTOCOL, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE},
};

/// `struct fib_rule_hdr`, bytes.
const HEADER: usize = 12;

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Whether it is IPv6's.
    pub ipv6: bool,
    /// The lowest is looked at first.
    pub priority: u32,
    /// The table that it names.
    pub table: u32,
    /// It holds for every packet and does nothing but name a table.
    pub plain: bool,
}

impl Rule {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let ipv6 = i32::from(u8_at(payload, 0)?) == libc::AF_INET6;
        let selects = u8_at(payload, 1)? != 0 || u8_at(payload, 2)? != 0 || u8_at(payload, 3)? != 0;
        let inverted = u32_at(payload, 8)? & 2 != 0;
        let plain = !selects && !inverted && u8_at(payload, 7)? == FR_ACT_TO_TBL;
        let mut rule = Self { ipv6, priority: 0, table: u8_at(payload, 4)?.into(), plain };
        for (kind, value) in attributes(payload, HEADER) {
            match kind {
                FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
                FRA_TABLE => rule.table = u32_at(value, 0)?,
                FRA_SUPPRESS_PREFIXLEN => rule.plain &= u32_at(value, 0)? == u32::MAX,
                FRA_PROTOCOL => {}
                _ => rule.plain = false,
            }
        }
        Some(rule)
    }

    /// Whether it is one of those that every new network namespace has.
    #[must_use]
    pub fn is_default(&self) -> bool {
        let (local, main, default) = (libc::RT_TABLE_LOCAL, libc::RT_TABLE_MAIN, libc::RT_TABLE_DEFAULT);
        let known = match self.priority {
            0 => self.table == local.into(),
            32766 => self.table == main.into(),
            32767 => !self.ipv6 && self.table == default.into(),
            _ => false,
        };
        self.plain && known
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv6 { "IPv6" } else { "IPv4" };
        write!(f, "{family} rule {} (table {})", self.priority, self.table)
    }
}

/// Asks for all of a family (AF_INET, AF_INET6).
#[must_use]
pub fn list(family: i32) -> Message {
    let mut header = [0; HEADER];
    header[0] = family as u8;
    Message::new(libc::RTM_GETRULE, 0, &header)
}
