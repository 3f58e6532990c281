//! `gpusnap export` and `gpusnap import`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use snapshot::{ExportError, Import, Name, Reference, Snapshot};

use super::{Context, Interrupt, blocking};
use crate::error::CliError;
use crate::progress::{Reading, Shown};
use crate::units::bytes;

/// A reader or writer that fails as soon as `stop` is set.
struct Stoppable<T> {
    inner: T,
    stop: Arc<AtomicBool>,
}

impl<T> Stoppable<T> {
    fn check(&self) -> io::Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(io::Error::other("interrupted")) } else { Ok(()) }
    }
}

impl<T: Write> Write for Stoppable<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check()?;
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Stoppable<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        self.inner.read(bytes)
    }
}

pub(super) async fn export(context: &Context, given: &str, file: Option<PathBuf>) -> Result<(), CliError> {
    let reference = context.reference(given)?;
    if file.is_none() && io::stdout().is_terminal() {
        return Err(CliError::Terminal);
    }
    let opened = context.open_to_read()?.open_snapshot(&reference);
    let snapshot = opened.map_err(|source| CliError::Snapshot {
        action: "export",
        snapshot: reference.to_string(),
        source: Box::new(source),
    })?;
    let size = snapshot.manifest().size();
    let (asked, place) = (reference.clone(), file.clone());
    stoppable(context, format!("exporting {reference}"), size, move |stop, done| match &place {
        Some(path) => export_to(&snapshot, &asked, path, stop, done),
        None => write(&snapshot, &asked, io::stdout().lock(), stop, done),
    })
    .await?;
    match file {
        Some(path) => context.say(&format!("{reference} is in {}: {}", path.display(), bytes(size))),
        None => Ok(()),
    }
}

/// Writes an archive, and gives a whole archive its name.
fn export_to(
    snapshot: &Snapshot,
    reference: &Reference,
    path: &Path,
    stop: Arc<AtomicBool>,
    done: &AtomicU64,
) -> Result<(), CliError> {
    let failed = |source| CliError::File { action: "write", path: path.to_owned(), source };
    if path.symlink_metadata().is_ok() {
        return Err(failed(io::ErrorKind::AlreadyExists.into()));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new().prefix(".gpusnap-export-").tempfile_in(folder).map_err(failed)?;
    write(snapshot, reference, file.as_file(), stop, done)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist_noclobber(path).map(drop).map_err(|error| failed(error.error))
}

fn write(
    snapshot: &Snapshot,
    reference: &Reference,
    target: impl Write,
    stop: Arc<AtomicBool>,
    done: &AtomicU64,
) -> Result<(), CliError> {
    let name = match reference {
        Reference::Name(name) => Some(name),
        _ => snapshot.names().first(),
    };
    let failed = |source| CliError::Export { snapshot: reference.to_string(), source: Box::new(source) };
    let mut target = BufWriter::with_capacity(1 << 20, Stoppable { inner: target, stop });
    let progress = |bytes: u64| {
        done.fetch_add(bytes, Ordering::Relaxed);
    };
    snapshot.export(name, &mut target, &progress).map_err(failed)?;
    target.flush().map_err(|source| failed(ExportError::Write { what: "the last bytes".to_owned(), source }))
}

pub(super) async fn import(context: &Context, file: PathBuf, name: Option<&str>) -> Result<(), CliError> {
    let name = name.map(|given| context.name(given)).transpose()?;
    let store = context.open()?;
    let shown = file.display().to_string();
    let failed = |source| CliError::File { action: "read", path: file.clone(), source };
    let (source, size): (Box<dyn Read + Send>, u64) = if file == Path::new("-") {
        (Box::new(io::stdin()), 0)
    } else {
        let file = File::open(&file).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        (Box::new(file), size)
    };
    let place = shown.clone();
    let imported = stoppable(context, format!("importing {shown}"), size, move |stop, done| {
        let progress = |bytes: u64| {
            done.fetch_add(bytes, Ordering::Relaxed);
        };
        let import = Import { name, ..Import::default() };
        let imported = store.import(Stoppable { inner: source, stop }, import, &progress);
        imported.map_err(|source| CliError::Import { file: place, source: Box::new(source) })
    })
    .await?;
    let names: Vec<String> = imported.names().iter().map(Name::to_string).collect();
    let named = if names.is_empty() { "without a name".to_owned() } else { names.join(", ") };
    context.say(&format!("{named} ({}) is imported from {shown}", imported.digest().short()))
}

/// Runs work in a thread and shows the progress. An interrupt stops the work, which removes its
/// output.
async fn stoppable<T: Send + 'static>(
    context: &Context,
    what: String,
    total: u64,
    work: impl FnOnce(Arc<AtomicBool>, &AtomicU64) -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    let mut interrupt = Interrupt::listen();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&done);
    let _shown = Shown::begin(what.clone(), context.quiet, move || Reading {
        done: counted.load(Ordering::Relaxed),
        total,
        trouble: None,
    });
    let told = Arc::clone(&stop);
    let mut work = std::pin::pin!(blocking(move || work(told, &done)));
    tokio::select! {
        result = &mut work => result,
        () = interrupt.wait() => {
            stop.store(true, Ordering::Relaxed);
            // The work may have been done by then.
            work.await.map_err(|_| CliError::Interrupted { what, next: "nothing of it was kept" })
        }
    }
}
