//! The pod's network: its network namespace on the host, as the CNI plugins made it, continues in the guest.
//!
//! ```text
//!   network namespace ─► State (five tables) ─► plan (pure) ─► taps, redirects ─► caisson-vmm
//!          │ netlink notifications                   └─► ConfigureNetworkRequest ─► agent
//!          └─► watch ─► the next plan, if it differs
//! ```
//!
//! For each interface there is a tap in the same namespace. What arrives on the interface goes to the tap, and what the guest sends
//! goes from the tap to the interface; both before the host's own network stack sees it. The addresses stay on the interface, where
//! plugins and operators look for them.
//!
//! Nothing here waits for a network, and nothing polls: a namespace without interfaces is as good as any, and the kernel reports
//! what appears later.

pub mod forward;
#[cfg(test)]
mod lab;
mod message;
mod namespace;
mod plan;
mod record;
mod redirect;
mod tap;
#[cfg(test)]
mod tests;
mod watch;

use std::{collections::BTreeMap, io, os::fd::OwnedFd};

use caisson_netlink::{Refused, Socket, Subscription, link, state, state::State};
use caisson_protos::agent::ConfigureNetworkRequest;

pub use self::{
    namespace::{Namespace, NamespaceError, TaskThread},
    plan::{Interface, Plan, Refusal, plan},
    record::Record,
    watch::Watch,
};
use self::{redirect::Redirect, tap::Tap};

/// Why the guest cannot have the namespace's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is something in it that a guest cannot have.
    #[error("network namespace: {0}")]
    Refusal(#[from] Refusal),
    /// The system refused something.
    #[error("network namespace: cannot {what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The error.
        source: Refused,
    },
}

impl NetworkError {
    /// Whether the namespace holds what no guest can have; otherwise the system failed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refusal(_))
    }
}

pub(crate) fn system<E: Into<Refused>>(what: impl Into<String>) -> impl FnOnce(E) -> NetworkError {
    |source| NetworkError::System { what: what.into(), source: source.into() }
}

/// What the machine allows.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How many pairs of queues a network card may have: at most one for each vCPU is of use.
    pub queues: u16,
    /// How many cards the machine may have.
    pub cards: usize,
    /// How many queues all cards that come at once may have together.
    pub descriptors: u16,
}

impl Settings {
    /// How many pairs of queues each of `cards` cards gets that come at once.
    fn queues_of_each(&self, cards: usize) -> u16 {
        let share = u16::try_from(cards).ok().and_then(|cards| self.descriptors.checked_div(cards));
        self.queues.min(share.unwrap_or(1)).max(1)
    }
}

/// A network card that the machine is to have.
#[derive(Debug)]
pub struct Card {
    /// The interface's name, for messages.
    pub name: String,
    /// Its hardware address, and the guest's.
    pub mac: [u8; 6],
    /// Its largest packet.
    pub mtu: u32,
    /// The tap's queues, not blocking.
    pub queues: Vec<OwnedFd>,
}

/// What has changed in the namespace.
#[derive(Debug)]
pub struct Change {
    /// Cards to be added to the machine before the message is sent.
    pub appeared: Vec<Card>,
    /// Hardware addresses of cards to be removed after the message is sent.
    pub gone: Vec<[u8; 6]>,
    /// The message for the agent.
    pub message: ConfigureNetworkRequest,
}

/// What identifies a card: the interface's number and its hardware address. The name may change.
type Key = (u32, [u8; 6]);

/// A tap beside an interface.
#[derive(Debug)]
struct Joined {
    interface: u32,
    tap: u32,
    mtu: u32,
    redirect: Redirect,
}

/// The interfaces of the namespace that the guest has. When it is dropped the namespace is as it was.
#[derive(Debug)]
struct Network {
    namespace: Namespace,
    socket: Socket,
    settings: Settings,
    joined: BTreeMap<Key, Joined>,
    message: ConfigureNetworkRequest,
    /// What was not reported yet.
    appeared: Vec<Card>,
    gone: Vec<[u8; 6]>,
    reported: ConfigureNetworkRequest,
}

/// Joins the interfaces of `namespace` to taps. The cards are for the machine, the message for the agent when it is ready, and the
/// watch reports what changes from here on. Works on threads of its own.
///
/// # Errors
/// What the guest cannot have, or what the system refused; the namespace is as it was then.
pub fn join(
    namespace: Namespace,
    settings: Settings,
) -> Result<(Vec<Card>, ConfigureNetworkRequest, Watch), NetworkError> {
    let open = || Ok::<_, io::Error>((Socket::open()?, Subscription::open(&watch::GROUPS)?));
    let (socket, subscription) = namespace.run(open).and_then(|opened| opened).map_err(system("enter it"))?;
    let mut network = Network {
        namespace,
        socket,
        settings,
        joined: BTreeMap::new(),
        message: ConfigureNetworkRequest::default(),
        appeared: Vec::new(),
        gone: Vec::new(),
        reported: ConfigureNetworkRequest::default(),
    };
    // Whatever changes after this is reported.
    network.refresh()?;
    let (cards, message) = network.take().map_or_else(Default::default, |change| (change.appeared, change.message));
    Ok((cards, message, Watch::new(network, subscription)))
}

