//! Changes the kernel's network until it is as wanted.

use std::collections::HashMap;

use caisson_netlink::{
    Refused, Socket,
    address::Address,
    link::{self, Link},
    message::Message,
    neighbour::{self, Neighbour},
    route::Route,
    state,
};

use super::{
    NetworkError,
    check::{Interface, LOOPBACK, Wanted, WantedRoute},
    difference::difference,
};

type Result<T> = std::result::Result<T, NetworkError>;

/// What earlier messages have set.
#[derive(Clone, Debug, Default)]
pub(super) struct Applied {
    /// Cards by hardware address. A container may change that of its interface; the number stays.
    cards: HashMap<Vec<u8>, Card>,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

#[derive(Clone, Debug)]
struct Card {
    index: u32,
    name: String,
}

/// An interface that is wanted, and the one that it is.
struct Found<'a> {
    wanted: &'a Interface,
    link: Link,
    /// No message named it before.
    first: bool,
}

/// Makes everything be as `wanted`. `applied` says afterwards what there is to remove, also after an error.
pub(super) fn apply(socket: Socket, applied: &mut Applied, wanted: &Wanted) -> Result<()> {
    let mut work = Work { socket };
    let links = work.read("the interfaces", state::links)?;
    let found = find(&links, applied, wanted)?;
    let next = resolve(&found, &links, wanted)?;
    let before = applied.clone();
    // Until the end both may be there.
    applied.cards.extend(next.cards.clone());
    applied.addresses.extend(next.addresses.iter().cloned());
    applied.routes.extend(next.routes.iter().cloned());
    applied.neighbours.extend(next.neighbours.iter().cloned());

    work.rename(&found)?;
    for one in &found {
        work.set_link(one)?;
    }
    let names = Names::new(&found, &links);
    let firsts: Vec<u32> = found.iter().filter(|one| one.first).map(|one| one.link.index).collect();
    let made = work.set_addresses(&before, &next, &firsts, &names)?;
    work.set_routes(&before, &next, &firsts, &made, &names)?;
    work.set_neighbours(&before, &next, &names)?;
    for (mac, card) in &before.cards {
        if !next.cards.contains_key(mac) && links.iter().any(|link| link.index == card.index) {
            let down = link::set_flags(card.index, 0, libc::IFF_UP);
            work.request(&interface(&card.name), || "set it down".into(), &down)?;
        }
    }
    *applied = next;
    Ok(())
}

fn interface(name: &str) -> String {
    format!("interface {name:?}")
}

/// The interface of each hardware address.
fn find<'a>(links: &[Link], applied: &Applied, wanted: &'a Wanted) -> Result<Vec<Found<'a>>> {
    let find = |one: &'a Interface| {
        let Some(mac) = &one.mac else {
            let link = links.iter().find(|link| link.is_loopback());
            return link.map(|link| Found { wanted: one, link: link.clone(), first: false });
        };
        if let Some(card) = applied.cards.get(mac)
            && let Some(link) = links.iter().find(|link| link.index == card.index)
        {
            return Some(Found { wanted: one, link: link.clone(), first: false });
        }
        // A container's VLAN has its card's address, too; it is younger, and lies on it.
        let of_it = links.iter().filter(|link| link.mac == *mac && link.below.is_none());
        let link = of_it.min_by_key(|link| (link.kind.is_some(), link.index))?;
        Some(Found { wanted: one, link: link.clone(), first: true })
    };
    let missing = |one: &Interface| NetworkError::NoCard {
        name: one.name.clone(),
        mac: neighbour::mac(one.mac.as_deref().unwrap_or_default()),
    };
    wanted.interfaces.iter().map(|one| find(one).ok_or_else(|| missing(one))).collect()
}

