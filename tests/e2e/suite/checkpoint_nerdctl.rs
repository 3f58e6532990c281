//! Checkpoint and restore by `nerdctl`.

use anyhow::{Context, Result, ensure};
use e2e::target::Shim;
use e2e::{Case, Cmd, Test, case, cgroup, ensure_eq, ensure_has, eventually, lines, proc};

use crate::checkpoint_ctr::{NO_STATS, STOCK_2_4, ticking};
use crate::nerdctl_life::nerdctl_cases;

pub(crate) fn cases() -> Vec<Case> {
    let no_switch = "nerdctl tells this runtime's name to end the container";
    nerdctl_cases(vec![
        case!(a_checkpoint_ends_the_container_and_a_start_from_it_goes_on),
        case!(a_checkpoint_can_leave_the_container_running),
        case!(without_the_annotation_a_checkpoint_leaves_the_container_running)
            .except(Shim::Stock, no_switch)
            .except(Shim::AsRunc, no_switch),
        case!(checkpoints_are_listed_and_removed),
        case!(checkpoints_have_a_folder_of_their_own_by_default),
        case!(a_checkpoint_can_be_restored_twice),
        case!(a_restored_container_works_with_every_nerdctl_command).except_target(STOCK_2_4, NO_STATS),
        case!(logs_continue_after_a_restore),
        case!(a_restored_container_on_a_bridge_has_its_network),
        case!(a_container_checkpointed_by_ctr_into_a_folder_starts_from_there),
        case!(a_restored_container_can_be_checkpointed_for_20_generations).alone(),
    ])
}

/// Script that counts on stdout, so that a restart would show.
const COUNT: &str = "trap 'exit 7' TERM; i=0; while :; do i=$((i+1)); echo line $i; tick; done";

/// Starts a counting container that ends at a checkpoint.
fn start_counting(t: &Test, name: &str, options: &[&str]) -> Result<()> {
    let options = [t.nerdctl().ends_on_checkpoint(), options].concat();
    t.nerdctl().start_sh(name, &options, &ticking(COUNT))?;
    t.nerdctl().logs_have(name, "line 3\n")
}

/// The last number in the log; fails unless all earlier numbers are there, once, in order.
fn counted(t: &Test, name: &str) -> Result<u64> {
    let log = t.nerdctl().logs(name)?.0;
    for (at, line) in (1..).zip(lines(&log)) {
        ensure_eq!(line, format!("line {at}"), "in the log of {name}");
    }
    Ok(log.lines().count() as u64)
}

fn counts_on(t: &Test, name: &str) -> Result<()> {
    let before = t.nerdctl().logs(name)?.0.lines().count();
    eventually("the log to grow", || {
        let now = t.nerdctl().logs(name)?.0.lines().count();
        ensure!(now > before + 3, "still {now} lines");
        Ok(())
    })
}

fn a_checkpoint_ends_the_container_and_a_start_from_it_goes_on(t: &Test) -> Result<()> {
    let name = t.id("c");
    start_counting(t, &name, &[])?;
    let init = t.nerdctl().pid(&name)?;
    ensure_eq!(t.nerdctl().checkpoint(&name, "one", &[])?.ok()?.trimmed(), "one");
    ensure_eq!(t.nerdctl().exit_code(&name)?, 137);
    proc::gone(init)?;
    let before = counted(t, &name)?;
    t.nerdctl().restored(&name, "one")?;
    t.nerdctl().becomes(&name, "running")?;
    // Neither from the start, nor with a gap.
    counts_on(t, &name)?;
    ensure!(counted(t, &name)? > before, "it stands still at {before}");
    t.nerdctl().cmd(&["stop", &name]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 7);
    Ok(())
}

fn a_checkpoint_can_leave_the_container_running(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], &ticking(COUNT))?;
    t.nerdctl().logs_have(&name, "line 3\n")?;
    let init = t.nerdctl().pid(&name)?;
    t.nerdctl().checkpoint(&name, "one", &["--leave-running"])?.ok()?;
    ensure_eq!(t.nerdctl().pid(&name)?, init);
    counts_on(t, &name)?;
    // Starting a running container has no effect.
    t.nerdctl().restored(&name, "one")?;
    ensure_eq!(t.nerdctl().pid(&name)?, init);
    t.nerdctl().cmd(&["kill", &name]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 137);
    // The log of the running container stays; the restored one begins at the checkpoint.
    let end = t.nerdctl().logs(&name)?.0.lines().count();
    t.nerdctl().restored(&name, "one")?;
    let first = eventually("the restored container's first line", || {
        t.nerdctl().logs(&name)?.0.lines().nth(end).context("no line yet").map(str::to_owned)
    })?;
    let first: usize = first.trim_start_matches("line ").parse().with_context(|| first.clone())?;
    ensure!(first > 3 && first <= end + 1, "it goes on at {first}; it had reached {end} after the checkpoint");
    Ok(())
}

