//! `gpusnap push` and `gpusnap pull`.

use std::sync::Arc;
use std::time::Instant;

use registry::{Meter, Options, Pull, Target, Totals};
use snapshot::IfTaken;

use super::{Context, Interrupt};
use crate::args::Transfer;
use crate::error::{AGAIN, CliError};
use crate::progress::{Reading, Shown, rate};
use crate::units::bytes;

pub(super) async fn push(context: &Context, given: &str, target: &str, transfer: &Transfer) -> Result<(), CliError> {
    let mut interrupt = Interrupt::listen();
    let (reference, target) = (context.reference(given)?, Target::parse(target, transfer.plain_http)?);
    let opened = context.open_to_read()?.open_snapshot(&reference);
    let snapshot = opened.map_err(|source| CliError::Snapshot {
        action: "push",
        snapshot: reference.to_string(),
        source: Box::new(source),
    })?;
    let (options, meter, begun) = (options(transfer), Arc::new(Meter::default()), Instant::now());
    let shown = show(context, format!("pushing {reference}"), &meter);
    let pushed = tokio::select! {
        pushed = registry::push(&snapshot, &target, &options, &meter) => pushed,
        () = interrupt.wait() => {
            return Err(CliError::Interrupted { what: format!("pushing {reference}"), next: AGAIN });
        }
    };
    drop(shown);
    pushed.map_err(|source| CliError::Push {
        snapshot: reference.to_string(),
        target: target.to_string(),
        source: Box::new(source),
    })?;
    context.say(&format!("{reference} is {target} ({}): {}", snapshot.digest().short(), moved(meter.read(), begun)))
}

pub(super) async fn pull(
    context: &Context,
    target: &str,
    name: Option<&str>,
    quota: Option<u64>,
    transfer: &Transfer,
) -> Result<(), CliError> {
    let mut interrupt = Interrupt::listen();
    let target = Target::parse(target, transfer.plain_http)?;
    let name = context.name(name.unwrap_or_else(|| target.short_name()))?;
    let store = context.open()?;
    let (options, meter, begun) = (options(transfer), Arc::new(Meter::default()), Instant::now());
    let shown = show(context, format!("pulling {name}"), &meter);
    let pull = Pull { target: target.clone(), name: Some(name.clone()), if_taken: IfTaken::Move, quota };
    let pulled = tokio::select! {
        pulled = registry::pull(&store, pull, &options, &meter) => pulled,
        () = interrupt.wait() => {
            return Err(CliError::Interrupted { what: format!("pulling {target}"), next: AGAIN });
        }
    };
    drop(shown);
    let snapshot = pulled.map_err(|source| CliError::Pull { target: target.to_string(), source: Box::new(source) })?;
    context.say(&format!("{name} is {target} ({}): {}", snapshot.digest().short(), moved(meter.read(), begun)))
}

fn options(transfer: &Transfer) -> Options {
    Options { jobs: transfer.jobs.into(), ..Options::default() }
}

fn show(context: &Context, what: String, meter: &Arc<Meter>) -> Shown {
    let meter = Arc::clone(meter);
    Shown::begin(what, context.quiet, move || {
        let Totals { total, moved, present, .. } = meter.read();
        Reading { done: moved + present, total, trouble: meter.take_trouble() }
    })
}

/// Summary of a transfer: `12.0 GB of 28.8 GB moved in 10.2 s, 1.1 GB/s`.
fn moved(totals: Totals, begun: Instant) -> String {
    let elapsed = begun.elapsed();
    let all = totals.moved + totals.lost;
    format!(
        "{} of {} moved in {}.{} s, {}",
        bytes(totals.moved),
        bytes(totals.total),
        elapsed.as_secs(),
        elapsed.subsec_millis() / 100,
        rate(all, elapsed)
    )
}
