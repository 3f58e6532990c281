//! A restore's part: packs become memory of processes.

use std::borrow::Cow;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use memory::{Control, Destination, Layout, Pack, Place, ProcessLayout, Segment, SegmentTable};
use phase::{Cancel, Phase};
use proc::ProcessIds;
use role::{Because, Failure};
use snapshot::{
    GPU_MEMORY_TYPE, HOST_MEMORY_TYPE, Name, OpenError, Pointer, Reference, ResolveError, SEGMENTS_TYPE, Snapshot,
    SnapshotError, Store,
};

use crate::inline;
use crate::types::{Node, Source};

/// How much is read ahead of a restore: what a node's memory surely has room for besides what is restored.
const PREFETCH: u64 = 64 << 30;

/// With less than this left to fill, in bytes, nobody starts anything beside it: that is some 5 ms.
const LEAST_REST: u64 = 64 << 20;

/// Less staging memory than this, in bytes, is filled in the time that it takes to map files.
const LEAST_STAGING: u64 = if cfg!(test) { 1 << 20 } else { 1 << 30 };
/// As many segments of it can be mapped in the time that is gained.
const MOST_SEGMENTS: usize = 2000;

/// A pull takes seconds or more.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);
/// Bytes of what a failed pull says that are told.
const LONGEST_MESSAGE: u64 = 8 << 10;

/// The command line, beside the shim or in the PATH.
const COMMAND: &str = "gpusnap";

/// Memory that is about to be needed.
pub struct Restoring {
    table: SegmentTable,
    packs: Arc<Vec<Pack>>,
    /// How many of them, the first ones, have staging memory, as far as is known.
    of_staging: usize,
    control: Arc<Control>,
    /// Kept so that nobody removes it.
    _snapshot: Option<Snapshot>,
}

impl Restoring {
    /// Finds the snapshot that images in a folder belong to, pulls it if it is not there, and begins to read it.
    ///
    /// # Errors
    /// When there is none, it cannot be pulled, it is damaged, or the operation is cancelled during the pull.
    pub fn open(
        source: &Source,
        images: &Path,
        node: &Node,
        began: &mut dyn FnMut(Phase),
        cancel: &Cancel,
    ) -> Result<Self, Failure> {
        let (table, packs, of_staging, snapshot) = match source {
            Source::Inline => {
                let table = inline::segments(images).because("cannot read the memory beside the images")?;
                let table = parse(&table)?;
                let packs = (0..table.packs().len()).map(|index| Pack::open(&inline::pack(images, index)));
                let packs: Result<Vec<_>, _> = packs.collect();
                (table, packs.because("the memory beside the images is damaged")?, 0, None)
            }
            Source::Snapshot(pointer) => {
                let snapshot = find_or_pull(pointer, node, began, cancel)?;
                let segments = snapshot.layers_of(SEGMENTS_TYPE).next();
                let segments = segments.ok_or_else(|| Failure::new("the snapshot has no memory in it"))?;
                let table = parse(
                    &inline::read(snapshot.open(segments).because("the snapshot of its memory is damaged")?)
                        .because("cannot read the snapshot of its memory")?,
                )?;
                let layers = snapshot.layers_of(GPU_MEMORY_TYPE).chain(snapshot.layers_of(HOST_MEMORY_TYPE));
                let packs: Result<Vec<_>, Failure> = layers
                    .map(|layer| {
                        let file = snapshot.open(layer).because("the snapshot of its memory is damaged")?;
                        Pack::from_file(snapshot.path(&layer.digest), file)
                            .because("the snapshot of its memory is damaged")
                    })
                    .collect();
                (table, packs?, snapshot.layers_of(GPU_MEMORY_TYPE).count(), Some(snapshot))
            }
        };
        let (packs, control) = (Arc::new(packs), Arc::new(Control::new()));
        let (to_read, reading) = (Arc::clone(&packs), Arc::clone(&control));
        // What it does not get to is read when it is needed.
        let _ = thread::Builder::new()
            .name("prefetch".into())
            .spawn(move || memory::prefetch(&to_read, PREFETCH, &reading));
        Ok(Self { table, packs, of_staging, control, _snapshot: snapshot })
    }

