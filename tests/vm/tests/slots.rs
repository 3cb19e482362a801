//! Network devices that come to a running machine, and go.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    thread,
};

use caisson_protos::{
    guest::Slot,
    monitor::{ExitReason, MAX_DESCRIPTORS, RateLimit, Reply, Request},
};
use caisson_vm_tests::{
    environment::LIMIT,
    guests, kernel,
    linux::{Guest, scenario},
    monitor::{Monitor, machine, read_until},
    streams::dial,
    tap,
};
use caisson_vmm_client::{Machine, Network, Vsock, packet};

/// As in the guest's scenario.
const COMMAND_PORT: u32 = 5001;
const ECHO_PORT: u16 = 4000;
/// The first slot of a network device: entropy and vsock come before.
const FIRST: u8 = 2;
const MIB: usize = 1 << 20;

fn host(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, n, 1)
}

fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, n, 2)
}

fn mac(n: u8) -> String {
    format!("02:00:00:00:00:{n:02x}")
}

/// A device on a tap of its own, `tap` n, with the MAC number n.
fn network(n: u8) -> Network {
    Network {
        taps: tap::create(&format!("tap{n}"), 1, 1500, host(n)),
        mac: [2, 0, 0, 0, 0, n],
        mtu: 1500,
        send_limit: RateLimit::default(),
        receive_limit: RateLimit::default(),
        sources: None,
    }
}

fn attach(monitor: &mut Monitor, network: Network) -> Result<Slot, String> {
    let (config, descriptors) = network.into_packet().unwrap();
    match monitor.call_with(Request::AttachNetwork(Box::new(config)), &descriptors)? {
        Reply::Attached { slot } => Ok(slot),
        other => panic!("{other:?}"),
    }
}

fn detach(monitor: &mut Monitor, slot: Slot) -> Result<(), String> {
    monitor.call(Request::DetachNetwork { slot }).map(|reply| assert_eq!(reply, Reply::Done))
}

/// A Linux guest that does what it is told.
struct Obedient {
    guest: Guest,
    stream: BufReader<UnixStream>,
    _folder: tempfile::TempDir,
}

impl Obedient {
    /// In a network namespace of the test's own.
    fn start(empty_slots: u8, networks: impl FnOnce() -> Vec<Network>) -> Self {
        tap::enter_namespace();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vsock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (_ours, theirs) = packet::pair().unwrap();
        let (mut machine, console) = scenario("slots");
        machine.vcpus = 2;
        machine.memory.size = 256 << 20;
        machine.vsock = Some(Vsock { guest_cid: 3, listener: listener.into(), guest_streams: theirs });
        machine.networks = networks();
        machine.empty_network_slots = empty_slots;
        let mut guest = Guest::start((machine, console));
        read_until(&mut guest.console, "the guest's listener", |text| {
            assert!(!text.contains("guest: failed"), "{text}");
            text.contains("guest: listening")
        });
        let stream = dial(&socket, COMMAND_PORT).expect("the guest accepts");
        Self { guest, stream: BufReader::new(stream), _folder: folder }
    }

    /// The guest's answer to a command.
    fn ask(&mut self, command: &str) -> Result<String, String> {
        writeln!(self.stream.get_mut(), "{command}").unwrap();
        let mut answer = String::new();
        self.stream.read_line(&mut answer).unwrap_or_else(|error| panic!("no answer to {command:?}: {error}"));
        let answer = answer.trim_end();
        match answer.split_once(' ').unwrap_or((answer, "")) {
            ("ok", rest) => Ok(rest.to_owned()),
            ("error", rest) => Err(rest.to_owned()),
            _ => panic!("{command:?}: {answer:?}"),
        }
    }

    fn attach(&mut self, n: u8) -> Result<Slot, String> {
        attach(&mut self.guest.monitor, network(n))
    }

    fn detach(&mut self, slot: Slot) -> Result<(), String> {
        detach(&mut self.guest.monitor, slot)
    }

    fn bind(&mut self, slots: &[Slot]) {
        let numbers: Vec<String> = slots.iter().map(|Slot(number)| number.to_string()).collect();
        self.ask(&format!("bind {}", numbers.join(" "))).unwrap();
    }

    /// Card number n has its address and a link.
    fn bring_up(&mut self, n: u8) {
        self.ask(&format!("card {} {}", mac(n), address(n))).unwrap();
        self.ask(&format!("link {} 1", mac(n))).unwrap();
    }

