//! Sessions on a machine whose driver, freezer and tracer are a few variables.

use std::collections::BTreeMap;

use super::*;
use cuda::{Gpu, GpuProcess};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Cuda {
    No,
    /// Forked from a CUDA process.
    Residue,
    /// In the middle of cuInit.
    Beginner,
    State(ProcessState),
}

#[derive(Clone, Debug)]
struct Process {
    cuda: Cuda,
    stopped: bool,
    held: bool,
    /// Locks that time out before one succeeds.
    busy: u32,
    /// What Checkpoint answers.
    checkpoint: Option<CallFailure>,
    /// Restores that fail before one succeeds.
    restore_fails: u32,
}

fn process(cuda: Cuda) -> Process {
    Process { cuda, stopped: false, held: false, busy: 0, checkpoint: None, restore_fails: 0 }
}

const RUNNING: Cuda = Cuda::State(ProcessState::Running);
const CHECKPOINTED: Cuda = Cuda::State(ProcessState::Checkpointed);

#[derive(Default)]
struct FakeHost {
    processes: BTreeMap<i32, Process>,
    frozen: bool,
    done: Vec<String>,
    memory_left: Option<u64>,
    /// A process that starts when the first one is locked.
    newcomer: Option<(i32, Process)>,
    /// Processes that start when process 101 is checkpointed, one each time.
    latecomers: Vec<(i32, Process)>,
    uncleanable: bool,
    unswappable: Option<i32>,
    is_damaged: bool,
    slept: Duration,
}

impl FakeHost {
    fn of(processes: impl IntoIterator<Item = (i32, Process)>) -> Self {
        Self { processes: processes.into_iter().collect(), frozen: true, ..Self::default() }
    }

    fn suspend(&mut self) -> Result<Suspended, SessionError> {
        Session::new(self, &mut |_| {}).suspend(true, Duration::from_millis(200), SHORT_CALL)
    }

    fn resume(&mut self, frozen: bool) -> Result<Resumed, SessionError> {
        Session::new(self, &mut |_| {}).resume(frozen, &[], SHORT_CALL)
    }

    /// With processes 102 and above to be filled, which succeeds or not.
    fn resume_unfilled(&mut self, succeeds: bool) -> Result<Resumed, SessionError> {
        let mut is_asked = false;
        let processes = vec![SwapProcess { pid: 101, pieces: Vec::new() }];
        let staging = Swap { files: Vec::new(), processes };
        let resumed = Session::new(self, &mut |_| {}).resume_unfilled(&staging, &[], SHORT_CALL, &mut || {
            is_asked = true;
            succeeds
        });
        assert!(is_asked || resumed.is_err(), "nobody waited for the rest");
        resumed
    }

    fn swap_all(&mut self) -> Result<Swapped, SessionError> {
        let processes = [101, 103].map(|pid| SwapProcess { pid, pieces: Vec::new() });
        let swap = Swap { files: Vec::new(), processes: processes.into() };
        Session::new(self, &mut |_| {}).swap(&swap, SHORT_CALL)
    }

    fn cuda(&self, pid: i32) -> Cuda {
        self.processes[&pid].cuda
    }

