//! A checkpoint's part: memory of processes and of images becomes packs, and all of it a snapshot.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use images::{Changes, Inherited, Run};
use memory::{Control, FileSource, Layout, ProcessLayout, Regions, SegmentTable};
use phase::Phase;
use proc::ContainerPid;
use role::{Because, Failure};
use snapshot::{
    CRIU_TYPE, Digest, Draft, FileError, GPU_MEMORY_TYPE, HOST_MEMORY_TYPE, IfInUse, IfTaken, Name, NewLayer,
    NewSnapshot, Pointer, Reference, RemoveError, ResolveError, SEGMENTS_TYPE, SHM_TYPE, Store,
};

use crate::inline;
use crate::types::{Place, Publish, Published, Source};

/// Shorter runs stay in the images: CRIU reads them in passing, and each is a segment (measured: cuda.md).
pub const LEAST_RUN: u64 = 256 << 10;
/// With less big memory than this, in bytes, images that stand alone and that runc understands are worth more than the time.
pub const LEAST_MEMORY: u64 = 64 << 20;
/// Zeros of a staging mapping are mappings of their own while the container is dumped: no shorter ones, so that a process has
/// no more mappings than the kernel allows.
const LEAST_ZEROS: u64 = 1 << 20;
/// The contents of a /dev/shm, which are a layer of their own.
const SHM: &str = "dev-shm.tar";
/// The images are small, and nobody waits for less than a second: the fastest level of zstd.
const ZSTD_LEVEL: i32 = 1;
/// As many as tar keeps busy.
const ZSTD_THREADS: u32 = 8;

type Hashes = JoinHandle<Result<Vec<(Digest, u64)>, FileError>>;

/// A snapshot that is being made. Dropped, nothing of it is left.
pub struct Saving {
    draft: Draft,
    /// Bytes that the store may have.
    quota: Option<u64>,
    control: Control,
    /// Staging memory.
    gpu: memory::Saved,
    /// Its packs' digests, which are computed while other things are done.
    hashes: Option<Hashes>,
    staging: Vec<Regions>,
    /// Memory that processes share, and the digests of its packs.
    shared: memory::Saved,
    shared_hashes: Option<Hashes>,
}

impl Saving {
    /// Begins a snapshot in the store at this path. When it is published, the snapshots unused for longest are removed until
    /// the store has at most `quota` bytes.
    ///
    /// # Errors
    /// When the store cannot be used.
    pub fn begin(store: &Path, quota: Option<u64>) -> Result<Self, Failure> {
        let store = Store::open(store).because("cannot use the node store")?;
        let draft = store.draft().because("cannot use the node store")?;
        Ok(Self {
            draft,
            quota,
            control: Control::new(),
            gpu: memory::Saved::default(),
            hashes: None,
            staging: Vec::new(),
            shared: memory::Saved::default(),
            shared_hashes: None,
        })
    }

    /// Saves memory of processes that stand still, and says which parts of which files hold it. The files do not change
    /// any more; they are gone with this value unless it is published.
    ///
    /// # Errors
    /// When memory cannot be read, or the store has no room for it.
    pub fn save(&mut self, staging: &[Regions]) -> Result<Layout, Failure> {
        let saved = memory::save_processes(staging, LEAST_ZEROS, &self.packs("gpu"), &self.control);
        self.gpu = saved.because("cannot save GPU memory")?;
        self.staging = staging.to_vec();
        self.hashes = Some(hashes(self.gpu.packs.clone()));
        let layout = |of: &Regions| ProcessLayout {
            process: of.process,
            segments: self.gpu.table.segments(of.process.container).to_vec(),
        };
        Ok(Layout { packs: self.gpu.packs.clone(), processes: staging.iter().map(layout).collect() })
    }

    /// Saves memory that processes share and that CRIU is not to see. The processes stand still until CRIU has dumped them.
    ///
    /// # Errors
    /// When memory cannot be read, or the store has no room for it. Nothing of it is part of the snapshot then.
    pub fn save_shared(&mut self, shared: &[Regions]) -> Result<(), Failure> {
        let saved = memory::save_together(shared, &self.packs("shared"), &self.control);
        self.shared = saved.because("cannot save shared memory")?;
        self.shared_hashes = Some(hashes(self.shared.packs.clone()));
        Ok(())
    }

    fn packs(&self, prefix: &str) -> memory::Draft {
        memory::Draft { folder: self.draft.folder().to_owned(), prefix: prefix.to_owned() }
    }

