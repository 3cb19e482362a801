//! From what a network namespace holds to what the guest gets, or why it cannot. Pure.

use caisson_netlink::{link::Link, state::State};
use caisson_protos::{
    agent::ConfigureNetworkRequest,
    network::{MAX_ADDRESSES, MAX_HOPS, MAX_INTERFACES, MAX_NEIGHBOURS, MAX_ROUTES},
};

use super::{Settings, message};

/// ARPHRD_ETHER.
const ETHERNET: u16 = 1;
/// How the names of taps begin.
const TAP: &str = "ctap";
/// The least that an interface of these kinds needs of its host is its own frames: they can be redirected.
const KINDS: [&str; 6] = ["veth", "macvlan", "ipvlan", "vlan", "bridge", "dummy"];

/// Something in the namespace that a guest cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A device of the host's.
    #[error(
        "interface {name:?} is a physical or virtual function ({device}), which cannot be given to a machine: use a veth, macvlan, ipvlan or vlan interface"
    )]
    Physical {
        /// Its name.
        name: String,
        /// What its bus calls it.
        device: String,
    },
    /// A kind of which too much is in the host's kernel.
    #[error("interface {name:?} is of kind {kind:?}: a guest can have {}", KINDS.join(", "))]
    Kind {
        /// Its name.
        name: String,
        /// The kind.
        kind: String,
    },
    /// Not Ethernet.
    #[error("interface {name:?} has no Ethernet address (hardware type {hardware})")]
    Hardware {
        /// Its name.
        name: String,
        /// ARPHRD_*.
        hardware: u16,
    },
    /// Both cannot be redirected: what arrives for the upper one arrives on the lower one first.
    #[error("interface {name:?} lies on {below:?} in the same namespace: make it in the container instead")]
    Stacked {
        /// Its name.
        name: String,
        /// The other's name.
        below: String,
    },
    /// The guest could not tell them apart.
    #[error("interfaces {one:?} and {other:?} have the same hardware address {mac}")]
    SameAddress {
        /// A name.
        one: String,
        /// The other's name.
        other: String,
        /// The address.
        mac: String,
    },
    /// Policy routing.
    #[error("{rule} is not one of the default rules: source-based and policy routing cannot be had")]
    Rule {
        /// The rule.
        rule: String,
    },
    /// Policy routing, again.
    #[error("the default {family} rule for the table {table} is missing: policy routing cannot be had")]
    NoRule {
        /// IPv4 or IPv6.
        family: &'static str,
        /// The table's name.
        table: &'static str,
    },
    /// A route of a sort that the message cannot say.
    #[error("route {route} has {what}, which a guest cannot have")]
    Route {
        /// The route.
        route: String,
        /// What.
        what: String,
    },
    /// More than the bounds.
    #[error("{count} {what}: a guest can have {most}")]
    TooMany {
        /// Of what.
        what: String,
        /// How many there are.
        count: usize,
        /// How many there may be.
        most: usize,
    },
}

/// An interface that becomes a card of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its largest packet.
    pub mtu: u32,
    /// How many packets may wait to be sent.
    pub queue_length: u32,
}

/// What the guest gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// For each a tap and a card.
    pub interfaces: Vec<Interface>,
    /// For the agent.
    pub message: ConfigureNetworkRequest,
}

/// The name of the tap beside the interface with this number.
pub(super) fn tap_name(interface: u32) -> String {
    format!("{TAP}{interface}")
}

