//! The end-to-end suite: every test on every target. See ../README.md.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use e2e::bed::{self, Bed};
use e2e::target::{TARGETS, Target};
use e2e::{Case, Skip, Test};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

mod bad_input;
mod checkpoint_cri;
mod checkpoint_ctr;
mod checkpoint_faults;
mod checkpoint_kills;
mod checkpoint_memory;
mod checkpoint_nerdctl;
mod checkpoint_sockets;
mod checkpoint_waits;
mod checkpoint_workloads;
mod cost;
mod cri_pods;
mod ctr_events;
mod ctr_exit;
mod ctr_io;
mod ctr_reaping;
mod fault_matrix;
mod gpu;
mod nerdctl_life;
mod nerdctl_run;
mod robustness;
mod security;
mod spec;

fn cases() -> Vec<Case> {
    [
        ctr_exit::cases(),
        ctr_events::cases(),
        ctr_reaping::cases(),
        ctr_io::cases(),
        nerdctl_run::cases(),
        nerdctl_life::cases(),
        security::cases(),
        spec::cases(),
        cri_pods::cases(),
        bad_input::cases(),
        robustness::cases(),
        cost::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Environment variable with the targets of the tests of checkpoint and restore, in the form of
/// [`TARGETS`] (default: the same). These tests take as long as all others together.
const CHECKPOINT_TARGETS: &str = "GPUSNAP_E2E_CHECKPOINT_TARGETS";

/// Environment variable that leaves out all other tests.
const ONLY_CHECKPOINTS: &str = "GPUSNAP_E2E_ONLY_CHECKPOINTS";

fn checkpoint_cases() -> Vec<Case> {
    [
        checkpoint_ctr::cases(),
        checkpoint_nerdctl::cases(),
        checkpoint_sockets::cases(),
        checkpoint_workloads::cases(),
        checkpoint_cri::cases(),
        checkpoint_faults::cases(),
        checkpoint_waits::cases(),
        checkpoint_memory::cases(),
        checkpoint_kills::cases(),
        fault_matrix::cases(),
        gpu::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Tests wait for other processes most of the time.
    arguments.test_threads.get_or_insert(4);
    let list = std::env::var(TARGETS).unwrap_or_default();
    let trials = match trials(&list) {
        Ok(trials) => trials,
        Err(error) => {
            eprintln!("e2e: {error}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.list {
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    if !Bed::is_here() {
        eprintln!("e2e: this is not the test bed, and there is no containerd to test: use `make test-e2e`");
        return ExitCode::FAILURE;
    }
    let before = left_behind();
    let conclusion = libtest_mimic::run(&arguments, trials);
    tell_the_longest();
    let mut clean = true;
    for bed in Bed::take_shared() {
        if let Err(error) = bed.stop() {
            eprintln!("e2e: containerd of {} does not stop: {error:#}", bed.target());
            clean = false;
        }
    }
    // Every test has cleaned up, so no container may have leftovers now.
    let left: Vec<String> = left_behind().difference(&before).cloned().collect();
    if !left.is_empty() {
        eprintln!("e2e: left behind by the tests together:\n{}", left.join("\n"));
        clean = false;
    }
    if clean { conclusion.exit_code() } else { ExitCode::FAILURE }
}

fn left_behind() -> BTreeSet<String> {
    bed::leaks().unwrap_or_else(|error| BTreeSet::from([format!("{error:#}")]))
}

/// All tests on all targets: first the tests with company, then those that run alone.
fn trials(list: &str) -> Result<Vec<Trial>> {
    let mut trials = Vec::new();
    let only_checkpoints = std::env::var_os(ONLY_CHECKPOINTS).is_some();
    let with_checkpoints = Target::chosen(&std::env::var(CHECKPOINT_TARGETS).unwrap_or_default())?;
    for alone in [false, true] {
        for target in Target::chosen(list)? {
            let checkpoints = if with_checkpoints.contains(&target) { checkpoint_cases() } else { Vec::new() };
            let others = if only_checkpoints { Vec::new() } else { cases() };
            let cases = others.into_iter().chain(checkpoints).filter(|case| case.alone == alone);
            trials.extend(cases.map(|case| trial(case, target)));
        }
    }
    Ok(trials)
}

/// Held for reading by ordinary tests, for writing by tests that run alone.
static COMPANY: RwLock<()> = RwLock::new(());

/// Duration of each test, without the wait for its company.
static TOOK: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// Prints the longest tests, for work on a shorter suite.
fn tell_the_longest() {
    const LISTED: usize = 25;
    let mut took = std::mem::take(&mut *TOOK.lock().unwrap_or_else(PoisonError::into_inner));
    took.sort_by(|one, other| other.cmp(one));
    let sum: Duration = took.iter().map(|(took, _)| *took).sum();
    println!("\ne2e: {} tests took {} s together; the longest:", took.len(), sum.as_secs());
    for (took, name) in took.iter().take(LISTED) {
        println!("{:>7.1} s  {name}", took.as_secs_f64());
    }
}

fn trial(case: Case, target: Target) -> Trial {
    Trial::ignorable_test(format!("{target}: {}", case.name), move || {
        if let Some(reason) = case.skipped_on(target) {
            return Ok(Completion::ignored_with(reason));
        }
        let (_some, _none);
        if case.alone {
            _none = COMPANY.write().unwrap_or_else(PoisonError::into_inner);
        } else {
            _some = COMPANY.read().unwrap_or_else(PoisonError::into_inner);
        }
        let since = Instant::now();
        let bed = Bed::shared(target).map_err(|error| Failed::from(format!("{error:#}")))?;
        let test = Test::new(bed);
        let result = run(&test, case.body);
        let outcome = match result.map_err(anyhow::Error::downcast::<Skip>) {
            Ok(()) => Ok(Completion::Completed),
            Err(Ok(skip)) if support::skips::is_listed("e2e", case.name, &skip.0) => Ok(Completion::ignored_with(skip)),
            Err(Ok(skip)) => Err(Failed::from(format!("this skip is not in tests/skips.txt: {skip}"))),
            // Before the clean-up adds its own lines to the log.
            Err(Err(error)) => Err(Failed::from(format!("{error:#}\n{}", test.evidence()))),
        };
        test.clean_up();
        let name = format!("{target}: {}{}", case.name, if case.alone { " (alone)" } else { "" });
        TOOK.lock().unwrap_or_else(PoisonError::into_inner).push((since.elapsed(), name));
        outcome
    })
}

/// Runs a test's body; a panic must not stop the clean-up.
fn run(test: &Test, body: fn(&Test) -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(|| body(test))).unwrap_or_else(|cause| {
        let text = cause.downcast_ref::<String>().map(String::as_str);
        let text = text.or(cause.downcast_ref::<&str>().copied());
        Err(anyhow!("panic: {}", text.unwrap_or("?")))
    })
}
