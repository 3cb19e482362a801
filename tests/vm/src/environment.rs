//! Where the programs and images under test are, and how long anything may take.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// Generous: the tests run on emulated processors, many at a time.
pub const LIMIT: Duration = Duration::from_secs(240);

/// A program under test.
pub fn program(name: &str) -> PathBuf {
    existing("CAISSON_BIN_DIR", name)
}

/// The guest kernel.
pub fn vmlinux() -> PathBuf {
    existing("CAISSON_IMAGE_DIR", "vmlinux")
}

fn existing(variable: &str, name: &str) -> PathBuf {
    let folder = std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set: run these tests with `make test`, or say where {name} is"));
    let path = PathBuf::from(folder).join(name);
    assert!(path.exists(), "{} does not exist: build it first", path.display());
    path
}

/// The moment at which a wait ends.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Default for Deadline {
    fn default() -> Self {
        Self(Instant::now() + LIMIT)
    }
}

impl Deadline {
    /// What is left of it.
    pub fn left(self, what: &str) -> Duration {
        let left = self.0.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "waited {LIMIT:?} for {what}");
        left
    }
}
