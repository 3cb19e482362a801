//! What the end-to-end tests stand on: a private containerd for each test, containers in it, and proof that
//! nothing of them is left.
//!
//! ```text
//! test ──► Host            one containerd: own root, state, socket, namespace, Caisson configuration
//!            ├─ run(..)    `ctr run --rm` to its end            → Finished { status, stdout, stderr }
//!            ├─ pod(..)    `ctr run --rm` in the background     → Pod { stdin, output so far, exit }
//!            ├─ exec(..)   `ctr task exec` in a running pod
//!            ├─ shim(..)   the shim's own ttrpc socket, for what `ctr` cannot say
//!            └─ at the end: no process, mount, cgroup, socket, directory or descriptor more than before
//! ```
//!
//! A test is a function of a [`Host`]; [`for_each_runtime!`] makes two tests of it, one on Caisson and one on runc, with
//! the same assertions: runc is the measure of what containerd's users expect. [`caisson_only!`] is for what
//! only a machine of its own gives.
//!
//! The tests need root, containerd, ctr and runc, and these variables:
//!
//! - `CAISSON_BIN_DIR`: containerd-shim-caisson-v2, caisson-vmm, caisson-fsd and caisson-e2e-probe (static);
//! - `CAISSON_IMAGE_DIR`: the guest's vmlinux and initramfs;
//! - `CAISSON_OCI_DIR`: busybox.tar and debian.tar, OCI archives of localhost/caisson/{busybox,debian}:latest;
//! - `CAISSON_FULL=1`: every full size (see [`sizes`]).

pub mod archive;
pub mod bundle;
pub mod containerd;
pub mod direct;
pub mod disk;
#[cfg(test)]
mod documents;
pub mod environment;
pub mod events;
pub mod gate;
pub mod guest_memory;
pub mod hold;
pub mod host;
pub mod leftovers;
pub mod network;
pub mod pod;
pub mod process;
pub mod shim;
pub mod sizes;
pub mod spec;
pub mod task;
pub mod terminal;
pub mod wait;

pub use environment::Runtime;
pub use host::{Host, Setup};
pub use pod::{Finished, Pod};
pub use wait::until;

/// The small image: Debian's static busybox.
pub const BUSYBOX: &str = "localhost/caisson/busybox:latest";
/// A Debian base system.
pub const DEBIAN: &str = "localhost/caisson/debian:latest";
/// [`BUSYBOX`] with the static test program as `/bin/probe`, in a layer of its own.
pub const PROBE: &str = "localhost/caisson/probe:latest";

/// Makes a test on Caisson and a test on runc of each function of a [`Host`].
///
/// `name` or `name in setup`, where `setup` is a [`Setup`].
#[macro_export]
macro_rules! for_each_runtime {
    ($($name:ident $(in $setup:expr)?),+ $(,)?) => { $(
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            #[test]
            fn caisson() {
                $crate::host::test($crate::Runtime::Caisson, $crate::for_each_runtime!(@setup $($setup)?), super::$name);
            }
            #[test]
            fn runc() {
                $crate::host::test($crate::Runtime::Runc, $crate::for_each_runtime!(@setup $($setup)?), super::$name);
            }
        }
    )+ };
    (@setup) => { $crate::Setup::default() };
    (@setup $setup:expr) => { $setup };
}

/// Makes a test on Caisson alone of each function of a [`Host`].
#[macro_export]
macro_rules! caisson_only {
    ($($name:ident $(in $setup:expr)?),+ $(,)?) => { $(
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            #[test]
            fn caisson() {
                $crate::host::test($crate::Runtime::Caisson, $crate::for_each_runtime!(@setup $($setup)?), super::$name);
            }
        }
    )+ };
}
