use std::io::{Read, Write};

use super::{
    packet::{Op, Shutdown},
    streams::FIRST_HOST_PORT,
    testing::Guest,
};

const SEND: Shutdown = Shutdown { receive: false, send: true };
const RECEIVE: Shutdown = Shutdown { receive: true, send: false };

#[test]
fn a_host_client_talks_with_the_guest() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.open(1024);
    assert_eq!(ports.host, FIRST_HOST_PORT);
    client.write_all(b"hello guest").unwrap();
    guest.run_until("the host's words", |guest| guest.socket(ports).inbox.len() == 11);
    assert_eq!(guest.read(ports, 100), b"hello guest");
    guest.write(ports, b"hello host\n");
    assert_eq!(guest.read_line(&mut client), "hello host\n");
}

#[test]
fn a_guest_talks_with_the_parent() {
    let mut guest = Guest::new();
    let ports = guest.connect(77);
    assert!(guest.socket(ports).established, "answered in the call that brought the REQUEST");
    let (stream, mut socket) = guest.announced();
    assert_eq!((stream.host_port, stream.guest_port), (77, ports.guest));
    guest.write(ports, b"ready\n");
    let mut line = [0; 6];
    socket.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"ready\n");
    socket.write_all(b"go on").unwrap();
    guest.run_until("the parent's words", |guest| guest.socket(ports).inbox.len() == 5);
    assert_eq!(guest.read(ports, 100), b"go on");
}
