//! A sentence tried on one runtime, and a check for leftovers.

use std::collections::BTreeMap;
use std::fs;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libtest_mimic::{Completion, Failed};
use oci_spec::runtime::Spec;
use runtime::OciRuntime;
use support::skips::is_listed;
use tempfile::TempDir;

use crate::container::Bundle;
use crate::world::{Which, World, cgroup_hierarchies};

/// Longest time for one sentence. The longest, a hundred containers, takes a tenth.
const LIMIT: Duration = Duration::from_secs(300);

/// Longest time for the leftovers of a container to go. The kernel removes namespaces and mounts
/// after the last process, and orphans are reaped one after the other.
const SETTLE: Duration = Duration::from_secs(10);

/// A sentence about any runtime.
#[derive(Clone)]
pub(crate) struct Sentence {
    pub(crate) name: &'static str,
    pub(crate) run: for<'bed> fn(&'bed Bed) -> Pin<Box<dyn Future<Output = ()> + 'bed>>,
}

/// Makes sentences of async functions of a bed.
macro_rules! sentences {
    ($($name:ident),* $(,)?) => {
        pub(crate) fn sentences() -> Vec<$crate::bed::Sentence> {
            vec![$($crate::bed::Sentence { name: stringify!($name), run: |bed| Box::pin($name(bed)) }),*]
        }
    };
}
pub(crate) use sentences;

/// A runtime, and a folder for the files of one sentence.
pub(crate) struct Bed {
    pub(crate) which: Which,
    pub(crate) world: Arc<World>,
    pub(crate) runtime: Arc<dyn OciRuntime>,
    /// Folder for the runtime's state.
    pub(crate) root: PathBuf,
    folder: TempDir,
    ids: Mutex<Vec<String>>,
    /// Reason for skipping a part of the sentence.
    not_tried: Mutex<Option<String>>,
}

impl Bed {
    /// Tries a sentence, and looks for leftovers.
    pub(crate) fn try_out(world: &Arc<World>, which: Which, sentence: &Sentence) -> Result<Completion, Failed> {
        let _context = world.handle.enter();
        let bed = Self::new(world, which);
        // The embedded runtime opens its executable once, and keeps it open. Sentences may use the
        // embedded runtime beside another one.
        for which in [which, Which::Libcontainer] {
            let runtime = world.runtime(which, bed.root.clone());
            assert!(world.handle.block_on(runtime.start("contract-unknown")).is_err());
        }
        let before = bed.traces();
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
            world.handle.block_on(async { tokio::time::timeout(LIMIT, (sentence.run)(&bed)).await })
        }));
        let left = bed.settle(&before);
        bed.clear();
        match result {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(Err(_elapsed)) => Err(format!("it takes longer than {LIMIT:?}").into()),
            Ok(Ok(())) if !left.is_empty() => Err(format!("it leaves behind:\n{}", left.join("\n")).into()),
            Ok(Ok(())) => bed.completion(sentence.name),
        }
    }

    fn new(world: &Arc<World>, which: Which) -> Self {
        let folder = tempfile::Builder::new().prefix("bed-").tempdir_in(world.folder()).unwrap();
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let root = folder.path().join("state");
        let runtime = world.runtime(which, root.clone());
        Self {
            which,
            world: Arc::clone(world),
            runtime,
            root,
            folder,
            ids: Mutex::default(),
            not_tried: Mutex::default(),
        }
    }

    /// Notes that the sentence, or a part, is not tried on this runtime or machine.
    pub(crate) fn not_tried(&self, reason: &str) {
        *self.not_tried.lock().unwrap() = Some(reason.to_owned());
    }

    fn completion(&self, sentence: &str) -> Result<Completion, Failed> {
        match self.not_tried.lock().unwrap().take() {
            None => Ok(Completion::Completed),
            Some(reason) if is_listed("contract", sentence, &reason) => Ok(Completion::ignored_with(reason)),
            Some(reason) => Err(format!("this skip is not in tests/skips.txt: {reason}").into()),
        }
    }

    /// Returns the same place with another runtime.
    pub(crate) fn beside(&self, which: Which) -> Self {
        Self::new(&self.world, which)
    }

    /// Returns a folder for the files of a sentence.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Returns a bundle for a new container.
    pub(crate) fn bundle(&self, spec: &Spec) -> Bundle<'_> {
        let id = format!("contract-{}-{}", std::process::id(), self.world.number());
        self.ids.lock().unwrap().push(id.clone());
        Bundle::new(self, id, spec)
    }

    /// Returns all traces of this process now.
    pub(crate) fn traces(&self) -> Traces {
        Traces::of(&self.world)
    }

    /// Waits until every trace newer than `before` is gone; returns the rest.
    pub(crate) fn settle(&self, before: &Traces) -> Vec<String> {
        self.settle_beside(before, "\0")
    }

    /// Waits like [`Self::settle`], while a container of this id runs.
    pub(crate) fn settle_beside(&self, before: &Traces, id: &str) -> Vec<String> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let mut left = self.traces().since(before);
            left.extend(self.state());
            left.retain(|what| !what.contains(id));
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns the runtime's state of containers.
    fn state(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.root) else { return vec![] };
        let entries = entries.map(|entry| entry.unwrap());
        // crun's own folders lie beside those of containers: .cache, .empty-directory.
        let foreign = |name: &str| name.starts_with('.') && !name.starts_with(".gpusnap");
        let kept = entries.filter(|entry| !foreign(entry.file_name().to_str().unwrap()));
        kept.map(|entry| format!("state {}", entry.path().display())).collect()
    }

    /// Cleans up after a failure: the next sentence must not fail because of this one.
    fn clear(&self) {
        for id in self.ids.lock().unwrap().iter() {
            if self.root.join(id).exists() {
                let _ = self.world.handle.block_on(self.runtime.delete(id));
            }
        }
    }
}

/// Possible leftovers, each with its name: a process may have another name by then.
#[derive(Debug)]
pub(crate) struct Traces(BTreeMap<String, String>);

impl Traces {
    /// Returns the traces newer than `before`.
    fn since(&self, before: &Self) -> Vec<String> {
        self.0.iter().filter(|(trace, _)| !before.0.contains_key(*trace)).map(|(_, name)| name.clone()).collect()
    }

    fn of(world: &World) -> Self {
        let mut traces = vec![];
        for descriptor in fs::read_dir("/proc/self/fd").unwrap() {
            // The listing's own descriptor is gone by now.
            if let Ok(target) = fs::read_link(descriptor.unwrap().path()) {
                traces.push(format!("descriptor of {}", target.display()));
            }
        }
        for hierarchy in cgroup_hierarchies() {
            let Ok(entries) = fs::read_dir(hierarchy.join(&world.cgroup)) else { continue };
            let below = entries.map(|entry| entry.unwrap()).filter(|entry| entry.file_type().unwrap().is_dir());
            traces.extend(below.map(|entry| format!("cgroup {}", entry.path().display())));
        }
        // Only mounts below our folder: others come and go with other tests.
        let folder = world.folder().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        traces.extend(mounts.filter(|place| place.starts_with(folder)).map(|place| format!("mount {place}")));
        let mut traces: BTreeMap<_, _> = traces.into_iter().map(|trace| (trace.clone(), trace)).collect();
        for child in children() {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            traces.insert(format!("process {child}"), format!("process {child} {}", name.trim()));
        }
        Self(traces)
    }
}

/// Returns the children of this process, of all its threads.
fn children() -> Vec<i32> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("children")).ok())
        .flat_map(|children| children.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<i32>>())
        .collect()
}