    /// Returns the staging memory of these processes that the driver may begin to read from packs, before it is filled. None
    /// if that is not worth it, or the packs are not in memory.
    ///
    /// # Errors
    /// Staging memory of a process that is not among these.
    pub fn staging(&self, restored: &[ProcessIds]) -> Result<Option<Layout>, Failure> {
        let packs = &self.packs[..self.of_staging];
        let mut processes = Vec::new();
        for process in self.table.processes() {
            let staging = process.segments.iter().copied().filter(|segment| self.is_staging(segment));
            let segments: Vec<Segment> = staging.collect();
            if segments.is_empty() {
                continue;
            }
            let ids = restored.iter().find(|ids| ids.container == process.pid).ok_or_else(|| {
                Failure::new(format!("there is GPU state of process {}, which was not restored", process.pid))
            })?;
            processes.push(ProcessLayout { process: *ids, segments });
        }
        let segments = processes.iter().flat_map(|process| &process.segments);
        let (bytes, count) = segments.fold((0, 0), |(bytes, count), segment| (bytes + segment.length, count + 1));
        let is_worth_it = bytes >= LEAST_STAGING && count <= MOST_SEGMENTS && packs.iter().all(Pack::is_in_memory);
        let packs = packs.iter().map(|pack| pack.path().to_owned()).collect();
        Ok(is_worth_it.then_some(Layout { packs, processes }))
    }

    fn is_staging(&self, segment: &Segment) -> bool {
        matches!(segment.place, Place::Pack { index, .. } if usize::try_from(index).is_ok_and(|index| index < self.of_staging))
    }

    /// Puts its memory into processes that stand still, in this order, and ends when all is done. `filled_first` is told when
    /// the `first` processes have theirs, if enough is left to do then. With `staging`, all that there is; else without what
    /// [`Self::staging`] says.
    ///
    /// # Errors
    /// When the snapshot is damaged, or memory cannot be written. The processes are of no use then.
    pub fn fill(
        &self,
        processes: &[ProcessIds],
        first: usize,
        staging: bool,
        filled_first: &(dyn Fn() + Sync),
    ) -> Result<(), Failure> {
        let table = if staging { Cow::Borrowed(&self.table) } else { Cow::Owned(self.without_staging()?) };
        let (early, late) = processes.split_at(first.min(processes.len()));
        let rest: u64 = late.iter().flat_map(|ids| table.segments(ids.container)).filter_map(stored).sum();
        let missing = AtomicUsize::new(early.len());
        let ready = |pid| {
            let is_early = early.iter().any(|ids| ids.container == pid);
            // Only what that says is used, and it is said once.
            if is_early && missing.fetch_sub(1, Ordering::Relaxed) == 1 && rest >= LEAST_REST {
                filled_first();
            }
        };
        let into = Destination { processes, ready: &ready };
        memory::fill(&table, &self.packs, &into, &self.control).because("cannot put its memory back")
    }

    fn without_staging(&self) -> Result<SegmentTable, Failure> {
        let mut processes = self.table.processes().to_vec();
        for process in &mut processes {
            process.segments.retain(|segment| !self.is_staging(segment));
        }
        let table = SegmentTable::new(self.table.packs().to_vec(), processes);
        table.because("the table of its memory is damaged")
    }
}

/// How long a segment is that has to be written.
fn stored(segment: &Segment) -> Option<u64> {
    matches!(segment.place, Place::Pack { .. }).then_some(segment.length)
}

/// From the node's store; else it is pulled there. The pointer says a digest, and a store and a registry as advice that is
/// not followed: whoever made the checkpoint may have written anything.
fn find_or_pull(
    pointer: &Pointer,
    node: &Node,
    began: &mut dyn FnMut(Phase),
    cancel: &Cancel,
) -> Result<Snapshot, Failure> {
    let found = find(pointer, node)?;
    if let Found::Ours(snapshot) = found {
        return Ok(*snapshot);
    }
    let Some(registry) = node.registry.as_deref() else { return Err(not_found(pointer, node, &found)) };
    began(Phase::Pull);
    pull(pointer, node, registry, cancel)?;
    match find(pointer, node)? {
        Found::Ours(snapshot) => Ok(*snapshot),
        found => Err(not_found(pointer, node, &found)),
    }
}

