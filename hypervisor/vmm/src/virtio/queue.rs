//! A virtqueue as devices see it: [`VirtQueue::pop`] gives checked chains, [`VirtQueue::complete`] returns them.
//!
//! Ring and index handling is the virtio-queue crate's; what this adds is the check of a whole chain before a device
//! sees any of it: readable before writable descriptors, every byte in guest memory, a last descriptor.

use std::{
    num::Wrapping,
    sync::atomic::{Ordering, fence},
};

use virtio_queue::{Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::{Buffers, GuestMemory};

/// What a guest can do wrong with a queue. The device stops until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings themselves are unusable (an index that ran away, an address outside memory).
    #[error("unusable ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A descriptor points outside guest memory.
    #[error("chain {head}: {len} bytes at {address:#x} are not guest memory: {source}")]
    Address {
        /// Index of the chain's first descriptor.
        head: u16,
        /// The descriptor's guest address.
        address: u64,
        /// The descriptor's length, bytes.
        len: u32,
        /// What vm-memory said.
        source: GuestMemoryError,
    },
    /// A readable descriptor follows a writable one (virtio 1.2, 2.7.4.2).
    #[error("chain {0}: a readable descriptor follows a writable one")]
    Order(u16),
    /// The chain loops, names a descriptor outside the table, or its indirect table is malformed.
    #[error("unterminated descriptor chain {0}")]
    Unterminated(u16),
    /// More descriptors than the queue has (2.7.5.3.1), in an indirect table.
    #[error("chain {head}: more descriptors than the {size} of its queue")]
    Descriptors {
        /// Index of the chain's first descriptor.
        head: u16,
        /// The queue's size.
        size: u16,
    },
    /// One direction of the chain exceeds 4 GiB.
    #[error("chain {0}: longer than 4 GiB")]
    Length(u16),
}

/// One request of the driver, checked whole.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Index of the first descriptor; the chain's name in [`VirtQueue::complete`].
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// What the device may fill for the driver.
    pub writable: Buffers<'m>,
}

/// One virtqueue. Its `Queue` is what must survive a save.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    /// Chains were completed since the driver was last asked whether it wants an interrupt.
    used_since_signal: bool,
    /// How far the driver had been asked then.
    asked: Wrapping<u16>,
    /// An interrupt is due, whatever the driver said last.
    signal_always: bool,
    /// The device left chains for later.
    call_again: bool,
}

impl VirtQueue {
    /// A queue of at most `max_size` descriptors, not yet ready.
    ///
    /// # Errors
    /// If `max_size` is not a power of two up to 32768.
    pub fn new(max_size: u16) -> Result<Self, QueueError> {
        Ok(Self {
            queue: Queue::new(max_size)?,
            used_since_signal: false,
            asked: Wrapping(0),
            signal_always: false,
            call_again: false,
        })
    }

    /// The ring's registers, for the transport.
    pub fn registers(&self) -> &Queue {
        &self.queue
    }

    /// The ring's registers, for the transport; it must not change them while the driver is live.
    pub fn registers_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Whether the driver made the queue ready and its rings lie in guest memory.
    pub fn is_usable(&self, memory: &GuestMemory) -> bool {
        self.queue.ready() && self.queue.is_valid(memory)
    }

    /// Whether the driver has set the queue up; one that it has not gives no chains and asks for no notifications.
    pub fn is_used(&self) -> bool {
        self.queue.ready()
    }

    /// Chains that it can have at most.
    pub fn size(&self) -> usize {
        self.queue.size().into()
    }

