//! Sessions on a fake machine.

use proc::ProcessIds;

use super::*;

mod faults;
mod host;
mod still;

use host::{Bed, CHECKPOINTED, Cuda, Fault, Process, RUNNING, ids, pid, process};

#[test]
fn gpu_state_goes_to_memory_and_comes_back() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, process(Cuda::No)), (103, process(RUNNING))]);
    let suspended = host.suspend().unwrap();
    assert_eq!(suspended.processes.iter().map(|process| process.pid.raw()).collect::<Vec<_>>(), [1, 3]);
    assert!(suspended.processes.iter().all(|process| process.staged == (2 << 20) + (1 << 12)));
    assert_eq!((host.cuda(pid(101)), host.cuda(pid(103)), host.frozen), (CHECKPOINTED, CHECKPOINTED, true));
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 2 });
    assert!(host.is_untouched());
    let undone: Vec<_> = host.done.iter().rev().take(2).map(String::as_str).collect();
    assert_eq!(undone, ["running 101", "running 103"], "unlocked in reverse order");
}

#[test]
fn memory_is_swapped_while_nothing_of_the_container_runs() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, process(Cuda::No)), (103, process(RUNNING))]);
    let suspended = host.suspend().unwrap();
    let staging = |pid| Regions { process: ids(pid), ranges: vec![Range { start: 1 << 20, end: 3 << 20 }] };
    assert_eq!(suspended.staging, [staging(101), staging(103)]);
    host.done.clear();
    let left = |pid| Regions { process: ids(pid), ranges: vec![Range { start: 4096, end: 8192 }] };
    assert_eq!(host.remap_all().unwrap(), [left(101), left(103)]);
    assert_eq!(host.done, ["held 101", "held 102", "held 103", "remapped 101", "remapped 103"]);
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
    assert_eq!((host.cuda(pid(101)), host.cuda(pid(103))), (CHECKPOINTED, CHECKPOINTED));
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 2 });
    assert!(host.is_untouched());
}

#[test]
fn a_swap_that_fails_leaves_the_container_suspended() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, process(Cuda::No)), (103, process(RUNNING))]);
    host.suspend().unwrap();
    host.unremappable = Some(pid(103));
    assert!(host.remap_all().unwrap_err().to_string().contains("cannot remap process 103"));
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 2 });
    assert!(host.is_untouched());
}

#[test]
fn a_container_without_cuda_is_only_frozen() {
    let mut host = Bed::of([(101, process(Cuda::No))]);
    assert_eq!(host.suspend().unwrap(), Suspended::default());
    assert!(host.frozen && host.ran.is_empty() && !host.processes[&pid(101)].held);
}

#[test]
fn processes_keep_the_devices_that_are_left_and_a_restored_container_opens_those_of_use() {
    let forked = Process { inherited: true, ..process(RUNNING) };
    let mut host =
        Bed::of([(101, forked), (102, process(Cuda::Residue)), (103, process(Cuda::Nvml)), (104, process(RUNNING))]);
    let left = |pid, paths: &[(u32, &str)]| LeftDevices {
        process: ids(pid),
        paths: paths.iter().map(|(fd, path)| (*fd, PathBuf::from(path))).collect(),
    };
    let node = [(7, "/dev/nvidia0")];
    assert_eq!(host.suspend().unwrap().devices, [left(101, &node), left(102, &[]), left(103, &node)]);
    assert_eq!((host.cuda(pid(102)), host.cuda(pid(103))), (Cuda::Residue, Cuda::Nvml));
    host.resume(true).unwrap();
    assert!(host.is_untouched());
}

#[test]
fn a_process_that_is_about_to_use_cuda_is_waited_for_and_saved() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, process(Cuda::Beginner))]);
    assert_eq!(host.suspend().unwrap().processes.len(), 2);
    assert_eq!((host.cuda(pid(101)), host.cuda(pid(102)), host.frozen), (CHECKPOINTED, CHECKPOINTED, true));
}

#[test]
fn a_process_that_begins_to_use_cuda_after_the_checkpoint_of_others_is_saved_in_the_next_try() {
    let mut host = Bed::of([(101, process(RUNNING))]);
    host.latecomers = vec![(pid(102), process(RUNNING))];
    assert_eq!(host.suspend().unwrap().processes.len(), 2);
    assert_eq!(host.done[..4], ["locked 101", "checkpointed 101", "locked 101", "running 101"].map(str::to_owned));
    assert_eq!((host.cuda(pid(101)), host.cuda(pid(102)), host.frozen), (CHECKPOINTED, CHECKPOINTED, true));
}

