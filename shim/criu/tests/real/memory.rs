//! Images without memory, filled after the restore.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use async_trait::async_trait;
use criu::{BoxError, CallError, External, NotifyRestore, RestoreError, RestoreRequest};
use images::{Changes, Inherited, Run, Staging};
use proc::ContainerPid;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::sys;
use crate::world::{Sentence, Target, World, children, sentence, until};

/// Least size of a run: between the target's larger parts and smaller ones.
const LEAST: u64 = 256 << 10;

pub(crate) fn sentences() -> Vec<Sentence> {
    vec![
        sentence!(a_family_gets_its_memory_back_when_all_of_it_is_filled),
        sentence!(a_family_keeps_its_shared_pages_if_they_are_left_to_criu),
        sentence!(images_without_their_memory_are_refused_by_criu_alone),
        sentence!(memory_that_is_not_filled_is_empty),
        sentence!(rewritten_images_are_restored_twice_and_again_from_a_new_dump),
        sentence!(images_that_nothing_is_taken_out_of_are_restored_as_before),
        sentence!(staging_memory_becomes_anonymous_again),
    ]
}

/// Memory taken out, with addresses.
type Taken = Vec<(i32, u64, Vec<u8>)>;

/// Writes the memory back when all processes are about to run.
struct Fill(Taken);

#[async_trait]
impl NotifyRestore for Fill {
    async fn pre_resume(&mut self) -> Result<(), BoxError> {
        for (pid, address, bytes) in &self.0 {
            sys::write_memory(*pid, *address, bytes)?;
        }
        Ok(())
    }
}

fn read(run: &Run) -> (i32, u64, Vec<u8>) {
    let mut bytes = vec![0; usize::try_from(run.length).unwrap()];
    File::open(&run.file).unwrap().read_exact_at(&mut bytes, run.offset).unwrap();
    (run.pid.raw(), run.address, bytes)
}

fn without(runs: &[Run]) -> Vec<Changes> {
    let mut changes: Vec<Changes> = vec![];
    for run in runs {
        let range = run.address..run.address + run.length;
        match changes.iter_mut().find(|changes| changes.pid == run.pid) {
            Some(changes) => changes.without.push(range),
            None => changes.push(Changes { pid: run.pid, without: vec![range], staging: vec![] }),
        }
    }
    changes
}

fn pages_in(images: &Path) -> u64 {
    let files = std::fs::read_dir(images).unwrap().map(Result::unwrap);
    let pages = files.filter(|file| file.file_name().to_str().unwrap().starts_with("pages-"));
    pages.map(|file| file.metadata().unwrap().len()).sum()
}

async fn family_runs(world: &World) {
    for name in ["child", "grandchild"] {
        let count = || std::fs::read_to_string(world.path(&format!("count.{name}"))).unwrap_or_default();
        let before = count();
        until("a child to verify its memory", || count() > before).await;
    }
}

/// Dumps a family and waits for the end.
async fn dumped_family(world: &World, things: &[&str]) {
    let target = world.target(things).await;
    family_runs(world).await;
    if things.contains(&"deep") {
        until("the thread to use its stack", || !deep(world).is_empty()).await;
    }
    world.criu.dump(world.dump_request(&target), &mut ()).await.unwrap();
    target.child.wait().await;
    until("the family to end", || children().is_empty()).await;
}

/// Returns the place of the thread's part of its stack, and an end of line.
fn deep(world: &World) -> String {
    let text = std::fs::read_to_string(world.path("count.deep")).unwrap_or_default();
    if text.ends_with('\n') { text } else { String::new() }
}

/// Returns a request for a restore with missing memory.
fn cut(world: &World) -> RestoreRequest {
    RestoreRequest { cut: true, ..world.restore_request() }
}

async fn restored_family(world: &World, taken: Taken) -> Target {
    let restored = world.criu.restore(cut(world), &mut Fill(taken)).await.unwrap();
    let target = Target::of(restored.root, world);
    target.runs().await;
    family_runs(world).await;
    target
}

/// Takes the runs out, and returns the contents.
fn take(images: &Path, runs: &[Run]) -> Taken {
    let taken = runs.iter().map(read).collect();
    let (before, length) = (pages_in(images), runs.iter().map(|run| run.length).sum::<u64>());
    images::rewrite(images, &without(runs)).unwrap();
    images::check(images).unwrap();
    assert_eq!(pages_in(images), before - length);
    taken
}

async fn a_family_gets_its_memory_back_when_all_of_it_is_filled(world: World) {
    // The thread last: nothing may be forked after a thread exists.
    dumped_family(&world, &["family", "deep"]).await;
    let images = world.path("images");
    let runs = images::runs(&images, LEAST, Inherited::Take).unwrap();
    let length: u64 = runs.iter().map(|run| run.length).sum();
    assert!(length > 3 * (48 << 20), "{length}");
    let stack = deep(&world).trim().parse::<u64>().unwrap() + (1 << 20);
    assert!(runs.iter().any(|run| run.address <= stack && stack < run.address + run.length), "{stack:#x} {runs:?}");
    let taken = take(&images, &runs);
    assert_eq!(images::runs(&images, LEAST, Inherited::Take).unwrap(), []);
    restored_family(&world, taken).await.kill().await;
}

