//! On real processes, with files of a folder in the place of the driver's devices.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Cleaned, ResidueError, clean, clean_held, clean_matching, clean_matching_with, closes_on_exec};
use cuda::process::drivers;
use proc::HostPid;
use support::{Freezer, Program, await_that, soon};
use tracee::hold::{Hold, HoldError, Scope};
use tracee::process;

/// A program that has files of a folder mapped and open.
fn with_residue(name: &str) -> (tempfile::TempDir, Program) {
    let directory = tempfile::tempdir().unwrap();
    let program = Program::play(&format!("{name} {}", directory.path().display()));
    (directory, program)
}

fn descriptors(pid: HostPid) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(Result::unwrap);
    let mut all: Vec<_> =
        entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read_link(entry.path()).unwrap())).collect();
    all.sort();
    all
}

fn assert_unhurt(program: &Program) {
    for counter in [0, 1, 3, 4] {
        program.await_progress(counter);
    }
    assert_eq!((program.value(6), program.value(7)), (0, 0));
}

#[test]
fn mappings_become_inaccessible_and_descriptors_the_null_device() {
    let (directory, program) = with_residue("residue");
    let matches = |path: &Path| path.starts_with(directory.path());
    let mappings = process::mappings_matching(program.pid, matches).unwrap();
    let fds = process::fds_matching(program.pid, matches).unwrap();
    let closing: Vec<_> = fds.iter().map(|at| closes_on_exec(program.pid, at.fd)).collect();
    assert_eq!(closing, [false, false, true, true, true]);
    let others: Vec<_> = descriptors(program.pid).into_iter().filter(|(_, path)| !matches(path)).collect();

    let start = Instant::now();
    let cleaned = clean_matching(program.pid, soon(), matches).unwrap();
    eprintln!("{:?} for {cleaned:?}", start.elapsed());

    assert_eq!(cleaned, Cleaned { mappings: 3, fds: 5 });
    let now = proc::mappings(program.pid).unwrap();
    for mapping in mappings {
        let holder = now.iter().find(|now| now.range.start <= mapping.start && now.range.end >= mapping.end).unwrap();
        assert_eq!((&holder.access, holder.inode), (b"---p", 0));
    }
    for (at, closing) in fds.iter().zip(closing) {
        let link = fs::read_link(format!("/proc/{}/fd/{}", program.pid, at.fd)).unwrap();
        assert_eq!(link, Path::new("/dev/null"));
        assert_eq!(closes_on_exec(program.pid, at.fd), closing);
    }
    let mut expected = others;
    expected.extend(fds.iter().map(|at| (at.fd.to_string(), PathBuf::from("/dev/null"))));
    expected.sort();
    assert_eq!(descriptors(program.pid), expected);
    assert_unhurt(&program);
    assert_eq!(clean_matching(program.pid, soon(), matches).unwrap(), Cleaned { mappings: 0, fds: 0 });
}

#[test]
fn a_process_that_was_held_before_stays_held() {
    let (directory, program) = with_residue("residue");
    let matches = |path: &Path| path.starts_with(directory.path());
    let mut hold = Hold::new(drivers);
    hold.take_scope(program.pid, Scope::All).unwrap();
    hold.settle(soon()).unwrap();
    let held = hold.held();
    assert_eq!(clean_matching_with(&mut hold, program.pid, soon(), matches).unwrap(), Cleaned { mappings: 3, fds: 5 });
    assert_eq!((hold.held(), hold.still(program.pid).len()), (held, held));
    hold.let_go().unwrap();
    assert_unhurt(&program);
}

#[test]
fn a_process_without_a_free_descriptor_is_cleaned_too() {
    let (directory, program) = with_residue("residue-full");
    let matches = |path: &Path| path.starts_with(directory.path());
    let fds = process::fds_matching(program.pid, matches).unwrap();
    let closing: Vec<_> = fds.iter().map(|at| closes_on_exec(program.pid, at.fd)).collect();
    assert_eq!(clean_matching(program.pid, soon(), matches).unwrap(), Cleaned { mappings: 3, fds: 5 });
    for (at, closing) in fds.iter().zip(closing) {
        let link = fs::read_link(format!("/proc/{}/fd/{}", program.pid, at.fd)).unwrap();
        assert_eq!(link, Path::new("/dev/null"));
        assert_eq!(closes_on_exec(program.pid, at.fd), closing);
    }
    assert_unhurt(&program);
}

