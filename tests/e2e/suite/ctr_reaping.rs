//! Zombies, orphans, and leftovers of init.

use anyhow::{Result, ensure};
use e2e::{Case, Test, case, ensure_eq, eventually, proc};

use crate::ctr_exit::IDLE;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(the_shim_has_no_zombie_after_execs),
        case!(orphans_of_a_container_in_the_hosts_pid_namespace_are_reaped),
        case!(orphans_of_an_exec_live_on_in_the_container),
        case!(whatever_init_leaves_in_the_hosts_pid_namespace_is_killed),
        case!(an_init_that_reaps_nothing_ends_all_the_same),
        case!(a_deleted_container_leaves_no_process_mount_or_folder),
    ]
}

/// Joins the namespace through our own process: pid 1's is not open to everybody.
fn host_pids() -> String {
    format!("pid:/proc/{}/ns/pid", std::process::id())
}

fn no_zombie_below(shim: u32) -> Result<()> {
    eventually("the shim to have no zombie", || {
        let zombies: Vec<u32> =
            proc::children(shim).into_iter().filter(|pid| proc::state(*pid).is_ok_and(|s| s == 'Z')).collect();
        ensure!(zombies.is_empty(), "zombies of {}: {zombies:?}", proc::cmdline(shim));
        Ok(())
    })
}

fn the_shim_has_no_zombie_after_execs(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let shim = t.ctr().shim(&id)?;
    let execs = (0..10).map(|_| t.ctr().exec(&id, &["sh", "-c", "sleep 0.1 & true"]).spawn());
    for exec in execs.collect::<Result<Vec<_>>>()? {
        exec.wait()?.expect_code(0)?;
    }
    no_zombie_below(shim)
}

fn orphans_of_a_container_in_the_hosts_pid_namespace_are_reaped(t: &Test) -> Result<()> {
    let id = t.id("c");
    // Without a pid namespace of the container, orphans go to the nearest subreaper: the shim.
    let script = "(sh -c 'sleep 0.1; exit 1' & ) ; (sh -c 'sleep 0.2 & sleep 0.3' & ) ; exec sleep 1000";
    t.ctr().start(&id, &["--with-ns", &host_pids()], &["sh", "-c", script])?;
    let init = t.ctr().pid(&id)?;
    ensure_eq!(proc::namespace(init, "pid")?, proc::own_namespace("pid")?);
    let shim = proc::parent(init)?;
    eventually("init to be the container's last process", || {
        ensure_eq!(proc::children(shim), [init]);
        Ok(())
    })?;
    t.ctr().exec(&id, &["sh", "-c", "(sh -c 'sleep 0.1' & ) ; true"]).ok()?;
    eventually("the exec's orphan to be gone", || {
        ensure_eq!(proc::children(shim), [init]);
        Ok(())
    })
}

fn orphans_of_an_exec_live_on_in_the_container(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let script = "(sh -c 'while [ ! -e /go ]; do sleep 0.05; done; touch /went' & ) ; true";
    t.ctr().exec(&id, &["sh", "-c", &format!("exec >/dev/null 2>&1 </dev/null; {script}")]).ok()?;
    t.ctr().exec(&id, &["touch", "/go"]).ok()?;
    eventually("the orphan to do its work", || t.ctr().exec(&id, &["test", "-e", "/went"]).ok().map(drop))
}

fn whatever_init_leaves_in_the_hosts_pid_namespace_is_killed(t: &Test) -> Result<()> {
    let id = t.id("c");
    let script = "sleep 1000 & echo $! >/left; while [ ! -e /go ]; do sleep 0.05; done; exit 5";
    t.ctr().start(&id, &["--with-ns", &host_pids()], &["sh", "-c", script])?;
    let left: u32 =
        eventually("the child's pid", || Ok(t.ctr().exec(&id, &["cat", "/left"]).ok()?.trimmed().parse()?))?;
    ensure!(proc::alive(left), "the child has gone too early");
    // The exec may be killed before its end, because init ends on this.
    t.ctr().exec(&id, &["touch", "/go"]).run()?;
    t.ctr().becomes(&id, "STOPPED")?;
    proc::gone(left)?;
    ensure_eq!(t.ctr().delete_task(&id)?, 5);
    Ok(())
}

fn an_init_that_reaps_nothing_ends_all_the_same(t: &Test) -> Result<()> {
    let id = t.id("c");
    // sleep never waits, so these children stay zombies until its death.
    let script = "for i in 1 2 3 4 5; do sleep 0.01 & done; exec sleep 1000";
    t.ctr().start(&id, &[], &["sh", "-c", script])?;
    let init = t.ctr().pid(&id)?;
    eventually("five zombies in the container", || {
        let zombies = proc::children(init).into_iter().filter(|pid| proc::state(*pid).is_ok_and(|s| s == 'Z')).count();
        ensure_eq!(zombies, 5);
        Ok(())
    })?;
    let shim = proc::parent(init)?;
    t.ctr().kill(&id, "SIGKILL")?;
    t.ctr().becomes(&id, "STOPPED")?;
    no_zombie_below(shim)?;
    ensure_eq!(t.ctr().delete_task(&id)?, 137);
    Ok(())
}

fn a_deleted_container_leaves_no_process_mount_or_folder(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let (init, shim) = (t.ctr().pid(&id)?, t.ctr().shim(&id)?);
    let groups: Vec<_> =
        ["memory", "freezer", "devices"].iter().filter_map(|c| e2e::cgroup::folder(init, c).ok()).collect();
    ensure!(!groups.is_empty(), "no cgroup");
    let bundle = t.bed().run_folder().join("io.containerd.runtime.v2.task/default").join(&id);
    ensure!(bundle.join("config.json").exists(), "no bundle at {}", bundle.display());
    t.ctr().remove(&id)?;
    proc::gone(init)?;
    proc::gone(shim)?;
    ensure!(!bundle.exists(), "{} is left", bundle.display());
    for group in groups {
        ensure!(!group.exists(), "{} is left", group.display());
    }
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    ensure!(!mounts.contains(&id), "a mount is left: {mounts}");
    Ok(())
}
