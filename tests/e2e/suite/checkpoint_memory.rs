//! Places of a checkpoint's big memory.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::target::Shim;
use e2e::{Case, Cmd, Test, case, ensure_eq, ensure_has, eventually, proc};
use serde_json::Value;

use crate::checkpoint_cri::registry;
use crate::checkpoint_ctr::{count, counts_past, hold_memory_with};

pub(crate) fn cases() -> Vec<Case> {
    let cases = vec![
        case!(big_memory_goes_to_the_node_store_and_comes_back),
        case!(memory_can_be_kept_beside_the_images),
        case!(memory_can_be_left_in_the_images),
        case!(memory_that_processes_share_goes_to_the_node_store_and_comes_back),
        case!(a_session_that_is_killed_leaves_the_container_running).alone(),
        case!(a_checkpoint_whose_snapshot_is_gone_says_so).alone(),
        case!(a_checkpoint_that_cannot_be_put_in_its_place_leaves_no_snapshot),
        case!(a_snapshot_that_the_node_lacks_is_pulled),
        case!(a_registry_that_lacks_the_snapshot_too_is_named),
    ];
    let unlike = |case: Case, shim| case.except(shim, "all memory goes through the images, by runc");
    cases.into_iter().map(|case| unlike(unlike(case, Shim::Stock), Shim::GpusnapRunc)).collect()
}

/// Memory beyond the limit of the images.
const MEGABYTES: u32 = 96;

/// Checkpoints into a folder; returns gpusnap.json and the size of all files in bytes.
fn checkpointed(t: &Test, id: &str) -> Result<(Value, u64)> {
    let folder = t.folder()?.join(id);
    t.ctr().checkpoint_task(id, &["--image-path", &folder.to_string_lossy()]).ok()?;
    let manifest = serde_json::from_slice(&fs::read(folder.join("gpusnap.json"))?)?;
    Ok((manifest, bytes(&folder)?))
}

fn bytes(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        sum += entry?.metadata()?.len();
    }
    Ok(sum)
}

/// Moves the container to another one, which checks all its memory.
fn survives(t: &Test, id: &str) -> Result<()> {
    let to = t.id("c");
    let before = count(t, id)?;
    t.ctr().moves(id, &to)?;
    ensure!(count(t, &to)? >= before, "it began again");
    counts_past(t, &to, before + 100).map(drop)
}

