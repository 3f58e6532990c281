//! A machine whose driver, freezer and tracer are a few variables, each action of which can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

use cuda::{Gpu, GpuProcess};

use super::super::*;
use memory::ProcessLayout;
use proc::ProcessIds;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cuda {
    No,
    /// Forked from a CUDA process.
    Residue,
    /// In the middle of cuInit.
    Beginner,
    /// With a device open for NVML.
    Nvml,
    State(ProcessState),
}

#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) cuda: Cuda,
    pub(super) stopped: bool,
    pub(super) held: bool,
    /// A thread of it is in the middle of a call: no lock succeeds while that is held.
    pub(super) calling: bool,
    /// In a call that waits without the driver's lock.
    pub(super) waiting: bool,
    /// Another process traces it.
    pub(super) traced: bool,
    /// It has a descriptor of its parent's beside its own GPU state.
    pub(super) inherited: bool,
    /// Locks that time out before one succeeds.
    pub(super) busy: u32,
    /// What Checkpoint answers.
    pub(super) checkpoint: Option<CallFailure>,
    /// Restores that fail before one succeeds.
    pub(super) restore_fails: u32,
}

pub(super) fn process(cuda: Cuda) -> Process {
    let (stopped, held, calling, waiting, traced, inherited) = (false, false, false, false, false, false);
    Process { cuda, stopped, held, calling, waiting, traced, inherited, busy: 0, checkpoint: None, restore_fails: 0 }
}

pub(super) const RUNNING: Cuda = Cuda::State(ProcessState::Running);
pub(super) const CHECKPOINTED: Cuda = Cuda::State(ProcessState::Checkpointed);

/// An action that fails.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) action: &'static str,
    /// How often it succeeds before.
    pub(super) after: u32,
    /// How often it fails then.
    pub(super) times: u32,
    /// A call of the driver is made, and its answer lost.
    pub(super) is_done: bool,
}

#[derive(Default)]
pub(super) struct FakeHost {
    pub(super) processes: BTreeMap<HostPid, Process>,
    pub(super) frozen: bool,
    pub(super) done: Vec<String>,
    pub(super) memory_left: Option<MemoryLeft>,
    /// NVML does not answer.
    pub(super) is_blind: bool,
    /// A process of which NVML does not know.
    pub(super) unlisted: Option<HostPid>,
    /// Free GPU memory, in each answer of NVML's in turn; the last one for ever.
    pub(super) free: Vec<u64>,
    pub(super) uses: Unsupported,
    /// A process that starts when the first one is locked.
    pub(super) newcomer: Option<(HostPid, Process)>,
    /// Processes that start when process 101 is checkpointed, one each time.
    pub(super) latecomers: Vec<(HostPid, Process)>,
    pub(super) unremappable: Option<HostPid>,
    pub(super) is_damaged: bool,
    pub(super) slept: Duration,
    /// Processes that ran at some moment, but for the driver's threads of those with CUDA.
    pub(super) ran: BTreeSet<HostPid>,
    pub(super) fault: Option<Fault>,
    /// How often the action of the fault was begun, and how often it failed.
    pub(super) begun: u32,
    pub(super) failed: u32,
}

/// Returns a pid on the host.
pub(super) fn pid(number: i32) -> HostPid {
    HostPid::new(number).unwrap()
}

/// Returns the pids of a process, which has a smaller number in the container.
pub(super) fn ids(host: i32) -> ProcessIds {
    ProcessIds { host: pid(host), container: ContainerPid::new(host - 100).unwrap() }
}

/// A fake host with what is to be undone on it.
#[derive(Default)]
pub(super) struct Bed {
    host: FakeHost,
    undo: Undo,
}

impl Deref for Bed {
    type Target = FakeHost;

    fn deref(&self) -> &FakeHost {
        &self.host
    }
}

impl DerefMut for Bed {
    fn deref_mut(&mut self) -> &mut FakeHost {
        &mut self.host
    }
}

impl Bed {
    pub(super) fn of(processes: impl IntoIterator<Item = (i32, Process)>) -> Self {
        Self::with_processes(processes.into_iter().map(|(number, process)| (pid(number), process)).collect())
    }