/// Removes what a shim that was killed has left in `namespace`.
///
/// # Errors
/// What the system refused.
pub fn clean(namespace: &Namespace) -> Result<(), NetworkError> {
    let socket = namespace.run(Socket::open).and_then(|opened| opened);
    let mut socket = socket.map_err(system("enter it"))?;
    for link in state::links(&mut socket).map_err(system("read the interfaces"))? {
        if plan::is_tap(&link) {
            // A process that still has it open is of a pod that is gone.
            let _ = socket.request(&link::remove(link.index));
        } else {
            redirect::remove_left(&mut socket, link.index);
        }
    }
    Ok(())
}

impl Network {
    /// Reads the namespace and does what differs. On an error nothing is joined that was not before.
    fn refresh(&mut self) -> Result<(), NetworkError> {
        let state = State::read(&mut self.socket).map_err(system("read it"))?;
        let own: Vec<u32> = self.joined.values().map(|joined| joined.tap).collect();
        let plan = plan(&state, &own, self.settings)?;
        let wanted: Vec<Key> = plan.interfaces.iter().map(key_of).collect();
        let gone: Vec<Key> = self.joined.keys().filter(|key| !wanted.contains(key)).copied().collect();
        for key in &gone {
            self.part(key);
        }
        let mut new = Vec::new();
        let count = wanted.iter().filter(|key| !self.joined.contains_key(key)).count();
        let queues = self.settings.queues_of_each(count);
        for interface in &plan.interfaces {
            let done = if self.joined.contains_key(&key_of(interface)) {
                self.set_mtu(interface)
            } else {
                new.push(key_of(interface));
                self.add(interface, queues)
            };
            if let Err(error) = done {
                for key in &new {
                    self.part(key);
                }
                return Err(error);
            }
        }
        self.message = plan.message;
        Ok(())
    }

    /// What has changed since it was last asked.
    fn take(&mut self) -> Option<Change> {
        let same = self.appeared.is_empty() && self.gone.is_empty();
        if same && message::is_like(&self.message, &self.reported) {
            return None;
        }
        self.reported = self.message.clone();
        let (appeared, gone) = (std::mem::take(&mut self.appeared), std::mem::take(&mut self.gone));
        Some(Change { appeared, gone, message: self.message.clone() })
    }

    /// Gives an interface back to the host's network stack.
    fn part(&mut self, key: &Key) {
        if let Some(joined) = self.joined.remove(key) {
            joined.undo(&mut self.socket);
            let unreported = self.appeared.len();
            self.appeared.retain(|card| card.mac != key.1);
            if self.appeared.len() == unreported {
                self.gone.push(key.1);
            }
        }
    }

    fn set_mtu(&mut self, interface: &Interface) -> Result<(), NetworkError> {
        match self.joined.get_mut(&key_of(interface)) {
            Some(joined) if joined.mtu != interface.mtu => {
                let set = self.socket.request(&link::set_mtu(joined.tap, interface.mtu));
                set.map_err(system(format!("set the MTU of the tap of {} to {}", interface.name, interface.mtu)))?;
                joined.mtu = interface.mtu;
            }
            _ => {}
        }
        Ok(())
    }

    fn add(&mut self, interface: &Interface, queues: u16) -> Result<(), NetworkError> {
        let name = plan::tap_name(interface.index);
        // Of a shim that was killed while its monitor lives.
        self.remove_tap(&name);
        let made = self.namespace.run({
            let name = name.clone();
            move || Tap::create(&name, queues)
        });
        let tap = made.and_then(|made| made).map_err(system(format!("make the tap of {}", interface.name)))?;
        let index = self.index_of(&name)?;
        let redirect = Redirect::join(&mut self.socket, interface, index)?;
        let joined = Joined { interface: interface.index, tap: index, mtu: interface.mtu, redirect };
        self.joined.insert(key_of(interface), joined);
        let queues = tap.into_queues();
        self.appeared.push(Card { name: interface.name.clone(), mac: interface.mac, mtu: interface.mtu, queues });
        Ok(())
    }

    fn index_of(&mut self, name: &str) -> Result<u32, NetworkError> {
        let links = state::links(&mut self.socket).map_err(system("read the interfaces"))?;
        let missing = || io::Error::from_raw_os_error(libc::ENODEV);
        let link = links.iter().find(|link| link.name == name);
        link.map(|link| link.index).ok_or_else(missing).map_err(system(format!("find {name}")))
    }

    fn remove_tap(&mut self, name: &str) {
        if let Ok(index) = self.index_of(name) {
            let _ = self.socket.request(&link::remove(index));
        }
    }
}

impl Joined {
    /// What is gone already need not be undone.
    fn undo(self, socket: &mut Socket) {
        self.redirect.undo(socket, self.interface);
        let _ = socket.request(&link::remove(self.tap));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for joined in std::mem::take(&mut self.joined).into_values() {
            joined.undo(&mut self.socket);
        }
    }
}

fn key_of(interface: &Interface) -> Key {
    (interface.index, interface.mac)
}
