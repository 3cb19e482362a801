//! Several channels on one serial line, for an emulator that has no virtio-serial: each write is a frame.
//!
//! ```text
//!   channel 1 byte │ length 2 bytes, big-endian │ content
//! ```

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::rc::Rc;

/// The most that one frame carries, bytes.
const MOST: usize = u16::MAX as usize;

/// What a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// [`crate::report::Report`] lines.
    Report,
    /// The command's standard output.
    Stdout,
    /// The command's standard error.
    Stderr,
}

impl Channel {
    const ALL: [Self; 3] = [Self::Report, Self::Stdout, Self::Stderr];

    fn byte(self) -> u8 {
        match self {
            Self::Report => b'r',
            Self::Stdout => b'o',
            Self::Stderr => b'e',
        }
    }
}

/// Writes into one channel of a line that it shares with others.
pub struct Sender {
    line: Rc<RefCell<File>>,
    channel: Channel,
}

/// The senders of a line, in the order of [`Channel`].
pub fn senders(line: File) -> [Sender; 3] {
    let line = Rc::new(RefCell::new(line));
    Channel::ALL.map(|channel| Sender { line: Rc::clone(&line), channel })
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let content = &bytes[..bytes.len().min(MOST)];
        let [high, low] = (content.len() as u16).to_be_bytes();
        let mut line = self.line.borrow_mut();
        line.write_all(&[self.channel.byte(), high, low])?;
        line.write_all(content)?;
        Ok(content.len())
    }

    /// Waits until the line has sent everything.
    fn flush(&mut self) -> io::Result<()> {
        Ok(rustix::termios::tcdrain(&*self.line.borrow())?)
    }
}

/// Reads the next frame into `content`. `None`: the line has ended, at the end of a frame or within one.
pub fn receive(line: &mut impl Read, content: &mut Vec<u8>) -> io::Result<Option<Channel>> {
    let mut header = [0; 3];
    match line.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let [byte, high, low] = header;
    let Some(channel) = Channel::ALL.into_iter().find(|channel| channel.byte() == byte) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame for unknown channel {byte:#x}")));
    };
    content.resize(usize::from(u16::from_be_bytes([high, low])), 0);
    match line.read_exact(content) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        result => result.map(|()| Some(channel)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;

    fn frames(mut line: impl Read) -> Vec<(Channel, Vec<u8>)> {
        let (mut found, mut content) = (Vec::new(), Vec::new());
        while let Some(channel) = receive(&mut line, &mut content).unwrap() {
            found.push((channel, content.clone()));
        }
        found
    }

    #[test]
    fn channels_come_apart_in_order() {
        let mut file = tempfile::tempfile().unwrap();
        let [mut report, mut stdout, mut stderr] = senders(file.try_clone().unwrap());
        report.write_all(b"step command\n").unwrap();
        stdout.write_all(&[5; 70_000]).unwrap();
        stderr.write_all(b"oops").unwrap();
        file.rewind().unwrap();
        let found = frames(file);
        let lengths: Vec<_> = found.iter().map(|(channel, content)| (*channel, content.len())).collect();
        let expected =
            [(Channel::Report, 13), (Channel::Stdout, MOST), (Channel::Stdout, 70_000 - MOST), (Channel::Stderr, 4)];
        assert_eq!(lengths, expected);
    }

    #[test]
    fn a_frame_that_is_cut_off_is_the_end() {
        assert_eq!(frames(&b"o\0\x02hi"[..]), [(Channel::Stdout, b"hi".to_vec())]);
        for cut in [&b""[..], b"o", b"o\0", b"o\0\x02", b"o\0\x02h"] {
            assert_eq!(frames(cut), [], "{cut:?}");
        }
    }

    #[test]
    fn an_unknown_channel_is_an_error() {
        assert!(receive(&mut &b"x\0\0"[..], &mut Vec::new()).is_err());
    }
}
