//! A checkpoint on a machine where each action can fail.

use phase::{Cancel, Phase};
use role::Failure;

use crate::checkpoint::{Actions, After, take};
use crate::error::SessionError;
use crate::undo::{Step, Undo, UndoStack};

/// A machine in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    /// The folder has a draft.
    is_drafted: bool,
    is_frozen: bool,
    is_suspended: bool,
    is_published: bool,
    is_committed: bool,
    is_ended: bool,
}

const BEFORE: State = State {
    is_drafted: false,
    is_frozen: false,
    is_suspended: false,
    is_published: false,
    is_committed: false,
    is_ended: false,
};

struct Fake {
    after: After,
    state: State,
    actions: Vec<&'static str>,
    /// Numbers of the actions that fail.
    fail: Vec<usize>,
    /// Whether a failing action has its effect all the same.
    is_half_done: bool,
    cancel_at: Option<usize>,
    cancel: Cancel,
}

impl Fake {
    fn new(after: After, fail: &[usize], is_half_done: bool) -> Self {
        Self {
            after,
            state: BEFORE,
            actions: Vec::new(),
            fail: fail.to_vec(),
            is_half_done,
            cancel_at: None,
            cancel: Cancel::default(),
        }
    }

    fn act(&mut self, name: &'static str, effect: impl FnOnce(&mut State)) -> Result<(), SessionError> {
        let number = self.actions.len();
        self.actions.push(name);
        if self.cancel_at == Some(number) {
            self.cancel.cancel("as told");
        }
        let fails = self.fail.contains(&number);
        if !fails || self.is_half_done {
            effect(&mut self.state);
        }
        if fails { Err(SessionError::Memory(Failure::new(name))) } else { Ok(()) }
    }

    fn take(&mut self) -> (Result<(), crate::Failed>, UndoStack) {
        let (mut stack, after, cancel) = (UndoStack::default(), self.after, self.cancel.clone());
        let taken = take(self, after, &cancel, &mut stack);
        (taken, stack)
    }
}

impl Undo for Fake {
    fn undo(&mut self, step: Step) -> Result<(), Failure> {
        let undone = match step {
            Step::Drafted => self.act("remove the draft", |state| state.is_drafted = false),
            Step::Frozen => self.act("thaw", |state| state.is_frozen = false),
            Step::Suspended => self.act("resume the GPU", |state| state.is_suspended = false),
            Step::Published => self.act("withdraw", |state| {
                (state.is_published, state.is_committed) = (false, false);
            }),
        };
        undone.map_err(|error| Failure::of(&error))
    }
}

impl Actions for Fake {
    fn draft(&mut self) -> Result<(), SessionError> {
        self.act("draft", |state| state.is_drafted = true)
    }

    fn freeze(&mut self) -> Result<(), SessionError> {
        self.act("freeze", |state| state.is_frozen = true)
    }

    fn uses_gpu(&mut self) -> Result<bool, SessionError> {
        self.act("look for the GPU", |_| ()).map(|()| true)
    }

    fn suspend(&mut self) -> Result<(), SessionError> {
        self.act("suspend", |state| state.is_suspended = true)
    }

    fn save_memory(&mut self) -> Result<(), SessionError> {
        self.act("save memory", |_| ())
    }

    fn save_shm(&mut self) -> Result<(), SessionError> {
        self.act("save /dev/shm", |_| ())
    }

    fn dump(&mut self) -> Result<(), SessionError> {
        if self.after == After::Exit {
            self.act("publish in the dump", |state| state.is_published = true)?;
            self.cancel.check()?;
            self.act("commit in the dump", |state| state.is_committed = true)?;
        }
        let after = self.after;
        self.act("dump", |state| state.is_ended = after == After::Exit)
    }

    fn begin_publication(&mut self) {}

    fn finish_publication(&mut self) -> Result<(), SessionError> {
        self.act("publish", |state| state.is_published = true)
    }

    fn commit(&mut self) -> Result<(), SessionError> {
        self.act("commit", |state| (state.is_committed, state.is_drafted) = (true, false))
    }

