//! On real processes; those with a freezer need root.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use proc::{HostPid, Wait};

use super::{Hold, HoldError, ReleaseError};
use crate::process::{self, RunState};
use crate::spared;
use support::{Freezer, Program, REAL_TIME, await_that, soon, sys, wait};

/// The counters of the program's own threads in the program "many".
const OWN: [u64; 4] = [0, 1, 2, 3];
const DRIVERS: u64 = 4;

fn held(program: &Program) -> Hold {
    let mut hold = Hold::new(spared);
    hold.take(program.pid).unwrap();
    hold.settle(soon()).unwrap();
    hold
}

fn assert_runs(program: &Program) {
    for counter in [0, 1, 3, DRIVERS] {
        program.await_progress(counter);
    }
    assert_eq!(program.value(7), 0, "a computation went wrong");
    assert_eq!(program.value(6), 0, "a system call was interrupted");
}

#[test]
#[ignore = "a role in other tests"]
fn holds() {
    let Some(pid) = support::role() else { return };
    let mut hold = Hold::new(spared);
    hold.take(HostPid::new(pid.parse().unwrap()).unwrap()).unwrap();
    hold.settle(soon()).unwrap();
    support::ready();
    std::thread::sleep(Duration::from_secs(3600));
}

#[test]
fn only_the_drivers_threads_run_in_what_is_held() {
    let mut program = Program::play("many");
    let mut hold = held(&program);
    program.write_line();
    assert_eq!(hold.held(), 4);
    assert_eq!(hold.pids().collect::<Vec<_>>(), [program.pid]);
    assert!(program.stands_still(&OWN));
    program.await_progress(DRIVERS);
    hold.let_go().unwrap();
    assert_eq!(hold.held(), 0);
    assert_runs(&program);
    await_that("it has read", || program.value(2) == 1);
}

#[test]
fn what_goes_lets_go() {
    let program = Program::play("many");
    drop(held(&program));
    assert_runs(&program);
}

#[test]
fn what_must_not_run_yet_dies_with_its_holder_unless_it_was_let_go() {
    for lets_go in [true, false] {
        let program = Program::play("many");
        let pid = program.pid;
        std::thread::spawn(move || {
            let mut hold = Hold::with_exit_kill(spared);
            hold.take(pid).unwrap();
            hold.settle(soon()).unwrap();
            if lets_go {
                hold.let_go().unwrap();
            }
        })
        .join()
        .unwrap();
        if lets_go {
            assert_runs(&program);
        } else {
            await_that("it is dead", || process::run_state(pid) == RunState::Dead);
        }
    }
}

#[test]
fn what_is_taken_while_frozen_stops_before_it_runs_anything() {
    for freezer in Freezer::all() {
        let program = Program::play("many");
        freezer.add(&program);
        for _ in 0..20 {
            freezer.freeze();
            let before = program.values();
            let mut hold = Hold::new(spared);
            let start = Instant::now();
            hold.take(program.pid).unwrap();
            assert!(start.elapsed() < Duration::from_millis(300), "taking blocks");
            assert_eq!(program.values()[..4], before[..4]);
            freezer.thaw();
            hold.settle(soon()).unwrap();
            program.await_progress(DRIVERS);
            assert_eq!(program.values()[..4], before[..4]);
            hold.let_go().unwrap();
            assert_runs(&program);
        }
    }
}

#[test]
fn what_is_let_go_while_frozen_stays_frozen() {
    for freezer in Freezer::all() {
        let program = Program::play("many");
        freezer.add(&program);
        for _ in 0..20 {
            let mut hold = held(&program);
            let before = program.values();
            freezer.freeze();
            hold.let_go().unwrap();
            assert_eq!(hold.held(), 0);
            assert!(program.stands_still(&OWN));
            assert_eq!(program.values()[..4], before[..4]);
            await_that("it is frozen again", || freezer.is_frozen());
            freezer.thaw();
            assert_runs(&program);
        }
    }
}

