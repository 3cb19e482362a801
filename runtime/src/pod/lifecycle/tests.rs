use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Step {
    Prepared,
    BeginStart,
    Started,
    StartFailed,
    Exited(u32),
    BeginDelete,
    DeleteFailed,
    BeginPause,
    Paused,
    PauseFailed,
    BeginResume,
    Resumed,
    ResumeFailed,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Prepared),
        Just(Step::BeginStart),
        Just(Step::Started),
        Just(Step::StartFailed),
        (0u32..256).prop_map(Step::Exited),
        Just(Step::BeginDelete),
        Just(Step::DeleteFailed),
        Just(Step::BeginPause),
        Just(Step::Paused),
        Just(Step::PauseFailed),
        Just(Step::BeginResume),
        Just(Step::Resumed),
        Just(Step::ResumeFailed),
    ]
}

fn exit(status: u32) -> Exit {
    Exit { status, at: SystemTime::UNIX_EPOCH }
}

proptest! {
    /// Whatever order answers and requests come in: the exit is published at most once and never before the start,
    /// a process that once stopped stays stopped, and its exit never changes. Pauses and resumes are published in turn, and only
    /// of a process that runs.
    #[test]
    fn news_is_reported_once_and_in_order(is_init: bool, steps in proptest::collection::vec(step(), 0..32)) {
        let mut process = Process::new(is_init);
        let (mut asked, mut reported_start, mut reported_exit) = (false, false, None::<Exit>);
        let mut reported_paused = false;
        for step in steps {
            let before = process.status();
            let exit_event = match step {
                Step::Prepared => { process.prepared(); None }
                Step::BeginStart => { asked |= process.begin_start().is_ok(); None }
                Step::Started if asked && !reported_start && before == Status::Running => {
                    reported_start = true;
                    process.started()
                }
                Step::Started => None,
                Step::StartFailed if asked && !reported_start => process.start_failed(exit(127)),
                Step::StartFailed => None,
                Step::Exited(status) => process.exited(exit(status)),
                Step::BeginDelete => { let _ = process.begin_delete(); None }
                Step::DeleteFailed => { process.delete_failed(SystemTime::UNIX_EPOCH); None }
                Step::BeginPause => {
                    prop_assert_eq!(process.begin_pause().is_ok(), before == Status::Running && reported_start);
                    None
                }
                Step::Paused => {
                    if process.paused().is_ok() {
                        prop_assert!(before == Status::Pausing && !reported_paused);
                        reported_paused = true;
                    }
                    None
                }
                Step::PauseFailed => { process.pause_failed(); None }
                Step::BeginResume => { let _ = process.begin_resume(); None }
                Step::Resumed => {
                    if process.resumed().is_ok() {
                        prop_assert!(before == Status::Paused && reported_paused);
                        reported_paused = false;
                    }
                    None
                }
                Step::ResumeFailed => { process.resume_failed(); None }
            };
            if let Some(exit) = exit_event {
                prop_assert_eq!(reported_exit, None, "published twice");
                prop_assert!(reported_start || !matches!(step, Step::Exited(_)) || before == Status::Created,
                    "exit before start");
                prop_assert_eq!(process.exit(), Some(exit));
                reported_exit = Some(exit);
            }
            if before == Status::Stopped {
                prop_assert_eq!(process.status(), Status::Stopped);
            }
            if process.status() != Status::Stopped {
                prop_assert_eq!(process.status() == Status::Paused, reported_paused);
            }
            if let Some(exit) = reported_exit {
                prop_assert_eq!(process.exit(), Some(exit));
                prop_assert!(process.check_kill().is_err() && process.begin_start().is_err());
                prop_assert!(process.begin_pause().is_err() && process.begin_resume().is_err());
            }
        }
    }
}

fn created(is_init: bool) -> Process {
    let mut process = Process::new(is_init);
    process.prepared();
    process
}

