//! `gpusnap rm` and `gpusnap prune`.

use std::time::Duration;

use snapshot::{IfInUse, Prune, Removed};

use super::{Context, Interrupt, blocking};
use crate::error::CliError;
use crate::units::bytes;

pub(super) async fn remove(context: &Context, snapshots: Vec<String>, wait: bool) -> Result<(), CliError> {
    let if_in_use = if wait { IfInUse::Wait } else { IfInUse::Refuse };
    let references = snapshots.iter().map(|given| context.reference(given)).collect::<Result<Vec<_>, _>>()?;
    let mut interrupt = Interrupt::listen();
    let store = context.open()?;
    for reference in references {
        let (store, asked) = (store.clone(), reference.clone());
        // In a thread, in case of a wait for the end of the use.
        let removal = blocking(move || store.remove(&asked, if_in_use));
        let removed = tokio::select! {
            removed = removal => removed,
            () = interrupt.wait() => {
                return Err(CliError::Interrupted { what: format!("removing {reference}"), next: "see `gpusnap ls`" });
            }
        };
        let removed = removed.map_err(|source| CliError::Remove { snapshot: reference.to_string(), source })?;
        context.say(&match removed.snapshots.is_empty() {
            true => format!("{reference}: name removed; the snapshot has other names"),
            false => format!("{reference}: removed, {} freed", bytes(removed.bytes)),
        })?;
    }
    Ok(())
}

pub(super) fn prune(
    context: &Context,
    grace: Duration,
    unnamed: Option<Duration>,
    quota: Option<u64>,
) -> Result<(), CliError> {
    let store = context.open()?;
    let failed = |source| CliError::Prune { source };
    tell(context, &store.prune(Prune { grace, unnamed }).map_err(failed)?)?;
    if let Some(quota) = quota {
        let removed = store.enforce_quota(quota).map_err(failed)?;
        tell(context, &removed)?;
        if removed.left > quota {
            context.say(&format!(
                "{} are left, more than the quota of {}: snapshots in use stay",
                bytes(removed.left),
                bytes(quota)
            ))?;
        }
    }
    Ok(())
}

fn tell(context: &Context, removed: &Removed) -> Result<(), CliError> {
    for digest in &removed.snapshots {
        context.say(&format!("{}: removed", digest.short()))?;
    }
    for digest in &removed.in_use {
        context.say(&format!("{}: in use, not removed", digest.short()))?;
    }
    for digest in &removed.unreadable {
        context.say(&format!(
            "{}: unreadable manifest, needed blobs unknown: no blob was removed; see `gpusnap verify`",
            digest.short()
        ))?;
    }
    context.say(&format!("{} freed", bytes(removed.bytes + removed.partial)))
}
