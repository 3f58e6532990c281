//! The Task service over a fake runtime, whose container processes are plain shells.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio as ProcessStdio};
use std::sync::{Arc, Mutex, OnceLock};

use async_trait::async_trait;
use containerd_shim::{ExitSignal, Task, TtrpcContext};
use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StateRequest, StatsRequest, Status as ApiStatus, WaitRequest,
};
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::ttrpc::{self, Code};
use oci_spec::runtime::{Features, LinuxResources};
use reaper::{Child, Reaper};
use runtime::{
    CheckpointRequest, CreateRequest, ExecRequest, OciRuntime, Operation, Prepare, ProcessIo, RestoreRequest,
    RuntimeError,
};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use session::NodeStore;

use super::Context;
use crate::events::Events;
use crate::stdio;
use crate::task::TaskService;

mod execs;
mod requests;
mod sessions;

/// A runtime with `sh -c SCRIPT` as containers, held before the script until their start.
struct FakeRuntime {
    reaper: Reaper,
    script: &'static str,
    /// Permits for operations; a test takes permits away to hold operations up.
    may_go_on: Semaphore,
    /// Permits for starts of [`HANGING`] execs.
    execs: Semaphore,
    fail: Mutex<Option<Operation>>,
    init: Mutex<Option<(Child, std::io::PipeWriter)>>,
    deletes: Mutex<usize>,
}

impl std::fmt::Debug for FakeRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeRuntime")
    }
}

impl FakeRuntime {
    async fn step(&self, operation: Operation) -> Result<(), RuntimeError> {
        self.may_go_on.acquire().await.unwrap().forget();
        if *self.fail.lock().unwrap() == Some(operation) {
            return Err(RuntimeError::Refused {
                runtime: "fake".into(),
                operation,
                container: "c".into(),
                message: "as told".into(),
            });
        }
        Ok(())
    }

    /// Runs `script`, with `other` as standard input, or else the one in `io`.
    fn spawn(&self, script: &str, other: Option<OwnedFd>, io: ProcessIo) -> Child {
        let ProcessIo::Fds { stdin, stdout, stderr } = io else { panic!("no terminals here") };
        let mut command = Command::new("/bin/sh");
        let stdin = ProcessStdio::from(other.unwrap_or(stdin));
        command.args(["-c", script]).stdin(stdin).stdout(stdout).stderr(stderr);
        self.reaper.spawn(&mut command).unwrap()
    }
}

#[async_trait]
impl OciRuntime for FakeRuntime {
    async fn create(&self, request: CreateRequest) -> Result<Child, RuntimeError> {
        assert_ne!(self.script, PANIC);
        self.step(Operation::Create).await?;
        let (hold, release) = std::io::pipe().unwrap();
        let child = self.spawn(&format!("read _ || exit 99; {}", self.script), Some(hold.into()), request.io);
        *self.init.lock().unwrap() = Some((child.clone(), release));
        Ok(child)
    }

    async fn start(&self, _id: &str) -> Result<(), RuntimeError> {
        // The process runs before the answer is sent, as with a real runtime.
        self.init.lock().unwrap().as_mut().unwrap().1.write_all(b"\n").unwrap();
        self.step(Operation::Start).await
    }

    async fn exec(&self, request: ExecRequest) -> Result<Child, RuntimeError> {
        self.step(Operation::Exec).await?;
        let script = request.process.args().clone().unwrap().join(" ");
        if script == HANGING {
            self.execs.acquire().await.unwrap().forget();
        }
        Ok(self.spawn(&script, None, request.io))
    }

    async fn pause(&self, _id: &str) -> Result<(), RuntimeError> {
        self.step(Operation::Pause).await
    }

    async fn resume(&self, _id: &str) -> Result<(), RuntimeError> {
        self.step(Operation::Resume).await
    }

    async fn update(&self, _id: &str, _resources: &LinuxResources) -> Result<(), RuntimeError> {
        self.step(Operation::Update).await
    }

    async fn delete(&self, _id: &str) -> Result<(), RuntimeError> {
        self.step(Operation::Delete).await?;
        *self.deletes.lock().unwrap() += 1;
        if let Some((init, _)) = self.init.lock().unwrap().take() {
            init.signal(Signal::KILL).ok();
        }
        Ok(())
    }

    async fn checkpoint(&self, _: CheckpointRequest) -> Result<(), RuntimeError> {
        self.step(Operation::Checkpoint).await
    }

    async fn restore(&self, _: RestoreRequest) -> Result<Child, RuntimeError> {
        panic!("a session restores")
    }

    fn drives_criu(&self) -> bool {
        false
    }

    async fn features(&self) -> Result<Features, RuntimeError> {
        Ok(Features::default())
    }
}

