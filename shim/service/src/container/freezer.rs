//! The container's freezer, and who may thaw it.
//!
//! A container is thawed by whoever froze it: a pause by its resume, a checkpoint by its own end. There is one exception. On
//! cgroup v1 a frozen process does not die of SIGKILL, so that a kill of init has to thaw the container. A kill of
//! another process does not: the container would run while clients take it for paused. The killed process dies then
//! when the container is resumed, as under runc's shim.
//!
//! An operation that freezes or thaws has the freezer to itself. A kill of init that comes meanwhile takes effect when the
//! operation gives the freezer back: until then the container may have no GPU state, or its files may be being saved.

/// The freezer, lent to an operation or not.
#[derive(Debug, Default)]
pub(super) struct Freezer {
    lent: bool,
    /// Init was killed since the freezer was lent.
    init_was_killed: bool,
}

/// Time at which killed processes are let die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum LetDie {
    Now,
    NotNow,
}

impl Freezer {
    /// Gives it to an operation.
    pub(super) fn lend(&mut self) {
        *self = Self { lent: true, init_was_killed: false };
    }

    /// Takes it back at the end of an operation, which leaves the container frozen or not.
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
    fn a_killed_init_is_let_die_at_once_while_nobody_has_the_freezer() {
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
