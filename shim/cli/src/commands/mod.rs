//! The commands.

mod archive;
mod inspect;
mod list;
mod remove;
mod transfer;
mod verify;

use std::path::{Path, PathBuf};

use clap::CommandFactory;
use snapshot::{Name, Reference, Scope, Store};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::{Arguments, Command};
use crate::error::CliError;
use crate::output::print;

/// Settings of all commands.
#[derive(Clone, Debug)]
struct Context {
    store: PathBuf,
    namespace: String,
    quiet: bool,
}

/// Runs the command.
pub(crate) async fn run(arguments: Arguments) -> Result<(), CliError> {
    let Arguments { store, namespace, quiet, command } = arguments;
    let context = Context { store, namespace, quiet };
    match command {
        Command::Ls { format } => list::list(&context, format.json),
        Command::Inspect { snapshot, format } => inspect::inspect(&context, &snapshot, format.json),
        Command::Verify { snapshots, format } => verify::verify(&context, snapshots, format.json).await,
        Command::Rm { snapshots, wait } => remove::remove(&context, snapshots, wait).await,
        Command::Prune { unnamed, grace, quota } => remove::prune(&context, grace, unnamed, quota),
        Command::Tag { snapshot, name } => tag(&context, &snapshot, &name),
        Command::Push { snapshot, target, transfer } => transfer::push(&context, &snapshot, &target, &transfer).await,
        Command::Pull { target, name, quota, transfer } => {
            transfer::pull(&context, &target, name.as_deref(), quota, &transfer).await
        }
        Command::Export { snapshot, file } => archive::export(&context, &snapshot, file).await,
        Command::Import { file, name } => archive::import(&context, file, name.as_deref()).await,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "gpusnap", &mut script);
            print(&script)
        }
        Command::Man { folder } => manual(folder.as_deref()),
    }
}

impl Context {
    fn open(&self) -> Result<Store, CliError> {
        Store::open(&self.store).map_err(|source| CliError::Open { store: self.store.clone(), source })
    }

    /// Opens the store for a command that changes nothing: a missing store is not made.
    fn open_to_read(&self) -> Result<Store, CliError> {
        Store::open_to_read(&self.store).map_err(|source| CliError::Open { store: self.store.clone(), source })
    }

    /// A snapshot as given by a user: a name with a namespace, a digest, the first digits of a
    /// digest, or a name in the chosen namespace.
    fn reference(&self, given: &str) -> Result<Reference, CliError> {
        match given.parse::<Reference>() {
            Ok(reference) => Ok(reference),
            Err(error) if given.contains(['/', ':']) => Err(error.into()),
            Err(_) => Ok(self.name(given)?.into()),
        }
    }

    fn name(&self, given: &str) -> Result<Name, CliError> {
        if given.contains('/') {
            return Ok(given.parse()?);
        }
        Ok(Name::new(Scope::new(&self.namespace, None)?, given)?)
    }

    fn say(&self, line: &str) -> Result<(), CliError> {
        if self.quiet { Ok(()) } else { print(format!("{line}\n").as_bytes()) }
    }
}

fn tag(context: &Context, snapshot: &str, name: &str) -> Result<(), CliError> {
    let (reference, name) = (context.reference(snapshot)?, context.name(name)?);
    let tagged = context.open()?.tag(&reference, &name);
    let digest = tagged.map_err(|source| CliError::Snapshot {
        action: "tag",
        snapshot: reference.to_string(),
        source: Box::new(source),
    })?;
    context.say(&format!("{name} is {}", digest.short()))
}

fn manual(folder: Option<&Path>) -> Result<(), CliError> {
    let command = Arguments::command();
    let Some(folder) = folder else {
        let mut page = Vec::new();
        // Writing to memory does not fail.
        let _ = clap_mangen::Man::new(command).render(&mut page);
        return print(&page);
    };
    let failed = |source| CliError::File { action: "write manual pages to", path: folder.to_owned(), source };
    std::fs::create_dir_all(folder).map_err(failed)?;
    clap_mangen::generate_to(command, folder).map_err(failed)
}

/// SIGINT and SIGTERM as a wait. The signals no longer end the process from then on.
struct Interrupt([Option<Signal>; 2]);

impl Interrupt {
    fn listen() -> Self {
        // A signal without a handler still ends the process.
        Self([SignalKind::interrupt(), SignalKind::terminate()].map(|kind| signal(kind).ok()))
    }

    async fn wait(&mut self) {
        let [interrupt, terminate] = &mut self.0;
        tokio::select! {
            Some(()) = receive(interrupt) => {}
            Some(()) = receive(terminate) => {}
            else => std::future::pending().await,
        }
    }
}

async fn receive(signal: &mut Option<Signal>) -> Option<()> {
    signal.as_mut()?.recv().await
}

/// Runs blocking work in a thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await,
        },
    }
}
