//! The keeper of one container's GPU state, from the beginning of a checkpoint or restore to the end.
//!
//! ```text
//!   caller ──job──► thread of the keeper: session, hold ──socket──► callers of the driver
//!          ◄─began, is it whole?, result──┘
//! ```
//!
//! ptrace binds held threads to the thread that holds them, so a keeper has a thread of its own and may be used from any.
//! State that could not be put back stays held by that thread from one operation to the next.

use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use cgroup::Cgroup;
use cuda::{Callers, Inventory, Pair};
use memory::{Layout, Regions};
use phase::Phase;

use crate::host::Machine;
use crate::session::{Driver, Owed, Resumed, Session, SessionError, Suspended, Undo};

type Job = Box<dyn FnOnce(&mut Machine, &mut Undo) + Send>;

/// Words of the keeper's thread while a job is under way.
enum Event<T> {
    Began(Phase),
    IsWhole,
    Done(Result<T, SessionError>, Owed),
}

/// The questions that a job asks of who gave it.
struct Asker {
    ask: Box<dyn FnMut() -> bool>,
}

/// Mover of the GPU state of one container, and keeper of all that is to be put back.
///
/// The end of a keeper, or of this process, lets go of what is held; the driver's locks stay. So whoever has a keeper that owes
/// something calls [`Self::pay`] until the keeper does not.
#[derive(Debug)]
pub struct Keeper {
    /// None once it is to end.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    owed: Owed,
}

impl Default for Keeper {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.jobs = None;
        // What is held is let go of when the thread has ended. Its panic was told already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Keeper {
    /// Makes one that begins to load the driver. This binary has to run [`cuda::caller_main`] when its first argument is
    /// [`cuda::CALLER`].
    #[must_use]
    pub fn new() -> Self {
        let (jobs, todo) = mpsc::channel();
        // Without a thread, each operation fails and says so.
        let thread = std::thread::Builder::new().name("gpu-keeper".into()).spawn(move || serve(&todo)).ok();
        Self { jobs: Some(jobs), thread, owed: Owed::default() }
    }

    /// Returns this node's GPUs, by NVML.
    ///
    /// # Errors
    /// When there is no driver, or the driver does not answer.
    pub fn inventory(&mut self) -> Result<Inventory, SessionError> {
        self.run(None, &mut |_| {}, &mut || false, |mut session, _| {
            session.host().inventory().map_err(|failure| SessionError::NoDriver(failure.to_string()))
        })
    }

    /// Moves the GPU state of the container of this cgroup to its memory and leaves the container frozen. GPU work may go on
    /// for `patience`; then the driver may take `limit`.
    ///
    /// # Errors
    /// The container is as before then, and frozen if it was `paused`, but for what is owed.
    pub fn suspend(
        &mut self,
        cgroup: &Cgroup,
        paused: bool,
        patience: Duration,
        limit: Duration,
        began: &mut dyn FnMut(Phase),
    ) -> Result<Suspended, SessionError> {
        self.run(Some(cgroup), began, &mut || false, move |session, _| session.suspend(paused, patience, limit))
    }

    /// Puts private mappings of packs in the place of memory of a container that is suspended, without a change of what its
    /// processes find there. Returns the memory that stays as it was. It may take `limit` for each process. No process of the container runs meanwhile.
    ///
    /// # Errors
    /// When that was not done, or not wholly. The container has its data, in memory or in files: it can be resumed, or saved as
    /// it is unless processes of it are held.
    pub fn remap(
        &mut self,
        cgroup: &Cgroup,
        layout: &Layout,
        limit: Duration,
        began: &mut dyn FnMut(Phase),
    ) -> Result<Vec<Regions>, SessionError> {
        let layout = layout.clone();
        self.run(Some(cgroup), began, &mut || false, move |session, _| session.remap(&layout, limit))
    }

