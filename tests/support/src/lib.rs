//! Programs and cgroups for unit tests.
//!
//! A program is this test binary again; an environment variable selects its play. Counters in the
//! program's memory show its progress. A role is a process that acts on such a program: a test that
//! is otherwise ignored ([`spawn_role`]).

#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "for tests only")]

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use proc::HostPid;

#[cfg(test)]
mod architecture;
pub mod skips;
#[allow(unsafe_code)]
pub mod sys;

const PLAY: &str = "GPUSNAP_TEST_PLAY";
const ROLE: &str = "GPUSNAP_TEST_ROLE";

/// Counters of the programs.
static VALUES: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];
/// Number of deliveries of each signal.
static DELIVERED: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];

/// A real-time signal: each one sent is delivered.
pub const REAL_TIME: i32 = 40;

/// A running program, killed when dropped.
pub struct Program {
    pub child: Child,
    input: ChildStdin,
    /// The program's own pid: the child's, or that of the child's child.
    pub pid: HostPid,
    /// The last thread to be set up.
    pub thread: i32,
    values: u64,
    delivered: u64,
    memory: File,
    /// File and content that thaw the program, so that a kill works.
    thaw: RefCell<Option<(PathBuf, &'static str)>>,
}

impl Program {
    /// Starts a program, and waits for all threads.
    pub fn play(name: &str) -> Self {
        Self::start(name, Command::new(own()))
    }

    /// Starts a program as the child of a shell that exits with the program's code.
    pub fn play_remote(name: &str) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", "\"$@\"; exit $?", "sh"]).arg(own());
        Self::start(name, command)
    }

    /// Starts a program in separate user and mount namespaces.
    pub fn play_apart(name: &str) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "--net"]).arg(own());
        Self::start(name, command)
    }

    fn start(name: &str, mut command: Command) -> Self {
        command.env(PLAY, name);
        Self::start_command(command)
    }

    fn start_command(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.find_map(|line| line.unwrap().split_once("ready ").map(|(_, rest)| rest.to_owned()));
        let numbers: Vec<u64> =
            ready.expect("the program says that it is ready").split(' ').map(|word| word.parse().unwrap()).collect();
        // Drain later output: the pipe must not fill.
        std::thread::spawn(move || lines.count());
        let pid = HostPid::new(i32::try_from(numbers[0]).unwrap()).unwrap();
        let thread = i32::try_from(numbers[1]).unwrap();
        let memory = File::open(format!("/proc/{pid}/task/{thread}/mem")).unwrap();
        Self { child, input, pid, thread, values: numbers[2], delivered: numbers[3], memory, thaw: RefCell::new(None) }
    }

    /// Starts a role that reports [`ready`].
    pub fn play_role(test: &str, argument: &str) -> Self {
        Self::start_command(role_command(test, argument))
    }

    fn read(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, address).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// A part of the program's memory.
    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_exact_at(&mut bytes, address).unwrap();
        bytes
    }

    pub fn value(&self, number: u64) -> u64 {
        self.read(self.values + 8 * number)
    }

    pub fn values(&self) -> [u64; 8] {
        std::array::from_fn(|number| self.value(number as u64))
    }

    pub fn delivered(&self, signal: i32) -> u64 {
        self.read(self.delivered + 8 * u64::try_from(signal).unwrap())
    }

    pub fn signal(&self, signal: i32) {
        sys::queue_signal(self.pid.raw(), signal).unwrap();
    }

    /// Writes a line to the program's input.
    pub fn write_line(&mut self) {
        self.input.write_all(b"line\n").unwrap();
    }

    /// Waits until a counter has moved.
    pub fn await_progress(&self, number: u64) {
        let before = self.value(number);
        await_that("a counter moves", || self.value(number) > before);
    }

    /// Returns whether none of these counters moves for a while.
    pub fn stands_still(&self, numbers: &[u64]) -> bool {
        let now = || numbers.iter().map(|number| self.value(*number)).collect::<Vec<_>>();
        let before = now();
        std::thread::sleep(Duration::from_millis(40));
        now() == before
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some((file, thawed)) = self.thaw.take() {
            let _ = fs::write(file, thawed);
        }
        let _ = rustix::process::kill_process(self.pid.as_pid(), rustix::process::Signal::KILL);
        let _ = self.child.kill();
        wait(&mut self.child);
    }
}

/// A cgroup with a freezer, removed when dropped: make the cgroup before the programs.
pub struct Freezer {
    directory: PathBuf,
    control: (&'static str, &'static str, &'static str),
}

impl Freezer {
    /// Makes a v1 freezer; prints the reason and returns `None` if that is impossible.
    pub fn v1() -> Option<Self> {
        Self::make(&["/sys/fs/cgroup/freezer"], ("freezer.state", "FROZEN", "THAWED"))
    }

    pub fn v2() -> Option<Self> {
        Self::make(&["/sys/fs/cgroup/unified", "/sys/fs/cgroup"], ("cgroup.freeze", "1", "0"))
    }

