//! The CUDA lock: while closed, calls wait at their begin. The gate closes only after all calls
//! have ended, so the state is at rest then, whatever becomes of the waiting threads.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crate::sys::os::{self, Scope};

pub(crate) struct Gate {
    closed: AtomicU32,
    inside: AtomicU32,
}

/// A call in progress, until dropped.
pub(crate) struct Pass<'a>(&'a Gate);

impl Gate {
    pub(crate) const fn new() -> Self {
        Self { closed: AtomicU32::new(0), inside: AtomicU32::new(0) }
    }

    /// Begins a call; waits while the gate is closed.
    pub(crate) fn enter(&self) -> Pass<'_> {
        loop {
            // Not counted while waiting: a debugger may hold the thread there when the gate is
            // opened and closed again.
            while self.closed.load(SeqCst) != 0 {
                os::wait(&self.closed, 1, Scope::Process, None);
            }
            self.inside.fetch_add(1, SeqCst);
            let pass = Pass(self);
            if self.closed.load(SeqCst) == 0 {
                return pass;
            }
        }
    }

    /// Keeps further calls out, and waits for calls in progress until `give_up` returns true.
    /// Returns whether the gate is closed without a call in progress, and otherwise opens the gate
    /// again.
    pub(crate) fn close(&self, mut give_up: impl FnMut() -> bool) -> bool {
        self.closed.store(1, SeqCst);
        loop {
            let inside = self.inside.load(SeqCst);
            if inside == 0 {
                return true;
            }
            if give_up() {
                self.open();
                return false;
            }
            os::wait(&self.inside, inside, Scope::Process, Some(Duration::from_millis(2)));
        }
    }

    /// Lets calls in again.
    pub(crate) fn open(&self) {
        self.closed.store(0, SeqCst);
        os::wake(&self.closed, Scope::Process);
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.0.inside.fetch_sub(1, SeqCst) == 1 && self.0.closed.load(SeqCst) != 0 {
            os::wake(&self.0.inside, Scope::Process);
        }
    }
}
