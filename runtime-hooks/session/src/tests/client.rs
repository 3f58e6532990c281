//! The shim's side, with programs in the place of the session.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use checkpoint::{CheckpointOptions, MemoryPlace};
use phase::Phase;
use proc::HostPid;
use reaper::Reaper;
use runtime::{Allow, Choice, Kind, Prepare};
use tempfile::TempDir;

use crate::client::{Conductor, Sessions, Stop};
use crate::order::{CheckpointOrder, NodeStore, Subject};

/// A program in a folder of its own. Standard input is the socket, which it also writes to by `say`.
fn program(script: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    // The socket is standard input; a shell can write to it as well.
    std::fs::write(&path, format!("#!/bin/sh\ncd {}\nexec 1>&0\n{script}\n", folder.path().display())).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    (folder, path)
}

pub(super) fn order() -> CheckpointOrder {
    let store = NodeStore { root: "/nowhere".into(), quota: None, registry: None };
    let subject = Subject {
        id: "c".into(),
        namespace: "n".into(),
        bundle: "/nowhere".into(),
        logs: "/nowhere".into(),
        runtime: Choice::new(Kind::Libcontainer, "/nowhere".into(), false),
        prepare: Prepare::Nothing,
        store,
    };
    let options = CheckpointOptions {
        folder: "/tmp".into(),
        work: None,
        exit: false,
        allow: Allow::default(),
        patience: Duration::ZERO,
        memory: MemoryPlace::Store,
        registry: None,
        pod_namespace: None,
    };
    CheckpointOrder { subject, init: HostPid::own(), began: 7, paused: false, shm: None, devices: vec![], options }
}

fn sessions(program: PathBuf) -> Sessions {
    Sessions::of(Reaper::guest(), program, |_, _| Duration::from_secs(3600))
}

#[tokio::test]
async fn a_session_that_says_done_is_believed() {
    let (_folder, program) = program(r#"read order; echo '{"began":"dump"}'; echo '"done"'"#);
    sessions(program).checkpoint(order(), Stop::default()).await.unwrap();
}

#[tokio::test]
async fn a_session_that_dies_is_succeeded_by_one_that_undoes() {
    let (folder, program) = program(
        r#"read order; echo "$order" >> orders; case $order in *undo*) echo '"done"' ;; *) echo '{"began":"dump"}'; kill -9 $$ ;; esac"#,
    );
    let failed = sessions(program).checkpoint(order(), Stop::default()).await.unwrap_err();
    assert_eq!((failed.phase, failed.owed.as_deref()), (Phase::Dump, None));
    assert!(failed.cause.to_string().contains("died"), "{failed:?}");
    let orders = std::fs::read_to_string(folder.path().join("orders")).unwrap();
    assert_eq!(orders.lines().count(), 2, "{orders}");
}

#[tokio::test]
async fn a_session_that_dies_when_the_checkpoint_was_whole_has_succeeded() {
    let (_folder, program) = program(r#"read order; case $order in *undo*) echo '"stands"' ;; *) kill -9 $$ ;; esac"#);
    sessions(program).checkpoint(order(), Stop::default()).await.unwrap();
}

#[tokio::test]
async fn a_session_that_never_answers_is_killed_and_succeeded() {
    let (folder, program) =
        program(r#"read order; case $order in *undo*) echo undone > undone; echo '"done"' ;; *) sleep 3600 ;; esac"#);
    let limit: fn(Phase, Duration) -> Duration =
        |phase, _| if phase == Phase::Release { Duration::from_secs(3600) } else { Duration::from_millis(200) };
    let sessions = Sessions::of(Reaper::guest(), program, limit);
    let failed = sessions.checkpoint(order(), Stop::default()).await.unwrap_err();
    assert!(failed.cause.to_string().contains("was killed"), "{failed:?}");
    assert!(folder.path().join("undone").exists());
}

#[tokio::test]
async fn a_stop_reaches_the_session_with_its_reason() {
    let (folder, program) = program(
        r#"read order; read cancel; echo "$cancel" > cancel; echo '{"failed":{"phase":"lock","cause":{"message":"gave up","source":null},"owed":null}}'"#,
    );
    let stop = Stop::default();
    drop(stop.on_drop("the client is gone"));
    let failed = sessions(program).checkpoint(order(), stop).await.unwrap_err();
    assert_eq!((failed.phase, failed.cause.to_string().as_str()), (Phase::Lock, "gave up"));
    let told = std::fs::read_to_string(folder.path().join("cancel")).unwrap();
    assert!(told.contains("the client is gone"), "{told}");
}

#[tokio::test]
async fn what_nobody_can_undo_is_told() {
    let (_folder, program) = program("read order; kill -9 $$");
    let failed = sessions(program).checkpoint(order(), Stop::default()).await.unwrap_err();
    assert!(failed.owed.unwrap().contains("died as well"));
}
