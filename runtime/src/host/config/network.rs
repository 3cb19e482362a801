//! The section `[network]`: what the pods of this host may send and receive.

use caisson_protos::monitor::{RateLimit, TokenBucket};
use serde::Deserialize;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// Drop what a pod sends from a MAC, IPv4 or IPv6 address that is not its own, ARP and neighbour discovery included.
    pub anti_spoofing: bool,
    /// What each card of a pod may send.
    pub send: Limit,
    /// What each card of a pod may receive.
    pub receive: Limit,
}

/// A limit of each network card. A rate that is absent is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limit {
    /// Bytes a second.
    pub bytes: Option<u64>,
    /// Bytes at once after a time without any; without it, what the rate gives in a fiftieth of a second.
    pub bytes_burst: Option<u64>,
    /// Packets a second.
    pub packets: Option<u64>,
    /// Packets at once, likewise.
    pub packets_burst: Option<u64>,
}

/// The least burst of bytes that is chosen: one segment of 64 KiB, so that the device's offloads stay of use.
const MIN_BYTES_BURST: u64 = 64 * 1024;
/// The least burst of packets that is chosen.
const MIN_PACKETS_BURST: u64 = 16;

/// A bucket with this rate, not 0, and this burst, or a fitting one.
pub fn bucket(rate: u64, burst: Option<u64>, least: u64) -> TokenBucket {
    TokenBucket { rate, burst: burst.unwrap_or_else(|| (rate / 50).max(least)) }
}

/// A bucket of bytes with a fitting burst.
pub fn bytes_bucket(rate: u64) -> TokenBucket {
    bucket(rate, None, MIN_BYTES_BURST)
}

impl Limit {
    /// What the monitor is given.
    pub fn rate_limit(&self) -> RateLimit {
        RateLimit {
            bytes: self.bytes.map(|rate| bucket(rate, self.bytes_burst, MIN_BYTES_BURST)),
            operations: self.packets.map(|rate| bucket(rate, self.packets_burst, MIN_PACKETS_BURST)),
        }
    }

    /// The first key whose value cannot be, with the value and what it must be.
    fn mistake(&self) -> Option<(&'static str, u64, &'static str)> {
        const NOT_ZERO: &str = "1 or more, or absent for no limit";
        const WITH_RATE: &str = "set together with its rate";
        for (key, value) in [
            ("bytes", self.bytes),
            ("bytes_burst", self.bytes_burst),
            ("packets", self.packets),
            ("packets_burst", self.packets_burst),
        ] {
            if value == Some(0) {
                return Some((key, 0, NOT_ZERO));
            }
        }
        let alone = |burst: Option<u64>, rate: Option<u64>| burst.filter(|_| rate.is_none());
        let bytes = alone(self.bytes_burst, self.bytes).map(|value| ("bytes_burst", value, WITH_RATE));
        bytes.or_else(|| alone(self.packets_burst, self.packets).map(|value| ("packets_burst", value, WITH_RATE)))
    }
}

impl NetworkConfig {
    /// The first key whose value cannot be, with the value and what it must be.
    pub(super) fn mistake(&self) -> Option<(String, u64, &'static str)> {
        let of = |section: &str, limit: &Limit| {
            limit.mistake().map(|(key, value, range)| (format!("network.{section}.{key}"), value, range))
        };
        of("send", &self.send).or_else(|| of("receive", &self.receive))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_that_is_not_named_is_a_fiftieth_of_a_second_and_at_least_one_segment() {
        let limit = Limit { bytes: Some(100_000_000), packets: Some(100), ..Limit::default() };
        let buckets = limit.rate_limit();
        assert_eq!(buckets.bytes, Some(TokenBucket { rate: 100_000_000, burst: 2_000_000 }));
        assert_eq!(buckets.operations, Some(TokenBucket { rate: 100, burst: MIN_PACKETS_BURST }));
        assert_eq!(bytes_bucket(1000), TokenBucket { rate: 1000, burst: MIN_BYTES_BURST });
        assert_eq!(Limit::default().rate_limit(), RateLimit::default());
    }

    #[test]
    fn zero_and_a_burst_without_a_rate_are_mistakes() {
        let mistake = |limit: Limit| {
            let config = NetworkConfig { receive: limit, ..NetworkConfig::default() };
            config.mistake().map(|(key, value, _)| (key, value))
        };
        let zero = Limit { bytes: Some(0), ..Limit::default() };
        assert_eq!(mistake(zero), Some(("network.receive.bytes".into(), 0)));
        let alone = Limit { packets_burst: Some(7), ..Limit::default() };
        assert_eq!(mistake(alone), Some(("network.receive.packets_burst".into(), 7)));
        assert_eq!(mistake(Limit { bytes: Some(1), bytes_burst: Some(1), ..Limit::default() }), None);
    }
}
