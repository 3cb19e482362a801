use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Default)]
struct Recorded(Mutex<Vec<String>>);

impl EventSink for Recorded {
    fn publish<E: Event>(&self, event: &E) {
        self.0.lock().unwrap().push(format!("{} {event}", E::TOPIC));
    }
}

fn book() -> Tasks<Recorded> {
    let mut tasks = Tasks::new(Recorded::default());
    tasks.add_container("one", "/b", Stdio::default()).unwrap();
    tasks.entry(&Name::new("one", "")).unwrap().process.prepared();
    tasks
}

fn topics(tasks: &Tasks<Recorded>) -> Vec<String> {
    let recorded = tasks.events.0.lock().unwrap();
    recorded.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

fn exit(status: u32) -> Exit {
    Exit { status, at: SystemTime::UNIX_EPOCH }
}

#[tokio::test]
async fn a_lost_machine_ends_every_process_once_and_wakes_every_waiter() {
    let mut tasks = book();
    let (init, exec, unstarted) = (Name::new("one", ""), Name::new("one", "x"), Name::new("one", "y"));
    tasks.entry(&init).unwrap().process.begin_start().unwrap();
    tasks.started(&init).unwrap();
    for name in [&exec, &unstarted] {
        tasks.add_exec(name, Stdio::default()).unwrap();
        tasks.entry(name).unwrap().process.prepared();
    }
    tasks.entry(&exec).unwrap().process.begin_start().unwrap();
    tasks.started(&exec).unwrap();
    let waits = [tasks.wait(&init).unwrap(), tasks.wait(&init).unwrap(), tasks.wait(&exec).unwrap()];
    tasks.machine_lost(SystemTime::UNIX_EPOCH);
    tasks.machine_lost(SystemTime::now());
    for wait in waits {
        assert_eq!(wait.await.unwrap(), exit(KILLED));
    }
    assert_eq!(tasks.wait(&init).unwrap().await.unwrap(), exit(KILLED), "a late one, too");
    assert_eq!(topics(&tasks), ["/tasks/start", "/tasks/exec-started", "/tasks/exit", "/tasks/exit"]);
}

#[test]
fn an_early_exit_is_reported_behind_the_start() {
    let mut tasks = book();
    let init = Name::new("one", "");
    tasks.entry(&init).unwrap().process.begin_start().unwrap();
    assert!(!tasks.exited(&init, exit(3)));
    tasks.started(&init).unwrap();
    assert_eq!(topics(&tasks), ["/tasks/start", "/tasks/exit"]);
    let state = tasks.state(&init).unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (ApiStatus::STOPPED, 3));
}

fn started(tasks: &mut Tasks<Recorded>, name: &Name) {
    tasks.entry(name).unwrap().process.prepared();
    tasks.begin_start(name).unwrap();
    tasks.started(name).unwrap();
}

#[test]
fn a_paused_container_pauses_its_execs_and_is_reported_in_turn() {
    let mut tasks = book();
    let (init, exec) = (Name::new("one", ""), Name::new("one", "x"));
    started(&mut tasks, &init);
    tasks.add_exec(&exec, Stdio::default()).unwrap();
    started(&mut tasks, &exec);
    tasks.add_exec(&Name::new("one", "late"), Stdio::default()).unwrap();
    let status = |tasks: &mut Tasks<Recorded>, name: &Name| tasks.state(name).unwrap().status.unwrap();
    tasks.entry(&init).unwrap().process.begin_pause().unwrap();
    assert_eq!(status(&mut tasks, &exec), ApiStatus::PAUSING);
    tasks.paused("one").unwrap();
    assert_eq!((status(&mut tasks, &init), status(&mut tasks, &exec)), (ApiStatus::PAUSED, ApiStatus::PAUSED));
    let late = tasks.begin_start(&Name::new("one", "late")).unwrap_err();
    assert_eq!(
        (late.code(), late.to_string().as_str()),
        (ttrpc::Code::FAILED_PRECONDITION, "cannot exec in a paused state")
    );
    tasks.entry(&init).unwrap().process.begin_resume().unwrap();
    tasks.resumed("one").unwrap();
    assert_eq!(status(&mut tasks, &exec), ApiStatus::RUNNING);
    tasks.out_of_memory("one");
    tasks.out_of_memory("two");
    let message = ["/tasks/start", "/tasks/exec-started", "/tasks/paused", "/tasks/resumed", "/tasks/oom"];
    assert_eq!(topics(&tasks), message);
}

#[tokio::test]
async fn who_waits_for_the_execs_waits_for_those_that_run() {
    let mut tasks = book();
    started(&mut tasks, &Name::new("one", ""));
    let (exec, deleted, unstarted) = (Name::new("one", "x"), Name::new("one", "y"), Name::new("one", "z"));
    for name in [&exec, &deleted, &unstarted] {
        tasks.add_exec(name, Stdio::default()).unwrap();
    }
    started(&mut tasks, &exec);
    started(&mut tasks, &deleted);
    let mut ended = Box::pin(tasks.execs_ended("one"));
    assert!(is_pending(&mut ended));
    assert!(tasks.exited(&exec, exit(1)));
    assert!(is_pending(&mut ended));
    drop(tasks.remove(&deleted));
    ended.await;
}