    fn call(&mut self, pid: i32, call: &Call) -> Result<Answer, CallFailure> {
        assert!(!self.frozen, "a call on a frozen process never returns");
        let Some(process) = self.processes.get_mut(&pid) else {
            return Err(CallFailure::Refused(CudaResult::OPERATING_SYSTEM));
        };
        assert!(!process.stopped, "a call on a stopped process never returns");
        let Cuda::State(state) = process.cuda else {
            return Err(CallFailure::Refused(CudaResult::NOT_INITIALIZED));
        };
        let illegal = Err(CallFailure::Refused(CudaResult::ILLEGAL_STATE));
        let next = match (call, state) {
            (Call::State, state) => return Ok(Answer::State(state)),
            (Call::Lock { timeout_ms }, ProcessState::Running) => {
                assert!(*timeout_ms > 0, "no timeout is for ever");
                if process.busy > 0 {
                    process.busy -= 1;
                    return Err(CallFailure::Refused(CudaResult::NOT_READY));
                }
                self.processes.extend(self.newcomer.take());
                ProcessState::Locked
            }
            (Call::Checkpoint, ProcessState::Locked) => {
                assert!(process.held, "what runs may read what the driver takes away");
                if let Some(failure) = process.checkpoint.clone() {
                    return Err(failure);
                }
                self.processes.extend((pid == 101).then(|| self.latecomers.pop()).flatten());
                ProcessState::Checkpointed
            }
            (Call::Restore { .. }, ProcessState::Checkpointed) => {
                assert!(process.held, "what runs may read what is not back yet");
                if process.restore_fails > 0 {
                    process.restore_fails -= 1;
                    return Err(CallFailure::Hangs);
                }
                ProcessState::Locked
            }
            (Call::Unlock, ProcessState::Locked) => ProcessState::Running,
            _ => return illegal,
        };
        if let Some(process) = self.processes.get_mut(&pid) {
            process.cuda = Cuda::State(next);
        }
        self.done.push(format!("{next} {pid}"));
        Ok(Answer::Done)
    }

    /// It is as it was before.
    fn is_untouched(&self) -> bool {
        self.frozen && self.processes.values().all(|p| !p.held && matches!(p.cuda, RUNNING | Cuda::No | Cuda::Residue))
    }
}

impl Host for FakeHost {
    fn pids(&mut self) -> Result<Vec<i32>, SessionError> {
        Ok(self.processes.keys().copied().collect())
    }

    fn touches_gpu(&mut self, pid: i32) -> bool {
        self.processes[&pid].cuda != Cuda::No
    }

    fn has_drivers_threads(&mut self, pid: i32) -> bool {
        matches!(self.processes[&pid].cuda, Cuda::State(_))
    }

    fn left(&mut self, pid: i32) -> Option<String> {
        let of_driver = matches!(self.processes[&pid].cuda, Cuda::Residue | RUNNING);
        of_driver.then(|| "descriptor 7 of /dev/nvidia0".to_owned())
    }

    fn is_gone(&mut self, pid: i32) -> bool {
        !self.processes.contains_key(&pid)
    }

    fn describe(&mut self, pid: i32) -> String {
        format!("process {pid}")
    }

    fn namespace_pid(&mut self, pid: i32) -> i32 {
        pid - 100
    }

    fn staged(&mut self, _pid: i32, is_first: bool) -> Vec<Range> {
        let small = Range { start: 1 << 12, end: 2 << 12 };
        if is_first { Vec::new() } else { vec![small, Range { start: 1 << 20, end: 3 << 20 }] }
    }

    fn calls(&mut self, calls: &[(i32, Call)], _limit: Duration) -> Vec<Result<Answer, CallFailure>> {
        calls.iter().map(|(pid, call)| self.call(*pid, call)).collect()
    }

    fn inventory(&mut self) -> Result<Inventory, CallFailure> {
        let of = |pid: &i32| GpuProcess { pid: pid.unsigned_abs(), memory: Some(4 << 30) };
        let processes = self.processes.keys().map(of).collect();
        let gpu = Gpu {
            uuid: "GPU-a".into(),
            name: "H100".into(),
            minor: 0,
            memory: 80 << 30,
            mig: false,
            persistence: false,
            processes,
        };
        Ok(Inventory { driver: "580".into(), gpus: vec![gpu] })
    }

    fn memory_left(&mut self) -> Option<(u64, String)> {
        self.memory_left.map(|left| (left, "the limit".to_owned()))
    }

    fn freeze(&mut self) -> Result<(), SessionError> {
        self.frozen = true;
        Ok(())
    }

    fn freeze_at_rest(&mut self) -> Result<(), SessionError> {
        self.freeze()
    }

    fn thaw(&mut self) -> Result<(), SessionError> {
        self.frozen = false;
        Ok(())
    }

    fn hold(&mut self, pid: i32) -> Result<(), SessionError> {
        if let Some(process) = self.processes.get_mut(&pid) {
            process.held = true;
        }
        Ok(())
    }

