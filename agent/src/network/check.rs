//! From a message to what is wanted, every field checked.

use std::{
    collections::HashSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use caisson_netlink::{
    address::{Address, FOREVER, KEPT_FLAGS},
    link::NAME_MAX,
    neighbour::Neighbour,
    route::{Hop, Route},
};
use caisson_protos::{
    agent::{ConfigureNetworkRequest, NetworkAddress, NetworkHop, NetworkInterface, NetworkNeighbour, NetworkRoute},
    network::{MAX_ADDRESSES, MAX_HOPS, MAX_INTERFACES, MAX_NEIGHBOURS, MAX_ROUTES},
};

use super::NetworkError;

/// The loopback interface.
pub(super) const LOOPBACK: &str = "lo";

/// How the network is to be. The numbers of interfaces are not known here: those in addresses, routes and neighbours are 0.
#[derive(Debug)]
pub(super) struct Wanted {
    pub interfaces: Vec<Interface>,
    pub routes: Vec<WantedRoute>,
}

/// An interface.
#[derive(Debug)]
pub(super) struct Interface {
    pub name: String,
    /// None for the loopback interface.
    pub mac: Option<Vec<u8>>,
    pub mtu: Option<u32>,
    pub up: bool,
    pub arp: bool,
    pub addresses: Vec<Address>,
    pub neighbours: Vec<Neighbour>,
}

/// A route and the names of its hops' interfaces.
#[derive(Debug)]
pub(super) struct WantedRoute {
    pub route: Route,
    pub interfaces: Vec<String>,
}

type Result<T> = std::result::Result<T, NetworkError>;

fn invalid(field: impl Into<String>, value: impl fmt::Debug, rule: &'static str) -> NetworkError {
    NetworkError::Invalid { field: field.into(), value: format!("{value:?}"), rule }
}

fn bounded<T>(field: &str, values: &[T], most: usize) -> Result<()> {
    if values.len() > most {
        return Err(invalid(field, values.len(), "entries are more than the agent takes"));
    }
    Ok(())
}

fn ip(field: &str, bytes: &[u8]) -> Result<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(octets).into());
    }
    let octets = <[u8; 16]>::try_from(bytes).map_err(|_| invalid(field, bytes, "is not 4 or 16 bytes"))?;
    Ok(Ipv6Addr::from(octets).into())
}

fn optional_ip(field: &str, bytes: &[u8]) -> Result<Option<IpAddr>> {
    if bytes.is_empty() { Ok(None) } else { ip(field, bytes).map(Some) }
}

fn byte(field: &str, value: u32) -> Result<u8> {
    u8::try_from(value).map_err(|_| invalid(field, value, "exceeds 255"))
}

fn prefix(field: &str, value: u32, ip: IpAddr) -> Result<u8> {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    byte(field, value)?;
    u8::try_from(value)
        .ok()
        .filter(|bits| *bits <= most)
        .ok_or_else(|| invalid(field, value, if ip.is_ipv4() { "exceeds 32 bits" } else { "exceeds 128 bits" }))
}

fn lifetime(seconds: u32) -> u32 {
    if seconds == 0 { FOREVER } else { seconds }
}

/// Checks every field of `request`.
pub(super) fn check(request: &ConfigureNetworkRequest) -> Result<Wanted> {
    bounded("interfaces", &request.interfaces, MAX_INTERFACES)?;
    bounded("routes", &request.routes, MAX_ROUTES)?;
    let interfaces: Vec<_> = request.interfaces.iter().map(interface).collect::<Result<_>>()?;
    let (mut names, mut macs) = (HashSet::new(), HashSet::new());
    for one in &interfaces {
        if !names.insert(one.name.as_str()) {
            return Err(invalid("interfaces", &one.name, "is there twice"));
        }
        if let Some(mac) = &one.mac
            && !macs.insert(mac)
        {
            return Err(invalid(format!("interface {:?}: mac", one.name), mac, "is another interface's, too"));
        }
    }
    names.insert(LOOPBACK);
    let routes = request.routes.iter().map(|one| route(one, &names)).collect::<Result<_>>()?;
    Ok(Wanted { interfaces, routes })
}

