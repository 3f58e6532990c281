use proc::{HostPid, Range};

use super::{RunState, anonymous_mappings, fds_matching, gained, run_state};
use support::{Program, await_that};

fn range(start: u64, end: u64) -> Range {
    Range { start, end }
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
    let pid = HostPid::own();
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
    let pid = HostPid::new(1 << 23).unwrap();
    assert!(fds_matching(pid, |_| true).is_err());
    assert_eq!(run_state(pid), RunState::Dead);
}
