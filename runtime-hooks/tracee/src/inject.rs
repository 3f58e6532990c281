//! System calls made by a held process in place of its program.
//!
//! No instruction of the process is changed: one of its own `syscall` instructions is executed, one that returns right
//! after. Where it returns to is a signal frame below the stack of the thread that is used, with all that the thread
//! needs to go on. So a process whose injector dies at any moment makes at most the call that was begun, returns as from
//! a signal handler, and goes on with its program. Normally the thread never gets to that: it is stopped at the end of
//! each call, and its registers and what was below its stack are put back.
//!
//! The thread blocks all signals meanwhile; what is sent to it waits, except SIGKILL and SIGSTOP. Its seccomp filter is
//! suspended: what a filter does about a call that the program would not make may be to kill it. Where the kernel refuses that,
//! no call is made in a thread that has a filter.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use proc::{HostPid, Mapping};

#[cfg_attr(target_arch = "x86_64", path = "inject/x86_64.rs")]
#[cfg_attr(not(target_arch = "x86_64"), path = "inject/other.rs")]
mod machine;
mod team;
#[cfg(test)]
mod tests;
mod worker;

use crate::hold::{Glance, Hold, HoldError, Stand, Stop, glance, sys};
use crate::process;
use machine::State;
pub(crate) use machine::set_argument;
pub use team::Team;
use worker::{Frame, Place, Worker};

/// Bytes of the process's memory for what calls point to.
pub const SCRATCH: u64 = 256;

/// Bytes of a process's memory that are read at once in search of instructions.
const CHUNK: usize = 256 * 1024;

/// Bytes of a chunk that are searched again with the next: no sequence is longer.
const OVERLAP: usize = 15;

/// Pause between two looks for the end of a call.
const PAUSE: Duration = Duration::from_micros(20);

