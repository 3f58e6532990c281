//! The guardian: the process that has hold of a container's CUDA processes during a checkpoint or a restore.
//!
//! It takes orders from the shim. When the shim hangs up without having ordered the container back (it is dead), the
//! guardian puts it back on its own account.

use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use cgroup::Cgroup;
use cuda::{Pair, write_line};
use phase::{Phase, chain};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::keeper::Keeper;
use crate::protocol::{Order, Report};
use crate::session::{Resumed, SessionError, Suspended};
use crate::swap::{Swap, Swapped};

/// First argument by which this binary knows that it is to be a guardian.
pub const GUARDIAN: &str = "cuda-guardian";

/// Serves one container. To be run by `main` when the first argument is [`GUARDIAN`]; standard input is the socket to the
/// shim.
#[must_use]
pub fn guardian_main() -> ExitCode {
    // For ps and for messages: a program that was started by /proc/self/exe is called exe.
    let _ = rustix::thread::set_name(c"cuda-guardian");
    match Guardian::new().and_then(Guardian::serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{GUARDIAN}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Pauses between tries to pay what is owed: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

struct Guardian {
    orders: BufReader<UnixStream>,
    reports: UnixStream,
    keeper: Keeper,
    /// What it has to put back by itself: a container, and how.
    owed: Option<LastResume>,
}

/// How to put back the container of a shim that is dead.
struct LastResume {
    cgroup: Cgroup,
    frozen: bool,
    pairs: Vec<Pair>,
    limit: Duration,
}

impl Guardian {
    fn new() -> io::Result<Self> {
        let reports = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let orders = BufReader::new(reports.try_clone()?);
        Ok(Self { orders, reports, keeper: Keeper::new(), owed: None })
    }

    fn serve(mut self) -> io::Result<()> {
        while let Some(order) = next(&mut self.orders)? {
            let report = self.obey(order);
            // Whoever does not listen any more has hung up: the next read says so.
            drop(write_line(&mut self.reports, &report));
            if !matches!(report, Report::Suspended(Ok(_)) | Report::Swapped(_)) {
                self.pay_until_ordered();
            }
        }
        let Some(LastResume { cgroup, frozen, pairs, limit }) = self.owed.take() else { return Ok(()) };
        if let Err(error) = self.keeper.resume(&cgroup, frozen, &pairs, limit, &mut |_| {}) {
            tracing::error!("for a shim that is dead: {error}");
        }
        let mut pause = PAUSES.0;
        while !self.keeper.owes().is_paid() {
            std::thread::sleep(pause);
            pause = PAUSES.1.min(pause * 2);
            self.keeper.pay();
        }
        Ok(())
    }

    /// Pays what is owed after a failure, until it is paid or the shim says something.
    fn pay_until_ordered(&mut self) {
        let mut pause = PAUSES.0;
        while !self.keeper.owes().is_paid() && !self.is_spoken_to(pause) {
            pause = PAUSES.1.min(pause * 2);
            if self.keeper.pay().is_paid() {
                self.owed = None;
            }
        }
    }

    /// Waits whether the shim says something, or hangs up.
    fn is_spoken_to(&self, wait: Duration) -> bool {
        let mut polled = [PollFd::new(&self.reports, PollFlags::IN)];
        // An interrupted or failed wait is one without a result.
        let _ = rustix::event::poll(&mut polled, Some(&Timespec::try_from(wait).unwrap_or_default()));
        !polled[0].revents().is_empty()
    }

    fn obey(&mut self, order: Order) -> Report {
        match order {
            Order::Inventory => Report::Inventory(self.keeper.inventory()),
            Order::Suspend { pid, paused, patience, limit } => {
                Report::Suspended(self.suspend(pid, paused, patience, limit))
            }
            Order::Swap { pid, paused, swap, limit } => Report::Swapped(self.swap(pid, paused, &swap, limit)),
            Order::Resume { pid, frozen, pairs, limit } => Report::Resumed(self.resume(pid, frozen, pairs, limit)),
            Order::ResumeUnfilled { pid, staging, pairs, limit } => {
                Report::Resumed(self.resume_unfilled(pid, &staging, &pairs, limit))
            }
            Order::Run => Report::Resumed(Err(SessionError::Unfilled)),
        }
    }

    fn suspend(
        &mut self,
        pid: i32,
        paused: bool,
        patience: Duration,
        limit: Duration,
    ) -> Result<Suspended, SessionError> {
        let cgroup = cgroup_of(pid)?;
        let suspended = self.keeper.suspend(&cgroup, paused, patience, limit, &mut begins(&self.reports));
        let is_undone = suspended.is_err() && self.keeper.owes().is_paid();
        self.owed = (!is_undone).then_some(LastResume { cgroup, frozen: paused, pairs: Vec::new(), limit });
        suspended
    }

    fn swap(&mut self, pid: i32, paused: bool, swap: &Swap, limit: Duration) -> Result<Swapped, SessionError> {
        let cgroup = cgroup_of(pid)?;
        self.owed = Some(LastResume { cgroup: cgroup.clone(), frozen: paused, pairs: Vec::new(), limit });
        self.keeper.swap(&cgroup, swap, limit, &mut begins(&self.reports))
    }

    fn resume(&mut self, pid: i32, frozen: bool, pairs: Vec<Pair>, limit: Duration) -> Result<Resumed, SessionError> {
        let cgroup = cgroup_of(pid)?;
        self.owed = Some(LastResume { cgroup: cgroup.clone(), frozen, pairs: pairs.clone(), limit });
        let resumed = self.keeper.resume(&cgroup, frozen, &pairs, limit, &mut begins(&self.reports))?;
        self.owed = None;
        Ok(resumed)
    }

    /// Nothing is owed to a shim that hangs up over it: the container is of no use, and stays frozen.
    fn resume_unfilled(
        &mut self,
        pid: i32,
        staging: &Swap,
        pairs: &[Pair],
        limit: Duration,
    ) -> Result<Resumed, SessionError> {
        let Self { orders, reports, keeper, .. } = self;
        let cgroup = cgroup_of(pid)?;
        keeper.resume_unfilled(&cgroup, staging, pairs, limit, &mut begins(reports), &mut || {
            drop(write_line(&mut &*reports, &Report::Restored));
            matches!(next(orders), Ok(Some(Order::Run)))
        })
    }
}

fn cgroup_of(pid: i32) -> Result<Cgroup, SessionError> {
    Cgroup::of_process(pid).map_err(|error| {
        let (action, why) = ("find the cgroup of".to_owned(), chain(&error));
        SessionError::Container { action, why }
    })
}

/// None if the shim has hung up.
fn next(orders: &mut impl BufRead) -> io::Result<Option<Order>> {
    let mut line = String::new();
    // A shim that was killed does so with or without an error.
    if matches!(orders.read_line(&mut line), Ok(0) | Err(_)) {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}

fn begins(mut reports: &UnixStream) -> impl FnMut(Phase) {
    // As above.
    move |phase| drop(write_line(&mut reports, &Report::Began(phase)))
}
