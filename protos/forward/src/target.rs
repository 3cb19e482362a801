//! Where the agent is to connect.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A loopback address and a port: the agent connects to nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    address: IpAddr,
    port: u16,
}

/// An address that is not loopback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a loopback address")]
pub struct NotLoopback(pub IpAddr);

impl Target {
    /// Bytes of an encoded target.
    pub const LEN: usize = 18;

    /// What a client of loopback has dialled.
    ///
    /// # Errors
    /// If it is not loopback.
    pub fn new(dialled: SocketAddr) -> Result<Self, NotLoopback> {
        let address = dialled.ip().to_canonical();
        if address.is_loopback() { Ok(Self { address, port: dialled.port() }) } else { Err(NotLoopback(address)) }
    }

    /// The target in bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        let address = match self.address {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        let mut bytes = [0; Self::LEN];
        let parts = address.octets().into_iter().chain(self.port.to_be_bytes());
        bytes.iter_mut().zip(parts).for_each(|(place, byte)| *place = byte);
        bytes
    }

    /// Reads what [`Self::encode`] has written.
    ///
    /// # Errors
    /// If it is not loopback.
    pub fn decode(bytes: [u8; Self::LEN]) -> Result<Self, NotLoopback> {
        let [address @ .., high, low] = bytes;
        Self::new(SocketAddr::new(Ipv6Addr::from(address).into(), u16::from_be_bytes([high, low])))
    }

    /// What to try, in this order. A client that was refused at one family's address would try the other's, as containerd does; but
    /// here the first of its connections is accepted before the guest is asked. So the other family is tried for it.
    pub fn attempts(self) -> [SocketAddr; 2] {
        let other = match self.address {
            IpAddr::V4(_) => IpAddr::from(Ipv6Addr::LOCALHOST),
            IpAddr::V6(_) => Ipv4Addr::LOCALHOST.into(),
        };
        [SocketAddr::new(self.address, self.port), SocketAddr::new(other, self.port)]
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attempts(dialled: &str) -> Vec<String> {
        Target::new(dialled.parse().unwrap()).unwrap().attempts().map(|one| one.to_string()).into()
    }

    #[test]
    fn the_address_that_was_dialled_is_tried_first_and_then_the_other_family() {
        assert_eq!(attempts("127.0.0.1:80"), ["127.0.0.1:80", "[::1]:80"]);
        assert_eq!(attempts("127.0.0.53:53"), ["127.0.0.53:53", "[::1]:53"]);
        assert_eq!(attempts("[::1]:80"), ["[::1]:80", "127.0.0.1:80"]);
        assert_eq!(attempts("[::ffff:127.0.0.1]:80"), ["127.0.0.1:80", "[::1]:80"]);
    }

    proptest! {
        #[test]
        fn nothing_but_loopback_comes_out_of_any_bytes(bytes: [u8; Target::LEN]) {
            if let Ok(target) = Target::decode(bytes) {
                prop_assert!(target.attempts().iter().all(|one| one.ip().is_loopback()));
            }
        }

        #[test]
        fn a_target_survives_the_way(end: [u8; 3], port: u16) {
            for address in [IpAddr::from([127, end[0], end[1], end[2]]), Ipv6Addr::LOCALHOST.into()] {
                let target = Target::new(SocketAddr::new(address, port)).unwrap();
                prop_assert_eq!(Target::decode(target.encode()), Ok(target));
                prop_assert_eq!(target.attempts()[0], SocketAddr::new(address, port));
            }
        }

        #[test]
        fn other_addresses_are_refused(address: [u8; 4], port: u16) {
            prop_assume!(address[0] != 127);
            let address = IpAddr::from(address);
            prop_assert_eq!(Target::new(SocketAddr::new(address, port)), Err(NotLoopback(address)));
        }
    }
}