/// A service with a fake runtime, one bundle, and a record of events.
struct Bench {
    service: Arc<TaskService>,
    runtime: Arc<FakeRuntime>,
    exit: Arc<ExitSignal>,
    events: mpsc::UnboundedReceiver<Envelope>,
    bundle: TempDir,
    _logs: TempDir,
}

const PLENTY: usize = 1000;
/// Script with a panic in its creation.
const PANIC: &str = "panic";
/// Script of an exec, with a start that waits for a permit.
const HANGING: &str = ": hanging";

/// The reaper for all tests of this process: two would take each other's children for orphans.
pub(crate) fn reaper() -> Reaper {
    static REAPER: OnceLock<Reaper> = OnceLock::new();
    let start = || {
        let (started, reaper) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio.block_on(async {
                started.send(Reaper::start().unwrap()).unwrap();
                std::future::pending::<()>().await;
            });
        });
        reaper.recv().unwrap()
    };
    REAPER.get_or_init(start).clone()
}

impl Bench {
    async fn new(script: &'static str) -> Self {
        let reaper = reaper();
        let (publisher, events) = Events::for_test();
        let runtime = Arc::new(FakeRuntime {
            reaper: reaper.clone(),
            script,
            may_go_on: Semaphore::new(PLENTY),
            execs: Semaphore::new(0),
            fail: Mutex::default(),
            init: Mutex::default(),
            deletes: Mutex::default(),
        });
        let fake = Arc::clone(&runtime);
        let (bundle, logs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        // Its own pid namespace: without one the shim would kill this test's whole cgroup.
        let config = r#"{"ociVersion":"1.2.0","linux":{"namespaces":[{"type":"pid"}]}}"#;
        std::fs::write(bundle.path().join("config.json"), config).unwrap();
        let context = Context {
            namespace: "test".into(),
            bundle: bundle.path().to_owned(),
            logs: logs.path().to_owned(),
            store: NodeStore { root: logs.path().join("store"), quota: None, registry: None },
            reaper,
            prepare: Prepare::Nothing,
            events: publisher,
            conductor: Arc::new(sessions::FakeConductor(Arc::clone(&runtime))),
            runtime_of: Arc::new(move |_, _| Arc::clone(&fake) as Arc<dyn OciRuntime>),
        };
        let exit = Arc::new(ExitSignal::default());
        let service = Arc::new(TaskService::new(context, Arc::clone(&exit)));
        Self { service, runtime, exit, events, bundle, _logs: logs }
    }

    /// Returns a bench with a created container.
    async fn created(script: &'static str) -> Self {
        let bench = Self::new(script).await;
        bench.create().await.unwrap();
        bench
    }

    /// Returns a bench with a started container.
    async fn started(script: &'static str) -> Self {
        let bench = Self::created(script).await;
        bench.start("").await.unwrap();
        bench
    }

    /// Begins a start that lasts until `let_go`.
    async fn held_start(&self, exec_id: &str) -> JoinHandle<ttrpc::Result<()>> {
        self.hold().await;
        let service = Arc::clone(&self.service);
        let request = StartRequest { id: "c".into(), exec_id: exec_id.into(), ..StartRequest::default() };
        let start = tokio::spawn(async move { service.start(&ctx(), request).await.map(drop) });
        tokio::task::yield_now().await;
        // By the time of this answer the start has begun.
        self.status().await;
        start
    }

    /// Begins the start of an exec that hangs until the runtime has a permit.
    async fn hanging_exec(&self, exec_id: &str) -> JoinHandle<ttrpc::Result<()>> {
        self.add_exec(exec_id, HANGING).await.unwrap();
        let service = Arc::clone(&self.service);
        let request = StartRequest { id: "c".into(), exec_id: exec_id.into(), ..StartRequest::default() };
        let start = tokio::spawn(async move { service.start(&ctx(), request).await.map(drop) });
        tokio::task::yield_now().await;
        // By the time of this answer the start has begun.
        self.status().await;
        start
    }

    async fn stats(&self) -> ttrpc::Result<()> {
        self.service.stats(&ctx(), StatsRequest { id: "c".into(), ..StatsRequest::default() }).await.map(drop)
    }

    /// Holds the runtime's next operations up, until `let_go`.
    async fn hold(&self) {
        let permits = u32::try_from(self.runtime.may_go_on.available_permits()).unwrap();
        self.runtime.may_go_on.acquire_many(permits).await.unwrap().forget();
    }

    fn let_go(&self) {
        self.runtime.may_go_on.add_permits(PLENTY);
    }

    fn fail(&self, operation: Operation) {
        *self.runtime.fail.lock().unwrap() = Some(operation);
    }

    async fn create(&self) -> ttrpc::Result<()> {
        self.create_in(self.bundle.path()).await
    }

    async fn create_in(&self, bundle: &Path) -> ttrpc::Result<()> {
        self.service.create(&ctx(), create_request(bundle)).await.map(drop)
    }

    async fn start(&self, exec_id: &str) -> ttrpc::Result<()> {
        let request = StartRequest { id: "c".into(), exec_id: exec_id.into(), ..StartRequest::default() };
        self.service.start(&ctx(), request).await.map(drop)
    }

    async fn add_exec(&self, exec_id: &str, script: &str) -> ttrpc::Result<()> {
        self.add_exec_with_input(exec_id, script, "").await
    }

    /// Adds an exec with a fifo, or nothing, as `stdin`.
    async fn add_exec_with_input(&self, exec_id: &str, script: &str, stdin: &str) -> ttrpc::Result<()> {
        let spec = serde_json::json!({"args": [script], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        let spec = Any { value: spec.to_string().into_bytes(), ..Any::default() };
        let request = ExecProcessRequest {
            id: "c".into(),
            exec_id: exec_id.into(),
            stdin: stdin.into(),
            spec: Some(spec).into(),
            ..ExecProcessRequest::default()
        };
        self.service.exec(&ctx(), request).await.map(drop)
    }

    async fn exec(&self, exec_id: &str, script: &str) -> ttrpc::Result<()> {
        self.add_exec(exec_id, script).await?;
        self.start(exec_id).await
    }

    async fn status(&self) -> ApiStatus {
        let request = StateRequest { id: "c".into(), ..StateRequest::default() };
        self.service.state(&ctx(), request).await.unwrap().status.unwrap()
    }

    async fn wait(&self, exec_id: &str) -> u32 {
        let request = WaitRequest { id: "c".into(), exec_id: exec_id.into(), ..WaitRequest::default() };
        self.service.wait(&ctx(), request).await.unwrap().exit_status
    }

    async fn kill(&self, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest { id: "c".into(), exec_id: exec_id.into(), signal, ..KillRequest::default() };
        self.service.kill(&ctx(), request).await.map(drop)
    }

    async fn close_stdin(&self, exec_id: &str) {
        let request =
            CloseIORequest { id: "c".into(), exec_id: exec_id.into(), stdin: true, ..CloseIORequest::default() };
        self.service.close_io(&ctx(), request).await.unwrap();
    }

    async fn pause(&self) -> ttrpc::Result<()> {
        self.service.pause(&ctx(), PauseRequest { id: "c".into(), ..PauseRequest::default() }).await.map(drop)
    }

    async fn resume(&self) -> ttrpc::Result<()> {
        self.service.resume(&ctx(), ResumeRequest { id: "c".into(), ..ResumeRequest::default() }).await.map(drop)
    }

    async fn delete(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest { id: "c".into(), exec_id: exec_id.into(), ..DeleteRequest::default() };
        self.service.delete(&ctx(), request).await.map(|deleted| deleted.exit_status)
    }

    async fn shut_down(&self) {
        self.service.shutdown(&ctx(), ShutdownRequest::default()).await.unwrap();
    }

    /// Returns the topics published up to and including `last`; exits come with their process.
    async fn told(&mut self, last: &str) -> Vec<String> {
        let mut told = vec![];
        loop {
            let envelope = self.events.recv().await.unwrap();
            let topic = envelope.topic.trim_start_matches("/tasks/").to_owned();
            told.push(if topic == "exit" {
                format!("exit {}", TaskExit::parse_from_bytes(&envelope.event.value).unwrap().id)
            } else {
                topic
            });
            if told.last().is_some_and(|topic| topic == last) {
                return told;
            }
        }
    }
}

fn create_request(bundle: &Path) -> CreateTaskRequest {
    CreateTaskRequest { id: "c".into(), bundle: bundle.to_str().unwrap().into(), ..CreateTaskRequest::default() }
}

fn ctx() -> TtrpcContext {
    TtrpcContext::default()
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.code.enum_value().unwrap(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_life_is_told_in_order() {
    let mut bench = Bench::started("exit 42").await;
    assert_eq!(bench.wait("").await, 42);
    assert_eq!(bench.status().await, ApiStatus::STOPPED);
    assert_eq!(bench.delete("").await.unwrap(), 42);
    assert_eq!(bench.told("delete").await, ["create", "start", "exit c", "delete"]);
}

#[tokio::test]
async fn state_and_kill_are_answered_while_an_operation_takes_its_time() {
    let bench = Bench::started("sleep 1000").await;
    bench.hold().await;
    let service = Arc::clone(&bench.service);
    let pause =
        tokio::spawn(
            async move { service.pause(&ctx(), PauseRequest { id: "c".into(), ..PauseRequest::default() }).await },
        );
    tokio::task::yield_now().await;
    assert_eq!(bench.status().await, ApiStatus::RUNNING);
    bench.kill("", 9).await.unwrap();
    assert_eq!(bench.wait("").await, 137);
    assert!(!pause.is_finished());
    bench.let_go();
    pause.await.unwrap().unwrap();
    assert_eq!(bench.status().await, ApiStatus::STOPPED, "a pause that comes late does not revive it");
}

#[tokio::test]
async fn an_exit_before_start_returns_is_told_after_the_start() {
    let mut bench = Bench::created("exit 3").await;
    bench.hold().await;
    let service = Arc::clone(&bench.service);
    let start =
        tokio::spawn(
            async move { service.start(&ctx(), StartRequest { id: "c".into(), ..StartRequest::default() }).await },
        );
    let init = bench.runtime.init.lock().unwrap().as_ref().unwrap().0.clone();
    assert_eq!(init.wait().await.code, 3);
    assert_ne!(bench.status().await, ApiStatus::STOPPED);
    bench.let_go();
    start.await.unwrap().unwrap();
    assert_eq!(bench.told("exit c").await, ["create", "start", "exit c"]);
}

#[tokio::test]
async fn the_exit_of_init_is_the_last_word() {
    let mut bench = Bench::started("sleep 1000").await;
    bench.exec("e", "sleep 1000").await.unwrap();
    bench.kill("", 9).await.unwrap();
    // The fake has no pid namespace to end the exec with init.
    while bench.kill("", 0).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.status().await, ApiStatus::RUNNING, "init is not gone for clients while an exec runs");
    assert_eq!(code(bench.exec("f", "true").await), Code::FAILED_PRECONDITION);
    bench.kill("e", 15).await.unwrap();
    assert_eq!(bench.wait("").await, 137);
    assert_eq!(bench.told("exit c").await, ["create", "start", "exec-added", "exec-started", "exit e", "exit c"]);
}

#[tokio::test]
async fn a_failed_start_can_be_deleted() {
    let bench = Bench::created("sleep 1000").await;
    bench.fail(Operation::Start);
    bench.start("").await.unwrap_err();
    assert_eq!(bench.status().await, ApiStatus::CREATED);
    assert_eq!(bench.delete("").await.unwrap(), 137);
    assert_eq!(code(bench.delete("").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn what_does_not_fit_the_state_is_a_failed_precondition() {
    let bench = Bench::created("sleep 1000").await;
    assert_eq!(code(bench.pause().await), Code::FAILED_PRECONDITION, "pause before start");
    bench.start("").await.unwrap();
    assert_eq!(code(bench.start("").await), Code::FAILED_PRECONDITION, "start twice");
    assert_eq!(code(bench.delete("").await), Code::FAILED_PRECONDITION, "delete while running");
    assert_eq!(code(bench.resume().await), Code::FAILED_PRECONDITION, "resume without pause");
    bench.pause().await.unwrap();
    assert_eq!(bench.status().await, ApiStatus::PAUSED);
    assert_eq!(code(bench.exec("e", "true").await), Code::FAILED_PRECONDITION, "exec while paused");
    bench.resume().await.unwrap();
    bench.exec("e", "sleep 1000").await.unwrap();
    assert_eq!(code(bench.delete("e").await), Code::FAILED_PRECONDITION, "delete of a running exec");
}

#[tokio::test]
async fn missing_containers_are_not_found_and_existing_ones_cannot_be_made_again() {
    let bench = Bench::started("exit 0").await;
    assert_eq!(code(bench.create().await), Code::ALREADY_EXISTS);
    assert_eq!(code(bench.start("nope").await), Code::NOT_FOUND);
    bench.wait("").await;
    assert_eq!(code(bench.kill("", 15).await), Code::NOT_FOUND, "a signal to a dead process");
    let unknown = StateRequest { id: "other".into(), ..StateRequest::default() };
    assert_eq!(code(bench.service.state(&ctx(), unknown).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_missing_or_malformed_config_is_named() {
    let bench = Bench::new("exit 0").await;
    let empty = tempfile::tempdir().unwrap();
    assert!(bench.create_in(empty.path()).await.unwrap_err().to_string().contains("config.json"));
    std::fs::write(empty.path().join("config.json"), "{").unwrap();
    let error = bench.create_in(empty.path()).await.unwrap_err().to_string();
    assert!(error.contains("not a valid OCI runtime configuration"), "{error}");
}

#[tokio::test]
async fn the_shim_ends_with_its_last_container() {
    let bench = Bench::started("exit 0").await;
    bench.shut_down().await;
    bench.wait("").await;
    bench.delete("").await.unwrap();
    let ended = bench.exit.wait();
    tokio::pin!(ended);
    assert!(
        std::future::poll_fn(|cx| std::task::Poll::Ready(ended.as_mut().poll(cx).is_pending())).await,
        "it was told to shut down while a container was left"
    );
    bench.shut_down().await;
    ended.await;
}
