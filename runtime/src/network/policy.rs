//! What a pod's network cards may send and receive: the operator's configuration, and the bandwidth annotations that Kubernetes'
//! bandwidth plugin reads. Pure.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use caisson_protos::{
    agent::NetworkInterface,
    monitor::{AllowedSources, RateLimit},
};

use crate::host::config::{NetworkConfig, bytes_bucket};

/// What a pod may receive, bits a second (kubernetes.io, "Network plugins", support traffic shaping).
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// What a pod may send.
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// The least and the greatest bandwidth that Kubernetes takes (pkg/util/bandwidth): 1k and 1P, bits a second.
const BANDWIDTH: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// An annotation that is no bandwidth.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("annotation {key} is {value:?}: it must be bits a second from 1k to 1P, such as 10M or 1Gi")]
pub struct InvalidBandwidth {
    key: &'static str,
    value: String,
}

/// What each card of a pod gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What it may send.
    pub send: RateLimit,
    /// What it may receive.
    pub receive: RateLimit,
    anti_spoofing: bool,
}

impl Policy {
    /// The stricter one of configuration and annotations.
    ///
    /// # Errors
    /// An annotation that is no bandwidth.
    pub fn new(config: &NetworkConfig, annotations: &BTreeMap<String, String>) -> Result<Self, InvalidBandwidth> {
        let bandwidth = |key: &'static str| annotations.get(key).map(|value| bandwidth(key, value)).transpose();
        Ok(Self {
            send: limited(config.send.rate_limit(), bandwidth(EGRESS)?),
            receive: limited(config.receive.rate_limit(), bandwidth(INGRESS)?),
            anti_spoofing: config.anti_spoofing,
        })
    }

    /// The addresses from which a card with these addresses may send; None: any.
    pub fn sources(&self, interface: Option<&NetworkInterface>) -> Option<AllowedSources> {
        if !self.anti_spoofing {
            return None;
        }
        let mut sources = AllowedSources::default();
        for address in interface.into_iter().flat_map(|interface| &interface.addresses) {
            let ip = address.ip.as_slice();
            sources.ipv4.extend(<[u8; 4]>::try_from(ip).map(Ipv4Addr::from));
            sources.ipv6.extend(<[u8; 16]>::try_from(ip).map(Ipv6Addr::from));
        }
        Some(sources)
    }
}

/// `limit`, and at most `bits` a second.
fn limited(mut limit: RateLimit, bits: Option<u64>) -> RateLimit {
    if let Some(bits) = bits {
        let rate = bits / 8;
        if limit.bytes.is_none_or(|bytes| rate < bytes.rate) {
            limit.bytes = Some(bytes_bucket(rate));
        }
    }
    limit
}

fn bandwidth(key: &'static str, value: &str) -> Result<u64, InvalidBandwidth> {
    let parsed = quantity(value).filter(|bits| BANDWIDTH.contains(bits));
    parsed.ok_or_else(|| InvalidBandwidth { key, value: value.to_owned() })
}

/// A Kubernetes quantity (apimachinery, resource.Quantity) that is not negative, rounded up to a whole number.
fn quantity(text: &str) -> Option<u64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at_checked(end)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // More digits than these are beyond what a bandwidth can be.
    if whole.len() + fraction.len() == 0 || whole.len() + fraction.len() > 20 || fraction.contains('.') {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let (multiplier, divisor) = scale(suffix)?;
    let divisor = 10u128.checked_pow(fraction.len().try_into().ok()?)?.checked_mul(divisor)?;
    u64::try_from(digits.checked_mul(multiplier)?.div_ceil(divisor)).ok()
}

