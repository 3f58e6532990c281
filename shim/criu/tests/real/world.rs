//! Common means of the sentences: targets to dump, and callbacks that misbehave at a stage.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use criu::{BoxError, Criu, DumpRequest, NotifyDump, NotifyRestore, RestoreRequest, Stage};
use libtest_mimic::{Completion, Trial};
use reaper::{Child, Reaper};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::target::{TARGET, UNIX_SOCKET};

type Running = Pin<Box<dyn Future<Output = ()>>>;

/// A test and a name.
pub(crate) struct Sentence {
    name: String,
    run: Box<dyn FnOnce(World) -> Running + Send>,
}

/// Makes a sentence, named like an async function.
macro_rules! sentence {
    ($function:ident) => {
        $crate::world::Sentence::new(stringify!($function).replace('_', " "), |world| Box::pin($function(world)))
    };
}
pub(crate) use sentence;

impl Sentence {
    pub(crate) fn new(name: String, run: impl FnOnce(World) -> Running + Send + 'static) -> Self {
        Self { name, run: Box::new(run) }
    }

    pub(crate) fn trial(self) -> Trial {
        let run = self.run;
        Trial::ignorable_test(self.name, move || {
            if let Some(reason) = unfit() {
                return Ok(Completion::ignored_with(reason));
            }
            let _cleaner = Cleaner;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let sentence = async {
                let world = World::new();
                let folder = world.folder.path().to_owned();
                // A hang is a failure with a name.
                tokio::time::timeout(Duration::from_secs(300), run(world)).await.expect("it hangs");
                let left = children();
                assert!(left.is_empty(), "it left processes: {left:?}");
                assert!(!folder.exists(), "it left its folder");
            };
            runtime.block_on(sentence);
            Ok(Completion::Completed)
        })
    }
}

/// Kills the leftovers of a failed sentence: the next one must not fail for the same reason.
struct Cleaner;

impl Drop for Cleaner {
    fn drop(&mut self) {
        while let Some(pid) = children().into_iter().find_map(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        }
    }
}

fn unfit() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    let found = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|directory| directory.join(program).exists())
    };
    ["criu", "setsid", "unshare"]
        .into_iter()
        .find(|program| !found(program))
        .map(|program| format!("needs {program}, as in the test bed"))
}

/// Surroundings of one test.
pub(crate) struct World {
    pub(crate) reaper: Reaper,
    pub(crate) criu: Criu,
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        rustix::process::set_child_subreaper(Pid::from_raw(1)).unwrap();
        let reaper = Reaper::start().unwrap();
        // On a tmpfs, so that images cost no disk.
        let folder = tempfile::Builder::new().prefix("criu-real-").tempdir_in("/run").unwrap();
        Self { criu: Criu::new(reaper.clone()), reaper, folder }
    }

    /// Returns an existing folder of this name.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts a target in a new session, with `things`.
    pub(crate) async fn target(&self, things: &[&str]) -> Target {
        let mut command = self.command(&["setsid"], things);
        self.started(&mut command).await
    }

    pub(crate) fn command(&self, prefix: &[&str], things: &[&str]) -> Command {
        let mut command = Command::new(prefix[0]);
        command
            .args(&prefix[1..])
            .arg(std::env::current_exe().unwrap())
            .arg(TARGET)
            .arg(self.path("count"))
            .args(things)
            .env(UNIX_SOCKET, self.path("socket"))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    pub(crate) async fn started(&self, command: &mut Command) -> Target {
        let child = self.reaper.spawn(command).unwrap();
        let target = Target { child, count: self.path("count") };
        target.runs().await;
        target
    }

    pub(crate) fn dump_request(&self, target: &Target) -> DumpRequest {
        DumpRequest {
            pid: target.child.pid(),
            images_dir: self.folder("images"),
            work_dir: Some(self.folder("work")),
            ..DumpRequest::default()
        }
    }

    pub(crate) fn restore_request(&self) -> RestoreRequest {
        RestoreRequest {
            images_dir: self.folder("images"),
            work_dir: Some(self.folder("work")),
            ..RestoreRequest::default()
        }
    }

    /// Dumps and ends a target; returns its count.
    pub(crate) async fn dumped(&self, things: &[&str]) -> u64 {
        let target = self.target(things).await;
        self.criu.dump(self.dump_request(&target), &mut ()).await.unwrap();
        target.child.wait().await;
        target.count()
    }

    pub(crate) async fn restored(&self) -> Target {
        let restored = self.criu.restore(self.restore_request(), &mut ()).await.unwrap();
        Target::of(restored.root, self)
    }

    /// Checks that no image file is left, and no criu runs.
    pub(crate) async fn is_clean(&self, images: &Path) {
        until("criu to end", || criu_pids().is_empty()).await;
        let left = || names(images).into_iter().filter(|name| name.ends_with(".img")).collect::<Vec<_>>();
        until("images to be removed", || left().is_empty()).await;
    }
}

