//! Holding the processes of a cgroup still.

use std::path::Path;
use std::time::{Duration, Instant};

use proc::{HostPid, Stat, Wait};

use crate::{Cgroup, CgroupError, Hierarchy, file, process, vfork};

/// Limit of a freeze. The kernel needs less than a millisecond, but a process in an uninterruptible wait,
/// for a dead network file system say, is frozen only when that ends.
const DEADLINE: Duration = Duration::from_millis(500);

/// Pause before the kernel is asked again.
const PAUSE: Duration = Duration::from_millis(1);

/// The v1 freezer can miss a process that is born while it freezes, and then waits for it for ever; asking it again
/// helps. runc and the kernel's own tests do the same.
const ASK_AGAIN: u32 = 20;

/// Pause before a thread that seems to wait uninterruptibly is looked at again.
const SECOND_LOOK: Duration = Duration::from_millis(20);

/// How long a container runs that was frozen at a bad moment. A child that was vforked executes its program within a
/// millisecond, unless it has to wait for a processor.
const SHORTEST_MOMENT: Duration = Duration::from_millis(1);
const LONGEST_MOMENT: Duration = Duration::from_millis(20);

/// How often it is given one, 4 s in all. A shell that does nothing but start programs is in the middle of it nine times
/// out of ten on a busy machine.
pub(crate) const MOMENTS: u32 = 200;

pub(crate) fn freeze_at_rest(cgroup: &Cgroup, mut is_frozen: bool, moments: u32) -> Result<(), CgroupError> {
    let mut moment = SHORTEST_MOMENT;
    let mut tries = 0;
    loop {
        if !is_frozen {
            match freeze(cgroup) {
                // The user has put this process into the container's cgroup. CRIU stops the others by itself.
                Err(CgroupError::Own { .. }) => return Ok(()),
                frozen => frozen?,
            }
        }
        let Some(pid) = vfork::waiting_in_frozen(&cgroup.pids()?) else { return Ok(()) };
        if tries == moments {
            return Err(CgroupError::Vfork { pid });
        }
        tracing::debug!(%pid, "a process is in the middle of a vfork, and is given another moment");
        thaw(cgroup)?;
        is_frozen = false;
        std::thread::sleep(moment);
        moment = (moment * 3 / 2).min(LONGEST_MOMENT);
        tries += 1;
    }
}

pub(crate) fn freeze(cgroup: &Cgroup) -> Result<(), CgroupError> {
    freeze_within(cgroup, DEADLINE)
}

pub(crate) fn freeze_within(cgroup: &Cgroup, limit: Duration) -> Result<(), CgroupError> {
    let directory = cgroup.directory();
    process::refuse_own(directory, &process::pids(directory)?)?;
    let frozen = match &cgroup.hierarchy {
        Hierarchy::V1(directories) => match directories.get("freezer") {
            Some(freezer) => freeze_v1(freezer, limit)?,
            None => false,
        },
        Hierarchy::V2(directory) => freeze_v2(directory, limit)?,
    };
    if frozen {
        return Ok(());
    }
    thaw(cgroup)?;
    Err(match uninterruptible(&process::pids(directory)?) {
        Some(wait) => CgroupError::Uninterruptible { wait: Box::new(wait), path: directory.to_owned() },
        None => CgroupError::Unfinished { action: "freeze", path: directory.to_owned() },
    })
}

/// Returns the first thread of these processes, which are thawed, that stays in an uninterruptible wait: no freezer stops
/// that thread. A wait for a disk is over at the second look, and so is the freeze on version 1, which shows as such a wait.
fn uninterruptible(pids: &[HostPid]) -> Option<Wait> {
    let waits = |pid: HostPid, tid: i32| Stat::of_thread(pid, tid).is_ok_and(|stat| stat.state() == b'D');
    let all = pids.iter().flat_map(|pid| proc::tids(*pid).unwrap_or_default().into_iter().map(move |tid| (*pid, tid)));
    std::thread::sleep(SECOND_LOOK);
    let waiting: Vec<(HostPid, i32)> = all.filter(|(pid, tid)| waits(*pid, *tid)).collect();
    std::thread::sleep(SECOND_LOOK);
    waiting.into_iter().map(|(pid, tid)| Wait::of(pid, tid)).find(Wait::is_uninterruptible)
}

fn freeze_v1(freezer: &Path, limit: Duration) -> Result<bool, CgroupError> {
    let state = freezer.join("freezer.state");
    let deadline = Instant::now() + limit;
    let mut asked = 0_u32;
    loop {
        if asked.is_multiple_of(ASK_AGAIN) {
            if asked > 0 {
                file::unless_gone(file::write(&state, "THAWED"))?;
            }
            file::unless_gone(file::write(&state, "FROZEN"))?;
        }
        match file::text(&state)? {
            Some(text) if text.trim() != "FROZEN" => {}
            // A cgroup that is gone has nothing that moves.
            Some(_) | None => return Ok(true),
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        asked += 1;
        std::thread::sleep(PAUSE);
    }
}

fn freeze_v2(directory: &Path, limit: Duration) -> Result<bool, CgroupError> {
    file::unless_gone(file::write(&directory.join("cgroup.freeze"), "1"))?;
    let events = directory.join("cgroup.events");
    let deadline = Instant::now() + limit;
    loop {
        let events = file::pairs(&events)?;
        if !events.is_present() || events.get("frozen") == 1 {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(PAUSE);
    }
}

pub(crate) fn is_frozen(cgroup: &Cgroup) -> Result<bool, CgroupError> {
    match &cgroup.hierarchy {
        Hierarchy::V1(directories) => match directories.get("freezer") {
            // Its own state: what its parent's makes of it, nobody here can undo.
            Some(freezer) => Ok(file::number(&freezer.join("freezer.self_freezing"), 0)? == 1),
            None => Ok(false),
        },
        Hierarchy::V2(directory) => Ok(file::number(&directory.join("cgroup.freeze"), 0)? == 1),
    }
}

/// Returns whether a process in this directory is frozen or about to be: by this cgroup's freezer, or one above it.
pub(crate) fn stands_still(directory: &Path) -> Result<bool, CgroupError> {
    // On v1 the state is what all above make of it. On v2 each has its own, and the last one is the mount.
    let above = directory.ancestors().take_while(|above| above.join("cgroup.procs").exists());
    for file in above.map(|above| above.join("cgroup.freeze")).chain([directory.join("freezer.state")]) {
        if file::text(&file)?.is_some_and(|state| !matches!(state.trim(), "0" | "THAWED")) {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(crate) fn thaw(cgroup: &Cgroup) -> Result<(), CgroupError> {
    match &cgroup.hierarchy {
        Hierarchy::V1(directories) => match directories.get("freezer") {
            Some(freezer) => file::unless_gone(file::write(&freezer.join("freezer.state"), "THAWED")),
            None => Ok(()),
        },
        Hierarchy::V2(directory) => file::unless_gone(file::write(&directory.join("cgroup.freeze"), "0")),
    }
}

/// Thaws it and, on v1, all cgroups below it, of which the container may have frozen some itself.
pub(crate) fn thaw_all(cgroup: &Cgroup) -> Result<(), CgroupError> {
    thaw(cgroup)?;
    if let Hierarchy::V1(directories) = &cgroup.hierarchy
        && let Some(freezer) = directories.get("freezer")
    {
        for below in process::subtree(freezer)? {
            file::unless_gone(file::write(&below.join("freezer.state"), "THAWED"))?;
        }
    }
    Ok(())
}