#[test]
fn a_process_that_sees_no_null_device_has_its_descriptors_closed() {
    let (directory, program) = with_residue("residue-jailed");
    let matches = |path: &Path| path.starts_with(directory.path());
    let before = descriptors(program.pid).len();
    assert_eq!(clean_matching(program.pid, soon(), matches).unwrap(), Cleaned { mappings: 3, fds: 5 });
    assert_eq!(descriptors(program.pid).len(), before - 5);
    assert_unhurt(&program);
}

#[test]
fn what_has_nothing_of_the_driver_is_left_alone() {
    let program = Program::play("many");
    assert_eq!(clean(&mut Hold::new(drivers), program.pid, soon()).unwrap(), Cleaned { mappings: 0, fds: 0 });
    assert!(!cuda::process::touches_gpu(program.pid));
    assert_unhurt(&program);
}

#[test]
fn a_frozen_process_is_refused_and_not_touched() {
    if let Some(freezer) = Freezer::v1() {
        let (directory, program) = with_residue("residue");
        freezer.add(&program);
        freezer.freeze();
        let matches = |path: &Path| path.starts_with(directory.path());
        let error = clean_matching(program.pid, soon(), matches).unwrap_err();
        assert!(matches!(error, ResidueError::Frozen { .. }), "{error}");
        freezer.thaw();
        assert_eq!(process::run_state(program.pid), process::RunState::Running);
        assert_unhurt(&program);
    }
}

#[test]
fn a_process_that_is_not_let_go_stays_with_the_callers_hold() {
    let Some(freezer) = Freezer::v1() else { return };
    let (directory, program) = with_residue("residue");
    freezer.add(&program);
    let mut hold = Hold::new(drivers);
    // It is frozen behind the back of what cleans, here before the first look.
    freezer.freeze();
    let matches = |path: &Path| path.starts_with(directory.path());
    hold.take(program.pid).unwrap();
    let error = clean_held(&mut hold, program.pid, Instant::now() + Duration::from_millis(30), matches).unwrap_err();
    assert!(matches!(error, ResidueError::Hold { source: HoldError::Moving { .. }, .. }), "{error}");
    freezer.thaw();
    hold.let_go().unwrap();
    assert_unhurt(&program);
}

#[test]
fn a_process_that_is_traced_already_is_refused() {
    let (directory, program) = with_residue("residue");
    let mut hold = Hold::new(drivers);
    hold.take(program.pid).unwrap();
    hold.settle(soon()).unwrap();
    let error = clean_matching(program.pid, soon(), |path| path.starts_with(directory.path())).unwrap_err();
    assert!(matches!(error, ResidueError::Hold { source: HoldError::Traced { .. }, .. }), "{error}");
    hold.let_go().unwrap();
    assert_unhurt(&program);
}

#[test]
fn many_processes_are_cleaned() {
    let all: Vec<_> = (0..16).map(|_| with_residue("residue-only")).collect();
    for (directory, program) in &all {
        let cleaned = clean_matching(program.pid, soon(), |path| path.starts_with(directory.path())).unwrap();
        assert_eq!(cleaned, Cleaned { mappings: 3, fds: 5 });
    }
}

#[test]
#[ignore = "a role in another test"]
fn cleans() {
    let Some(argument) = support::role() else { return };
    let (pid, directory) = argument.split_once(' ').unwrap();
    clean_matching(HostPid::new(pid.parse().unwrap()).unwrap(), soon(), |path| path.starts_with(directory)).unwrap();
    support::exit(0);
}

#[test]
fn a_cleaner_that_is_killed_at_any_time_does_not_hurt() {
    let mut unfinished = 0;
    for round in 0..40 {
        let (directory, program) = with_residue("residue");
        let mut cleaner =
            support::spawn_role("residue::tests::cleans", &format!("{} {}", program.pid, directory.path().display()));
        std::thread::sleep(Duration::from_micros(4000 + 311 * round));
        cleaner.kill().unwrap();
        support::wait(&mut cleaner);
        await_that("it is let go", || process::run_state(program.pid) == process::RunState::Running);
        assert_unhurt(&program);
        let matches = |path: &Path| path.starts_with(directory.path());
        let left = clean_matching(program.pid, soon(), matches).unwrap();
        unfinished += usize::from(left.fds > 0 && left.fds < 5 || left.mappings > 0 && left.mappings < 3);
        assert_unhurt(&program);
    }
    eprintln!("{unfinished} were killed half way");
}