    fn cards(&mut self) -> String {
        self.ask("cards").unwrap()
    }

    /// Ends it; nothing that it did was wrong.
    fn end(mut self) {
        let stats = self.guest.monitor.stats();
        assert_eq!(stats.guest_faults, 0, "{stats:?}");
        self.stream.get_ref().shutdown(std::net::Shutdown::Both).unwrap();
        let said = self.guest.verdict();
        assert!(said.contains("guest: passed"), "the guest said:\n{said}");
        assert_eq!(self.guest.monitor.exit_reason(), ExitReason::PoweredOff);
    }
}

/// Sends bytes through card number n and gets them back.
fn echo(n: u8, len: usize) {
    let mut stream = TcpStream::connect((address(n), ECHO_PORT)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let sent: Vec<u8> = (0..len).map(|at| ((at + usize::from(n)) % 251) as u8).collect();
    let (mut writer, copy) = (stream.try_clone().unwrap(), sent.clone());
    let sender = thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    sender.join().unwrap();
    assert!(received == sent, "{len} bytes came back changed");
}

#[test]
fn a_card_comes_to_a_running_machine_goes_and_makes_room_for_another() {
    let mut machine = Obedient::start(1, Vec::new);
    let slot = Slot(FIRST);
    assert_eq!(machine.cards(), "");
    let error = machine.ask(&format!("bind {FIRST}")).unwrap_err();
    assert_eq!(error, format!("slot {FIRST} is empty: attach a device before its driver is bound"));
    let error = machine.ask(&format!("bind {}", FIRST + 1)).unwrap_err();
    assert!(error.contains(&format!("slot {}: this machine has no such slot", FIRST + 1)), "{error}");
    assert!(machine.detach(slot).unwrap_err().contains("the machine has none"));

    for n in [1, 2] {
        assert_eq!(machine.attach(n), Ok(slot));
        let error = machine.attach(9).unwrap_err();
        assert!(error.contains("no empty slot for the network device 02:00:00:00:00:09"), "{error}");
        assert_eq!(machine.cards(), "", "nobody looks for it");
        machine.bind(&[slot]);
        machine.bind(&[slot]);
        assert_eq!(machine.cards(), mac(n));
        machine.bring_up(n);
        echo(n, MIB);
        let stats = machine.guest.monitor.stats();
        assert_eq!((stats.networks_attached, stats.networks_detached), (n.into(), u64::from(n) - 1));
        assert!(stats.networks[&slot].received_bytes > MIB as u64, "{stats:?}");

        machine.ask(&format!("unbind {FIRST}")).unwrap();
        assert_eq!(machine.cards(), "");
        machine.detach(slot).unwrap();
        let after = machine.guest.monitor.stats();
        assert!(after.networks.is_empty() && after.interrupts >= stats.interrupts, "{after:?}");
        machine.ask(&format!("unbind {FIRST}")).unwrap();
        assert!(machine.ask(&format!("bind {FIRST}")).unwrap_err().contains("is empty"));
    }
    machine.end();
}

#[test]
fn eight_cards_of_which_one_goes_while_packets_flow() {
    let mut machine = Obedient::start(7, || vec![network(1)]);
    let slots: Vec<Slot> = (0..8).map(|n| Slot(FIRST + n)).collect();
    for n in 2..=8 {
        assert_eq!(machine.attach(n), Ok(slots[usize::from(n) - 1]));
    }
    let error = machine.attach(9).unwrap_err();
    assert!(error.contains("the machine has 8 for network devices") && error.contains("02:00:00:00:00:09"), "{error}");
    // The first one was there from the start.
    machine.bind(&slots);
    assert_eq!(machine.cards(), (1..=8).map(mac).collect::<Vec<_>>().join(" "));
    for n in 1..=8 {
        machine.bring_up(n);
    }
    let echoes: Vec<_> = (1..=8).map(|n| thread::spawn(move || echo(n, MIB / 4))).collect();
    echoes.into_iter().for_each(|echo| echo.join().unwrap());

    // Somebody sends without end through the fourth card, until that is gone.
    let mut stream = TcpStream::connect((address(4), ECHO_PORT)).unwrap();
    let mut reader = stream.try_clone().unwrap();
    let sender = thread::spawn(move || while stream.write_all(&[4; 64 << 10]).is_ok() {});
    reader.read_exact(&mut vec![0; MIB]).unwrap();
    machine.ask(&format!("unbind {}", FIRST + 3)).unwrap();
    machine.detach(slots[3]).unwrap();
    let error = machine.detach(slots[3]).unwrap_err();
    assert!(error.contains("slot 5: no network device in it: use 2, 3, 4, 6"), "{error}");
    reader
        .shutdown(std::net::Shutdown::Both)
        .or_else(|error| match error.kind() {
            ErrorKind::NotConnected => Ok(()),
            _ => Err(error),
        })
        .unwrap();
    sender.join().unwrap();
    assert!(tap::exists("tap3") && !tap::exists("tap4"), "it went with the last of its descriptors");
    let echoes: Vec<_> = [1, 2, 3, 5, 6, 7, 8].into_iter().map(|n| thread::spawn(move || echo(n, MIB / 4))).collect();
    echoes.into_iter().for_each(|echo| echo.join().unwrap());

    // The one that was there from the start can go as well.
    machine.ask(&format!("unbind {FIRST}")).unwrap();
    machine.detach(slots[0]).unwrap();
    assert_eq!(machine.attach(11), Ok(slots[0]));
    assert_eq!(machine.attach(14), Ok(slots[3]));
    machine.bind(&[slots[3], slots[0]]);
    for n in [11, 14] {
        machine.bring_up(n);
        echo(n, MIB / 4);
    }
    machine.end();
}

#[test]
fn the_guest_sees_whether_there_is_a_link() {
    let mut machine = Obedient::start(0, || vec![network(1)]);
    let slot = Slot(FIRST);
    let link = |machine: &mut Obedient, up: bool| {
        assert_eq!(machine.guest.monitor.call(Request::SetLink { slot, up }), Ok(Reply::Done));
        machine.ask(&format!("link {} {}", mac(1), u8::from(up))).unwrap();
    };
    machine.bring_up(1);
    let before = machine.guest.monitor.stats();
    for up in [false, true, false, true] {
        link(&mut machine, up);
    }
    echo(1, MIB);
    assert!(machine.guest.monitor.stats().interrupts >= before.interrupts + 4);
    for wrong in [Slot(0), Slot(FIRST + 1), Slot(255)] {
        let error = machine.guest.monitor.call(Request::SetLink { slot: wrong, up: true }).unwrap_err();
        assert!(error.contains(&format!("{wrong}: no network device in it: use {FIRST}")), "{error}");
    }
    assert!(machine.detach(Slot(0)).unwrap_err().contains("slot 0"), "the entropy device stays");
    machine.end();
}

/// The guest is not asked: its driver finds itself without a device, and can still be unbound.
#[test]
fn a_card_that_is_pulled_out_harms_nobody() {
    let mut machine = Obedient::start(2, || vec![network(1)]);
    machine.bring_up(1);
    let mut stream = TcpStream::connect((address(1), ECHO_PORT)).unwrap();
    let mut reader = stream.try_clone().unwrap();
    let sender = thread::spawn(move || while stream.write_all(&[1; 64 << 10]).is_ok() {});
    reader.read_exact(&mut vec![0; MIB]).unwrap();
    machine.detach(Slot(FIRST)).unwrap();
    let _ = reader.shutdown(std::net::Shutdown::Both);
    sender.join().unwrap();
    // It is in use as far as the guest knows.
    assert_eq!(machine.cards(), mac(1));
    assert_eq!(machine.attach(2), Ok(Slot(FIRST)));
    machine.detach(Slot(FIRST)).unwrap();
    machine.ask(&format!("unbind {FIRST}")).unwrap();
    assert_eq!(machine.cards(), "");
    assert_eq!(machine.attach(3), Ok(Slot(FIRST)));
    machine.bind(&[Slot(FIRST)]);
    machine.bring_up(3);
    echo(3, MIB);
    machine.end();
}

fn flat(code: &[u8]) -> Machine {
    machine(kernel::descriptor(&kernel::flat(code)))
}

fn open_descriptors(monitor: &Monitor) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", monitor.pid())).unwrap().count()
}

