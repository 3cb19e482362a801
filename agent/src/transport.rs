//! Where connections come from: vsock in a guest, Unix sockets in tests.

use std::{future::Future, io};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

/// A connection of any kind.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> ByteStream for T {}

/// Something that yields connections from the host, each with its port on the host's side.
pub trait Accept: Send + 'static {
    /// Waits for the next connection.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Box<dyn ByteStream>, u32)>> + Send;
}

/// One vsock port of the guest that only the host may use.
pub struct HostOnly(VsockListener);

impl HostOnly {
    /// Listens on `port`.
    ///
    /// # Errors
    /// If the guest has no vsock, or the port is taken.
    pub fn listen(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self)
    }
}

impl Accept for HostOnly {
    async fn accept(&mut self) -> io::Result<(Box<dyn ByteStream>, u32)> {
        loop {
            let (stream, peer) = self.0.accept().await?;
            // A container can open vsock connections too; to the guest's own id they come from that id, not from the
            // host's.
            if peer.cid() == VMADDR_CID_HOST {
                return Ok((Box::new(stream), peer.port()));
            }
        }
    }
}

/// Connects to a port of the host.
///
/// # Errors
/// If nothing listens there.
pub async fn connect_host(port: u32) -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await
}