/// Why a call was not injected.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// Not on this architecture, or not into a program of this kind (a 32-bit one).
    #[error("cannot inject into process {pid}: not a program of a supported architecture")]
    Unsupported {
        /// The process.
        pid: HostPid,
    },
    /// Its threads do not stand still.
    #[error("cannot inject into process {pid}")]
    Hold {
        /// The process.
        pid: HostPid,
        /// Why not.
        #[source]
        source: HoldError,
    },
    /// No thread of it is held.
    #[error("cannot inject into process {pid}: none of its threads is held")]
    NotHeld {
        /// The process.
        pid: HostPid,
    },
    /// None of its code makes a system call.
    #[error("cannot inject into process {pid}: no system call instruction found in it")]
    NoInstruction {
        /// The process.
        pid: HostPid,
    },
    /// There is no room below the stack of the thread.
    #[error("cannot inject into process {pid}: no room on the stack of thread {tid}")]
    NoRoom {
        /// The process.
        pid: HostPid,
        /// The thread.
        tid: i32,
    },
    /// Something of /proc could not be read or written.
    #[error("cannot {action} process {pid}")]
    File {
        /// "read the memory of", ...
        action: &'static str,
        /// The process.
        pid: HostPid,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("cannot {action} thread {tid} of process {pid}")]
    Refused {
        /// "set the registers of", ...
        action: &'static str,
        /// The process.
        pid: HostPid,
        /// The thread.
        tid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The thread has a seccomp filter, which the kernel does not let this process suspend.
    #[error("cannot inject into thread {tid} of process {pid}: its seccomp filter cannot be suspended")]
    Filter {
        /// The process.
        pid: HostPid,
        /// The thread.
        tid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process was killed meanwhile.
    #[error("process {pid} has ended during an injected call")]
    Died {
        /// The process.
        pid: HostPid,
    },
    /// A call caused a signal instead of a result: a seccomp filter may do that.
    #[error("signal {signal} came up in thread {tid} of process {pid} in place of an injected call")]
    Signal {
        /// The process.
        pid: HostPid,
        /// The thread.
        tid: i32,
        /// The signal.
        signal: i32,
    },
    /// A call that prepares others failed.
    #[error("system call {number} in thread {tid} fails")]
    Answer {
        /// The thread.
        tid: i32,
        /// The call's number.
        number: i64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The deadline has passed. Frozen processes do not get anywhere.
    #[error("thread {tid} of process {pid} does not get through an injected call in time")]
    Deadline {
        /// The process.
        pid: HostPid,
        /// The thread.
        tid: i32,
    },
}

/// A moment at which this process may die. In tests some do.
pub(crate) fn step() {
    #[cfg(any(test, feature = "steps"))]
    crate::steps::step();
}

/// Places of the instructions.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "what injects there is not written yet"))]
#[derive(Clone, Copy, Debug)]
struct Code {
    /// A system call.
    call: u64,
    /// A return from a signal. Without it, the system call may have anything after it.
    sigreturn: Option<u64>,
}

/// A thread of a held process that makes system calls. When it goes, the thread is as it was, held.
#[derive(Debug)]
pub struct Injector<'h> {
    hold: &'h mut Hold,
    deadline: Instant,
    worker: Worker,
}

impl<'h> Injector<'h> {
    /// Prepares a thread of a process that is held. All its threads should be: what others do meanwhile may meet what
    /// the calls do.
    ///
    /// The deadline is that of all calls together.
    ///
    /// # Errors
    /// When no thread of it is held, or all do not stand still by the deadline, when it has no code to use, or the
    /// kernel refuses a request. Nothing of it has changed then.
    pub fn attach(hold: &'h mut Hold, pid: HostPid, deadline: Instant) -> Result<Self, InjectError> {
        hold.settle_only(pid, deadline).map_err(|source| InjectError::Hold { pid, source })?;
        let mappings = list(pid)?;
        let (tid, signal, mut state) = choose(hold, pid, &mappings)?;
        if signal != 0 {
            deliver(hold, pid, tid, signal, deadline)?;
            let refused = |source| InjectError::Refused { action: "read the registers of", pid, tid, source };
            state = State::of(tid).map_err(refused)?;
        }
        let memory = Rc::new(open(pid, tid)?);
        let code = find_code(&memory, &mappings).ok_or(InjectError::NoInstruction { pid })?;
        let worker = Worker::prepare(hold, (pid, tid), state, code, memory, &Place::Stack(&mappings))?;
        Ok(Self { hold, deadline, worker })
    }

    /// Whether the process goes on undisturbed if this process dies during a call. Not if its C library lacks one of the
    /// needed sequences of instructions, its stack has no room, or it uses a shadow stack.
    #[must_use]
    pub fn is_crash_safe(&self) -> bool {
        self.worker.is_crash_safe()
    }

    /// Writes bytes, [`SCRATCH`] at most, to where a call can read them, and says where. They stay until the next.
    ///
    /// # Errors
    /// When they are too many, or the process has gone.
    pub fn scratch(&mut self, bytes: &[u8]) -> Result<u64, InjectError> {
        self.worker.scratch(bytes)
    }

    /// Reads what a call has written to where [`Self::scratch`] said, from a byte on.
    ///
    /// # Errors
    /// When it is not all in there, or the process has gone.
    pub fn read_scratch(&self, from: u64, bytes: &mut [u8]) -> Result<(), InjectError> {
        self.worker.read_scratch(from, bytes)
    }

    /// The thread that makes the calls.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.worker.tid
    }

    /// Makes a system call. What it returns is as the kernel has it: a negative number is an error's.
    ///
    /// # Errors
    /// When it does not end by the deadline, the process dies, or the kernel refuses a request.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Result<i64, InjectError> {
        self.worker.call(number, arguments, self.deadline)
    }

    /// Puts all back.
    ///
    /// # Errors
    /// When the process has died, or the kernel refuses a request.
    pub fn finish(mut self) -> Result<(), InjectError> {
        self.worker.go_back(self.hold, self.deadline)
    }
}

impl Drop for Injector<'_> {
    fn drop(&mut self) {
        self.worker.put_back(self.hold, self.deadline);
    }
}

fn list(pid: HostPid) -> Result<Vec<Mapping>, InjectError> {
    proc::mappings(pid).map_err(|source| InjectError::File { action: "read the mappings of", pid, source })
}

fn open(pid: HostPid, tid: i32) -> Result<File, InjectError> {
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/task/{tid}/mem"));
    memory.map_err(|source| InjectError::File { action: "open the memory of", pid, source })
}

/// Returns the result of a system call, as a C library has it.
pub fn answer(returned: i64) -> io::Result<i64> {
    // The kernel's numbers of errors.
    match i32::try_from(returned) {
        Ok(error @ -4095..=-1) => Err(io::Error::from_raw_os_error(-error)),
        _ => Ok(returned),
    }
}

/// A number as an argument of a system call.
pub fn argument(number: i32) -> u64 {
    i64::from(number).cast_unsigned()
}

fn await_stop(pid: HostPid, tid: i32, deadline: Instant) -> Result<Stop, InjectError> {
    loop {
        let glance = glance(tid);
        match glance.map_err(|source| InjectError::Refused { action: "wait for", pid, tid, source })? {
            Glance::Stop(stop) => return Ok(stop),
            Glance::Dead | Glance::Gone => return Err(InjectError::Died { pid }),
            // It will not stop any more, and may have to be reaped after others.
            Glance::Moving if process::is_ending(pid, tid) => return Err(InjectError::Died { pid }),
            Glance::Moving if Instant::now() >= deadline => return Err(InjectError::Deadline { pid, tid }),
            Glance::Moving => std::thread::sleep(PAUSE),
        }
    }
}

