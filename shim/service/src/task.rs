//! containerd's Task service.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use checkpoint::CheckpointOptions;
use containerd_shim::TtrpcContext;
use containerd_shim::util::convert_to_any;
use containerd_shim::{ExitSignal, Task};
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status as ApiStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::ttrpc;
use runtime::Operation;
use session::Stop;
use tokio::sync::{Notify, oneshot};

use crate::container::{Actor, Container, Context, ProcessRef, Status, Target, create};
use crate::error::TaskError;
use crate::stdio::Stdio;
use crate::sys;
use crate::table::Table;

/// The Task service: finds the container of a request and forwards it to the actor.
pub(crate) struct TaskService {
    context: Context,
    exit: Arc<ExitSignal>,
    table: Table,
    started: Arc<Notify>,
}

/// Time after which a shim without containers assumes that nobody will send Shutdown.
const FORGOTTEN: Duration = Duration::from_secs(2);
/// Time after the last start at which the shim counts as idle.
const IDLE: Duration = Duration::from_secs(1);

/// Keeps an idle shim small: some time after the last start, its code leaves memory.
async fn shrink_when_idle(started: Arc<Notify>) {
    loop {
        started.notified().await;
        while tokio::time::timeout(IDLE, started.notified()).await.is_ok() {}
        if let Err(error) = sys::drop_code_pages() {
            tracing::debug!("the shim's code stays in memory: {error}");
        }
    }
}

impl TaskService {
    pub(crate) fn new(context: Context, exit: Arc<ExitSignal>) -> Self {
        let started = Arc::default();
        tokio::spawn(shrink_when_idle(Arc::clone(&started)));
        Self { context, exit, table: Table::default(), started }
    }

    async fn container(&self, id: &str) -> Result<Container, TaskError> {
        self.table.get(id).await
    }
}

/// Ends the shim if no container is left.
async fn end_if_empty(table: Table, exit: Arc<ExitSignal>) {
    if table.is_empty_at_rest().await {
        exit.signal();
    }
}

/// Ends a shim without containers and without a Shutdown. containerd sends Shutdown at once after
/// the last Delete, unless a restart of containerd or a disconnect came in between; then nobody
/// knows of the shim.
async fn end_if_forgotten(table: Table, exit: Arc<ExitSignal>) {
    tokio::time::sleep(FORGOTTEN).await;
    end_if_empty(table, exit).await;
}

/// Converts a time to the protocol's form.
pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}

