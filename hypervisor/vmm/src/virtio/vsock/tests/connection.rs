//! The state machine of a stream against guests of every kind, without I/O.

use proptest::prelude::*;

use crate::virtio::vsock::{
    connection::{Connection, Received, Violation},
    packet::{Header, Op, Shutdown, TYPE_STREAM},
};

const WINDOW: u32 = 1000;

fn packet(op: Op) -> Header {
    Header { kind: TYPE_STREAM, op: op as u16, buf_alloc: 500, ..Header::default() }
}

fn data(len: u32) -> Header {
    Header { len, ..packet(Op::Data) }
}

/// The operations of the packets that are due.
fn due(connection: &mut Connection) -> Vec<Op> {
    std::iter::from_fn(|| connection.next_control()).map(|header| Op::from_number(header.op).unwrap()).collect()
}

fn open() -> Connection {
    let mut connection = Connection::from_guest(WINDOW, &packet(Op::Request));
    assert_eq!(due(&mut connection), [Op::Response]);
    connection
}

#[test]
fn a_host_stream_opens_by_request_and_response() {
    let mut connection = Connection::from_host(WINDOW);
    assert_eq!(connection.sendable(), 0);
    let request = connection.next_control().unwrap();
    assert_eq!((request.op, request.buf_alloc, request.kind), (Op::Request as u16, WINDOW, TYPE_STREAM));
    assert_eq!(connection.receive(&packet(Op::Response)), Ok(Received::Accepted));
    assert_eq!((connection.sendable(), due(&mut connection)), (500, vec![]));
}

#[test]
fn an_answer_before_the_question_is_a_violation() {
    let mut connection = Connection::from_host(WINDOW);
    assert_eq!(connection.receive(&packet(Op::Response)), Err(Violation::State(2)));
    assert_eq!(due(&mut connection), [Op::Reset]);
    assert!(connection.is_over());
}

#[test]
fn a_refused_or_late_request_ends() {
    let mut refused = Connection::from_host(WINDOW);
    due(&mut refused);
    assert_eq!(refused.receive(&packet(Op::Reset)), Ok(Received::Noted));
    assert!(refused.is_over() && !refused.owes_control(), "no RST for an RST");

    let mut late = Connection::from_host(WINDOW);
    due(&mut late);
    late.expire();
    assert_eq!(due(&mut late), [Op::Reset]);

    let mut unsent = Connection::from_host(WINDOW);
    unsent.expire();
    assert!(unsent.is_over(), "the guest never heard of it");

    let mut accepted = open();
    accepted.expire();
    assert_eq!(accepted.sendable(), 500);

    let mut finished = open();
    finished.host_finished();
    finished.host_read_closed();
    finished.expire();
    assert_eq!(due(&mut finished), [Op::Shutdown], "it was not sent before");
    assert!(finished.awaits_reset());
    finished.expire();
    assert_eq!(due(&mut finished), [Op::Reset]);
    assert!(finished.is_over());
}

#[test]
fn the_guest_may_fill_the_window_and_not_more() {
    let mut connection = open();
    assert_eq!(connection.receive(&data(WINDOW)), Ok(Received::Data(WINDOW)));
    assert_eq!(connection.buffered(), WINDOW);
    connection.delivered(100);
    connection.data_packet(1);
    assert_eq!(connection.receive(&data(100)), Ok(Received::Data(100)));
    connection.delivered(100);
    // There is room, but the guest cannot know of it.
    assert_eq!(connection.receive(&data(1)), Err(Violation::Credit { len: 1, credit: 0 }));
    assert_eq!(due(&mut connection), [Op::Reset]);
    assert!(!connection.is_over(), "what came before the violation is still delivered");
    connection.delivered(WINDOW);
    assert!(connection.is_over());
}

#[test]
fn credit_is_returned_by_halves_or_for_free() {
    let mut connection = open();
    connection.receive(&data(900)).unwrap();
    connection.delivered(499);
    assert_eq!(due(&mut connection), []);
    connection.delivered(1);
    let update = connection.next_control().unwrap();
    assert_eq!((update.op, update.fwd_cnt), (Op::CreditUpdate as u16, 500));
    connection.delivered(400);
    // This packet carries the news, so no other has to.
    assert_eq!(connection.data_packet(1).fwd_cnt, 900);
    connection.receive(&data(499)).unwrap();
    connection.delivered(499);
    assert_eq!(due(&mut connection), []);
    connection.receive(&packet(Op::CreditRequest)).unwrap();
    assert_eq!(due(&mut connection), [Op::CreditUpdate]);
}

