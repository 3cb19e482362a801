//! What a virtio device is to its transport.
//!
//! The transport owns registers, feature negotiation, queues and the interrupt; a device owns its meaning. Everything
//! happens on the device thread, one call at a time: a device needs no lock, and must not block. After each call the transport sends one
//! interrupt if any completed chain needs it, so a device that handles many chains in a call costs one interrupt.

use std::os::fd::RawFd;

use caisson_protos::monitor::NetworkStats;
use event_manager::EventSet;

use super::{BufferError, Chain, GuestMemory, QueueError, VirtQueue};

/// A device's own name for one of its watched descriptors.
pub type PollToken = u32;

/// Watches descriptors for a device (level-triggered epoll; a test passes its own).
pub trait Poll {
    /// Begins to watch `fd`; [`VirtioDevice::descriptor_ready`] is called with `token`.
    ///
    /// # Errors
    /// The system call's.
    fn add(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> std::io::Result<()>;
    /// Changes what a watched descriptor is watched for; `EventSet::empty()` rests it.
    ///
    /// # Errors
    /// The system call's.
    fn modify(&mut self, fd: RawFd, token: PollToken, events: EventSet) -> std::io::Result<()>;
    /// Ends the watch; before the descriptor is closed.
    fn remove(&mut self, fd: RawFd);
}

/// What the transport lends a live device for one call.
pub struct Context<'a> {
    /// The guest's memory.
    pub memory: &'a GuestMemory,
    /// The device's queues, usable or, where the device does not need them, unused.
    pub queues: &'a mut [VirtQueue],
    /// Host descriptors.
    pub poll: &'a mut dyn Poll,
    /// The driver's choice out of [`VirtioDevice::features`].
    pub features: u64,
    /// Add 1 for each request of the guest that was refused as malformed.
    pub guest_faults: &'a mut u64,
}

impl<'a> Context<'a> {
    /// Takes the next chain of queue `index`; a queue that does not exist gives none.
    ///
    /// # Errors
    /// A malformed ring or chain.
    pub fn pop(&mut self, index: usize) -> Result<Option<Chain<'a>>, QueueError> {
        match self.queues.get_mut(index) {
            Some(queue) => queue.pop(self.memory),
            None => Ok(None),
        }
    }

    /// Returns a chain of queue `index` with `written` bytes filled in.
    ///
    /// # Errors
    /// A used ring outside memory.
    pub fn complete(&mut self, index: usize, head: u16, written: usize) -> Result<(), QueueError> {
        match self.queues.get_mut(index) {
            // A chain's length fits into u32 (Buffers::push).
            Some(queue) => queue.complete(self.memory, head, u32::try_from(written).unwrap_or(u32::MAX)),
            None => Ok(()),
        }
    }
}

/// Why a device stops until its driver resets it (DEVICE_NEEDS_RESET).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest's rings or chains.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A request too short for its own header.
    #[error("malformed request: {0}")]
    Request(#[from] BufferError),
    /// The host side.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The guest broke the device's protocol.
    #[error("{0}")]
    Protocol(&'static str),
}

/// One kind of device. All calls come from the device thread.
pub trait VirtioDevice: Send {
    /// The device's name for logs and statistics, e.g. "vsock".
    fn name(&self) -> &'static str;

    /// The device id (virtio 1.2, section 5).
    fn device_id(&self) -> u32;

    /// The greatest size of each queue, powers of two; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Whether the driver must have set up queue `queue` before it is live. One that it need not, and has not, gives no chains.
    fn needs_queue(&self, _queue: usize) -> bool {
        true
    }

    /// The device's own feature bits. The transport adds VERSION_1, RING_EVENT_IDX and RING_INDIRECT_DESC.
    fn features(&self) -> u64 {
        0
    }

    /// Copies the configuration space from `offset` on; bytes beyond its end read as 0.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// The driver is live (DRIVER_OK): the queues that it has set up are usable, and all stay as they are until `reset`.
    ///
    /// # Errors
    /// The device then needs a reset.
    fn activate(&mut self, _context: &mut Context) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The driver made chains available in queue `queue` (or a pause has ended).
    ///
    /// # Errors
    /// The device then needs a reset.
    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError>;

    /// A descriptor that the device watches is ready.
    ///
    /// # Errors
    /// The device then needs a reset.
    fn descriptor_ready(
        &mut self,
        _context: &mut Context,
        _token: PollToken,
        _events: EventSet,
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Streams between host and guest that are open now, for the machine's statistics.
    fn open_streams(&self) -> u32 {
        0
    }

    /// What a network device has moved, for the machine's statistics.
    fn network_stats(&self) -> Option<NetworkStats> {
        None
    }

    /// Whether the device holds bytes of the guest for somebody who is slow to read them.
    fn has_undelivered(&self) -> bool {
        false
    }

    /// Reports to the driver, by the configuration space, whether there is a link. False from a device that has none.
    fn set_link(&mut self, _up: bool) -> bool {
        false
    }

    /// Whether the configuration space has changed since the last call.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// Back to the state before `activate`: forget all guest requests, end all watches. No request may touch guest memory
    /// afterwards.
    fn reset(&mut self, _poll: &mut dyn Poll) {}
}

/// Copies from a device's configuration space with zeros beyond its end.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let available = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or(&[]);
    let count = available.len().min(data.len());
    data.fill(0);
    if let (Some(to), Some(from)) = (data.get_mut(..count), available.get(..count)) {
        to.copy_from_slice(from);
    }
}
