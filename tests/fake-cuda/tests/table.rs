//! The state machine, a test for each row of the measured table.

#[cfg(test)]
mod common;

use std::time::{Duration, Instant};

use common::{CHECKPOINTED, LOCKED, Machine, RUNNING, eventually};

#[test]
fn every_call_gives_its_result_in_every_state() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("");
    let pid = program.pid();
    let wrong = |operations: &[&str]| {
        for operation in operations {
            let before = machine.state(pid);
            assert_eq!(machine.call(&format!("{operation} {pid}")), 401, "{operation} in state {before}");
            assert_eq!(machine.state(pid), before, "{operation}");
        }
    };
    let right = |operation: &str, state: u32| {
        assert_eq!(machine.call(&format!("{operation} {pid}")), 0, "{operation}");
        assert_eq!(machine.state(pid), state, "{operation}");
    };
    assert_eq!(machine.state(pid), RUNNING);
    wrong(&["checkpoint", "restore", "unlock"]);
    right("lock", LOCKED);
    wrong(&["lock", "restore"]);
    right("checkpoint", CHECKPOINTED);
    wrong(&["lock", "checkpoint", "unlock"]);
    right("restore", LOCKED);
    wrong(&["lock", "restore"]);
    right("unlock", RUNNING);
    wrong(&["checkpoint", "restore", "unlock"]);
}

#[test]
fn lock_and_unlock_without_a_checkpoint_change_nothing() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    assert_eq!(machine.call(&format!("lock {}", program.pid())), 0);
    assert_eq!(machine.call(&format!("unlock {}", program.pid())), 0);
    program.does("add");
    program.does("check");
}

#[test]
fn a_process_without_cuda_is_not_initialized() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.program(&[]);
    let pid = program.pid();
    for operation in ["state", "tid", "lock", "checkpoint", "restore", "unlock"] {
        assert_eq!(machine.call(&format!("{operation} {pid}")), 3, "{operation}");
    }
    program.does("init");
    assert_eq!(machine.state(pid), RUNNING);
}

#[test]
fn a_process_that_does_not_exist_is_a_matter_of_the_operating_system() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    let pid = program.pid();
    program.signal(9);
    program.death();
    for operation in ["state", "tid", "lock", "checkpoint", "restore", "unlock"] {
        assert_eq!(machine.call(&format!("{operation} {pid}")), 304, "{operation}");
    }
}

#[test]
fn a_lock_waits_for_a_running_kernel() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    // The kernel begins after this and ends 700 ms later, however slow the machine is.
    let begin = Instant::now();
    program.does("spin 700");
    assert_eq!(machine.call(&format!("lock {}", program.pid())), 0);
    assert!(begin.elapsed() >= Duration::from_millis(700), "it did not wait");
}

#[test]
fn a_lock_that_does_not_come_in_time_leaves_the_process_running_and_can_be_tried_again() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    let pid = program.pid();
    program.does("spin 4000");
    program.tell("sync");
    for _ in 0..2 {
        assert_eq!(machine.call(&format!("lock {pid} 100")), 600);
        assert_eq!(machine.state(pid), RUNNING);
    }
    assert_eq!(machine.call(&format!("lock {pid} 15000")), 0);
    assert_eq!(machine.state(pid), LOCKED);
    assert_eq!(program.answer(common::LONG).as_deref(), Some("ok"));
}

#[test]
fn calls_wait_from_lock_to_unlock() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    let pid = program.pid();
    assert_eq!(machine.call(&format!("lock {pid}")), 0);
    program.tell("add");
    assert_eq!(program.answer(common::HANGS), None);
    assert_eq!(machine.call(&format!("checkpoint {pid}")), 0);
    assert_eq!(machine.call(&format!("restore {pid}")), 0);
    assert_eq!(program.answer(common::HANGS), None);
    assert_eq!(machine.call(&format!("unlock {pid}")), 0);
    assert_eq!(program.answer(common::LONG).as_deref(), Some("ok"));
    program.does("check");
}

#[test]
fn managed_memory_refuses_the_checkpoint_and_the_program_goes_on() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    let pid = program.pid();
    program.does("managed");
    assert_eq!(machine.call(&format!("lock {pid}")), 0);
    assert_eq!(machine.call(&format!("checkpoint {pid}")), 801);
    assert_eq!(machine.state(pid), LOCKED);
    assert_eq!(machine.call(&format!("unlock {pid}")), 0);
    program.does("add");
    program.does("check");
    program.does("unmanaged");
    assert_eq!(machine.call(&format!("lock {pid}")), 0);
    assert_eq!(machine.call(&format!("checkpoint {pid}")), 0);
}

#[test]
fn the_restore_thread_is_the_one_named_cuda_and_eleven_digits() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("");
    let thread = machine.begin(&format!("tid {}", program.pid())).tid();
    let threads = common::threads(program.pid());
    let (_, name) = threads.iter().find(|(tid, _)| *tid == thread).unwrap();
    let digits = name.strip_prefix("cuda").unwrap();
    assert!(digits.len() == 11 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()), "{name}");
    assert!(threads.iter().any(|(_, name)| name == "cuda-EvtHandlr"), "{threads:?}");
}

#[test]
fn the_driver_s_threads_have_all_signals_blocked() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("poll");
    let pid = program.pid();
    for (thread, name) in common::threads(pid).into_iter().filter(|(thread, _)| *thread != pid) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap().trim();
        let blocked = u64::from_str_radix(blocked, 16).unwrap();
        // SIGHUP, SIGINT, SIGTERM, SIGCHLD, SIGUSR1
        for signal in [1, 2, 15, 17, 10] {
            assert!(blocked & (1 << (signal - 1)) != 0, "signal {signal} in {name}");
        }
    }
}

#[test]
fn a_process_that_dies_during_a_call_is_a_matter_of_the_operating_system() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("checkpoint-ms=10000");
    let pid = program.pid();
    assert_eq!(machine.call(&format!("lock {pid}")), 0);
    let mut call = machine.begin(&format!("checkpoint {pid}"));
    assert!(call.hangs());
    program.signal(9);
    drop(program);
    assert_eq!(call.result(), 304);
}

#[test]
fn several_callers_take_turns() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("");
    let pid = program.pid();
    let locks: Vec<_> = (0..4).map(|_| machine.begin(&format!("lock {pid}"))).collect();
    let mut results: Vec<_> = locks.into_iter().map(common::Call::result).collect();
    results.sort_unstable();
    assert_eq!(results, [0, 401, 401, 401]);
    eventually("locked", || machine.state(pid) == LOCKED);
}
