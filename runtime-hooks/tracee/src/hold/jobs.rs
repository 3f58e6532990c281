//! Processes that are stopped by a signal (SIGSTOP, SIGTSTP): the spared threads in them have to run.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use proc::{HostPid, Status};
use rustix::process::Signal;

use super::{Hold, HoldError, Stand, look, sys};

/// Longest time for a thread that runs towards its signal. The thread is in the kernel and waits for nothing.
const DELIVERY: Duration = Duration::from_millis(200);

/// Why a stopped process was not continued, or not stopped again.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Its threads cannot be held.
    #[error("cannot hold stopped process {pid}")]
    Hold {
        /// The process.
        pid: HostPid,
        /// Why not.
        #[source]
        source: HoldError,
    },
    /// It cannot be signalled.
    #[error("cannot send {signal} to process {pid}")]
    Signal {
        /// The process.
        pid: HostPid,
        /// "SIGCONT" or "SIGSTOP"
        signal: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Hold {
    /// Continues a process that is stopped by a signal, with all its threads held before but the spared: only those
    /// run after it. The program's handler for SIGCONT, if it has one, does not run, except if every held thread
    /// has other signals to handle or blocks SIGCONT; it runs then when all are let go. Its parent learns that it was
    /// continued, as a shell would want to.
    ///
    /// When an error is returned the process may be continued or not; what was taken is held.
    ///
    /// # Errors
    /// When a thread cannot be held or does not stand still by the deadline, or the process has ended.
    pub fn cont(&mut self, pid: HostPid, deadline: Instant) -> Result<(), JobError> {
        let hold = |source| JobError::Hold { pid, source };
        self.take(pid).map_err(hold)?;
        self.settle_only(pid, deadline).map_err(hold)?;
        let still = self.still(pid);
        // To a held thread, not to the process: that continues all threads too, but a spared thread, which
        // runs, cannot be the one that takes the signal and executes the program's handler.
        let taker = still.iter().map(|(tid, _)| *tid).find(|tid| gets_only_sigcont(pid, *tid));
        let Some(tid) = taker.or(still.first().map(|(tid, _)| *tid)) else {
            return Err(hold(HoldError::Gone { pid }));
        };
        let failed = |source| JobError::Signal { pid, signal: "SIGCONT", source };
        sys::signal_thread(pid, tid, Signal::CONT).map_err(failed)?;
        if taker.is_some() {
            let stand = swallow_sigcont(pid, tid).map_err(failed)?;
            self.note(pid, tid, stand);
            self.settle_only(pid, deadline).map_err(hold)?;
        }
        Ok(())
    }

    /// Stops a process that was continued. It takes effect when it is let go: no thread gets to run before. A SIGCONT that
    /// has been sent to it meanwhile is dropped by the kernel, as any is that precedes a SIGSTOP.
    ///
    /// # Errors
    /// When it has ended.
    pub fn stop(&mut self, pid: HostPid) -> Result<(), JobError> {
        let failed = |source| JobError::Signal { pid, signal: "SIGSTOP", source };
        let still = self.still(pid);
        if still.is_empty() {
            return rustix::process::kill_process(pid.as_pid(), Signal::STOP).map_err(|errno| failed(errno.into()));
        }
        // To each thread: one signal to the process is taken by one thread, while another that has been let go may run
        // a little before that one stops it.
        for (tid, _) in still {
            sys::signal_thread(pid, tid, Signal::STOP).map_err(failed)?;
        }
        Ok(())
    }
}

/// Whether a process stops as soon as it runs, after [`Hold::stop`].
pub fn is_stopping(pid: HostPid) -> bool {
    let stops = |tid| signals(pid, tid).is_some_and(|[pending, _, _]| pending & bit(Signal::STOP) != 0);
    proc::threads(pid).is_ok_and(|threads| threads.iter().any(|thread| stops(thread.tid)))
}

/// Whether the next signal of a held thread is SIGCONT, once that has been sent to it.
fn gets_only_sigcont(pid: HostPid, tid: i32) -> bool {
    let Some([pending, shared, blocked]) = signals(pid, tid) else { return false };
    blocked & bit(Signal::CONT) == 0 && (pending | shared) & !blocked & !bit(Signal::CONT) == 0
}

/// The signals that wait for a thread, those that wait for its process, and those that it blocks.
fn signals(pid: HostPid, tid: i32) -> Option<[u64; 3]> {
    let status = Status::of_thread(pid, tid).ok()?;
    Some([status.bits("SigPnd")?, status.bits("ShdPnd")?, status.bits("SigBlk")?])
}

fn bit(signal: Signal) -> u64 {
    1 << (signal.as_raw() - 1)
}

/// Runs a thread to the delivery of the SIGCONT that waits for it, and drops it. The thread does not leave the kernel.
fn swallow_sigcont(pid: HostPid, tid: i32) -> io::Result<Stand> {
    let thread = nix::unistd::Pid::from_raw(tid);
    // Two stops at most come before: the end of the group stop, and one more that a signal may have caused.
    for _ in 0..4 {
        let Some(Stand::Still { signal }) = look(pid, tid)? else { return Ok(Stand::Called) };
        if signal == libc::SIGCONT {
            ptrace::interrupt(thread)?;
            sys::go_on(tid, 0)?;
            return Ok(Stand::Called);
        }
        // Another signal than the one that it stands for here would be a new one, and stays with the thread. Without
        // SIGCONT waiting, the thread would go on to its program.
        let waiting = signals(pid, tid).is_some_and(|[pending, _, _]| pending & bit(Signal::CONT) != 0);
        if signal != 0 || !waiting {
            return Ok(Stand::Still { signal });
        }
        sys::go_on(tid, 0)?;
        await_stop(pid, tid)?;
    }
    ptrace::interrupt(thread)?;
    Ok(Stand::Called)
}

fn await_stop(pid: HostPid, tid: i32) -> io::Result<()> {
    let deadline = Instant::now() + DELIVERY;
    while look(pid, tid)? == Some(Stand::Called) {
        if Instant::now() >= deadline {
            ptrace::interrupt(nix::unistd::Pid::from_raw(tid))?;
            return Ok(());
        }
        std::thread::yield_now();
    }
    Ok(())
}
