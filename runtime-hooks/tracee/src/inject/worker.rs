//! One thread that makes calls.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use proc::{HostPid, Mapping, Status};

use super::machine::{self, State};
use super::{Code, InjectError, SCRATCH, await_stop, holds, step};
use crate::hold::{Glance, Hold, Stand, Stop, glance, sys};
use crate::process;

/// Longest time for the thread to get back to its place, whatever the deadline.
const RETURN: Duration = Duration::from_secs(1);

/// Longest time for a thread from its place to a system call.
const ENTRY: Duration = Duration::from_secs(1);

/// Place of a thread's frame.
pub(super) enum Place<'m> {
    /// Below its stack, which is in one of these.
    Stack(&'m [Mapping]),
    /// In memory that nothing else uses, between these addresses. Only where that is safe: see
    /// [`Worker::is_crash_safe`].
    Between(u64, u64),
}

/// Bytes that are written below a thread's stack.
#[derive(Debug)]
pub(super) struct Frame {
    /// The lowest address, and the stack pointer during calls.
    pub(super) start: u64,
    /// The address of the scratch bytes in it.
    pub(super) scratch: u64,
    pub(super) bytes: Vec<u8>,
}

/// A held thread that makes system calls, one after the other.
#[derive(Debug)]
pub(super) struct Worker {
    pid: HostPid,
    pub(super) tid: i32,
    /// It has a seccomp filter, which is suspended.
    has_filter: bool,
    memory: Rc<File>,
    code: Code,
    state: State,
    mask: u64,
    frame: Frame,
    /// Bytes of the program's that the frame covers.
    covered: Vec<u8>,
    /// Whether the thread has left the stop that it was held in.
    has_moved: bool,
    is_back: bool,
    /// Number of stops, of two, that the call under way has come to; `None` without a call.
    stops: Option<u8>,
}

impl Worker {
    /// Prepares a thread that stands still, and in the delivery of no signal.
    pub(super) fn prepare(
        hold: &Hold,
        (pid, tid): (HostPid, i32),
        mut state: State,
        mut code: Code,
        memory: Rc<File>,
        place: &Place<'_>,
    ) -> Result<Self, InjectError> {
        let refused = |action| move |source| InjectError::Refused { action, pid, tid, source };
        if !state.is_native() {
            return Err(InjectError::Unsupported { pid });
        }
        let has_filter = has_filter(pid, tid);
        if has_filter {
            let suspended = hold.suspend_filter(pid, tid, true);
            suspended.map_err(|source| InjectError::Filter { pid, tid, source })?;
        }
        let mask = sys::signal_mask(tid).map_err(refused("read the signal mask of"))?;
        leave_restartable_sequence(&memory, tid, &mut state);
        if has_shadow_stack(pid, tid) {
            // It would not return to where no call has come from.
            code.sigreturn = None;
        }
        let frame = frame(&mut code, &state, mask, place).ok_or(InjectError::NoRoom { pid, tid })?;
        let mut covered = Vec::new();
        if let Place::Stack(_) = place {
            covered.resize(frame.bytes.len(), 0);
            let read = memory.read_exact_at(&mut covered, frame.start);
            read.map_err(|source| InjectError::File { action: "read the stack of", pid, source })?;
        }
        let (has_moved, is_back, stops) = (false, false, None);
        let mut worker =
            Self { pid, tid, has_filter, memory, code, state, mask, frame, covered, has_moved, is_back, stops };
        if let Err(error) = worker.park() {
            // Nothing is to be done about what cannot be undone either: it would return through the frame.
            let _ = worker.go_back(hold, Instant::now());
            return Err(error);
        }
        Ok(worker)
    }

    fn park(&self) -> Result<(), InjectError> {
        let (pid, tid) = (self.pid, self.tid);
        let refused = |action| move |source| InjectError::Refused { action, pid, tid, source };
        let written = self.memory.write_all_at(&self.frame.bytes, self.frame.start);
        written.map_err(|source| InjectError::File { action: "write to the stack of", pid, source })?;
        step();
        if self.is_crash_safe() {
            // First where to go on, then the mask: the frame has the old one.
            let parked = self.state.park(tid, &self.code, self.frame.start);
            parked.map_err(refused("set the registers of"))?;
        }
        step();
        sys::set_signal_mask(tid, u64::MAX).map_err(refused("block the signals of"))?;
        step();
        Ok(())
    }

    pub(super) fn is_crash_safe(&self) -> bool {
        self.code.sigreturn.is_some()
    }

