//! Port forwarding as containerd's CRI plugin does it: a thread of the host enters the pod's network namespace and dials 127.0.0.1 or
//! ::1. With runc a server of the pod listens there; with Caisson it listens in the guest.

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    os::fd::AsRawFd,
    path::PathBuf,
    thread,
};

use caisson_e2e::{
    Finished, Host, Pod, Runtime, Setup,
    host::Image,
    network::Netns,
    process::{self, Running},
    sizes, until,
    wait::STEP,
};
use rustix::process::Signal;
use sha2::{Digest, Sha256};

caisson_e2e::for_each_runtime!(both_ways in setup(), resets in setup(), many_at_once in setup(), nobody_else in setup());
caisson_e2e::caisson_only!(of_a_pod_without_a_network in setup(), nothing_stays_of_a_killed_shim in setup());

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

fn setup() -> Setup {
    Setup::default().image(Image::Probe).own_network()
}

/// Does something on a thread that enters the network namespace first.
fn inside<T: Send>(netns: PathBuf, work: impl FnOnce() -> T + Send) -> T {
    let entered = move || {
        let file = File::open(&netns).expect("the namespace is there");
        // SAFETY: the call takes numbers and changes nothing but this thread's network namespace.
        let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "{}: {}", netns.display(), io::Error::last_os_error());
        work()
    };
    thread::scope(|scope| scope.spawn(entered).join().expect("the thread ends"))
}

fn dial(address: IpAddr, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::new(address, port), STEP)?;
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    Ok(stream)
}

/// A client that says something and finishes; the answer.
fn ask(mut server: TcpStream, question: &[u8]) -> io::Result<Vec<u8>> {
    server.write_all(question)?;
    server.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).map(|_| answer)
}

/// What a client meets where nobody listens: it is refused. A client of the shim's is accepted by it before the guest is asked.
#[track_caller]
fn assert_nobody_listens(host: &Host, met: io::Result<TcpStream>) {
    match (met, host.runtime) {
        (Ok(mut server), Runtime::Caisson) => {
            let error = server.read(&mut [0]).expect_err("a reset, and not an end");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        (met, _) => assert_refused(met),
    }
}

#[track_caller]
fn assert_refused(met: io::Result<TcpStream>) {
    assert_eq!(met.expect_err("nobody listens").kind(), ErrorKind::ConnectionRefused);
}

fn start<'a>(host: &'a Host, netns: &Netns) -> Pod<'a> {
    let [flag, value] = netns.flags();
    host.container("pod").flag(flag).flag(value).start_idle()
}

/// Starts a server in the pod and waits until it listens at the port.
fn serve(pod: &Pod, port: u16, program: &str) -> Running {
    let script =
        format!("{program} & while ! netstat -ltn | grep -q ':{port} '; do sleep 0.1; done; echo listening; wait");
    let mut running = pod.exec_start(&format!("serve-{port}"), &["sh", "-c", &script]);
    running.close_stdin();
    running
        .stdout
        .wait_for(&format!("a server at port {port}"), STEP, |text| text.contains("listening\n").then_some(()));
    running
}

/// What the probe's end number `seed` of a connection sends.
fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

fn both_ways(host: &Host) {
    let netns = Netns::new(host, "pod");
    let pod = start(host, &netns);
    // Each connection has a cat of its own, which ends when its client has finished.
    let _echo = serve(&pod, 7000, "nc -ll -p 7000 -e cat");
    let sent = bytes(sizes::size(1 << 20, 256 << 20), 1);
    for address in [V4, V6] {
        let got = inside(netns.path(), || {
            let mut reading = dial(address, 7000).expect("somebody accepts");
            let mut writing = reading.try_clone().expect("a descriptor");
            thread::scope(|scope| {
                scope.spawn(|| {
                    writing.write_all(&sent).expect("it is taken");
                    writing.shutdown(Shutdown::Write).expect("it can be finished");
                });
                let mut got = Vec::new();
                reading.read_to_end(&mut got).map(|_| got)
            })
        });
        assert_eq!(Sha256::digest(got.expect("all comes back")), Sha256::digest(&sent), "{address}");
    }
    // A server that finishes first still hears its client.
    let server = pod.exec_start("serve-7001", &["probe", "net", "serve", "7001", "100000"]);
    server.stdout.wait_for("a server at port 7001", STEP, |text| text.contains("listening\n").then_some(()));
    inside(netns.path(), || {
        let mut server = dial(V4, 7001).expect("somebody accepts");
        let mut said = Vec::new();
        server.read_to_end(&mut said).expect("the server's end");
        assert!(said == bytes(100_000, 2));
        server.write_all(&bytes(100_000, 1)).expect("it is taken");
    });
    let words = Finished::of(server, STEP).succeeded();
    assert!(words.ends_with("exchanged 100000 with 127.0.0.1\n"), "{words}");
    pod.end();
    // No server, no listener of the shim's.
    inside(netns.path(), || {
        assert_refused(dial(V4, 7000));
        assert_refused(dial(V6, 7000));
    });
    host.expect_nothing_left();
}