    /// All kinds of freezers on this machine.
    pub fn all() -> Vec<Self> {
        [Self::v1(), Self::v2()].into_iter().flatten().collect()
    }

    fn make(roots: &[&str], control: (&'static str, &'static str, &'static str)) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("gpusnap-cuda-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        for root in roots {
            let directory = Path::new(root).join(&name);
            if fs::create_dir(&directory).is_ok() {
                let freezer = Self { directory, control };
                if freezer.directory.join(control.0).exists() {
                    return Some(freezer);
                }
            }
        }
        eprintln!("skipped: no cgroup with a {} can be made in {roots:?}", control.0);
        None
    }

    pub fn add(&self, program: &Program) {
        fs::write(self.directory.join("cgroup.procs"), program.pid.to_string()).unwrap();
        program.thaw.replace(Some((self.directory.join(self.control.0), self.control.2)));
    }

    pub fn freeze(&self) {
        fs::write(self.directory.join(self.control.0), self.control.1).unwrap();
        await_that("the cgroup is frozen", || self.is_frozen());
    }

    pub fn is_frozen(&self) -> bool {
        let read = |file: &str| fs::read_to_string(self.directory.join(file)).unwrap();
        if self.is_v1() { read("freezer.state").trim() == "FROZEN" } else { read("cgroup.events").contains("frozen 1") }
    }

    pub fn is_v1(&self) -> bool {
        self.control.0 == "freezer.state"
    }

