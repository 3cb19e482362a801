//! The end of the machine: one byte to the monitor's power port. x86 only.

use std::io;

use caisson_protos::guest::{POWER_OFF, POWER_PORT};

/// Powers the machine off; whatever must be written back has been written back. Returns only if that is not possible
/// here: the monitor does not let the processor go on after this write.
pub fn off() -> io::Error {
    // SAFETY: ioperm takes three numbers; it changes only which I/O ports this thread may use.
    if unsafe { libc::ioperm(POWER_PORT.into(), 1, 1) } != 0 {
        return io::Error::last_os_error();
    }
    // SAFETY: the port was granted above; writing to it touches no memory, and the machine behind it is our own
    // monitor, which ends here.
    unsafe {
        core::arch::asm!(
            "out dx, al",
            in("dx") POWER_PORT,
            in("al") POWER_OFF,
            options(nomem, nostack, preserves_flags)
        );
    }
    io::Error::new(io::ErrorKind::NotConnected, "nothing answers at the power port; this is no Caisson machine")
}