fn resets(host: &Host) {
    let netns = Netns::new(host, "pod");
    let pod = start(host, &netns);
    inside(netns.path(), || {
        assert_nobody_listens(host, dial(V4, 9));
        assert_nobody_listens(host, dial(V6, 9));
    });
    // It says half an answer, and never reads: when it is killed, its client must not take that for the whole.
    let server = serve(&pod, 7000, "nc -ll -p 7000 -e sh -c 'echo half; exec sleep 100000'");
    let mut client = inside(netns.path(), || dial(V4, 7000)).expect("somebody accepts");
    client.write_all(b"question").expect("it is taken");
    client.shutdown(Shutdown::Write).expect("it can be finished");
    let mut half = [0; 5];
    client.read_exact(&mut half).expect("half an answer");
    assert_eq!(&half, b"half\n");
    pod.exec("kill", &["killall", "-9", "sleep"]).succeeded();
    assert_eq!(client.read(&mut half).expect_err("a reset, and not an end").kind(), ErrorKind::ConnectionReset);
    drop(server);
    // A client that resets ends what serves it: it reads an error.
    let _server = serve(&pod, 7001, "nc -ll -p 7001 -e sh -c 'cat > /dev/null; echo $? > /ended'");
    let client = inside(netns.path(), || dial(V6, 7001)).expect("somebody accepts");
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: the kernel reads one structure of this type.
    let set = unsafe {
        let size = size_of::<libc::linger>() as libc::socklen_t;
        libc::setsockopt(client.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size)
    };
    assert_eq!(set, 0);
    drop(client);
    let ended = until("the server to end", STEP, || {
        let text = pod.exec("ended", &["cat", "/ended"]).out();
        (!text.is_empty()).then_some(text)
    });
    assert_eq!(ended, "1\n", "cat met an error");
    pod.end();
}

fn many_at_once(host: &Host) {
    let netns = Netns::new(host, "pod");
    let pod = start(host, &netns);
    let _echo = serve(&pod, 7000, "nc -ll -p 7000 -e cat");
    let sent = bytes(sizes::size(20_000, 100_000), 1);
    inside(netns.path(), || {
        // All are open before the first is used; one after the other, because nc lets two wait and closes others.
        let clients: Vec<_> = (0..sizes::size(20, 100)).map(|_| served(7000)).collect();
        thread::scope(|scope| {
            let asking: Vec<_> = clients.into_iter().map(|client| scope.spawn(|| ask(client, &sent))).collect();
            for (number, one) in asking.into_iter().enumerate() {
                let got = one.join().expect("it ends").expect("all comes back");
                assert!(got == sent, "connection {number}: {} bytes of {} came back, or others", got.len(), sent.len());
            }
        });
    });
    pod.end();
}

/// A client that a cat has answered.
fn served(port: u16) -> TcpStream {
    let mut client = dial(V4, port).expect("somebody accepts");
    client.write_all(b"x").expect("it is taken");
    client.read_exact(&mut [0]).expect("it comes back");
    client
}

fn nobody_else(host: &Host) {
    let (netns, other) = (Netns::new(host, "pod"), Netns::new(host, "other"));
    let pod = start(host, &netns);
    let _echo = serve(&pod, 7000, "nc -ll -p 7000 -e cat");
    let answer = inside(netns.path(), || ask(dial(V4, 7000).expect("somebody accepts"), b"x"));
    assert_eq!(answer.expect("an answer"), b"x");
    // From the host's namespace, and from another pod's.
    for address in [V4, V6] {
        assert_refused(dial(address, 7000));
        inside(other.path(), || assert_refused(dial(address, 7000)));
    }
    pod.end();
}

/// The network namespace that the shim has made itself is that of the task's pid.
fn of_a_pod_without_a_network(host: &Host) {
    let pod = host.container("alone").start_idle();
    let _echo = serve(&pod, 7000, "nc -ll -p 7000 -e cat");
    let tasks = host.ctr_output(["task", "list"]).succeeded();
    let line = tasks.lines().find(|line| line.contains(&pod.id)).expect("the task is listed");
    let pid = line.split_whitespace().nth(1).expect("with its pid");
    let netns = PathBuf::from(format!("/proc/{pid}/ns/net"));
    for address in [V4, V6] {
        let answer = inside(netns.clone(), || ask(dial(address, 7000).expect("somebody accepts"), b"x"));
        assert_eq!(answer.expect("an answer"), b"x");
    }
    pod.end();
}

fn nothing_stays_of_a_killed_shim(host: &Host) {
    let netns = Netns::new(host, "pod");
    let pod = start(host, &netns);
    let _echo = serve(&pod, 7000, "nc -ll -p 7000 -e cat");
    let mut client = inside(netns.path(), || dial(V4, 7000)).expect("somebody accepts");
    client.write_all(b"x").expect("it is taken");
    client.read_exact(&mut [0]).expect("it comes back");
    let shims = host.running("containerd-shim-caisson-v2");
    let [shim] = &shims[..] else { panic!("one shim, not {shims:?}") };
    process::signal(shim.pid, Signal::KILL);
    assert_eq!(client.read(&mut [0]).expect_err("a reset, and not an end").kind(), ErrorKind::ConnectionReset);
    // It closes one descriptor after the other.
    until("the shim's end", STEP, || host.running("containerd-shim-caisson-v2").is_empty().then_some(()));
    inside(netns.path(), || {
        assert_refused(dial(V4, 7000));
        assert_refused(dial(V6, 7000));
    });
    pod.finish();
}
