//! The steps of a checkpoint, taken on this machine.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::memory::Regions;
use bulk::Published;
use cgroup::Cgroup;
use checkpoint::{Address, Draft, LogFolder, Manifest, MemoryPlace, SavedGpus};
use criu::Criu;
use gpu::Keeper;
use images::{Devices, OpenFiles, RewriteError};
use phase::{Cancel, Phase, Timeline};
use proc::{HostPid, Status};
use reaper::{Child, Reaper};
use role::{Because, Failure};
use runtime::{CheckpointRequest, OciRuntime, Review, Tcp};
use rustix::process::Signal;
use tokio::runtime::Runtime;

use crate::checkpoint::{Actions, After};
use crate::connections::Connections;
use crate::error::SessionError;
use crate::limits::GPU;
use crate::memory::{self, BigMemory, Described, Publication};
use crate::network;
use crate::order::CheckpointOrder;
use crate::undo::{Step, Undo};

/// CRIU's name for its log of a dump.
const LOG: &str = "dump.log";
/// Longest time for a killed init to end. A killed process is gone in milliseconds, unless it has much memory to free.
const END: Duration = Duration::from_secs(30);
/// Longest time for the criu of a dead session to undo its work. Its longest stage writes memory, at 1 to 2 GB/s.
const CRIU_UNDOES: Duration = Duration::from_secs(60);
/// Pause between two looks for that criu.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Services of the session's process.
pub(crate) struct Services {
    /// Drives CRIU and runtimes.
    pub(crate) tokio: Runtime,
    pub(crate) reaper: Reaper,
    pub(crate) timeline: Timeline,
    pub(crate) cancel: Cancel,
}

/// One checkpoint of one container on this machine.
pub(crate) struct Machine<'a> {
    services: &'a Services,
    order: &'a CheckpointOrder,
    runtime: Arc<dyn OciRuntime>,
    init: Child,
    cgroup: Cgroup,
    /// Bytes of memory that the container had before, in no file.
    resident: Option<u64>,
    keeper: Option<Keeper>,
    /// The GPU state is on its way back.
    is_resuming: bool,
    /// A session that died began the checkpoint.
    is_successor: bool,
    /// Shared with the review of the images, which completes the record.
    draft: Arc<Mutex<Option<Draft>>>,
    /// Folder of the draft.
    folder: PathBuf,
    log: Option<LogFolder>,
    gpu: Option<SavedGpus>,
    /// Devices of the driver that processes have beside the state that was moved.
    devices: Vec<Devices>,
    /// TCP connections, held during the dump and up to the container's end.
    connections: Option<Connections>,
    /// Addresses in the container's network.
    addresses: Vec<Address>,
    staging: Vec<Regions>,
    memory: Option<BigMemory>,
    /// Memory goes to the node store, or beside the images.
    is_saving: bool,
    publication: Option<Publication>,
    publishing: Option<JoinHandle<Result<Option<Published>, SessionError>>>,
    published: Option<Published>,
    /// The record was completed before CRIU was let to kill the container.
    is_committed: Arc<AtomicBool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> SessionError {
    let path = path.to_owned();
    move |source| SessionError::File { action, path, source }
}

impl<'a> Machine<'a> {
    pub(crate) fn new(services: &'a Services, order: &'a CheckpointOrder) -> Result<Self, SessionError> {
        let _enter = services.tokio.enter();
        let init = services.reaper.adoption().adopt(order.init.raw());
        let init = init.map_err(file("watch", &order.init.path("")))?;
        let runtime = order.subject.runtime.runtime(&services.reaper);
        let cgroup = runtime.cgroup(&order.subject.id, order.init)?;
        Ok(Self {
            services,
            order,
            runtime,
            init,
            resident: cgroup.anonymous_memory(),
            cgroup,
            keeper: None,
            is_resuming: false,
            is_successor: false,
            draft: Arc::default(),
            folder: order.options.folder.clone(),
            log: None,
            gpu: None,
            devices: Vec::new(),
            connections: None,
            addresses: Vec::new(),
            staging: Vec::new(),
            memory: None,
            is_saving: false,
            publication: None,
            publishing: None,
            published: None,
            is_committed: Arc::default(),
        })
    }