#[test]
fn data_waits_for_the_guests_credit() {
    let mut connection = open();
    connection.data_packet(500);
    assert_eq!((connection.sendable(), due(&mut connection)), (0, vec![Op::CreditRequest]));
    let credit = |fwd_cnt, buf_alloc| Header { fwd_cnt, buf_alloc, ..packet(Op::CreditUpdate) };
    connection.receive(&credit(10, 500)).unwrap();
    assert_eq!(connection.sendable(), 10);
    connection.data_packet(10);
    assert_eq!(due(&mut connection), [], "asked already");
    connection.receive(&credit(510, 500)).unwrap();
    connection.data_packet(300);
    // An older packet that comes late takes nothing back: the guest will not repeat itself.
    connection.receive(&credit(10, 500)).unwrap();
    assert_eq!(connection.sendable(), 200);
    connection.data_packet(200);
    assert_eq!(due(&mut connection), [Op::CreditRequest]);
    // Nothing that was not sent can have been taken, and what was taken stays taken.
    connection.receive(&credit(1011, 500)).unwrap();
    connection.receive(&credit(509, 500)).unwrap();
    assert_eq!(connection.sendable(), 0);
    // A buffer that shrinks below what is on the way, and one as large as can be.
    connection.receive(&credit(510, 3)).unwrap();
    assert_eq!(connection.sendable(), 0);
    connection.receive(&credit(510, u32::MAX)).unwrap();
    assert_eq!(connection.sendable(), u32::MAX - 500);
}

#[test]
fn the_end_of_a_stream_comes_after_its_bytes() {
    let mut connection = open();
    connection.receive(&data(10)).unwrap();
    connection.receive(&Header { flags: 2, ..packet(Op::Shutdown) }).unwrap();
    assert!(!connection.guest_to_host_over());
    assert_eq!(connection.receive(&data(1)), Err(Violation::AfterEnd));
    connection.delivered(10);
    assert!(connection.guest_to_host_over());
}

#[test]
fn both_ends_over_is_acknowledged_by_a_reset() {
    let mut connection = open();
    connection.receive(&Header { flags: 1, ..packet(Op::Shutdown) }).unwrap();
    assert!(connection.host_to_guest_over());
    assert_eq!((due(&mut connection), connection.sendable()), (vec![], 0));
    connection.receive(&Header { flags: 0xffff_fffe, ..packet(Op::Shutdown) }).unwrap();
    assert_eq!(due(&mut connection), [Op::Reset]);
    assert!(connection.is_over());
}

#[test]
fn the_hosts_end_is_sent_once_and_grows() {
    let mut connection = open();
    connection.host_finished();
    let shutdown = connection.next_control().unwrap();
    assert_eq!((shutdown.op, shutdown.flags), (Op::Shutdown as u16, 2));
    connection.host_finished();
    assert!(!connection.owes_control());
    connection.host_read_closed();
    assert_eq!(connection.next_control().unwrap().flags, 3);
    assert_eq!(connection.receive(&data(5)), Ok(Received::Noted), "on its way before the guest knew");
    assert_eq!((connection.buffered(), connection.owes_control()), (0, false));
    connection.receive(&packet(Op::Reset)).unwrap();
    assert!(connection.is_over());
}

#[derive(Clone, Debug)]
enum Step {
    Packet(Header),
    Deliver(u32),
    Send(u32),
    Control,
    Finish,
    ReadClosed,
    Expire,
}

fn step() -> impl Strategy<Value = Step> {
    let small = || prop_oneof![0..=WINDOW + 10, any::<u32>()];
    let header = (prop_oneof![8 => 1..8u16, 1 => any::<u16>()], small(), 0..5u32, small(), small()).prop_map(
        |(op, len, flags, buf_alloc, fwd_cnt)| Header { op, len, flags, buf_alloc, fwd_cnt, ..Header::default() },
    );
    // A guest that behaves for a while reaches further.
    let sane = (prop_oneof![Just(Op::Data), Just(Op::CreditUpdate), Just(Op::Response)], 0..WINDOW / 2, 0..4000u32)
        .prop_map(|(op, len, fwd_cnt)| Header { op: op as u16, len, buf_alloc: WINDOW, fwd_cnt, ..Header::default() });
    prop_oneof![
        2 => header.prop_map(Step::Packet),
        6 => sane.prop_map(Step::Packet),
        4 => (0..WINDOW * 2).prop_map(Step::Deliver),
        3 => any::<u32>().prop_map(Step::Send),
        4 => Just(Step::Control),
        1 => Just(Step::Finish),
        1 => Just(Step::ReadClosed),
        1 => Just(Step::Expire),
    ]
}

/// What a guest can observe of a connection, and what it is entitled to.
#[derive(Default)]
struct Observer {
    guest_reset: bool,
    guest_finished: bool,
    was_reset: bool,
    reported_over: Shutdown,
    openings: u32,
    /// Totals, not modulo anything.
    received: u64,
    forwarded: u64,
    sent: u64,
    window: u64,
    believed_free: u64,
}