fn not_found(pointer: &Pointer, node: &Node, found: &Found) -> Failure {
    let (digest, store, scope) = (pointer.digest(), node.store.display(), &node.scope);
    if let Found::Others = found {
        return Failure::new(format!(
            "the snapshot {digest} of its memory is in the node store {store}, but has no name in {scope}, where the \
             container is: whoever may give it away does so by `gpusnap tag {digest} {scope}/NAME`"
        ));
    }
    let what = "pull it by `gpusnap pull`, or name a registry by the annotation gpusnap.dev/registry";
    let elsewhere = if pointer.store() == node.store {
        String::new()
    } else {
        format!(" (it was published in {}, which this node does not use)", pointer.store().display())
    };
    Failure::new(format!("the snapshot {digest} of its memory is not in the node store {store}{elsewhere}: {what}"))
}

/// What a store has of a snapshot.
enum Found {
    /// The snapshot, with a name in the scope of the container.
    Ours(Box<Snapshot>),
    /// A snapshot without a name in that scope: nothing says that it may be read there.
    Others,
    Missing,
}

fn find(pointer: &Pointer, node: &Node) -> Result<Found, Failure> {
    let store = match Store::open_to_read(&node.store) {
        Err(OpenError::Missing { .. }) => return Ok(Found::Missing),
        store => store.because("cannot use the node store")?,
    };
    match store.open_snapshot(&Reference::Digest(pointer.digest())) {
        Err(SnapshotError::Resolve(ResolveError::Missing { .. })) => Ok(Found::Missing),
        found => {
            let snapshot = found.because("cannot use the snapshot of its memory")?;
            let is_ours = snapshot.names().iter().any(|name| *name.scope() == node.scope);
            Ok(if is_ours { Found::Ours(Box::new(snapshot)) } else { Found::Others })
        }
    }
}

/// Has the command line pull it: no other program of ours speaks to registries. What it has pulled stays if it is killed.
fn pull(pointer: &Pointer, node: &Node, registry: &str, cancel: &Cancel) -> Result<(), Failure> {
    let beside = std::env::current_exe().ok().map(|shim| shim.with_file_name(COMMAND));
    let program = beside.filter(|program| program.is_file()).unwrap_or_else(|| COMMAND.into());
    let target = format!("{}@{}", repository(registry), pointer.digest());
    let mut command = Command::new(&program);
    command.arg("--store").arg(&node.store).args(["pull", "--quiet", &target, &name(pointer, node)?.to_string()]);
    let cannot = format!("cannot run {} to pull {target}", program.display());
    let said = tempfile::tempfile().because(&cannot)?;
    let said_by = said.try_clone().because(&cannot)?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said_by).spawn().because(&cannot)?;
    let status = wait(child, cancel)?.because(&cannot)?;
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    let mut said = said;
    let read = said.rewind().and_then(|()| said.take(LONGEST_MESSAGE).read_to_string(&mut text));
    read.because("cannot pull the snapshot of its memory")?;
    let text = text.trim();
    Err(Failure::new(format!(
        "cannot pull the snapshot of its memory: {}",
        text.strip_prefix("gpusnap: ").unwrap_or(text)
    )))
}

/// Waits for the end of a child, which is killed when the operation is cancelled.
fn wait(mut child: Child, cancel: &Cancel) -> Result<io::Result<ExitStatus>, Failure> {
    loop {
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return Ok(Ok(status)),
            Err(error) => return Ok(Err(error)),
        }
        if let Err(cancelled) = cancel.check() {
            // A child that has ended meanwhile needs no signal.
            let _ = child.kill();
            reap(&mut child);
            return Err(Failure::of(&cancelled));
        }
        thread::sleep(BETWEEN_LOOKS);
    }
}

#[expect(clippy::disallowed_methods, reason = "the reaper of a session leaves children to those who know them")]
fn reap(child: &mut Child) {
    let _ = child.wait();
}

/// The name of what is pulled: in the scope of the container, whatever the pointer says.
fn name(pointer: &Pointer, node: &Node) -> Result<Name, Failure> {
    let digits = || format!("pulled-{}", &pointer.digest().hex()[..12]);
    let name = pointer.name().map_or_else(digits, |name| name.name().to_owned());
    Name::new(node.scope.clone(), &name).because("cannot name the snapshot of its memory")
}

