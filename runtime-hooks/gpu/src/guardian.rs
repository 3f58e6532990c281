//! The guardian: the process that has hold of a container's CUDA processes during a checkpoint or a restore.
//!
//! It takes orders from the shim. When the shim hangs up without having ordered the container back (it is dead), the
//! guardian puts it back on its own account.

use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use phase::Phase;

use crate::host::{INVENTORY, Machine};
use crate::protocol::{Order, Report};
use crate::session::{Resumed, Session, SessionError, Suspended};
use crate::swap::{Swap, Swapped};
use cuda::{Callers, Pair, write_line};
use phase::chain;

/// First argument by which this binary knows that it is to be a guardian.
pub const GUARDIAN: &str = "cuda-guardian";

/// How long the driver may take to put everything back for a shim that is dead: 80 GB at 4 GB/s (cuda.md), and more.
const LAST_RESUME: Duration = Duration::from_secs(300);

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

struct Guardian {
    orders: BufReader<UnixStream>,
    reports: UnixStream,
    callers: Callers,
    /// What it has to put back by itself: a container, and whether that is to be left frozen.
    owed: Option<(i32, bool)>,
}

impl Guardian {
    fn new() -> io::Result<Self> {
        let reports = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let orders = BufReader::new(reports.try_clone()?);
        let mut callers = Callers::new(PathBuf::from("/proc/self/exe"));
        callers.prepare();
        Ok(Self { orders, reports, callers, owed: None })
    }

    fn serve(mut self) -> io::Result<()> {
        while let Some(order) = next(&mut self.orders)? {
            let report = self.obey(order);
            // Whoever does not listen any more has hung up: the next read says so.
            drop(write_line(&mut self.reports, &report));
        }
        let Some((pid, frozen)) = self.owed else { return Ok(()) };
        let mut machine = Machine::of(pid, &mut self.callers).map_err(io::Error::other)?;
        let resumed = Session::new(&mut machine, &mut |_| {}).resume(frozen, &[], LAST_RESUME);
        resumed.map(drop).map_err(io::Error::other)
    }

    fn obey(&mut self, order: Order) -> Report {
        match order {
            Order::Inventory => {
                let taken = self.callers.inventory(INVENTORY);
                Report::Inventory(taken.map_err(|failure| SessionError::NoDriver(failure.to_string())))
            }
            Order::Suspend { pid, paused, patience, limit } => {
                Report::Suspended(self.suspend(pid, paused, patience, limit))
            }
            Order::Swap { pid, paused, swap, limit } => Report::Swapped(self.swap(pid, paused, &swap, limit)),
            Order::Resume { pid, frozen, pairs, limit } => Report::Resumed(self.resume(pid, frozen, &pairs, limit)),
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
        let mut machine = Machine::of(pid, &mut self.callers)?;
        let suspended = Session::new(&mut machine, &mut begins(&self.reports)).suspend(paused, patience, limit);
        let is_undone = matches!(&suspended, Err(failure) if !matches!(failure, SessionError::NotUndone { .. }));
        self.owed = (!is_undone).then_some((pid, paused));
        suspended
    }

    fn swap(&mut self, pid: i32, paused: bool, swap: &Swap, limit: Duration) -> Result<Swapped, SessionError> {
        self.owed = Some((pid, paused));
        let mut machine = Machine::of(pid, &mut self.callers)?;
        Session::new(&mut machine, &mut begins(&self.reports)).swap(swap, limit)
    }

    fn resume(&mut self, pid: i32, frozen: bool, pairs: &[Pair], limit: Duration) -> Result<Resumed, SessionError> {
        self.owed = Some((pid, frozen));
        let mut machine = Machine::of(pid, &mut self.callers)?;
        let resumed = Session::new(&mut machine, &mut begins(&self.reports)).resume(frozen, pairs, limit)?;
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
        let Self { orders, reports, callers, .. } = self;
        let mut machine = Machine::of_unfilled(pid, callers)?;
        Session::new(&mut machine, &mut begins(reports)).resume_unfilled(staging, pairs, limit, &mut || {
            drop(write_line(&mut &*reports, &Report::Restored));
            matches!(next(orders), Ok(Some(Order::Run)))
        })
    }
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
