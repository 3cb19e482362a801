//! Which stream is whose: the book of streams that have come to the standard-stream port and of calls that wait for
//! one.
//!
//! The shim opens a stream first and names it afterwards by its port on the host's side, on another connection. So
//! either may come first:
//!
//! ```text
//!   stream, then call:   arrive ──► parked ──claim──► delivered
//!                                     └── expire ──► dropped (the shim died before it could say what for)
//!             or: refused, if too many wait; the call that claims it gets the reason
//!   call, then stream:   claim ───► awaited ─arrive─► delivered
//!                                     └── abandon ──► forgotten (the call's limit passed)
//! ```
//!
//! At most [`MAX_PARKED`] streams are parked, whatever the shim does.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, task::AbortHandle};

use crate::transport::ByteStream;

/// The most streams that wait for a call. Ten execs at once with three streams each are 30.
pub const MAX_PARKED: usize = 256;
/// How long a stream waits for the call that names it.
pub const PARKED_LIMIT: Duration = Duration::from_secs(30);
/// How long a call waits for its streams.
pub const CLAIM_LIMIT: Duration = Duration::from_secs(10);

/// A stream that a call named does not come.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// It did not come in time.
    #[error("{name}: no stream from port {port} arrived within {} s", CLAIM_LIMIT.as_secs())]
    Missing {
        /// stdin, stdout or stderr.
        name: &'static str,
        /// The stream's port on the host's side.
        port: u32,
    },
    /// Another call waits for the same.
    #[error("{name}: the stream from port {port} is already claimed by another process")]
    Taken {
        /// stdin, stdout or stderr.
        name: &'static str,
        /// The stream's port on the host's side.
        port: u32,
    },
    /// It came, and there was no room for it.
    #[error(
        "{name}: the stream from port {port} was refused, because {MAX_PARKED} others wait for the calls that name them: \
         start fewer processes at once"
    )]
    Refused {
        /// stdin, stdout or stderr.
        name: &'static str,
        /// The stream's port on the host's side.
        port: u32,
    },
}

enum Slot<S, W> {
    Parked(S),
    Awaited(W),
}

/// The book itself, for streams `S` and waiting calls `W`; pure.
pub struct Book<S, W> {
    slots: HashMap<u32, Slot<S, W>>,
    parked: usize,
    /// The ports of the last streams that were refused, so that their calls need not wait for them; [`MAX_PARKED`] at most.
    refused: VecDeque<u32>,
}

/// What became of a stream that arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival<S, W> {
    /// A call waited: give it the stream.
    Deliver(S, W),
    /// It waits for a call.
    Parked,
    /// Too many wait: drop it.
    Refused(S),
}

/// What became of a claim.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim<S> {
    /// Here it is.
    Now(S),
    /// It will be delivered.
    Later,
    /// Another call waits for it.
    Taken,
    /// It came when too many waited.
    Refused,
}

impl<S, W> Default for Book<S, W> {
    fn default() -> Self {
        Self { slots: HashMap::new(), parked: 0, refused: VecDeque::new() }
    }
}

impl<S, W> Book<S, W> {
    /// A stream has come from `port`. One that is still parked under the same port is dead (the host reuses a port only
    /// after its stream has ended) and is replaced.
    pub fn arrive(&mut self, port: u32, stream: S) -> Arrival<S, W> {
        self.refused.retain(|refused| *refused != port);
        match self.slots.entry(port) {
            Entry::Occupied(mut entry) => match entry.get_mut() {
                Slot::Parked(old) => {
                    *old = stream;
                    Arrival::Parked
                }
                Slot::Awaited(_) => match entry.remove() {
                    Slot::Awaited(waiter) => Arrival::Deliver(stream, waiter),
                    Slot::Parked(_) => Arrival::Refused(stream),
                },
            },
            Entry::Vacant(_) if self.parked >= MAX_PARKED => {
                if self.refused.len() >= MAX_PARKED {
                    self.refused.pop_front();
                }
                self.refused.push_back(port);
                Arrival::Refused(stream)
            }
            Entry::Vacant(entry) => {
                entry.insert(Slot::Parked(stream));
                self.parked += 1;
                Arrival::Parked
            }
        }
    }