    pub(super) fn scratch(&mut self, bytes: &[u8]) -> Result<u64, InjectError> {
        let written = if u64::try_from(bytes.len()).is_ok_and(|length| length <= SCRATCH) {
            self.memory.write_all_at(bytes, self.frame.scratch)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        };
        let failed = |source| InjectError::File { action: "write to the stack of", pid: self.pid, source };
        written.map_err(failed)?;
        Ok(self.frame.scratch)
    }

    pub(super) fn read_scratch(&self, from: u64, bytes: &mut [u8]) -> Result<(), InjectError> {
        let is_in = u64::try_from(bytes.len()).is_ok_and(|length| from.saturating_add(length) <= SCRATCH);
        let read = if is_in {
            self.memory.read_exact_at(bytes, self.frame.scratch + from)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        };
        read.map_err(|source| InjectError::File { action: "read the stack of", pid: self.pid, source })
    }

    pub(super) fn call(&mut self, number: i64, arguments: [u64; 6], deadline: Instant) -> Result<i64, InjectError> {
        self.begin(number, arguments)?;
        self.wait(deadline)
    }

    /// Begins a call; what it returns is for [`Self::poll`] or [`Self::wait`] to say.
    pub(super) fn begin(&mut self, number: i64, arguments: [u64; 6]) -> Result<(), InjectError> {
        let called = self.state.call(self.tid, &self.code, self.frame.start, number, arguments);
        called.map_err(self.refused("set the registers of"))?;
        self.has_moved = true;
        self.stops = Some(0);
        self.go_on(0)
    }

    /// Waits until the call that was begun is under way in the kernel, or is over.
    pub(super) fn enter(&mut self) -> Result<(), InjectError> {
        let deadline = Instant::now() + ENTRY;
        while self.stops == Some(0) {
            let stop = await_stop(self.pid, self.tid, deadline)?;
            self.advance(stop)?;
        }
        Ok(())
    }

    pub(super) fn is_busy(&self) -> bool {
        self.stops.is_some()
    }

    /// Returns the result of the call under way, if the call has returned.
    pub(super) fn poll(&mut self) -> Result<Option<i64>, InjectError> {
        match glance(self.tid).map_err(self.refused("wait for"))? {
            Glance::Stop(stop) => self.advance(stop),
            Glance::Dead | Glance::Gone => Err(InjectError::Died { pid: self.pid }),
            Glance::Moving if process::is_ending(self.pid, self.tid) => Err(InjectError::Died { pid: self.pid }),
            Glance::Moving => Ok(None),
        }
    }

    /// Waits until the call that is under way has returned.
    pub(super) fn wait(&mut self, deadline: Instant) -> Result<i64, InjectError> {
        loop {
            let stop = await_stop(self.pid, self.tid, deadline)?;
            if let Some(returned) = self.advance(stop)? {
                return Ok(returned);
            }
        }
    }

    fn advance(&mut self, stop: Stop) -> Result<Option<i64>, InjectError> {
        let signal = match (stop, self.stops) {
            (Stop::Syscall, Some(1)) => {
                step();
                self.stops = None;
                return machine::result(self.tid).map(Some).map_err(self.refused("read the registers of"));
            }
            (Stop::Syscall, _) => {
                self.stops = Some(1);
                0
            }
            (Stop::Event, _) => 0,
            // It cannot be blocked. The process counts as stopped then, and this thread goes on all the same.
            (Stop::Signal(libc::SIGSTOP), _) => libc::SIGSTOP,
            (Stop::Signal(signal), _) => return Err(InjectError::Signal { pid: self.pid, tid: self.tid, signal }),
        };
        self.go_on(signal)?;
        Ok(None)
    }

    fn go_on(&self, signal: i32) -> Result<(), InjectError> {
        step();
        sys::go_on_to_syscall(self.tid, signal).map_err(self.refused("continue"))
    }

    fn refused(&self, action: &'static str) -> impl Fn(io::Error) -> InjectError + use<> {
        let (pid, tid) = (self.pid, self.tid);
        move |source| InjectError::Refused { action, pid, tid, source }
    }