    pub(super) fn with_processes(processes: BTreeMap<HostPid, Process>) -> Self {
        let host = FakeHost { processes, frozen: true, ..FakeHost::default() };
        Self { host, undo: Undo::default() }
    }

    pub(super) fn with<T>(&mut self, run: impl FnOnce(Session<'_, FakeHost>) -> T) -> T {
        run(Session::new(&mut self.host, &mut self.undo, &mut |_| {}))
    }

    /// Suspends a container that runs.
    pub(super) fn suspend_running(&mut self) -> Result<Suspended, SessionError> {
        self.with(|session| session.suspend(false, Duration::from_millis(200), SHORT_CALL))
    }

    pub(super) fn suspend(&mut self) -> Result<Suspended, SessionError> {
        self.with(|session| session.suspend(true, Duration::from_millis(200), SHORT_CALL))
    }

    pub(super) fn resume(&mut self, frozen: bool) -> Result<Resumed, SessionError> {
        self.with(|session| session.resume(frozen, &[], SHORT_CALL))
    }

    pub(super) fn owes(&self) -> Owed {
        self.undo.owed()
    }

    pub(super) fn pay(&mut self) -> Owed {
        self.with(|session| session.pay())
    }

    /// Notes what a process had on the GPU.
    pub(super) fn had_on_gpu(&mut self, pid: HostPid, bytes: u64) {
        self.undo.rooms.insert(pid, vec![OnGpu { uuid: "GPU-a".into(), bytes }]);
    }

    /// With processes 102 and above to be filled, which succeeds or not.
    pub(super) fn resume_restored(&mut self, succeeds: bool) -> Result<Resumed, SessionError> {
        let mut is_asked = false;
        let processes = vec![ProcessLayout { process: ids(101), segments: Vec::new() }];
        let staging = Layout { packs: Vec::new(), processes };
        let resumed = self.with(|session| {
            session.resume_restored(&staging, &[], SHORT_CALL, &mut || {
                is_asked = true;
                succeeds
            })
        });
        assert!(is_asked || resumed.is_err(), "nobody waited for the rest");
        resumed
    }

    pub(super) fn remap_all(&mut self) -> Result<Vec<Regions>, SessionError> {
        let processes = [101, 103].map(|pid| ProcessLayout { process: ids(pid), segments: Vec::new() });
        let layout = Layout { packs: Vec::new(), processes: processes.into() };
        self.with(|session| session.remap(&layout, SHORT_CALL))
    }
}

impl FakeHost {
    /// Notes who runs now.
    fn note_running(&mut self) {
        if !self.frozen {
            let loose = self.processes.iter().filter(|(_, process)| !process.held && !process.stopped);
            self.ran.extend(loose.map(|(pid, _)| *pid));
        }
    }

    /// Begins an action, which fails if it is to.
    fn begin(&mut self, action: &'static str) -> bool {
        let Some(fault) = self.fault.filter(|fault| fault.action == action) else { return true };
        self.begun += 1;
        let fails = self.begun > fault.after && self.begun - fault.after <= fault.times;
        self.failed += u32::from(fails);
        !fails
    }

    fn act(&mut self, action: &'static str) -> Result<(), SessionError> {
        let failure = || SessionError::Container { action: action.to_owned(), why: "as told".into() };
        self.begin(action).then_some(()).ok_or_else(failure)
    }

    fn call(&mut self, pid: HostPid, call: &Call) -> Result<Answer, CallFailure> {
        let action = match call {
            Call::State => "state",
            Call::Lock { .. } => "lock",
            Call::Checkpoint => "checkpoint",
            Call::Restore { .. } => "restore",
            Call::Unlock => "unlock",
        };
        if self.begin(action) {
            return self.called(pid, call);
        }
        if self.fault.is_some_and(|fault| fault.is_done) {
            // Whatever it answers is lost.
            let _ = self.called(pid, call);
        }
        Err(CallFailure::Died)
    }

    pub(super) fn cuda(&self, pid: HostPid) -> Cuda {
        self.processes[&pid].cuda
    }