fn without_the_annotation_a_checkpoint_leaves_the_container_running(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], &ticking(COUNT))?;
    t.nerdctl().logs_have(&name, "line 3\n")?;
    let init = t.nerdctl().pid(&name)?;
    t.nerdctl().checkpoint(&name, "one", &[])?.ok()?;
    ensure_eq!(t.nerdctl().pid(&name)?, init);
    counts_on(t, &name)
}

fn checkpoints_are_listed_and_removed(t: &Test) -> Result<()> {
    let name = t.id("c");
    // Without the annotation: with it the container would end at a checkpoint, whatever nerdctl is
    // told.
    t.nerdctl().start_sh(&name, &[], &ticking(COUNT))?;
    t.nerdctl().logs_have(&name, "line 3\n")?;
    t.nerdctl().checkpoint(&name, "first", &["--leave-running"])?.ok()?;
    t.nerdctl().checkpoint(&name, "second", &["--leave-running"])?.ok()?;
    let folder = t.nerdctl().checkpoints()?.to_string_lossy().into_owned();
    let list = || -> Result<String> {
        Ok(t.nerdctl().cmd(&["checkpoint", "ls", "--checkpoint-dir", &folder, &name]).ok()?.text())
    };
    let text = list()?;
    ensure_eq!(lines(&text).get(1..), Some(&["first", "second"][..]), "{text}");
    t.nerdctl().cmd(&["checkpoint", "rm", "--checkpoint-dir", &folder, &name, "first"]).ok()?;
    let text = list()?;
    ensure_eq!(lines(&text).get(1..), Some(&["second"][..]), "{text}");
    ensure!(!t.nerdctl().checkpoints()?.join("first").exists(), "its files are still there");
    Ok(())
}

fn checkpoints_have_a_folder_of_their_own_by_default(t: &Test) -> Result<()> {
    // nerdctl has one list of names for all containers.
    let (name, checkpoint) = (t.id("c"), t.id("checkpoint"));
    start_counting(t, &name, &[])?;
    t.at_end(t.nerdctl().cmd(&["checkpoint", "rm", &name, &checkpoint]));
    t.nerdctl().cmd(&["checkpoint", "create", &name, &checkpoint]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 137);
    ensure_has!(t.nerdctl().cmd(&["checkpoint", "ls", &name]).ok()?.text(), checkpoint);
    t.nerdctl().cmd(&["start", "--checkpoint", &checkpoint, &name]).ok()?;
    counts_on(t, &name)?;
    counted(t, &name).map(drop)
}

fn a_checkpoint_can_be_restored_twice(t: &Test) -> Result<()> {
    let name = t.id("c");
    let options = t.nerdctl().ends_on_checkpoint();
    t.nerdctl().start_sh(
        &name,
        options,
        &ticking("i=0; while :; do i=$((i+1)); echo $i >/dev/shm/count; tick; done"),
    )?;
    let count = || -> Result<u64> {
        eventually("a number", || Ok(t.nerdctl().exec_prints(&name, "cat /dev/shm/count")?.parse()?))
    };
    let reaches = |goal| {
        eventually(&format!("it to count to {goal}"), || {
            ensure!(count()? >= goal, "{}", count()?);
            Ok(())
        })
    };
    reaches(5)?;
    t.nerdctl().checkpoint(&name, "one", &[])?.ok()?;
    for _ in 0..2 {
        t.nerdctl().becomes(&name, "exited")?;
        t.nerdctl().restored(&name, "one")?;
        let first = count()?;
        ensure!((5..60).contains(&first), "it goes on at {first}");
        reaches(first + 40)?;
        t.nerdctl().cmd(&["kill", &name]).ok()?;
    }
    Ok(())
}

