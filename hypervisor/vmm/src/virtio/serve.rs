//! The loop of a device that answers each chain on the spot.

use super::{Chain, Context, DeviceError};

/// Serves the chains of queue `queue`, at most `limit` before it lets others have their turn. `answer` gives the number of bytes it
/// wrote.
///
/// # Errors
/// A malformed ring or chain, or what `answer` could not survive.
pub fn serve<'m>(
    context: &mut Context<'m>,
    queue: usize,
    limit: usize,
    mut answer: impl FnMut(&mut Context<'m>, &Chain<'m>) -> Result<usize, DeviceError>,
) -> Result<(), DeviceError> {
    for _ in 0..limit {
        let Some(chain) = context.pop(queue)? else {
            let Some(ring) = context.queues.get_mut(queue) else { return Ok(()) };
            if !ring.enable_notification(context.memory)? {
                return Ok(());
            }
            continue;
        };
        let written = answer(context, &chain)?;
        context.complete(queue, chain.head, written)?;
    }
    if let Some(ring) = context.queues.get_mut(queue) {
        ring.call_again();
    }
    Ok(())
}
