use super::{
    Range, RunState, anonymous_mappings, fds_matching, gained, namespace_pid, run_state, stat_field, status_field,
    threads,
};
use support::{Program, await_that};

fn range(start: u64, end: u64) -> Range {
    Range { start, end }
}

#[test]
fn a_name_with_parentheses_does_not_shift_fields() {
    let stat = b"42 (a) R (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 999 20";
    assert_eq!(stat_field(stat, 4), Some(1));
    assert_eq!(stat_field(stat, 21), Some(18));
    assert_eq!(stat_field(b"", 22), None);
}

#[test]
fn a_field_of_status_is_found_by_its_whole_name() {
    let status = b"Name:\t\xff\nTracerPid:\t12\nPid:\t34\n";
    assert_eq!(status_field(status, "Pid"), Some("34"));
    assert_eq!(status_field(status, "Name"), None);
    assert_eq!(status_field(status, "PPid"), None);
}

#[test]
fn what_was_gained_is_found_though_mappings_are_joined() {
    let before = [range(10, 20), range(40, 50)];
    assert_eq!(gained(&before, &before), []);
    assert_eq!(gained(&before, &[range(10, 50)]), [range(20, 40)]);
    assert_eq!(
        gained(&before, &[range(5, 20), range(40, 60), range(70, 80)]),
        [range(5, 10), range(50, 60), range(70, 80)]
    );
    assert_eq!(gained(&[], &[range(1, 2)]), [range(1, 2)]);
    assert_eq!(gained(&before, &[range(12, 15)]), []);
}

#[test]
fn new_memory_of_a_process_is_found() {
    let pid = i32::try_from(std::process::id()).unwrap();
    let before = anonymous_mappings(pid).unwrap();
    let memory = vec![1_u8; 64 << 20];
    let gained: u64 = gained(&before, &anonymous_mappings(pid).unwrap()).iter().map(Range::len).sum();
    // Other tests run beside this one.
    assert!(gained >= memory.len() as u64, "{gained}");
}

#[test]
fn the_states_of_a_process_are_told() {
    let program = Program::play("many");
    assert_eq!(run_state(program.pid), RunState::Running);
    program.signal(libc::SIGSTOP);
    await_that("it is stopped", || run_state(program.pid) == RunState::Stopped);
    program.signal(libc::SIGCONT);
    await_that("it runs", || run_state(program.pid) == RunState::Running);
    program.signal(libc::SIGKILL);
    await_that("it is dead", || run_state(program.pid) == RunState::Dead);
}

#[test]
fn a_process_that_is_gone_has_nothing() {
    // Above the largest pid that there can be.
    let pid = 1 << 23;
    assert!(fds_matching(pid, |_| true).is_err() && threads(pid).is_err() && namespace_pid(pid).is_err());
    assert_eq!(run_state(pid), RunState::Dead);
}

#[test]
fn a_pid_is_its_own_where_there_is_one_namespace() {
    let program = Program::play("sleeper");
    assert!(namespace_pid(program.pid).unwrap() > 0);
}
