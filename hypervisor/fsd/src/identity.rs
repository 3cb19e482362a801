//! Who a request acts as.
//!
//! The guest's kernel has checked every permission (virtio-fs always mounts with `default_permissions`) with credentials
//! that no request carries in full: supplementary groups and capabilities are missing. So the server does not check again:
//! it keeps its capabilities, and takes the caller's user and group only while it creates something, for the
//! ownership. That needs SECBIT_NO_SETUID_FIXUP ([`crate::jail`]); without it a change of user would drop
//! CAP_DAC_OVERRIDE, and a member of a supplementary group could not create a file that its guest allows.
//!
//! All of it is per thread on Linux, and rustix makes the bare system calls, so only the thread that serves changes. (The umask is
//! a thread's own after unshare(CLONE_FS).)

use std::cell::Cell;

use rustix::{
    fs::{Gid, Mode, Uid},
    io::Errno,
    process::umask,
    thread::{CapabilitySet, CapabilitySets, set_capabilities, set_thread_res_gid, set_thread_res_uid},
};

/// What serving files for any user needs, and no more:
///
/// - CHOWN, FOWNER: the guest's chown, chmod, utimes on anybody's files
/// - DAC_OVERRIDE: files that root itself may not read or write by their mode
/// - FSETID: setgid bits survive the server's own writes and chmods
/// - SETUID, SETGID: the owner of new files
/// - MKNOD: device nodes in container roots; harmless because no mount here lets one be opened
/// - SETFCAP: the security.capability attribute (`setcap`)
///
/// Left out on purpose: DAC_READ_SEARCH (it opens any inode of the file system by handle, in or out of the shared directory),
/// SYS_ADMIN (mounts, trusted.* attributes, which drive overlayfs), LINUX_IMMUTABLE, SYS_RESOURCE (quota).
///
/// Space that ext4 reserves for root can be had without SYS_RESOURCE: it counts who root is as well, and on an overlay the
/// rights of whoever mounted it, as with a container of runc whose user is root. Writing as another user would not do: a network file
/// system asks its server with that user's name.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Creates something with `create`, owned by the caller, with the caller's umask (which the host's kernel ignores where
/// a default ACL decides instead).
///
/// # Errors
/// `create`'s, or that of taking the identity.
pub fn creating_as<T>(uid: u32, gid: u32, mask: u32, create: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    // A made-up id of -1 would mean "unchanged".
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Errno::INVAL);
    }
    set_mask(mask);
    if uid == 0 && gid == 0 {
        return create();
    }
    let _root = BackToRoot;
    set_thread_res_gid(None, Gid::from_raw(gid), None)?;
    set_thread_res_uid(None, Uid::from_raw(uid), None)?;
    create()
}

struct BackToRoot;

impl Drop for BackToRoot {
    fn drop(&mut self) {
        let back = set_thread_res_uid(None, Uid::ROOT, None).and(set_thread_res_gid(None, Gid::ROOT, None));
        // The real user is still root, so Linux has no reason to refuse; going on as somebody else would be worse.
        if back.is_err() {
            std::process::abort();
        }
    }
}

thread_local! {
    /// The calling thread's effective capabilities and its umask, as far as they are known: most requests need them as
    /// the one before left them.
    static EFFECTIVE: Cell<CapabilitySet> = const { Cell::new(CAPABILITIES) };
    static MASK: Cell<Option<u32>> = const { Cell::new(None) };
}

fn set_mask(mask: u32) {
    let mask = mask & 0o777;
    if MASK.replace(Some(mask)) != Some(mask) {
        umask(Mode::from_raw_mode(mask));
    }
}

/// Changes a file with `change` such that the kernel takes setuid and setgid bits away, as it does for a caller without
/// CAP_FSETID; the guest asks for that where its caller has not. The thread stays without it until [`with_all`].
///
/// # Errors
/// `change`'s, or that of changing the capabilities.
pub fn without_fsetid<T>(drop_it: bool, change: impl FnOnce() -> T) -> Result<T, Errno> {
    set_effective(if drop_it { CAPABILITIES.difference(CapabilitySet::FSETID) } else { CAPABILITIES })?;
    Ok(change())
}

/// Gives the thread all of its capabilities back.
///
/// # Errors
/// If one is not permitted.
pub fn with_all() -> Result<(), Errno> {
    set_effective(CAPABILITIES)
}

/// # Errors
/// If a capability is not permitted.
fn set_effective(effective: CapabilitySet) -> Result<(), Errno> {
    if EFFECTIVE.get() == effective {
        return Ok(());
    }
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective, permitted: CAPABILITIES, inheritable })?;
    EFFECTIVE.set(effective);
    Ok(())
}