#[test]
fn processes_that_keep_beginning_to_use_cuda_fail_the_session() {
    let mut host = Bed::of([(101, process(RUNNING))]);
    host.latecomers = (102..110).map(|number| (pid(number), process(RUNNING))).collect();
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("is about to use CUDA: try again"), "{error}");
    assert!(host.is_untouched());
}

#[test]
fn a_process_that_appears_meanwhile_is_found() {
    let mut host = Bed::of([(101, process(RUNNING))]);
    host.newcomer = Some((pid(102), process(RUNNING)));
    assert_eq!(host.suspend().unwrap().processes.len(), 2);
    assert_eq!(host.cuda(pid(102)), CHECKPOINTED);
}

#[test]
fn while_one_is_busy_the_others_are_unlocked() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, Process { busy: 2, ..process(RUNNING) })]);
    host.suspend().unwrap();
    assert_eq!(host.done[..4], ["locked 101", "running 101", "locked 101", "running 101"].map(str::to_owned));
    assert!(host.slept > Duration::ZERO);
}

#[test]
fn work_that_does_not_end_fails_the_session_by_its_deadline() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, Process { busy: u32::MAX, ..process(RUNNING) })]);
    let error = host.with(|session| session.suspend(true, Duration::ZERO, SHORT_CALL)).unwrap_err();
    assert!(error.to_string().contains("process 102 has had GPU work"), "{error}");
    assert!(host.is_untouched());
}

#[test]
fn managed_memory_is_named_and_everything_undone() {
    let failure = Some(CallFailure::Refused(CudaResult::NOT_SUPPORTED));
    let mut host = Bed::of([(101, process(RUNNING)), (102, Process { checkpoint: failure, ..process(RUNNING) })]);
    let error = host.suspend().unwrap_err();
    assert!(error.to_string().contains("process 102: it uses CUDA managed memory"), "{error}");
    assert!(host.is_untouched());
}

#[test]
fn state_that_would_not_fit_into_memory_is_left_on_the_gpu() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, process(RUNNING))]);
    host.memory_left = Some(MemoryLeft { bytes: 5 << 30, is_limited: true });
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("8.0 GiB") && error.contains("5.0 GiB are left (the memory limit"), "{error}");
    assert!(host.is_untouched());
}

#[test]
fn a_stopped_process_is_continued_for_the_driver_and_stopped_again() {
    let mut host = Bed::of([(101, Process { stopped: true, ..process(RUNNING) })]);
    host.suspend().unwrap();
    assert!(host.processes[&pid(101)].stopped);
    host.resume(false).unwrap();
    assert!(host.processes[&pid(101)].stopped && !host.processes[&pid(101)].held && !host.frozen);
}

#[test]
fn what_somebody_else_has_checkpointed_is_left_alone() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, process(CHECKPOINTED))]);
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("process 102 is checkpointed already"), "{error}");
}

#[test]
fn a_restore_that_fails_is_tried_again() {
    let mut host = Bed::of([(101, Process { restore_fails: 2, ..process(CHECKPOINTED) })]);
    host.resume(true).unwrap();
    assert!(host.is_untouched());
    let failing = Process { restore_fails: 9, ..process(CHECKPOINTED) };
    let mut host = Bed::of([(101, failing), (102, process(CHECKPOINTED))]);
    let error = host.resume(false).unwrap_err().to_string();
    assert!(error.contains("cannot restore process 101"), "{error}");
    assert_eq!(
        (host.cuda(pid(102)), host.processes[&pid(102)].held),
        (RUNNING, false),
        "the others have their state back"
    );
    assert!(host.processes[&pid(101)].held, "it would run without its GPU state");
    assert_eq!(host.owes().steps, [Step::Checkpointed(pid(101)), Step::Held(pid(101))]);
    assert!(host.owes().to_string().contains("the GPU state of process 101 is not back"), "{}", host.owes());
    while !host.pay().is_paid() {}
    assert_eq!((host.cuda(pid(101)), host.processes[&pid(101)].held), (RUNNING, false));
}

#[test]
fn what_is_only_locked_is_unlocked_though_its_threads_do_not_halt() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, process(RUNNING))]);
    host.fault = Some(Fault { action: "settle", after: 1, times: u32::MAX, is_done: false });
    let error = host.suspend().unwrap_err().to_string();
    assert_eq!(error, "cannot settle the container: as told");
    assert!(host.is_untouched() && host.owes().is_paid());
    assert_eq!(host.failed, 1, "an unlock waits for no thread");
}

