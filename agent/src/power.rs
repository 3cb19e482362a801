//! The end of the machine: one byte to the monitor's power port. x86 only.

use std::{convert::Infallible, io};

use caisson_protos::guest::{POWER_OFF, POWER_PORT};

/// Powers the machine off. Whatever must be written back has been written back.
///
/// # Errors
/// If the kernel does not let the process use the port.
pub fn off() -> io::Result<Infallible> {
    // SAFETY: ioperm takes three numbers; it changes only which I/O ports this thread may use.
    if unsafe { libc::ioperm(POWER_PORT.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    loop {
        // SAFETY: the port was granted above; writing to it touches no memory, and the machine behind it is our own monitor,
        // which ends here.
        unsafe {
            core::arch::asm!(
                "out dx, al",
                in("dx") POWER_PORT,
                in("al") POWER_OFF,
                options(nomem, nostack, preserves_flags)
            );
        }
        // The monitor may take a moment, or it is not Caisson's and nothing listens there.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