fn is_pending(future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    std::pin::Pin::new(future).poll(&mut context).is_pending()
}

#[tokio::test]
async fn who_waits_for_a_process_that_is_deleted_unstarted_is_reported() {
    let mut tasks = book();
    let exec = Name::new("one", "x");
    tasks.add_exec(&exec, Stdio::default()).unwrap();
    let wait = tasks.wait(&exec).unwrap();
    drop(tasks.remove(&exec));
    assert_eq!(wait.await.unwrap_err().code(), ttrpc::Code::NOT_FOUND);
}

#[test]
fn names_are_taken_once_and_missing_ones_are_named() {
    let mut tasks = book();
    assert_eq!(tasks.add_container("one", "/b", Stdio::default()).unwrap_err().code(), ttrpc::Code::ALREADY_EXISTS);
    let exec = Name::new("one", "x");
    tasks.add_exec(&exec, Stdio::default()).unwrap();
    assert_eq!(tasks.add_exec(&exec, Stdio::default()).unwrap_err().code(), ttrpc::Code::ALREADY_EXISTS);
    assert_eq!(tasks.state(&Name::new("two", "")).unwrap_err().to_string(), "container two not created");
    assert_eq!(tasks.state(&Name::new("one", "z")).unwrap_err().to_string(), "process does not exist z");
    assert!(tasks.exited(&Name::new("one", ""), exit(0)));
    assert_eq!(
        tasks.add_exec(&Name::new("one", "w"), Stdio::default()).unwrap_err().to_string(),
        "cannot exec in a stopped state"
    );
}

proptest! {
    /// Whatever comes in whatever order: of each process the start is published before the exit and each once, what waits for an exit
    /// gets the one that was published, and pauses and resumes alternate.
    #[test]
    fn what_is_reported_is_true_and_in_order(steps in proptest::collection::vec((0usize..4, 0u32..12), 0..80)) {
        let mut tasks = Tasks::new(Recorded::default());
        let names = ["", "x", "y", "z"].map(|exec| Name::new("one", exec));
        tasks.add_container("one", "/b", Stdio::default()).unwrap();
        let mut asked = BTreeMap::<&Name, bool>::new();
        for (who, what) in steps {
            let name = &names[who];
            match what {
                0 if !name.exec.is_empty() => drop(tasks.add_exec(name, Stdio::default())),
                1 => {
                    if let Ok(entry) = tasks.entry(name) {
                        entry.process.prepared();
                    }
                }
                2 if tasks.begin_start(name).is_ok() => drop(asked.insert(name, true)),
                3 if asked.insert(name, false) == Some(true) => drop(tasks.started(name)),
                4 if asked.insert(name, false) == Some(true) => tasks.start_failed(name, exit(127)),
                5 => drop(tasks.exited(name, exit(who as u32))),
                6 if who == 0 => tasks.machine_lost(SystemTime::UNIX_EPOCH),
                7 => drop(tasks.entry(&names[0]).unwrap().process.begin_pause()),
                8 => drop(tasks.paused("one")),
                9 => drop(tasks.entry(&names[0]).unwrap().process.begin_resume()),
                10 => drop(tasks.resumed("one")),
                11 => tasks.out_of_memory("one"),
                _ => {}
            }
        }
        let recorded = tasks.events.0.lock().unwrap().clone();
        let places = |topics: &[&str], word: &str| -> Vec<usize> {
            let is = |line: &&String| topics.contains(&line.split(' ').next().unwrap()) && line.contains(word);
            recorded.iter().enumerate().filter(|(_, line)| is(line)).map(|(place, _)| place).collect()
        };
        for name in &names {
            let starts = match name.exec.as_str() {
                "" => places(&["/tasks/start"], ""),
                exec => places(&["/tasks/exec-started"], &format!("exec_id: {exec:?}")),
            };
            let exits = places(&["/tasks/exit"], &format!(" id: {:?}", name.id()));
            prop_assert!(starts.len() <= 1 && exits.len() <= 1, "{recorded:?}");
            if let ([start], [exit]) = (&starts[..], &exits[..]) {
                prop_assert!(start < exit, "{recorded:?}");
            }
            let Ok(entry) = tasks.entry(name) else { continue };
            prop_assert_eq!(entry.exit.borrow().is_some(), exits.len() == 1);
            prop_assert_eq!(*entry.exit.borrow(), entry.process.exit());
        }
        let moves = places(&["/tasks/paused", "/tasks/resumed"], "");
        for (n, place) in moves.into_iter().enumerate() {
            prop_assert_eq!(recorded[place].starts_with("/tasks/paused"), n % 2 == 0, "{:?}", recorded);
        }
    }
}
