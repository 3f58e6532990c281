//! Every action of a machine fails, at each of its occurrences, once or for ever: whatever is not put back is owed, and is paid
//! when the action succeeds again.

use super::super::*;
use super::host::{Bed, CHECKPOINTED, Cuda, Fault, Process, RUNNING, pid, process};

const ACTIONS: [&str; 14] = [
    "pids",
    "freeze",
    "freeze at rest",
    "thaw",
    "hold",
    "settle",
    "let go",
    "cont",
    "cont unheld",
    "stop",
    "remap",
    "inventory",
    "map",
    "finish",
];
const CALLS: [&str; 5] = ["state", "lock", "checkpoint", "restore", "unlock"];

/// More occurrences than any action has.
const MOST: u32 = 60;

fn faults() -> impl Iterator<Item = Fault> {
    let of_calls = CALLS.iter().flat_map(|action| [(*action, false), (*action, true)]);
    let all = ACTIONS.iter().map(|action| (*action, false)).chain(of_calls);
    all.flat_map(|(action, is_done)| {
        let times = [1, 2, u32::MAX];
        times.into_iter().flat_map(move |times| (0..MOST).map(move |after| Fault { action, after, times, is_done }))
    })
}

fn container() -> Bed {
    let stopped = Process { stopped: true, ..process(RUNNING) };
    Bed::of([(101, process(RUNNING)), (102, process(Cuda::No)), (103, stopped), (104, process(Cuda::Residue))])
}

/// Nothing is left that is not owed.
fn assert_owed(bed: &Bed, frozen: bool, fault: Fault) {
    let owed = bed.owes();
    let owes = |step| owed.steps.contains(&step);
    for (pid, process) in &bed.processes {
        let pid = *pid;
        assert!(!process.held || owes(Step::Held(pid)), "{fault:?}: {pid} is held; owed: {owed}");
        match process.cuda {
            Cuda::State(ProcessState::Locked) => {
                assert!(owes(Step::Locked(pid)) || owes(Step::Checkpointed(pid)), "{fault:?}: {pid} is locked; {owed}");
            }
            CHECKPOINTED => assert!(owes(Step::Checkpointed(pid)), "{fault:?}: {pid} is checkpointed; {owed}"),
            _ => {}
        }
        let is_as_before = process.stopped == (pid.raw() == 103);
        assert!(is_as_before || owes(Step::Continued(pid)), "{fault:?}: {pid} runs; {owed}");
    }
    let is_told = frozen && fault.action == "freeze";
    assert!(bed.frozen == frozen || owes(Step::Freezer) || is_told, "{fault:?}: the freezer; {owed}");
}

/// When nothing fails any more, all is put back.
fn assert_pays(bed: &mut Bed, frozen: bool, fault: Fault) {
    bed.fault = None;
    for _ in 0..3 {
        bed.pay();
    }
    assert!(bed.owes().is_paid(), "{fault:?}: {}", bed.owes());
    assert_put_back(bed, frozen, fault);
}

fn assert_put_back(bed: &Bed, frozen: bool, fault: Fault) {
    // A container that could not be frozen is not frozen later: who paused it may have resumed it since.
    assert!(bed.frozen == frozen || (frozen && fault.action == "freeze"), "{fault:?}: the freezer");
    for (pid, process) in &bed.processes {
        assert!(!process.held, "{fault:?}: {pid} is held");
        assert!(matches!(process.cuda, RUNNING | Cuda::No | Cuda::Residue), "{fault:?}: {pid} is {:?}", process.cuda);
        assert_eq!(process.stopped, pid.raw() == 103, "{fault:?}: {pid}");
    }
}

/// Runs a step with every fault, and counts those that were met.
fn with_each_fault(mut run: impl FnMut(Fault, bool) -> u32) -> u32 {
    let mut met = 0;
    for fault in faults() {
        for paused in [true, false] {
            met += u32::from(run(fault, paused) > 0);
        }
    }
    met
}