#[test]
fn what_is_stopped_and_frozen_is_taken_without_blocking() {
    for freezer in Freezer::all() {
        let program = Program::play("many");
        freezer.add(&program);
        program.signal(libc::SIGSTOP);
        await_that("it is stopped", || process::run_state(program.pid) == RunState::Stopped);
        freezer.freeze();
        let before = program.values();
        let mut hold = Hold::new(spared);
        let start = Instant::now();
        hold.take(program.pid).unwrap();
        assert!(start.elapsed() < Duration::from_millis(300), "taking blocks");
        freezer.thaw();
        hold.settle(soon()).unwrap();
        assert_eq!(hold.held(), 4);
        hold.let_go().unwrap();
        assert!(program.stands_still(&[0, 1, 2, 3, DRIVERS]));
        assert_eq!(program.values()[..4], before[..4]);
        program.signal(libc::SIGCONT);
        for counter in [0, 1, 3, DRIVERS] {
            program.await_progress(counter);
        }
    }
}

#[test]
fn what_never_stood_still_cannot_be_let_go_until_it_does() {
    let Some(freezer) = Freezer::v1() else { return };
    let program = Program::play("many");
    freezer.add(&program);
    freezer.freeze();
    let mut hold = Hold::new(spared);
    hold.take(program.pid).unwrap();
    let error = hold.settle(Instant::now() + Duration::from_millis(20)).unwrap_err();
    assert!(error.to_string().ends_with("does not stop: it is in a frozen cgroup"), "{error}");
    let error = hold.let_go().unwrap_err();
    assert!(matches!(error, ReleaseError::Moving { others: 3, .. }), "{error}");
    freezer.thaw();
    hold.let_go().unwrap();
    assert_runs(&program);
}

#[test]
fn a_signal_to_a_held_process_is_delivered_once_when_it_is_let_go() {
    let program = Program::play("many");
    let mut hold = held(&program);
    program.signal(libc::SIGUSR1);
    for _ in 0..5 {
        program.signal(REAL_TIME);
    }
    assert!(program.stands_still(&OWN));
    assert_eq!((program.delivered(libc::SIGUSR1), program.delivered(REAL_TIME)), (0, 0));
    hold.let_go().unwrap();
    await_that("signals come", || program.delivered(libc::SIGUSR1) == 1 && program.delivered(REAL_TIME) == 5);
    assert_eq!(process::run_state(program.pid), RunState::Running);
}

/// Queues signals for a process for this long; how many there were in the end.
fn send_signals(pid: HostPid, time: Duration) -> std::thread::JoinHandle<u64> {
    std::thread::spawn(move || {
        let mut sent = 0;
        let end = Instant::now() + time;
        while Instant::now() < end {
            // Too many are not queued.
            sent += u64::from(sys::queue_signal(pid.raw(), REAL_TIME).is_ok());
            std::thread::sleep(Duration::from_micros(30));
        }
        sent
    })
}

#[test]
fn no_signal_is_lost_or_doubled_by_holds_that_come_in_between() {
    let program = Program::play("many");
    let pid = program.pid;
    let sender = send_signals(pid, Duration::from_secs(2));
    let mut deliveries = 0;
    while !sender.is_finished() {
        let mut hold = held(&program);
        deliveries += hold.still(pid).iter().filter(|(_, signal)| *signal != 0).count();
        hold.let_go().unwrap();
        std::thread::sleep(Duration::from_micros(500));
    }
    let sent = sender.join().unwrap();
    eprintln!("{sent} sent, {deliveries} caught in delivery");
    await_that("all come", || program.delivered(REAL_TIME) == sent);
    assert!(program.stands_still(&[]));
    assert_eq!(program.delivered(REAL_TIME), sent);
}

