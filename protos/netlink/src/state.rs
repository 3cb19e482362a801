//! All five tables of a network namespace.

use std::io;

use crate::{
    Refused, Socket,
    address::{self, Address},
    link::{self, Link},
    message::Message,
    neighbour::{self, Neighbour},
    route::{self, Route},
    rule::{self, Rule},
};

const FAMILIES: [i32; 2] = [libc::AF_INET, libc::AF_INET6];

/// What a network namespace holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Interfaces.
    pub links: Vec<Link>,
    /// Their addresses.
    pub addresses: Vec<Address>,
    /// Routes of all tables.
    pub routes: Vec<Route>,
    /// Rules.
    pub rules: Vec<Rule>,
    /// Neighbours that were set and not found out.
    pub neighbours: Vec<Neighbour>,
}

impl State {
    /// Reads it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(socket: &mut Socket) -> Result<Self, Refused> {
        Ok(Self {
            links: links(socket)?,
            addresses: addresses(socket)?,
            routes: routes(socket)?,
            rules: both(socket, rule::list, |entry| Some(Rule::parse(entry)))?,
            neighbours: neighbours(socket)?,
        })
    }
}

/// The interfaces.
///
/// # Errors
/// What the kernel says.
pub fn links(socket: &mut Socket) -> Result<Vec<Link>, Refused> {
    entries(socket, &link::list(), |entry| Some(Link::parse(entry)))
}

/// The addresses of all interfaces.
///
/// # Errors
/// What the kernel says.
pub fn addresses(socket: &mut Socket) -> Result<Vec<Address>, Refused> {
    entries(socket, &address::list(), |entry| Some(Address::parse(entry)))
}

/// The routes of all tables.
///
/// # Errors
/// What the kernel says.
pub fn routes(socket: &mut Socket) -> Result<Vec<Route>, Refused> {
    both(socket, route::list, |entry| match Route::parse(entry) {
        Some(None) => None,
        parsed => Some(parsed.flatten()),
    })
}

/// The neighbours that were set and not found out.
///
/// # Errors
/// What the kernel says.
pub fn neighbours(socket: &mut Socket) -> Result<Vec<Neighbour>, Refused> {
    let mut all = both(socket, neighbour::list, |entry| Some(Neighbour::parse(entry)))?;
    all.retain(Neighbour::is_static);
    Ok(all)
}

/// Of both families. One that the kernel does not have has no entries.
fn both<T>(
    socket: &mut Socket,
    list: impl Fn(i32) -> Message,
    parse: impl Fn(&[u8]) -> Option<Option<T>>,
) -> Result<Vec<T>, Refused> {
    let mut all = Vec::new();
    for family in FAMILIES {
        match entries(socket, &list(family), &parse) {
            Err(error) if error.is(libc::EOPNOTSUPP) || error.is(libc::EAFNOSUPPORT) => {}
            found => all.extend(found?),
        }
    }
    Ok(all)
}

/// `parse`: None for what is passed over, `Some(None)` for what is malformed.
fn entries<T>(
    socket: &mut Socket,
    list: &Message,
    parse: impl Fn(&[u8]) -> Option<Option<T>>,
) -> Result<Vec<T>, Refused> {
    let entries = socket.dump(list)?;
    let parsed: Option<Vec<T>> = entries.iter().filter_map(|entry| parse(entry)).collect();
    parsed.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is malformed").into())
}
