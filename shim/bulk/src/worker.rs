//! The worker process.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use phase::Phase;

use snapshot::{IfInUse, Reference, Store};

use crate::protocol::{Because, Failure, Order, Published, Report, Source};
use crate::restore::Restoring;
use crate::save::Saving;

/// First argument by which this binary knows that it is to be a memory worker.
pub const WORKER: &str = "memory-worker";

/// Serves one checkpoint or restore. To be run by `main` when the first argument is [`WORKER`]; standard input is the socket
/// to the shim. It ends when the shim hangs up.
#[must_use]
pub fn worker_main() -> ExitCode {
    // For ps and for messages: a program that was started by /proc/self/exe is called exe.
    let _ = rustix::thread::set_name(c"memory-worker");
    raise_file_limit();
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{WORKER}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Each pack is an open file, and 256 MiB: a soft limit of 1024 would be a limit for snapshots.
fn raise_file_limit() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    // Without it, a pack that cannot be opened says why.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

/// What a worker is for, once it knows.
enum Job {
    None,
    Saving(Box<Saving>),
    Saved(Store),
    Restoring(Box<Restoring>),
}

fn serve() -> io::Result<()> {
    let reports = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut job = Job::None;
    for order in BufReader::new(reports.try_clone()?).lines() {
        // A shim that was killed hangs up, with or without an error.
        let Ok(order) = order else { break };
        // Whoever does not listen any more has hung up: the next read says so.
        let meanwhile = |report| drop(say(&reports, &report));
        let report = obey(&mut job, serde_json::from_str(&order)?, &meanwhile);
        if say(&reports, &report).is_err()
            && let Report::Published(Ok(Some(Published { source: Source::Snapshot(pointer), .. }))) = report
        {
            // Of a shim that is dead no checkpoint will ever point to it.
            obey(&mut job, Order::Withdraw(pointer), &meanwhile);
        }
    }
    Ok(())
}

/// In one write, as no other thread's report is to get in between.
fn say(mut reports: &UnixStream, report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    reports.write_all(&line)
}

fn obey(job: &mut Job, order: Order, meanwhile: &(dyn Fn(Report) + Sync)) -> Report {
    let began = &mut |phase| meanwhile(Report::Began(phase));
    let unasked = || Failure::new("the worker was asked for something that it has not begun".into());
    match (order, std::mem::replace(job, Job::None)) {
        (Order::Begin { store, quota }, _) => Report::Begun(Saving::begin(&store, quota).map(|saving| {
            *job = Job::Saving(Box::new(saving));
        })),
        (Order::Save { staging }, Job::Saving(mut saving)) => {
            began(Phase::SaveMemory);
            let saved = saving.save(&staging);
            *job = Job::Saving(saving);
            Report::Saved(saved)
        }
        (Order::Publish(publish), Job::Saving(saving)) => {
            *job = Job::Saved(saving.store().clone());
            Report::Published(saving.publish(*publish, began))
        }
        (Order::Withdraw(pointer), Job::Saved(store)) => {
            let removed = store.remove(&Reference::Digest(pointer.digest()), IfInUse::Refuse);
            Report::Withdrawn(removed.map(drop).because("a snapshot of a failed checkpoint stays in the node store"))
        }
        (Order::Open { source, images, node }, _) => {
            Report::Opened(Restoring::open(&source, &images, &node, began).map(|restoring| {
                let staging = restoring.staging();
                *job = Job::Restoring(Box::new(restoring));
                staging
            }))
        }
        (Order::Fill { processes, first, staging }, Job::Restoring(restoring)) => {
            began(Phase::Fill);
            Report::Filled(restoring.fill(&processes, first, staging, &|| meanwhile(Report::FilledFirst)))
        }
        (Order::Save { .. }, _) => Report::Saved(Err(unasked())),
        (Order::Publish(_), _) => Report::Published(Err(unasked())),
        (Order::Withdraw(_), _) => Report::Withdrawn(Err(unasked())),
        (Order::Fill { .. }, _) => Report::Filled(Err(unasked())),
    }
}
