//! The message for the agent.

use std::{collections::HashMap, net::IpAddr};

use caisson_netlink::{
    address::{Address, FOREVER, KEPT_FLAGS},
    link::Link,
    route::Route,
    state::State,
};
use caisson_protos::agent::{
    ConfigureNetworkRequest, NetworkAddress, NetworkHop, NetworkInterface, NetworkNeighbour, NetworkRoute,
};

use super::plan::{Interface, Refusal};

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// 0 for ever.
fn lifetime(seconds: u32) -> u32 {
    if seconds == FOREVER { 0 } else { seconds.max(1) }
}

/// The message for the interfaces that the guest gets, and the loopback interface.
pub(super) fn message(state: &State, interfaces: &[Interface]) -> Result<ConfigureNetworkRequest, Refusal> {
    let mut request = ConfigureNetworkRequest::default();
    // By number.
    let mut names: HashMap<u32, &str> = HashMap::new();
    for link in &state.links {
        let card = interfaces.iter().find(|one| one.index == link.index);
        if card.is_some() || link.is_loopback() {
            names.insert(link.index, &link.name);
            request.interfaces.push(interface(link, card, state));
        }
    }
    for route in &state.routes {
        request.routes.extend(self::route(route, &names, state)?);
    }
    Ok(request)
}

fn interface(link: &Link, card: Option<&Interface>, state: &State) -> NetworkInterface {
    let own = state.addresses.iter().filter(|address| address.interface == link.index && is_kept(address));
    let (ipv4, mut ipv6): (Vec<_>, Vec<_>) = own.partition(|address| address.ip.is_ipv4());
    // The kernel puts each new one first; so their order stays.
    ipv6.reverse();
    let neighbours = state.neighbours.iter().filter(|one| one.interface == link.index && one.mac.len() == 6);
    let neighbours =
        neighbours.map(|one| NetworkNeighbour { ip: bytes(one.ip), mac: one.mac.clone(), ..Default::default() });
    NetworkInterface {
        name: link.name.clone(),
        mac: card.map(|card| card.mac.to_vec()).unwrap_or_default(),
        mtu: link.mtu,
        // A guest always has its loopback interface.
        up: link.is_up() || card.is_none(),
        no_arp: card.is_some() && !link.has_arp(),
        addresses: ipv4.into_iter().chain(ipv6).map(address).collect(),
        neighbours: neighbours.collect(),
        ..Default::default()
    }
}

/// Not kept: an IPv6 address that somebody else has, too, or that the kernel makes for itself from time to time.
fn is_kept(address: &Address) -> bool {
    address.ip.is_ipv4() || address.flags & (libc::IFA_F_DADFAILED | libc::IFA_F_TEMPORARY) == 0
}

fn address(address: &Address) -> NetworkAddress {
    NetworkAddress {
        ip: bytes(address.ip),
        prefix: address.prefix.into(),
        peer: address.peer.map(bytes).unwrap_or_default(),
        broadcast: address.broadcast.map(|ip| ip.octets().to_vec()).unwrap_or_default(),
        label: address.label.clone().unwrap_or_default(),
        scope: address.scope.into(),
        flags: address.flags & KEPT_FLAGS,
        metric: address.metric,
        valid_seconds: lifetime(address.valid),
        preferred_seconds: match lifetime(address.preferred) {
            // Deprecated already: the least that is not for ever.
            _ if address.preferred == 0 => 1,
            seconds => seconds,
        },
        ..Default::default()
    }
}

/// None for what the guest's kernel makes itself, or what is in a table that no rule names.
fn route(route: &Route, names: &HashMap<u32, &str>, state: &State) -> Result<Option<NetworkRoute>, Refusal> {
    let kernels = route.protocol == libc::RTPROT_KERNEL;
    let (main, local) = (u32::from(libc::RT_TABLE_MAIN), u32::from(libc::RT_TABLE_LOCAL));
    if !(route.table == main || route.table == local && !kernels) {
        return Ok(None);
    }
    let named = |index: u32| state.links.iter().find(|link| link.index == index);
    if kernels && route.hops.iter().any(|hop| named(hop.interface).is_none_or(|link| link.is_loopback())) {
        return Ok(None);
    }
    if let Some(what) = route.beyond {
        return Err(Refusal::Route { route: route.to_string(), what: what.into() });
    }
    let mut hops = Vec::new();
    for hop in &route.hops {
        let Some(name) = names.get(&hop.interface) else {
            if kernels {
                return Ok(None);
            }
            let name = named(hop.interface).map_or("", |link| &link.name);
            let what = format!("a next hop on interface {name:?}");
            return Err(Refusal::Route { route: route.to_string(), what });
        };
        hops.push(NetworkHop {
            interface: (*name).into(),
            gateway: hop.gateway.map(bytes).unwrap_or_default(),
            on_link: hop.on_link,
            weight: hop.weight.into(),
            ..Default::default()
        });
    }
    Ok(Some(NetworkRoute {
        destination: bytes(route.destination),
        prefix: route.prefix.into(),
        table: route.table,
        type_: route.kind.into(),
        protocol: route.protocol.into(),
        scope: route.scope.into(),
        tos: route.tos.into(),
        metric: route.metric,
        source: route.source.map(bytes).unwrap_or_default(),
        preference: route.preference.into(),
        metrics: route.metrics.iter().map(|(kind, value)| (u32::from(*kind), *value)).collect(),
        congestion: route.congestion.clone().unwrap_or_default(),
        hops,
        expires_seconds: lifetime(route.expires),
        ..Default::default()
    }))
}

/// Whether two messages are alike but for the rest of lifetimes, which changes all the time.
pub(super) fn is_like(one: &ConfigureNetworkRequest, other: &ConfigureNetworkRequest) -> bool {
    let comparable = |message: &ConfigureNetworkRequest| {
        let mut message = message.clone();
        for address in message.interfaces.iter_mut().flat_map(|interface| &mut interface.addresses) {
            address.valid_seconds = address.valid_seconds.min(1);
            address.preferred_seconds = address.preferred_seconds.min(1);
        }
        for route in &mut message.routes {
            route.expires_seconds = route.expires_seconds.min(1);
        }
        message
    };
    comparable(one) == comparable(other)
}
