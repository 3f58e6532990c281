//! Checkpoints of containers.

use std::fs;

use cgroup::Cgroup;
use runtime::{Allow, Cancel, CheckpointRequest, Tcp};

use crate::bed::{Bed, sentences};
use crate::container::{Bundle, Running};
use crate::image::{Image, chain};
use crate::spec::{process, shell};
use crate::world::Which;

sentences![
    a_container_goes_on_after_a_checkpoint,
    a_paused_container_stays_paused_after_a_checkpoint,
    a_checkpoint_without_leave_running_ends_it,
    a_cancelled_checkpoint_does_not_end_it,
    a_container_that_does_not_run_is_not_saved,
    a_failed_checkpoint_leaves_the_container_running,
    a_failed_checkpoint_leaves_a_paused_container_paused,
    a_connection_is_saved_where_that_is_allowed,
    an_exec_that_runs_during_a_checkpoint_goes_on,
    a_container_is_saved_again_and_again,
];

/// Script that counts input lines, and ends with the input.
pub(crate) const COUNTER: &str = "n=0; echo up; while read line; do n=$((n+1)); echo \"$n $line\"; done; exit 7";

/// Script that sends the input through a connection on loopback, and prints the echo.
const CONNECTED: &str = "nc -l -p 7000 -e cat & echo up; until nc 127.0.0.1 7000 2>/dev/null; do sleep 0.01; done";

/// Returns a counting container after one line of input.
pub(crate) async fn counter<'bed>(bed: &'bed Bed) -> (Bundle<'bed>, Running) {
    counter_as(bed, &shell(COUNTER)).await
}

pub(crate) async fn counter_as<'bed>(bed: &'bed Bed, spec: &oci_spec::runtime::Spec) -> (Bundle<'bed>, Running) {
    let bundle = bed.bundle(&bed.savable(spec));
    let running = bundle.start().await;
    running.says("up\n").await;
    running.tell("first");
    running.says("1 first\n").await;
    (bundle, running)
}

/// Checks that the count goes on undisturbed up to the end of the container.
pub(crate) async fn counts_on(bundle: &Bundle<'_>, running: Running, next: u32) {
    running.tell("on");
    running.says(&format!("{next} on\n")).await;
    assert_eq!(bundle.ask("echo asked").await, "asked\n");
    assert_eq!(running.end().await.code, 7);
    bundle.delete().await;
}

fn is_frozen(running: &Running) -> bool {
    Cgroup::of_process(running.child.process()).unwrap().is_frozen().unwrap()
}

async fn a_container_goes_on_after_a_checkpoint(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    let before = bed.traces();
    let image = bundle.checkpoint(&running).await;
    assert_eq!(running.child.exit(), None);
    assert!(!is_frozen(&running));
    assert!(image.images().join("inventory.img").exists());
    assert!(image.work().join("dump.log").exists());
    let left = bed.settle_beside(&before, &bundle.id);
    assert!(left.is_empty(), "{left:?}");
    counts_on(&bundle, running, 2).await;
}

async fn a_paused_container_stays_paused_after_a_checkpoint(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    bed.runtime.pause(&bundle.id).await.unwrap();
    bundle.checkpoint(&running).await;
    assert!(is_frozen(&running));
    bed.runtime.resume(&bundle.id).await.unwrap();
    counts_on(&bundle, running, 2).await;
}

async fn a_checkpoint_without_leave_running_ends_it(bed: &Bed) {
    for paused in [false, true] {
        let (bundle, running) = counter(bed).await;
        if paused {
            bed.runtime.pause(&bundle.id).await.unwrap();
        }
        let (image, ended) = bundle.swap_out(running).await;
        assert_eq!(ended.stdout, "up\n1 first\n");
        assert!(image.images().join("inventory.img").exists());
    }
}

async fn a_cancelled_checkpoint_does_not_end_it(bed: &Bed) {
    if bed.which != Which::Libcontainer {
        return bed.not_tried("nobody can be asked between the dump and the end");
    }
    let (bundle, running) = counter(bed).await;
    let cancel = Cancel::default();
    cancel.cancel("the client is gone");
    let image = Image::new(bed);
    let error = bundle.checkpoint_to(&image, &running.child, |request| request.cancel = cancel).await.unwrap_err();
    let chain = chain(&error);
    assert!(chain.contains("the client is gone"), "{chain}");
    assert!(!is_frozen(&running));
    counts_on(&bundle, running, 2).await;
}