    /// Takes the next chain that the driver made available.
    ///
    /// # Errors
    /// Any malformed chain; the queue must not be used again before a reset.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let Some(descriptors) = self.queue.iter(memory)?.next() else { return Ok(None) };
        let size = self.queue.size();
        let mut chain =
            Chain { head: descriptors.head_index(), readable: Buffers::default(), writable: Buffers::default() };
        // The iterator ends the same way at a chain's end and at a malformed link; the last flags tell which it was.
        let mut ended = false;
        for (count, descriptor) in descriptors.enumerate() {
            chain.push(memory, &descriptor, count, size)?;
            ended = !descriptor.has_next();
        }
        if ended { Ok(Some(chain)) } else { Err(QueueError::Unterminated(chain.head)) }
    }

    /// Puts the chain that [`Self::pop`] gave last back, so that the next pop gives it again. At most once for each pop.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Walks a chain again that [`Self::pop`] gave earlier and that was not completed yet: for a device that answers later
    /// and keeps only the head meanwhile. The driver may have changed the descriptors since, so all is checked anew.
    ///
    /// # Errors
    /// A malformed chain; the queue must not be used again before a reset.
    pub fn chain<'m>(&self, memory: &'m GuestMemory, head: u16) -> Result<Chain<'m>, QueueError> {
        const DESCRIPTOR_LEN: u16 = size_of::<Descriptor>() as u16;
        let mut chain = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
        let (mut table, mut size) = (GuestAddress(self.queue.desc_table()), self.queue.size());
        let (mut index, mut left, mut indirect, mut count) = (head, size, false, 0);
        loop {
            // `left` ends a loop: a chain has no more descriptors than its table.
            if index >= size || left == 0 {
                return Err(QueueError::Unterminated(head));
            }
            left -= 1;
            let address = table.checked_add(u64::from(index) * u64::from(DESCRIPTOR_LEN));
            let descriptor = address.and_then(|at| memory.read_obj::<Descriptor>(at).ok());
            let descriptor = descriptor.ok_or(QueueError::Unterminated(head))?;
            if descriptor.refers_to_indirect_table() {
                let entries = u16::try_from(descriptor.len() / u32::from(DESCRIPTOR_LEN)).unwrap_or(0);
                if indirect || descriptor.len() % u32::from(DESCRIPTOR_LEN) != 0 {
                    return Err(QueueError::Unterminated(head));
                }
                (table, size, index, left, indirect) = (descriptor.addr(), entries, 0, entries, true);
                continue;
            }
            chain.push(memory, &descriptor, count, self.queue.size())?;
            count += 1;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }

    /// Returns the chain `head` to the driver with `written` bytes filled in.
    ///
    /// # Errors
    /// If the used ring is not in guest memory.
    pub fn complete(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(memory, head, written)?;
        self.used_since_signal = true;
        Ok(())
    }

    /// Returns several chains, each with so many bytes filled in, of which the driver sees none before all.
    ///
    /// # Errors
    /// If the used ring is not in guest memory.
    pub fn complete_all(&mut self, memory: &GuestMemory, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        // Flags and index come before the elements, each a head and a length of 4 bytes (virtio 1.2, 2.7.8).
        const INDEX: u64 = 2;
        const ELEMENTS: u64 = 4;
        let used = GuestAddress(self.queue.used_ring());
        let mut next = Wrapping(self.queue.next_used());
        for (head, written) in chains {
            let slot = next.0.checked_rem(self.queue.size()).ok_or(virtio_queue::Error::InvalidSize)?;
            let at = used.checked_add(ELEMENTS + u64::from(slot) * size_of::<u64>() as u64);
            let at = at.ok_or(virtio_queue::Error::AddressOverflow)?;
            let element = u64::from(*head) | u64::from(*written) << 32;
            memory.write_obj(element.to_le(), at).map_err(virtio_queue::Error::GuestMemory)?;
            next += 1;
        }
        self.queue.set_next_used(next.0);
        let index = used.checked_add(INDEX).ok_or(virtio_queue::Error::AddressOverflow)?;
        memory.store(next.0.to_le(), index, Ordering::Release).map_err(virtio_queue::Error::GuestMemory)?;
        self.used_since_signal = true;
        Ok(())
    }

    /// Returns a chain as [`Self::complete`] does, but lets the driver find it at the next interrupt: for a driver that
    /// only frees it. [`Self::signal_completed`] must follow before long.
    ///
    /// # Errors
    /// If the used ring is not in guest memory.
    pub fn complete_quietly(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), QueueError> {
        Ok(self.queue.add_used(memory, head, written)?)
    }

    /// Makes an interrupt due for what was completed quietly, unless the driver has seen it.
    pub fn signal_completed(&mut self) {
        self.used_since_signal = true;
    }

    /// Makes an interrupt due even if the driver has asked for none. After a restore: what was completed quietly before the save
    /// is not counted any more, so the driver's wish cannot be compared with it.
    pub fn signal_always(&mut self) {
        self.signal_always = true;
    }

    /// The driver's index of the available ring. Asks the driver to notify when it advances, though what it made available
    /// before was not taken.
    ///
    /// # Errors
    /// If the rings are not in guest memory.
    pub fn await_advance(&mut self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let next = self.queue.next_avail();
        let available = self.queue.avail_idx(memory, Ordering::Acquire)?;
        self.queue.set_next_avail(available.0);
        let enabled = self.queue.enable_notification(memory);
        self.queue.set_next_avail(next);
        enabled?;
        // It may have advanced before it could see that we want to know.
        Ok(self.queue.avail_idx(memory, Ordering::Acquire)?.0)
    }

    /// Asks the transport to call `queue_ready` for this queue again, after everything else that waits on the device
    /// thread had its turn. A device that stops before the queue is empty calls this, so that a driver that adds
    /// chains as fast as they are served cannot hold the thread.
    pub fn call_again(&mut self) {
        self.call_again = true;
    }

    /// Whether [`Self::call_again`] was called since the last time.
    pub(super) fn take_call_again(&mut self) -> bool {
        std::mem::take(&mut self.call_again)
    }

    /// Asks the driver for a notification at the next available chain; true if more came in meanwhile, so that the caller has to pop again.
    ///
    /// # Errors
    /// If the rings are not in guest memory.
    pub fn enable_notification(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        Ok(self.is_used() && self.queue.enable_notification(memory)?)
    }

    /// Tells the driver that it need not notify, until [`Self::enable_notification`].
    ///
    /// # Errors
    /// If the rings are not in guest memory.
    pub fn disable_notification(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.is_used() {
            self.queue.disable_notification(memory)?;
        }
        Ok(())
    }

    /// Whether an interrupt is due for what was completed since the last call.
    ///
    /// # Errors
    /// If the rings are not in guest memory.
    pub fn take_signal(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let always = std::mem::take(&mut self.signal_always);
        if !std::mem::take(&mut self.used_since_signal) && !always {
            return Ok(false);
        }
        // The driver must see what was completed before its wish is read.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // Behind flags, index and elements of the available ring: the index whose completion it wants to hear of. The crate
        // has this as well, but does not know of `complete_all`.
        let offset = 4 + u64::from(self.queue.size()) * 2;
        let at = GuestAddress(self.queue.avail_ring()).checked_add(offset);
        let at = at.ok_or(virtio_queue::Error::AddressOverflow)?;
        let wanted: u16 = memory.load(at, Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
        let now = Wrapping(self.queue.next_used());
        let asked = std::mem::replace(&mut self.asked, now);
        Ok(now - Wrapping(u16::from_le(wanted)) - Wrapping(1) < now - asked || always)
    }
}