    /// A call wants the stream from `port`; `waiter` is made only if it has not come yet.
    pub fn claim(&mut self, port: u32, waiter: impl FnOnce() -> W) -> Claim<S> {
        match self.slots.remove(&port) {
            Some(Slot::Parked(stream)) => {
                self.parked -= 1;
                Claim::Now(stream)
            }
            Some(taken @ Slot::Awaited(_)) => {
                self.slots.insert(port, taken);
                Claim::Taken
            }
            None => match self.refused.iter().position(|refused| *refused == port) {
                Some(place) => {
                    self.refused.remove(place);
                    Claim::Refused
                }
                None => {
                    self.slots.insert(port, Slot::Awaited(waiter()));
                    Claim::Later
                }
            },
        }
    }

    /// The call that waited for `port` no longer does.
    pub fn abandon(&mut self, port: u32) {
        if matches!(self.slots.get(&port), Some(Slot::Awaited(_))) {
            self.slots.remove(&port);
        }
    }

    /// Nobody claimed the stream from `port` in time.
    pub fn expire(&mut self, port: u32) -> Option<S> {
        match self.slots.remove(&port) {
            Some(Slot::Parked(stream)) => {
                self.parked -= 1;
                Some(stream)
            }
            Some(awaited) => {
                self.slots.insert(port, awaited);
                None
            }
            None => None,
        }
    }

    /// How many streams wait for a call.
    pub fn parked(&self) -> usize {
        self.parked
    }
}

/// A parked stream and the timer that ends its stay.
struct Parked {
    stream: Box<dyn ByteStream>,
    timer: AbortHandle,
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.timer.abort();
    }
}

type SharedBook = Mutex<Book<Parked, oneshot::Sender<Box<dyn ByteStream>>>>;

/// The book, shared by the port's listener and the calls.
#[derive(Clone, Default)]
pub struct Streams(Arc<SharedBook>);

impl Streams {
    fn book(&self) -> MutexGuard<'_, Book<Parked, oneshot::Sender<Box<dyn ByteStream>>>> {
        // The book's methods do not panic halfway.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a stream that has come from `port`. False if it was refused.
    pub fn arrive(&self, port: u32, stream: Box<dyn ByteStream>) -> bool {
        let streams = self.clone();
        let timer = tokio::spawn(async move {
            tokio::time::sleep(PARKED_LIMIT).await;
            let expired = streams.book().expire(port);
            drop(expired);
        });
        let parked = Parked { stream, timer: timer.abort_handle() };
        match self.book().arrive(port, parked) {
            Arrival::Parked => true,
            // If the call has just given up, the stream is dropped, which closes it.
            Arrival::Deliver(parked, waiter) => waiter.send(parked.into_stream()).is_ok(),
            Arrival::Refused(_) => false,
        }
    }

    /// Waits for the stream from `port`; None for port 0.
    ///
    /// # Errors
    /// If it does not come within [`CLAIM_LIMIT`].
    pub async fn claim(&self, name: &'static str, port: u32) -> Result<Option<Box<dyn ByteStream>>, ClaimError> {
        if port == 0 {
            return Ok(None);
        }
        let (sender, receiver) = oneshot::channel();
        let claim = self.book().claim(port, || sender);
        match claim {
            Claim::Now(parked) => Ok(Some(parked.into_stream())),
            Claim::Taken => Err(ClaimError::Taken { name, port }),
            Claim::Refused => Err(ClaimError::Refused { name, port }),
            Claim::Later => match tokio::time::timeout(CLAIM_LIMIT, receiver).await {
                Ok(Ok(stream)) => Ok(Some(stream)),
                _ => {
                    self.book().abandon(port);
                    Err(ClaimError::Missing { name, port })
                }
            },
        }
    }
}

