//! Waiting: always for something that is named, never for ever.

use std::{
    thread,
    time::{Duration, Instant},
};

/// The limit of a step that takes about a second on a plain machine. The emulated test host is up to thirty
/// times slower, and other tests run beside it.
pub const STEP: Duration = Duration::from_secs(240);
/// The limit of a step that moves much data or runs many pods.
pub fn long() -> Duration {
    Duration::from_secs(if crate::sizes::full() { 7200 } else { 900 })
}

/// Waits until `condition` gives a value.
///
/// For states of the kernel that have no event to wait for (mounts, cgroups, other processes' children).
///
/// # Panics
/// After `limit`, saying `what` was awaited.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begin.elapsed() < limit, "waited {limit:?} in vain for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