/// The thread to use, with the signal in whose delivery it stands. Best is one that is in none, in a system call (so not in
/// the middle of something that the kernel would undo), and on the first thread's stack, which has nothing below it.
/// A runtime with small stacks of its own has other things right below them: they are put back, but not if this
/// process dies.
fn choose(hold: &Hold, pid: HostPid, mappings: &[Mapping]) -> Result<(i32, i32, State), InjectError> {
    let stack = mappings.iter().find(|mapping| mapping.path == Path::new("[stack]"));
    let mut best = None;
    let mut best_rank = None;
    for (tid, signal) in hold.still(pid) {
        let action = "read the registers of";
        let state = State::of(tid).map_err(|source| InjectError::Refused { action, pid, tid, source })?;
        let is_on_stack = stack.is_some_and(|stack| holds(stack, state.stack()));
        let rank = Some((signal == 0, is_on_stack, state.is_in_syscall()));
        if rank > best_rank {
            best_rank = rank;
            best = Some((tid, signal, state));
        }
    }
    best.ok_or(InjectError::NotHeld { pid })
}

/// Lets a thread take the signal in whose delivery it stands. It does not get to its program: if there is a handler,
/// it stops where that begins.
fn deliver(hold: &mut Hold, pid: HostPid, tid: i32, signal: i32, deadline: Instant) -> Result<(), InjectError> {
    let refused = |action| move |source| InjectError::Refused { action, pid, tid, source };
    let mut signal = signal;
    while signal != 0 {
        ptrace::interrupt(nix::unistd::Pid::from_raw(tid)).map_err(|errno| refused("interrupt")(errno.into()))?;
        sys::go_on(tid, signal).map_err(refused("continue"))?;
        hold.note(pid, tid, Stand::Called);
        signal = match await_stop(pid, tid, deadline)? {
            Stop::Signal(next) => next,
            Stop::Event | Stop::Syscall => 0,
        };
    }
    hold.note(pid, tid, Stand::Still { signal: 0 });
    Ok(())
}

/// Looks for the instructions in the code that a process has mapped, first where they are in most programs.
fn find_code(memory: &File, mappings: &[Mapping]) -> Option<Code> {
    let mut texts: Vec<_> = mappings.iter().filter(|mapping| mapping.is_executable()).collect();
    texts.retain(|text| is_vdso(text) || (text.inode != 0 && !text.path.starts_with("/dev")));
    texts.sort_by_key(|text| {
        let name = text.path.file_name().unwrap_or_default().as_bytes();
        // The loaders of glibc and musl: they have both, and glibc's is much smaller than its library.
        (!name.starts_with(b"ld-"), !name.starts_with(b"libc"), !is_vdso(text))
    });
    let (mut call, mut sigreturn, mut bare) = (None, None, None);
    for text in texts {
        search(memory, text, |at, bytes| {
            let address = |offset: usize| u64::try_from(offset).ok().map(|offset| at + offset);
            call = call.or_else(|| machine::find_call(bytes).and_then(address));
            sigreturn = sigreturn.or_else(|| machine::find_sigreturn(bytes).and_then(address));
            bare = bare.or_else(|| machine::find_bare_call(bytes).and_then(address));
            call.is_some() && sigreturn.is_some()
        });
        if call.is_some() && sigreturn.is_some() {
            break;
        }
    }
    match call {
        Some(call) => Some(Code { call, sigreturn }),
        None => bare.map(|call| Code { call, sigreturn: None }),
    }
}

/// Reads a mapping piece by piece until `found` says that it is enough. What cannot be read is left out.
fn search(memory: &File, text: &Mapping, mut found: impl FnMut(u64, &[u8]) -> bool) {
    let mut buffer = vec![0; CHUNK];
    let mut at = text.range.start;
    while at < text.range.end {
        let wanted = usize::try_from(text.range.end - at).map_or(CHUNK, |rest| rest.min(CHUNK));
        let Ok(read) = memory.read_at(&mut buffer[..wanted], at) else { return };
        if found(at, &buffer[..read]) || read <= OVERLAP {
            return;
        }
        let step = if read == wanted && wanted < CHUNK { read } else { read - OVERLAP };
        at += u64::try_from(step).unwrap_or(u64::MAX - at);
    }
}

fn is_vdso(mapping: &Mapping) -> bool {
    mapping.path == Path::new("[vdso]")
}

fn holds(mapping: &Mapping, address: u64) -> bool {
    // A stack pointer may be at the very end of its stack.
    mapping.range.start < address && address <= mapping.range.end
}
