//! What changes in the namespace later. The kernel says when; then everything is read again, and what differs is reported.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_netlink::{Subscription, neighbour};
use tokio::io::{Interest, unix::AsyncFd};

use super::{Change, Network, NetworkError, system};
use crate::host::namespaces::on_own_thread;

/// RTNLGRP_* of what a plan depends on.
pub(super) const GROUPS: [u32; 8] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV6_RULE,
];

/// The namespace of a pod that runs. When it is dropped the interfaces are as they were before.
#[derive(Debug)]
pub struct Watch {
    network: Arc<Mutex<Network>>,
    subscription: Option<Subscription>,
    events: Option<AsyncFd<Subscription>>,
    /// Something has changed since the namespace was last read.
    stale: bool,
}

impl Watch {
    pub(super) fn new(network: Network, subscription: Subscription) -> Self {
        Self { network: Arc::new(Mutex::new(network)), subscription: Some(subscription), events: None, stale: false }
    }

    /// What differs from what was last reported, if anything has changed; does not wait for a change.
    ///
    /// # Errors
    /// As [`Self::changed`].
    pub async fn now(&mut self) -> Result<Option<Change>, NetworkError> {
        let socket = self.subscription.as_ref().or_else(|| self.events.as_ref().map(AsyncFd::get_ref));
        let drained = socket.map_or(Ok(false), |socket| socket.drain(is_relevant));
        self.stale |= drained.map_err(system("watch it"))?;
        self.refresh().await?;
        Ok(lock(&self.network).take())
    }

    /// Reads the namespace, if something has changed. If it is dropped before its end the next one does it again.
    async fn refresh(&mut self) -> Result<(), NetworkError> {
        if !self.stale {
            return Ok(());
        }
        let network = Arc::clone(&self.network);
        let work = move || lock(&network).refresh();
        let refreshed = on_own_thread("network", work).await;
        self.stale = false;
        refreshed.map_err(system("read it"))?
    }

    /// Waits until something differs from what was last reported. Needs a tokio runtime. If it is dropped before, nothing is lost.
    ///
    /// # Errors
    /// What has come that a guest cannot have, or what the system refused: the guest keeps what it has, and a later change may
    /// succeed.
    pub async fn changed(&mut self) -> Result<Change, NetworkError> {
        if let Some(subscription) = self.subscription.take() {
            // SAFETY: the subscription owns one socket, which it never exchanges, and the AsyncFd owns the subscription.
            let events = unsafe { AsyncFd::register_with_interest(subscription, Interest::READABLE) };
            self.events = Some(events.map_err(|error| system("watch it")(io::Error::from(error)))?);
        }
        loop {
            // Of a call that was dropped.
            self.refresh().await?;
            if let Some(change) = lock(&self.network).take() {
                return Ok(change);
            }
            // It could not be watched, and this was said.
            let Some(events) = &self.events else { return std::future::pending().await };
            let mut ready = events.readable().await.map_err(system("watch it"))?;
            let relevant = events.get_ref().drain(is_relevant).map_err(system("watch it"))?;
            ready.clear_ready();
            self.stale |= relevant;
        }
    }
}

fn lock(network: &Mutex<Network>) -> MutexGuard<'_, Network> {
    network.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Neighbours are found out and forgotten all the time; only those that were set count.
fn is_relevant(kind: u16, payload: &[u8]) -> bool {
    kind != libc::RTM_NEWNEIGH || neighbour::is_static(payload)
}