/// What a quantity's suffix multiplies with, and divides by.
fn scale(suffix: &str) -> Option<(u128, u128)> {
    let decimal = |power: u32| Some((10u128.checked_pow(power)?, 1));
    match suffix {
        "" => decimal(0),
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1_000)),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => Some((1 << 10, 1)),
        "Mi" => Some((1 << 20, 1)),
        "Gi" => Some((1 << 30, 1)),
        "Ti" => Some((1 << 40, 1)),
        "Pi" => Some((1 << 50, 1)),
        "Ei" => Some((1 << 60, 1)),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let scale = 10u128.checked_pow(power.unsigned_abs())?;
            Some(if power < 0 { (1, scale) } else { (scale, 1) })
        }
    }
}

#[cfg(test)]
mod tests {
    use caisson_protos::monitor::TokenBucket;
    use proptest::prelude::*;

    use super::*;
    use crate::host::config::Limit;

    fn annotated(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, value) in [
            ("0", 0),
            ("10M", 10_000_000),
            ("1.5k", 1500),
            (".5G", 500_000_000),
            ("2.", 2),
            ("+7", 7),
            ("1Gi", 1 << 30),
            ("1e6", 1_000_000),
            ("12E2", 1200),
            ("1500m", 2),
            ("1e-3", 1),
            ("1E", 1_000_000_000_000_000_000),
        ] {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for text in [
            "",
            ".",
            "k",
            "-1",
            "1 M",
            "1MB",
            "1K",
            "1e",
            "1e1.5",
            "1..2",
            "0x10",
            "1e40",
            "99999999999999999999999",
            "1é",
        ] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn the_annotations_limit_what_a_pod_receives_and_sends() {
        let config = NetworkConfig::default();
        let policy = Policy::new(&config, &annotated(EGRESS, "8M")).unwrap();
        assert_eq!(policy.send.bytes, Some(TokenBucket { rate: 1_000_000, burst: 65536 }));
        assert_eq!(policy.receive, RateLimit::default());
        let policy = Policy::new(&config, &annotated(INGRESS, "8M")).unwrap();
        assert_eq!((policy.send.bytes, policy.receive.bytes.unwrap().rate), (None, 1_000_000));
        for value in ["999", "2P", "fast", "-8M"] {
            let refused = Policy::new(&config, &annotated(EGRESS, value)).unwrap_err().to_string();
            assert!(refused.contains(EGRESS) && refused.contains(value), "{refused}");
        }
    }

    #[test]
    fn the_stricter_of_configuration_and_annotation_counts() {
        let send = Limit { bytes: Some(1000), packets: Some(10), ..Limit::default() };
        let config = NetworkConfig { send, ..NetworkConfig::default() };
        let rate = |value| Policy::new(&config, &annotated(EGRESS, value)).unwrap().send;
        assert_eq!(rate("80k").bytes.unwrap().rate, 1000);
        assert_eq!(rate("4k").bytes.unwrap().rate, 500);
        assert_eq!(rate("4k").operations.unwrap().rate, 10);
    }

    #[test]
    fn a_card_sends_from_its_own_addresses_alone_where_that_is_asked_for() {
        let interface = NetworkInterface {
            addresses: [vec![10, 0, 0, 2], vec![0xfd; 16], vec![1, 2, 3]]
                .into_iter()
                .map(|ip| caisson_protos::agent::NetworkAddress { ip, ..Default::default() })
                .collect(),
            ..NetworkInterface::default()
        };
        let config = NetworkConfig { anti_spoofing: true, ..NetworkConfig::default() };
        let sources = Policy::new(&config, &BTreeMap::new()).unwrap().sources(Some(&interface)).unwrap();
        assert_eq!((sources.ipv4, sources.ipv6), (vec![[10, 0, 0, 2].into()], vec![[0xfd; 16].into()]));
        assert_eq!(Policy::default().sources(Some(&interface)), None);
    }

    proptest! {
        #[test]
        fn any_annotation_is_a_bandwidth_or_refused(value in ".{0,24}") {
            if let Ok(policy) = Policy::new(&NetworkConfig::default(), &annotated(EGRESS, &value)) {
                let rate = policy.send.bytes.unwrap().rate;
                prop_assert!((125..=125_000_000_000_000).contains(&rate));
            }
        }
    }
}