    fn hold_whole(&mut self, pid: i32) -> Result<(), SessionError> {
        assert!(self.frozen, "it would run until it is held");
        self.done.push(format!("held {pid}"));
        self.hold(pid)
    }

    fn settle(&mut self, _limit: Duration) -> Result<(), SessionError> {
        Ok(())
    }

    fn swap(&mut self, _: &[PathBuf], process: &SwapProcess, _: Duration) -> Result<Vec<Range>, SessionError> {
        assert!(!self.frozen, "a call in a frozen process never returns");
        assert!(self.processes.values().all(|process| process.held), "something runs");
        self.done.push(format!("swapped {}", process.pid));
        if self.unswappable == Some(process.pid) {
            let (action, process) = ("swap".to_owned(), self.describe(process.pid));
            return Err(SessionError::Process { action, process, why: "no".into() });
        }
        Ok(vec![Range { start: 4096, end: 8192 }])
    }

    fn let_go(&mut self) {
        for (pid, process) in &mut self.processes {
            let off_gpu = matches!(process.cuda, CHECKPOINTED);
            assert!(!(process.held && off_gpu) || self.frozen, "{pid} runs without its GPU state");
            process.held = false;
        }
    }

    fn is_stopped(&mut self, pid: i32) -> bool {
        self.processes[&pid].stopped
    }

    fn is_asleep(&mut self, pid: i32) -> bool {
        self.processes[&pid].stopped
    }

    fn mappings(&mut self, pid: i32) -> Vec<(u64, u64)> {
        match self.processes[&pid].cuda {
            Cuda::Beginner => vec![(3, 4)],
            _ => vec![(1, 2)],
        }
    }

    fn wake(&mut self, pid: i32) -> Result<(), SessionError> {
        let process = self.processes.get_mut(&pid).unwrap();
        process.stopped = false;
        process.held = true;
        Ok(())
    }

    fn put_to_sleep(&mut self, pid: i32) -> Result<(), SessionError> {
        self.processes.get_mut(&pid).unwrap().stopped = true;
        Ok(())
    }

    fn clean(&mut self, pid: i32) -> Result<usize, SessionError> {
        if self.uncleanable {
            let (action, process) = ("free the GPU of".to_owned(), self.describe(pid));
            return Err(SessionError::Process { action, process, why: "no".into() });
        }
        self.processes.get_mut(&pid).unwrap().cuda = Cuda::No;
        Ok(3)
    }

    fn map_staging(&mut self, staging: &Swap, _: Duration) -> Result<(), SessionError> {
        assert!(!self.frozen, "a call in a frozen process never returns");
        self.done.extend(staging.processes.iter().map(|process| format!("mapped {}", process.pid)));
        Ok(())
    }

    fn finish_staging(&mut self, _: Duration) -> Result<(), SessionError> {
        self.done.push("staging is checked".to_owned());
        if self.is_damaged { Err(SessionError::Unfilled) } else { Ok(()) }
    }

    fn sleep(&mut self, time: Duration) {
        self.slept += time;
        if self.slept > Duration::from_secs(1) {
            for process in self.processes.values_mut().filter(|process| process.cuda == Cuda::Beginner) {
                process.cuda = RUNNING;
            }
        }
    }
}

#[test]
fn gpu_state_goes_to_memory_and_comes_back() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, process(Cuda::No)), (103, process(RUNNING))]);
    let suspended = host.suspend().unwrap();
    assert_eq!(suspended.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [1, 3]);
    assert!(suspended.processes.iter().all(|process| process.staged == (2 << 20) + (1 << 12)));
    assert_eq!((host.cuda(101), host.cuda(103), host.frozen), (CHECKPOINTED, CHECKPOINTED, true));
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 2 });
    assert!(host.is_untouched());
    let undone: Vec<_> = host.done.iter().rev().take(2).map(String::as_str).collect();
    assert_eq!(undone, ["running 101", "running 103"], "unlocked in reverse order");
}