/// A reference without its tag and digest.
fn repository(reference: &str) -> &str {
    let reference = reference.split('@').next().unwrap_or(reference);
    let name = reference.rfind('/').map_or(0, |slash| slash + 1);
    reference[name..].find(':').map_or(reference, |colon| &reference[..name + colon])
}

fn parse(bytes: &[u8]) -> Result<SegmentTable, Failure> {
    SegmentTable::parse(bytes).because("the table of its memory is damaged")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use memory::{Draft, FileSource, Saved as SavedMemory, save_files};
    use proc::{ContainerPid, HostPid};

    use super::*;

    /// The only process, in the container.
    const SAVED: ContainerPid = ContainerPid::new(7).unwrap();

    fn restored() -> [ProcessIds; 1] {
        [ProcessIds { host: HostPid::own(), container: SAVED }]
    }

    /// Memory of process 7 at this address, each chunk unlike the others.
    fn saved(folder: &Path, prefix: &str, address: u64, length: usize) -> SavedMemory {
        let path = folder.join(format!("{prefix}.pages"));
        let bytes: Vec<u8> = (0..length).map(|at| u8::try_from((at / 65536 + 1) % 251).unwrap()).collect();
        std::fs::write(&path, bytes).unwrap();
        let (file, length) = (File::open(&path).unwrap(), u64::try_from(length).unwrap());
        let source = FileSource { file: &file, path: &path, offset: 0, pid: SAVED, address, length };
        let draft = Draft { folder: folder.to_owned(), prefix: prefix.to_owned() };
        save_files(&[source], &draft, &Control::new()).unwrap()
    }

    /// Staging memory of so many bytes, and as much other memory.
    fn restoring(folder: &Path, length: usize) -> Restoring {
        let (gpu, host) = (saved(folder, "gpu", 0x1000_0000, length), saved(folder, "host", 0x5000_0000, length));
        let packs = gpu.packs.iter().chain(&host.packs).map(|path| Pack::open(path).unwrap()).collect();
        Restoring {
            of_staging: gpu.packs.len(),
            table: gpu.table.merge(host.table).unwrap(),
            packs: Arc::new(packs),
            control: Arc::new(Control::new()),
            _snapshot: None,
        }
    }

    #[test]
    fn staging_memory_can_be_filled_by_somebody_else() {
        let folder = tempfile::tempdir().unwrap();
        let restoring = restoring(folder.path(), 2 << 20);
        let staging = restoring.staging(&restored()).unwrap().unwrap();
        assert_eq!(staging.packs, [restoring.packs[0].path()]);
        let [ProcessLayout { process, segments }] = staging.processes.as_slice() else { panic!("{staging:?}") };
        assert_eq!([*process], restored());
        assert_eq!(segments.iter().map(|segment| segment.length).sum::<u64>(), 2 << 20);
        let is_staging = |segment: &Segment| (0x1000_0000..0x1020_0000).contains(&segment.address);
        assert!(segments.iter().all(is_staging), "{segments:?}");
        let rest = restoring.without_staging().unwrap();
        assert_eq!(rest.segments(SAVED).iter().map(|segment| segment.length).sum::<u64>(), 2 << 20);
        assert!(rest.segments(SAVED).iter().all(|segment| segment.address >= 0x5000_0000), "{rest:?}");
    }

    #[test]
    fn little_staging_memory_is_filled_with_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(restoring(folder.path(), 512 << 10).staging(&restored()).unwrap(), None);
    }

    #[test]
    fn staging_memory_of_a_process_that_was_not_restored_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = restoring(folder.path(), 2 << 20).staging(&[]).unwrap_err().to_string();
        assert_eq!(error, "there is GPU state of process 7, which was not restored");
    }

    mod trust {
        use std::collections::BTreeMap;

        use snapshot::{Config, Digest, Host, IfTaken, NewLayer, NewSnapshot, Scope};

        use super::*;

        fn node(store: &Path, scope: &str) -> Node {
            Node { store: store.to_owned(), scope: scope.to_owned().try_into().unwrap(), registry: None }
        }

        fn pointer(digest: Digest, store: &Path) -> Pointer {
            Pointer::new(digest, store, None, Some("attacker.example/x".into())).unwrap()
        }

        /// A store with a snapshot of this name.
        fn published(name: Option<&str>) -> (tempfile::TempDir, Digest) {
            let root = tempfile::tempdir().unwrap();
            let draft = Store::open(root.path()).unwrap().draft().unwrap();
            let path = draft.folder().join("segments");
            std::fs::write(&path, "x").unwrap();
            let layer = NewLayer { media_type: SEGMENTS_TYPE.into(), path, digest: None, annotations: BTreeMap::new() };
            let host = Host {
                criu: String::new(),
                kernel: String::new(),
                architecture: String::new(),
                cpu_features: vec![],
                driver: None,
            };
            let new = NewSnapshot {
                name: name.map(|name| name.parse().unwrap()),
                if_taken: IfTaken::Move,
                config: Config::new(0, "c", "libcontainer", host),
                layers: vec![layer],
                subject: None,
                annotations: BTreeMap::new(),
            };
            let digest = draft.publish(new, &|_| ()).unwrap().digest();
            (root, digest)
        }

        fn refusal(pointer: &Pointer, node: &Node) -> String {
            let mut pulled = false;
            let refused =
                find_or_pull(pointer, node, &mut |_| pulled = true, &Cancel::default()).unwrap_err().to_string();
            assert!(!pulled, "the registry that only a pointer names is not asked");
            refused
        }

        #[test]
        fn a_folder_that_a_pointer_names_is_not_made_a_store() {
            let (folder, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            for node_store in [store.path().to_owned(), store.path().join("none"), folder.path().to_owned()] {
                let refused = refusal(&pointer(Digest::of(b"x"), folder.path()), &node(&node_store, "default"));
                assert!(refused.contains("is not in the node store"), "{refused}");
                assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
                assert!(!store.path().join("none").exists());
            }
        }

        #[test]
        fn a_snapshot_in_another_store_is_not_used() {
            let (other, digest) = published(Some("default/vit"));
            let store = tempfile::tempdir().unwrap();
            Store::open(store.path()).unwrap();
            let refused = refusal(&pointer(digest, other.path()), &node(store.path(), "default"));
            assert!(refused.contains("which this node does not use"), "{refused}");
        }

        #[test]
        fn a_snapshot_of_another_scope_or_of_none_is_not_used() {
            for (name, scope) in [
                (Some("other/vit"), "default"),
                (Some("default/vit"), "default/team-a"),
                (Some("default/team-b/vit"), "default/team-a"),
                (Some("default/team-a/vit"), "default"),
                (None, "default"),
            ] {
                let (store, digest) = published(name);
                let refused = refusal(&pointer(digest, store.path()), &node(store.path(), scope));
                assert!(refused.contains(&format!("gpusnap tag {digest} {scope}/NAME")), "{refused}");
            }
        }

        #[test]
        fn a_snapshot_with_a_name_in_the_scope_is_used() {
            let (store, digest) = published(Some("other/vit"));
            let name: Name = "k8s.io/team-a/vit".parse().unwrap();
            Store::open(store.path()).unwrap().tag(&Reference::Digest(digest), &name).unwrap();
            let node = node(store.path(), "k8s.io/team-a");
            let found = find_or_pull(&pointer(digest, store.path()), &node, &mut |_| (), &Cancel::default()).unwrap();
            assert_eq!(found.digest(), digest);
            let pulled = super::super::name(&pointer(digest, store.path()), &node).unwrap();
            assert_eq!(pulled.scope(), &Scope::new("k8s.io", Some("team-a")).unwrap());
        }
    }

    #[test]
    fn a_repository_is_a_reference_without_tag_and_digest() {
        for (reference, is) in [
            ("localhost:5000/vit", "localhost:5000/vit"),
            ("localhost:5000/team/vit:warm", "localhost:5000/team/vit"),
            ("ghcr.io/vit@sha256:00", "ghcr.io/vit"),
            ("ghcr.io/vit:warm@sha256:00", "ghcr.io/vit"),
        ] {
            assert_eq!(repository(reference), is);
        }
    }
}
