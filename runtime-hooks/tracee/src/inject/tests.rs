//! On real processes. Those of injectors that die have the injector in another process.

use std::time::{Duration, Instant};

use proc::{HostPid, Status};

use super::{InjectError, Injector};
use crate::hold::{Hold, Scope};
use crate::process::{self, RunState};
use crate::spared;
use support::{Freezer, Program, REAL_TIME, await_that, soon, wait};

fn held(program: &Program) -> Hold {
    let mut hold = Hold::new(spared);
    hold.take_scope(program.pid, Scope::All).unwrap();
    hold
}

/// Some calls in a program, between which nothing may get lost.
fn inject(program: &Program) {
    let mut hold = held(program);
    let mut injector = Injector::attach(&mut hold, program.pid, soon()).unwrap();
    assert!(injector.is_crash_safe());
    assert_eq!(injector.call(libc::SYS_getpid, [0; 6]).unwrap(), i64::from(program.pid.raw()));
    assert_eq!(injector.call(libc::SYS_close, [u64::MAX, 0, 0, 0, 0, 0]).unwrap(), -i64::from(libc::EBADF));
    injector.finish().unwrap();
    hold.let_go().unwrap();
}

fn assert_unhurt(program: &Program) {
    assert_eq!(process::run_state(program.pid), RunState::Running);
    assert_eq!(program.value(7), 0, "a computation went wrong");
    assert_eq!(program.value(6), 0, "a system call was interrupted");
}

#[test]
fn a_computation_is_not_disturbed() {
    let program = Program::play("computer");
    for _ in 0..300 {
        inject(&program);
    }
    program.await_progress(0);
    assert_unhurt(&program);
}

#[test]
fn a_sleep_goes_on_for_the_rest_of_its_time() {
    let program = Program::play("sleeper");
    program.await_progress(1);
    let slept = program.value(1);
    for _ in 0..80 {
        inject(&program);
        std::thread::sleep(Duration::from_millis(10));
    }
    // Begun anew each time, not one sleep would have ended.
    assert!(program.value(1) >= slept + 2, "no sleep ends");
    assert_unhurt(&program);
}

#[test]
fn a_read_goes_on_waiting() {
    let mut program = Program::play("reader");
    for lines in 1..100 {
        inject(&program);
        program.write_line();
        await_that("it has read", || program.value(2) == lines);
    }
    assert_unhurt(&program);
}

#[test]
fn a_process_of_many_threads_goes_on() {
    let program = Program::play("many");
    for _ in 0..100 {
        inject(&program);
    }
    for counter in [0, 1, 3, 4] {
        program.await_progress(counter);
    }
    assert_unhurt(&program);
}

#[test]
fn signals_wait_until_it_is_over() {
    let program = Program::play("computer");
    let mut hold = held(&program);
    program.signal(REAL_TIME);
    let mut injector = Injector::attach(&mut hold, program.pid, soon()).unwrap();
    program.signal(REAL_TIME);
    injector.call(libc::SYS_getpid, [0; 6]).unwrap();
    program.signal(REAL_TIME);
    injector.call(libc::SYS_getpid, [0; 6]).unwrap();
    assert_eq!(program.delivered(REAL_TIME), 0);
    injector.finish().unwrap();
    hold.let_go().unwrap();
    await_that("signals come", || program.delivered(REAL_TIME) == 3);
    program.await_progress(0);
    assert_unhurt(&program);
}

#[test]
fn a_stop_that_comes_in_between_takes_effect_after() {
    let program = Program::play("computer");
    let mut hold = held(&program);
    let mut injector = Injector::attach(&mut hold, program.pid, soon()).unwrap();
    program.signal(libc::SIGSTOP);
    assert_eq!(injector.call(libc::SYS_getpid, [0; 6]).unwrap(), i64::from(program.pid.raw()));
    assert_eq!(injector.call(libc::SYS_getpid, [0; 6]).unwrap(), i64::from(program.pid.raw()));
    injector.finish().unwrap();
    hold.let_go().unwrap();
    await_that("it is stopped", || process::run_state(program.pid) == RunState::Stopped);
    inject(&program);
    await_that("it is stopped", || process::run_state(program.pid) == RunState::Stopped);
    program.signal(libc::SIGCONT);
    program.await_progress(0);
    assert_unhurt(&program);
}

#[test]
fn a_kill_that_comes_in_between_is_told() {
    let mut program = Program::play("computer");
    let mut hold = held(&program);
    let mut injector = Injector::attach(&mut hold, program.pid, soon()).unwrap();
    program.signal(libc::SIGKILL);
    let error = injector.call(libc::SYS_getpid, [0; 6]).unwrap_err();
    assert!(matches!(error, InjectError::Died { .. } | InjectError::Refused { .. }), "{error}");
    drop(injector);
    hold.let_go().unwrap();
    assert_eq!(wait(&mut program.child), None);
}