fn big_memory_goes_to_the_node_store_and_comes_back(t: &Test) -> Result<()> {
    let id = t.id("c");
    hold_memory_with(t, &id, &[], MEGABYTES)?;
    let (manifest, bytes) = checkpointed(t, &id)?;
    ensure_eq!(manifest["version"], 3);
    let digest = manifest["memory"]["source"]["snapshot"]["digest"].as_str().context("no digest")?;
    let blob = Path::new("/var/lib/gpusnap/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    ensure!(blob.is_file(), "{} is not there", blob.display());
    ensure!(bytes < 64 << 20, "{bytes} bytes are in the folder");
    let resident = manifest["resident"].as_u64().context("nothing of the memory that it had")?;
    let held = u64::from(MEGABYTES) << 20;
    ensure!(resident > held && resident < 2 * held, "it had {resident} bytes of memory, and holds {held}");
    survives(t, &id)
}

fn memory_can_be_kept_beside_the_images(t: &Test) -> Result<()> {
    let id = t.id("c");
    hold_memory_with(t, &id, &["--annotation", "gpusnap.dev/memory=inline"], MEGABYTES)?;
    let (manifest, bytes) = checkpointed(t, &id)?;
    ensure_eq!(manifest["memory"]["source"], "inline");
    ensure!(bytes > 1 << 20, "{bytes} bytes are in the folder");
    survives(t, &id)
}

fn memory_can_be_left_in_the_images(t: &Test) -> Result<()> {
    let id = t.id("c");
    hold_memory_with(t, &id, &["--annotation", "gpusnap.dev/memory=images"], MEGABYTES)?;
    let (manifest, bytes) = checkpointed(t, &id)?;
    ensure_eq!(manifest["version"], 3);
    ensure!(bytes > u64::from(MEGABYTES) << 20, "{bytes} bytes are in the folder");
    survives(t, &id)
}

fn memory_that_processes_share_goes_to_the_node_store_and_comes_back(t: &Test) -> Result<()> {
    let (id, to) = (t.id("c"), t.id("c"));
    // A filter of the container must not matter to criu.
    t.ctr().start_python(&id, &["--seccomp"], include_str!("../../programs/shared_memory.py"))?;
    let before = counts_past(t, &id, 1)?;
    let (manifest, bytes) = checkpointed(t, &id)?;
    let memory = manifest["memory"]["memory"].as_u64().context("no memory is outside the images")?;
    // What two processes map, less holes; what only a descriptor leads to or is sealed stays.
    let (shared, images) = ((32 + 3 + 24 + 8) << 20, 32 << 20);
    ensure!(memory > shared - (1 << 20), "{memory} bytes are outside the images");
    ensure!(bytes < images, "{bytes} bytes are in the folder");
    // The source goes on, and its memory is as it was.
    let before = counts_past(t, &id, before + 2)?;
    t.ctr().moves(&id, &to)?;
    ensure!(count(t, &to)? >= before, "it began again");
    let before = counts_past(t, &to, before + 2)?;
    // Another generation: CRIU's own files in memory have taken the place of the first ones.
    t.ctr().moves(&to, &id)?;
    counts_past(t, &id, before + 2).map(drop)
}

fn a_session_that_is_killed_leaves_the_container_running(t: &Test) -> Result<()> {
    let id = t.id("c");
    let before = hold_memory_with(t, &id, &[], 512)?;
    let client = t.ctr().checkpoint(&id, &t.id("checkpoint")).spawn()?;
    eventually("a session to kill", || {
        ensure!(proc::alive(client.pid()), "it is over: {} {}", client.stdout(), client.stderr());
        proc::kill(*proc::acting_as("gpusnap-session").first().context("none yet")?)
    })?;
    client.wait()?.expect_failure()?;
    counts_past(t, &id, before + 5)?;
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    counts_past(t, &id, before + 10).map(drop)
}

fn a_checkpoint_whose_snapshot_is_gone_says_so(t: &Test) -> Result<()> {
    let (id, to, image) = (t.id("c"), t.id("c"), t.id("checkpoint"));
    hold_memory_with(t, &id, &[], MEGABYTES)?;
    t.ctr().checkpoint(&id, &image).ok()?;
    t.ctr().remove(&id)?;
    let (store, away) = (Path::new("/var/lib/gpusnap"), Path::new("/var/lib/gpusnap-away"));
    fs::rename(store, away)?;
    let refused = t.ctr().restore(&to, &image).run();
    fs::remove_dir_all(store).ok();
    fs::rename(away, store)?;
    let out = refused?.expect_failure()?;
    ensure!(out.stderr.contains("snapshot"), "{}", out.stderr);
    Ok(())
}

/// `gpusnap`, beside our shim.
pub(crate) fn gpusnap(t: &Test, args: &[&str]) -> Result<Cmd> {
    let shim = fs::canonicalize(t.bed().shim_binary()?)?;
    Ok(Cmd::new(shim.with_file_name("gpusnap").to_string_lossy()).args(args))
}

/// The name of this container's snapshot, which must exist.
pub(crate) fn snapshot_of(t: &Test, id: &str) -> Result<String> {
    let listed = snapshots(t)?;
    let found = listed.iter().find(|name| name.starts_with(&format!("default/{id}.")));
    found.cloned().with_context(|| format!("no snapshot of {id} in {listed:?}"))
}

/// The names of all snapshots in the store.
pub(crate) fn snapshots(t: &Test) -> Result<Vec<String>> {
    let listed: Value = serde_json::from_slice(&gpusnap(t, &["ls", "--json"])?.ok()?.stdout)?;
    let names = listed.as_array().into_iter().flatten().filter_map(|entry| entry["names"].as_array()).flatten();
    Ok(names.filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Removes the snapshots of a container.
pub(crate) fn remove_snapshots_of(t: &Test, id: &str) -> Result<()> {
    while let Ok(name) = snapshot_of(t, id) {
        gpusnap(t, &["rm", "--wait", &name])?.ok()?;
    }
    Ok(())
}

fn a_checkpoint_that_cannot_be_put_in_its_place_leaves_no_snapshot(t: &Test) -> Result<()> {
    let id = t.id("c");
    let before = hold_memory_with(t, &id, &[], MEGABYTES)?;
    // The folder looks like an earlier checkpoint that cannot be removed.
    let folder = t.folder()?.join("image");
    fs::create_dir_all(folder.join("inventory.img"))?;
    let refused = t.ctr().checkpoint_task(&id, &["--image-path", &folder.to_string_lossy()]).run()?.expect_failure()?;
    ensure_has!(refused.stderr, "publish the checkpoint");
    let left = snapshot_of(t, &id);
    ensure!(left.is_err(), "a snapshot is left: {left:?}");
    counts_past(t, &id, before + 10).map(drop)
}

fn a_snapshot_that_the_node_lacks_is_pulled(t: &Test) -> Result<()> {
    let (id, to, image) = (t.id("c"), t.id("c"), t.id("checkpoint"));
    let registry = registry()?;
    let annotation = format!("gpusnap.dev/registry={registry}/{id}");
    let before = hold_memory_with(t, &id, &["--annotation", &annotation], MEGABYTES)?;
    t.ctr().checkpoint(&id, &image).ok()?;
    t.ctr().remove(&id)?;
    let name = snapshot_of(t, &id)?;
    gpusnap(t, &["push", &name, &format!("{registry}/{id}:warm")])?.ok()?;
    gpusnap(t, &["rm", &name])?.ok()?;
    t.ctr().restore(&to, &image).ok()?;
    counts_past(t, &to, before + 100)?;
    ensure_eq!(snapshot_of(t, &id)?, name);
    gpusnap(t, &["verify", &name])?.ok().map(drop)
}

fn a_registry_that_lacks_the_snapshot_too_is_named(t: &Test) -> Result<()> {
    let (id, to, image) = (t.id("c"), t.id("c"), t.id("checkpoint"));
    let repository = format!("{}/{id}", registry()?);
    let annotation = format!("gpusnap.dev/registry={repository}");
    hold_memory_with(t, &id, &["--annotation", &annotation], MEGABYTES)?;
    t.ctr().checkpoint(&id, &image).ok()?;
    t.ctr().remove(&id)?;
    gpusnap(t, &["rm", &snapshot_of(t, &id)?])?.ok()?;
    let out = t.ctr().restore(&to, &image).run()?.expect_failure()?;
    ensure_has!(out.stderr, repository);
    Ok(())
}