    fn is_ended(&mut self) -> bool {
        self.state.is_ended
    }

    fn wait_for_end(&mut self) -> Result<(), SessionError> {
        self.act("wait for the end", |_| ())
    }

    fn phase(&self) -> Phase {
        Phase::Dump
    }

    fn enter(&mut self, _: Phase) {}
}

fn actions_of(after: After) -> Vec<&'static str> {
    let mut fake = Fake::new(after, &[], false);
    let (taken, stack) = fake.take();
    taken.unwrap();
    assert!(!stack.owes());
    fake.actions
}

#[test]
fn a_checkpoint_that_leaves_the_container_running_lets_it_go_before_it_publishes() {
    let mut fake = Fake::new(After::LeaveRunning, &[], false);
    fake.take().0.unwrap();
    assert_eq!(fake.state, State { is_published: true, is_committed: true, ..BEFORE });
    let at = |name| fake.actions.iter().position(|action| *action == name).unwrap();
    assert!(at("resume the GPU") < at("thaw") && at("thaw") < at("publish") && at("publish") < at("commit"));
}

#[test]
fn a_checkpoint_that_ends_the_container_is_committed_before_the_end() {
    let mut fake = Fake::new(After::Exit, &[], false);
    fake.take().0.unwrap();
    assert!(fake.state.is_ended && fake.state.is_committed && fake.state.is_published);
    assert!(!fake.actions.contains(&"thaw") && !fake.actions.contains(&"resume the GPU"));
}

/// Whatever fails: the container is as it was and nothing is left, or it has ended and is saved whole.
fn check(fake: &Fake, taken: &Result<(), crate::Failed>, stack: &UndoStack) {
    let state = &fake.state;
    let told = format!("{:?}, {:?} fail: {state:?}, {taken:?}", fake.actions, fake.fail);
    if state.is_ended {
        assert!(state.is_committed && state.is_published, "{told}");
        return;
    }
    match taken {
        Ok(()) => assert_eq!(*state, State { is_published: true, is_committed: true, ..BEFORE }, "{told}"),
        Err(failed) => {
            let suffers = state.is_frozen || state.is_suspended;
            assert!(!suffers || (failed.owed.is_some() && stack.owes()), "{told}");
        }
    }
}

#[test]
fn whatever_fails_the_container_is_as_it_was_or_is_saved_whole() {
    for after in [After::LeaveRunning, After::Exit] {
        for half in [false, true] {
            for number in 0..actions_of(after).len() {
                let mut fake = Fake::new(after, &[number], half);
                let (taken, stack) = fake.take();
                check(&fake, &taken, &stack);
                let failed_to_let_go = stack.owes();
                if taken.is_err() && !fake.state.is_ended && !failed_to_let_go {
                    assert_eq!(fake.state, BEFORE, "{:?} with {number}", fake.actions);
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_undone_is_owed_and_paid_later() {
    for after in [After::LeaveRunning, After::Exit] {
        for first in 0..actions_of(after).len() {
            for second in first + 1..first + 6 {
                for half in [false, true] {
                    let mut fake = Fake::new(after, &[first, second], half);
                    let (taken, mut stack) = fake.take();
                    check(&fake, &taken, &stack);
                    if taken.is_err() && !fake.state.is_ended {
                        fake.fail.clear();
                        stack.unwind(&mut fake);
                        assert!(!fake.state.is_frozen && !fake.state.is_suspended, "{:?}", fake.actions);
                        assert!(!stack.owes());
                    }
                }
            }
        }
    }
}

#[test]
fn a_cancelled_checkpoint_is_undone_wherever_it_is() {
    for after in [After::LeaveRunning, After::Exit] {
        let all = actions_of(after);
        for number in 0..all.len() {
            let mut fake = Fake::new(after, &[], false);
            fake.cancel_at = Some(number);
            let (taken, stack) = fake.take();
            check(&fake, &taken, &stack);
            if taken.is_err() {
                assert_eq!(fake.state, BEFORE, "{:?} cancelled at {number}", fake.actions);
            }
        }
    }
}