    /// Puts all back, once.
    pub(super) fn go_back(&mut self, hold: &Hold, deadline: Instant) -> Result<(), InjectError> {
        let (pid, tid) = (self.pid, self.tid);
        if std::mem::replace(&mut self.is_back, true) {
            return Ok(());
        }
        if self.has_moved {
            // To where it was held: before it goes to its program, the kernel looks there whether a system call is to be
            // restarted.
            let deadline = deadline.max(Instant::now() + RETURN);
            let interrupted = ptrace::interrupt(nix::unistd::Pid::from_raw(tid));
            interrupted.map_err(|errno| self.refused("interrupt")(errno.into()))?;
            loop {
                step();
                let signal = match await_stop(pid, tid, deadline)? {
                    Stop::Event => break,
                    Stop::Syscall => 0,
                    // A signal that a call has caused is not the program's: delivered, it would kill it.
                    Stop::Signal(libc::SIGSYS) => 0,
                    Stop::Signal(signal) => signal,
                };
                sys::go_on(tid, signal).map_err(self.refused("continue"))?;
            }
        }
        step();
        // As long as it would return through the frame, the mask may be either.
        sys::set_signal_mask(tid, self.mask).map_err(self.refused("unblock the signals of"))?;
        step();
        self.state.put(tid).map_err(self.refused("put back the registers of"))?;
        let put = self.memory.write_all_at(&self.covered, self.frame.start);
        put.map_err(|source| InjectError::File { action: "put back the stack of", pid, source })?;
        if self.has_filter {
            hold.suspend_filter(pid, tid, false).map_err(self.refused("put the seccomp filter in force of"))?;
        }
        Ok(())
    }

    /// Puts all back, if it can be, and leaves the thread to the hold. Whether it did.
    pub(super) fn put_back(&mut self, hold: &mut Hold, deadline: Instant) -> bool {
        let (pid, tid) = (self.pid, self.tid);
        let back = self.go_back(hold, deadline);
        if let Err(error) = &back
            && !matches!(error, InjectError::Died { .. })
        {
            let error = error as &dyn std::error::Error;
            tracing::error!(%pid, tid, error, "a thread is not back where it was before injected calls");
        }
        hold.note(pid, tid, Stand::Still { signal: 0 });
        back.is_ok()
    }
}

/// The frame of a thread, safe if that is possible; it is not if the code says so.
fn frame(code: &mut Code, state: &State, mask: u64, place: &Place<'_>) -> Option<Frame> {
    let (top, least) = match place {
        Place::Between(start, end) => (Some(*end), *start),
        Place::Stack(mappings) => {
            let room = mappings.iter().find(|mapping| mapping.is_writable() && holds(mapping, state.stack()))?;
            (state.below_stack(), room.range.start)
        }
    };
    let fits = |frame: &Frame| least <= frame.start;
    let safe = code.sigreturn.and_then(|sigreturn| state.frame(top?, sigreturn, mask, SCRATCH)).filter(fits);
    if safe.is_none() {
        code.sigreturn = None;
    }
    match place {
        Place::Stack(_) => safe.or_else(|| bare_frame(state).filter(fits)),
        Place::Between(..) => safe,
    }
}

/// Room for scratch bytes only, below the stack by what any function may use without saying so.
fn bare_frame(state: &State) -> Option<Frame> {
    let start = state.stack().checked_sub(2 * SCRATCH)? & !15;
    let length = usize::try_from(SCRATCH).ok()?;
    Some(Frame { start, scratch: start, bytes: vec![0; length] })
}

/// Takes a thread out of a restartable sequence as the kernel would, had it gone on: to its abort handler. With other
/// registers than those of its program, the kernel would not see that it is in one.
fn leave_restartable_sequence(memory: &File, tid: i32, state: &mut State) {
    if state.is_in_syscall() {
        return;
    }
    // From the ABI of rseq(2): the address of the sequence is at byte 8 of the area, and in the sequence at byte 8 its
    // start, then its length and the abort handler.
    let read = |address: u64| {
        let mut word = [0; 8];
        memory.read_exact_at(&mut word, address).ok().map(|()| u64::from_ne_bytes(word))
    };
    let Some(area) = sys::restartable_area(tid).filter(|area| *area != 0) else { return };
    let Some(sequence) = read(area + 8).filter(|sequence| *sequence != 0) else { return };
    if let (Some(start), Some(length), Some(abort)) = (read(sequence + 8), read(sequence + 16), read(sequence + 24))
        && state.instruction().wrapping_sub(start) < length
    {
        state.jump(abort);
    }
}

/// Tells whether a thread has a seccomp filter, or may only read and write.
fn has_filter(pid: HostPid, tid: i32) -> bool {
    Status::of_thread(pid, tid).is_ok_and(|status| status.number("Seccomp").is_some_and(|mode| mode != 0))
}

fn has_shadow_stack(pid: HostPid, tid: i32) -> bool {
    let has = |status: Status| status.field("x86_Thread_features").is_some_and(|features| features.contains("shstk"));
    Status::of_thread(pid, tid).is_ok_and(has)
}