#[test]
fn devices_come_and_go_while_the_guest_writes_to_all_registers() {
    tap::enter_namespace();
    let mut machine = flat(guests::scribble_registers_for_ever());
    (machine.vcpus, machine.empty_network_slots) = (1, 8);
    let mut monitor = Monitor::spawn();
    monitor.start(machine);
    monitor.wait_for_stats("register writes", |stats| stats.guest_faults > 0);
    let before = open_descriptors(&monitor);
    for round in 0..10 {
        let slots: Vec<Slot> = (0..8).map(|n| attach(&mut monitor, network(n)).unwrap()).collect();
        assert_eq!(slots, (1..9).map(Slot).collect::<Vec<_>>(), "round {round}");
        for slot in &slots {
            monitor.call(Request::SetLink { slot: *slot, up: round % 2 == 0 }).unwrap();
        }
        let faults = monitor.stats().guest_faults;
        monitor.wait_for_stats("more of them", |stats| stats.guest_faults > faults);
        for slot in slots {
            detach(&mut monitor, slot).unwrap();
        }
    }
    assert_eq!(open_descriptors(&monitor), before, "nothing is left of any of them");
    let stats = monitor.stats();
    assert_eq!((stats.networks_attached, stats.networks_detached, stats.networks.len()), (80, 80, 0));
    assert!(monitor.call(Request::Shutdown).is_ok());
    let (notice, log) = monitor.exit_notice_and_log();
    assert_eq!(notice.reason, ExitReason::Requested);
    assert!(!log.contains("cannot disconnect"), "{log}");
}