#[test]
fn memory_is_swapped_while_nothing_of_the_container_runs() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, process(Cuda::No)), (103, process(RUNNING))]);
    let suspended = host.suspend().unwrap();
    let staging = |pid| Staging { pid, namespace_pid: pid - 100, ranges: vec![Range { start: 1 << 20, end: 3 << 20 }] };
    assert_eq!(suspended.staging, [staging(101), staging(103)]);
    host.done.clear();
    let left = |pid| SwappedProcess { pid, left: vec![Range { start: 4096, end: 8192 }] };
    assert_eq!(host.swap_all().unwrap().processes, [left(101), left(103)]);
    assert_eq!(host.done, ["held 101", "held 102", "held 103", "swapped 101", "swapped 103"]);
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
    assert_eq!((host.cuda(101), host.cuda(103)), (CHECKPOINTED, CHECKPOINTED));
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 2 });
    assert!(host.is_untouched());
}

#[test]
fn a_swap_that_fails_leaves_the_container_suspended() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, process(Cuda::No)), (103, process(RUNNING))]);
    host.suspend().unwrap();
    host.unswappable = Some(103);
    assert!(host.swap_all().unwrap_err().to_string().contains("cannot swap process 103"));
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 2 });
    assert!(host.is_untouched());
}

#[test]
fn a_container_without_cuda_is_only_frozen() {
    let mut host = FakeHost::of([(101, process(Cuda::No))]);
    assert_eq!(host.suspend().unwrap(), Suspended::default());
    assert!(host.frozen && host.done.is_empty());
}

#[test]
fn forked_processes_are_freed_of_the_gpu() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, process(Cuda::Residue))]);
    assert_eq!(host.suspend().unwrap().cleaned, 1);
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, process(Cuda::Residue))]);
    host.uncleanable = true;
    assert!(host.suspend().unwrap_err().to_string().contains("process 102"));
    assert!(host.is_untouched());
}

#[test]
fn a_process_that_is_about_to_use_cuda_is_waited_for_and_saved() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, process(Cuda::Beginner))]);
    assert_eq!(host.suspend().unwrap().processes.len(), 2);
    assert_eq!((host.cuda(101), host.cuda(102), host.frozen), (CHECKPOINTED, CHECKPOINTED, true));
}

#[test]
fn a_process_that_begins_to_use_cuda_after_the_checkpoint_of_others_is_saved_in_the_next_try() {
    let mut host = FakeHost::of([(101, process(RUNNING))]);
    host.latecomers = vec![(102, process(RUNNING))];
    assert_eq!(host.suspend().unwrap().processes.len(), 2);
    assert_eq!(host.done[..4], ["locked 101", "checkpointed 101", "locked 101", "running 101"].map(str::to_owned));
    assert_eq!((host.cuda(101), host.cuda(102), host.frozen), (CHECKPOINTED, CHECKPOINTED, true));
}

#[test]
fn processes_that_keep_beginning_to_use_cuda_fail_the_session() {
    let mut host = FakeHost::of([(101, process(RUNNING))]);
    host.latecomers = (102..110).map(|pid| (pid, process(RUNNING))).collect();
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("is about to use CUDA: try again"), "{error}");
    assert!(host.is_untouched());
}

#[test]
fn a_process_that_appears_meanwhile_is_found() {
    let mut host = FakeHost::of([(101, process(RUNNING))]);
    host.newcomer = Some((102, process(RUNNING)));
    assert_eq!(host.suspend().unwrap().processes.len(), 2);
    assert_eq!(host.cuda(102), CHECKPOINTED);
}

#[test]
fn while_one_is_busy_the_others_are_unlocked() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, Process { busy: 2, ..process(RUNNING) })]);
    host.suspend().unwrap();
    assert_eq!(host.done[..4], ["locked 101", "running 101", "locked 101", "running 101"].map(str::to_owned));
    assert!(host.slept > Duration::ZERO);
}

#[test]
fn work_that_does_not_end_fails_the_session_by_its_deadline() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, Process { busy: u32::MAX, ..process(RUNNING) })]);
    let error = Session::new(&mut host, &mut |_| {}).suspend(true, Duration::ZERO, SHORT_CALL).unwrap_err();
    assert!(error.to_string().contains("process 102 has had GPU work"), "{error}");
    assert!(host.is_untouched());
}

