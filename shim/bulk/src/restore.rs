//! A restore's part: packs become memory of processes.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use memory::{Control, Destination, Pack, SegmentTable};
use phase::Phase;
use snapshot::{
    GPU_MEMORY_TYPE, HOST_MEMORY_TYPE, Pointer, Reference, ResolveError, SEGMENTS_TYPE, Snapshot, SnapshotError, Store,
};

use crate::inline;
use crate::protocol::{Because, Failure, Node, Restored, Source};

/// How much is read ahead of a restore: what a node's memory surely has room for besides what is restored.
const PREFETCH: u64 = 64 << 30;

/// The command line, beside the shim or in the PATH.
const COMMAND: &str = "gpusnap";

/// Memory that is about to be needed.
pub(crate) struct Restoring {
    table: SegmentTable,
    packs: Arc<Vec<Pack>>,
    control: Arc<Control>,
    /// Kept so that nobody removes it.
    _snapshot: Option<Snapshot>,
}

impl Restoring {
    pub(crate) fn open(
        source: &Source,
        images: &Path,
        node: &Node,
        began: &mut dyn FnMut(Phase),
    ) -> Result<Self, Failure> {
        let (table, packs, snapshot) = match source {
            Source::Inline => {
                let table = inline::segments(images).because("cannot read the memory beside the images")?;
                let table = parse(&table)?;
                let packs = (0..table.packs().len()).map(|index| Pack::open(&inline::pack(images, index)));
                let packs: Result<Vec<_>, _> = packs.collect();
                (table, packs.because("the memory beside the images is damaged")?, None)
            }
            Source::Snapshot(pointer) => {
                let snapshot = find_or_pull(pointer, node, began)?;
                let segments = snapshot.layers_of(SEGMENTS_TYPE).next();
                let segments = segments.ok_or_else(|| Failure::new("the snapshot has no memory in it".into()))?;
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
                (table, packs?, Some(snapshot))
            }
        };
        let (packs, control) = (Arc::new(packs), Arc::new(Control::new()));
        let (to_read, reading) = (Arc::clone(&packs), Arc::clone(&control));
        // What it does not get to is read when it is needed.
        let _ = thread::Builder::new()
            .name("prefetch".into())
            .spawn(move || memory::prefetch(&to_read, PREFETCH, &reading));
        Ok(Self { table, packs, control, _snapshot: snapshot })
    }

    pub(crate) fn fill(&self, processes: &[Restored]) -> Result<(), Failure> {
        let processes: Vec<(i32, i32)> = processes.iter().map(|of| (of.pid, of.process)).collect();
        let into = Destination { processes: &processes, ready: &|_| () };
        memory::fill(&self.table, &self.packs, &into, &self.control).because("cannot put its memory back")
    }
}

/// From the node's store, or the one that it was published in; else it is pulled into the node's.
fn find_or_pull(pointer: &Pointer, node: &Node, began: &mut dyn FnMut(Phase)) -> Result<Snapshot, Failure> {
    if let Some(snapshot) = find(pointer, &node.store)? {
        return Ok(snapshot);
    }
    if pointer.store() != node.store
        && pointer.store().is_dir()
        && let Some(snapshot) = find(pointer, pointer.store())?
    {
        return Ok(snapshot);
    }
    let (digest, store) = (pointer.digest(), node.store.display());
    let Some(registry) = node.registry.as_deref() else {
        let what = "pull it by `gpusnap pull`, or name a registry by the annotation gpusnap.dev/registry";
        return Err(Failure::new(format!(
            "the snapshot {digest} of its memory is not in the node store {store}: {what}"
        )));
    };
    began(Phase::Pull);
    pull(pointer, &node.store, registry)?;
    find(pointer, &node.store)?
        .ok_or_else(|| Failure::new(format!("the snapshot {digest} was pulled and is not in the node store {store}")))
}

fn find(pointer: &Pointer, root: &Path) -> Result<Option<Snapshot>, Failure> {
    let store = Store::open(root).because("cannot use the node store")?;
    match store.open_snapshot(&Reference::Digest(pointer.digest())) {
        Err(SnapshotError::Resolve(ResolveError::Missing { .. })) => Ok(None),
        found => found.map(Some).because("cannot use the snapshot of its memory"),
    }
}

/// Has the command line pull it: it alone speaks to registries. What it has pulled stays if this process ends before it.
#[expect(clippy::disallowed_methods, reason = "there is no reaper in a worker, whose only child this is")]
fn pull(pointer: &Pointer, root: &Path, registry: &str) -> Result<(), Failure> {
    let beside = std::env::current_exe().ok().map(|shim| shim.with_file_name(COMMAND));
    let program = beside.filter(|program| program.is_file()).unwrap_or_else(|| COMMAND.into());
    let target = format!("{}@{}", repository(registry), pointer.digest());
    let mut command = Command::new(&program);
    command.arg("--store").arg(root).args(["pull", "--quiet", &target]);
    command.args(pointer.name().map(ToString::to_string));
    let out = command.stdin(Stdio::null()).output();
    let out = out.because(&format!("cannot run {} to pull {target}", program.display()))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let said = said.trim().strip_prefix("gpusnap: ").unwrap_or(said.trim());
    Err(Failure::new(format!("cannot pull the snapshot of its memory: {said}")))
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
    use super::*;

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
