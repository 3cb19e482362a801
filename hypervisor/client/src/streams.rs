//! Streams that the guest opens to the host. The monitor announces each in one packet with the stream's far end
//! attached. Who does not want one drops it, which the guest sees as a reset.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use caisson_protos::monitor::{GuestStream, decode};

use crate::packet::PacketSocket;

/// The parent's end of [`VsockConfig::guest_streams`](caisson_protos::monitor::VsockConfig::guest_streams).
#[derive(Debug)]
pub struct GuestStreams(PacketSocket);

impl GuestStreams {
    /// Registers the socket with the current runtime.
    ///
    /// # Errors
    /// What epoll says.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(PacketSocket::new(socket)?))
    }

    /// The next stream; None when the monitor has ended.
    ///
    /// # Errors
    /// `InvalidData` if the monitor broke the protocol.
    pub async fn next(&self) -> io::Result<Option<(GuestStream, UnixStream)>> {
        let mut buffer = Vec::new();
        let Some((bytes, descriptors)) = self.0.receive(&mut buffer).await? else { return Ok(None) };
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let announced: GuestStream = decode(bytes).map_err(|error| invalid(error.to_string()))?;
        let mut descriptors = descriptors.into_iter();
        match (descriptors.next(), descriptors.next()) {
            (Some(stream), None) => Ok(Some((announced, UnixStream::from(stream)))),
            _ => Err(invalid(format!("stream to port {} announced without its one descriptor", announced.host_port))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use caisson_protos::monitor::encode;

    use super::*;
    use crate::packet;

    #[tokio::test]
    async fn an_announced_stream_arrives_with_its_ports_and_works() {
        let (ours, theirs) = packet::pair().unwrap();
        let (mut guest, far) = UnixStream::pair().unwrap();
        let said = GuestStream { host_port: 1024, guest_port: 7 };
        packet::send(&theirs, &encode(&said).unwrap(), &[far.into()]).unwrap();
        let streams = GuestStreams::new(ours).unwrap();
        let (heard, mut stream) = streams.next().await.unwrap().expect("one stream");
        assert_eq!(heard, said);
        guest.write_all(b"hello").unwrap();
        drop(guest);
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        drop(theirs);
        assert!(streams.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn an_announcement_without_its_descriptor_is_refused() {
        let (ours, theirs) = packet::pair().unwrap();
        packet::send(&theirs, &encode(&GuestStream { host_port: 1, guest_port: 2 }).unwrap(), &[]).unwrap();
        let refused = GuestStreams::new(ours).unwrap().next().await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    }
}
