//! bpf(2), as far as device programs need it. No crate is small enough to be worth it for two calls.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use super::devices::Instruction;

// enum bpf_cmd, bpf_prog_type, bpf_attach_type and flags of include/uapi/linux/bpf.h.
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 1 << 1;
const REPLACE: u32 = 1 << 2;

/// The part of `union bpf_attr` that BPF_PROG_LOAD reads, as far as it is set here; the kernel takes the rest as 0.
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

/// The same for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: i32,
    program: i32,
    attach_type: u32,
    flags: u32,
    replaced: i32,
}

/// Gives a program to the kernel, which checks it.
///
/// # Errors
/// What bpf(2) says.
pub fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut name = [0; 16];
    name.iter_mut().zip(b"caisson_devices").for_each(|(place, byte)| *place = *byte);
    let attributes = Load {
        program_type: PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name,
        interface: 0,
        expected_attach_type: 0,
    };
    // SAFETY: the kernel reads size_of::<Load>() bytes of `attributes`, as many instructions behind its pointer as it
    // is passed, and the license up to its NUL; all of them outlive the call, and it writes to none.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const attributes, size_of::<Load>()) };
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor (close-on-exec); nothing else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the kernel ask `program` about the devices of the processes in the cgroup whose directory `cgroup` is, instead
/// of `replaced`. There is no moment in which neither is asked. Where cgroups above have programs too, all of them must
/// allow.
///
/// # Errors
/// What bpf(2) says.
pub fn attach_device_program(cgroup: &File, program: &OwnedFd, replaced: Option<&OwnedFd>) -> io::Result<()> {
    let attributes = Attach {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        attach_type: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI | if replaced.is_some() { REPLACE } else { 0 },
        replaced: replaced.map_or(0, AsRawFd::as_raw_fd),
    };
    // SAFETY: the kernel reads size_of::<Attach>() bytes of `attributes`, which are plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attributes, size_of::<Attach>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
