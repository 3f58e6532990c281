//! Driver calls, each made by a process that can be killed: a call on a frozen or stopped process never returns, and
//! takes whoever made it along.
//!
//! ```text
//!   guardian ──socket──► caller: loads libcuda, waits for a request, makes the call, answers, waits for the next
//!       └── kills one that misses its deadline; the target is as it was, and what it is told next it does
//! ```
//!
//! A caller keeps no capability but the one that the driver asks for.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use caps::{CapSet, Capability, CapsHashSet};
use proc::HostPid;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::driver::{CudaResult, Driver, GpuPair, ProcessState};
use crate::inventory::{self, Inventory};

/// First argument by which this binary knows that it is to be a caller.
pub const CALLER: &str = "cuda-caller";

/// What the driver asks of who calls it: to be allowed to trace the target.
const CAPABILITIES: [Capability; 1] = [Capability::CAP_SYS_PTRACE];

/// How often whoever waits for calls looks after other things.
pub const TICK: Duration = Duration::from_millis(20);
/// Loading libcuda takes some 20 ms; a node that is swapping may need seconds.
/// So it is how long a call may take that has nothing to wait for.
pub const SHORT_CALL: Duration = Duration::from_secs(30);

/// A request to a caller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// Says what state the process is in.
    State,
    /// Lets it start no more GPU work.
    Lock {
        /// How long to wait for what runs.
        timeout_ms: u32,
    },
    /// Moves its GPU state to its memory.
    Checkpoint,
    /// Moves it back.
    Restore {
        /// The GPUs that take the place of others: all, or none.
        pairs: Vec<Pair>,
    },
    /// Lets it go on.
    Unlock,
}

/// UUIDs of a GPU that was and of the one that takes its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// As NVML writes it: `GPU-` and 36 characters.
    pub old: String,
    /// Likewise.
    pub new: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    Call { pid: HostPid, call: Call },
    Inventory,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Done,
    State(ProcessState),
    Refused(CudaResult),
    Inventory(Inventory),
    /// There is no driver, or no such GPU.
    Impossible(String),
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It was done.
    Done,
    /// The state that was asked for.
    State(ProcessState),
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CallFailure {
    /// The driver has refused it.
    #[error("the driver answers {0}")]
    Refused(CudaResult),
    /// The deadline has passed.
    #[error("the driver does not answer")]
    Hangs,
    /// The process that the call is about has ended: no call was made.
    #[error("the process has ended")]
    Gone,
    /// The caller has ended.
    #[error("the process that calls the driver died")]
    Died,
    /// There is no driver, or no caller can be started.
    #[error("{0}")]
    Impossible(String),
}

/// Serves calls until the guardian hangs up. To be run by `main` when the first argument is [`CALLER`].
#[must_use]
pub fn caller_main() -> ExitCode {
    // For ps and for messages: a program that was started by /proc/self/exe is called exe.
    let _ = rustix::thread::set_name(c"cuda-caller");
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{CALLER}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    drop_capabilities()?;
    let driver = Driver::load();
    let mut requests = BufReader::new(socket.try_clone()?);
    let mut replies = socket;
    let mut line = String::new();
    loop {
        line.clear();
        if requests.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let reply = match (serde_json::from_str(&line)?, &driver) {
            (Request::Inventory, _) => {
                inventory::take().map_or_else(|error| Reply::Impossible(error.to_string()), Reply::Inventory)
            }
            (Request::Call { pid, call }, Ok(driver)) => make(driver, pid, call),
            (Request::Call { .. }, Err(error)) => Reply::Impossible(error.to_string()),
        };
        write_line(&mut replies, &reply)?;
    }
}

fn drop_capabilities() -> io::Result<()> {
    let kept = CapsHashSet::from(CAPABILITIES);
    let set = |set, kept: &CapsHashSet| caps::set(None, set, kept).map_err(io::Error::other);
    set(CapSet::Inheritable, &CapsHashSet::new())?;
    set(CapSet::Effective, &kept)?;
    set(CapSet::Permitted, &kept)
}

