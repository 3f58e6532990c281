use std::io::Read;
use std::process::Stdio;

use super::*;

fn sh(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

/// Returns state and parent of a process, from `pid (name) state parent ...`.
fn stat(pid: i32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn is_zombie(pid: i32) -> bool {
    stat(pid).is_some_and(|(state, _)| state == 'Z')
}

/// Returns whether a child is still unreaped. The existence of the pid proves little: on a busy
/// machine another process may have it.
fn is_child(pid: i32) -> bool {
    stat(pid).is_some_and(|(_, parent)| parent == std::process::id())
}

/// Polls for an effect of another process; hangs (and is killed by the harness) without one.
async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

// The tests of one process share its children: sub-reaping and P_ALL are per process, so all run as
// one.
#[tokio::test]
async fn every_exit_is_seen_once_and_by_everyone_who_waits() {
    rustix::process::set_child_subreaper(Pid::from_raw(1)).unwrap();
    let reaper = Reaper::start().unwrap();

    exit_codes_and_signals_are_reported(&reaper).await;
    many_children_ending_at_once_keep_their_codes(&reaper).await;
    an_orphan_that_nobody_knows_is_reaped(&reaper).await;
    an_orphan_that_died_early_is_adopted_with_its_status(&reaper).await;
    a_dead_child_refuses_signals(&reaper).await;
    a_child_that_cannot_be_watched_is_killed_and_reaped(&reaper).await;
    children_have_the_limit_on_descriptors_that_this_process_was_started_with(&reaper).await;
}

async fn a_child_that_cannot_be_watched_is_killed_and_reaped(reaper: &Reaper) {
    let pid = std::cell::Cell::new(0);
    let refused = reaper.spawn_opened(&mut sh("exec sleep 1000"), |child| {
        pid.set(child.as_raw_nonzero().get());
        Err(rustix::io::Errno::MFILE.into())
    });
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(rustix::io::Errno::MFILE.raw_os_error()));
    until(|| !is_child(pid.get())).await;
}

async fn exit_codes_and_signals_are_reported(reaper: &Reaper) {
    assert_eq!(reaper.spawn(&mut sh("exit 42")).unwrap().wait().await.code, 42);
    let killed = reaper.spawn(&mut sh("kill -9 $$")).unwrap();
    assert_eq!(killed.wait().await.code, 137);
    assert_eq!(killed.clone().wait().await.code, 137, "a second waiter gets the same answer");
}

async fn many_children_ending_at_once_keep_their_codes(reaper: &Reaper) {
    let children: Vec<_> =
        (0..50).map(|code| (code, reaper.spawn(&mut sh(&format!("exit {code}"))).unwrap())).collect();
    for (code, child) in children {
        assert_eq!(child.wait().await.code, code);
    }
}

/// Spawns a shell that leaves an orphan running `script`, and returns the orphan's pid. The child
/// waits to be an orphan: the shell would reap a faster one.
async fn orphan(reaper: &Reaper, script: &str) -> i32 {
    let (mut read, write) = std::io::pipe().unwrap();
    let wait = "while kill -0 $$ 2>/dev/null; do sleep 0.01; done";
    let mut command = sh(&format!("({wait}; {script}) >/dev/null & echo $!"));
    command.stdout(Stdio::from(write));
    let parent = reaper.spawn(&mut command).unwrap();
    drop(command);
    let mut pid = String::new();
    read.read_to_string(&mut pid).unwrap();
    parent.wait().await;
    pid.trim().parse().unwrap()
}

async fn an_orphan_that_nobody_knows_is_reaped(reaper: &Reaper) {
    let pid = orphan(reaper, "exit 3").await;
    until(|| !is_child(pid)).await;
}

async fn an_orphan_that_died_early_is_adopted_with_its_status(reaper: &Reaper) {
    let adoption = reaper.adoption();
    let pid = orphan(reaper, "exit 7").await;
    until(|| is_zombie(pid)).await;
    // Another child's SIGCHLD must not remove the orphan.
    reaper.spawn(&mut sh("exit 0")).unwrap().wait().await;
    let child = adoption.adopt(pid).unwrap();
    drop(adoption);
    assert_eq!(child.wait().await.code, 7);
    assert!(!is_child(pid));
}

async fn a_dead_child_refuses_signals(reaper: &Reaper) {
    let child = reaper.spawn(&mut sh("exit 0")).unwrap();
    child.wait().await;
    assert_eq!(child.signal(Signal::KILL).unwrap_err().raw_os_error(), Some(3));
}

async fn children_have_the_limit_on_descriptors_that_this_process_was_started_with(reaper: &Reaper) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let original = limit.current.unwrap_or(1 << 20) - 1;
    setrlimit(Resource::Nofile, Rlimit { current: Some(original), ..limit }).unwrap();
    raise_descriptor_limit().unwrap();
    assert_eq!(getrlimit(Resource::Nofile).current, limit.maximum);
    let script = format!("[ \"$(ulimit -Sn)\" = {original} ]");
    assert_eq!(reaper.spawn(&mut sh(&script)).unwrap().wait().await.code, 0);
}
