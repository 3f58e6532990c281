//! The death of an injector at one of its steps, for tests.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::Signal;

/// Steps left until this process dies; 0 for never.
static STEPS: AtomicU32 = AtomicU32::new(0);

/// Lets this process die at its step of this number, counted from now on.
pub fn die_at(step: u32) {
    STEPS.store(step, Ordering::Relaxed);
}

pub(crate) fn step() {
    if STEPS.load(Ordering::Relaxed) > 0 && STEPS.fetch_sub(1, Ordering::Relaxed) == 1 {
        let killed = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
        assert!(killed.is_ok(), "cannot die");
    }
}