impl Parked {
    fn into_stream(mut self) -> Box<dyn ByteStream> {
        std::mem::replace(&mut self.stream, Box::new(tokio::io::empty()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Event {
        Arrive(u32),
        Claim(u32),
        Abandon(u32),
        Expire(u32),
    }

    fn event() -> impl Strategy<Value = Event> {
        let port = 1u32..6;
        prop_oneof![
            port.clone().prop_map(Event::Arrive),
            port.clone().prop_map(Event::Claim),
            port.clone().prop_map(Event::Abandon),
            port.prop_map(Event::Expire)
        ]
    }

    proptest! {
        /// A stream goes to at most one call, to one that named its port, and a call gets at most one stream.
        #[test]
        fn every_stream_and_every_call_meet_at_most_once(events in proptest::collection::vec(event(), 0..64)) {
            let mut book: Book<u32, u32> = Book::default();
            let (mut next, mut given, mut served) = (0u32, HashSet::new(), HashSet::new());
            let mut port_of = HashMap::new();
            for event in events {
                next += 1;
                match event {
                    Event::Arrive(port) => {
                        port_of.insert(next, port);
                        if let Arrival::Deliver(stream, call) = book.arrive(port, next) {
                            prop_assert!(given.insert(stream) && served.insert(call));
                            prop_assert_eq!(port_of[&stream], port_of[&call]);
                        }
                    }
                    Event::Claim(port) => {
                        port_of.insert(next, port);
                        if let Claim::Now(stream) = book.claim(port, || next) {
                            prop_assert!(given.insert(stream) && served.insert(next));
                            prop_assert_eq!(port_of[&stream], port);
                        }
                    }
                    Event::Abandon(port) => book.abandon(port),
                    Event::Expire(port) => {
                        if let Some(stream) = book.expire(port) {
                            prop_assert!(given.insert(stream));
                        }
                    }
                }
                let parked = book.slots.values().filter(|slot| matches!(slot, Slot::Parked(_))).count();
                prop_assert_eq!(book.parked(), parked);
            }
        }
    }

    #[test]
    fn no_more_than_the_limit_are_parked() {
        let mut book: Book<u32, ()> = Book::default();
        for port in 0..MAX_PARKED as u32 {
            assert_eq!(book.arrive(port + 1, port), Arrival::Parked);
        }
        assert_eq!(book.arrive(9999, 7), Arrival::Refused(7));
        assert_eq!(book.claim(1, || ()), Claim::Now(0));
        assert_eq!(book.arrive(9999, 7), Arrival::Parked);
        assert_eq!(book.claim(9999, || ()), Claim::Now(7), "what came again is no longer refused");
    }

    #[test]
    fn who_claims_a_refused_stream_learns_it_at_once() {
        let mut book: Book<u32, ()> = Book::default();
        for port in 1..=MAX_PARKED as u32 {
            assert_eq!(book.arrive(port, port), Arrival::Parked);
        }
        for port in 5000..5001 + MAX_PARKED as u32 {
            assert_eq!(book.arrive(port, 0), Arrival::Refused(0));
        }
        assert_eq!(book.claim(5001, || ()), Claim::Refused);
        assert_eq!(book.claim(5001, || ()), Claim::Later, "the reason is given once");
        assert_eq!(book.claim(5000, || ()), Claim::Later, "no more than so many are remembered");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_gives_up_and_a_later_one_may_ask_again() {
        let streams = Streams::default();
        let error = streams.claim("stdin", 5).await.err();
        assert_eq!(error, Some(ClaimError::Missing { name: "stdin", port: 5 }));
        assert!(streams.arrive(5, Box::new(tokio::io::empty())));
        assert!(streams.claim("stdin", 5).await.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn an_unclaimed_stream_is_closed_after_its_limit() {
        use tokio::io::AsyncReadExt;
        let streams = Streams::default();
        let (mut far, near) = tokio::io::duplex(16);
        assert!(streams.arrive(5, Box::new(near)));
        assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(streams.book().parked(), 0);
    }
}
