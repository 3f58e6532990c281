//! A successor and the files of the session that died.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use bulk::{Published, Source};
use checkpoint::{Draft, Manifest};
use phase::{Cancel, Phase, Timeline};
use proc::HostPid;
use reaper::Reaper;
use runtime::Allow;
use snapshot::{CRIU_TYPE, Config, Host, IfTaken, NewLayer, NewSnapshot, Pointer, Store};

use super::client::order;
use crate::machine::Services;
use crate::memory;
use crate::order::{CheckpointOrder, Report, UndoOrder};
use crate::process::{Reports, undo};

/// More than any pid that a kernel gives.
const NO_PID: i32 = 1 << 24;

/// The order of a checkpoint of a container that is gone.
fn order_in(folder: &Path) -> CheckpointOrder {
    let mut order = order();
    order.init = HostPid::new(NO_PID).unwrap();
    order.subject.store.root = folder.join("store");
    order.options.folder = folder.join("images");
    Draft::make_folder(&order.options.folder).unwrap();
    order
}

/// Publishes a snapshot as the order's session does.
fn publish(order: &CheckpointOrder) -> Pointer {
    let store = Store::open(&order.subject.store.root).unwrap();
    let draft = store.draft().unwrap();
    let path = draft.folder().join("criu");
    std::fs::write(&path, "images").unwrap();
    let host =
        Host { criu: "4".into(), kernel: "6".into(), architecture: "x".into(), cpu_features: vec![], driver: None };
    let name = memory::name(order).unwrap();
    let new = NewSnapshot {
        name: Some(name.clone()),
        if_taken: IfTaken::Move,
        config: Config::new(order.began / 1000, "c", "runc", host),
        layers: vec![NewLayer { media_type: CRIU_TYPE.into(), path, digest: None, annotations: BTreeMap::new() }],
        subject: None,
        annotations: BTreeMap::new(),
    };
    let snapshot = draft.publish(new, &|_| ()).unwrap();
    Pointer::new(snapshot.digest(), store.root(), Some(name), None).unwrap()
}

/// Returns the names of all snapshots in the order's store.
fn names(order: &CheckpointOrder) -> Vec<String> {
    let listed = Store::open(&order.subject.store.root).unwrap().list().unwrap();
    listed.iter().flat_map(|snapshot| snapshot.names.iter().map(ToString::to_string)).collect()
}

/// Undoes the order's checkpoint as a successor does, and returns its last word.
fn succeed(order: &CheckpointOrder) -> Report {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let timeline = Timeline::start(Phase::Release).observed(Arc::new(|_| ()));
    let services = Services { tokio, reaper: Reaper::guest(), timeline, cancel: Cancel::default() };
    let (socket, shim) = UnixStream::pair().unwrap();
    undo(&services, &UndoOrder { checkpoint: order.clone() }, &Reports::to(socket)).unwrap();
    let mut said = String::new();
    BufReader::new(shim).read_line(&mut said).unwrap();
    serde_json::from_str(&said).unwrap()
}

#[test]
fn the_snapshot_of_a_checkpoint_that_is_not_complete_is_withdrawn_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let order = order_in(folder.path());
    let earlier = CheckpointOrder { began: order.began - 1, ..order.clone() };
    publish(&earlier);
    // A session that died.
    Draft::begin(&order.options.folder, "c", order.began).unwrap().leave();
    publish(&order);
    succeed(&order);
    assert_eq!(names(&order), [memory::name(&earlier).unwrap().to_string()]);
    assert_eq!(std::fs::read_dir(&order.options.folder).unwrap().count(), 0);
    succeed(&order);
}

#[test]
fn the_snapshot_of_a_checkpoint_that_is_complete_stays() {
    let folder = tempfile::tempdir().unwrap();
    let order = order_in(folder.path());
    let mut draft = Draft::begin(&order.options.folder, "c", order.began).unwrap();
    let published = Published { source: Source::Snapshot(publish(&order)), memory: 6, spared: 0 };
    let timeline = Timeline::start(Phase::Freeze);
    let manifest = Manifest::new("c", "runc".into(), Allow::default(), None, Some(published), None, &timeline);
    draft.complete(&manifest).unwrap();
    draft.leave();
    assert!(matches!(succeed(&order), Report::Stands));
    assert_eq!(names(&order), [memory::name(&order).unwrap().to_string()]);
    assert!(std::fs::read_dir(&order.options.folder).unwrap().count() > 0);
}

#[test]
fn a_session_that_died_before_it_published_leaves_nothing_to_withdraw() {
    let folder = tempfile::tempdir().unwrap();
    let order = order_in(folder.path());
    std::fs::remove_dir(&order.options.folder).unwrap();
    succeed(&order);
    assert!(!order.options.folder.exists(), "a folder that the client had removed is there again");
    assert!(!order.subject.store.root.exists(), "a store was made");
}