    pub fn thaw(&self) {
        fs::write(self.directory.join(self.control.0), self.control.2).unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.thaw();
        let end = Instant::now() + Duration::from_secs(2);
        while fs::remove_dir(&self.directory).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits for a condition, and fails otherwise.
pub fn await_that(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for a child's exit code; `None` after a signal, or if another waiter took the status.
#[expect(clippy::disallowed_methods, reason = "there is no reaper in these tests")]
pub fn wait(child: &mut Child) -> Option<i32> {
    child.wait().ok()?.code()
}

/// A deadline that only a failing test reaches.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn own() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// Starts a role: a test of this binary, otherwise ignored, in another process.
pub fn spawn_role(test: &str, argument: &str) -> Child {
    role_command(test, argument).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

fn role_command(test: &str, argument: &str) -> Command {
    let mut command = Command::new(own());
    command.args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"]).env(ROLE, argument);
    command
}

/// The argument of this process's role; `None` in a run of the tests. The role ends with the
/// parent.
pub fn role() -> Option<String> {
    let argument = std::env::var(ROLE).ok()?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    Some(argument)
}

/// Ends this process at once.
pub fn exit(code: i32) -> ! {
    sys::exit(code)
}

/// Reports that the setup is complete.
pub fn ready() {
    let address = |counters: &[AtomicU64]| counters.as_ptr() as usize;
    let pid = std::process::id();
    let thread = rustix::thread::gettid();
    println!("\nready {pid} {thread} {} {}", address(&VALUES), address(&DELIVERED));
    std::io::stdout().flush().unwrap();
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).unwrap();
}

fn count(number: usize) {
    VALUES[number].fetch_add(1, Ordering::Relaxed);
}

/// The thread of a driver, which takes no signals.
fn drivers_thread() {
    drivers_thread_that(|| {});
}

/// A driver's thread that repeats an action.
fn drivers_thread_that(does: impl Fn() + Send + 'static) {
    let (started, is_started) = std::sync::mpsc::channel();
    thread("cuda0123456789a", move || {
        SigSet::all().thread_block().unwrap();
        started.send(()).unwrap();
        loop {
            count(4);
            does();
            sys::sleep_once(1);
        }
    });
    is_started.recv().unwrap();
}

fn many() -> ! {
    drivers_thread();
    many_of_the_program()
}

fn many_of_the_program() -> ! {
    thread("computes", || sys::compute());
    thread("sleeps", || {
        loop {
            count(if sys::sleep_once(2) { 1 } else { 6 });
        }
    });
    thread("reads", || {
        for _ in std::io::stdin().lock().lines() {
            count(2);
        }
    });
    ready();
    loop {
        count(3);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends a signal to the driver's thread of a process; the thread polls for the signal.
pub fn tell_driver(pid: HostPid) {
    let mut tids = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|entry| entry.unwrap());
    let is_driver = |entry: &fs::DirEntry| fs::read(entry.path().join("comm")).unwrap() == b"cuda0123456789a\n";
    let driver = tids.find(is_driver).unwrap().file_name().into_string().unwrap();
    sys::signal_thread(pid.raw(), driver.parse().unwrap(), libc::SIGUSR1).unwrap();
}

/// The word at this byte of a staging area: every fourth 64 KiB are empty.
fn staged_word(at: u64) -> u64 {
    if at / 65536 % 4 == 3 { 0 } else { (at + 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) }
}

/// Plays a process with a staging area of some MiB, at the address in value 5. The content is
/// checked all the time: value 0 counts right rounds and value 7 wrong ones. A line of input
/// increments the second word of each page.
fn stage(mebibytes: u64) -> ! {
    let words = sys::map_words(mebibytes << 20, 0);
    let numbered = || words.iter().zip((0..).step_by(8));
    for (word, at) in numbered() {
        if staged_word(at) != 0 {
            word.store(staged_word(at), Ordering::Relaxed);
        }
    }
    VALUES[5].store(words.as_ptr() as u64, Ordering::Relaxed);
    drivers_thread();
    thread("checks", move || {
        loop {
            let is_right =
                |(word, at): (&AtomicU64, u64)| at % 4096 == 8 || word.load(Ordering::Relaxed) == staged_word(at);
            count(if numbered().all(is_right) { 0 } else { 7 });
        }
    });
    ready();
    for _ in std::io::stdin().lock().lines() {
        for page in words.chunks(512) {
            page[1].fetch_add(1, Ordering::Relaxed);
        }
        count(2);
    }
    sys::exit(0);
}

/// Plays a program, or nothing in a run of the tests. The play runs before `main`, in the first
/// thread and without other threads: the tests' `main` runs tests in another thread.
fn play() {
    let Ok(play) = std::env::var(PLAY) else { return };
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let (play, argument) = play.split_once(' ').unwrap_or((&play, ""));
    for signal in [libc::SIGUSR1, libc::SIGCONT, REAL_TIME] {
        sys::count_signal(signal);
    }
    match play {
        // 0 computes, 1 sleeps, 2 waits for input, 3 is the first thread, 4 is the driver's.
        "many" => many(),
        // Threads come and go all the time.
        "churn" => {
            drivers_thread();
            for _ in 0..3 {
                thread("parent", || {
                    loop {
                        let child = std::thread::spawn(|| count(0));
                        child.join().unwrap();
                        count(1);
                    }
                });
            }
            ready();
            loop {
                count(3);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // The first thread has ended, the others live.
        "headless" => {
            thread("sleeps", || {
                let first = std::process::id();
                await_that("the first thread has ended", || {
                    fs::read_to_string(format!("/proc/{first}/stat")).unwrap().contains(") Z ")
                });
                ready();
                loop {
                    count(1);
                    sys::sleep_once(1);
                }
            });
            sys::end_thread();
        }
        // The driver's thread makes a mapping, at value 5, at a signal.
        "maps" => {
            let mebibytes: u64 = argument.parse().unwrap();
            drivers_thread_that(move || {
                if VALUES[5].load(Ordering::Relaxed) == 0 && sys::is_pending(libc::SIGUSR1) {
                    let words = sys::map_words(mebibytes << 20, libc::MAP_POPULATE);
                    VALUES[5].store(words.as_ptr() as u64, Ordering::Relaxed);
                }
            });
            many_of_the_program();
        }
        "staging" => stage(argument.parse().unwrap()),
        // No further file can be opened.
        "staging-full" => {
            while File::open("/dev/zero").map(std::mem::forget).is_ok() {}
            stage(argument.parse().unwrap());
        }
        // The name looks like a driver's, and so do the threads'.
        "cuda-named" => {
            rustix::thread::set_name(c"cuda-server").unwrap();
            std::thread::spawn(|| {
                loop {
                    count(1);
                    sys::sleep_once(1);
                }
            });
            drivers_thread();
            ready();
            loop {
                count(3);
                sys::sleep_once(1);
            }
        }
        // Threads with a driver's kind of name: the driver's own, a later driver's, and one of the
        // program's.
        "cuda-threads" => {
            drivers_thread();
            let (started, is_started) = std::sync::mpsc::channel();
            for name in ["cuda-new-kind", "cuda-worker"] {
                let started = started.clone();
                thread(name, move || {
                    if name == "cuda-new-kind" {
                        SigSet::all().thread_block().unwrap();
                    }
                    started.send(()).unwrap();
                    loop {
                        count(1);
                        sys::sleep_once(1);
                    }
                });
                is_started.recv().unwrap();
            }
            ready();
            loop {
                count(3);
                sys::sleep_once(1);
            }
        }
        // One thread in one long system call after the other.
        "sleeper" => {
            let alternate = sys::set_alternate_stack();
            ready();
            loop {
                count(if sys::alternate_stack() == alternate { 5 } else { 7 });
                count(if sys::sleep_once(300) { 1 } else { 6 });
            }
        }
        // One thread that waits for input and then makes a system call for which a filter kills, or
        // sends SIGSYS.
        "filtered" => {
            let action = if argument == "trap" { libc::SECCOMP_RET_TRAP } else { libc::SECCOMP_RET_KILL_PROCESS };
            sys::filter(libc::SYS_getppid, action);
            ready();
            for _ in std::io::stdin().lock().lines() {
                count(2);
                let _ = rustix::process::getppid();
            }
        }
        // One thread that computes.
        "computer" => {
            ready();
            sys::compute();
        }
        // One thread that waits for input.
        "reader" => {
            ready();
            for line in std::io::stdin().lock().lines() {
                assert_eq!(line.unwrap(), "line");
                count(2);
            }
        }
        other => panic!("there is no program {other}"),
    }
}
