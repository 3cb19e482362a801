//! The machine's network: cards get the names, addresses and routes that the pod's network namespace has on the host.
//!
//! ```text
//!   ConfigureNetworkRequest ─► check (pure) ─► Wanted ─► apply ─► rtnetlink
//!                                                          │ ▲
//!                                       what the kernel has ▼ │ what to remove and to add
//!                                                        difference (pure)
//! ```
//!
//! A message says how it is to be. What an earlier message named and this one does not is removed; what a container has added
//! itself is never touched. A card that is named for the first time keeps nothing that the kernel gave it.

mod apply;
mod check;
mod difference;

use std::sync::Mutex;

use caisson_netlink::{Refused, Socket};
use caisson_protos::agent::ConfigureNetworkRequest;
use ttrpc::Code;

use self::apply::Applied;

/// Why the network is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A field of the message cannot be.
    #[error("{field}: {value} {rule}")]
    Invalid {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// What it would have to be.
        rule: &'static str,
    },
    /// There is no such card.
    #[error("interface {name:?}: the machine has no network card with the hardware address {mac}")]
    NoCard {
        /// The interface's name.
        name: String,
        /// The card's hardware address.
        mac: String,
    },
    /// The kernel refused.
    #[error("{subject}: cannot {what}: {source}")]
    Refused {
        /// The interface, or what else.
        subject: String,
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: Refused,
    },
}

impl NetworkError {
    /// The status that agent.proto promises for it.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::INVALID_ARGUMENT,
            Self::NoCard { .. } => Code::NOT_FOUND,
            Self::Refused { .. } => Code::INTERNAL,
        }
    }
}

/// The network as the last message made it.
#[derive(Debug, Default)]
pub struct Network {
    applied: Mutex<Applied>,
}

impl Network {
    /// Makes the network of the calling thread's namespace be as `request` says. Waits for the kernel.
    ///
    /// # Errors
    /// The first thing that cannot be; what was set before it stays.
    pub fn configure(&self, request: &ConfigureNetworkRequest) -> Result<(), NetworkError> {
        let wanted = check::check(request)?;
        let mut applied = self.applied.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let socket = Socket::open().map_err(|error| NetworkError::Refused {
            subject: "network".into(),
            what: "open a netlink socket".into(),
            source: error.into(),
        })?;
        apply::apply(socket, &mut applied, &wanted)
    }
}