/// Decodes containerd's JSON inside an `Any`.
fn json<T>(
    container: &str,
    field: &'static str,
    any: Option<&Any>,
    decode: impl FnOnce(&[u8]) -> serde_json::Result<T>,
) -> Result<T, TaskError> {
    let bad = |message: String| TaskError::BadRequest { container: container.to_owned(), field, message };
    let any = any.ok_or_else(|| bad("the field is missing".into()))?;
    decode(&any.value).map_err(|error| bad(error.to_string()))
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _ctx: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.container(&request.id).await?;
        let response = container.ask(move |actor| {
            let process = actor.process(&ProcessRef::of(&request.exec_id))?;
            let exit = process.exit();
            let status = match process.status() {
                Status::Created => ApiStatus::CREATED,
                Status::Running => ApiStatus::RUNNING,
                Status::Paused => ApiStatus::PAUSED,
                Status::Stopped => ApiStatus::STOPPED,
            };
            Ok(StateResponse {
                id: actor.id.clone(),
                bundle: actor.bundle.to_string_lossy().into_owned(),
                pid: process.pid(),
                status: status.into(),
                stdin: process.stdio.stdin.clone(),
                stdout: process.stdio.stdout.clone(),
                stderr: process.stdio.stderr.clone(),
                terminal: process.stdio.terminal,
                exit_status: exit.map_or(0, |exit| exit.code),
                exited_at: exit.map(|exit| timestamp(exit.at)).into(),
                exec_id: request.exec_id,
                ..StateResponse::default()
            })
        });
        Ok(response.await?)
    }

    async fn create(&self, _ctx: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let registration = self.table.register(&request.id)?;
        let (context, table, id) = (self.context.clone(), self.table.clone(), request.id.clone());
        let exit = Arc::clone(&self.exit);
        let (answer, created) = oneshot::channel();
        // A separate task, because ttrpc drops a request's handler at a disconnect or after the
        // deadline: half a container must not be left. A whole one without a client is removed.
        tokio::spawn(async move {
            let id = request.id.clone();
            let made = create(&context, request, registration).await;
            match &made {
                Ok(container) => table.ready(container),
                Err(error) => tracing::error!(container = id, "cannot create the container: {}", phase::chain(error)),
            }
            let Err(unheard) = answer.send(made) else { return };
            if let Ok(container) = unheard {
                tracing::warn!(container = id, "removing the container: the client of its creation is gone");
                if let Err(error) = container.operate(Operation::Delete, |actor| actor.delete_init()).await {
                    tracing::error!(container = id, "the container is left behind: {}", phase::chain(&error));
                }
            }
            end_if_forgotten(table, exit).await;
        });
        let container = created.await.map_err(|_| TaskError::Gone { container: id })??;
        let pid = container.ask(|actor| Ok(actor.process(&ProcessRef::Init)?.pid())).await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, _ctx: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.container(&request.id).await?;
        let pid = if let ProcessRef::Exec(exec) = ProcessRef::of(&request.exec_id) {
            container.operate(Operation::Exec, move |actor| actor.start_exec(exec)).await?
        } else if container.ask(|actor| Ok(actor.is_to_be_restored())).await? {
            let stop = Stop::default();
            let _client = stop.on_drop("the client is gone");
            container.operate(Operation::Restore, move |actor| actor.restore_init(stop)).await?
        } else {
            container.operate(Operation::Start, |actor| actor.start_init()).await?
        };
        self.started.notify_one();
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn delete(&self, _ctx: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (id, table, exit) = (request.id.clone(), self.table.clone(), Arc::clone(&self.exit));
        let removal = request.exec_id.is_empty().then(|| table.removal());
        let (answer, deleted) = oneshot::channel();
        // A separate task: containerd does not repeat a Delete sent during the container's
        // creation.
        tokio::spawn(async move {
            let deletion = async {
                let container = table.get(&request.id).await?;
                match ProcessRef::of(&request.exec_id) {
                    ProcessRef::Init => {
                        let stop = |actor: &mut Actor| {
                            actor.stop_restore("the container is being deleted");
                            Ok(())
                        };
                        container.ask(stop).await?;
                        container.operate(Operation::Delete, |actor| actor.delete_init()).await
                    }
                    ProcessRef::Exec(exec) => container.operate_at_once(move |actor| actor.delete_exec(exec)).await,
                }
            };
            let deleted = deletion.await;
            drop(removal);
            // The client may be gone.
            let _ = answer.send(deleted);
            end_if_forgotten(table, exit).await;
        });
        let deleted = deleted.await.map_err(|_| TaskError::Gone { container: id })??;
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.code,
            exited_at: Some(timestamp(deleted.exit.at)).into(),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _ctx: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.container(&request.id).await?.ask(|actor| actor.pids()).await?;
        let mut processes = Vec::with_capacity(pids.len());
        for (pid, exec) in pids {
            let details = match exec {
                Some(exec) => {
                    let details = ProcessDetails { exec_id: exec.into(), ..ProcessDetails::default() };
                    Some(convert_to_any(Box::new(details))?)
                }
                None => None,
            };
            processes.push(ProcessInfo { pid, info: details.into(), ..ProcessInfo::default() });
        }
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn pause(&self, _ctx: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id).await?.operate(Operation::Pause, |actor| actor.pause()).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _ctx: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id).await?.operate(Operation::Resume, |actor| actor.resume()).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _ctx: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id).await?;
        let annotations = container.ask(|actor| Ok(actor.annotations())).await?;
        let options = CheckpointOptions::of(&request, &annotations).map_err(TaskError::from)?;
        let stop = Stop::default();
        // ttrpc drops this future at a disconnect, or after the deadline.
        let _client = stop.on_drop("the client is gone");
        container.operate(Operation::Checkpoint, move |actor| actor.checkpoint(options, stop)).await?;
        self.started.notify_one();
        Ok(Empty::new())
    }

    async fn kill(&self, _ctx: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id).await?;
        let target = match ProcessRef::of(&request.exec_id) {
            ProcessRef::Init if request.all => Target::Everything,
            process => Target::Process(process),
        };
        container.ask(move |actor| actor.kill(&target, request.signal)).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _ctx: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id).await?;
        let mut spec = json(&request.id, "process", request.spec.as_ref(), runtime::process_from_json)?;
        spec.set_terminal(Some(request.terminal));
        let stdio = Stdio::new(request.stdin, request.stdout, request.stderr, request.terminal);
        let ProcessRef::Exec(exec) = ProcessRef::of(&request.exec_id) else {
            let (container, message) = (request.id, "the id is empty".into());
            return Err(TaskError::BadRequest { container, field: "exec id", message }.into());
        };
        container.ask(move |actor| actor.add_exec(exec, spec, stdio)).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _ctx: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id).await?;
        container
            .ask(move |actor| actor.resize(&ProcessRef::of(&request.exec_id), request.width, request.height))
            .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _ctx: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id).await?;
        if request.stdin {
            container.ask(move |actor| actor.close_stdin(&ProcessRef::of(&request.exec_id))).await?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _ctx: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id).await?;
        let resources =
            json(&request.id, "resources", request.resources.as_ref(), |bytes| serde_json::from_slice(bytes))?;
        container.operate(Operation::Update, move |actor| actor.update(resources)).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _ctx: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.container(&request.id).await?;
        let process = ProcessRef::of(&request.exec_id);
        let mut exit = container.ask(move |actor| actor.exit_of(&process)).await?;
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // The process was deleted before a start.
        let gone = || TaskError::NoProcess { container: request.id, exec: request.exec_id };
        let exit = ended.ok_or_else(gone)?;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: Some(timestamp(exit.at)).into(),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _ctx: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.container(&request.id).await?.ask(|actor| actor.metrics()).await?;
        Ok(StatsResponse { stats: Some(stats).into(), ..StatsResponse::default() })
    }

    async fn connect(&self, _ctx: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid =
            self.container(&request.id).await?.ask(|actor| Ok(actor.process(&ProcessRef::Init)?.pid())).await?;
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..ConnectResponse::default() })
    }

    async fn shutdown(&self, _ctx: &TtrpcContext, _request: ShutdownRequest) -> ttrpc::Result<Empty> {
        // containerd sends Shutdown after every container of a pod; only the last one ends the
        // shim. containerd also sends it once, and never again, on giving up a container in
        // creation or deletion.
        let ended = tokio::spawn(end_if_empty(self.table.clone(), Arc::clone(&self.exit)));
        if self.table.is_at_rest() {
            // A bug of ours is logged by the runtime.
            let _ = ended.await;
        }
        Ok(Empty::new())
    }
}
