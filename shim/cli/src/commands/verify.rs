//! `gpusnap verify`.

use std::fs::File;
use std::io::Read;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memory::{Control, MAX_TABLE, Pack, SegmentTable};
use serde::Serialize;
use snapshot::{GPU_MEMORY_TYPE, HOST_MEMORY_TYPE, Layer, Reference, Report, SEGMENTS_TYPE, SnapshotError, Store};

use super::{Context, Interrupt, blocking};
use crate::error::{CliError, chain};
use crate::output::{clean, print, print_json};
use crate::progress::{Reading, Shown};
use crate::units::bytes;

#[derive(Serialize)]
struct Verified {
    snapshots: usize,
    blobs: usize,
    bytes: u64,
    problems: Vec<Problem>,
}

#[derive(Serialize)]
struct Problem {
    place: String,
    what: String,
    snapshots: Vec<String>,
}

pub(super) async fn verify(context: &Context, snapshots: Vec<String>, json: bool) -> Result<(), CliError> {
    let references = snapshots.iter().map(|given| context.reference(given)).collect::<Result<Vec<_>, _>>()?;
    let mut interrupt = Interrupt::listen();
    // Opens another program's layout as a store, too: verification prepares for use.
    let store = context.open()?;
    let done = Arc::new(AtomicU64::new(0));
    let total = total(&store, &references);
    let counted = Arc::clone(&done);
    let shown = Shown::begin("verifying".to_owned(), context.quiet, move || Reading {
        done: counted.load(Ordering::Relaxed),
        total,
        trouble: None,
    });
    let work = blocking(move || read_all(&store, &references, &done));
    let report = tokio::select! {
        report = work => report?,
        () = interrupt.wait() => {
            return Err(CliError::Interrupted { what: "the verification".to_owned(), next: "nothing was changed" });
        }
    };
    drop(shown);
    tell(context, &report, json)?;
    match report.problems.len() {
        0 => Ok(()),
        count => Err(CliError::Damaged { count }),
    }
}

/// Bytes to read, as far as known.
fn total(store: &Store, references: &[Reference]) -> u64 {
    if references.is_empty() {
        return store.usage().map(|usage| usage.blobs - usage.garbage).unwrap_or_default();
    }
    let sizes = references.iter().filter_map(|reference| store.open_snapshot(reference).ok());
    sizes.map(|snapshot| snapshot.manifest().size()).sum()
}

fn read_all(store: &Store, references: &[Reference], done: &AtomicU64) -> Result<Report, CliError> {
    let progress = |bytes: u64| {
        done.fetch_add(bytes, Ordering::Relaxed);
    };
    let verify = |which: Option<&Reference>| {
        store.verify(which, Some(&look_into), &progress).map_err(|source: SnapshotError| CliError::Snapshot {
            action: "verify",
            snapshot: which.map_or_else(|| "the store".to_owned(), ToString::to_string),
            source: Box::new(source),
        })
    };
    if references.is_empty() {
        return verify(None);
    }
    let mut all = Report::default();
    for reference in references {
        let report = verify(Some(reference))?;
        all.snapshots += report.snapshots;
        all.blobs += report.blobs;
        all.bytes += report.bytes;
        all.problems.extend(report.problems);
    }
    Ok(all)
}

/// Checks a layer's content: a pack's own checksums, on which a restore relies, and the form of the
/// segment table.
fn look_into(layer: &Layer, file: &File) -> Result<(), String> {
    match layer.media_type.as_str() {
        GPU_MEMORY_TYPE | HOST_MEMORY_TYPE => {
            let file = file.try_clone().map_err(|error| error.to_string())?;
            let pack = Pack::from_file(layer.digest.short().into(), file).map_err(|error| chain(&error))?;
            // One thread: packs are verified in parallel already.
            let control = Control::with_threads(NonZeroUsize::MIN);
            memory::verify(&[pack], &control).map_err(|error| chain(&error))
        }
        SEGMENTS_TYPE => segments(layer, file).map(drop),
        _ => Ok(()),
    }
}

/// Reads a segment table.
pub(super) fn segments(layer: &Layer, file: &File) -> Result<SegmentTable, String> {
    if layer.size > MAX_TABLE {
        return Err(format!("it has {} bytes, more than any segment table", layer.size));
    }
    let mut bytes = Vec::new();
    file.take(layer.size).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    SegmentTable::parse(&bytes).map_err(|error| chain(&error))
}

fn tell(context: &Context, report: &Report, json: bool) -> Result<(), CliError> {
    if json {
        let problems = report.problems.iter().map(|problem| Problem {
            place: problem.place.clone(),
            what: problem.what.clone(),
            snapshots: problem.snapshots.iter().map(ToString::to_string).collect(),
        });
        return print_json(&Verified {
            snapshots: report.snapshots,
            blobs: report.blobs,
            bytes: report.bytes,
            problems: problems.collect(),
        });
    }
    for problem in &report.problems {
        print(format!("{}\n", clean(&problem.to_string())).as_bytes())?;
    }
    if report.problems.is_empty() {
        let (snapshots, blobs) = (report.snapshots, report.blobs);
        context.say(&format!("{snapshots} snapshots, {blobs} blobs, {}: all is well", bytes(report.bytes)))?;
    }
    Ok(())
}