fn interface(message: &NetworkInterface) -> Result<Interface> {
    let name = &message.name;
    let plain = |byte: u8| !byte.is_ascii_whitespace() && byte != b'/' && byte != b':' && byte != 0;
    let fits = (1..=NAME_MAX).contains(&name.len()) && name != "." && name != ".." && name.bytes().all(plain);
    if !fits {
        return Err(invalid("interface", name, "is not 1 to 15 bytes without white space, \"/\" and \":\""));
    }
    let field = |field: &str| format!("interface {name:?}: {field}");
    let mac = match (message.mac.len(), name.as_str()) {
        (0, LOOPBACK) => None,
        (6, other) if other != LOOPBACK => Some(message.mac.clone()),
        _ => return Err(invalid(field("mac"), &message.mac, "is not 6 bytes, or none for \"lo\"")),
    };
    let mtu = (message.mtu != 0).then_some(message.mtu);
    if let Some(mtu) = mtu
        && mac.is_some()
        && !(68..=65535).contains(&mtu)
    {
        return Err(invalid(field("mtu"), mtu, "is not between 68 and 65535"));
    }
    bounded(&field("addresses"), &message.addresses, MAX_ADDRESSES)?;
    bounded(&field("neighbours"), &message.neighbours, MAX_NEIGHBOURS)?;
    Ok(Interface {
        name: name.clone(),
        mac,
        mtu,
        up: message.up,
        arp: !message.no_arp,
        addresses: message.addresses.iter().map(|one| address(one, name)).collect::<Result<_>>()?,
        neighbours: message.neighbours.iter().map(|one| neighbour(one, name)).collect::<Result<_>>()?,
    })
}

fn address(message: &NetworkAddress, interface: &str) -> Result<Address> {
    let field = |field: &str| format!("interface {interface:?}: address: {field}");
    let own = ip(&field("ip"), &message.ip)?;
    let mut address = Address::new(0, own, prefix(&field("prefix"), message.prefix, own)?);
    address.peer = optional_ip(&field("peer"), &message.peer)?;
    if let Some(peer) = address.peer
        && peer.is_ipv4() != own.is_ipv4()
    {
        return Err(invalid(field("peer"), peer, "is of another family than the address"));
    }
    address.broadcast = match (optional_ip(&field("broadcast"), &message.broadcast)?, own) {
        (None, _) => None,
        (Some(IpAddr::V4(broadcast)), IpAddr::V4(_)) => Some(broadcast),
        (Some(other), _) => return Err(invalid(field("broadcast"), other, "is IPv6's, or with an IPv6 address")),
    };
    if message.label.len() > NAME_MAX || message.label.contains('\0') {
        return Err(invalid(field("label"), &message.label, "is not at most 15 bytes"));
    }
    if own.is_ipv4() {
        // What the kernel makes of none.
        let label = if message.label.is_empty() { interface } else { &message.label };
        address.label = Some(label.to_owned());
    }
    address.scope = byte(&field("scope"), message.scope)?;
    if message.flags & !KEPT_FLAGS != 0 {
        return Err(invalid(field("flags"), message.flags, "has flags of a state"));
    }
    address.flags = message.flags;
    address.metric = message.metric;
    address.valid = lifetime(message.valid_seconds);
    address.preferred = lifetime(message.preferred_seconds);
    if address.preferred > address.valid {
        return Err(invalid(field("preferred_seconds"), message.preferred_seconds, "exceeds valid_seconds"));
    }
    Ok(address)
}

fn neighbour(message: &NetworkNeighbour, interface: &str) -> Result<Neighbour> {
    let field = |field: &str| format!("interface {interface:?}: neighbour: {field}");
    if message.mac.len() != 6 {
        return Err(invalid(field("mac"), &message.mac, "is not 6 bytes"));
    }
    let ip = ip(&field("ip"), &message.ip)?;
    Ok(Neighbour { interface: 0, ip, mac: message.mac.clone(), state: libc::NUD_PERMANENT })
}

