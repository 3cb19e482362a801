//! Streams between host and guest, hundreds at a time, both ways.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
};

use caisson_protos::monitor::ExitReason;
use caisson_vm_tests::{
    environment::LIMIT,
    linux::{Guest, scenario},
    monitor::read_until,
    streams::dial,
};
use caisson_vmm_client::{GuestStreams, Vsock, packet};

const GUEST_ECHO_PORT: u32 = 5000;
const HOST_ECHO_PORT: u32 = 6000;
/// As in the guest's scenarios.
const HOST_SINK_PORT: u32 = 6002;
const WINDOW: usize = 256 << 10;
const STREAMS: usize = 200;
const LARGE: usize = 4 << 20;

struct Host {
    _folder: tempfile::TempDir,
    socket: PathBuf,
}

fn with_vsock() -> (Guest, Host) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vsock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (ours, theirs) = packet::pair().unwrap();
    let (mut machine, console) = scenario("vsock");
    machine.vcpus = 2;
    machine.memory.size = 256 << 20;
    machine.vsock = Some(Vsock { guest_cid: 3, listener: listener.into(), guest_streams: theirs });
    std::thread::spawn(move || serve_guest_streams(ours));
    (Guest::start((machine, console)), Host { _folder: folder, socket })
}

/// Echoes every stream to the echo port, refuses all others.
fn serve_guest_streams(socket: std::os::fd::OwnedFd) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let streams = GuestStreams::new(socket).unwrap();
        while let Some((announced, stream)) = streams.next().await.unwrap() {
            if announced.host_port == HOST_ECHO_PORT {
                stream.set_nonblocking(false).unwrap();
                std::thread::spawn(move || echo(stream));
            }
        }
    });
}

fn echo(mut stream: UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => return stream.shutdown(std::net::Shutdown::Write).unwrap(),
            n => stream.write_all(&buffer[..n]).unwrap(),
        }
    }
}

#[test]
fn hundreds_of_streams_both_ways() {
    let (mut guest, host) = with_vsock();
    read_until(&mut guest.console, "the guest's streams", |text| {
        assert!(!text.contains("guest: failed"), "{text}");
        text.contains("guest: streams to the host done")
    });
    assert!(dial(&host.socket, GUEST_ECHO_PORT + 1).is_none(), "a port without a listener refuses");
    let mut streams: Vec<UnixStream> =
        (0..STREAMS).map(|_| dial(&host.socket, GUEST_ECHO_PORT).expect("the guest accepts")).collect();
    assert!(guest.monitor.stats().vsock_streams >= STREAMS as u32);
    for (n, stream) in streams.iter_mut().enumerate() {
        write!(stream, "host stream {n}").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    for (n, stream) in streams.iter_mut().enumerate() {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("host stream {n}"));
    }
    drop(streams);
    let mut large = dial(&host.socket, GUEST_ECHO_PORT).expect("the guest accepts");
    let data: Vec<u8> = (0..LARGE).map(|n| (n % 241) as u8).collect();
    let (mut writer, sent) = (large.try_clone().unwrap(), data.clone());
    let thread = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    large.read_to_end(&mut back).unwrap();
    thread.join().unwrap();
    assert!(back == data, "{} of {LARGE} bytes came back, or changed", back.len());
    // The guest waits for this stream's end before it powers off.
    drop(dial(&host.socket, GUEST_ECHO_PORT).expect("the guest accepts"));
    let said = guest.verdict();
    assert!(said.contains("guest: passed"), "{said}");
    let (notice, log) = guest.monitor.exit_notice_and_log();
    assert_eq!(notice.reason, ExitReason::PoweredOff);
    assert!(log.contains("guest_faults=0"), "{log}");
}

#[test]
fn what_the_guest_wrote_before_it_powered_off_is_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("vsock")).unwrap();
    let (ours, theirs) = packet::pair().unwrap();
    let (mut machine, console) = scenario("last-words");
    machine.vsock = Some(Vsock { guest_cid: 3, listener: listener.into(), guest_streams: theirs });
    let mut guest = Guest::start((machine, console));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (announced, mut stream) = runtime.block_on(async {
        let streams = GuestStreams::new(ours).unwrap();
        tokio::time::timeout(LIMIT, streams.next()).await.unwrap().unwrap().expect("a stream of the guest")
    });
    assert_eq!(announced.host_port, HOST_SINK_PORT);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    // Only now, when the guest says nothing more, somebody reads: a socket holds less than what it has written.
    let said = guest.verdict();
    assert!(said.contains("guest: passed"), "{said}");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), WINDOW);
    assert_eq!(guest.monitor.exit_reason(), ExitReason::PoweredOff);
}
