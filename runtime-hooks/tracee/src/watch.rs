//! Threads of a process, stopped at their system calls until one of them makes a populated mapping.

use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::unistd::Pid;
use proc::{HostPid, Range};

use crate::hold::sys::{self, AtCall};
use crate::hold::{self, Glance, Stop, glance};
use crate::inject::{InjectError, set_argument, step};

/// Pause between two looks at a thread that was told to stop.
const PAUSE: Duration = Duration::from_micros(50);

/// Numbers of the arguments of `mmap` that are length, access and flags.
const LENGTH: usize = 1;
const ACCESS: usize = 2;
const FLAGS: usize = 3;

/// Threads that this thread traces, until it has let go of them. Its end lets them go too.
#[derive(Debug)]
pub struct Watch {
    pid: HostPid,
    threads: Vec<i32>,
    asked: Option<Asked>,
    is_leaving: bool,
}

/// The thread that stands in the call for the mapping, and what it asks for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    tid: i32,
    length: u64,
    flags: u64,
}

/// Progress of the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// None has come to it.
    Nothing,
    /// One is about to make a populated mapping of so many bytes. It stands still until it is answered, or left.
    Asked {
        /// Number of threads.
        length: u64,
    },
    /// It has made it, without pages, and stands still until it is left.
    Made(Range),
    /// It was refused.
    Failed,
}

impl Watch {
    /// Begins with these threads of a process. Those that cannot be traced are not.
    pub fn begin(pid: HostPid, threads: Vec<i32>) -> Self {
        let seize = |tid: &i32| {
            let thread = Pid::from_raw(*tid);
            let seized = ptrace::seize(thread, ptrace::Options::PTRACE_O_TRACESYSGOOD);
            seized.and_then(|()| ptrace::interrupt(thread)).is_ok()
        };
        let threads = threads.into_iter().filter(seize).collect();
        step();
        Self { pid, threads, asked: None, is_leaving: false }
    }

    /// Returns the process.
    #[must_use]
    pub fn pid(&self) -> HostPid {
        self.pid
    }

    /// No thread is traced any more.
    pub fn is_over(&self) -> bool {
        self.threads.is_empty()
    }

    /// Lets those that stand still go on, unless one has come to what is waited for.
    pub fn look(&mut self) -> Result<Seen, InjectError> {
        if self.is_leaving {
            return self.leave().map(|()| Seen::Nothing);
        }
        let mut ended = Vec::new();
        for tid in self.threads.clone() {
            let signal = match self.glance(tid)? {
                Glance::Moving => continue,
                Glance::Dead | Glance::Gone => {
                    ended.push(tid);
                    continue;
                }
                Glance::Stop(Stop::Event) => 0,
                Glance::Stop(Stop::Signal(signal)) => signal,
                Glance::Stop(Stop::Syscall) => match self.at_call(tid)? {
                    Seen::Nothing => 0,
                    seen => return Ok(seen),
                },
            };
            self.go_on(tid, signal)?;
        }
        self.threads.retain(|tid| !ended.contains(tid));
        Ok(Seen::Nothing)
    }

    fn at_call(&mut self, tid: i32) -> Result<Seen, InjectError> {
        match sys::at_call(tid).map_err(self.refused("ask for the system call of", tid))? {
            AtCall::Begin { number, arguments } if is_populated(number, &arguments) => {
                let (length, flags) = (arguments[LENGTH], arguments[FLAGS]);
                self.asked = Some(Asked { tid, length, flags });
                Ok(Seen::Asked { length })
            }
            AtCall::End { returned } => Ok(match self.asked {
                Some(asked) if asked.tid == tid => match u64::try_from(returned) {
                    Ok(start) => Seen::Made(Range { start, end: start.saturating_add(asked.length) }),
                    Err(_) => Seen::Failed,
                },
                _ => Seen::Nothing,
            }),
            AtCall::Begin { .. } | AtCall::Elsewhere => Ok(Seen::Nothing),
        }
    }

    /// Lets the thread that has asked have its mapping without pages.
    pub fn answer_unpopulated(&mut self) -> Result<(), InjectError> {
        let Some(Asked { tid, flags, .. }) = self.asked else { return Ok(()) };
        let flags = flags & !u64::from(libc::MAP_POPULATE.cast_unsigned());
        step();
        set_argument(tid, FLAGS, flags).map_err(self.refused("set the registers of", tid))?;
        self.go_on(tid, 0)
    }

    /// Lets go of all that stand still and tells the others to; to be called again until [`Self::is_over`].
    pub fn leave(&mut self) -> Result<(), InjectError> {
        let mut left = Vec::new();
        for tid in self.threads.clone() {
            let signal = match self.glance(tid)? {
                Glance::Dead | Glance::Gone => continue,
                Glance::Moving => {
                    left.push(tid);
                    if !self.is_leaving {
                        // If it has ended since, it will be seen.
                        let _ = ptrace::interrupt(Pid::from_raw(tid));
                    }
                    continue;
                }
                Glance::Stop(Stop::Event | Stop::Syscall) => 0,
                Glance::Stop(Stop::Signal(signal)) => signal,
            };
            step();
            if sys::detach(tid, signal).is_err() {
                // It has been killed since.
                left.push(tid);
            }
        }
        self.threads = left;
        self.is_leaving = true;
        Ok(())
    }

    /// As [`Self::leave`], whatever the kernel says of single threads.
    pub fn abandon(&mut self) {
        if let Err(error) = self.leave() {
            tracing::debug!(pid = %self.pid, error = &error as &dyn std::error::Error, "cannot let go of a thread");
        }
    }

    /// Waits until all are let go. One that does not stop by the deadline stays traced as long as this process lives.
    pub fn finish(mut self, deadline: Instant) {
        self.abandon();
        while !self.is_over() {
            if Instant::now() >= deadline {
                tracing::error!(pid = %self.pid, threads = ?self.threads, "threads stay traced");
                return;
            }
            std::thread::sleep(PAUSE);
            self.abandon();
        }
    }

    /// Returns the activity of a thread. A thread that has ended is reaped.
    fn glance(&self, tid: i32) -> Result<Glance, InjectError> {
        let refused = self.refused("wait for", tid);
        let seen = glance(tid).map_err(&refused)?;
        if seen == Glance::Dead {
            hold::look(self.pid, tid).map_err(&refused)?;
        }
        Ok(seen)
    }

    fn go_on(&self, tid: i32, signal: i32) -> Result<(), InjectError> {
        step();
        match sys::go_on_to_syscall(tid, signal) {
            // It has been killed since.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            done => done.map_err(self.refused("continue", tid)),
        }
    }

    fn refused(&self, action: &'static str, tid: i32) -> impl Fn(std::io::Error) -> InjectError + use<> {
        let pid = self.pid;
        move |source| InjectError::Refused { action, pid, tid, source }
    }
}

/// Whether a call makes new private memory with pages in it.
fn is_populated(number: u64, arguments: &[u64; 6]) -> bool {
    let has = |argument: usize, bits: libc::c_int| {
        let bits = u64::from(bits.cast_unsigned());
        arguments[argument] & bits == bits
    };
    i64::try_from(number) == Ok(libc::SYS_mmap)
        && has(ACCESS, libc::PROT_READ | libc::PROT_WRITE)
        && has(FLAGS, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE)
}
