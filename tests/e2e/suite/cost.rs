//! Resources of running containers, and leftovers of removed ones: none.

use std::collections::BTreeSet;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::{Case, Test, bed, case, ensure_eq, eventually, proc};

use crate::ctr_exit::IDLE;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(two_hundred_containers_twenty_at_a_time_leave_nothing).alone(),
        case!(a_shim_of_one_idle_container_is_small).alone(),
        case!(a_shim_does_not_collect_descriptors),
    ]
}

fn two_hundred_containers_twenty_at_a_time_leave_nothing(t: &Test) -> Result<()> {
    // The very first container makes permanent parts, such as the namespace's cgroup.
    t.ctr().run(&t.id("first"), &["--rm"], &["true"]).ok()?;
    let files = || proc::open_files(t.bed().containerd_pid()?);
    let (before, files_before) = (settled()?, files()?);
    let ids: Vec<Vec<String>> = (0..20).map(|_| (0..10).map(|_| t.id("c")).collect()).collect();
    // Commands are made here, because a test cannot be shared by threads.
    let work = ids.iter().map(|ids| ids.iter().enumerate().map(|(n, id)| life(t, id, n)).collect::<Vec<_>>());
    let threads = work.map(|lives| thread::spawn(move || lives.into_iter().try_for_each(run_life))).collect::<Vec<_>>();
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a panic"))??;
    }
    eventually("the bed to be as it was", || {
        let now = bed::leaks()?;
        let left: Vec<&String> = now.difference(&before).collect();
        ensure!(left.is_empty(), "left behind: {left:#?}");
        Ok(())
    })?;
    eventually("containerd's descriptors to be as many as before", || {
        let now = files()?;
        ensure!(now <= files_before, "{now}, before: {files_before}");
        Ok(())
    })
}

/// Returns the leaks once two looks agree: an earlier test's last shim may still be ending.
fn settled() -> Result<BTreeSet<String>> {
    eventually("the bed to settle", || {
        let (first, second) = (bed::leaks()?, bed::leaks()?);
        ensure_eq!(first, second);
        let shims: Vec<&String> = second.iter().filter(|line| line.starts_with("process shim")).collect();
        ensure!(shims.is_empty(), "other tests' shims: {shims:?}");
        Ok(second)
    })
}

/// Commands with their expected exit codes.
type Life = Vec<(e2e::Cmd, i32)>;

/// Every other container lives until its client has seen its end; the others are killed in the
/// background.
fn life(t: &Test, id: &str, n: usize) -> Life {
    let ctr = t.ctr();
    if n.is_multiple_of(2) {
        return vec![(ctr.run(id, &["--rm"], &["sh", "-c", "echo hello; exit 3"]), 3)];
    }
    vec![
        (ctr.run(id, &["--detach", "--null-io"], &["sh", "-c", IDLE]), 0),
        (ctr.exec(id, &["sh", "-c", "exit 4"]), 4),
        (ctr.task(&["rm", "--force", id]), 0),
        (ctr.cmd().args(&["container", "rm", id]), 0),
    ]
}

fn run_life(life: Life) -> Result<()> {
    life.into_iter().try_for_each(|(cmd, code)| cmd.run()?.expect_code(code).map(drop))
}

/// Limit of our shim's memory, in kB.
const SMALL: u64 = 8192;

fn a_shim_of_one_idle_container_is_small(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start(&id, &[], &["sleep", "1000"])?;
    let shim = t.ctr().shim(&id)?;
    let figures = |when: &str| -> Result<u64> {
        let all = proc::kilobytes(shim, "VmRSS")?;
        let [anonymous, files] = [proc::kilobytes(shim, "RssAnon")?, proc::kilobytes(shim, "RssFile")?];
        if all <= SMALL || !t.target().shim.is_ours() {
            eprintln!("e2e: {}: resident {when}: {all} kB, {anonymous} kB anonymous, {files} kB of files", t.target());
        }
        Ok(all)
    };
    // An idle shim's memory, a while after the last request.
    let small = |when: &str| {
        if !t.target().shim.is_ours() {
            return figures(when).map(drop);
        }
        eventually("the shim to be small", || {
            let all = figures(when)?;
            ensure!(all <= SMALL, "{all} kB {when}, more than {SMALL} kB");
            Ok(())
        })
    };
    small("with one idle container")?;
    for _ in 0..20 {
        t.ctr().exec(&id, &["true"]).ok()?;
    }
    small("after 20 execs")
}

fn a_shim_does_not_collect_descriptors(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let shim = t.ctr().shim(&id)?;
    let exec = || t.ctr().exec(&id, &["echo", "hello"]).ok().map(drop);
    exec()?;
    let before = eventually("the first exec to be over", || {
        ensure_eq!(proc::children(shim).len(), 1);
        proc::open_files(shim)
    })?;
    for _ in 0..20 {
        exec()?;
    }
    t.ctr().task(&["exec", "--exec-id", &t.id("x"), &id, "no-such-program"]).run()?.expect_failure()?;
    t.ctr().task(&["metrics", &id]).ok().context("metrics")?;
    eventually("the shim's descriptors to be as many as before", || {
        let now = proc::open_files(shim)?;
        ensure!(now <= before, "{now}, before: {before}");
        Ok(())
    })
}
