//! The kernel's command line: the operator's words, then what the monitor knows: the console and where the devices are.

use vm_memory::GuestAddress;

use crate::virtio::mmio::REGISTERS_SIZE;

/// Linux's COMMAND_LINE_SIZE on x86 is 2048 with the final zero.
pub const MAX_LEN: usize = 2047;

/// A command line that the kernel would not see as it was meant.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommandLineError {
    /// Control characters or not ASCII.
    #[error("kernel command line has the byte {byte:#04x} at position {at}: use printable ASCII only")]
    Byte {
        /// The byte.
        byte: u8,
        /// Its position, from 0.
        at: usize,
    },
    /// Linux would cut it.
    #[error("kernel command line has {0} bytes with the devices' own, the kernel takes {MAX_LEN}: shorten it")]
    TooLong(usize),
}

/// A command line in the making.
#[derive(Clone, Debug)]
pub struct CommandLine(String);

impl CommandLine {
    /// Begins with the operator's words.
    ///
    /// # Errors
    /// [`CommandLineError::Byte`].
    pub fn new(words: &str) -> Result<Self, CommandLineError> {
        match words.bytes().enumerate().find(|(_, byte)| !(b' '..=b'~').contains(byte)) {
            Some((at, byte)) => Err(CommandLineError::Byte { byte, at }),
            None => Ok(Self(words.to_owned())),
        }
    }

    /// The serial port is the kernel's console; `early`: from its first line on.
    pub fn add_console(&mut self, early: bool) {
        if early {
            self.add("earlyprintk=ttyS0");
        }
        self.add("console=ttyS0");
    }

    /// There is a virtio-mmio device.
    pub fn add_device(&mut self, base: GuestAddress, irq: u32) {
        self.add(&format!("virtio_mmio.device={}K@{:#x}:{irq}", REGISTERS_SIZE / 1024, base.0));
    }

    /// The bytes for the guest, with the final zero.
    ///
    /// # Errors
    /// [`CommandLineError::TooLong`].
    pub fn finish(self) -> Result<Vec<u8>, CommandLineError> {
        if self.0.len() > MAX_LEN {
            return Err(CommandLineError::TooLong(self.0.len()));
        }
        let mut bytes = self.0.into_bytes();
        bytes.push(0);
        Ok(bytes)
    }

    fn add(&mut self, word: &str) {
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        self.0.push_str(word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_follow_each_other() {
        let mut line = CommandLine::new("panic=-1").unwrap();
        line.add_console(true);
        line.add_device(GuestAddress(0xd000_0000), 5);
        let text = String::from_utf8(line.finish().unwrap()).unwrap();
        assert_eq!(text, "panic=-1 earlyprintk=ttyS0 console=ttyS0 virtio_mmio.device=4K@0xd0000000:5\0");
    }

    #[test]
    fn what_linux_would_cut_or_misread_is_refused() {
        assert_eq!(CommandLine::new("a\nb").unwrap_err(), CommandLineError::Byte { byte: b'\n', at: 1 });
        assert_eq!(CommandLine::new("ä").unwrap_err(), CommandLineError::Byte { byte: 0xc3, at: 0 });
        assert!(CommandLine::new(&"x".repeat(MAX_LEN)).unwrap().finish().is_ok());
        let too_long = CommandLine::new(&"x".repeat(MAX_LEN + 1)).unwrap();
        assert_eq!(too_long.finish().unwrap_err(), CommandLineError::TooLong(MAX_LEN + 1));
    }
}