#[test]
fn the_death_of_a_holder_lets_go_and_loses_no_signal() {
    let program = Program::play("many");
    let pid = program.pid;
    let sender = send_signals(pid, Duration::from_secs(3));
    while !sender.is_finished() {
        drop(Program::play_role("hold::tests::holds", &pid.to_string()));
        for counter in [0, 3, DRIVERS] {
            program.await_progress(counter);
        }
    }
    let sent = sender.join().unwrap();
    await_that("all come", || program.delivered(REAL_TIME) == sent);
    assert_eq!(program.value(7), 0);
}

#[test]
fn a_stop_that_comes_while_held_takes_effect_after() {
    let program = Program::play("many");
    let mut hold = held(&program);
    program.signal(libc::SIGSTOP);
    std::thread::sleep(Duration::from_millis(20));
    hold.watch().unwrap();
    hold.settle(soon()).unwrap();
    hold.let_go().unwrap();
    await_that("it is stopped", || process::run_state(program.pid) == RunState::Stopped);
    assert!(program.stands_still(&[0, 1, 2, 3, DRIVERS]));
    program.signal(libc::SIGCONT);
    await_that("it goes on", || program.delivered(libc::SIGCONT) == 1);
    for counter in [0, 1, 3, DRIVERS] {
        program.await_progress(counter);
    }
}

#[test]
fn a_stopped_process_is_woken_for_the_driver_and_stopped_again() {
    let program = Program::play("many");
    program.signal(libc::SIGSTOP);
    await_that("it is stopped", || process::run_state(program.pid) == RunState::Stopped);
    let before = program.values();
    for _ in 0..50 {
        let mut hold = Hold::new(spared);
        hold.cont(program.pid, soon()).unwrap();
        program.await_progress(DRIVERS);
        hold.stop(program.pid).unwrap();
        hold.let_go().unwrap();
        await_that("it is stopped", || process::run_state(program.pid) == RunState::Stopped);
        assert_eq!(program.values()[..4], before[..4]);
    }
    assert!(program.stands_still(&[0, 1, 2, 3, DRIVERS]));
    assert_eq!(program.delivered(libc::SIGCONT), 0);
    program.signal(libc::SIGCONT);
    await_that("it goes on", || program.delivered(libc::SIGCONT) == 1);
    for counter in [0, 1, 3, DRIVERS] {
        program.await_progress(counter);
    }
}

#[test]
fn a_woken_process_runs_on_without_its_handler_having_run() {
    let program = Program::play("many");
    program.signal(libc::SIGSTOP);
    await_that("it is stopped", || process::run_state(program.pid) == RunState::Stopped);
    let mut hold = Hold::new(spared);
    hold.cont(program.pid, soon()).unwrap();
    assert!(program.stands_still(&OWN));
    hold.let_go().unwrap();
    assert_runs(&program);
    assert_eq!(program.delivered(libc::SIGCONT), 0);
}

#[test]
fn threads_that_come_and_go_are_all_caught() {
    let program = Program::play("churn");
    for _ in 0..100 {
        let mut hold = held(&program);
        let before = program.values();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(program.values()[..4], before[..4]);
        hold.let_go().unwrap();
        program.await_progress(1);
    }
}

#[test]
fn a_process_that_is_killed_while_held_gets_to_its_parent() {
    let mut program = Program::play_remote("many");
    let mut hold = held(&program);
    program.signal(libc::SIGKILL);
    await_that("it is dead", || process::run_state(program.pid) == RunState::Dead);
    while hold.held() > 0 {
        hold.watch().unwrap();
    }
    assert_eq!(hold.pids().count(), 0);
    assert_eq!(wait(&mut program.child), Some(128 + libc::SIGKILL));
    hold.settle(soon()).unwrap();
    hold.let_go().unwrap();
}

#[test]
fn a_process_that_is_killed_is_let_go_by_letting_go() {
    let mut program = Program::play_remote("many");
    let mut hold = held(&program);
    program.signal(libc::SIGKILL);
    hold.let_go().unwrap();
    assert_eq!(wait(&mut program.child), Some(128 + libc::SIGKILL));
}