async fn a_container_that_does_not_run_is_not_saved(bed: &Bed) {
    let bundle = bed.bundle(&shell("exit 5"));
    let running = bundle.create().await.unwrap();
    let image = Image::new(bed);
    bundle.checkpoint_to(&image, &running.child, |_| {}).await.unwrap_err();
    bed.runtime.start(&bundle.id).await.unwrap();
    let child = running.child.clone();
    assert_eq!(running.end().await.code, 5, "it starts all the same");
    bundle.checkpoint_to(&image, &child, |_| {}).await.unwrap_err();
    bundle.delete().await;
    let error = bundle.checkpoint_to(&image, &child, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains(&bundle.id), "{error}");
    assert!(!image.images().join("inventory.img").exists());
}

/// Returns a container that prints the input.
async fn connected(bed: &Bed) -> (Bundle<'_>, Running) {
    let bundle = bed.bundle(&shell(CONNECTED));
    let running = bundle.start().await;
    running.says("up\n").await;
    running.tell("first");
    running.says("first\n").await;
    (bundle, running)
}

async fn a_failed_checkpoint_leaves_the_container_running(bed: &Bed) {
    let (bundle, running) = connected(bed).await;
    for leave_running in [true, false] {
        let before = bed.traces();
        let image = Image::new(bed);
        let error = bundle.checkpoint_to(&image, &running.child, |request| {
            request.leave_running = leave_running;
            request.allow.tcp = Tcp::Refuse;
        });
        let error = error.await;
        let error = chain(&error.unwrap_err());
        assert!(error.contains("TCP"), "{error}");
        assert!(error.contains("dump.log"), "{error}");
        assert!(!image.images().join("inventory.img").exists());
        let left = bed.settle_beside(&before, &bundle.id);
        assert!(left.is_empty(), "{left:?}");
        assert!(!is_frozen(&running));
        running.tell("second");
        running.says("second\n").await;
        assert_eq!(bundle.ask("echo asked").await, "asked\n");
    }
    bundle.kill(running).await;
}

async fn a_failed_checkpoint_leaves_a_paused_container_paused(bed: &Bed) {
    let (bundle, running) = connected(bed).await;
    bed.runtime.pause(&bundle.id).await.unwrap();
    let refuse = |request: &mut CheckpointRequest| request.allow.tcp = Tcp::Refuse;
    bundle.checkpoint_to(&Image::new(bed), &running.child, refuse).await.unwrap_err();
    assert!(is_frozen(&running));
    bed.runtime.resume(&bundle.id).await.unwrap();
    running.tell("second");
    running.says("second\n").await;
    bundle.kill(running).await;
}

async fn a_connection_is_saved_where_that_is_allowed(bed: &Bed) {
    let (bundle, running) = connected(bed).await;
    let allow = Allow { tcp: Tcp::Keep, ..Allow::default() };
    let image = Image::new(bed);
    bundle
        .checkpoint_to(&image, &running.child, |request| {
            request.allow = allow;
            request.leave_running = true;
        })
        .await
        .unwrap();
    // The connection is not blocked any more.
    running.tell("second");
    running.says("second\n").await;
    bundle.kill(running).await;
    if bed.which != Which::Libcontainer {
        return eprintln!("not restored: under {} the restored loopback device is down", bed.which);
    }
    let running = bundle.restore_allowing(&image, allow).await.unwrap();
    running.tell("third");
    running.says("third\n").await;
    assert_eq!(running.pipes.stdout.so_far(), "third\n");
    bundle.kill(running).await;
}

async fn an_exec_that_runs_during_a_checkpoint_goes_on(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    let exec = bundle.exec(&process(&["/bin/sh", "-c", COUNTER])).await.unwrap();
    exec.says("up\n").await;
    let image = Image::new(bed);
    bundle.checkpoint_to(&image, &running.child, |request| request.leave_running = true).await.unwrap();
    exec.tell("first");
    exec.says("1 first\n").await;
    assert_eq!(exec.end().await.code, 7);
    counts_on(&bundle, running, 2).await;
}

async fn a_container_is_saved_again_and_again(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    for round in 2..7 {
        let image = bundle.checkpoint(&running).await;
        running.tell("round");
        running.says(&format!("{round} round\n")).await;
        fs::remove_dir_all(image.images()).unwrap();
    }
    counts_on(&bundle, running, 7).await;
}