    fn called(&mut self, pid: HostPid, call: &Call) -> Result<Answer, CallFailure> {
        self.note_running();
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
                if process.calling && process.held {
                    return Err(CallFailure::Refused(CudaResult::NOT_READY));
                }
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
                self.processes.extend((pid == self::pid(101)).then(|| self.latecomers.pop()).flatten());
                ProcessState::Checkpointed
            }
            (Call::Restore { .. }, ProcessState::Checkpointed) => {
                let is_at_risk = self.fault.is_some_and(|fault| ["hold", "settle", "cont"].contains(&fault.action));
                assert!(process.held || is_at_risk, "what runs may read what is not back yet");
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
    pub(super) fn is_untouched(&self) -> bool {
        self.frozen
            && self
                .processes
                .values()
                .all(|p| !p.held && matches!(p.cuda, RUNNING | Cuda::No | Cuda::Residue | Cuda::Nvml))
    }
}

impl Processes for FakeHost {
    fn pids(&mut self) -> Result<Vec<HostPid>, SessionError> {
        self.act("pids")?;
        Ok(self.processes.keys().copied().collect())
    }

    fn is_gone(&mut self, pid: HostPid) -> bool {
        !self.processes.contains_key(&pid)
    }

    fn touches_gpu(&mut self, pid: HostPid) -> bool {
        self.processes[&pid].cuda != Cuda::No
    }

    fn has_drivers_threads(&mut self, pid: HostPid) -> bool {
        matches!(self.processes[&pid].cuda, Cuda::State(_))
    }

    fn has_drivers_library(&mut self, pid: HostPid) -> bool {
        !matches!(self.processes[&pid].cuda, Cuda::No | Cuda::Nvml)
    }

    fn refuse_traced(&mut self, pid: HostPid) -> Result<(), SessionError> {
        let (action, process) = ("hold".to_owned(), self.describe(pid));
        let refused = SessionError::Process { action, process, why: "process 7 (strace) traces it".into() };
        if self.processes[&pid].traced { Err(refused) } else { Ok(()) }
    }

    fn devices(&mut self, pid: HostPid) -> Devices {
        let process = &self.processes[&pid];
        let has_devices = matches!(process.cuda, Cuda::Residue | Cuda::Nvml | RUNNING) || process.inherited;
        let paths = has_devices.then(|| (7, PathBuf::from("/dev/nvidia0")));
        Devices { paths: paths.into_iter().collect(), mappings: 0 }
    }

    fn describe(&mut self, pid: HostPid) -> String {
        format!("process {pid}")
    }

    fn ids(&mut self, pid: HostPid) -> Option<ProcessIds> {
        Some(ids(pid.raw()))
    }

    fn staged(&mut self, _pid: HostPid, is_first: bool) -> Vec<Range> {
        let small = Range { start: 1 << 12, end: 2 << 12 };
        if is_first { Vec::new() } else { vec![small, Range { start: 1 << 20, end: 3 << 20 }] }
    }

    fn mappings(&mut self, pid: HostPid) -> Vec<(u64, u64)> {
        match self.processes[&pid].cuda {
            Cuda::Beginner => vec![(3, 4)],
            Cuda::Nvml => Vec::new(),
            _ => vec![(1, 2)],
        }
    }

    fn is_stopped(&mut self, pid: HostPid) -> bool {
        self.processes.get(&pid).is_some_and(|process| process.stopped)
    }

    fn is_stopping(&mut self, pid: HostPid) -> bool {
        self.is_stopped(pid)
    }

    fn unsupported(&mut self, _pid: HostPid) -> Unsupported {
        self.uses
    }
}

impl Driver for FakeHost {
    fn calls(&mut self, calls: &[(HostPid, Call)], _limit: Duration) -> Vec<Result<Answer, CallFailure>> {
        calls.iter().map(|(pid, call)| self.call(*pid, call)).collect()
    }

    fn inventory(&mut self) -> Result<Inventory, CallFailure> {
        if self.is_blind || !self.begin("inventory") {
            return Err(CallFailure::Impossible("there is no NVML".into()));
        }
        let of = |pid: &HostPid| GpuProcess { pid: pid.raw().unsigned_abs(), memory: Some(4 << 30) };
        let processes = self.processes.keys().filter(|pid| Some(**pid) != self.unlisted).map(of).collect();
        let free = if self.free.len() > 1 { Some(self.free.remove(0)) } else { self.free.first().copied() };
        let gpu = Gpu {
            uuid: "GPU-a".into(),
            name: "H100".into(),
            minor: 0,
            memory: 80 << 30,
            free,
            mig: false,
            persistence: false,
            processes,
        };
        Ok(Inventory { driver: "580".into(), gpus: vec![gpu] })
    }
}

impl Freezer for FakeHost {
    fn freeze(&mut self) -> Result<(), SessionError> {
        self.act("freeze")?;
        self.frozen = true;
        Ok(())
    }