/// What is wanted, with the numbers of the interfaces.
fn resolve(found: &[Found<'_>], links: &[Link], wanted: &Wanted) -> Result<Applied> {
    let mut next = Applied::default();
    let mut numbers: HashMap<&str, u32> = HashMap::new();
    numbers.extend(links.iter().find(|link| link.is_loopback()).map(|link| (LOOPBACK, link.index)));
    for Found { wanted: one, link, .. } in found {
        let index = link.index;
        numbers.insert(&one.name, index);
        if let Some(mac) = &one.mac {
            next.cards.insert(mac.clone(), Card { index, name: one.name.clone() });
        }
        next.addresses.extend(one.addresses.iter().cloned().map(|address| Address { interface: index, ..address }));
        let own = one.neighbours.iter().cloned().map(|neighbour| Neighbour { interface: index, ..neighbour });
        next.neighbours.extend(own);
    }
    for WantedRoute { route, interfaces } in &wanted.routes {
        let mut route = route.clone();
        for (hop, name) in route.hops.iter_mut().zip(interfaces) {
            let number = numbers.get(name.as_str());
            hop.interface = *number.ok_or_else(|| NetworkError::NoCard { name: name.clone(), mac: String::new() })?;
        }
        next.routes.push(route);
    }
    Ok(next)
}

/// The names of interfaces, for messages.
struct Names(HashMap<u32, String>);

impl Names {
    fn new(found: &[Found<'_>], links: &[Link]) -> Self {
        let mut names: HashMap<_, _> = links.iter().map(|link| (link.index, link.name.clone())).collect();
        names.extend(found.iter().map(|one| (one.link.index, one.wanted.name.clone())));
        Self(names)
    }

    fn of(&self, index: u32) -> String {
        interface(self.0.get(&index).map_or("", String::as_str))
    }

    fn of_route(&self, route: &Route) -> String {
        route.hops.first().map_or_else(|| "network".into(), |hop| self.of(hop.interface))
    }
}

struct Work {
    socket: Socket,
}

impl Work {
    fn request(&mut self, subject: &str, what: impl FnOnce() -> String, message: &Message) -> Result<()> {
        let refused = |source| NetworkError::Refused { subject: subject.into(), what: what(), source };
        self.socket.request(message).map_err(refused)
    }

    /// As `request`; it may be gone already.
    fn remove(&mut self, subject: &str, what: impl FnOnce() -> String, message: &Message) -> Result<()> {
        match self.request(subject, what, message) {
            Err(NetworkError::Refused { source, .. })
                if [libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL]
                    .iter()
                    .any(|gone| source.is(*gone)) =>
            {
                Ok(())
            }
            result => result,
        }
    }

    fn read<T>(&mut self, what: &str, read: impl FnOnce(&mut Socket) -> std::result::Result<T, Refused>) -> Result<T> {
        let refused =
            |source| NetworkError::Refused { subject: "network".into(), what: format!("read {what}"), source };
        read(&mut self.socket).map_err(refused)
    }

    /// Gives interfaces their names, which they may have to exchange among each other.
    fn rename(&mut self, found: &[Found<'_>]) -> Result<()> {
        let renamed: Vec<_> = found.iter().filter(|one| one.link.name != one.wanted.name).collect();
        for one in &renamed {
            if one.link.is_up() {
                let down = link::set_flags(one.link.index, 0, libc::IFF_UP);
                self.request(&interface(&one.link.name), || "set it down".into(), &down)?;
            }
            let name = &one.link.name;
            if renamed.iter().any(|other| other.wanted.name == *name) {
                let between = format!("card.{}", one.link.index);
                let rename = link::rename(one.link.index, &between);
                self.request(&interface(name), || format!("rename it to {between:?}"), &rename)?;
            }
        }
        for one in &renamed {
            let (old, new) = (&one.link.name, &one.wanted.name);
            let rename = link::rename(one.link.index, new);
            self.request(&interface(new), || format!("give {old:?} this name"), &rename)?;
        }
        Ok(())
    }

    fn set_link(&mut self, one: &Found<'_>) -> Result<()> {
        let (wanted, link) = (one.wanted, &one.link);
        let subject = interface(&wanted.name);
        if one.first {
            if link.is_up() {
                let down = link::set_flags(link.index, 0, libc::IFF_UP);
                self.request(&subject, || "set it down".into(), &down)?;
            }
            // A kernel without IPv6 makes no such address either.
            let _ = self.socket.request(&link::without_link_local(link.index));
        }
        if let Some(mtu) = wanted.mtu.filter(|mtu| *mtu != link.mtu) {
            self.request(&subject, || format!("set its MTU to {mtu}"), &link::set_mtu(link.index, mtu))?;
        }
        if wanted.mac.is_some() && wanted.arp != link.has_arp() {
            let flags = if wanted.arp { 0 } else { libc::IFF_NOARP };
            let message = link::set_flags(link.index, flags, libc::IFF_NOARP);
            self.request(&subject, || format!("set ARP to {}", wanted.arp), &message)?;
        }
        // A first one is down by now.
        let is_up = link.is_up() && !one.first && link.name == wanted.name;
        if wanted.up != is_up {
            let flags = if wanted.up { libc::IFF_UP } else { 0 };
            let message = link::set_flags(link.index, flags, libc::IFF_UP);
            self.request(&subject, || format!("set it {}", if wanted.up { "up" } else { "down" }), &message)?;
        }
        Ok(())
    }

    /// Returns the routes that the kernel made on account of new addresses.
    fn set_addresses(&mut self, before: &Applied, next: &Applied, firsts: &[u32], names: &Names) -> Result<Vec<Route>> {
        let ours = |one: &Address| {
            firsts.contains(&one.interface) || before.addresses.iter().any(|before| before.is_like(one))
        };
        let like = Address::is_like;
        let clash = |one: &Address, other: &Address| {
            (one.interface, one.ip, one.prefix) == (other.interface, other.ip, other.prefix)
        };
        let there = self.read("the addresses", state::addresses)?;
        for address in difference(&next.addresses, &there, ours, like, clash).remove {
            let subject = names.of(address.interface);
            self.remove(&subject, || format!("remove the address {address}"), &address.remove())?;
        }
        // IPv4: with the first address of a network the kernel has removed the others.
        let there = self.read("the addresses", state::addresses)?;
        let missing = difference(&next.addresses, &there, ours, like, clash).add;
        if missing.is_empty() {
            return Ok(Vec::new());
        }
        let routes = self.read("the routes", state::routes)?;
        for mut address in missing {
            if address.ip.is_ipv6() {
                address.flags |= libc::IFA_F_NODAD;
            }
            let subject = names.of(address.interface);
            self.request(&subject, || format!("add the address {address}"), &address.add())?;
        }
        let mut made = self.read("the routes", state::routes)?;
        made.retain(|route| !routes.contains(route));
        Ok(made)
    }

    fn set_routes(
        &mut self,
        before: &Applied,
        next: &Applied,
        firsts: &[u32],
        made: &[Route],
        names: &Names,
    ) -> Result<()> {
        let ours = |one: &Route| {
            made.contains(one)
                || one.hops.iter().any(|hop| firsts.contains(&hop.interface))
                || before.routes.iter().any(|before| before.is_like(one))
        };
        let mut there = self.read("the routes", state::routes)?;
        // What the kernel keeps for its own addresses goes and comes with them.
        there.retain(|route| route.table != u32::from(libc::RT_TABLE_LOCAL) || route.protocol != libc::RTPROT_KERNEL);
        let difference = difference(&next.routes, &there, ours, Route::is_like, |_, _| false);
        for route in &difference.remove {
            self.remove(&names.of_route(route), || format!("remove the route {route}"), &route.remove())?;
        }
        let mut waiting = difference.add;
        while !waiting.is_empty() {
            let (mut refused, mut first) = (Vec::new(), None);
            let count = waiting.len();
            for route in waiting {
                let added = self.request(&names.of_route(&route), || format!("add the route {route}"), &route.add());
                match added {
                    Err(NetworkError::Refused { source, .. }) if source.is(libc::EEXIST) => {}
                    // Its gateway may be reached by one that comes later.
                    Err(error) => {
                        refused.push(route);
                        first.get_or_insert(error);
                    }
                    Ok(()) => {}
                }
            }
            match first {
                Some(error) if refused.len() == count => return Err(error),
                _ => waiting = refused,
            }
        }
        Ok(())
    }

    fn set_neighbours(&mut self, before: &Applied, next: &Applied, names: &Names) -> Result<()> {
        let there = self.read("the neighbours", state::neighbours)?;
        let like = |one: &Neighbour, other: &Neighbour| {
            (one.interface, one.ip, &one.mac) == (other.interface, other.ip, &other.mac)
        };
        let ours = |one: &Neighbour| before.neighbours.iter().any(|before| like(before, one));
        let difference = difference(&next.neighbours, &there, ours, like, |_, _| false);
        let replaced =
            |one: &Neighbour| difference.add.iter().any(|new| (new.interface, new.ip) == (one.interface, one.ip));
        for old in difference.remove.iter().filter(|one| !replaced(one)) {
            self.remove(&names.of(old.interface), || format!("remove the neighbour {old}"), &old.remove())?;
        }
        for new in &difference.add {
            self.request(&names.of(new.interface), || format!("set the neighbour {new}"), &new.set())?;
        }
        Ok(())
    }
}
