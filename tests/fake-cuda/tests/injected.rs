//! Failures injected by `FAKE_CUDA`.

#[cfg(test)]
mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{CHECKPOINTED, FAILED, LOCKED, Machine, Program, RUNNING};

fn call(machine: &Machine, operation: &str, program: &Program) -> u32 {
    machine.call(&format!("{operation} {}", program.pid()))
}

/// Expects a whole cycle to work after all.
fn whole_cycle(machine: &Machine, program: &mut Program) {
    for operation in ["lock", "checkpoint", "restore", "unlock"] {
        assert_eq!(call(machine, operation, program), 0, "{operation}");
    }
    program.does("add");
    program.does("check");
}

#[test]
fn the_first_locks_can_fail() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("lock-fails=2");
    let limited = format!("lock {} 200", program.pid());
    let begin = Instant::now();
    assert_eq!(machine.call(&limited), 600);
    assert!(begin.elapsed() >= Duration::from_millis(200), "it did not wait");
    assert_eq!(machine.state(program.pid()), RUNNING);
    assert_eq!(machine.call(&limited), 600);
    whole_cycle(&machine, &mut program);
}

#[test]
fn a_checkpoint_can_fail_once() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("checkpoint-fails=999");
    assert_eq!(call(&machine, "lock", &program), 0);
    assert_eq!(call(&machine, "checkpoint", &program), 999);
    assert_eq!(machine.state(program.pid()), LOCKED);
    assert_eq!(call(&machine, "unlock", &program), 0);
    whole_cycle(&machine, &mut program);
}

#[test]
fn a_checkpoint_can_fail_always() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("checkpoint-fails=2:always");
    assert_eq!(call(&machine, "lock", &program), 0);
    for _ in 0..3 {
        assert_eq!(call(&machine, "checkpoint", &program), 2);
    }
}

#[test]
fn a_restore_can_fail_once() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("restore-fails=999");
    assert_eq!(call(&machine, "lock", &program), 0);
    assert_eq!(call(&machine, "checkpoint", &program), 0);
    assert_eq!(call(&machine, "restore", &program), 999);
    assert_eq!(machine.state(program.pid()), CHECKPOINTED);
    assert_eq!(call(&machine, "restore", &program), 0);
    assert_eq!(call(&machine, "unlock", &program), 0);
    program.does("check");
}

#[test]
fn a_checkpoint_can_leave_a_process_failed() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("fail-state");
    assert_eq!(call(&machine, "lock", &program), 0);
    program.tell("add");
    assert_eq!(call(&machine, "checkpoint", &program), 999);
    assert_eq!(machine.state(program.pid()), FAILED);
    assert_eq!(program.answer(common::LONG).as_deref(), Some("error 999"));
    for operation in ["lock", "checkpoint", "restore", "unlock"] {
        assert_eq!(call(&machine, operation, &program), 401, "{operation}");
    }
}

#[test]
fn a_program_can_die_in_each_operation() {
    for (at, before) in [("lock", 0), ("checkpoint", 1), ("restore", 2), ("unlock", 3)] {
        let machine = Machine::with_gpus(1);
        let mut program = machine.started(&format!("crash-at={at}"));
        for operation in ["lock", "checkpoint", "restore"].into_iter().take(before) {
            assert_eq!(call(&machine, operation, &program), 0, "{operation} before {at}");
        }
        assert_eq!(call(&machine, at, &program), 304, "{at}");
        assert_eq!(program.death(), Some(11), "{at}");
    }
}

#[test]
fn an_operation_can_hang_once_until_its_caller_is_killed() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("hang-at=checkpoint");
    assert_eq!(call(&machine, "lock", &program), 0);
    let mut hanging = machine.begin(&format!("checkpoint {}", program.pid()));
    assert!(hanging.hangs());
    hanging.kill();
    assert_eq!(machine.state(program.pid()), LOCKED);
    assert_eq!(call(&machine, "unlock", &program), 0);
    whole_cycle(&machine, &mut program);
}

#[test]
fn an_operation_can_hang_for_a_time() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("hang-at=lock:300");
    let begin = Instant::now();
    assert_eq!(call(&machine, "lock", &program), 0);
    assert!(begin.elapsed() >= Duration::from_millis(300), "it did not hang");
    assert_eq!(call(&machine, "unlock", &program), 0);
    whole_cycle(&machine, &mut program);
}

#[test]
fn operations_can_be_slow() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("lock-ms=150,checkpoint-ms=150,restore-ms=150");
    for operation in ["lock", "checkpoint", "restore"] {
        let begin = Instant::now();
        assert_eq!(call(&machine, operation, &program), 0);
        assert!(begin.elapsed() >= Duration::from_millis(150), "{operation} was not slow");
    }
}

#[test]
fn options_can_change_while_a_program_runs() {
    let machine = Machine::with_gpus(1);
    let file = machine.path("options");
    let mut program = machine.program(&[("FAKE_CUDA", "lock-fails=9"), ("FAKE_CUDA_FILE", file.to_str().unwrap())]);
    program.does("start 0 1000");
    assert_eq!(call(&machine, "lock", &program), 600);
    fs::write(&file, "checkpoint-fails=700\n").unwrap();
    assert_eq!(call(&machine, "lock", &program), 0);
    assert_eq!(call(&machine, "checkpoint", &program), 700);
    assert_eq!(call(&machine, "unlock", &program), 0);
    fs::write(&file, "").unwrap();
    whole_cycle(&machine, &mut program);
    // A failure injected once happens again on a new request.
    fs::write(&file, "checkpoint-fails=700").unwrap();
    assert_eq!(call(&machine, "lock", &program), 0);
    assert_eq!(call(&machine, "checkpoint", &program), 700);
}

#[test]
fn an_option_that_does_not_exist_is_refused() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.program(&[("FAKE_CUDA", "chekpoint-fails=1")]);
    assert_eq!(program.ask("init"), "error 1");
}
