//! The container's freezer, and the right to thaw.
//!
//! The operation behind a freeze also thaws: a resume after a pause, a checkpoint after its own
//! freeze. There is one exception: a kill of init must thaw the container, because a frozen process
//! on cgroup v1 does not die of SIGKILL. A kill of another process does not thaw: the container
//! would run while clients take it for paused. The killed process dies at the resume, as under
//! runc's shim.
//!
//! An operation that freezes or thaws borrows the freezer. A kill of init takes effect when the
//! operation returns the freezer: until then GPU state may be missing, or files may be in the
//! middle of a save.

/// The freezer, lent to an operation or free.
#[derive(Debug, Default)]
pub(super) struct Freezer {
    lent: bool,
    /// Init was killed since the freezer was lent.
    init_was_killed: bool,
}

/// Verdict on killed processes of a frozen container: let them die now, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum LetDie {
    Now,
    NotNow,
}

impl Freezer {
    /// Lends the freezer to an operation.
    pub(super) fn lend(&mut self) {
        *self = Self { lent: true, init_was_killed: false };
    }

    /// Takes the freezer back at the end of an operation. The container may be frozen or thawed.
    pub(super) fn take_back(&mut self) -> LetDie {
        let init_was_killed = std::mem::take(self).init_was_killed;
        if init_was_killed { LetDie::Now } else { LetDie::NotNow }
    }

    /// Notes that SIGKILL was sent to init.
    pub(super) fn init_is_killed(&mut self) -> LetDie {
        self.init_was_killed = self.lent;
        if self.lent { LetDie::NotNow } else { LetDie::Now }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_init_dies_at_once_unless_the_freezer_is_lent() {
        let mut freezer = Freezer::default();
        assert_eq!(freezer.init_is_killed(), LetDie::Now);
    }

    #[test]
    fn a_killed_init_is_let_die_when_the_operation_is_done() {
        let mut freezer = Freezer::default();
        freezer.lend();
        assert_eq!(freezer.init_is_killed(), LetDie::NotNow);
        assert_eq!(freezer.take_back(), LetDie::Now);
        assert_eq!(freezer.take_back(), LetDie::NotNow, "once");
    }

    #[test]
    fn an_operation_without_a_kill_leaves_the_container_as_it_made_it() {
        let mut freezer = Freezer::default();
        freezer.lend();
        assert_eq!(freezer.take_back(), LetDie::NotNow);
    }
}
