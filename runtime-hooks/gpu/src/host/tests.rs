//! On real processes and a real cgroup.

use support::{Freezer, Program, await_that, wait};

use super::*;

/// A machine that reaches a cgroup with one program, and has no program that calls a driver.
fn machine(freezer: &Freezer, program: &Program) -> Machine {
    freezer.add(program);
    let mut machine = Machine::new(Callers::new("/nowhere".into()));
    machine.reach(&Cgroup::of_process(program.pid).unwrap());
    machine
}

#[test]
fn a_process_that_has_ended_is_not_touched_whoever_has_its_pid() {
    // Where there are both, the first decides who is in a container.
    let Some(freezer) = Freezer::v1().or_else(Freezer::v2) else { return };
    let mut program = Program::play("many");
    let mut machine = machine(&freezer, &program);
    let pid = program.pid;
    assert_eq!(machine.pids().unwrap(), [pid]);
    assert!(!machine.is_gone(pid));
    assert!(matches!(machine.calls(&[(pid, Call::State)], TICK)[..], [Err(CallFailure::Impossible(_))]));
    program.child.kill().unwrap();
    await_that("it is dead", || machine.is_gone(pid));
    wait(&mut program.child);
    // Whatever has the pid now, it is not who was listed.
    assert_eq!(machine.calls(&[(pid, Call::State)], TICK), [Err(CallFailure::Gone)]);
    for touched in [machine.hold(pid), machine.hold_whole(pid), machine.cont(pid), machine.stop(pid)] {
        assert!(touched.unwrap_err().to_string().contains("the process has ended"));
    }
    assert_eq!(machine.pids().unwrap(), []);
}

#[test]
fn a_process_of_another_cgroup_is_none_of_the_containers() {
    // Where there are both, the first decides who is in a container.
    let Some(freezer) = Freezer::v1().or_else(Freezer::v2) else { return };
    let (inside, outside) = (Program::play("sleeper"), Program::play("sleeper"));
    let mut machine = machine(&freezer, &inside);
    assert_eq!(machine.pids().unwrap(), [inside.pid]);
    assert!(!machine.handles.contains_key(&outside.pid));
}
