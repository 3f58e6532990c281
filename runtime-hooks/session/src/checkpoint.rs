//! Taking a checkpoint: the order of its steps, and what is undone after which failure.
//!
//! ```text
//!   Drafted ─► Frozen ─► (with a GPU: Suspended) ─► SaveMemory ─► SaveShm ─► Dump ─┬─ leave running: let go ─► Published ─► commit
//!      │          │                 │                   │            │             └─ exit: Published, commit, then CRIU kills it
//!      └──────────┴─────────────────┴───────────────────┴────────────┴─► failure or cancel: the undo stack is unwound
//! ```
//!
//! The draft comes with a commit record that says `incomplete`. Commit completes the record.
//!
//! - **Leave running.** The container needs nothing but its images once CRIU is done. Its steps are undone then, which is
//!   what lets it go on; its memory is moved out of the images beside that.
//! - **Exit.** CRIU asks before it kills the container. Everything is published and committed before the answer.
//!   Should CRIU fail after the commit, a container that lives gets everything back.

use phase::{Cancel, Phase};
use role::Failure;

use crate::error::{Failed, SessionError};
use crate::undo::{Step, Undo, UndoStack};

/// Fate of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    LeaveRunning,
    Exit,
}

/// Actions of a checkpoint on a machine. Tests put a fake in, in which everything can fail.
pub(crate) trait Actions: Undo {
    /// Begins the draft and the incomplete record.
    fn draft(&mut self) -> Result<(), SessionError>;
    /// Freezes the container where no process waits for a vforked child.
    fn freeze(&mut self) -> Result<(), SessionError>;
    /// Returns whether a process of the container has something of the GPU.
    fn uses_gpu(&mut self) -> Result<bool, SessionError>;
    /// Moves GPU state to memory, and leaves the container frozen.
    fn suspend(&mut self) -> Result<(), SessionError>;
    /// Saves memory that is not to be in the images, and puts files in its place.
    fn save_memory(&mut self) -> Result<(), SessionError>;
    /// Saves a /dev/shm from outside.
    fn save_shm(&mut self) -> Result<(), SessionError>;
    /// Has CRIU dump the container. On exit, publishes and commits before CRIU kills it.
    fn dump(&mut self) -> Result<(), SessionError>;
    /// Begins to publish, beside what else is done.
    fn begin_publication(&mut self);
    /// Waits until all is published.
    fn finish_publication(&mut self) -> Result<(), SessionError>;
    /// Completes the record and puts the draft in its place.
    fn commit(&mut self) -> Result<(), SessionError>;
    /// Returns whether CRIU has killed the container, so that the checkpoint is all that is left of it.
    fn is_ended(&mut self) -> bool;
    /// Waits for the end of a container that CRIU has killed.
    fn wait_for_end(&mut self) -> Result<(), SessionError>;
    /// Returns the phase that was entered last.
    fn phase(&self) -> Phase;
    /// Enters a phase.
    fn enter(&mut self, phase: Phase);
}

/// Takes a checkpoint. When it fails, `stack` has what is owed to the container.
pub(crate) fn take(
    actions: &mut dyn Actions,
    after: After,
    cancel: &Cancel,
    stack: &mut UndoStack,
) -> Result<(), Failed> {
    let taken = dump(actions, after, cancel, stack).and_then(|()| match after {
        After::LeaveRunning => let_go_and_publish(actions, stack),
        After::Exit => {
            // The checkpoint is committed, and all that there is.
            stack.commit();
            actions.commit()?;
            actions.wait_for_end()
        }
    });
    taken.map_err(|cause| give_up(actions, &cause, stack))
}

fn dump(actions: &mut dyn Actions, after: After, cancel: &Cancel, stack: &mut UndoStack) -> Result<(), SessionError> {
    stack.push(Step::Drafted);
    actions.draft()?;
    cancel.check()?;
    stack.push(Step::Frozen);
    actions.freeze()?;
    if actions.uses_gpu()? {
        cancel.check()?;
        stack.push(Step::Suspended);
        actions.suspend()?;
    }
    cancel.check()?;
    actions.save_memory()?;
    cancel.check()?;
    actions.save_shm()?;
    cancel.check()?;
    if after == After::Exit {
        stack.push(Step::Published);
    }
    match actions.dump() {
        // What CRIU says after it has killed the container changes nothing.
        Err(error) if actions.is_ended() => {
            tracing::warn!("CRIU failed after it had ended the container: {}", phase::chain(&error));
            Ok(())
        }
        dumped => dumped,
    }
}

fn let_go_and_publish(actions: &mut dyn Actions, stack: &mut UndoStack) -> Result<(), SessionError> {
    stack.push(Step::Published);
    // The steps of the container lie below the publication, which goes on beside them.
    actions.begin_publication();
    let mut container = stack.split_off_container();
    let failures = container.unwind(actions);
    actions.enter(Phase::Publish);
    let published = actions.finish_publication().and_then(|()| actions.commit());
    stack.put_back(container);
    if let Some((_, failure)) = failures.into_iter().next() {
        return Err(failure.into());
    }
    published?;
    stack.commit();
    Ok(())
}

/// Undoes what there is to undo, and words the failure.
fn give_up(actions: &mut dyn Actions, cause: &SessionError, stack: &mut UndoStack) -> Failed {
    let phase = actions.phase();
    let failures = stack.unwind(actions);
    for (step, failure) in &failures {
        tracing::error!("cannot undo the step {step:?} of a failed checkpoint: {}", phase::chain(failure));
    }
    Failed { phase, cause: Failure::of(cause), owed: owed(stack, &failures) }
}

/// Returns what the container has not got back, in words.
pub(crate) fn owed(stack: &UndoStack, failures: &[(Step, Failure)]) -> Option<String> {
    let words: Vec<String> = failures.iter().map(|(_, failure)| phase::chain(failure)).collect();
    stack.owes().then(|| words.join("; "))
}