#[test]
fn a_device_that_cannot_be_attached_leaves_the_machine_as_it_was() {
    tap::enter_namespace();
    let mut monitor = Monitor::spawn();
    let error = attach(&mut monitor, network(1)).unwrap_err();
    assert!(error.contains("not configured"), "{error}");
    let mut machine = flat(guests::spin());
    machine.empty_network_slots = 1;
    monitor.configure(machine).unwrap();
    let before = open_descriptors(&monitor);
    let null = || kernel::descriptor(b"");
    let wrong = |change: &dyn Fn(&mut Network)| {
        let mut network = Network { taps: vec![null()], ..network(1) };
        change(&mut network);
        network
    };
    for (network, words) in [
        (wrong(&|_| {}), "network of slot 1: the descriptor is not an attached queue of a tap"),
        (wrong(&|network| network.taps.clear()), "network of slot 1: 0 queues"),
        (wrong(&|network| network.mtu = 67), "network of slot 1: MTU 67"),
        (wrong(&|network| network.taps = (0..MAX_DESCRIPTORS).map(|_| null()).collect()), "64 queues of a tap"),
    ] {
        let error = attach(&mut monitor, network).unwrap_err();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
        assert_eq!(open_descriptors(&monitor), before, "after {error:?}");
    }
    let (config, mut descriptors) = network(1).into_packet().unwrap();
    descriptors.push(null());
    let error = monitor.call_with(Request::AttachNetwork(Box::new(config)), &descriptors).unwrap_err();
    assert!(error.contains("1 descriptors of the packet unused"), "{error}");
    drop(descriptors);
    assert_eq!(open_descriptors(&monitor), before);
    // Before the start, and while it is paused.
    assert_eq!(attach(&mut monitor, network(2)), Ok(Slot(1)));
    monitor.call(Request::Start).unwrap();
    monitor.call(Request::Pause).unwrap();
    detach(&mut monitor, Slot(1)).unwrap();
    assert_eq!(attach(&mut monitor, network(3)), Ok(Slot(1)));
    monitor.call(Request::Resume).unwrap();
    detach(&mut monitor, Slot(1)).unwrap();
    assert_eq!(open_descriptors(&monitor), before);
    monitor.call(Request::Shutdown).unwrap();
    assert_eq!(monitor.exit_reason(), ExitReason::Requested);
}

/// A guest's kernel looks at each slot once at boot, and finds that out from memory.
#[test]
fn empty_slots_cost_no_exit_at_boot() {
    let exits = |empty_network_slots: u8| {
        let (mut machine, console) = scenario("describe");
        machine.empty_network_slots = empty_network_slots;
        let mut guest = Guest::start((machine, console));
        let said = guest.verdict();
        assert!(said.contains("guest: passed"), "{said}");
        let (_, log) = guest.monitor.exit_notice_and_log();
        let exits = log.split("vcpu_exits=").nth(1).and_then(|rest| rest.split_whitespace().next());
        exits.expect("exits in the log").parse::<u64>().unwrap()
    };
    let (without, with) = (exits(0), exits(8));
    eprintln!("exits of a guest without empty slots {without}, with 8 of them {with}");
    // A register that is read costs none, and none is written. The rest is output, which is the same, and timers.
    assert!(with < without + 8, "{without} exits without empty slots, {with} with 8 of them");
}