    /// Returns what becomes of the container.
    pub(crate) fn after(&self) -> After {
        if self.order.options.exit { After::Exit } else { After::LeaveRunning }
    }

    /// Returns whether no process of the container is left.
    pub(crate) fn is_gone(&self) -> bool {
        self.cgroup.pids().is_ok_and(|pids| pids.is_empty())
    }

    /// Returns the checkpoint of a session that died, to be undone.
    pub(crate) fn after_death(services: &'a Services, order: &'a CheckpointOrder) -> Result<Self, SessionError> {
        let machine = Self { is_successor: true, ..Self::new(services, order)? };
        machine.wait_for_criu();
        if order.paused
            && let Err(error) = machine.cgroup.freeze()
        {
            // Each step of the undoing freezes it as well.
            tracing::warn!("a paused container runs after the death of its session: {}", phase::chain(&error));
        }
        Ok(machine)
    }

    /// Returns whether the checkpoint of a dead session is whole, and the container as the order wants it but for what is
    /// owed to it.
    pub(crate) fn stands(&self) -> Result<bool, Failure> {
        let is_as_ordered = self.after() == After::LeaveRunning || is_ending(self.order.init);
        Ok(is_as_ordered && complete_remains(self.order)?.map(Draft::leave).is_some())
    }

    /// Publishes a checkpoint that stands. Waits for the end of a container that CRIU has killed.
    pub(crate) fn finish_after_death(&mut self) -> Result<(), Failure> {
        finish_remains(self.order)?;
        match self.after() {
            After::LeaveRunning => Ok(()),
            After::Exit => self.wait_for_end().map_err(|error| Failure::of(&error)),
        }
    }

    /// Waits until no criu traces the container. The criu of a dead session finds its socket closed at its next stage and
    /// undoes its work; killed before, it would leave code of its own in the processes.
    fn wait_for_criu(&self) {
        let deadline = Instant::now() + CRIU_UNDOES;
        while let Some(criu) = self.tracer() {
            if Instant::now() >= deadline {
                tracing::warn!(criu = criu.raw(), "criu of a dead session does not end, and is killed");
                // It may have ended by itself.
                let _ = rustix::process::kill_process(criu.as_pid(), Signal::KILL);
                return;
            }
            std::thread::sleep(BETWEEN_LOOKS);
        }
    }

    /// Returns the criu that traces a process of the container.
    fn tracer(&self) -> Option<HostPid> {
        let pids = self.cgroup.pids().unwrap_or_default();
        let mut tracers = pids.into_iter().filter_map(|pid| Status::of(pid).ok()?.tracer());
        tracers.find(|pid| proc::name(*pid).is_ok_and(|name| name == "criu"))
    }

    /// Returns whether threads of the container are held, so that CRIU cannot seize them.
    fn is_held(&self) -> bool {
        let owed = self.keeper.as_ref().map(Keeper::owes);
        owed.is_some_and(|owed| owed.steps.iter().any(|step| matches!(step, gpu::Step::Held(_))))
    }

    fn keeper(&mut self) -> &mut Keeper {
        self.keeper.get_or_insert_with(Keeper::new)
    }

    fn begin_memory(&mut self) -> Result<BigMemory, SessionError> {
        let memory = BigMemory::begin(self.order)?;
        self.is_saving = true;
        Ok(memory)
    }

