//! bpf(2), as far as the redirection needs it. No crate is small enough to be worth it for four calls.
//!
//! Everything is held by descriptors, which are close-on-exec: nothing of it outlives the process.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use super::program::{Instruction, program};

// enum bpf_cmd, bpf_map_type, bpf_prog_type and bpf_attach_type of include/uapi/linux/bpf.h.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// How bpftool shows the program.
const NAME: [u8; 16] = *b"caisson_forward\0";

/// The part of `union bpf_attr` that BPF_MAP_CREATE reads, as far as it is set here; the kernel takes the rest as 0.
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The same for BPF_MAP_UPDATE_ELEM.
#[repr(C)]
struct Update {
    map: u32,
    unused: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The same for BPF_PROG_LOAD.
#[repr(C)]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// The same for BPF_LINK_CREATE.
#[repr(C)]
struct Link {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// A map of listening sockets, by the places that [`super::program`] names.
pub(super) struct Sockets(OwnedFd);

impl Sockets {
    /// An empty one.
    ///
    /// # Errors
    /// What bpf(2) says.
    pub(super) fn new() -> io::Result<Self> {
        let attributes = Create { map_type: MAP_TYPE_SOCKMAP, key_size: 4, value_size: 4, max_entries: 2 };
        // SAFETY: the structure is plain numbers.
        unsafe { descriptor(MAP_CREATE, &attributes) }.map(Self)
    }

    /// Puts a listening socket there.
    ///
    /// # Errors
    /// What bpf(2) says.
    pub(super) fn set(&self, place: u32, socket: &impl AsFd) -> io::Result<()> {
        let value = number(&socket.as_fd());
        let attributes = Update {
            map: number(&self.0),
            unused: 0,
            key: &raw const place as u64,
            value: &raw const value as u64,
            flags: 0,
        };
        // SAFETY: key and value are four bytes each, as the map was made for, and outlive the call.
        unsafe { bpf(MAP_UPDATE_ELEM, &attributes) }.map(drop)
    }

    /// Loads the program for this map.
    ///
    /// # Errors
    /// What bpf(2) says.
    pub(super) fn load_program(&self) -> io::Result<OwnedFd> {
        let program: Vec<Instruction> = program(self.0.as_raw_fd());
        let attributes = Load {
            program_type: PROG_TYPE_SK_LOOKUP,
            instruction_count: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            instructions: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log_buffer: 0,
            kernel_version: 0,
            flags: 0,
            name: NAME,
            interface: 0,
            expected_attach_type: ATTACH_SK_LOOKUP,
        };
        // SAFETY: the kernel reads as many instructions behind the pointer as it is told, and the license up to its NUL; both outlive
        // the call, and it writes to none.
        unsafe { descriptor(PROG_LOAD, &attributes) }
    }
}

/// Makes the kernel ask `program` in the network namespace, until the descriptor that it returns is closed.
///
/// # Errors
/// What bpf(2) says.
pub(super) fn attach(program: &OwnedFd, namespace: &impl AsFd) -> io::Result<OwnedFd> {
    let attributes =
        Link { program: number(program), target: number(&namespace.as_fd()), attach_type: ATTACH_SK_LOOKUP, flags: 0 };
    // SAFETY: the structure is plain numbers.
    unsafe { descriptor(LINK_CREATE, &attributes) }
}

/// A descriptor as bpf(2) takes it; it is never negative.
fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// # Safety
/// `attributes` must be what the kernel reads for `command`, and what it points to must be what the command expects.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads size_of::<T>() bytes of `attributes`; the rest is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// # Safety
/// As [`bpf`], and `command` must be one that makes a descriptor.
unsafe fn descriptor<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise. The kernel has just made the descriptor; nothing else owns it.
    unsafe { bpf(command, attributes).map(|fd| OwnedFd::from_raw_fd(fd)) }
}
