//! The driver's side in a process with CUDA: initialisation and threads.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, IntoRawFd, RawFd};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;
use std::{env, io};

use crate::checkpoint;
use crate::code::{Code, Result};
use crate::control::{self, Control, Operation, Request, state};
use crate::gate::{Gate, Pass};
use crate::options::Options;
use crate::state as driver;
use crate::sys::memory::{ControlPage, PAGE, Region};
use crate::sys::os::{self, Scope};

/// The CUDA lock of this process.
static GATE: Gate = Gate::new();

/// Result of cuInit.
struct Target {
    pid: i32,
    control: &'static Control,
}

static TARGET: OnceLock<Target> = OnceLock::new();

/// Initialises, like cuInit. After a success nothing more happens; in a child of fork cuInit cannot
/// work.
pub(crate) fn init() -> Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if let Some(target) = TARGET.get() {
        return if target.pid == os::pid() { Ok(()) } else { Err(Code::NOT_INITIALIZED) };
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if TARGET.get().is_some() {
        return Ok(());
    }
    crate::node::prepare();
    let file = env::var("FAKE_CUDA_FILE").ok().and_then(|path| CString::new(path).ok());
    let text = env::var("FAKE_CUDA").unwrap_or_default();
    let Ok(mut options) = Options::parse(&text) else {
        os::complain("fake-cuda: FAKE_CUDA has an option that does not exist\n");
        return Err(Code::INVALID_VALUE);
    };
    if let Some(in_file) = file.as_deref().and_then(|file| options_in(file, &mut [0; 1024])) {
        options = in_file;
    }
    let mut state = driver::lock();
    state.discover()?;
    let memory = Region::anonymous(16 * PAGE)?;
    let (page, descriptor) = ControlPage::create()?;
    let control = page.leak();
    control.pid.store(os::pid(), SeqCst);
    state.control = Some(control);
    state.driver_memory = Some(memory);
    // The descriptor stays open for callers to find, and for the thread's questions about locks.
    let server = Server { control, descriptor: descriptor.into_raw_fd(), options, file, counters: Counters::default() };
    let name = format!("cuda{:011x}", memory.address() & 0xfff_ffff_ffff);
    spawn(Some(name), move || server.serve())?;
    if options.poll {
        spawn(None, move || {
            loop {
                memory.peek();
                thread::sleep(Duration::from_millis(1));
            }
        })?;
    }
    control.magic.store(control::MAGIC, SeqCst);
    let _first = TARGET.set(Target { pid: os::pid(), control });
    Ok(())
}

fn spawn(name: Option<String>, run: impl FnOnce() + Send + 'static) -> Result<()> {
    let builder = match name {
        Some(name) => thread::Builder::new().name(name),
        None => thread::Builder::new(),
    };
    let started: io::Result<_> = os::without_signals(|| builder.stack_size(256 << 10).spawn(run));
    started.map(drop).map_err(|_| Code::OPERATING_SYSTEM)
}

/// Starts the thread of the first context, which sleeps for ever.
pub(crate) fn start_event_handler() -> Result<()> {
    static STARTED: OnceLock<()> = OnceLock::new();
    if STARTED.set(()).is_err() {
        return Ok(());
    }
    spawn(Some("cuda-EvtHandlr".to_owned()), || {
        let never = AtomicU32::new(0);
        loop {
            os::wait(&never, 0, Scope::Process, None);
        }
    })
}

/// Begins a call; waits while the process is locked or checkpointed.
pub(crate) fn enter() -> Result<Pass<'static>> {
    let target = TARGET.get().filter(|target| target.pid == os::pid()).ok_or(Code::NOT_INITIALIZED)?;
    let pass = GATE.enter();
    if target.control.state.load(SeqCst) == state::FAILED {
        return Err(Code::UNKNOWN);
    }
    Ok(pass)
}

/// Reads driver memory for that long, like a thread that the lock does not stop. Returns the number
/// of reads.
pub(crate) fn poll(time: Duration) -> Result<u32> {
    let memory = driver::lock().driver_memory.ok_or(Code::NOT_INITIALIZED)?;
    let end = os::now() + u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 2);
    let mut reads = 0_u32;
    while os::now() < end {
        memory.peek();
        reads = reads.wrapping_add(1);
        thread::sleep(Duration::from_micros(200));
    }
    Ok(reads)
}

/// Injected failures so far, since the options last changed.
#[derive(Default)]
struct Counters {
    options: Options,
    locks_failed: u32,
    checkpoint_failed: bool,
    restore_failed: bool,
    hung: bool,
}

/// The driver's thread that serves requests.
struct Server {
    control: &'static Control,
    descriptor: RawFd,
    options: Options,
    file: Option<CString>,
    counters: Counters,
}

impl Server {
    fn serve(mut self) {
        loop {
            let number = self.control.request.load(SeqCst);
            if number == self.control.answer.load(SeqCst) || !number.is_multiple_of(2) {
                os::wait(&self.control.request, number, Scope::Shared, None);
                continue;
            }
            let Some(request) = self.control.read(number) else { continue };
            if self.is_wanted(&request) {
                let result = match self.perform(&request) {
                    Ok(()) => 0,
                    Err(Code(code)) => code,
                };
                self.control.result.store(result, SeqCst);
            }
            self.control.answer.store(number, SeqCst);
            os::wake(&self.control.answer, Scope::Shared);
        }
    }