#[test]
fn what_is_checkpointed_is_restored_though_its_threads_do_not_halt() {
    let mut host = Bed::of([(101, process(RUNNING)), (102, process(RUNNING))]);
    host.suspend().unwrap();
    host.fault = Some(Fault { action: "settle", after: 0, times: u32::MAX, is_done: false });
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 2 });
    assert!(host.is_untouched());
}

#[test]
fn a_process_that_the_driver_gave_up_is_lost_and_no_debt() {
    let mut host = Bed::of([(101, process(Cuda::State(ProcessState::Failed))), (102, process(CHECKPOINTED))]);
    let error = host.resume(false).unwrap_err().to_string();
    assert!(error.contains("process 101 is failed"), "{error}");
    assert!(host.owes().is_paid() && host.processes.values().all(|process| !process.held));
    assert_eq!(host.cuda(pid(102)), RUNNING);
}

#[test]
fn processes_that_are_gone_owe_nothing() {
    let mut host = Bed::of([(101, Process { restore_fails: 99, ..process(CHECKPOINTED) })]);
    host.resume(false).unwrap_err();
    assert!(!host.owes().is_paid());
    host.processes.clear();
    assert!(host.pay().is_paid());
}

#[test]
fn state_goes_back_when_a_neighbour_has_left_the_gpu() {
    let mut host = Bed::of([(101, process(CHECKPOINTED))]);
    host.had_on_gpu(pid(101), 8 << 30);
    host.free = vec![1 << 30, 7 << 30, 8 << 30];
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 1 });
    assert_eq!(host.free.len(), 1, "it has waited");
    assert!(host.is_untouched());
}

#[test]
fn a_driver_is_not_asked_for_what_it_would_refuse_for_ever() {
    let mut host = Bed::of([(101, process(CHECKPOINTED)), (102, process(RUNNING))]);
    host.had_on_gpu(pid(101), 8 << 30);
    host.free = vec![6 << 30];
    let error = host.resume(false).unwrap_err().to_string();
    assert!(error.contains("8.0 GiB have to go back to GPU-a, where 6.0 GiB are free"), "{error}");
    assert!(error.contains("process 102 has 4.0 GiB"), "{error}");
    assert_eq!(host.cuda(pid(101)), CHECKPOINTED);
    assert!(host.processes[&pid(101)].held && !host.processes[&pid(102)].held);
    host.free = vec![9 << 30];
    assert!(host.pay().is_paid());
    assert_eq!((host.cuda(pid(101)), host.processes[&pid(101)].held), (RUNNING, false));
}

#[test]
fn a_container_with_a_limit_is_refused_where_nothing_says_that_its_state_fits() {
    let limit = MemoryLeft { bytes: 5 << 30, is_limited: true };
    let members = [(101, process(RUNNING)), (102, process(RUNNING))];
    let mut host = Bed::of(members.clone());
    (host.is_blind, host.memory_left) = (true, Some(limit));
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("there is no NVML") && error.contains("leaves 5.0 GiB: make NVML reachable"), "{error}");
    assert!(host.is_untouched());
    // NVML counts pids of another namespace.
    let mut host = Bed::of(members.clone());
    (host.unlisted, host.memory_left, host.free) = (Some(pid(102)), Some(limit), vec![60 << 30]);
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("NVML does not say how much process 102 has"), "{error}");
    assert!(host.is_untouched());
    // All that is used of the GPU would fit.
    let mut host = Bed::of(members.clone());
    (host.unlisted, host.memory_left, host.free) = (Some(pid(102)), Some(limit), vec![76 << 30]);
    host.suspend().unwrap();
    // The machine's memory is no limit of the container's.
    let mut host = Bed::of(members);
    (host.is_blind, host.memory_left) = (true, Some(MemoryLeft { is_limited: false, ..limit }));
    host.suspend().unwrap();
}

#[test]
fn what_the_driver_refuses_is_named() {
    let refused = Some(CallFailure::Refused(CudaResult::NOT_SUPPORTED));
    for (uses, word) in [
        (Unsupported { cupti: true, ..Unsupported::default() }, "CUPTI"),
        (Unsupported { mps: true, ..Unsupported::default() }, "MPS"),
    ] {
        let mut host = Bed::of([(101, Process { checkpoint: refused.clone(), ..process(RUNNING) })]);
        host.uses = uses;
        let error = host.suspend().unwrap_err().to_string();
        assert!(error.contains(word) && !error.contains("managed"), "{error}");
        assert!(host.is_untouched());
    }
}