fn a_restored_container_works_with_every_nerdctl_command(t: &Test) -> Result<()> {
    let name = t.id("c");
    start_counting(t, &name, &["--memory", "64m"])?;
    t.nerdctl().checkpoint(&name, "one", &[])?.ok()?;
    t.nerdctl().becomes(&name, "exited")?;
    t.nerdctl().restored(&name, "one")?;
    ensure_eq!(t.nerdctl().exec_prints(&name, "echo works")?, "works");
    ensure_has!(t.nerdctl().cmd(&["top", &name]).ok()?.text(), "sh -c");
    ensure_has!(t.nerdctl().cmd(&["stats", "--no-stream", &name]).ok()?.text(), "64MiB");
    let init = t.nerdctl().pid(&name)?;
    ensure_eq!(cgroup::memory_limit(init)?, 64 << 20);
    t.nerdctl().cmd(&["update", "--memory", "96m", &name]).ok()?;
    ensure_eq!(cgroup::memory_limit(init)?, 96 << 20);
    t.nerdctl().cmd(&["pause", &name]).ok()?;
    t.nerdctl().becomes(&name, "paused")?;
    t.nerdctl().cmd(&["unpause", &name]).ok()?;
    counts_on(t, &name)?;
    t.nerdctl().cmd(&["stop", &name]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 7);
    // An ordinary start begins again.
    t.nerdctl().cmd(&["start", &name]).ok()?;
    eventually("it to begin again", || {
        let log = t.nerdctl().logs(&name)?.0;
        ensure_eq!(lines(&log).iter().filter(|line| **line == "line 1").count(), 2);
        Ok(())
    })
}

fn logs_continue_after_a_restore(t: &Test) -> Result<()> {
    let name = t.id("c");
    let script = "i=0; while :; do i=$((i+1)); echo out $i; echo err $i >&2; tick; done";
    t.nerdctl().start_sh(&name, t.nerdctl().ends_on_checkpoint(), &ticking(script))?;
    for round in 1..4 {
        t.nerdctl().logs_have(&name, &format!("out {}\n", round * 15))?;
        let checkpoint = format!("c{round}");
        t.nerdctl().checkpoint(&name, &checkpoint, &[])?.ok()?;
        t.nerdctl().becomes(&name, "exited")?;
        t.nerdctl().restored(&name, &checkpoint)?;
    }
    t.nerdctl().logs_have(&name, "out 80\n")?;
    let (out, err) = t.nerdctl().logs(&name)?;
    for (text, word) in [(out, "out"), (err, "err")] {
        for (at, line) in (1..).zip(lines(&text)) {
            ensure_eq!(line, format!("{word} {at}"));
        }
    }
    Ok(())
}

fn a_restored_container_on_a_bridge_has_its_network(t: &Test) -> Result<()> {
    let name = t.id("c");
    let script = "ip -4 addr show eth0; while :; do echo hello | nc -l -p 8080; done";
    let options = [t.nerdctl().ends_on_checkpoint(), &["--net", "bridge"]].concat();
    t.nerdctl().start_sh(&name, &options, script)?;
    let answers = || {
        eventually("the server to answer", || {
            let all = t.nerdctl().inspect(&name)?;
            let address = all.pointer("/NetworkSettings/IPAddress").and_then(|a| a.as_str()).context("no address")?;
            let client = format!("exec 3<>/dev/tcp/{address}/8080; cat <&3");
            ensure_eq!(Cmd::new("bash").args(&["-c", &client]).stdin_null().ok()?.trimmed(), "hello");
            Ok(())
        })
    };
    answers()?;
    t.nerdctl().checkpoint(&name, "one", &[])?.ok()?;
    t.nerdctl().becomes(&name, "exited")?;
    t.nerdctl().restored(&name, "one")?;
    ensure_has!(t.nerdctl().exec_prints(&name, "ip -4 addr show eth0")?, "inet 10.");
    answers()
}

fn a_container_checkpointed_by_ctr_into_a_folder_starts_from_there(t: &Test) -> Result<()> {
    let name = t.id("c");
    start_counting(t, &name, &[])?;
    let id = t.nerdctl().id(&name)?;
    let folder = t.nerdctl().checkpoints()?.join("one").to_string_lossy().into_owned();
    t.ctr().checkpoint_task(&id, &["--exit", "--image-path", &folder]).ok()?;
    t.nerdctl().becomes(&name, "exited")?;
    t.nerdctl().restored(&name, "one")?;
    counts_on(t, &name)?;
    counted(t, &name).map(drop)
}

fn a_restored_container_can_be_checkpointed_for_20_generations(t: &Test) -> Result<()> {
    let name = t.id("c");
    start_counting(t, &name, &[])?;
    for generation in 1..=20 {
        let checkpoint = format!("generation-{generation}");
        let step = || -> Result<()> {
            t.nerdctl().checkpoint(&name, &checkpoint, &[])?.ok()?;
            t.nerdctl().becomes(&name, "exited")?;
            t.nerdctl().restored(&name, &checkpoint)?;
            counts_on(t, &name)
        };
        step().with_context(|| checkpoint.clone())?;
    }
    counted(t, &name).map(drop)
}