    /// Returns whether the caller is still there.
    fn is_wanted(&self, request: &Request) -> bool {
        os::is_locked(self.descriptor, u64::from(request.number))
    }

    fn perform(&mut self, request: &Request) -> Result<()> {
        let Some(operation) = request.operation else { return Err(Code::INVALID_VALUE) };
        self.read_options();
        self.hang(operation, request)?;
        let state = self.control.state.load(SeqCst);
        match operation {
            Operation::State | Operation::RestoreThread => Ok(()),
            Operation::Lock if state == state::RUNNING => self.lock(request),
            Operation::Checkpoint if state == state::LOCKED => self.checkpoint(),
            Operation::Restore if state == state::CHECKPOINTED => self.restore(request),
            Operation::Unlock if state == state::LOCKED => self.unlock(),
            _ => Err(Code::ILLEGAL_STATE),
        }
    }

    fn read_options(&mut self) {
        let mut buffer = [0; 1024];
        if let Some(options) = self.file.as_deref().and_then(|file| options_in(file, &mut buffer)) {
            self.options = options;
        }
        if self.counters.options != self.options {
            self.counters = Counters { options: self.options, ..Counters::default() };
        }
    }

    /// Leaves one request unanswered, until the time is over or the caller gone.
    fn hang(&mut self, operation: Operation, request: &Request) -> Result<()> {
        let Some((at, limit)) = self.options.hang_at else { return Ok(()) };
        if at != operation || self.counters.hung {
            return Ok(());
        }
        self.counters.hung = true;
        let mut waited = 0;
        while limit.is_none_or(|limit| waited < limit) {
            if !self.is_wanted(request) {
                return Err(Code::NOT_READY);
            }
            sleep(5);
            waited += 5;
        }
        Ok(())
    }

    fn crash(&self, operation: Operation) {
        if self.options.crash_at == Some(operation) {
            os::crash();
        }
    }

    fn lock(&mut self, request: &Request) -> Result<()> {
        sleep(self.options.lock_ms);
        let timeout = u64::from(request.timeout_ms);
        let end = (timeout > 0).then(|| os::now() + timeout * 1_000_000);
        if self.counters.locks_failed < self.options.lock_fails {
            self.counters.locks_failed += 1;
            sleep(timeout);
            return Err(Code::NOT_READY);
        }
        let give_up = || end.is_some_and(|end| os::now() >= end) || !self.is_wanted(request);
        if !GATE.close(give_up) {
            return Err(Code::NOT_READY);
        }
        let mut state = driver::lock();
        while state.is_busy() {
            if give_up() {
                drop(state);
                GATE.open();
                return Err(Code::NOT_READY);
            }
            sleep(1);
        }
        state.settle();
        self.control.state.store(state::LOCKED, SeqCst);
        self.crash(Operation::Lock);
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<()> {
        if let Some(failure) = self.options.checkpoint_fails
            && (failure.always || !self.counters.checkpoint_failed)
        {
            self.counters.checkpoint_failed = true;
            return Err(Code(failure.code));
        }
        sleep(self.options.checkpoint_ms / 2);
        if self.options.fail_state {
            self.control.state.store(state::FAILED, SeqCst);
            // The program's calls fail from now on.
            GATE.open();
            return Err(Code::UNKNOWN);
        }
        checkpoint::save(&mut driver::lock())?;
        sleep(self.options.checkpoint_ms.div_ceil(2));
        self.crash(Operation::Checkpoint);
        self.control.state.store(state::CHECKPOINTED, SeqCst);
        self.control.devices.store(0, SeqCst);
        Ok(())
    }

    fn restore(&mut self, request: &Request) -> Result<()> {
        if let Some(failure) = self.options.restore_fails
            && (failure.always || !self.counters.restore_failed)
        {
            self.counters.restore_failed = true;
            return Err(Code(failure.code));
        }
        sleep(self.options.restore_ms / 2);
        let mut state = driver::lock();
        checkpoint::load(&mut state, &request.pairs[..request.pair_count])?;
        sleep(self.options.restore_ms.div_ceil(2));
        self.crash(Operation::Restore);
        self.control.state.store(state::LOCKED, SeqCst);
        state.publish();
        Ok(())
    }

    fn unlock(&mut self) -> Result<()> {
        self.crash(Operation::Unlock);
        self.control.state.store(state::RUNNING, SeqCst);
        GATE.open();
        Ok(())
    }
}

/// The options in the file named by FAKE_CUDA_FILE, in the place of FAKE_CUDA's; `None` without
/// such a file.
fn options_in(file: &CStr, buffer: &mut [u8]) -> Option<Options> {
    let file = os::open(file, false)?;
    let text = str::from_utf8(os::read(file.as_fd(), buffer)).unwrap_or("not text");
    match Options::parse(text) {
        Ok(options) => Some(options),
        Err(_) => {
            os::complain("fake-cuda: the file of FAKE_CUDA_FILE has an option that does not exist\n");
            None
        }
    }
}

fn sleep(milliseconds: u64) {
    if milliseconds > 0 {
        thread::sleep(Duration::from_millis(milliseconds));
    }
}
