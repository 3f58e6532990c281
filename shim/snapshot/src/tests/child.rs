//! Other processes that use a store: this test binary, started again.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::{IfInUse, Import, Prune};

const WHAT: &str = "GPUSNAP_TEST_CHILD";
const STEP: &str = "GPUSNAP_TEST_STEP";
/// File beside the store.
const ARCHIVE: &str = "archive.tar";
const ROOT: &str = "GPUSNAP_TEST_ROOT";
/// Mark of our lines: the test harness writes to the same stream.
const MARK: &str = "child: ";

/// Puts an archive beside a store for a process that imports.
pub(super) fn prepare_archive(store: &Store) {
    let elsewhere = World::new();
    let snapshot = elsewhere.publish("imported/x", &[b"new", &[6; 100_000], &[7; 100_000]]);
    let file = std::fs::File::create(store.root().with_file_name(ARCHIVE)).unwrap();
    snapshot.export(Some(&name("imported/x")), file, &|_| {}).unwrap();
}

pub(super) struct Other {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Other {
    /// Starts a process that does `what` in the store.
    pub(super) fn start(what: &str, store: &Store) -> Self {
        Self::start_until(what, store, usize::MAX)
    }

    /// Starts a process that dies instead of change `step` of the disk.
    pub(super) fn start_until(what: &str, store: &Store, step: usize) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tests::child::what_the_other_processes_do", "--nocapture", "--test-threads=1"]);
        command
            .env(WHAT, what)
            .env(ROOT, store.root())
            .env(STEP, step.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next step that the process reports; `None` at the end.
    pub(super) fn next(&mut self) -> Option<String> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some((_, said)) = line.split_once(MARK)
                && let Some(said) = said.strip_suffix('\n')
            {
                return Some(said.to_owned());
            }
        }
    }

    /// Kills the process; returns all its reports.
    pub(super) fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.wait()
    }

    /// Waits for the process's end; returns all its reports.
    pub(super) fn wait(mut self) -> Vec<String> {
        let said = std::iter::from_fn(|| self.next()).collect();
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap();
        said
    }
}

/// Steps since the beginning of the work, and the fatal step.
static STEPS: (AtomicUsize, OnceLock<usize>) = (AtomicUsize::new(0), OnceLock::new());

/// Counts a change of the disk, and dies at the fatal one.
pub(crate) fn step() {
    if STEPS.1.get().is_some_and(|last| STEPS.0.fetch_add(1, Ordering::Relaxed) == *last) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

fn say(what: &str) {
    let mut out = std::io::stdout();
    writeln!(out, "{MARK}{what}").unwrap();
    out.flush().unwrap();
}

/// Content of layer `n` of the `round`th snapshot: some content recurs.
fn layer(round: usize, n: usize) -> Vec<u8> {
    if n == 0 { vec![1; 60_000] } else { format!("{}-{n}", round % 7).repeat(5000).into_bytes() }
}

fn publish_round(store: &Store, name: &str, round: usize) {
    let own = format!("{name} {round}").into_bytes();
    let layers: Vec<Vec<u8>> = (0..4).map(|n| layer(round, n)).chain([own]).collect();
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    let digest = publish(store, name, &layers).unwrap().digest();
    say(&format!("{name} {digest}"));
}

#[test]
fn what_the_other_processes_do() {
    let (Ok(what), Some(root)) = (std::env::var(WHAT), std::env::var_os(ROOT)) else { return };
    let root = Path::new(&root);
    let count_steps = || STEPS.1.set(std::env::var(STEP).unwrap().parse().unwrap()).unwrap();
    if what == "open once" {
        count_steps();
        drop(publish(&Store::open(&root.with_file_name("new")).unwrap(), "default/a", &[b"x"]).unwrap());
        return say("done");
    }
    let store = Store::open(root).unwrap();
    say("ready");
    count_steps();
    match what.as_str() {
        "publish once" => {
            publish_round(&store, "once/a", 0);
            publish_round(&store, "once/b", 1);
            // Move the name back and forth.
            publish_round(&store, "once/a", 1);
            say("done");
        }
        "remove once" => {
            publish_round(&store, "once/a", 0);
            publish_round(&store, "once/b", 1);
            store.remove(&reference("once/a"), IfInUse::Wait).unwrap();
            store.enforce_quota(1).unwrap();
            say("done");
        }
        "publish" => {
            for round in 0.. {
                publish_round(&store, &format!("c/{}", round % 5), round);
            }
        }
        "import" | "import once" => {
            let archive = std::fs::read(root.with_file_name(ARCHIVE)).unwrap();
            loop {
                drop(store.import(&*archive, Import::default(), &|_| {}).unwrap());
                say("imported/x");
                if what == "import once" {
                    return say("done");
                }
                // Leave something to import.
                store.remove(&reference("imported/x"), IfInUse::Wait).unwrap();
            }
        }
        "remove" => {
            for round in 0.. {
                publish(&store, "gone/x", &[&layer(round, 0), &layer(round, 1)]).unwrap();
                store.remove(&reference("gone/x"), IfInUse::Wait).unwrap();
                store.prune(Prune { grace: Duration::ZERO, unnamed: Some(Duration::ZERO) }).unwrap();
                say("removed");
            }
        }
        "use" => {
            let snapshot = store.open_snapshot(&reference("kept/archive")).unwrap();
            say(&snapshot.digest().to_string());
            // Wait for the kill, or for the end of the parent.
            std::io::read_to_string(std::io::stdin()).unwrap();
            std::thread::sleep(Duration::from_secs(60));
        }
        writer => (0..20).for_each(|round| publish_round(&store, &format!("{writer}/{round}"), round)),
    }
}
