//! The loop of a device that takes what the driver made available: pop, serve, ask for the next notification.

use super::{Chain, Context, DeviceError};

/// What may be taken in one turn, before others on the device thread have theirs.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Chains.
    pub chains: usize,
    /// Readable bytes of chains; the turn ends with the chain that exceeds it.
    pub bytes: usize,
}

/// What a device did with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is answered: to be completed with this many bytes written.
    Written(usize),
    /// The device has completed it, or keeps it and completes it later.
    Taken,
    /// Nothing: the chain goes back into its queue, and the turn ends. The device calls again itself when it can go on.
    Refused,
}

/// Why a turn has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnEnd {
    /// The queue is empty; the driver notifies when it has more.
    Empty,
    /// There may be more; the transport calls again.
    Limit,
    /// The device refused a chain.
    Refused,
}

/// Serves the chains of queue `queue`, at most a turn's worth.
///
/// # Errors
/// A malformed ring or chain, or what `answer` could not survive.
pub fn serve<'m>(
    context: &mut Context<'m>,
    queue: usize,
    turn: Turn,
    mut answer: impl FnMut(&mut Context<'m>, &Chain<'m>) -> Result<Served, DeviceError>,
) -> Result<TurnEnd, DeviceError> {
    let mut bytes = 0usize;
    for _ in 0..turn.chains {
        if bytes >= turn.bytes {
            break;
        }
        let Some(chain) = context.pop(queue)? else {
            let Some(ring) = context.queues.get_mut(queue) else { return Ok(TurnEnd::Empty) };
            if !ring.enable_notification(context.memory)? {
                return Ok(TurnEnd::Empty);
            }
            continue;
        };
        bytes = bytes.saturating_add(chain.readable.len());
        match answer(context, &chain)? {
            Served::Written(written) => context.complete(queue, chain.head, written)?,
            Served::Taken => {}
            Served::Refused => {
                if let Some(ring) = context.queues.get_mut(queue) {
                    ring.unpop();
                }
                return Ok(TurnEnd::Refused);
            }
        }
    }
    if let Some(ring) = context.queues.get_mut(queue) {
        ring.call_again();
    }
    Ok(TurnEnd::Limit)
}
