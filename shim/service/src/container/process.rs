//! Processes of a container, init and execs, and the stages of a process's life.

use std::fmt;
use std::time::Instant;

use oci_spec::runtime::Process as ProcessSpec;
use reaper::{Child, Exit};
use tokio::sync::watch;

use crate::stdio::{Copies, Stdio};

/// Id of an exec, unique in its container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ExecId(String);

impl ExecId {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<ExecId> for String {
    fn from(exec: ExecId) -> Self {
        exec.0
    }
}

/// A process of a container, as requests name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ProcessRef {
    Init,
    Exec(ExecId),
}

impl ProcessRef {
    /// Parses the `exec_id` of a request; empty means init.
    pub(crate) fn of(exec_id: &str) -> Self {
        if exec_id.is_empty() { Self::Init } else { Self::Exec(ExecId(exec_id.to_owned())) }
    }

    /// Returns the process's name in messages about `container`.
    pub(crate) fn name(&self, container: &str) -> String {
        match self {
            Self::Init => format!("container {container}"),
            Self::Exec(ExecId(exec)) => format!("exec {exec} of container {container}"),
        }
    }
}

/// State of a process, as clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// Stages of a process's life.
///
/// ```text
///   Created ◄──failed── Starting ──► Running ◄──► Paused (init only)
///      └───────────────────┴────────────┴────────────┴──► Ending ──► Stopped
/// ```
#[derive(Debug)]
enum Life {
    Created,
    /// The runtime is starting the process. An end in this stage is published after the start.
    Starting {
        ended: Option<Exit>,
    },
    Running,
    Paused {
        since: Instant,
    },
    /// The process has ended, unpublished so far: clients still see the stage `shown`.
    Ending {
        exit: Exit,
        shown: Status,
    },
    Stopped,
}

/// A process of a container.
pub(crate) struct Process {
    life: Life,
    pub(crate) stdio: Stdio,
    /// `None` for an exec before the start, and for an init before the restore.
    pub(super) child: Option<Child>,
    pub(super) copies: Option<Copies>,
    /// Program of an exec.
    spec: Option<ProcessSpec>,
    /// End of the process, once published.
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// Returns an init, already made or still to be restored.
    pub(super) fn init(stdio: Stdio, child: Option<Child>, copies: Option<Copies>) -> Self {
        Self { life: Life::Created, stdio, child, copies, spec: None, exit: watch::Sender::new(None) }
    }

    /// Returns an exec before its start.
    pub(super) fn exec(stdio: Stdio, spec: ProcessSpec) -> Self {
        Self { spec: Some(spec), ..Self::init(stdio, None, None) }
    }

    /// Returns the pid in containerd's type, 0 for none.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, |child| child.pid().unsigned_abs())
    }

    pub(crate) fn status(&self) -> Status {
        match self.life {
            Life::Created | Life::Starting { .. } => Status::Created,
            Life::Running => Status::Running,
            Life::Paused { .. } => Status::Paused,
            Life::Ending { shown, .. } => shown,
            Life::Stopped => Status::Stopped,
        }
    }

    /// Returns the same as [`Self::status`], except that an unpublished end counts.
    pub(super) fn true_status(&self) -> Status {
        match self.life {
            Life::Ending { .. } | Life::Starting { ended: Some(_) } => Status::Stopped,
            _ => self.status(),
        }
    }

    /// Returns the process's end, once published.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    pub(super) fn watch_exit(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// Returns true from the start until the end is published.
    pub(super) fn is_alive(&self) -> bool {
        !matches!(self.life, Life::Created | Life::Stopped)
    }

    /// Returns the time of the pause, while paused.
    pub(super) fn paused_since(&self) -> Option<Instant> {
        match self.life {
            Life::Paused { since } => Some(since),
            _ => None,
        }
    }

    /// Returns the program of an exec before its start.
    pub(super) fn program(&self) -> Option<ProcessSpec> {
        self.spec.clone().filter(|_| matches!(self.life, Life::Created))
    }

    /// Begins the start.
    pub(super) fn starting(&mut self) {
        self.life = Life::Starting { ended: None };
    }

    /// Ends the start.
    pub(super) fn started(&mut self) {
        self.life = match self.life {
            Life::Starting { ended: Some(exit) } => Life::Ending { exit, shown: Status::Running },
            _ => Life::Running,
        };
    }

    /// Ends a failed start.
    pub(super) fn not_started(&mut self) {
        self.life = match self.life {
            Life::Starting { ended: Some(exit) } => Life::Ending { exit, shown: Status::Created },
            _ => Life::Created,
        };
    }

    /// Marks the process paused, unless the process has ended meanwhile.
    pub(super) fn paused(&mut self) {
        match &mut self.life {
            Life::Running => self.life = Life::Paused { since: Instant::now() },
            Life::Ending { shown, .. } => *shown = Status::Paused,
            _ => {}
        }
    }

    /// Marks the process resumed, unless the process has ended meanwhile.
    pub(super) fn resumed(&mut self) {
        match &mut self.life {
            Life::Paused { .. } => self.life = Life::Running,
            Life::Ending { shown, .. } => *shown = Status::Running,
            _ => {}
        }
    }

    /// Records the end, for [`Self::tell_end`] to publish.
    pub(super) fn ended(&mut self, exit: Exit) {
        match &mut self.life {
            Life::Starting { ended } => *ended = Some(exit),
            Life::Stopped => {}
            _ => self.life = Life::Ending { exit, shown: self.status() },
        }
    }

    /// Publishes a recorded end; returns the end the first time.
    pub(super) fn tell_end(&mut self) -> Option<Exit> {
        let Life::Ending { exit, .. } = self.life else { return None };
        self.life = Life::Stopped;
        self.exit.send_replace(Some(exit));
        Some(exit)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn init() -> Process {
        Process::init(Stdio::default(), None, None)
    }

    fn exit() -> Exit {
        Exit { code: 3, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn an_end_during_the_start_is_told_after_it() {
        let mut process = init();
        process.starting();
        process.ended(exit());
        assert_eq!((process.status(), process.true_status()), (Status::Created, Status::Stopped));
        assert_eq!(process.tell_end(), None);
        process.started();
        assert_eq!(process.status(), Status::Running);
        assert_eq!(process.tell_end(), Some(exit()));
        assert_eq!((process.status(), process.exit()), (Status::Stopped, Some(exit())));
        assert_eq!(process.tell_end(), None, "once");
    }

    #[test]
    fn an_end_is_final_whatever_the_runtime_does() {
        let mut process = init();
        process.starting();
        process.started();
        process.ended(exit());
        process.paused();
        assert_eq!((process.status(), process.true_status()), (Status::Paused, Status::Stopped));
        process.resumed();
        process.tell_end();
        process.paused();
        process.ended(exit());
        assert_eq!(process.status(), Status::Stopped);
    }

    #[test]
    fn a_failed_start_can_be_repeated() {
        let mut process = init();
        process.starting();
        process.not_started();
        assert_eq!(process.status(), Status::Created);
        assert!(!process.is_alive());
    }

    #[test]
    fn requests_name_init_by_nothing() {
        assert_eq!(ProcessRef::of(""), ProcessRef::Init);
        assert_eq!(ProcessRef::of("").name("c"), "container c");
        assert_eq!(ProcessRef::of("e").name("c"), "exec e of container c");
    }
}