    fn remap(&mut self, memory: &mut BigMemory) -> Result<(), SessionError> {
        let staging = self.staging.clone();
        self.enter(Phase::SaveMemory);
        let saved = memory.saving.save(&staging)?;
        memory.files.clone_from(&saved.packs);
        let timeline = self.services.timeline.clone();
        let cgroup = self.cgroup.clone();
        let mut began = |phase| timeline.enter(phase);
        let remapped = self.keeper().remap(&cgroup, &saved, GPU, &mut began);
        match remapped {
            Ok(left) => memory.left = left,
            // CRIU dumps what is not in files then, which takes longer and is as good.
            Err(error) if !self.is_held() => {
                tracing::warn!("its GPU memory goes through the images: {}", phase::chain(&error));
                memory.left = staging;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn record(&self) -> Record {
        let order = self.order;
        Record {
            id: order.subject.id.clone(),
            runtime: order.subject.runtime.name(),
            allow: order.options.allow,
            gpu: self.gpu.clone(),
            resident: self.resident,
            addresses: self.addresses.clone(),
            timeline: self.services.timeline.clone(),
        }
    }
}

/// Contents of the commit record, but for the memory.
struct Record {
    id: String,
    runtime: String,
    allow: runtime::Allow,
    gpu: Option<SavedGpus>,
    resident: Option<u64>,
    addresses: Vec<Address>,
    timeline: Timeline,
}

impl Record {
    fn complete(self, published: Option<Published>, draft: &Mutex<Option<Draft>>) -> Result<(), SessionError> {
        let Self { id, runtime, allow, gpu, resident, addresses, timeline } = self;
        let manifest = Manifest::new(&id, runtime, allow, gpu, published, resident, &timeline);
        let manifest = manifest.with_addresses(addresses);
        let mut draft = lock(draft);
        let draft = draft.as_mut().ok_or(SessionError::Bug("the draft of a checkpoint"))?;
        let folder = draft.folder().to_owned();
        draft.complete(&manifest).map_err(file("complete the checkpoint in", &folder))
    }
}

impl Actions for Machine<'_> {
    fn draft(&mut self) -> Result<(), SessionError> {
        let folder = &self.order.options.folder;
        let draft = Draft::begin(folder, &self.order.subject.id, self.order.began);
        let draft = draft.map_err(file("use the folder", folder))?;
        self.folder = draft.folder().to_owned();
        *lock(&self.draft) = Some(draft);
        let (subject, work) = (&self.order.subject, self.order.options.work.as_deref());
        let log = LogFolder::make(&subject.logs, work, &subject.namespace, &subject.id, LOG);
        self.log = Some(log.map_err(file("make a folder for the log of", folder))?);
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), SessionError> {
        self.enter(Phase::Freeze);
        self.cgroup.freeze_at_rest(self.order.paused).map_err(SessionError::Freezer)
    }

    fn uses_gpu(&mut self) -> Result<bool, SessionError> {
        let pids = self.cgroup.pids().map_err(SessionError::Cgroup)?;
        Ok(pids.into_iter().any(cuda::process::touches_gpu))
    }

    fn suspend(&mut self) -> Result<(), SessionError> {
        let (init, paused, patience) = (self.order.init, self.order.paused, self.order.options.patience);
        let timeline = self.services.timeline.clone();
        let cgroup = self.cgroup.clone();
        let mut began = |phase| timeline.enter(phase);
        let mut suspended = self.keeper().suspend(&cgroup, paused, patience, GPU, &mut began)?;
        for pid in suspended.leave_out_execs(self.order.init) {
            tracing::warn!("process {pid} was started by an exec and is not saved; it goes on if the container does");
        }
        let devices = suspended.devices.iter();
        let devices = devices.map(|of| Devices { pid: of.process.container, paths: of.paths.clone() });
        self.devices = devices.collect();
        self.staging = std::mem::take(&mut suspended.staging);
        self.staging.retain(|of| !of.ranges.is_empty());
        self.gpu = SavedGpus::of(suspended, &self.order.devices, init);
        Ok(())
    }

    fn save_memory(&mut self) -> Result<(), SessionError> {
        if self.order.options.memory == MemoryPlace::Images || !self.runtime.drives_criu() {
            return Ok(());
        }
        if !self.staging.is_empty() {
            let mut memory = self.begin_memory()?;
            self.remap(&mut memory)?;
            self.memory = Some(memory);
        }
        // Nothing of the container runs from here on until CRIU is done.
        let shared = memory::shared(&self.cgroup, self.order.init, &self.staging)?;
        let is_much = self.memory.is_some() || shared.bytes() >= bulk::LEAST_MEMORY;
        if !is_much && memory::resident(&self.cgroup)? < bulk::LEAST_MEMORY {
            return Ok(());
        }
        let mut memory = self.memory.take().map_or_else(|| self.begin_memory(), Ok)?;
        if is_much && !shared.files.is_empty() {
            self.enter(Phase::SaveMemory);
            memory.save_shared(shared);
        }
        self.memory = Some(memory);
        Ok(())
    }

    fn save_shm(&mut self) -> Result<(), SessionError> {
        let Some(shm) = &self.order.shm else { return Ok(()) };
        self.services.timeline.enter(Phase::SaveShm);
        shm.save(&self.folder).map_err(file("save /dev/shm in", &self.folder))
    }

    fn dump(&mut self) -> Result<(), SessionError> {
        let (order, services) = (self.order, self.services);
        let addresses = network::addresses(order.init);
        self.addresses = addresses.map_err(file("look into the network", &order.init.path("ns/net")))?;
        let images = self.folder.clone();
        let memory = self.memory.as_ref();
        let (external_files, sparse) =
            memory.map(|memory| (memory.files.clone(), memory.sparse.clone())).unwrap_or_default();
        if let Some(memory) = self.memory.take() {
            // If CRIU says nothing of its version, the dump will fail for a better reason.
            let criu = services.tokio.block_on(Criu::new(services.reaper.clone()).version());
            let machine = Described {
                cgroup: &self.cgroup,
                runtime_name: &order.subject.runtime.name(),
                criu: criu.map(|version| version.to_string()).unwrap_or_default(),
                gpu: self.gpu.as_ref(),
                resident: self.resident,
            };
            // What goes on beside the container's own way has a timeline of its own.
            let timeline = match self.after() {
                After::Exit => services.timeline.clone(),
                After::LeaveRunning => Timeline::start(Phase::MoveMemory),
            };
            self.publication = Some(Publication::prepare(memory, order, &machine, &images, timeline)?);
        }
        self.enter(Phase::Dump);
        let work = self.log.as_ref().map_or_else(|| images.clone(), |log| log.path().to_owned());
        let (tell, told) = mpsc::channel();
        let has_devices = !self.devices.is_empty();
        let review = (self.after() == After::Exit && self.runtime.drives_criu()).then(|| {
            let (publication, record, draft) = (self.publication.take(), self.record(), Arc::clone(&self.draft));
            let (cancel, timeline) = (services.cancel.clone(), services.timeline.clone());
            let committed = Arc::clone(&self.is_committed);
            let (devices, folder) = (std::mem::take(&mut self.devices), images.clone());
            let tcp = order.options.allow.tcp;
            Review::new(move || {
                cancel.check()?;
                make_restorable(&folder, &devices, tcp)?;
                let published = publication.map(|publication| publication.run(&timeline)).transpose()?.flatten();
                // Told before the commit: whatever fails after it, the snapshot is withdrawn.
                let _ = tell.send(published.clone());
                cancel.check()?;
                timeline.enter(Phase::Publish);
                record.complete(published, &draft)?;
                timeline.enter(Phase::Dump);
                committed.store(true, Ordering::Release);
                Ok(())
            })
        });
        let is_reviewed = review.is_some();
        if !is_reviewed && self.after() == After::Exit {
            // A runtime that drives CRIU itself lets nobody in before it kills the container.
            self.record().complete(None, &self.draft)?;
        }
        let request = CheckpointRequest {
            id: order.subject.id.clone(),
            init: order.init,
            images,
            work: work.clone(),
            leave_running: !order.options.exit,
            allow: order.options.allow,
            external_files,
            sparse,
            devices: has_devices,
            cancel: services.cancel.clone(),
            review,
        };
        let connections = Connections::of(&self.cgroup);
        let dumped = services.tokio.block_on(self.runtime.checkpoint(request));
        if dumped.is_ok() && self.after() == After::Exit {
            self.connections = Some(connections);
        } else {
            connections.go_on();
        }
        self.published = told.try_recv().ok().flatten();
        if dumped.is_err() {
            // runc's shim leaves the log there, and its users look for it there.
            if let Err(error) = std::fs::copy(work.join(LOG), order.subject.bundle.join("criu-dump.log")) {
                tracing::debug!("no log of the failed dump: {error}");
            }
        }
        dumped?;
        if !is_reviewed {
            make_restorable(&self.folder, &self.devices, order.options.allow.tcp)?;
        }
        Ok(())
    }

    fn begin_publication(&mut self) {
        let Some(publication) = self.publication.take() else { return };
        let before = self.services.timeline.clone();
        self.publishing = Some(std::thread::spawn(move || publication.run(&before)));
    }

    fn finish_publication(&mut self) -> Result<(), SessionError> {
        if let Some(publishing) = self.publishing.take() {
            self.published = publishing.join().map_err(|_| SessionError::Bug("the publication"))??;
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<(), SessionError> {
        if self.after() == After::LeaveRunning {
            self.record().complete(self.published.clone(), &self.draft)?;
        }
        let target = &self.order.options.folder;
        if let Some(draft) = lock(&self.draft).take() {
            draft.publish().map_err(file("publish the checkpoint in", target))?;
        }
        if let Some(log) = self.log.take() {
            log.remove();
        }
        Ok(())
    }

    fn is_ended(&mut self) -> bool {
        self.is_committed.load(Ordering::Acquire) && is_ending(self.order.init)
    }

    fn wait_for_end(&mut self) -> Result<(), SessionError> {
        self.enter(Phase::Release);
        // What CRIU has killed dies only when it is thawed.
        if self.cgroup.is_frozen().map_err(SessionError::Freezer)? {
            self.cgroup.thaw().map_err(SessionError::Freezer)?;
        }
        let init = self.init.clone();
        let ended = async move { tokio::time::timeout(END, init.wait()).await };
        let ended = self.services.tokio.block_on(ended);
        if let Some(connections) = self.connections.take().filter(|_| self.order.options.allow.tcp == Tcp::Auto) {
            connections.close();
        }
        match ended {
            Ok(_) => Ok(()),
            Err(_) => Err(SessionError::DoesNotEnd { pid: self.order.init }),
        }
    }

    fn phase(&self) -> Phase {
        self.services.timeline.current()
    }

    fn enter(&mut self, phase: Phase) {
        self.services.timeline.enter(phase);
    }
}

/// Rewrites what CRIU has saved and cannot restore, or not elsewhere. A second call changes nothing.
fn make_restorable(images: &Path, devices: &[Devices], tcp: Tcp) -> Result<(), RewriteError> {
    images::replace_devices(images, devices)?;
    let mut files = OpenFiles::read(images)?;
    if tcp == Tcp::Auto {
        let closed = files.close_outside()?;
        if closed > 0 {
            tracing::info!("{closed} TCP connections lead outside: a restored container finds them closed");
        }
    } else {
        files.close_ended()?;
    }
    files.write(images)
}

/// Returns whether a process has ended, or will as soon as it is thawed: SIGKILL is pending.
fn is_ending(pid: HostPid) -> bool {
    const KILL: u64 = 1 << 8;
    let Ok(status) = Status::of(pid) else { return true };
    let pending = |name| status.bits(name).unwrap_or(0);
    let is_dead = matches!(status.state(), Some(b'Z' | b'X'));
    is_dead || (pending("SigPnd") | pending("ShdPnd")) & KILL != 0
}

impl Undo for Machine<'_> {
    fn undo(&mut self, step: Step) -> Result<(), Failure> {
        match step {
            Step::Published => self.withdraw(),
            Step::Suspended => self.resume_gpu(),
            Step::Frozen => self.put_freezer_back(),
            Step::Drafted => self.discard(),
        }
    }
}

/// Returns the checkpoint of a dead session whose record is complete.
fn complete_remains(order: &CheckpointOrder) -> Result<Option<Draft>, Failure> {
    let complete = Draft::complete_of(&order.options.folder, &order.subject.id, order.began);
    complete.because("cannot look for the checkpoint of a dead session")
}

/// Publishes the checkpoint of a dead session if its record is complete. Returns whether there is one.
pub(crate) fn finish_remains(order: &CheckpointOrder) -> Result<bool, Failure> {
    let Some(draft) = complete_remains(order)? else { return Ok(false) };
    draft.publish().because("cannot publish the checkpoint of a dead session").map(|()| true)
}

/// Removes what a dead session has written of a checkpoint.
pub(crate) fn discard_remains(order: &CheckpointOrder) -> Result<(), Failure> {
    drop(complete_remains(order)?);
    // A new draft removes what a dead one has left, and then itself.
    match Draft::begin(&order.options.folder, &order.subject.id, order.began) {
        // The client has removed it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        discarded => discarded.map(drop).because("cannot remove what was written of a checkpoint"),
    }
}

/// Removes the snapshot that a dead session has published of a checkpoint.
pub(crate) fn withdraw_remains(order: &CheckpointOrder) -> Result<(), Failure> {
    let name = memory::name(order).map_err(|error| Failure::of(&error))?;
    bulk::withdraw(&order.subject.store.root, &name)
}

impl Machine<'_> {
    /// Removes what was written of the checkpoint.
    fn discard(&mut self) -> Result<(), Failure> {
        // Dropped, a draft removes what it has written.
        drop(lock(&self.draft).take());
        if self.is_successor { discard_remains(self.order) } else { Ok(()) }
    }

    fn withdraw(&mut self) -> Result<(), Failure> {
        if self.is_successor {
            return withdraw_remains(self.order);
        }
        // A publication that still runs is waited for.
        if let Err(error) = self.finish_publication() {
            tracing::debug!("nothing was published: {}", phase::chain(&error));
        }
        self.published = None;
        if !self.is_saving {
            return Ok(());
        }
        let name = memory::name(self.order).map_err(|error| Failure::of(&error))?;
        bulk::withdraw(&self.order.subject.store.root, &name)
    }

    fn resume_gpu(&mut self) -> Result<(), Failure> {
        let (paused, timeline, cgroup) = (self.order.paused, self.services.timeline.clone(), self.cgroup.clone());
        let owed = if std::mem::replace(&mut self.is_resuming, true) {
            self.keeper().pay().clone()
        } else {
            let resumed = self.keeper().resume(&cgroup, paused, &[], GPU, &mut |phase| timeline.enter(phase));
            if let Err(error) = resumed {
                tracing::warn!("its GPU state is not back: {}", phase::chain(&error));
            }
            self.keeper().owes().clone()
        };
        // Processes that are gone owe nothing.
        if owed.is_paid() || self.is_gone() { Ok(()) } else { Err(Failure::new(owed.to_string())) }
    }

    fn put_freezer_back(&mut self) -> Result<(), Failure> {
        self.enter(Phase::Release);
        let put_back = match (self.order.paused, self.cgroup.is_frozen()) {
            _ if self.is_gone() => Ok(()),
            (_, Err(error)) => Err(error),
            (true, Ok(false)) => self.cgroup.freeze(),
            (false, Ok(true)) => self.cgroup.thaw(),
            _ => Ok(()),
        };
        put_back.map_err(|error| Failure::of(&error))
    }
}