    /// Moves what is big out of the images in a folder, which are whole, and makes them and what was saved a snapshot. `None`
    /// if there is nothing big: then images and store are as they were.
    ///
    /// # Errors
    /// When it cannot be done. The images are of no use then.
    pub fn publish(self, publish: Publish, began: &mut dyn FnMut(Phase)) -> Result<Option<Published>, Failure> {
        let Publish { images, place, left, keep_shared, mut config } = publish;
        began(Phase::MoveMemory);
        let Some((host, table)) = self.move_memory(&images, &left, keep_shared)? else { return Ok(None) };
        let (gpu_bytes, all) = (self.gpu.table.statistics().stored, table.statistics());
        config.sizes.gpu_memory = gpu_bytes;
        config.sizes.host_memory = all.stored - gpu_bytes;
        config.sizes.zero = all.zero;
        config.sizes.shared = all.shared;
        began(Phase::Publish);
        let source = match place {
            Place::Inline => {
                let packs = self.gpu.packs.iter().chain(&self.shared.packs).chain(&host.packs);
                inline::write(&images, &table, packs).because("cannot put memory beside the images")?;
                Source::Inline
            }
            Place::Store(name, registry) => {
                let published = (name, registry);
                Source::Snapshot(self.publish_in_store(&images, published, config, &host, &table)?)
            }
        };
        Ok(Some(Published { source, memory: all.memory, spared: all.zero + all.shared }))
    }

    /// Moves what is big out of the images. What is in packs then, and the table of all memory; None if it is not worth it.
    fn move_memory(
        &self,
        images: &Path,
        left: &[Regions],
        keep_shared: bool,
    ) -> Result<Option<(memory::Saved, SegmentTable)>, Failure> {
        let staged = |run: &Run| {
            let of = self.staging.iter().filter(|of| of.process.container == run.pid).flat_map(|of| &of.ranges);
            of.into_iter().any(|range| range.start < run.address + run.length && run.address < range.end)
        };
        let inherited = if keep_shared { Inherited::Leave } else { Inherited::Take };
        let mut runs = images::runs(images, LEAST_RUN, inherited).because("cannot read the images")?;
        runs.retain(|run| !staged(run));
        let big: u64 = runs.iter().map(|run| run.length).sum();
        let is_nothing_saved =
            self.staging.iter().all(|of| of.ranges.is_empty()) && self.shared.table.processes().is_empty();
        if is_nothing_saved && big < LEAST_MEMORY {
            return Ok(None);
        }
        // Shared memory has never been in the images.
        images::mark(images).because("cannot mark the images")?;
        self.check_staging(images, left)?;
        let files = open(&runs)?;
        let sources: Vec<FileSource<'_>> = runs.iter().filter_map(|run| source(&files, run)).collect();
        let host = memory::save_files(&sources, &self.packs("host"), &self.control)
            .because("cannot move memory out of the images")?;
        let saved = self.gpu.table.clone().merge(self.shared.table.clone());
        let table = saved.and_then(|saved| saved.merge(host.table.clone()));
        let table = table.because("cannot move memory out of the images")?;
        images::rewrite(images, &self.changes(&runs)).because("cannot move memory out of the images")?;
        Ok(Some((host, table)))
    }

    /// Nothing of staging memory may be in the images but what was left in memory: it would have changed since it was saved.
    fn check_staging(&self, images: &Path, left: &[Regions]) -> Result<(), Failure> {
        for (pid, range) in
            self.staging.iter().flat_map(|of| of.ranges.iter().map(|range| (of.process.container, *range)))
        {
            let present = images::present(images, pid, range.start..range.end).because("cannot read the images")?;
            for Run { address, length, .. } in present {
                let mut of_process = left.iter().filter(|of| of.process.container == pid).flat_map(|of| &of.ranges);
                if !of_process.any(|left| left.start <= address && address + length <= left.end) {
                    return Err(Failure::new(format!(
                        "process {pid} has changed its memory at {address:#x} since that was saved"
                    )));
                }
            }
        }
        Ok(())
    }

    fn changes(&self, runs: &[Run]) -> Vec<Changes> {
        // A kernel without them refuses the advice.
        let huge = Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        let mut changes = BTreeMap::<ContainerPid, Changes>::new();
        for run in runs {
            changes_of(&mut changes, run.pid).without.push(run.address..run.address + run.length);
        }
        for Regions { process, ranges } in &self.staging {
            let staging = ranges.iter().map(|range| images::Staging { range: range.start..range.end, huge });
            changes_of(&mut changes, process.container).staging.extend(staging);
        }
        changes.into_values().collect()
    }

