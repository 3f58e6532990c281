//! The undo stack: what a checkpoint has done to a container, in order.
//!
//! ```text
//!   Drafted ──► Frozen ──► Suspended ──► Published ──► commit: the stack is emptied, nothing is undone
//!      ▲           ▲           ▲             │
//!      └───────────┴───────────┴─────────────┘ unwind: popped from the top, each step whatever became of the others
//! ```
//!
//! A step is pushed before it is taken. Undoing a step that was not taken, or only half, does no harm: each asks the
//! driver, the kernel or the disk what there is to undo.
//!
//! Steps below which a container suffers ([`Step::is_owed`]) stay on the stack when they cannot be undone, and are tried
//! again. Others leave garbage at worst, which is told.

use role::Failure;

/// A step that can be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// A draft and an incomplete record are in the folder. Undone: they are removed.
    Drafted,
    /// The cgroup is frozen. Undone: frozen if the container was paused, else thawed.
    Frozen,
    /// The GPU state is in memory. Undone: back on the GPU, unlocked.
    Suspended,
    /// The snapshot is in the node's store. Undone: removed.
    Published,
}

impl Step {
    /// Returns whether the container suffers as long as the step is not undone.
    fn is_owed(self) -> bool {
        matches!(self, Self::Frozen | Self::Suspended)
    }
}

/// Undoes steps.
pub(crate) trait Undo {
    /// Undoes one step. Repeatable.
    fn undo(&mut self, step: Step) -> Result<(), Failure>;
}

/// Step to be undone.
#[derive(Debug, Default)]
pub(crate) struct UndoStack {
    steps: Vec<Step>,
}

impl UndoStack {
    /// Notes a step that is about to be taken.
    pub(crate) fn push(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// Forgets everything: the operation is committed, or the container is gone.
    pub(crate) fn commit(&mut self) {
        self.steps.clear();
    }

    /// Undoes all steps, the last one first, each whatever became of the others. Returns the failures. The steps that are
    /// owed stay.
    pub(crate) fn unwind(&mut self, undo: &mut (impl Undo + ?Sized)) -> Vec<(Step, Failure)> {
        let mut failures = Vec::new();
        while let Some(step) = self.steps.pop() {
            if let Err(failure) = undo.undo(step) {
                failures.push((step, failure));
            }
        }
        self.steps.extend(failures.iter().rev().map(|(step, _)| *step).filter(|step| step.is_owed()));
        failures
    }

    /// Takes the steps that the container waits for off this stack: undone, they let it go on.
    pub(crate) fn split_off_container(&mut self) -> Self {
        let (container, rest) = self.steps.drain(..).partition(|step| step.is_owed());
        self.steps = rest;
        Self { steps: container }
    }

    /// Puts what is owed on top.
    pub(crate) fn put_back(&mut self, owed: Self) {
        self.steps.extend(owed.steps);
    }

    /// Returns whether the container has not got everything back.
    pub(crate) fn owes(&self) -> bool {
        self.steps.iter().any(|step| step.is_owed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Fake {
        undone: Vec<Step>,
        fail: Vec<Step>,
    }

    impl Undo for Fake {
        fn undo(&mut self, step: Step) -> Result<(), Failure> {
            self.undone.push(step);
            if self.fail.contains(&step) { Err(Failure::new("as told")) } else { Ok(()) }
        }
    }

    fn full() -> UndoStack {
        let mut stack = UndoStack::default();
        for step in [Step::Drafted, Step::Frozen, Step::Suspended, Step::Published] {
            stack.push(step);
        }
        stack
    }

    const ALL: [Step; 4] = [Step::Published, Step::Suspended, Step::Frozen, Step::Drafted];

    #[test]
    fn every_step_is_undone_whichever_of_the_others_fail() {
        for failing in ALL {
            let mut fake = Fake { fail: vec![failing], ..Fake::default() };
            let mut stack = full();
            let failures = stack.unwind(&mut fake);
            assert_eq!(fake.undone, ALL);
            assert_eq!(failures.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [failing]);
            assert_eq!(stack.owes(), failing.is_owed());
        }
    }

    #[test]
    fn what_is_owed_is_tried_again_in_order_and_nothing_else() {
        let mut fake = Fake { fail: ALL.to_vec(), ..Fake::default() };
        let mut stack = full();
        stack.unwind(&mut fake);
        fake = Fake::default();
        assert!(stack.unwind(&mut fake).is_empty());
        assert_eq!(fake.undone, [Step::Suspended, Step::Frozen]);
        assert!(!stack.owes());
    }

    #[test]
    fn a_container_is_let_go_without_the_draft() {
        let mut fake = Fake::default();
        let mut stack = UndoStack::default();
        for step in [Step::Drafted, Step::Frozen, Step::Suspended, Step::Published] {
            stack.push(step);
        }
        let mut container = stack.split_off_container();
        container.unwind(&mut fake);
        assert_eq!(fake.undone, [Step::Suspended, Step::Frozen]);
        stack.put_back(container);
        stack.unwind(&mut fake);
        assert_eq!(fake.undone.last(), Some(&Step::Drafted));
    }

    #[test]
    fn nothing_is_undone_after_a_commit() {
        let mut fake = Fake::default();
        let mut stack = full();
        stack.commit();
        stack.unwind(&mut fake);
        assert!(fake.undone.is_empty());
    }
}
