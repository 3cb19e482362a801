//! The I/O ports of the machine: the debug console, the ways to reset, and the port by which the guest powers off.
//! All others read as ones and swallow what is written.

use std::{
    io::{self, Write},
    sync::{Mutex, PoisonError},
};

use caisson_protos::{
    guest::{POWER_OFF, POWER_PORT},
    monitor::ExitReason,
};
use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::output::Output;

/// The first serial port, eight registers.
const SERIAL: u16 = 0x3f8;
const SERIAL_REGISTERS: u16 = 8;
/// The keyboard controller's data and command ports. There is none; but Linux resets through it, and waits for its
/// "input buffer full" bit to clear first.
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
/// Pulse the reset line.
const KEYBOARD_RESET: u8 = 0xfe;
/// The chipset's reset control register, and the bit that resets.
const RESET_CONTROL: u16 = 0xcf9;
const RESET_NOW: u8 = 0x04;

/// A guest's line without an end is written out at this length, bytes.
const LINE_MAX: usize = 256;

/// The ports of one machine, used by all vCPUs.
pub struct Ports {
    serial: Option<Mutex<SerialPort>>,
}

type SerialPort = Serial<Interrupt, NoEvents, Lines>;

/// The guest ended its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestExit {
    /// How.
    pub reason: ExitReason,
    /// By which means.
    pub detail: &'static str,
}

impl Ports {
    /// The ports, with a serial port only if it has an output.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new(console: Option<Output>) -> io::Result<Self> {
        let serial = console.map(|output| -> io::Result<_> {
            let interrupt = Interrupt(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
            Ok(Mutex::new(Serial::new(interrupt, Lines { output, line: Vec::with_capacity(LINE_MAX) })))
        });
        Ok(Self { serial: serial.transpose()? })
    }

    /// The serial port's interrupt, to be joined to [`crate::layout::SERIAL_IRQ`].
    ///
    /// # Errors
    /// No more descriptors.
    pub fn serial_interrupt(&self) -> io::Result<Option<EventFd>> {
        self.with_serial(|serial| serial.interrupt_evt().0.try_clone()).transpose()
    }

    /// Console bytes that its descriptor could not take.
    pub fn console_dropped(&self) -> u64 {
        self.with_serial(|serial| serial.writer().output.dropped()).unwrap_or(0)
    }

    /// Writes out what the guest's last line has so far.
    pub fn flush(&self) {
        self.with_serial(|serial| serial.writer_mut().write_out());
    }

    /// The guest writes.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<GuestExit> {
        let reset = |detail| Some(GuestExit { reason: ExitReason::Reset, detail });
        match (port, data) {
            (POWER_PORT, [POWER_OFF]) => {
                Some(GuestExit { reason: ExitReason::PoweredOff, detail: "the guest wrote to its power port" })
            }
            (KEYBOARD_COMMAND, [KEYBOARD_RESET]) => reset("the guest reset itself through the keyboard controller"),
            (RESET_CONTROL, [value]) if value & RESET_NOW != 0 => reset("the guest reset itself through port 0xcf9"),
            _ => {
                if let Some(register) = serial_register(port) {
                    self.with_serial(|serial| {
                        // More than one byte is a string instruction: one byte after the other to the same port.
                        for byte in data {
                            // Fails only if the interrupt's eventfd is full.
                            let _ = serial.write(register, *byte);
                        }
                    });
                }
                None
            }
        }
    }

    /// The guest reads.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            // Neither full nor anything to fetch.
            KEYBOARD_COMMAND | KEYBOARD_DATA => data.fill(0),
            _ => {
                if let Some(register) = serial_register(port) {
                    self.with_serial(|serial| data.iter_mut().for_each(|byte| *byte = serial.read(register)));
                }
            }
        }
    }

    fn with_serial<T>(&self, f: impl FnOnce(&mut SerialPort) -> T) -> Option<T> {
        self.serial.as_ref().map(|serial| f(&mut serial.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(SERIAL).filter(|register| *register < SERIAL_REGISTERS).and_then(|n| u8::try_from(n).ok())
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Gathers bytes into lines: a write for each byte would cost more than the exit that brought it.
struct Lines {
    output: Output,
    line: Vec<u8>,
}

impl Lines {
    fn write_out(&mut self) {
        // Never fails: it drops and counts.
        let _ = self.output.write(&self.line);
        self.line.clear();
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_MAX {
                self.write_out();
            }
        }
        Ok(bytes.len())
    }

    /// The serial port asks for it after each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_way_out_is_told_apart() {
        let ports = Ports::new(None).unwrap();
        let reason = |port, value| ports.write(port, &[value]).map(|exit| exit.reason);
        assert_eq!(reason(0x510, 1), Some(ExitReason::PoweredOff));
        assert_eq!(reason(0x510, 2), None);
        assert_eq!(reason(0x64, 0xfe), Some(ExitReason::Reset));
        assert_eq!(reason(0x64, 0xfd), None);
        assert_eq!(reason(0xcf9, 0x06), Some(ExitReason::Reset));
        assert_eq!(reason(0xcf9, 0x02), None);
    }

    #[test]
    fn console_output_comes_line_by_line_and_the_rest_at_the_end() {
        let (mut reader, writer) = io::pipe().unwrap();
        let ports = Ports::new(Some(Output::new(writer.into()))).unwrap();
        ports.write(0x3f8, b"one\ntwo");
        let mut buffer = [0; 64];
        let n = reader.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"one\n");
        ports.flush();
        let n = reader.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"two");
    }

    #[test]
    fn without_a_console_there_is_no_serial_port() {
        let ports = Ports::new(None).unwrap();
        let mut byte = [0];
        ports.read(0x3f8 + 5, &mut byte);
        assert_eq!(byte, [0xff]);
    }

    proptest! {
        #[test]
        fn arbitrary_accesses_never_panic(
            accesses in proptest::collection::vec((0x3f0u16..0x400, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..300)
        ) {
            let null = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
            let ports = Ports::new(Some(Output::new(null.into()))).unwrap();
            for (port, write, mut data) in accesses {
                if write {
                    prop_assert_eq!(ports.write(port, &data), None);
                } else {
                    ports.read(port, &mut data);
                }
            }
        }
    }
}
