//! Checkpoints and restores, with a fake in the place of sessions.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim::Task;
use containerd_shim_protos::api::{CheckpointTaskRequest, Empty, Status as ApiStatus};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::ttrpc::{self, Code};
use phase::Phase;
use reaper::Child;
use role::Failure;
use runtime::{Operation, ProcessIo};
use rustix::process::Signal;
use session::{CheckpointOrder, Conductor, Failed, RestoreOrder, Restored, Stop};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::{Bench, FakeRuntime, code, create_request, ctx};

/// A conductor whose restores run the script in the images.
pub(super) struct FakeConductor(pub(super) Arc<FakeRuntime>);

impl FakeConductor {
    async fn step(&self, operation: Operation, phase: Phase, stop: &Stop) -> Result<(), Failed> {
        let failed = |cause| Failed { phase, cause, owed: None };
        self.0.step(operation).await.map_err(|error| failed(Failure::of(&error)))?;
        // As a session does between steps.
        if stop.is_stopped() { Err(failed(Failure::new(stop.stopped().await))) } else { Ok(()) }
    }
}

#[async_trait]
impl Conductor for FakeConductor {
    async fn checkpoint(&self, order: CheckpointOrder, stop: Stop) -> Result<(), Failed> {
        self.step(Operation::Checkpoint, Phase::Dump, &stop).await?;
        if order.options.exit {
            self.0.init.lock().unwrap().as_ref().unwrap().0.signal(Signal::KILL).unwrap();
        }
        Ok(())
    }

    async fn restore(&self, order: RestoreOrder, io: ProcessIo, stop: Stop) -> Result<Box<dyn Restored>, Failed> {
        self.step(Operation::Restore, Phase::Restore, &stop).await?;
        let script = std::fs::read_to_string(order.images.join("script")).unwrap();
        Ok(Box::new(FakeRestored(self.0.spawn(&script, None, io))))
    }
}

struct FakeRestored(Child);

#[async_trait]
impl Restored for FakeRestored {
    fn init(&self) -> &Child {
        &self.0
    }

    async fn go_on(self: Box<Self>) -> Result<(), Failed> {
        Ok(())
    }

    async fn abandon(self: Box<Self>, _: &str) {
        self.0.signal(Signal::KILL).unwrap();
    }
}

impl Bench {
    async fn create_from(&self, images: &Path) -> ttrpc::Result<()> {
        let mut request = create_request(self.bundle.path());
        request.checkpoint = images.to_str().unwrap().into();
        self.service.create(&ctx(), request).await.map(drop)
    }

    /// Begins a checkpoint that lasts until `let_go`.
    async fn held_checkpoint_of_a_paused_container(&self, images: &Path) -> JoinHandle<ttrpc::Result<Empty>> {
        self.pause().await.unwrap();
        self.hold().await;
        let service = Arc::clone(&self.service);
        let request = checkpoint_request(images, None);
        let checkpoint = tokio::spawn(async move { service.checkpoint(&ctx(), request).await });
        tokio::task::yield_now().await;
        checkpoint
    }

    async fn checkpoint(&self, images: &Path, options: Option<CheckpointOptions>) -> ttrpc::Result<()> {
        self.service.checkpoint(&ctx(), checkpoint_request(images, options)).await.map(drop)
    }
}

fn checkpoint_request(images: &Path, options: Option<CheckpointOptions>) -> CheckpointTaskRequest {
    let options = options.map(|options| Any {
        type_url: "containerd.runc.v1.CheckpointOptions".into(),
        value: options.write_to_bytes().unwrap(),
        ..Any::default()
    });
    CheckpointTaskRequest {
        id: "c".into(),
        path: images.to_str().unwrap().into(),
        options: options.into(),
        ..CheckpointTaskRequest::default()
    }
}

#[tokio::test]
async fn a_checkpoint_leaves_the_container_as_it_was() {
    let mut bench = Bench::started("sleep 1000").await;
    let images = tempfile::tempdir().unwrap();
    bench.checkpoint(images.path(), None).await.unwrap();
    assert_eq!(bench.status().await, ApiStatus::RUNNING);
    assert_eq!(bench.told("checkpointed").await, ["create", "start", "checkpointed"]);
    bench.pause().await.unwrap();
    bench.checkpoint(images.path(), None).await.unwrap();
    assert_eq!(bench.status().await, ApiStatus::PAUSED);
}

#[tokio::test]
async fn a_checkpoint_that_ends_the_container_tells_its_exit() {
    let mut bench = Bench::started("sleep 1000").await;
    let images = tempfile::tempdir().unwrap();
    let exit = CheckpointOptions { exit: true, ..CheckpointOptions::default() };
    bench.checkpoint(images.path(), Some(exit)).await.unwrap();
    assert_eq!(bench.wait("").await, 137);
    bench.delete("").await.unwrap();
    let told = bench.told("delete").await;
    assert!(told.contains(&"exit c".to_owned()), "{told:?}");
}

#[tokio::test]
async fn a_failed_checkpoint_leaves_the_container_running() {
    let bench = Bench::started("sleep 1000").await;
    let images = tempfile::tempdir().unwrap();
    bench.fail(Operation::Checkpoint);
    let exit = CheckpointOptions { exit: true, ..CheckpointOptions::default() };
    let error = bench.checkpoint(images.path(), Some(exit)).await.unwrap_err().to_string();
    assert!(error.contains("dumping") && error.contains("as told"), "{error}");
    assert_eq!(bench.status().await, ApiStatus::RUNNING);
}

