//! A restore's part: packs become memory of processes.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use memory::{Control, Destination, Pack, SegmentTable};
use snapshot::{GPU_MEMORY_TYPE, HOST_MEMORY_TYPE, Pointer, Reference, SEGMENTS_TYPE, Snapshot, Store};

use crate::inline;
use crate::protocol::{Because, Failure, Filled, Restored, Source};

/// How much is read ahead of a restore: what a node's memory surely has room for besides what is restored.
const PREFETCH: u64 = 64 << 30;

/// Memory that is about to be needed.
pub(crate) struct Restoring {
    table: SegmentTable,
    packs: Arc<Vec<Pack>>,
    control: Arc<Control>,
    /// Kept so that nobody removes it.
    _snapshot: Option<Snapshot>,
}

impl Restoring {
    pub(crate) fn open(source: &Source, images: &Path) -> Result<Self, Failure> {
        let (table, packs, snapshot) = match source {
            Source::Inline => {
                let table = inline::segments(images).because("cannot read the memory beside the images")?;
                let table = parse(&table)?;
                let packs = (0..table.packs().len()).map(|index| Pack::open(&inline::pack(images, index)));
                let packs: Result<Vec<_>, _> = packs.collect();
                (table, packs.because("the memory beside the images is damaged")?, None)
            }
            Source::Snapshot(pointer) => {
                let snapshot = find(pointer)?;
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

    pub(crate) fn fill(&self, processes: &[Restored]) -> Result<Filled, Failure> {
        let processes: Vec<(i32, i32)> = processes.iter().map(|of| (of.pid, of.process)).collect();
        let into = Destination { processes: &processes, ready: &|_| () };
        memory::fill(&self.table, &self.packs, &into, &self.control).because("cannot put its memory back")?;
        let statistics = self.table.statistics();
        Ok(Filled { bytes: statistics.memory - statistics.zero })
    }
}

fn find(pointer: &Pointer) -> Result<Snapshot, Failure> {
    let store = Store::open(pointer.store()).because("cannot use the node store")?;
    store.open_snapshot(&Reference::Digest(pointer.digest())).because("cannot use the snapshot of its memory")
}

fn parse(bytes: &[u8]) -> Result<SegmentTable, Failure> {
    SegmentTable::parse(bytes).because("the table of its memory is damaged")
}
