//! A call on a process that does not run never returns; after the caller's death and the process's
//! continuation, all is well.

#[cfg(test)]
mod common;

use common::{CHECKPOINTED, LOCKED, Machine, Program, RUNNING};

const STOP: i32 = 19;
const CONTINUE: i32 = 18;

/// Expects every sensible call in the state to hang, and to change nothing if killed before the
/// process runs again.
fn hangs_and_recovers(stop: &dyn Fn(), go_on: &dyn Fn()) -> impl FnOnce(&Machine, &mut Program) {
    move |machine, program| {
        let pid = program.pid();
        let hang = |operation: &str, state: u32| {
            stop();
            let mut call =
                machine.begin(&format!("{operation} {pid} {}", if operation == "lock" { "100" } else { "" }));
            assert!(call.hangs(), "{operation} of a process that does not run");
            call.kill();
            go_on();
            assert_eq!(machine.state(pid), state, "after {operation}");
        };
        hang("state", RUNNING);
        hang("tid", RUNNING);
        hang("lock", RUNNING);
        assert_eq!(machine.call(&format!("lock {pid}")), 0);
        hang("checkpoint", LOCKED);
        hang("unlock", LOCKED);
        assert_eq!(machine.call(&format!("checkpoint {pid}")), 0);
        hang("restore", CHECKPOINTED);
        assert_eq!(machine.call(&format!("restore {pid}")), 0);
        assert_eq!(machine.call(&format!("unlock {pid}")), 0);
        program.does("add");
        program.does("check");
    }
}

#[test]
fn a_call_on_a_stopped_process_hangs_and_recovers() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    let pid = program.pid();
    hangs_and_recovers(&|| common::send(pid, STOP), &|| common::send(pid, CONTINUE))(&machine, &mut program);
}

#[test]
fn a_call_on_a_frozen_process_hangs_and_recovers() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    let cgroup = match common::cgroup::Cgroup::new(program.pid()) {
        Ok(cgroup) => cgroup,
        Err(reason) => {
            eprintln!("skipped: no cgroup can be made here: {reason}");
            return;
        }
    };
    hangs_and_recovers(&|| cgroup.freeze(true), &|| cgroup.freeze(false))(&machine, &mut program);
}

#[test]
fn a_request_whose_caller_was_killed_is_not_performed_later() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("");
    let pid = program.pid();
    common::send(pid, STOP);
    let mut first = machine.begin(&format!("lock {pid}"));
    assert!(first.hangs());
    first.kill();
    // The next caller waits already when the process continues.
    let mut second = machine.begin(&format!("state {pid}"));
    assert!(second.hangs());
    common::send(pid, CONTINUE);
    assert!(second.output().contains("RUNNING"));
    assert_eq!(machine.state(pid), RUNNING);
}

#[test]
fn a_lock_whose_caller_is_killed_while_a_kernel_runs_is_given_up() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    let pid = program.pid();
    program.does("spin 3000");
    let mut call = machine.begin(&format!("lock {pid}"));
    assert!(call.hangs());
    call.kill();
    program.does("sync");
    assert_eq!(machine.state(pid), RUNNING);
}

#[test]
fn a_stopped_process_that_is_killed_ends_the_call() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("");
    let pid = program.pid();
    common::send(pid, STOP);
    let mut call = machine.begin(&format!("lock {pid}"));
    assert!(call.hangs());
    drop(program);
    assert_eq!(call.result(), 304);
}
