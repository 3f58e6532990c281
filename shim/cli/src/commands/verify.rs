//! `gpusnap verify`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use snapshot::{Reference, Report, SnapshotError, Store};

use super::{Context, blocking, interrupted};
use crate::error::CliError;
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
        () = interrupted() => {
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

/// What there is to read, as far as it can be told.
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
        store.verify(which, None, &progress).map_err(|source: SnapshotError| CliError::Snapshot {
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
