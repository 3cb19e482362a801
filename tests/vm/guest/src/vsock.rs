//! Streams between guest and host, both ways. The host side is in `tests/vsock.rs`.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// Where this guest echoes what it gets.
const ECHO_PORT: u32 = 5000;
/// Where the host does.
const HOST_ECHO_PORT: u32 = 6000;
/// Where the host reads late.
const HOST_SINK_PORT: u32 = 6002;
/// Bytes that the monitor takes from a stream whose other end reads nothing.
const WINDOW: usize = 256 << 10;
/// Nobody listens here.
const NOBODY_PORT: u32 = 6001;
/// Streams that this guest opens at the same time.
const STREAMS: usize = 200;
/// How many the host opens, beside one for the large transfer and one that ends the scenario.
const EXPECTED: usize = 200;
/// Bytes of the large transfer, each way.
const LARGE: usize = 4 << 20;

const HOST: u32 = 2;

/// Everything, in the order that the host expects.
pub fn both_ways() {
    let listener = listen(ECHO_PORT);
    println!("guest: listening");
    guest_to_host();
    println!("guest: streams to the host done");
    host_to_guest(&listener);
}

/// Writes as much as the monitor takes without a reader, and says no more: the machine powers off at once.
pub fn last_words() {
    let mut stream = connect(HOST, HOST_SINK_PORT).expect("connecting to the host");
    stream.write_all(&vec![0x5a; WINDOW]).expect("writing to the host");
    // Stays open: an orderly end would be waited for.
    std::mem::forget(stream);
}

fn guest_to_host() {
    // The host learns of a stream when it exists, and refuses it by closing it.
    let refused = connect(HOST, NOBODY_PORT).and_then(|mut stream| stream.read(&mut [0]));
    assert!(!matches!(refused, Ok(1..)), "a port that nobody serves has answered");
    let mut streams: Vec<File> =
        (0..STREAMS).map(|_| connect(HOST, HOST_ECHO_PORT).expect("connecting to the host")).collect();
    for (n, stream) in streams.iter_mut().enumerate() {
        stream.write_all(format!("stream {n}").as_bytes()).expect("writing to the host");
        shutdown_write(stream);
    }
    for (n, stream) in streams.iter_mut().enumerate() {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("reading from the host");
        assert_eq!(answer, format!("stream {n}"));
    }
    // Much more than all buffers hold, while nobody reads at first.
    let mut stream = connect(HOST, HOST_ECHO_PORT).expect("connecting to the host");
    let data: Vec<u8> = (0..LARGE).map(|n| (n % 253) as u8).collect();
    let mut writer = stream.try_clone().expect("a second descriptor");
    let sent = data.clone();
    let thread = std::thread::spawn(move || {
        writer.write_all(&sent).expect("writing to the host");
        shutdown_write(&writer);
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("reading from the host");
    thread.join().expect("the writer");
    assert!(back == data, "{} bytes came back changed ({} of them)", data.len(), back.len());
}

fn host_to_guest(listener: &OwnedFd) {
    let threads: Vec<_> = (0..=EXPECTED)
        .map(|_| {
            let mut stream = accept(listener);
            std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    let mut buffer = vec![0; 32 << 10];
                    loop {
                        let n = stream.read(&mut buffer).expect("reading from the host");
                        if n == 0 {
                            return shutdown_write(&stream);
                        }
                        stream.write_all(&buffer[..n]).expect("writing to the host");
                    }
                })
                .expect("a thread")
        })
        .collect();
    for thread in threads {
        thread.join().expect("an echo");
    }
    // What was written last may still be on its way, and a guest that powers off loses it: the host says when it has all.
    let mut end = accept(listener);
    assert_eq!(end.read(&mut [0]).expect("reading from the host"), 0, "the last stream has no content");
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> OwnedFd {
    // SAFETY: a new descriptor that nobody else owns, checked.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
        assert!(fd >= 0, "AF_VSOCK: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn connect(cid: u32, port: u32) -> io::Result<File> {
    let (socket, address) = (socket(), address(cid, port));
    // SAFETY: the address has this length and outlives the call.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) } {
        0 => Ok(socket.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A socket on which streams of the host arrive.
pub fn listen(port: u32) -> OwnedFd {
    let (socket, address) = (socket(), address(libc::VMADDR_CID_ANY, port));
    // SAFETY: the address has this length and outlives the call.
    unsafe {
        assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN), 0, "bind");
        assert_eq!(libc::listen(socket.as_raw_fd(), 512), 0, "listen");
    }
    socket
}

/// Waits for the next stream.
pub fn accept(listener: &OwnedFd) -> File {
    // SAFETY: no address wanted; a new descriptor, checked.
    unsafe {
        let fd = libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut());
        assert!(fd >= 0, "accept: {}", io::Error::last_os_error());
        File::from_raw_fd(fd)
    }
}

fn shutdown_write(stream: &File) {
    // SAFETY: takes no pointer.
    let result = unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) };
    assert_eq!(result, 0, "shutdown: {}", io::Error::last_os_error());
}