/// Whether `link` is a tap of this or another shim.
pub(super) fn is_tap(link: &Link) -> bool {
    let number = link.name.strip_prefix(TAP).unwrap_or_default();
    link.kind.as_deref() == Some("tun") && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// Plans the guest's network. `taps` are the numbers of the taps that are there already.
///
/// # Errors
/// The first thing that a guest cannot have.
pub fn plan(state: &State, taps: &[u32], settings: Settings) -> Result<Plan, Refusal> {
    check_rules(state)?;
    let mut interfaces: Vec<Interface> = Vec::new();
    for link in state.links.iter().filter(|link| !taps.contains(&link.index) && !is_tap(link)) {
        let Some(interface) = interface(link, state)? else { continue };
        if let Some(other) = interfaces.iter().find(|other| other.mac == interface.mac) {
            let mac = caisson_netlink::neighbour::mac(&interface.mac);
            return Err(Refusal::SameAddress { one: other.name.clone(), other: interface.name, mac });
        }
        interfaces.push(interface);
    }
    // The loopback interface is in the message, too.
    bounded("interfaces", interfaces.len(), settings.cards.min(MAX_INTERFACES - 1))?;
    let message = message::message(state, &interfaces)?;
    for one in &message.interfaces {
        bounded(&format!("addresses of interface {:?}", one.name), one.addresses.len(), MAX_ADDRESSES)?;
        bounded(&format!("static neighbours of interface {:?}", one.name), one.neighbours.len(), MAX_NEIGHBOURS)?;
    }
    bounded("routes", message.routes.len(), MAX_ROUTES)?;
    for (count, route) in message.routes.iter().map(|route| route.hops.len()).enumerate() {
        bounded(&format!("next hops of route {count}"), route, MAX_HOPS)?;
    }
    Ok(Plan { interfaces, message })
}

fn bounded(what: &str, count: usize, most: usize) -> Result<(), Refusal> {
    if count > most {
        return Err(Refusal::TooMany { what: what.into(), count, most });
    }
    Ok(())
}

/// None for what the guest has itself or does not need.
fn interface(link: &Link, state: &State) -> Result<Option<Interface>, Refusal> {
    let named = |index: u32| state.links.iter().find(|other| other.index == index);
    if link.is_loopback() {
        return Ok(None);
    }
    let name = link.name.clone();
    let known = link.kind.as_deref().is_some_and(|kind| KINDS.contains(&kind));
    let idle = !link.is_up() && !state.addresses.iter().any(|address| address.interface == link.index);
    if !known {
        return match &link.kind {
            // Some modules put one into every new namespace: tunl0, sit0, gre0.
            Some(_) if idle => Ok(None),
            Some(kind) => Err(Refusal::Kind { name, kind: kind.clone() }),
            None => {
                let device = link.device.clone().unwrap_or_else(|| "of no known bus".into());
                Err(Refusal::Physical { name, device })
            }
        };
    }
    // What arrives on the port of a bridge is the bridge's, which the guest gets.
    if link.controller.and_then(named).is_some_and(|controller| controller.kind.as_deref() == Some("bridge")) {
        return Ok(None);
    }
    if let Some(below) = link.below.and_then(named) {
        return Err(Refusal::Stacked { name, below: below.name.clone() });
    }
    let mac = <[u8; 6]>::try_from(link.mac.as_slice()).ok().filter(|_| link.hardware == ETHERNET);
    let mac = mac.ok_or_else(|| Refusal::Hardware { name: name.clone(), hardware: link.hardware })?;
    Ok(Some(Interface { index: link.index, name, mac, mtu: link.mtu, queue_length: link.queue_length }))
}

fn check_rules(state: &State) -> Result<(), Refusal> {
    if let Some(rule) = state.rules.iter().find(|rule| !rule.is_default()) {
        return Err(Refusal::Rule { rule: rule.to_string() });
    }
    for (ipv6, family) in [(false, "IPv4"), (true, "IPv6")] {
        let mut rules = state.rules.iter().filter(|rule| rule.ipv6 == ipv6).peekable();
        // A kernel without rules has none.
        if rules.peek().is_none() {
            continue;
        }
        let tables: Vec<u32> = rules.map(|rule| rule.table).collect();
        for (table, name) in [(libc::RT_TABLE_LOCAL, "local"), (libc::RT_TABLE_MAIN, "main")] {
            if !tables.contains(&table.into()) {
                return Err(Refusal::NoRule { family, table: name });
            }
        }
    }
    Ok(())
}