    /// Gives the container its GPU state back, whatever state its processes are in, and leaves it frozen or running.
    ///
    /// # Errors
    /// When not all is back: see [`Self::owes`]. What is not owed has its state.
    pub fn resume(
        &mut self,
        cgroup: &Cgroup,
        frozen: bool,
        pairs: &[Pair],
        limit: Duration,
        began: &mut dyn FnMut(Phase),
    ) -> Result<Resumed, SessionError> {
        let pairs = pairs.to_vec();
        self.run(Some(cgroup), began, &mut || false, move |session, _| session.resume(frozen, &pairs, limit))
    }

    /// Gives a restored, frozen container its GPU state back and lets the container run. CUDA processes have their memory but
    /// for this staging memory. Other processes get theirs meanwhile.
    /// Nothing of the container runs before the GPU state is back and `is_whole` has returned true. The end of this
    /// process before that ends the container.
    ///
    /// # Errors
    /// State that cannot be moved, or memory that has not come. The container is frozen or dead then, and of no use.
    pub fn resume_restored(
        &mut self,
        cgroup: &Cgroup,
        staging: &Layout,
        pairs: &[Pair],
        limit: Duration,
        began: &mut dyn FnMut(Phase),
        is_whole: &mut dyn FnMut() -> bool,
    ) -> Result<Resumed, SessionError> {
        let (staging, pairs) = (staging.clone(), pairs.to_vec());
        self.run(Some(cgroup), began, is_whole, move |mut session, mut asker| {
            session.host().hold_to_the_death();
            session.resume_restored(&staging, &pairs, limit, &mut asker.ask)
        })
    }

    /// Returns what is still to be put back. A container that is suspended is owed its GPU state.
    #[must_use]
    pub fn owes(&self) -> &Owed {
        &self.owed
    }

    /// Tries to put back what is owed, once, and returns the rest. Processes that are gone are owed nothing. To be called
    /// again, with growing pauses, until nothing is owed.
    pub fn pay(&mut self) -> &Owed {
        // What went wrong is with what is owed.
        let _ = self.run(None, &mut |_| {}, &mut || false, |session, _| Ok(session.pay()));
        &self.owed
    }

    /// Has the keeper's thread do something, and answers it meanwhile.
    fn run<T: Send + 'static>(
        &mut self,
        cgroup: Option<&Cgroup>,
        began: &mut dyn FnMut(Phase),
        is_whole: &mut dyn FnMut() -> bool,
        work: impl FnOnce(Session<'_, Machine>, Asker) -> Result<T, SessionError> + Send + 'static,
    ) -> Result<T, SessionError> {
        let (tell, told) = mpsc::channel::<Event<T>>();
        let (answer, answers) = mpsc::channel();
        let cgroup = cgroup.cloned();
        let job: Job = Box::new(move |machine, undo| {
            if let Some(cgroup) = &cgroup {
                machine.reach(cgroup);
            }
            // Nobody listens any more only if the caller has panicked.
            let asking = tell.clone();
            let ask = Box::new(move || asking.send(Event::IsWhole).is_ok() && answers.recv().unwrap_or(false));
            let mut begin = |phase| drop(tell.send(Event::Began(phase)));
            let done = work(Session::new(machine, undo, &mut begin), Asker { ask });
            let _ = tell.send(Event::Done(done, undo.owed()));
        });
        let gone = || SessionError::NoDriver("the thread that holds the container's processes has ended".to_owned());
        self.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        loop {
            match told.recv().map_err(|_| gone())? {
                Event::Began(phase) => began(phase),
                Event::IsWhole => {
                    let _ = answer.send(is_whole());
                }
                Event::Done(done, owed) => {
                    self.owed = owed;
                    return done;
                }
            }
        }
    }
}

fn serve(todo: &Receiver<Job>) {
    let mut callers = Callers::new(PathBuf::from("/proc/self/exe"));
    callers.prepare();
    let (mut machine, mut undo) = (Machine::new(callers), Undo::default());
    while let Ok(job) = todo.recv() {
        job(&mut machine, &mut undo);
    }
}