    fn freeze_at_rest(&mut self) -> Result<(), SessionError> {
        self.act("freeze at rest")?;
        self.frozen = true;
        Ok(())
    }

    fn thaw(&mut self) -> Result<(), SessionError> {
        self.act("thaw")?;
        self.frozen = false;
        self.note_running();
        Ok(())
    }

    fn is_frozen(&mut self) -> bool {
        self.frozen
    }

    fn memory_left(&mut self) -> Option<MemoryLeft> {
        self.memory_left
    }
}

impl Tracer for FakeHost {
    fn hold(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.act("hold")?;
        if let Some(process) = self.processes.get_mut(&pid) {
            process.held = true;
        }
        Ok(())
    }

    fn hold_whole(&mut self, pid: HostPid) -> Result<(), SessionError> {
        let touches_gpu = self.touches_gpu(pid);
        assert!(self.frozen || touches_gpu || self.fault.is_some(), "it would run until it is held");
        self.done.push(format!("held {pid}"));
        self.hold(pid)
    }

    fn is_in_driver(&mut self, pid: HostPid) -> bool {
        self.processes.get(&pid).is_some_and(|process| process.calling || process.waiting)
    }

    fn settle(&mut self, _limit: Duration) -> Result<(), SessionError> {
        self.act("settle")
    }

    fn let_go(&mut self, keep: &[HostPid]) -> Result<(), SessionError> {
        self.act("let go")?;
        for (pid, process) in &mut self.processes {
            if keep.contains(pid) {
                continue;
            }
            let off_gpu = matches!(process.cuda, CHECKPOINTED);
            assert!(!(process.held && off_gpu) || self.frozen, "{pid} runs without its GPU state");
            process.held = false;
        }
        self.note_running();
        Ok(())
    }

    fn cont(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.act("cont")?;
        let Some(process) = self.processes.get_mut(&pid) else { return Ok(()) };
        process.stopped = false;
        process.held = true;
        Ok(())
    }

    fn cont_unheld(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.act("cont unheld")?;
        if let Some(process) = self.processes.get_mut(&pid) {
            process.stopped = false;
        }
        Ok(())
    }

    fn stop(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.act("stop")?;
        self.done.push(format!("stopped {pid}"));
        if let Some(process) = self.processes.get_mut(&pid) {
            process.stopped = true;
        }
        Ok(())
    }

    fn remap(&mut self, _: &[PathBuf], of: &ProcessLayout, _: Duration) -> Result<Vec<Range>, SessionError> {
        self.act("remap")?;
        assert!(!self.frozen, "a call in a frozen process never returns");
        assert!(self.processes.values().all(|process| process.held), "something runs");
        self.done.push(format!("remapped {}", of.process.host));
        if self.unremappable == Some(of.process.host) {
            let (action, process) = ("remap".to_owned(), self.describe(of.process.host));
            return Err(SessionError::Process { action, process, why: "no".into() });
        }
        Ok(vec![Range { start: 4096, end: 8192 }])
    }

    fn map_staging(&mut self, staging: &Layout, _: Duration) -> Result<(), SessionError> {
        self.act("map")?;
        assert!(!self.frozen, "a call in a frozen process never returns");
        self.done.extend(staging.processes.iter().map(|of| format!("mapped {}", of.process.host)));
        Ok(())
    }

    fn finish_staging(&mut self, _: Duration) -> Result<(), SessionError> {
        self.act("finish")?;
        self.done.push("staging is checked".to_owned());
        if self.is_damaged { Err(SessionError::Unfilled) } else { Ok(()) }
    }
}

impl Host for FakeHost {
    fn sleep(&mut self, time: Duration) {
        self.slept += time;
        if self.slept > Duration::from_secs(1) {
            for process in self.processes.values_mut().filter(|process| process.cuda == Cuda::Beginner) {
                process.cuda = RUNNING;
            }
        }
    }
}
