//! Holding the processes of a cgroup still.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::{Cgroup, CgroupError, Hierarchy, file, process};

/// How long freezing may take. It takes the kernel less than a millisecond, but a process in an uninterruptible wait,
/// for a dead network file system say, is frozen only when that ends.
const DEADLINE: Duration = Duration::from_millis(500);

/// How long to wait before asking the kernel again.
const PAUSE: Duration = Duration::from_millis(1);

/// The v1 freezer can miss a process that is born while it freezes, and then waits for it for ever; asking it again
/// helps. runc and the kernel's own tests do the same.
const ASK_AGAIN: u32 = 20;

pub(crate) fn freeze(cgroup: &Cgroup) -> Result<(), CgroupError> {
    let directory = cgroup.directory();
    process::refuse_own(directory, &process::pids(directory)?)?;
    let frozen = match &cgroup.hierarchy {
        Hierarchy::V1(directories) => match directories.get("freezer") {
            Some(freezer) => freeze_v1(freezer)?,
            None => false,
        },
        Hierarchy::V2(directory) => freeze_v2(directory)?,
    };
    if frozen {
        return Ok(());
    }
    thaw(cgroup)?;
    Err(CgroupError::Unfinished { action: "freeze", path: directory.to_owned() })
}

fn freeze_v1(freezer: &Path) -> Result<bool, CgroupError> {
    let state = freezer.join("freezer.state");
    let deadline = Instant::now() + DEADLINE;
    let mut asked = 0_u32;
    loop {
        if asked.is_multiple_of(ASK_AGAIN) {
            if asked > 0 {
                unless_gone(file::write(&state, "THAWED"))?;
            }
            unless_gone(file::write(&state, "FROZEN"))?;
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

fn freeze_v2(directory: &Path) -> Result<bool, CgroupError> {
    unless_gone(file::write(&directory.join("cgroup.freeze"), "1"))?;
    let events = directory.join("cgroup.events");
    let deadline = Instant::now() + DEADLINE;
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

pub(crate) fn thaw(cgroup: &Cgroup) -> Result<(), CgroupError> {
    match &cgroup.hierarchy {
        Hierarchy::V1(directories) => match directories.get("freezer") {
            Some(freezer) => unless_gone(file::write(&freezer.join("freezer.state"), "THAWED")),
            None => Ok(()),
        },
        Hierarchy::V2(directory) => unless_gone(file::write(&directory.join("cgroup.freeze"), "0")),
    }
}

/// Thaws it and, on v1, all cgroups below it, of which the container may have frozen some itself.
pub(crate) fn thaw_all(cgroup: &Cgroup) -> Result<(), CgroupError> {
    thaw(cgroup)?;
    if let Hierarchy::V1(directories) = &cgroup.hierarchy
        && let Some(freezer) = directories.get("freezer")
    {
        for below in process::subtree(freezer)? {
            unless_gone(file::write(&below.join("freezer.state"), "THAWED"))?;
        }
    }
    Ok(())
}

fn unless_gone(result: Result<(), CgroupError>) -> Result<(), CgroupError> {
    match result {
        Err(CgroupError::File { source, .. }) if file::is_gone(&source) => Ok(()),
        other => other,
    }
}