#[test]
fn managed_memory_is_named_and_everything_undone() {
    let failure = Some(CallFailure::Refused(CudaResult::NOT_SUPPORTED));
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, Process { checkpoint: failure, ..process(RUNNING) })]);
    let error = host.suspend().unwrap_err();
    assert!(matches!(&error, SessionError::Managed { process } if process == "process 102"), "{error}");
    assert!(host.is_untouched());
}

#[test]
fn state_that_would_not_fit_into_memory_is_left_on_the_gpu() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, process(RUNNING))]);
    host.memory_left = Some(5 << 30);
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("8.0 GiB") && error.contains("5.0 GiB are left (the limit)"), "{error}");
    assert!(host.is_untouched());
}

#[test]
fn a_stopped_process_is_woken_for_the_driver_and_stopped_again() {
    let mut host = FakeHost::of([(101, Process { stopped: true, ..process(RUNNING) })]);
    host.suspend().unwrap();
    assert!(host.processes[&101].stopped);
    host.resume(false).unwrap();
    assert!(host.processes[&101].stopped && !host.processes[&101].held && !host.frozen);
}

#[test]
fn what_somebody_else_has_checkpointed_is_left_alone() {
    let mut host = FakeHost::of([(101, process(RUNNING)), (102, process(CHECKPOINTED))]);
    let error = host.suspend().unwrap_err().to_string();
    assert!(error.contains("process 102 is checkpointed already"), "{error}");
}

#[test]
fn a_restore_that_fails_is_tried_again() {
    let mut host = FakeHost::of([(101, Process { restore_fails: 2, ..process(CHECKPOINTED) })]);
    host.resume(true).unwrap();
    assert!(host.is_untouched());
    let mut host =
        FakeHost::of([(101, Process { restore_fails: 9, ..process(CHECKPOINTED) }), (102, process(CHECKPOINTED))]);
    let error = host.resume(true).unwrap_err().to_string();
    assert!(error.contains("cannot restore process 101"), "{error}");
    assert_eq!(host.cuda(102), RUNNING, "the others have their state back");
}

#[test]
fn a_container_that_is_not_filled_yet_is_held_until_it_is() {
    let processes = [(101, process(CHECKPOINTED)), (102, process(Cuda::No)), (103, process(CHECKPOINTED))];
    let mut host = FakeHost::of(processes.clone());
    assert_eq!(host.resume_unfilled(true).unwrap(), Resumed { restored: 2 });
    assert_eq!(host.done[..3], ["held 102", "mapped 101", "locked 101"], "the first before anything is thawed");
    assert_eq!(host.done.last().unwrap(), "staging is checked");
    assert_eq!((host.cuda(101), host.cuda(103), host.frozen), (RUNNING, RUNNING, false));
    assert!(host.processes.values().all(|process| !process.held));
    let mut host = FakeHost::of(processes);
    assert_eq!(host.resume_unfilled(false), Err(SessionError::Unfilled));
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
}

#[test]
fn a_container_whose_saved_gpu_state_is_damaged_does_not_run() {
    let mut host = FakeHost::of([(101, process(CHECKPOINTED)), (102, process(Cuda::No))]);
    host.is_damaged = true;
    host.resume_unfilled(true).unwrap_err();
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
}

#[test]
fn a_container_that_is_not_filled_and_whose_restore_fails_stays_frozen() {
    let failing = Process { restore_fails: 9, ..process(CHECKPOINTED) };
    let mut host = FakeHost::of([(101, failing), (102, process(Cuda::No))]);
    let error = host.resume_unfilled(true).unwrap_err().to_string();
    assert!(error.contains("cannot restore process 101"), "{error}");
    assert!(host.frozen && host.processes.values().all(|process| !process.held));
}

#[test]
fn a_guardian_that_takes_over_finds_what_is_to_be_undone() {
    let states = [ProcessState::Running, ProcessState::Locked, ProcessState::Checkpointed];
    let mut host = FakeHost::of(states.iter().zip(101..).map(|(state, pid)| (pid, process(Cuda::State(*state)))));
    assert_eq!(host.resume(true).unwrap(), Resumed { restored: 1 });
    assert!(host.is_untouched());
}
