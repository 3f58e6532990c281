use std::path::{Path, PathBuf};

use super::{
    Mapping, Range, RunState, anonymous_mappings, fds_matching, gained, mapping, namespace_pid, run_state, stat_field,
    status_field, threads,
};
use support::{Program, await_that};

fn range(start: u64, end: u64) -> Range {
    Range { start, end }
}

#[test]
fn a_line_of_maps_is_read_with_whatever_is_in_its_path() {
    let line = b"7f2b40000000-7f2b40200000 rw-s 00000000 00:05 381                        /dev/nvidia-uvm (deleted)";
    let expected = Mapping {
        range: range(0x7f2b_4000_0000, 0x7f2b_4020_0000),
        access: *b"rw-s",
        inode: 381,
        path: PathBuf::from("/dev/nvidia-uvm (deleted)"),
    };
    assert_eq!(mapping(line), Some(expected));
    assert_eq!(mapping(b"1000-2000 rw-p 00000000 00:00 0 ").unwrap().path, Path::new(""));
    assert_eq!(mapping(b"1000-2000 rw-p 00000000 00:00 0").unwrap().path, Path::new(""));
    assert!(mapping(b"1000-2000 r-xp 00000000 08:01 42    /a \xff b").unwrap().is_executable());
    assert_eq!(mapping(b"nonsense"), None);
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
fn threads_are_listed_by_name() {
    let program = Program::play("many");
    // A thread gives itself its name.
    let expected = ["cuda0123456789a", "computes", "sleeps", "reads"];
    await_that("all have names", || {
        let threads = threads(program.pid).unwrap();
        threads[0].tid == program.pid && threads[1..].iter().map(|thread| thread.name.as_str()).eq(expected)
    });
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