impl<'m> Chain<'m> {
    /// Adds the next descriptor, before which there are `count`, of a queue of `size`.
    fn push(
        &mut self,
        memory: &'m GuestMemory,
        descriptor: &Descriptor,
        count: usize,
        size: u16,
    ) -> Result<(), QueueError> {
        if count >= usize::from(size) {
            return Err(QueueError::Descriptors { head: self.head, size });
        }
        let (address, len) = (descriptor.addr(), descriptor.len());
        if descriptor.is_write_only() {
            self.extend_with(memory, address, len, true)
        } else if self.writable.is_empty() {
            self.extend_with(memory, address, len, false)
        } else {
            Err(QueueError::Order(self.head))
        }
    }

    fn extend_with(
        &mut self,
        memory: &'m GuestMemory,
        address: GuestAddress,
        len: u32,
        writable: bool,
    ) -> Result<(), QueueError> {
        let head = self.head;
        let buffers = if writable { &mut self.writable } else { &mut self.readable };
        // A range may span two regions; each piece is checked.
        for slice in GuestMemoryBackend::get_slices(memory, address, len as usize) {
            let slice = slice.map_err(|source| QueueError::Address { head, address: address.0, len, source })?;
            if !buffers.push(slice) {
                return Err(QueueError::Length(head));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