#[test]
fn a_suspension_of_which_anything_fails_leaves_nothing_that_is_not_owed() {
    let met = with_each_fault(|fault, paused| {
        let mut bed = container();
        (bed.frozen, bed.fault) = (paused, Some(fault));
        let suspended = bed.with(|session| session.suspend(paused, Duration::from_secs(9), SHORT_CALL));
        if suspended.is_err() {
            assert_owed(&bed, paused, fault);
            assert_pays(&mut bed, paused, fault);
        } else {
            assert!(bed.frozen && [101, 103].iter().all(|number| bed.cuda(pid(*number)) == CHECKPOINTED), "{fault:?}");
            assert!(bed.processes.values().all(|process| !process.held), "{fault:?}");
            assert_pays(&mut bed, paused, fault);
        }
        bed.failed
    });
    assert!(met > 100, "{met} faults were met");
}

#[test]
fn a_resumption_of_which_anything_fails_leaves_nothing_that_is_not_owed() {
    let met = with_each_fault(|fault, frozen| {
        let mut bed = container();
        bed.suspend().unwrap();
        (bed.fault, bed.begun, bed.failed) = (Some(fault), 0, 0);
        let resumed = bed.resume(frozen);
        if resumed.is_err() {
            assert_owed(&bed, frozen, fault);
        } else {
            assert_put_back(&bed, frozen, fault);
            assert!(bed.owes().is_paid(), "{fault:?}: {}", bed.owes());
        }
        let failed = bed.failed;
        assert_pays(&mut bed, frozen, fault);
        failed
    });
    assert!(met > 50, "{met} faults were met");
}

#[test]
fn another_session_pays_what_a_dead_one_left() {
    with_each_fault(|fault, frozen| {
        let mut dead = container();
        dead.fault = Some(fault);
        drop(dead.suspend());
        let mut bed = Bed::with_processes(std::mem::take(&mut dead.processes));
        bed.frozen = dead.frozen;
        for process in bed.processes.values_mut() {
            // Its end lets all go.
            process.held = false;
        }
        drop(bed.resume(frozen));
        for _ in 0..3 {
            bed.pay();
        }
        assert!(bed.owes().is_paid(), "{fault:?}: {}", bed.owes());
        assert!(bed.processes.values().all(|p| matches!(p.cuda, RUNNING | Cuda::No | Cuda::Residue)), "{fault:?}");
        dead.failed
    });
}

#[test]
fn a_remapping_of_which_anything_fails_lets_nothing_run_and_can_be_resumed() {
    let met = with_each_fault(|fault, frozen| {
        let mut bed = container();
        bed.suspend().unwrap();
        (bed.fault, bed.begun, bed.failed) = (Some(fault), 0, 0);
        let remapped = bed.remap_all();
        for (pid, process) in &bed.processes {
            assert!(bed.frozen || process.held || process.stopped, "{fault:?}: {pid} runs");
        }
        if remapped.is_ok() {
            assert!(bed.frozen && bed.processes.values().all(|process| !process.held), "{fault:?}");
        }
        let failed = bed.failed;
        drop(bed.resume(frozen));
        assert_owed(&bed, frozen, fault);
        assert_pays(&mut bed, frozen, fault);
        failed
    });
    assert!(met > 20, "{met} faults were met");
}

#[test]
fn a_restore_beside_a_fill_of_which_anything_fails_runs_nothing() {
    let met = with_each_fault(|fault, succeeds| {
        let mut bed = Bed::of([(101, process(CHECKPOINTED)), (102, process(Cuda::No)), (103, process(CHECKPOINTED))]);
        bed.fault = Some(fault);
        let resumed = bed.resume_restored(succeeds);
        if resumed.is_ok() {
            assert!(succeeds && !bed.frozen && bed.processes.values().all(|process| !process.held), "{fault:?}");
            assert_eq!((bed.cuda(pid(101)), bed.cuda(pid(103))), (RUNNING, RUNNING), "{fault:?}");
        } else {
            for (pid, process) in &bed.processes {
                assert!(bed.frozen || process.held, "{fault:?}: {pid} runs");
            }
        }
        bed.failed
    });
    assert!(met > 20, "{met} faults were met");
}
