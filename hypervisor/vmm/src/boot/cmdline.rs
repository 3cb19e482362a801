//! The kernel's command line: what the monitor knows (the console and where the devices are), then the operator's words.
//! In this order, because Linux hands everything behind `--` to init, and takes the last of several consoles for /dev/console.

use caisson_protos::guest::Slot;
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
    /// Linux would hand the rest to init.
    #[error("kernel command line has the word \"--\": leave out what follows it, init takes no arguments")]
    EndOfParameters,
    /// Linux would take all that follows for one value.
    #[error("kernel command line has an odd number of double quotes: close the last one")]
    OpenQuote,
    /// Linux would cut it.
    #[error("kernel command line has {0} bytes with the devices' own, the kernel takes {MAX_LEN}: shorten it")]
    TooLong(usize),
}

/// A command line in the making.
#[derive(Clone, Debug)]
pub struct CommandLine {
    own: String,
    words: String,
}

impl CommandLine {
    /// Takes the operator's words.
    ///
    /// # Errors
    /// See [`CommandLineError`].
    pub fn new(words: &str) -> Result<Self, CommandLineError> {
        if let Some((at, byte)) = words.bytes().enumerate().find(|(_, byte)| !(b' '..=b'~').contains(byte)) {
            return Err(CommandLineError::Byte { byte, at });
        }
        if !words.bytes().filter(|byte| *byte == b'"').count().is_multiple_of(2) {
            return Err(CommandLineError::OpenQuote);
        }
        if words.split(' ').any(|word| word == "--") {
            return Err(CommandLineError::EndOfParameters);
        }
        Ok(Self { own: String::new(), words: words.to_owned() })
    }

    /// The serial port is the kernel's console; `early`: from its first line on.
    pub fn add_console(&mut self, early: bool) {
        if early {
            self.add("earlyprintk=ttyS0");
        }
        self.add("console=ttyS0");
    }

    /// There is a virtio-mmio slot, which Linux is to know by this number ([`Slot::platform_device`]).
    pub fn add_slot(&mut self, base: GuestAddress, irq: u32, Slot(number): Slot) {
        self.add(&format!("virtio_mmio.device={}K@{:#x}:{irq}:{number}", REGISTERS_SIZE / 1024, base.0));
    }

    /// The bytes for the guest, with the final zero.
    ///
    /// # Errors
    /// [`CommandLineError::TooLong`].
    pub fn finish(self) -> Result<Vec<u8>, CommandLineError> {
        let mut line = self.own;
        add(&mut line, &self.words);
        if line.len() > MAX_LEN {
            return Err(CommandLineError::TooLong(line.len()));
        }
        let mut bytes = line.into_bytes();
        bytes.push(0);
        Ok(bytes)
    }

    fn add(&mut self, word: &str) {
        add(&mut self.own, word);
    }
}

fn add(line: &mut String, words: &str) {
    if !line.is_empty() && !words.is_empty() {
        line.push(' ');
    }
    line.push_str(words);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_follow_each_other() {
        let mut line = CommandLine::new("panic=-1").unwrap();
        line.add_console(true);
        line.add_slot(GuestAddress(0xd000_0000), 5, Slot(0));
        let text = String::from_utf8(line.finish().unwrap()).unwrap();
        assert_eq!(text, "earlyprintk=ttyS0 console=ttyS0 virtio_mmio.device=4K@0xd0000000:5:0 panic=-1\0");
    }

    #[test]
    fn what_linux_would_cut_or_misread_is_refused() {
        assert_eq!(CommandLine::new("a\nb").unwrap_err(), CommandLineError::Byte { byte: b'\n', at: 1 });
        assert_eq!(CommandLine::new("ä").unwrap_err(), CommandLineError::Byte { byte: 0xc3, at: 0 });
        assert_eq!(CommandLine::new("a -- b").unwrap_err(), CommandLineError::EndOfParameters);
        assert_eq!(CommandLine::new("--").unwrap_err(), CommandLineError::EndOfParameters);
        assert_eq!(CommandLine::new("a=\"b c").unwrap_err(), CommandLineError::OpenQuote);
        assert!(CommandLine::new("a=\"b c\" d--e --f").is_ok());
        assert!(CommandLine::new(&"x".repeat(MAX_LEN)).unwrap().finish().is_ok());
        let too_long = CommandLine::new(&"x".repeat(MAX_LEN + 1)).unwrap();
        assert_eq!(too_long.finish().unwrap_err(), CommandLineError::TooLong(MAX_LEN + 1));
    }
}