#[test]
fn a_process_whose_first_thread_has_ended_is_held() {
    let program = Program::play("headless");
    let mut hold = held(&program);
    assert_eq!(hold.held(), 1);
    assert!(program.stands_still(&[1]));
    assert!(!process::anonymous_mappings(program.pid).unwrap().is_empty());
    hold.let_go().unwrap();
    program.await_progress(1);
}

#[test]
fn a_program_with_a_name_like_the_drivers_is_held() {
    let program = Program::play("cuda-named");
    let hold = held(&program);
    assert_eq!(hold.held(), 2);
    assert!(program.stands_still(&[1, 3]));
    program.await_progress(DRIVERS);
}

#[test]
fn another_tracer_is_named() {
    let program = Program::play("sleeper");
    let holder = Program::play_role("hold::tests::holds", &program.pid.to_string());
    assert_eq!(process::run_state(program.pid), RunState::Traced(HostPid::new(holder.thread).unwrap()));
    let taken = Hold::new(spared).take(program.pid);
    let refused = Hold::new(spared).refuse_traced(program.pid);
    for error in [taken.unwrap_err(), refused.unwrap_err()] {
        let HoldError::Traced { tracer, name, .. } = &error else { panic!("{error}") };
        assert_eq!(tracer.raw(), holder.thread);
        assert_eq!(*name, proc::thread_name(holder.pid, holder.thread).unwrap());
    }
}

#[test]
fn a_process_that_is_held_here_is_not_refused() {
    let program = Program::play("sleeper");
    assert!(Hold::new(spared).refuse_traced(program.pid).is_ok());
    assert!(held(&program).refuse_traced(program.pid).is_ok());
}

#[test]
fn what_has_ended_cannot_be_taken() {
    let mut program = Program::play("sleeper");
    program.child.kill().unwrap();
    await_that("it is dead", || process::run_state(program.pid) == RunState::Dead);
    assert!(matches!(Hold::new(spared).take(program.pid), Err(HoldError::Gone { .. })));
    wait(&mut program.child);
    assert!(matches!(Hold::new(spared).take(program.pid), Err(HoldError::Gone { .. })));
}

#[test]
fn other_children_are_left_alone() {
    let program = Program::play("many");
    let mut hold = held(&program);
    let mut other = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
    for _ in 0..50 {
        hold.watch().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    hold.let_go().unwrap();
    assert_eq!(wait(&mut other), Some(7));
}

#[test]
fn a_thread_that_waits_uninterruptibly_is_named_and_stops_later() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    assert_eq!(wait(&mut Command::new("mkfifo").arg(&fifo).spawn().unwrap()), Some(0));
    // The child that opens the fifo keeps its parent in the kernel until it can.
    let script = "import os,sys,time\n\
        os.posix_spawn('/bin/sh', ['sh', '-c', ':'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)])\n\
        time.sleep(60)";
    let Ok(mut child) = Command::new("python3").args(["-c", script]).arg(&fifo).stdin(Stdio::null()).spawn() else {
        eprintln!("skipped: there is no python3");
        return;
    };
    let (pid, tid) = (HostPid::from(rustix::process::Pid::from_child(&child)), i32::try_from(child.id()).unwrap());
    // It waits for the disk too, when it starts.
    let is_in_fork = || {
        Wait::of(pid, tid)
            .syscall
            .is_some_and(|call| [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].contains(&call))
    };
    await_that("it waits", || Wait::of(pid, tid).is_uninterruptible() && is_in_fork());
    let mut hold = Hold::new(spared);
    hold.take(pid).unwrap();
    let error = hold.settle(Instant::now() + Duration::from_millis(30)).unwrap_err();
    assert!(error.to_string().contains("waits uninterruptibly"), "{error}");
    let HoldError::Moving { wait: late, .. } = error else { panic!("{error}") };
    assert_eq!((late.pid, late.tid), (pid, tid));
    let _writer = std::fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    hold.settle(soon()).unwrap();
    hold.let_go().unwrap();
    child.kill().unwrap();
    wait(&mut child);
}
