//! The commands of ioctl(2) that lsattr, chattr, xfs_io and the like use on files of any file system
//! (include/uapi/linux/fs.h); every other one is refused.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd},
};

use rustix::{
    fs::{IFlags, ioctl_getflags, ioctl_setflags},
    io::Errno,
};

const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;

/// struct fsxattr, bytes.
const FSXATTR: usize = 28;
/// Where its project's number is.
const PROJECT: std::ops::Range<usize> = 12..16;

/// Carries out `command` with the guest's `data` on what `open` opens; returns what the guest gets.
///
/// # Errors
/// ENOTTY for another command, EINVAL if data is missing, EPERM for another project number, those of `open` and of the
/// system call.
pub fn control(command: u32, data: &[u8], open: impl FnOnce() -> Result<File, Errno>) -> Result<Vec<u8>, Errno> {
    match command {
        FS_IOC_GETFLAGS => Ok(ioctl_getflags(open()?)?.bits().to_le_bytes().to_vec()),
        FS_IOC_SETFLAGS => {
            let flags = *data.first_chunk().ok_or(Errno::INVAL)?;
            ioctl_setflags(open()?, IFlags::from_bits_retain(u32::from_le_bytes(flags)))?;
            Ok(Vec::new())
        }
        FS_IOC_FSGETXATTR => Ok(get(open()?)?.to_vec()),
        FS_IOC_FSSETXATTR => {
            let mut new: [u8; FSXATTR] = *data.first_chunk().ok_or(Errno::INVAL)?;
            let file = open()?;
            // By its project's number the host may limit what the pod writes.
            if new.get(PROJECT) != get(&file)?.get(PROJECT) {
                return Err(Errno::PERM);
            }
            call(file, FS_IOC_FSSETXATTR, &mut new)?;
            Ok(Vec::new())
        }
        _ => Err(Errno::NOTTY),
    }
}

fn get(file: impl AsFd) -> Result<[u8; FSXATTR], Errno> {
    let mut now = [0; FSXATTR];
    call(file, FS_IOC_FSGETXATTR, &mut now)?;
    Ok(now)
}

fn call(file: impl AsFd, command: u32, data: &mut [u8; FSXATTR]) -> Result<(), Errno> {
    // SAFETY: the descriptor is open, and both commands read or write a struct fsxattr, for which there is room. The cast
    // is to what the C library in use takes for the command's number.
    let result = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), command as _, data.as_mut_ptr()) };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}
