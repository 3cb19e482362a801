//! Token buckets: how fast a device may move bytes and operations, as a pure state machine. Time comes in as a duration since
//! any fixed moment, so that a test can let it run as it likes.
//!
//! What has been asked for is known only when it is there (a packet has the size it has), so a bucket lets an operation
//! pass while it holds anything, and may then owe the rest: the next one waits until the debt is paid. Over any span of time,
//! no more passes than the burst, what the rate gives in that span, and one operation.

use std::time::Duration;

use caisson_protos::monitor::{RateLimit, TokenBucket};
use serde::{Deserialize, Serialize};

/// Parts of a token; a rate of n tokens a second is n parts a nanosecond, so nothing is ever rounded.
const PARTS: i128 = 1_000_000_000;
/// Who has to wait waits for so many nanoseconds' tokens at least, if the bucket holds twice as many: a timer for each
/// packet would cost more than the packet.
const QUANTUM: i128 = 1_000_000;

/// One bucket. What it holds and when must survive a save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Tokens a second, not 0.
    rate: u64,
    /// In parts.
    burst: i128,
    /// In parts; below zero it is a debt.
    level: i128,
    /// When `level` was true.
    at: Duration,
}

impl Bucket {
    /// A full bucket.
    pub fn new(config: &TokenBucket) -> Self {
        let burst = i128::from(config.burst.max(1)) * PARTS;
        Self { rate: config.rate.max(1), burst, level: burst, at: Duration::ZERO }
    }

    fn refill(&mut self, now: Duration) {
        // Time that goes back (a restored machine on another host) gives nothing.
        let passed = i128::try_from(now.saturating_sub(self.at).as_nanos()).unwrap_or(i128::MAX);
        self.at = now;
        let gained = passed.saturating_mul(self.rate.into());
        self.level = self.level.saturating_add(gained).min(self.burst);
    }

    /// Whether an operation may pass; if not, how long to wait before it is worth asking again.
    fn ready(&mut self, now: Duration) -> Result<(), Duration> {
        self.refill(now);
        if self.level > 0 {
            return Ok(());
        }
        let rate = i128::from(self.rate);
        let enough = rate.saturating_mul(QUANTUM).min(self.burst / 2).max(1);
        let missing = enough.saturating_sub(self.level);
        let nanoseconds = missing / rate + i128::from(missing % rate != 0);
        Err(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * PARTS);
    }
}

