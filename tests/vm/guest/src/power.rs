//! The ways out of the machine.

use std::{arch::asm, fs};

use caisson_protos::guest::{POWER_OFF, POWER_PORT};

/// Powers the machine off.
pub fn off() -> ! {
    // SAFETY: PID 1 of a machine of its own may touch the machine's ports; this one ends it.
    unsafe {
        libc::sync();
        // The console's driver sends in its own time; what it still holds would be lost.
        libc::tcdrain(1);
        assert_eq!(libc::iopl(3), 0, "iopl");
        asm!("out dx, al", in("dx") POWER_PORT, in("al") POWER_OFF);
    }
    unreachable!("the machine is off");
}

/// Resets the machine as `reboot` does.
pub fn reboot() -> ! {
    // SAFETY: touches no memory.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    unreachable!("the machine was reset");
}

/// Makes the kernel panic; it has panic=-1 on its command line.
pub fn panic_the_kernel() -> ! {
    if fs::write("/proc/sysrq-trigger", "c").is_err() {
        // No sysrq in this kernel: the end of PID 1 does as well.
        std::process::exit(7);
    }
    unreachable!("the kernel has panicked");
}
