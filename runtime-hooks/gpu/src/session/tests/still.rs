//! Processes of a paused container that run, or do not, while the container is thawed for the driver.

use super::super::*;
use super::host::{Bed, CHECKPOINTED, Cuda, Process, RUNNING, pid, process};

fn container() -> Bed {
    let stopped = Process { stopped: true, ..process(Cuda::No) };
    let cuda = [(101, process(RUNNING)), (102, process(RUNNING))];
    let others = [(103, process(Cuda::No)), (104, process(Cuda::Residue)), (105, process(Cuda::Nvml)), (106, stopped)];
    Bed::of(cuda.into_iter().chain(others))
}

fn ran(bed: &Bed) -> Vec<i32> {
    bed.ran.iter().map(|pid| pid.raw()).collect()
}

#[test]
fn nothing_of_a_paused_container_runs_while_its_gpu_state_is_moved_and_moved_back() {
    let mut bed = container();
    bed.suspend().unwrap();
    assert_eq!((ran(&bed), bed.cuda(pid(101)), bed.cuda(pid(102))), (Vec::new(), CHECKPOINTED, CHECKPOINTED));
    assert!(bed.frozen && bed.processes.values().all(|process| !process.held));
    bed.resume(true).unwrap();
    assert_eq!((ran(&bed), bed.cuda(pid(101)), bed.cuda(pid(102))), (Vec::new(), RUNNING, RUNNING));
    assert!(bed.is_untouched() && bed.processes[&pid(106)].stopped && bed.owes().is_paid());
}

#[test]
fn nothing_of_a_paused_container_runs_while_a_failed_suspension_is_undone() {
    let mut bed = container();
    bed.memory_left = Some(MemoryLeft { bytes: 1, is_limited: true });
    bed.suspend().unwrap_err();
    assert!(ran(&bed).is_empty() && bed.owes().is_paid());
    assert!(bed.frozen && bed.processes.values().all(|process| !process.held));
}

/// Suspends a container with this process, and sees that the CUDA processes ran before they were locked, and no other.
fn only_cuda_processes_run(second: Process) {
    let mut bed = container();
    bed.processes.insert(pid(102), second);
    bed.suspend().unwrap();
    assert_eq!((ran(&bed), bed.cuda(pid(102))), (vec![101, 102], CHECKPOINTED));
    assert!(bed.frozen && bed.processes.values().all(|process| !process.held));
}

#[test]
fn a_process_in_the_middle_of_a_call_of_the_driver_runs_until_it_is_locked_and_no_other_does() {
    only_cuda_processes_run(Process { calling: true, ..process(RUNNING) });
}

#[test]
fn a_process_that_waits_in_the_driver_runs_until_it_is_locked_though_it_could_be_locked_before() {
    only_cuda_processes_run(Process { waiting: true, ..process(RUNNING) });
}

#[test]
fn a_process_in_the_middle_of_a_call_is_let_run_though_there_is_no_patience() {
    let mut bed = Bed::of([(101, Process { calling: true, ..process(RUNNING) })]);
    bed.with(|session| session.suspend(true, Duration::ZERO, SHORT_CALL)).unwrap();
    assert_eq!(bed.cuda(pid(101)), CHECKPOINTED);
}

#[test]
fn a_process_in_the_middle_of_its_start_runs_until_it_uses_cuda_and_no_other_does() {
    let mut bed = Bed::of([(101, process(RUNNING)), (102, process(Cuda::Beginner)), (103, process(Cuda::No))]);
    bed.suspend().unwrap();
    assert_eq!((ran(&bed), bed.cuda(pid(102))), (vec![102], CHECKPOINTED));
}

#[test]
fn a_process_that_is_traced_fails_the_session_before_anything_is_held_or_thawed() {
    let mut bed = container();
    bed.processes.insert(pid(103), Process { traced: true, ..process(Cuda::No) });
    let error = bed.suspend().unwrap_err().to_string();
    assert_eq!(error, "cannot hold process 103: process 7 (strace) traces it");
    assert!(bed.done.is_empty() && ran(&bed).is_empty() && bed.frozen && bed.owes().is_paid());
}

#[test]
fn a_paused_container_that_a_dead_session_left_thawed_is_frozen_before_its_gpu_state_goes_back() {
    let mut bed = container();
    bed.processes.insert(pid(101), process(CHECKPOINTED));
    bed.frozen = false;
    bed.resume(true).unwrap();
    assert_eq!((ran(&bed), bed.cuda(pid(101))), (Vec::new(), RUNNING));
    assert!(bed.is_untouched());
}

#[test]
fn a_container_that_runs_goes_on_until_its_gpu_state_is_moved() {
    let mut bed = container();
    bed.frozen = false;
    bed.suspend_running().unwrap();
    assert!([101, 102, 103].map(pid).iter().all(|pid| bed.ran.contains(pid)), "{:?}", bed.ran);
    assert!(bed.frozen && bed.processes.values().all(|process| !process.held));
}
