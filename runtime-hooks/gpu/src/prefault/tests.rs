//! On real processes, whose driver's thread only makes a mapping.

use super::*;
use cuda::process::drivers;
use support::{Program, await_that, soon, wait};
use tracee::process::{self, RunState};

const LENGTH: u64 = 200 << 20;

/// Its driver's thread makes a populated mapping of this length when it is told to.
fn mapper() -> Program {
    Program::play(&format!("maps {}", LENGTH >> 20))
}

/// `Rss` and the like of the mapping that has this address, in KiB.
fn smaps(pid: HostPid, start: u64, key: &str) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mapping = proc::mappings(pid).unwrap().into_iter().find(|mapping| mapping.range.end > start).unwrap();
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&format!("{:x}-", mapping.range.start)));
    let line = lines.find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

fn has_huge_pages() -> bool {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    enabled.contains("[madvise]") || enabled.contains("[always]")
}

fn assert_unhurt(program: &Program) {
    for counter in [0, 1, 3, 4] {
        program.await_progress(counter);
    }
    assert_eq!((program.value(6), program.value(7)), (0, 0));
    assert_eq!(process::run_state(program.pid), RunState::Running);
    for tid in proc::tids(program.pid).unwrap() {
        let name = proc::thread_name(program.pid, tid).unwrap();
        let is_unblocked = || proc::Status::of_thread(program.pid, tid).unwrap().blocked_signals() == Some(0);
        if !name.starts_with("cuda") {
            await_that(&format!("thread {tid} ({name}) takes signals"), is_unblocked);
        }
    }
}

fn held(program: &Program) -> Hold {
    let mut hold = Hold::new(drivers);
    hold.take(program.pid).unwrap();
    hold.settle(soon()).unwrap();
    hold
}

fn prefault_of(program: &Program) -> Prefault {
    Prefault::of([program.pid].into_iter())
}

/// Lets the driver's thread make its mapping, and runs until nothing happens any more. Where the mapping is.
fn run(program: &Program, prefault: &mut Prefault, hold: &mut Hold, left: u64) -> u64 {
    support::tell_driver(program.pid);
    let deadline = soon();
    while (program.value(5) == 0 || !prefault.is_done()) && Instant::now() < deadline {
        hold.watch().unwrap();
        std::thread::sleep(prefault.tick(hold, || Some(left)));
    }
    program.value(5)
}

#[test]
fn a_new_mapping_is_touched_by_the_threads_that_are_held() {
    let program = mapper();
    let mut hold = held(&program);
    let before = proc::mappings(program.pid).unwrap().len();
    let mut prefault = prefault_of(&program);
    prefault.threads = 3;
    let start = run(&program, &mut prefault, &mut hold, u64::MAX);
    assert_eq!(prefault.processes[0].team.as_ref().map(Team::len), Some(3));
    prefault.finish(&mut hold);
    assert!(smaps(program.pid, start, "Rss") << 10 >= LENGTH);
    if has_huge_pages() {
        // Not all of them: under load the kernel may have none free for a part.
        assert!(smaps(program.pid, start, "AnonHugePages") > 0);
    } else {
        eprintln!("skipped in part: there are no huge pages");
    }
    assert!(proc::mappings(program.pid).unwrap().len() <= before + 1, "something else is left");
    hold.let_go().unwrap();
    assert_unhurt(&program);
}

#[test]
fn nothing_is_touched_that_there_is_no_memory_for() {
    let program = mapper();
    let mut hold = held(&program);
    let mut prefault = prefault_of(&program);
    let start = run(&program, &mut prefault, &mut hold, SLICE);
    prefault.finish(&mut hold);
    assert!(smaps(program.pid, start, "Rss") << 10 < SLICE);
    hold.let_go().unwrap();
    assert_unhurt(&program);
}

#[test]
fn a_small_mapping_is_populated_as_the_driver_asks() {
    let program = Program::play("maps 2");
    let mut hold = held(&program);
    let mut prefault = prefault_of(&program);
    let start = run(&program, &mut prefault, &mut hold, u64::MAX);
    assert!(prefault.processes[0].team.is_none());
    prefault.finish(&mut hold);
    assert!(smaps(program.pid, start, "Rss") << 10 >= 2 << 20);
    hold.let_go().unwrap();
    assert_unhurt(&program);
}

#[test]
fn a_driver_that_maps_nothing_is_traced_no_longer_than_a_while() {
    let program = mapper();
    let mut hold = held(&program);
    let mut prefault = prefault_of(&program);
    await_that("it is left", || {
        prefault.tick(&mut hold, || None);
        prefault.is_done()
    });
    prefault.finish(&mut hold);
    hold.let_go().unwrap();
    assert_unhurt(&program);
}

#[test]
fn a_driver_that_has_not_mapped_at_the_end_is_let_go() {
    let program = mapper();
    let mut hold = held(&program);
    let mut prefault = prefault_of(&program);
    prefault.tick(&mut hold, || None);
    prefault.finish(&mut hold);
    hold.let_go().unwrap();
    assert_unhurt(&program);
}

#[test]
fn a_process_whose_first_thread_has_ended_is_left_alone() {
    let program = Program::play("headless");
    let mut hold = held(&program);
    let error = Team::gather(&mut hold, program.pid, 4).unwrap_err();
    assert!(matches!(error, InjectError::NotHeld { .. }), "{error}");
    hold.let_go().unwrap();
    program.await_progress(1);
}

/// Is ahead of a driver that makes a mapping, and dies before the step of this number.
#[test]
#[ignore = "a role in another test"]
fn prefaults() {
    let Some(argument) = support::role() else { return };
    let (pid, step) = argument.split_once(' ').unwrap();
    let pid = HostPid::new(pid.parse().unwrap()).unwrap();
    let mut hold = Hold::new(drivers);
    hold.take(pid).unwrap();
    hold.settle(soon()).unwrap();
    tracee::steps::die_at(step.parse().unwrap());
    let mut prefault = Prefault::of([pid].into_iter());
    support::tell_driver(pid);
    let end = soon();
    while !prefault.is_done() && Instant::now() < end {
        hold.watch().unwrap();
        std::thread::sleep(prefault.tick(&mut hold, || None));
    }
    prefault.finish(&mut hold);
    hold.let_go().unwrap();
    support::exit(0);
}

#[test]
fn one_that_dies_at_any_step_does_not_hurt() {
    for step in 1.. {
        let program = mapper();
        let code = wait(&mut support::spawn_role("prefault::tests::prefaults", &format!("{} {step}", program.pid)));
        await_that("it is let go", || !matches!(process::run_state(program.pid), RunState::Traced(_)));
        assert_unhurt(&program);
        if code == Some(0) {
            assert!(step > 20, "there are only {step} steps");
            break;
        }
        assert_eq!(code, None, "at step {step}");
    }
}

#[test]
fn slices_are_all_of_a_range_in_its_order() {
    let range = Range { start: SLICE + 4096, end: 3 * SLICE + 8192 };
    let slices: Vec<_> = slices(range).collect();
    assert_eq!(slices.first().map(|slice| slice.start), Some(range.start));
    assert_eq!(slices.last().map(|slice| slice.end), Some(range.end));
    assert!(slices.windows(2).all(|pair| pair[0].end == pair[1].start && pair[0].end.is_multiple_of(2 << 20)));
    assert_eq!(slices.len(), 3);
}