/// Limits of bytes and of operations, both of which must allow an operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl RateLimiter {
    /// Full buckets.
    pub fn new(config: &RateLimit) -> Self {
        let bucket = |config: &Option<TokenBucket>| config.as_ref().map(Bucket::new);
        Self { bytes: bucket(&config.bytes), operations: bucket(&config.operations) }
    }

    /// Whether there is no limit, so that nobody need look at the clock.
    pub fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }

    /// Whether an operation may begin.
    ///
    /// # Errors
    /// How long to wait before it is worth asking again.
    pub fn ready(&mut self, now: Duration) -> Result<(), Duration> {
        let waits =
            [&mut self.bytes, &mut self.operations].into_iter().flatten().filter_map(|bucket| bucket.ready(now).err());
        waits.max().map_or(Ok(()), Err)
    }

    /// Something has passed; [`Self::ready`] has allowed it.
    pub fn take(&mut self, bytes: u64, operations: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(operations);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limiter(bytes: (u64, u64), operations: (u64, u64)) -> RateLimiter {
        let bucket = |(rate, burst)| Some(TokenBucket { rate, burst });
        RateLimiter::new(&RateLimit { bytes: bucket(bytes), operations: bucket(operations) })
    }

    #[test]
    fn without_limits_everything_passes() {
        let mut limiter = RateLimiter::new(&RateLimit::default());
        assert!(limiter.is_unlimited());
        limiter.take(u64::MAX, u64::MAX);
        assert_eq!(limiter.ready(Duration::ZERO), Ok(()));
    }

    #[test]
    fn a_burst_passes_at_once_and_then_the_rate_holds() {
        let mut limiter = limiter((1000, 500), (1_000_000, 1_000_000));
        let start = Duration::from_secs(7);
        assert_eq!(limiter.ready(start), Ok(()));
        limiter.take(500, 1);
        // Nothing is left; a millisecond's worth of bytes is one.
        assert_eq!(limiter.ready(start), Err(Duration::from_millis(1)));
        assert_eq!(limiter.ready(start + Duration::from_millis(1)), Ok(()));
        // One token is there, 101 are taken: 100 are owed.
        limiter.take(101, 1);
        assert_eq!(limiter.ready(start + Duration::from_millis(1)), Err(Duration::from_millis(101)));
    }

    #[test]
    fn the_tighter_limit_decides() {
        let mut limiter = limiter((1_000_000, 1_000_000), (10, 1));
        assert_eq!(limiter.ready(Duration::ZERO), Ok(()));
        limiter.take(100, 1);
        let wait = limiter.ready(Duration::ZERO).unwrap_err();
        assert!(wait <= Duration::from_millis(100), "{wait:?}");
        assert_eq!(limiter.ready(wait), Ok(()));
    }

    #[test]
    fn time_that_goes_back_gives_nothing() {
        let mut limiter = limiter((1, 1), (1000, 1000));
        assert_eq!(limiter.ready(Duration::from_secs(1000)), Ok(()));
        limiter.take(1, 1);
        assert!(limiter.ready(Duration::ZERO).is_err());
        assert_eq!(limiter.ready(Duration::from_secs(1)), Ok(()));
    }

    #[test]
    fn absurd_numbers_do_no_harm() {
        let mut limiter = limiter((u64::MAX, u64::MAX), (0, 0));
        for _ in 0..10 {
            limiter.take(u64::MAX, u64::MAX);
        }
        assert!(limiter.ready(Duration::ZERO).unwrap_err() > Duration::from_secs(1 << 33));
        assert!(limiter.ready(Duration::MAX).is_ok() || limiter.ready(Duration::MAX).is_err());
    }

    proptest! {
        /// Whatever comes at whatever times: in each span that begins at an operation, no more passes than burst, rate and the last
        /// operation allow.
        #[test]
        fn no_span_of_time_sees_more_than_its_share(
            rate in 1u64..1_000_000, burst in 1u64..100_000,
            steps in proptest::collection::vec((0u64..20_000_000, 1u64..70_000), 1..100),
        ) {
            let mut limiter = limiter((rate, burst), (u64::MAX, u64::MAX));
            let mut now = Duration::from_secs(1);
            let mut passed: Vec<(Duration, u64)> = Vec::new();
            for (pause, size) in steps {
                now += Duration::from_nanos(pause);
                if limiter.ready(now).is_ok() {
                    limiter.take(size, 1);
                    passed.push((now, size));
                }
            }
            for (first, (from, _)) in passed.iter().enumerate() {
                let mut sum = 0u128;
                for (to, size) in &passed[first..] {
                    let gained = u128::from(rate) * (*to - *from).as_nanos() / 1_000_000_000 + 1;
                    // All before the last operation must have been covered.
                    prop_assert!(sum <= u128::from(burst) + gained, "{sum} since {from:?}");
                    sum += u128::from(*size);
                }
            }
        }

        /// One who always has something to send and waits as long as it must gets the whole rate.
        #[test]
        fn waiting_as_told_wastes_nothing(
            rate in 1000u64..1_000_000_000, burst in 1u64..1_000_000, size in 1u64..70_000,
        ) {
            let mut limiter = limiter((rate, burst), (u64::MAX, u64::MAX));
            let (mut now, mut sum) = (Duration::ZERO, 0u128);
            for _ in 0..1000 {
                match limiter.ready(now) {
                    Ok(()) => {
                        limiter.take(size, 1);
                        sum += u128::from(size);
                    }
                    Err(wait) => {
                        prop_assert!(wait > Duration::ZERO);
                        now += wait;
                        prop_assert_eq!(limiter.ready(now), Ok(()));
                    }
                }
            }
            prop_assert!(sum >= u128::from(rate) * now.as_nanos() / 1_000_000_000);
        }

        #[test]
        fn a_saved_limiter_goes_on_where_it_was(sizes in proptest::collection::vec(1u64..5000, 0..20)) {
            let mut limiter = limiter((1000, 3000), (10, 5));
            sizes.iter().for_each(|size| limiter.take(*size, 1));
            let saved = caisson_protos::monitor::encode(&limiter).unwrap();
            let mut restored: RateLimiter = caisson_protos::monitor::decode(&saved).unwrap();
            prop_assert_eq!(restored.ready(Duration::from_secs(1)), limiter.ready(Duration::from_secs(1)));
        }
    }
}