impl Observer {
    fn saw(&mut self, header: &Header) {
        assert!(!self.guest_reset, "a packet after the guest's RST: {header:?}");
        assert!(!self.was_reset, "a packet after our RST: {header:?}");
        let op = Op::from_number(header.op).unwrap();
        assert_eq!(header.buf_alloc, WINDOW);
        // fwd_cnt neither runs backwards nor claims more than came.
        let news = header.fwd_cnt.wrapping_sub(self.forwarded as u32);
        self.forwarded += u64::from(news);
        assert!(self.forwarded <= self.received, "{} of {} bytes forwarded", self.forwarded, self.received);
        match op {
            Op::Request | Op::Response => self.openings += 1,
            Op::Reset => self.was_reset = true,
            Op::Shutdown => {
                let now = Shutdown::from_flags(header.flags);
                assert!(
                    now != self.reported_over && now.union(self.reported_over) == now,
                    "{now:?} after {:?}",
                    self.reported_over
                );
                self.reported_over = now;
            }
            Op::Data => {
                assert!(!self.reported_over.send, "data after SHUTDOWN(send)");
                self.sent += u64::from(header.len);
            }
            Op::CreditUpdate | Op::CreditRequest => {}
        }
        assert!(self.openings == 1 || op == Op::Reset, "{op:?} before the stream was open");
    }
}

fn run(mut connection: Connection, mut observer: Observer, steps: &[Step]) {
    let (mut sent, mut peer_forwarded) = (0u64, 0u64);
    for step in steps {
        match step {
            Step::Packet(header) => {
                let open = !observer.guest_reset && !observer.was_reset;
                let result = connection.receive(header);
                let op = Op::from_number(header.op);
                if op == Some(Op::Reset) {
                    assert_eq!(result, Ok(Received::Noted));
                    observer.guest_reset = true;
                }
                if let Ok(Received::Data(len)) = result {
                    assert!(open && !observer.guest_finished && len == header.len);
                    observer.received += u64::from(len);
                } else if op == Some(Op::Data) && result.is_ok() {
                    // Dropped because nobody wants it; counted if the stream lives.
                    observer.received += u64::from(header.len);
                }
                if op == Some(Op::Shutdown) && result.is_ok() {
                    observer.guest_finished |= Shutdown::from_flags(header.flags).send;
                }
                if result.is_err() {
                    assert!(connection.owes_control() && connection.sendable() == 0, "a violation is answered by RST");
                }
                // What an honest reader of the credit fields believes.
                let advance = u64::from(header.fwd_cnt.wrapping_sub(peer_forwarded as u32));
                if advance <= sent - peer_forwarded {
                    peer_forwarded += advance;
                }
                observer.window = header.buf_alloc.into();
                observer.believed_free = observer.window.saturating_sub(sent - peer_forwarded);
            }
            Step::Deliver(bytes) => connection.delivered(*bytes),
            Step::Send(wish) => {
                let sendable = connection.sendable();
                assert!(u64::from(sendable) <= observer.believed_free, "{sendable} bytes without credit");
                let len = sendable.min(*wish);
                if len > 0 {
                    // Control packets go first, as in the device.
                    due_all(&mut connection, &mut observer);
                    if connection.sendable() >= len {
                        observer.saw(&connection.data_packet(len));
                        sent += u64::from(len);
                        observer.believed_free -= u64::from(len);
                    }
                }
            }
            Step::Control => due_all(&mut connection, &mut observer),
            Step::Finish => connection.host_finished(),
            Step::ReadClosed => connection.host_read_closed(),
            Step::Expire => connection.expire(),
        }
        assert!(connection.buffered() <= WINDOW, "more is kept than the window");
        assert_eq!(connection.owes_control(), connection.clone().next_control().is_some());
        if connection.is_over() {
            assert!(connection.is_gone() && !connection.owes_control() && connection.sendable() == 0);
        }
    }
    // However it stands: an RST, and delivery, end it.
    let _ = connection.receive(&packet(Op::Reset));
    connection.delivered(u32::MAX);
    assert!(connection.is_over());
}

fn due_all(connection: &mut Connection, observer: &mut Observer) {
    for count in 0.. {
        let Some(header) = connection.next_control() else { return };
        assert!(count < 4, "control packets without end");
        observer.saw(&header);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_order_of_packets_and_events_breaks_a_stream(
        from_host: bool,
        steps in proptest::collection::vec(step(), 0..60),
    ) {
        let observer = Observer::default();
        if from_host {
            run(Connection::from_host(WINDOW), observer, &steps);
        } else {
            let request = packet(Op::Request);
            let observer = Observer { window: 500, believed_free: 500, ..observer };
            run(Connection::from_guest(WINDOW, &request), observer, &steps);
        }
    }
}