/// A process that counts.
pub(crate) struct Target {
    pub(crate) child: Child,
    count: PathBuf,
}

impl Target {
    pub(crate) fn of(child: Child, world: &World) -> Self {
        Self { child, count: world.path("count") }
    }

    pub(crate) fn count(&self) -> u64 {
        std::fs::read_to_string(&self.count).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// Waits until the target has counted on.
    pub(crate) async fn runs(&self) {
        let before = self.count();
        until("the target to count", || {
            assert!(self.child.exit().is_none(), "the target has ended: {:?}", self.child.exit());
            self.count() > before
        })
        .await;
    }

    pub(crate) async fn kill(self) {
        let family: Vec<i32> = children_of(self.child.pid());
        self.child.signal(Signal::KILL).unwrap();
        self.child.wait().await;
        for pid in family {
            // The process may have followed already.
            let _ = rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
        until("the target's children to end", || children().is_empty()).await;
    }
}

/// Polls for an effect of another process.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let polling = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), polling).await.unwrap_or_else(|_| panic!("waited for {what}"));
}

pub(crate) fn children() -> Vec<i32> {
    children_of(i32::try_from(std::process::id()).unwrap())
}

pub(crate) fn children_of(pid: i32) -> Vec<i32> {
    let mut children = vec![];
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let list = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        children.extend(list.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    }
    children
}

/// Returns children of this process with criu's program.
pub(crate) fn criu_pids() -> Vec<i32> {
    let runs_criu = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("criu"));
    children().into_iter().filter(runs_criu).collect()
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Misbehaviour of a callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Does {
    /// Fails.
    Fail,
    /// Kills criu and succeeds.
    KillCriu,
    /// Never returns.
    Hang,
}

/// Callbacks with a record of calls, and misbehaviour at one stage.
pub(crate) struct Saboteur {
    at: Option<(Stage, Does)>,
    pub(crate) seen: Vec<Stage>,
    /// Notified at a hang.
    pub(crate) hangs: Arc<tokio::sync::Notify>,
    criu: Option<Child>,
    pub(crate) terminal: Option<OwnedFd>,
}

impl Saboteur {
    pub(crate) fn none() -> Self {
        Self { at: None, seen: vec![], hangs: Arc::default(), criu: None, terminal: None }
    }

    pub(crate) fn at(stage: Stage, does: Does) -> Self {
        Self { at: Some((stage, does)), ..Self::none() }
    }

    async fn reach(&mut self, stage: Stage) -> Result<(), BoxError> {
        self.seen.push(stage.clone());
        match &self.at {
            Some((at, does)) if *at == stage => match does {
                Does::Fail => Err("sabotage".into()),
                Does::KillCriu => {
                    match &self.criu {
                        Some(criu) => criu.signal(Signal::KILL).unwrap(),
                        None => {
                            for pid in criu_pids() {
                                rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
                            }
                        }
                    }
                    Ok(())
                }
                Does::Hang => {
                    self.hangs.notify_one();
                    std::future::pending().await
                }
            },
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl NotifyDump for Saboteur {
    async fn pre_dump(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::PreDump).await
    }

    async fn network_lock(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::NetworkLock).await
    }

    async fn query_external_files(&mut self) -> Result<Vec<String>, BoxError> {
        self.reach(Stage::QueryExternalFiles).await?;
        Ok(vec![])
    }

    async fn post_dump(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::PostDump).await
    }

    async fn network_unlock(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::NetworkUnlock).await
    }
}

#[async_trait]
impl NotifyRestore for Saboteur {
    async fn started(&mut self, criu: &Child) -> Result<(), BoxError> {
        self.criu = Some(criu.clone());
        Ok(())
    }

    async fn pre_restore(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::PreRestore).await
    }

    async fn setup_namespaces(&mut self, _: &Child) -> Result<(), BoxError> {
        self.reach(Stage::SetupNamespaces).await
    }

    async fn post_setup_namespaces(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::PostSetupNamespaces).await
    }

    async fn orphan_pts_master(&mut self, master: OwnedFd) -> Result<(), BoxError> {
        self.terminal = Some(master);
        self.reach(Stage::OrphanPtsMaster).await
    }

    async fn post_restore(&mut self, root: &Child) -> Result<(), BoxError> {
        assert!(root.exit().is_none(), "the root is watched and alive");
        self.reach(Stage::PostRestore).await
    }

    async fn network_unlock(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::NetworkUnlock).await
    }

    async fn pre_resume(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::PreResume).await
    }

    async fn post_resume(&mut self) -> Result<(), BoxError> {
        self.reach(Stage::PostResume).await
    }
}