    fn publish_in_store(
        mut self,
        images: &Path,
        (name, registry): (Name, Option<String>),
        mut config: snapshot::Config,
        host: &memory::Saved,
        table: &SegmentTable,
    ) -> Result<Pointer, Failure> {
        let folder = self.draft.folder().to_owned();
        let (segments, criu) = (folder.join("segments"), folder.join("criu"));
        let host_hashes = hashes(host.packs.clone());
        fs::write(&segments, table.encode()).because("cannot publish the snapshot")?;
        pack(images, &criu).because("cannot pack the images")?;
        config.sizes.images = fs::metadata(&criu).because("cannot publish the snapshot")?.len();
        let mut layers = vec![layer(CRIU_TYPE, criu), layer(SEGMENTS_TYPE, segments)];
        if images.join(SHM).exists() {
            let shm = folder.join("shm");
            fs::copy(images.join(SHM), &shm).because("cannot publish the snapshot")?;
            layers.push(layer(SHM_TYPE, shm));
        }
        let of_packs = [
            (GPU_MEMORY_TYPE, &self.gpu.packs, self.hashes.take()),
            (HOST_MEMORY_TYPE, &self.shared.packs, self.shared_hashes.take()),
            (HOST_MEMORY_TYPE, &host.packs, Some(host_hashes)),
        ];
        for (media_type, packs, hashes) in of_packs {
            let hashes = hashes.map(JoinHandle::join).transpose();
            let hashes = hashes.map_err(|_| Failure::new("cannot compute the digests of memory"))?;
            let hashes = hashes.transpose().because("cannot publish the snapshot")?.unwrap_or_default();
            for (path, (digest, _)) in packs.iter().zip(hashes) {
                layers.push(NewLayer { digest: Some(digest), ..layer(media_type, path.clone()) });
            }
        }
        let (store, quota) = (self.draft.store().clone(), self.quota);
        let new = NewSnapshot {
            name: Some(name.clone()),
            if_taken: IfTaken::Move,
            config,
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        let snapshot = self.draft.publish(new, &|_| ()).because("cannot publish the snapshot")?;
        if let Some(quota) = quota {
            // The snapshot is there all the same, and in use until this is done.
            let enforced = store.enforce_quota(quota);
            let left = enforced.because("cannot make room in the node store")?.left;
            if left > quota {
                tracing::warn!("the node store has {left} bytes, more than its quota of {quota}: what is in use stays");
            }
        }
        Pointer::new(snapshot.digest(), store.root(), Some(name), registry).because("cannot publish the snapshot")
    }
}

/// Removes the snapshot that may have been published, under a name of its own, for a checkpoint that came to nothing.
///
/// # Errors
/// A snapshot that cannot be removed, or a store that cannot be read.
pub fn withdraw(store: &Path, name: &Name) -> Result<(), Failure> {
    if !store.exists() {
        return Ok(());
    }
    let store = Store::open(store).because("cannot use the node store")?;
    match store.remove(&Reference::Name(name.clone()), IfInUse::Refuse) {
        Err(RemoveError::Resolve(ResolveError::Missing { .. })) => Ok(()),
        removed => removed.map(drop).because("a snapshot of a failed checkpoint stays in the node store"),
    }
}

fn hashes(packs: Vec<PathBuf>) -> Hashes {
    std::thread::spawn(move || snapshot::hash_files(&packs, &|_| ()))
}

fn changes_of(changes: &mut BTreeMap<ContainerPid, Changes>, pid: ContainerPid) -> &mut Changes {
    changes.entry(pid).or_insert_with(|| Changes { pid, without: vec![], staging: vec![] })
}

fn layer(media_type: &str, path: PathBuf) -> NewLayer {
    NewLayer { media_type: media_type.to_owned(), path, digest: None, annotations: BTreeMap::new() }
}

fn source<'a>(files: &'a BTreeMap<&Path, File>, run: &'a Run) -> Option<FileSource<'a>> {
    let Run { pid, address, length, offset, file, .. } = run;
    let (pid, address, length, offset) = (*pid, *address, *length, *offset);
    Some(FileSource { file: files.get(&**file)?, path: file, offset, pid, address, length })
}

/// The files of runs.
fn open(runs: &[Run]) -> Result<BTreeMap<&Path, File>, Failure> {
    let mut files = BTreeMap::new();
    for run in runs {
        if !files.contains_key(&*run.file) {
            let file = File::open(&run.file).because("cannot open the pages of the images")?;
            files.insert(&*run.file, file);
        }
    }
    Ok(files)
}

/// Packs the images of a folder, in the order of their names.
fn pack(images: &Path, into: &Path) -> io::Result<()> {
    let mut names: Vec<_> = fs::read_dir(images)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    names.retain(|name| name != SHM);
    names.sort_unstable();
    let mut packed = zstd::Encoder::new(File::create_new(into)?, ZSTD_LEVEL)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    packed.multithread(u32::try_from(cores).unwrap_or(1).min(ZSTD_THREADS))?;
    let mut tar = tar::Builder::new(packed);
    tar.mode(tar::HeaderMode::Deterministic);
    for name in names {
        let path = images.join(&name);
        if fs::symlink_metadata(&path)?.is_file() {
            tar.append_path_with_name(&path, &name)?;
        }
    }
    tar.into_inner()?.finish()?;
    Ok(())
}