fn route(message: &NetworkRoute, names: &HashSet<&str>) -> Result<WantedRoute> {
    let destination = ip("route: destination", &message.destination)?;
    let mut route = Route::new(destination, prefix("route: prefix", message.prefix, destination)?);
    let field = |name: &str| format!("route {destination}/{}: {name}", message.prefix);
    if ![libc::RT_TABLE_MAIN, libc::RT_TABLE_LOCAL].map(u32::from).contains(&message.table) {
        return Err(invalid(field("table"), message.table, "is neither main nor local"));
    }
    route.table = message.table;
    route.kind = byte(&field("type"), message.type_)?;
    route.protocol = byte(&field("protocol"), message.protocol)?;
    route.scope = byte(&field("scope"), message.scope)?;
    route.tos = byte(&field("tos"), message.tos)?;
    route.preference = byte(&field("preference"), message.preference)?;
    route.metric = message.metric;
    route.source = optional_ip(&field("source"), &message.source)?;
    if let Some(source) = route.source
        && source.is_ipv4() != destination.is_ipv4()
    {
        return Err(invalid(field("source"), source, "is of another family than the destination"));
    }
    route.expires = lifetime(message.expires_seconds);
    for (kind, value) in &message.metrics {
        // RTAX_LOCK to RTAX_FASTOPEN_NO_COOKIE; 16 is RTAX_CC_ALGO.
        let known = u16::try_from(*kind).ok().filter(|kind| (1..=17).contains(kind) && *kind != 16);
        let known = known.ok_or_else(|| invalid(field("metrics"), kind, "is no metric that is a number"))?;
        route.metrics.insert(known, *value);
    }
    if message.congestion.len() > 15 || message.congestion.contains('\0') {
        return Err(invalid(field("congestion"), &message.congestion, "is not at most 15 bytes"));
    }
    route.congestion = (!message.congestion.is_empty()).then(|| message.congestion.clone());
    bounded(&field("hops"), &message.hops, MAX_HOPS)?;
    let mut interfaces = Vec::new();
    for one in &message.hops {
        if !names.contains(one.interface.as_str()) {
            return Err(invalid(field("interface"), &one.interface, "is not an interface of the message"));
        }
        route.hops.push(hop(one, &field)?);
        interfaces.push(one.interface.clone());
    }
    Ok(WantedRoute { route, interfaces })
}

fn hop(message: &NetworkHop, field: &impl Fn(&str) -> String) -> Result<Hop> {
    Ok(Hop {
        interface: 0,
        gateway: optional_ip(&field("gateway"), &message.gateway)?,
        on_link: message.on_link,
        weight: byte(&field("weight"), message.weight)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eth0() -> NetworkInterface {
        NetworkInterface { name: "eth0".into(), mac: vec![2, 0, 0, 0, 0, 1], mtu: 1500, up: true, ..Default::default() }
    }

    fn refusal(interfaces: Vec<NetworkInterface>, routes: Vec<NetworkRoute>) -> String {
        let request = ConfigureNetworkRequest { interfaces, routes, ..Default::default() };
        let error = check(&request).expect_err("it is refused");
        assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT);
        error.to_string()
    }

    #[test]
    fn a_refusal_names_interface_field_and_value() {
        let address = |ip: &[u8], prefix| NetworkAddress { ip: ip.to_vec(), prefix, ..Default::default() };
        let with = |change: &dyn Fn(&mut NetworkInterface)| {
            let mut one = eth0();
            change(&mut one);
            vec![one]
        };
        for (interfaces, expected) in [
            (with(&|one| one.name = "a/b".into()), r#"interface: "a/b" is not 1 to 15 bytes"#),
            (with(&|one| one.mac = vec![1]), r#"interface "eth0": mac: [1] is not 6 bytes"#),
            (with(&|one| one.mtu = 67), r#"interface "eth0": mtu: 67 is not between 68"#),
            (with(&|one| one.addresses = vec![address(&[10, 0, 0, 1], 33)]), "address: prefix: 33 exceeds 32 bits"),
            (with(&|one| one.addresses = vec![address(&[10, 0], 8)]), "address: ip: [10, 0] is not 4 or 16 bytes"),
            (with(&|one| one.addresses = vec![address(&[10, 0, 0, 1], 8); 513]), "addresses: 513 entries"),
            (vec![eth0(), eth0()], r#"interfaces: "eth0" is there twice"#),
        ] {
            let message = refusal(interfaces, Vec::new());
            assert!(message.contains(expected), "{message}");
        }
        let hops = vec![NetworkHop { interface: "eth7".into(), ..Default::default() }];
        let route = NetworkRoute { destination: vec![10, 1, 0, 0], prefix: 16, table: 254, hops, ..Default::default() };
        let message = refusal(vec![eth0()], vec![route.clone()]);
        assert_eq!(message, r#"route 10.1.0.0/16: interface: "eth7" is not an interface of the message"#);
        let message = refusal(vec![eth0()], vec![NetworkRoute { table: 100, ..route }]);
        assert_eq!(message, "route 10.1.0.0/16: table: 100 is neither main nor local");
    }

    #[test]
    fn the_loopback_interface_has_no_hardware_address() {
        let lo = NetworkInterface { name: "lo".into(), mtu: 65536, up: true, ..Default::default() };
        let request = ConfigureNetworkRequest { interfaces: vec![lo, eth0()], ..Default::default() };
        let wanted = check(&request).unwrap();
        assert_eq!((wanted.interfaces[0].mac.clone(), wanted.interfaces[0].mtu), (None, Some(65536)));
    }
}