async fn a_family_keeps_its_shared_pages_if_they_are_left_to_criu(world: World) {
    dumped_family(&world, &["family"]).await;
    let images = world.path("images");
    let runs = images::runs(&images, LEAST, Inherited::Leave).unwrap();
    let mut pids: Vec<ContainerPid> = runs.iter().map(|run| run.pid).collect();
    pids.dedup();
    let own = |pid: &ContainerPid| runs.iter().filter(|run| run.pid == *pid).map(|run| run.length >> 20).sum::<u64>();
    assert_eq!(pids.iter().map(own).collect::<Vec<_>>(), [22, 6, 10]);
    let taken = take(&images, &runs);
    let target = restored_family(&world, taken).await;
    for pid in pids {
        assert!(shared(pid.raw()) > 34 << 10, "{pid}: {}", shared(pid.raw()));
    }
    target.kill().await;
}

/// Returns memory shared by a process with others, except files, in KiB.
fn shared(pid: i32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Shared_Dirty:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

async fn images_without_their_memory_are_refused_by_criu_alone(world: World) {
    dumped_family(&world, &["family"]).await;
    let images = world.path("images");
    let taken = take(&images, &images::runs(&images, LEAST, Inherited::Take).unwrap());
    let error = world.criu.restore(world.restore_request(), &mut ()).await.unwrap_err();
    let CallError::Refused(refusal) = source(error) else { panic!("criu has refused") };
    assert!(refusal.cause.as_ref().is_some_and(|cause| cause.contains("only gpusnap restores them")), "{refusal}");
    until("the half-restored tree to end", || children().is_empty()).await;
    restored_family(&world, taken).await.kill().await;
    let left = std::fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(left.into_iter().all(|name| !name.starts_with(images::UNMARKED_PREFIX)));
}

fn source(error: RestoreError) -> CallError {
    match error {
        RestoreError::Criu { source, .. } => source,
        other => panic!("{other}"),
    }
}

async fn memory_that_is_not_filled_is_empty(world: World) {
    dumped_family(&world, &["family"]).await;
    let images = world.path("images");
    take(&images, &images::runs(&images, LEAST, Inherited::Take).unwrap());
    let restored = world.criu.restore(cut(&world), &mut ()).await.unwrap();
    assert_ne!(restored.root.wait().await.code, 0);
    until("the family to end", || children().is_empty()).await;
}

async fn rewritten_images_are_restored_twice_and_again_from_a_new_dump(world: World) {
    dumped_family(&world, &["family"]).await;
    let images = world.path("images");
    let taken = take(&images, &images::runs(&images, LEAST, Inherited::Take).unwrap());
    restored_family(&world, taken.clone()).await.kill().await;
    let target = restored_family(&world, taken).await;
    std::fs::rename(&images, world.path("old")).unwrap();
    world.criu.dump(world.dump_request(&target), &mut ()).await.unwrap();
    target.child.wait().await;
    until("the family to end", || children().is_empty()).await;
    restored_family(&world, vec![]).await.kill().await;
}

async fn images_that_nothing_is_taken_out_of_are_restored_as_before(world: World) {
    dumped_family(&world, &["family"]).await;
    let images = world.path("images");
    let pids: Vec<ContainerPid> =
        images::runs(&images, LEAST, Inherited::Take).unwrap().iter().map(|run| run.pid).collect();
    let changes = |pid: &ContainerPid| Changes { pid: *pid, without: vec![], staging: vec![] };
    images::rewrite(&images, &pids.iter().map(changes).collect::<Vec<_>>()).unwrap();
    restored_family(&world, vec![]).await.kill().await;
}

async fn staging_memory_becomes_anonymous_again(world: World) {
    // The file is in a mount that nobody sees any more, like the store's outside of a container.
    let packs = world.folder("count.packs");
    rustix::mount::mount("tmpfs", &packs, "tmpfs", MountFlags::empty(), None).unwrap();
    let target = world.target(&["staging"]).await;
    let pid = target.child.pid();
    let pack = File::open(packs.join("pack")).unwrap();
    rustix::mount::unmount(&packs, UnmountFlags::DETACH).unwrap();
    let range = std::fs::read_to_string(world.path("count.range")).unwrap();
    let (address, length) = range.split_once(' ').unwrap();
    let (address, length): (u64, u64) = (address.parse().unwrap(), length.parse().unwrap());
    let range = address..address + length;

    world.criu.dump(world.dump_request(&target), &mut ()).await.unwrap_err();
    target.runs().await;
    let mut request = world.dump_request(&target);
    request.external = vec![External::of_file(&pack).unwrap()];
    world.criu.dump(request, &mut ()).await.unwrap();
    target.child.wait().await;

    let images = world.path("images");
    let saved = ContainerPid::new(pid).unwrap();
    let written = images::present(&images, saved, range.clone()).unwrap();
    assert_eq!(written.iter().map(|run| run.length).collect::<Vec<_>>(), [4096, 3 * 4096]);
    let mut taken =
        vec![(pid, address, part(&pack, 0..8 << 20)), (pid, address + (12 << 20), part(&pack, 8 << 20..12 << 20))];
    taken.extend(written.iter().map(read));
    drop(pack);
    let staging = vec![Staging { range: range.clone(), huge: true }];
    images::rewrite(&images, &[Changes { pid: saved, without: vec![], staging }]).unwrap();
    images::check(&images).unwrap();
    assert_eq!(images::present(&images, saved, range.clone()).unwrap(), []);

    let restored = world.criu.restore(cut(&world), &mut Fill(taken)).await.unwrap();
    let target = Target::of(restored.root, &world);
    target.runs().await;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mapping =
        smaps.split("VmFlags:").find(|text| text.contains(&format!("{:x}-{:x} rw-p", range.start, range.end)));
    assert!(mapping.is_some(), "{smaps}");
    assert!(!smaps.contains("pack"), "{smaps}");
    assert!(smaps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" hg")), "{smaps}");
    target.kill().await;
}

fn part(file: &File, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
    file.read_exact_at(&mut bytes, range.start).unwrap();
    bytes
}