fn make(driver: &Driver, pid: HostPid, call: Call) -> Reply {
    let done = match call {
        Call::State => return driver.state(pid).map_or_else(Reply::Refused, Reply::State),
        Call::Lock { timeout_ms } => driver.lock(pid, timeout_ms),
        Call::Checkpoint => driver.checkpoint(pid),
        Call::Restore { pairs } => {
            let parsed: Option<Vec<GpuPair>> = pairs.iter().map(parse).collect();
            match parsed {
                Some(pairs) => driver.restore(pid, &pairs),
                None => return Reply::Impossible(format!("not the UUIDs of GPUs: {pairs:?}")),
            }
        }
        Call::Unlock => driver.unlock(pid),
    };
    done.map_or_else(Reply::Refused, |()| Reply::Done)
}

fn parse(pair: &Pair) -> Option<GpuPair> {
    Some(GpuPair { old: uuid(&pair.old)?, new: uuid(&pair.new)? })
}

/// `GPU-00112233-4455-6677-8899-aabbccddeeff` in bytes.
fn uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.strip_prefix("GPU-")?.chars().filter(|c| *c != '-').collect();
    if digits.len() != 32 || !digits.is_ascii() {
        return None;
    }
    u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)
}

/// Writes one message of the protocols between shim, guardian and callers.
///
/// # Errors
/// When nobody listens.
pub fn write_line(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// One caller, seen from the guardian. It is killed with this value.
#[derive(Debug)]
struct Caller {
    process: Child,
    replies: BufReader<UnixStream>,
}

impl Caller {
    fn spawn(program: &Path) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(program);
        command.arg(CALLER).stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        Ok(Self { process: command.spawn()?, replies: BufReader::new(ours) })
    }

    fn send(&mut self, request: &Request) -> io::Result<()> {
        write_line(self.replies.get_mut(), request)
    }

    fn receive(&mut self) -> io::Result<Reply> {
        let mut line = String::new();
        if self.replies.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Caller {
    #[expect(clippy::disallowed_methods, reason = "there is no reaper in a guardian, whose only children these are")]
    fn drop(&mut self) {
        // One that has ended already needs no signal, only its status taken.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The callers of one guardian.
#[derive(Debug)]
pub struct Callers {
    program: PathBuf,
    idle: Vec<Caller>,
}

impl Callers {
    /// `program` runs [`caller_main`] when it is given [`CALLER`].
    #[must_use]
    pub fn new(program: PathBuf) -> Self {
        Self { program, idle: Vec::new() }
    }

    /// Starts a caller, so that it has loaded the driver by the time it is needed.
    pub fn prepare(&mut self) {
        // If it cannot be started, whoever needs one will say so.
        self.idle.extend(Caller::spawn(&self.program));
    }

    /// Makes all these calls at the same time, each in a caller of its own, and gives their results in the same order.
    /// A caller that takes longer than `limit` is killed. Meanwhile `tick` is run again and again, after as long as it says
    /// each time at most.
    pub fn make(
        &mut self,
        calls: &[(HostPid, Call)],
        limit: Duration,
        tick: &mut dyn FnMut() -> Duration,
    ) -> Vec<Result<Answer, CallFailure>> {
        let requests = calls.iter().map(|(pid, call)| Request::Call { pid: *pid, call: call.clone() });
        let replies = self.ask(&requests.collect::<Vec<_>>(), limit, tick);
        let answer = |reply| match reply {
            Reply::Done => Ok(Answer::Done),
            Reply::State(state) => Ok(Answer::State(state)),
            Reply::Refused(result) => Err(CallFailure::Refused(result)),
            Reply::Impossible(why) => Err(CallFailure::Impossible(why)),
            Reply::Inventory(_) => Err(CallFailure::Died),
        };
        replies.into_iter().map(|reply| reply.and_then(answer)).collect()
    }

    /// What this node has of GPUs.
    ///
    /// # Errors
    /// When NVML is not there or does not answer by the deadline.
    pub fn inventory(&mut self, limit: Duration) -> Result<Inventory, CallFailure> {
        match self.ask(&[Request::Inventory], limit, &mut || TICK).pop() {
            Some(Ok(Reply::Inventory(inventory))) => Ok(inventory),
            Some(Ok(Reply::Impossible(why))) => Err(CallFailure::Impossible(why)),
            Some(Ok(_)) | None => Err(CallFailure::Died),
            Some(Err(failure)) => Err(failure),
        }
    }

    fn ask(
        &mut self,
        requests: &[Request],
        limit: Duration,
        tick: &mut dyn FnMut() -> Duration,
    ) -> Vec<Result<Reply, CallFailure>> {
        let mut asked: Vec<Result<Caller, CallFailure>> = requests.iter().map(|request| self.begin(request)).collect();
        let mut replies: Vec<Option<Result<Reply, CallFailure>>> = asked.iter().map(|_| None).collect();
        let deadline = Instant::now() + limit;
        let mut pause = Duration::ZERO;
        loop {
            let waiting: Vec<usize> =
                (0..asked.len()).filter(|&index| replies[index].is_none() && asked[index].is_ok()).collect();
            if waiting.is_empty() {
                break;
            }
            let now = Instant::now();
            if now >= deadline {
                break;
            }
            for index in ready(&asked, &waiting, pause.min(deadline - now)) {
                if let Ok(caller) = &mut asked[index] {
                    replies[index] = Some(caller.receive().map_err(|_| CallFailure::Died));
                }
            }
            pause = tick();
        }
        asked
            .drain(..)
            .zip(replies)
            .map(|(caller, reply)| {
                let caller = caller?;
                let reply = reply.ok_or(CallFailure::Hangs)?;
                // One that hangs, or broke off, is killed by being dropped.
                if reply.is_ok() {
                    self.idle.push(caller);
                }
                reply
            })
            .collect()
    }

    fn begin(&mut self, request: &Request) -> Result<Caller, CallFailure> {
        let cannot = |error: io::Error| {
            CallFailure::Impossible(format!("cannot start a process that calls the driver: {error}"))
        };
        while let Some(mut caller) = self.idle.pop() {
            // It may have been killed while it was idle.
            if caller.send(request).is_ok() {
                return Ok(caller);
            }
        }
        let mut caller = Caller::spawn(&self.program).map_err(cannot)?;
        caller.send(request).map_err(|_| CallFailure::Died)?;
        Ok(caller)
    }
}

/// Which of the waiting callers have something to say.
fn ready(asked: &[Result<Caller, CallFailure>], waiting: &[usize], timeout: Duration) -> Vec<usize> {
    let sockets: Vec<&UnixStream> =
        waiting.iter().filter_map(|&index| asked[index].as_ref().ok().map(|caller| caller.replies.get_ref())).collect();
    let mut polled: Vec<PollFd<'_>> = sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
    let timeout = Timespec::try_from(timeout).unwrap_or_default();
    // An interrupted or failed wait is one without a result.
    let _ = rustix::event::poll(&mut polled, Some(&timeout));
    waiting.iter().zip(&polled).filter(|(_, polled)| !polled.revents().is_empty()).map(|(&index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_as_nvml_writes_it() {
        let bytes = uuid("GPU-00112233-4455-6677-8899-aabbccddeeff").unwrap();
        assert_eq!(bytes[..4], [0, 0x11, 0x22, 0x33]);
        assert_eq!(bytes[15], 0xff);
        for wrong in ["00112233-4455-6677-8899-aabbccddeeff", "GPU-0011", "GPU-zz112233-4455-6677-8899-aabbccddeeff"] {
            assert_eq!(uuid(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_told() {
        let mut callers = Callers::new("/nowhere".into());
        let results = callers.make(&[(HostPid::own(), Call::State)], SHORT_CALL, &mut || TICK);
        assert!(matches!(&results[..], [Err(CallFailure::Impossible(why))] if why.contains("cannot start")));
    }

    #[test]
    fn a_caller_that_dies_is_told_from_one_that_hangs() {
        let mut dies = Callers::new("/bin/false".into());
        assert_eq!(dies.make(&[(HostPid::own(), Call::State)], SHORT_CALL, &mut || TICK), [Err(CallFailure::Died)]);
        // It is busy with its standard output for ever.
        let mut hangs = Callers::new("/usr/bin/yes".into());
        let limit = Duration::from_millis(200);
        assert_eq!(hangs.make(&[(HostPid::own(), Call::State)], limit, &mut || TICK), [Err(CallFailure::Hangs)]);
    }
}
