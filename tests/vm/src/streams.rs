//! Streams to a guest, by the socket of its vsock device.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use crate::environment::LIMIT;

/// A stream to a port of the guest; None if the guest refuses.
pub fn dial(socket: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).expect("the socket of the vsock device");
    stream.set_read_timeout(Some(LIMIT)).expect("a time limit");
    writeln!(stream, "CONNECT {port}").expect("writing to the vsock device");
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        if stream.read(&mut byte).expect("the answer of the vsock device") == 0 {
            return None;
        }
        line.extend(byte);
    }
    let line = String::from_utf8(line).expect("a line of text");
    assert!(line.strip_prefix("OK ").is_some_and(|port| port.trim().parse::<u32>().is_ok()), "{line:?}");
    Some(stream)
}