#[test]
fn what_can_never_work_is_refused_before_anything_is_locked() {
    for (uses, word) in [
        (Unsupported { mig: true, ..Unsupported::default() }, "(MIG)"),
        (Unsupported { ipc: true, ..Unsupported::default() }, "CUDA IPC"),
    ] {
        let mut host = Bed::of([(101, process(RUNNING))]);
        host.uses = uses;
        let error = host.suspend().unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert!(host.is_untouched() && host.done.is_empty());
    }
}

#[test]
fn a_container_that_is_not_filled_yet_is_held_until_it_is() {
    let processes = [(101, process(CHECKPOINTED)), (102, process(Cuda::No)), (103, process(CHECKPOINTED))];
    let mut host = Bed::of(processes.clone());
    assert_eq!(host.resume_restored(true).unwrap(), Resumed { restored: 2 });
    assert_eq!(host.done[..3], ["held 102", "mapped 101", "locked 101"], "the first before anything is thawed");
    assert_eq!(host.done.last().unwrap(), "staging is checked");
    assert_eq!((host.cuda(pid(101)), host.cuda(pid(103)), host.frozen), (RUNNING, RUNNING, false));
    assert!(host.processes.values().all(|process| !process.held));
    let mut host = Bed::of(processes);
    assert_eq!(host.resume_restored(false), Err(SessionError::Unfilled));
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
}

#[test]
fn a_container_whose_saved_gpu_state_is_damaged_does_not_run() {
    let mut host = Bed::of([(101, process(CHECKPOINTED)), (102, process(Cuda::No))]);
    host.is_damaged = true;
    host.resume_restored(true).unwrap_err();
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
}

#[test]
fn a_container_that_is_not_filled_and_whose_restore_fails_stays_frozen() {
    let failing = Process { restore_fails: 9, ..process(CHECKPOINTED) };
    let mut host = Bed::of([(101, failing), (102, process(Cuda::No))]);
    let error = host.resume_restored(true).unwrap_err().to_string();
    assert!(error.contains("cannot restore process 101"), "{error}");
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
}

#[test]
fn a_guardian_that_takes_over_finds_what_is_to_be_undone() {
    let states = [ProcessState::Running, ProcessState::Locked, ProcessState::Checkpointed];
    let mut host = Bed::of(states.iter().zip(101..).map(|(state, pid)| (pid, process(Cuda::State(*state)))));
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 1 });
    assert!(host.is_untouched());
}

#[test]
fn processes_that_are_not_inits_descendants_are_left_out_of_what_is_saved() {
    let child = support::Program::play("sleeper");
    let (init, container) = (HostPid::own(), ContainerPid::new(7).unwrap());
    let staging = |host: HostPid| Regions { process: ProcessIds { host, container }, ranges: Vec::new() };
    let process = SuspendedProcess { pid: container, staged: 0, gpus: Vec::new() };
    let mut suspended = Suspended {
        staging: vec![staging(pid(1)), staging(child.pid), staging(init)],
        processes: vec![
            SuspendedProcess { pid: ContainerPid::new(3).unwrap(), ..process.clone() },
            process.clone(),
            process.clone(),
        ],
        ..Suspended::default()
    };
    assert_eq!(suspended.leave_out_execs(init), [pid(1)]);
    assert_eq!(suspended.staging, [staging(child.pid), staging(init)]);
    assert_eq!(suspended.processes, [process.clone(), process]);
}

#[test]
fn what_is_owed_is_paid_without_a_change_of_who_is_frozen() {
    for is_resumed in [true, false] {
        let mut host = Bed::of([(101, Process { restore_fails: 9, ..process(CHECKPOINTED) })]);
        host.resume(true).unwrap_err();
        assert!(host.frozen && !host.owes().is_paid());
        // Somebody resumes the container, or does not.
        host.frozen = !is_resumed;
        while !host.pay().is_paid() {
            assert_eq!(host.frozen, !is_resumed);
        }
        assert_eq!((host.frozen, host.cuda(pid(101))), (!is_resumed, RUNNING));
    }
}

#[test]
fn a_container_that_could_not_be_frozen_again_is_told_and_not_frozen_later() {
    let mut host = Bed::of([(101, process(RUNNING))]);
    host.memory_left = Some(MemoryLeft { bytes: 1, is_limited: true });
    host.fault = Some(Fault { action: "freeze", after: 0, times: 1, is_done: false });
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("give it more memory") && error.contains("cannot freeze the container"), "{error}");
    assert!(host.owes().is_paid() && host.cuda(pid(101)) == RUNNING && !host.frozen);
    host.pay();
    assert!(!host.frozen);
}
