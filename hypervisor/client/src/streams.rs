//! Streams that the guest opens to the host. The monitor announces each in one packet with the stream's far end
//! attached. Who does not want one drops it, which the guest sees as a reset.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use caisson_protos::monitor::{GuestStream, decode};
use nix::libc;

use crate::packet::PacketSocket;

/// The parent's end of [`VsockConfig::guest_streams`](caisson_protos::monitor::VsockConfig::guest_streams).
#[derive(Debug)]
pub struct GuestStreams(PacketSocket);

impl GuestStreams {
    /// Registers the socket with the current runtime.
    ///
    /// # Errors
    /// The error of epoll.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(PacketSocket::new(socket)?))
    }

    /// The next stream; None when the monitor has ended. A stream for which this process has no descriptor is reset.
    ///
    /// # Errors
    /// `InvalidData` if the monitor broke the protocol.
    pub async fn next(&self) -> io::Result<Option<(GuestStream, UnixStream)>> {
        let mut buffer = Vec::new();
        loop {
            let (bytes, descriptors) = match self.0.receive(&mut buffer).await {
                Ok(Some(received)) => received,
                Ok(None) => return Ok(None),
                // The kernel has closed the far end, which resets the stream; the machine and its other streams go on.
                Err(error) if error.raw_os_error() == Some(libc::EMFILE) => continue,
                Err(error) => return Err(error),
            };
            let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
            let announced: GuestStream = decode(bytes).map_err(|error| invalid(error.to_string()))?;
            let mut descriptors = descriptors.into_iter();
            return match (descriptors.next(), descriptors.next()) {
                (Some(stream), None) => Ok(Some((announced, UnixStream::from(stream)))),
                _ => {
                    Err(invalid(format!("stream to port {} announced without its one descriptor", announced.host_port)))
                }
            };
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

    /// Runs alone in its process (as under nextest): it takes all descriptors for a moment.
    #[tokio::test]
    async fn a_stream_for_which_there_is_no_descriptor_is_reset_and_the_next_one_comes() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let (ours, theirs) = packet::pair().unwrap();
        let (mut lost, far) = UnixStream::pair().unwrap();
        let (_kept, next_far) = UnixStream::pair().unwrap();
        let announce = |guest_port, far: UnixStream| {
            let said = GuestStream { host_port: 1, guest_port };
            packet::send(&theirs, &encode(&said).unwrap(), &[far.into()]).unwrap();
        };
        let streams = GuestStreams::new(ours).unwrap();
        announce(1, far);
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // Below every number that is free.
        setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
        let nothing = tokio::time::timeout(std::time::Duration::from_millis(1), streams.next()).await;
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert!(nothing.is_err(), "neither an error nor a stream");
        assert_eq!(lost.read(&mut [0]).unwrap(), 0, "reset");
        announce(2, next_far);
        assert_eq!(streams.next().await.unwrap().unwrap().0.guest_port, 2);
    }
}