#[test]
fn what_is_frozen_is_refused_by_the_deadline() {
    let Some(freezer) = Freezer::v1() else { return };
    let program = Program::play("computer");
    freezer.add(&program);
    freezer.freeze();
    let mut hold = held(&program);
    let error = Injector::attach(&mut hold, program.pid, Instant::now() + Duration::from_millis(30)).unwrap_err();
    assert!(matches!(error, InjectError::Hold { .. }), "{error}");
    freezer.thaw();
    hold.let_go().unwrap();
    program.await_progress(0);
    assert_unhurt(&program);
}

#[test]
fn calls_are_made_that_a_filter_of_the_program_would_kill_it_for() {
    for action in ["kill", "trap"] {
        let mut program = Program::play(&format!("filtered {action}"));
        let mut hold = held(&program);
        let mut injector = Injector::attach(&mut hold, program.pid, soon()).unwrap();
        let own = i64::from(std::process::id());
        assert_eq!(injector.call(libc::SYS_getppid, [0; 6]).unwrap(), own);
        injector.finish().unwrap();
        hold.let_go().unwrap();
        assert_eq!(process::run_state(program.pid), RunState::Running);
        // The filter is in force again.
        program.write_line();
        await_that("it is killed for its own call", || process::run_state(program.pid) == RunState::Dead);
    }
}

#[test]
fn a_process_that_is_killed_in_an_injected_call_is_told_at_once() {
    let program = Program::play("many");
    let mut hold = held(&program);
    let pid = program.pid;
    let killer = std::thread::spawn(move || {
        await_that("it sleeps", || {
            let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
            call.starts_with(&format!("{} ", libc::SYS_pause))
        });
        support::sys::queue_signal(pid.raw(), libc::SIGKILL).unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(3600);
    let mut injector = Injector::attach(&mut hold, pid, deadline).unwrap();
    let error = injector.call(libc::SYS_pause, [0; 6]).unwrap_err();
    assert!(matches!(error, InjectError::Died { .. }), "{error}");
    drop(injector);
    killer.join().unwrap();
    hold.let_go().unwrap();
    assert_eq!(hold.held(), 0);
}

/// Injects harmless calls, and dies before the step of this number.
#[test]
#[ignore = "a role in other tests"]
fn injects() {
    let Some(argument) = support::role() else { return };
    let (pid, step) = argument.split_once(' ').unwrap();
    let pid = HostPid::new(pid.parse().unwrap()).unwrap();
    crate::steps::die_at(step.parse().unwrap());
    let mut hold = Hold::new(spared);
    hold.take_scope(pid, Scope::All).unwrap();
    let mut injector = Injector::attach(&mut hold, pid, soon()).unwrap();
    for _ in 0..3 {
        assert_eq!(injector.call(libc::SYS_getpid, [0; 6]).unwrap(), i64::from(pid.raw()));
    }
    injector.finish().unwrap();
    hold.let_go().unwrap();
    // It was through before: there are no more steps.
    support::exit(0);
}

#[test]
#[ignore = "a role in another test"]
fn injects_always() {
    let Some(pid) = support::role() else { return };
    let pid = HostPid::new(pid.parse().unwrap()).unwrap();
    loop {
        let mut hold = Hold::new(spared);
        hold.take_scope(pid, Scope::All).unwrap();
        let mut injector = Injector::attach(&mut hold, pid, soon()).unwrap();
        injector.call(libc::SYS_getpid, [0; 6]).unwrap();
    }
}

/// Lets injectors die before each of their steps, each with a program, until one gets through.
fn die_at_each_step(name: &str, counter: u64) {
    let program = Program::play(name);
    let mut steps = 0;
    loop {
        steps += 1;
        let code = wait(&mut support::spawn_role("inject::tests::injects", &format!("{} {steps}", program.pid)));
        await_that("it is let go", || !matches!(process::run_state(program.pid), RunState::Traced(_)));
        program.await_progress(counter);
        program.await_progress(counter);
        assert_unhurt(&program);
        let status = Status::of(program.pid).unwrap();
        assert_eq!(status.blocked_signals(), Some(0), "signals stay blocked");
        match code {
            Some(0) => break,
            code => assert_eq!(code, None, "at step {steps}"),
        }
    }
    assert!(steps > 10, "there are only {steps} steps");
}

#[test]
fn an_injector_that_dies_at_any_step_does_not_hurt_a_computation() {
    die_at_each_step("computer", 0);
}

#[test]
fn an_injector_that_dies_at_any_step_does_not_hurt_a_sleep() {
    die_at_each_step("sleeper", 1);
}

#[test]
fn an_injector_that_is_killed_at_any_time_does_not_hurt() {
    for (name, counter) in [("computer", 0), ("many", 3)] {
        let program = Program::play(name);
        for round in 0..60 {
            let mut injector = support::spawn_role("inject::tests::injects_always", &program.pid.to_string());
            std::thread::sleep(Duration::from_micros(5000 + 217 * round));
            injector.kill().unwrap();
            assert_eq!(wait(&mut injector), None);
            program.await_progress(counter);
            assert_unhurt(&program);
        }
    }
}