#[tokio::test]
async fn only_a_running_container_can_be_checkpointed() {
    let images = tempfile::tempdir().unwrap();
    let bench = Bench::created("exit 0").await;
    assert_eq!(code(bench.checkpoint(images.path(), None).await), Code::FAILED_PRECONDITION);
    bench.start("").await.unwrap();
    bench.wait("").await;
    assert_eq!(code(bench.checkpoint(images.path(), None).await), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn state_is_answered_during_a_checkpoint() {
    let bench = Bench::started("sleep 1000").await;
    let images = tempfile::tempdir().unwrap();
    let checkpoint = bench.held_checkpoint_of_a_paused_container(images.path()).await;
    assert_eq!(bench.status().await, ApiStatus::PAUSED);
    assert!(!checkpoint.is_finished());
    bench.let_go();
    checkpoint.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_container_paused_for_a_checkpoint_that_nobody_waits_for_runs_on() {
    let mut bench = Bench::started("sleep 1000").await;
    let images = tempfile::tempdir().unwrap();
    let checkpoint = bench.held_checkpoint_of_a_paused_container(images.path()).await;
    bench.status().await;
    checkpoint.abort();
    let _ = checkpoint.await;
    bench.let_go();
    bench.told("resumed").await;
    assert_eq!(bench.status().await, ApiStatus::RUNNING);
}

/// Makes a folder that is a checkpoint for the shim, and for the fake runtime runs `script`.
fn images_of(script: &str) -> TempDir {
    let images = tempfile::tempdir().unwrap();
    std::fs::write(images.path().join("script"), script).unwrap();
    images
}

#[tokio::test]
async fn a_container_from_a_checkpoint_lives_like_any_other() {
    let mut bench = Bench::new("exit 0").await;
    let images = images_of("sleep 0.1; exit 5");
    bench.create_from(images.path()).await.unwrap();
    assert_eq!(bench.status().await, ApiStatus::CREATED);
    assert_eq!(code(bench.exec("early", "true").await), Code::FAILED_PRECONDITION);
    bench.start("").await.unwrap();
    assert_eq!(bench.wait("").await, 5);
    assert_eq!(bench.delete("").await.unwrap(), 5);
    assert_eq!(bench.told("delete").await, ["create", "start", "exit c", "delete"]);
    assert!(images.path().exists(), "a folder that is not containerd's stays");
}

#[tokio::test]
async fn a_failed_restore_can_be_tried_again() {
    let bench = Bench::new("exit 0").await;
    let images = images_of("exit 6");
    bench.create_from(images.path()).await.unwrap();
    bench.fail(Operation::Restore);
    let error = bench.start("").await.unwrap_err().to_string();
    assert!(error.contains(images.path().to_str().unwrap()) && error.contains("as told"), "{error}");
    assert_eq!(bench.status().await, ApiStatus::CREATED);
    *bench.runtime.fail.lock().unwrap() = None;
    bench.start("").await.unwrap();
    assert_eq!(bench.wait("").await, 6);
}

#[tokio::test]
async fn a_container_that_was_never_restored_can_be_deleted() {
    let bench = Bench::new("exit 0").await;
    let images = images_of("exit 0");
    bench.create_from(images.path()).await.unwrap();
    assert_eq!(code(bench.kill("", 9).await), Code::FAILED_PRECONDITION);
    bench.delete("").await.unwrap();
    assert_eq!(code(bench.delete("").await), Code::NOT_FOUND);
}

/// Begins a restore that lasts until `let_go`.
async fn held_restore(bench: &Bench) -> (TempDir, JoinHandle<ttrpc::Result<()>>) {
    let images = images_of("sleep 1000");
    bench.create_from(images.path()).await.unwrap();
    (images, bench.held_start("").await)
}

#[tokio::test]
async fn a_kill_stops_a_restore() {
    let bench = Bench::new("exit 0").await;
    let (_images, start) = held_restore(&bench).await;
    assert_eq!(code(bench.kill("", 15).await), Code::FAILED_PRECONDITION);
    bench.kill("", 9).await.unwrap();
    bench.let_go();
    let error = start.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("the container was killed"), "{error}");
    assert_eq!(bench.status().await, ApiStatus::CREATED);
}

#[tokio::test]
async fn a_delete_stops_a_restore_and_removes_the_container() {
    let bench = Bench::new("exit 0").await;
    let (_images, start) = held_restore(&bench).await;
    let (deleted, ()) = tokio::join!(bench.delete(""), async {
        tokio::task::yield_now().await;
        bench.status().await;
        bench.let_go();
    });
    deleted.unwrap();
    let error = start.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("being deleted"), "{error}");
}

#[tokio::test]
async fn a_client_that_goes_away_stops_its_restore() {
    let bench = Bench::new("exit 0").await;
    let (_images, start) = held_restore(&bench).await;
    start.abort();
    let _ = start.await;
    bench.let_go();
    // The answer comes after the end of the restore.
    bench.start("").await.unwrap();
    assert_eq!(bench.status().await, ApiStatus::RUNNING);
}

#[tokio::test]
async fn a_checkpoint_waits_for_execs_that_are_being_started() {
    let bench = Bench::started("sleep 1000").await;
    let hanging = bench.hanging_exec("h").await;
    let images = tempfile::tempdir().unwrap();
    let service = Arc::clone(&bench.service);
    let request = checkpoint_request(images.path(), None);
    let checkpoint = tokio::spawn(async move { service.checkpoint(&ctx(), request).await });
    tokio::task::yield_now().await;
    bench.status().await;
    for _ in 0..100 {
        bench.status().await;
    }
    assert!(!checkpoint.is_finished());
    bench.runtime.execs.add_permits(1);
    hanging.await.unwrap().unwrap();
    checkpoint.await.unwrap().unwrap();
}