#[test]
fn an_exit_before_the_start_answer_is_reported_after_it() {
    let mut process = created(true);
    process.begin_start().unwrap();
    assert_eq!(process.exited(exit(3)), None);
    assert_eq!(process.status(), Status::Running);
    assert_eq!(process.started(), Some(exit(3)));
    assert_eq!((process.status(), process.exit()), (Status::Stopped, Some(exit(3))));
}

#[test]
fn requests_are_refused_in_the_words_of_containerds_shim() {
    let mut process = created(true);
    process.begin_start().unwrap();
    assert_eq!(process.started(), None);
    assert_eq!(process.begin_delete().unwrap_err().to_string(), "cannot delete a running process");
    assert_eq!(process.begin_start().unwrap_err().to_string(), "cannot start a running process");
    assert!(process.exited(exit(0)).is_some());
    assert_eq!(process.begin_start().unwrap_err().to_string(), "cannot start a stopped process");
    assert_eq!(process.check_kill().unwrap_err().to_string(), "process already finished");
    assert_eq!(process.check_exec().unwrap_err().to_string(), "cannot exec in a stopped state");
    assert_eq!(process.begin_delete(), Ok(false));
    assert!(process.begin_delete().is_err(), "one Delete at a time");
    process.delete_failed(SystemTime::UNIX_EPOCH);
    assert_eq!((process.begin_delete(), process.exit()), (Ok(false), Some(exit(0))));
}

#[test]
fn pause_and_resume_in_every_state() {
    let mut process = Process::new(true);
    let words = |refusal: Result<(), Refusal>| refusal.unwrap_err().to_string();
    assert_eq!(words(process.check_update()), "process not created");
    process.prepared();
    assert_eq!(words(process.begin_pause()), "cannot pause task in created state");
    assert_eq!(words(process.begin_resume()), "cannot resume task in created state");
    assert_eq!(process.check_update(), Ok(()));
    process.begin_start().unwrap();
    assert_eq!(process.started(), None);
    assert_eq!(words(process.begin_resume()), "cannot resume a running process");
    process.begin_pause().unwrap();
    assert_eq!(process.status(), Status::Pausing);
    assert_eq!(words(process.begin_pause()), "cannot pause a paused container");
    assert_eq!(words(process.begin_resume()), "cannot resume a pausing container");
    process.pause_failed();
    assert_eq!(process.status(), Status::Running);
    process.begin_pause().unwrap();
    process.paused().unwrap();
    assert_eq!(process.status(), Status::Paused);
    assert_eq!(words(process.begin_pause()), "cannot pause a paused container");
    assert_eq!(words(process.begin_start()), "cannot start a paused process");
    assert_eq!(words(process.check_exec()), "cannot exec in a paused state");
    assert_eq!(words(process.begin_delete().map(drop)), "cannot delete a paused process");
    assert_eq!((process.check_update(), process.check_kill()), (Ok(()), Ok(())));
    process.begin_resume().unwrap();
    assert_eq!(process.status(), Status::Paused, "until it runs");
    process.resume_failed();
    process.begin_resume().unwrap();
    process.resumed().unwrap();
    assert_eq!(process.status(), Status::Running);
    process.begin_pause().unwrap();
    assert!(process.exited(exit(137)).is_some());
    assert_eq!(words(process.paused()), "cannot pause a stopped container");
    assert_eq!(words(process.begin_pause()), "cannot pause a stopped container");
    assert_eq!(words(process.begin_resume()), "cannot resume a stopped container");
    assert_eq!(words(process.check_update()), "cannot update a stopped container");
}

#[test]
fn an_exec_that_was_not_started_cannot_be_signalled_but_deleted() {
    let mut process = created(false);
    assert_eq!(process.check_kill(), Err(Refusal::NotCreated));
    assert_eq!(process.begin_delete(), Ok(true));
    assert_eq!(process.exit(), None);
}
