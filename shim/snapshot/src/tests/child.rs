//! Other processes that use a store: this test binary again.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use super::*;
use crate::{IfInUse, Import, Prune};

const WHAT: &str = "GPUSNAP_TEST_CHILD";
const ROOT: &str = "GPUSNAP_TEST_ROOT";
/// The test harness writes to the same stream.
const MARK: &str = "child: ";

pub(super) struct Other {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Other {
    /// Starts a process that does `what` in the store.
    pub(super) fn start(what: &str, store: &Store) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tests::child::what_the_other_processes_do", "--nocapture", "--test-threads=1"]);
        command.env(WHAT, what).env(ROOT, store.root()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next thing that it says it has done; None at its end.
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

    /// Kills it; what it had said that it has done.
    pub(super) fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.wait()
    }

    /// Waits until it ends.
    pub(super) fn wait(mut self) -> Vec<String> {
        let said = std::iter::from_fn(|| self.next()).collect();
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap();
        said
    }
}

fn say(what: &str) {
    let mut out = std::io::stdout();
    writeln!(out, "{MARK}{what}").unwrap();
    out.flush().unwrap();
}

/// Content of layer `n` of the `round`th snapshot: some of it comes again and again.
fn layer(round: usize, n: usize) -> Vec<u8> {
    if n == 0 { vec![1; 60_000] } else { format!("{}-{n}", round % 7).repeat(5000).into_bytes() }
}

fn publish_round(store: &Store, name: &str, round: usize) {
    let layers: Vec<Vec<u8>> = (0..4).map(|n| layer(round, n)).collect();
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    let digest = publish(store, name, &layers).unwrap().digest();
    say(&format!("{name} {digest}"));
}

#[test]
fn what_the_other_processes_do() {
    let (Ok(what), Some(root)) = (std::env::var(WHAT), std::env::var_os(ROOT)) else { return };
    let store = Store::open(Path::new(&root)).unwrap();
    say("ready");
    match what.as_str() {
        "publish" => (0..).for_each(|round| publish_round(&store, &format!("c/{}", round % 5), round)),
        "import" => {
            let mut archive = Vec::new();
            let kept = store.open_snapshot(&reference("kept/archive")).unwrap();
            kept.export(None, &mut archive, &|_| {}).unwrap();
            drop(kept);
            for round in 0.. {
                // Without it there is something to import.
                let name = name(&format!("c/{}", round % 3));
                let import = Import { name: Some(name.clone()), if_taken: IfTaken::Move };
                let digest = store.import(&*archive, import, &|_| {}).unwrap().digest();
                say(&format!("{name} {digest}"));
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
            // Until it is killed, or nobody is left who would.
            std::io::read_to_string(std::io::stdin()).unwrap();
            std::thread::sleep(Duration::from_secs(60));
        }
        writer => (0..20).for_each(|round| publish_round(&store, &format!("{writer}/{round}"), round)),
    }
}
