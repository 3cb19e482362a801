//! The entropy device (virtio 1.2, section 5.4): fills what the driver offers with the host's random bytes.

use rustix::{
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{Buffers, Context, DeviceError, Served, Turn, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [8];
/// The most bytes that one request gets: enough for any seed, and a bound on what a request can cost.
const MAX_BYTES: usize = 4096;
/// Requests served before others on the device thread have their turn. What the driver sends along with one is never read.
const TURN: Turn = Turn { chains: 8, bytes: usize::MAX };

/// The device. It has no state.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    fn fill(buffers: &Buffers) -> Result<usize, DeviceError> {
        let mut bytes = [0; MAX_BYTES];
        let wanted = buffers.len().min(MAX_BYTES);
        let bytes = bytes.get_mut(..wanted).unwrap_or_default();
        let filled = match getrandom(&mut *bytes, GetRandomFlags::NONBLOCK) {
            Ok(filled) => filled,
            // The host itself has only just booted: nothing to give yet. The driver asks again.
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(DeviceError::Host { what: "getrandom", source: error.into() }),
        };
        buffers.write(0, bytes.get(..filled).unwrap_or_default())?;
        Ok(filled)
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_ready(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        super::serve(context, queue, TURN, |context, chain| {
            if !chain.readable.is_empty() {
                *context.guest_faults += 1;
            }
            Self::fill(&chain.writable).map(Served::Written)
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Driver;
    use super::*;

    #[test]
    fn a_request_is_filled_and_bounded() {
        let mut driver = Driver::new(Box::new(Rng));
        driver.offer(0, &[], &[100, 60_000]);
        driver.run(0).unwrap();
        let (written, bytes) = driver.completed(0).unwrap();
        assert_eq!(written as usize, MAX_BYTES);
        // 4096 random bytes that are all equal are not random.
        assert!(bytes[..MAX_BYTES].iter().any(|&byte| byte != bytes[0]));
        assert!(bytes[MAX_BYTES..].iter().all(|&byte| byte == 0), "nothing beyond the bound is touched");
    }

    #[test]
    fn a_request_without_room_gets_nothing() {
        let mut driver = Driver::new(Box::new(Rng));
        driver.offer(0, b"what?", &[]);
        driver.run(0).unwrap();
        assert_eq!(driver.completed(0).unwrap().0, 0);
        assert_eq!(driver.guest_faults, 1);
    }
}
