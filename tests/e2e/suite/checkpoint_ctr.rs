//! Checkpoint and restore by `ctr`: the container's fate, files, streams and limits.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::events::{Events, position, topics};
use e2e::pty::Pty;
use e2e::target::{Containerd, Shim, Target};
use e2e::{Case, Test, case, cgroup, ensure_eq, ensure_has, eventually, proc};
use serde_json::Value;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(a_running_task_runs_on_after_its_checkpoint),
        case!(a_paused_task_stays_paused_after_its_checkpoint),
        case!(a_checkpoint_can_go_into_a_folder),
        case!(a_checkpoint_that_exits_ends_the_task),
        case!(a_checkpoint_that_exits_is_told_as_an_exit),
        case!(a_stopped_task_has_no_checkpoint),
        case!(a_container_without_a_task_has_no_checkpoint),
        case!(a_restored_container_goes_on_where_it_was),
        case!(a_restored_container_has_the_files_that_it_wrote),
        case!(a_restored_container_is_paused_killed_and_deleted_as_before),
        case!(a_restored_container_can_have_the_old_id),
        case!(a_restored_container_has_its_limits),
        case!(a_restored_container_has_stats).except_target(STOCK_2_4, NO_STATS),
        case!(a_restored_container_out_of_memory_is_told).except_target(STOCK_2_4, NO_STATS),
        case!(a_restored_container_prints_to_its_new_streams),
        case!(a_restored_container_reads_its_new_stdin),
        case!(a_restored_container_has_a_terminal),
        case!(a_restore_is_told_as_a_creation_and_a_start),
        case!(a_restore_under_an_id_in_use_is_refused),
        case!(the_state_can_be_asked_during_a_dump)
            .alone()
            .except(Shim::Stock, "runc's shim answers nothing while it dumps: containerd gives up after two seconds"),
    ]
}

/// A target without some tests of restored containers, and the reason.
pub(crate) const STOCK_2_4: Target = Target { containerd: Containerd::V2_4, shim: Shim::Stock };
pub(crate) const NO_STATS: &str =
    "the shim of containerd 2.4.2 tells no stats and no lack of memory of what it has restored";

/// Begin of scripts: `tick` pauses without starting a program. A process that waits for its vfork
/// cannot be dumped, and busybox's shell starts every program so.
pub(crate) const TICK: &str =
    "[ -p /tmp/tick ] || mkfifo /tmp/tick; exec 3<>/tmp/tick; tick() { read -t 0.05 word <&3; }; ";

/// A script with `tick`.
pub(crate) fn ticking(script: &str) -> String {
    format!("{TICK}{script}")
}

/// Script that counts in a file of the writable layer.
pub(crate) const COUNT: &str = "trap 'exit 9' TERM; i=0; while :; do i=$((i+1)); echo $i >/count; tick; done";

/// Current count.
pub(crate) fn count(t: &Test, id: &str) -> Result<u64> {
    // The file is empty for a moment each time.
    eventually("a number in /count", || Ok(t.ctr().exec_prints(id, "cat /count")?.parse()?))
}

/// Waits for a higher count, and returns the count.
pub(crate) fn counts_past(t: &Test, id: &str, from: u64) -> Result<u64> {
    eventually(&format!("{id} to count past {from}"), || {
        let now = count(t, id)?;
        ensure!(now > from, "still {now}");
        Ok(now)
    })
}

/// Starts a counting container, and waits for the first count.
pub(crate) fn start_counting(t: &Test, id: &str, options: &[&str]) -> Result<u64> {
    t.ctr().start(id, options, &["sh", "-c", &ticking(COUNT)])?;
    counts_past(t, id, 3)
}

fn a_running_task_runs_on_after_its_checkpoint(t: &Test) -> Result<()> {
    let id = t.id("c");
    let before = start_counting(t, &id, &[])?;
    let init = t.ctr().pid(&id)?;
    for _ in 0..2 {
        let out = t.ctr().checkpoint_task(&id, &[]).ok()?;
        ensure_has!(out.text(), id);
        ensure_eq!(t.ctr().status(&id)?, "RUNNING");
        t.ctr().remove_checkpoints(&id).ok()?;
    }
    ensure_eq!(t.ctr().pid(&id)?, init);
    counts_past(t, &id, before)?;
    t.ctr().kill(&id, "SIGTERM")?;
    t.ctr().becomes(&id, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&id)?, 9);
    Ok(())
}

fn a_paused_task_stays_paused_after_its_checkpoint(t: &Test) -> Result<()> {
    let id = t.id("c");
    start_counting(t, &id, &[])?;
    t.ctr().task(&["pause", &id]).ok()?;
    let folder = t.folder()?.join("image").to_string_lossy().into_owned();
    t.ctr().checkpoint_task(&id, &["--image-path", &folder]).ok()?;
    t.ctr().remove_checkpoints(&id).ok()?;
    t.ctr().checkpoint_task(&id, &[]).ok()?;
    ensure_eq!(t.ctr().status(&id)?, "PAUSED");
    ensure!(cgroup::frozen(t.ctr().pid(&id)?)?, "its cgroup is not frozen");
    t.ctr().task(&["resume", &id]).ok()?;
    let now = count(t, &id)?;
    counts_past(t, &id, now).map(drop)
}

fn a_checkpoint_can_go_into_a_folder(t: &Test) -> Result<()> {
    let id = t.id("c");
    let before = start_counting(t, &id, &[])?;
    let (image, work) = (t.folder()?.join("image"), t.folder()?.join("work"));
    let options = ["--image-path", &image.to_string_lossy(), "--work-path", &work.to_string_lossy()];
    t.ctr().checkpoint_task(&id, &options).ok()?;
    for file in ["inventory.img", "pstree.img", "core-1.img", "pages-1.img", "descriptors.json"] {
        ensure!(image.join(file).is_file(), "no {file} in {}", listing(&image)?);
    }
    ensure!(work.join("dump.log").is_file(), "no dump.log in {}", listing(&work)?);
    ensure!(!image.join("dump.log").exists(), "the log is among the images");
    counts_past(t, &id, before).map(drop)
}

fn listing(folder: &std::path::Path) -> Result<String> {
    let names = fs::read_dir(folder).with_context(|| folder.display().to_string())?.flatten();
    Ok(names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>().join(" "))
}

fn a_checkpoint_that_exits_ends_the_task(t: &Test) -> Result<()> {
    for into_folder in [true, false] {
        let id = t.id("c");
        start_counting(t, &id, &[])?;
        let init = t.ctr().pid(&id)?;
        let folder = t.folder()?.join(&id).to_string_lossy().into_owned();
        let options = ["--exit", "--image-path", &folder];
        t.ctr().checkpoint_task(&id, if into_folder { &options } else { &options[..1] }).ok()?;
        t.ctr().becomes(&id, "STOPPED")?;
        proc::gone(init)?;
        ensure_eq!(t.ctr().delete_task(&id)?, 137);
        // The name and the cgroup are free.
        start_task(t, &id)?;
        t.ctr().remove(&id)?;
    }
    Ok(())
}

/// Starts a container's task anew.
fn start_task(t: &Test, id: &str) -> Result<()> {
    t.ctr().task(&["start", "--detach", "--null-io", id]).ok()?;
    counts_past(t, id, 0).map(drop)
}

fn a_checkpoint_that_exits_is_told_as_an_exit(t: &Test) -> Result<()> {
    let id = t.id("c");
    start_counting(t, &id, &[])?;
    let events = Events::subscribe(t)?;
    t.ctr().checkpoint_task(&id, &["--exit"]).ok()?;
    let told = events.of_task_until(&id, "/tasks/exit")?;
    let exits: Vec<_> = told.iter().filter(|event| event.topic == "/tasks/exit").collect();
    ensure_eq!(exits.iter().map(|event| event.exit_status()).collect::<Vec<_>>(), [137], "{told:?}");
    ensure_eq!(exits[0].field("id"), id);
    Ok(())
}

fn a_stopped_task_has_no_checkpoint(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start(&id, &[], &["true"])?;
    t.ctr().becomes(&id, "STOPPED")?;
    t.ctr().checkpoint_task(&id, &[]).run()?.expect_failure()?;
    ensure_eq!(t.ctr().delete_task(&id)?, 0);
    Ok(())
}

fn a_container_without_a_task_has_no_checkpoint(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().create(&id, &["true"])?;
    let out = t.ctr().checkpoint_task(&id, &[]).run()?.expect_failure()?;
    ensure_has!(out.stderr, "not found");
    Ok(())
}

fn a_restored_container_goes_on_where_it_was(t: &Test) -> Result<()> {
    let (old, new, image) = (t.id("old"), t.id("new"), t.id("checkpoint"));
    start_counting(t, &old, &["--env", "WORD=hello"])?;
    t.ctr().checkpoint(&old, &image).ok()?;
    let then = count(t, &old)?;
    // Later counts are lost.
    let end = counts_past(t, &old, then + 20)?;
    t.ctr().remove(&old)?;
    t.ctr().restore(&new, &image).ok()?;
    ensure_eq!(t.ctr().status(&new)?, "RUNNING");
    let first = count(t, &new)?;
    ensure!(first < end, "it goes on at {first}, the old one was at {then} and ended at {end}");
    counts_past(t, &new, first)?;
    ensure_has!(proc::read(t.ctr().pid(&new)?, "environ")?, "WORD=hello");
    ensure_has!(t.ctr().exec_prints(&new, "cat /proc/1/comm; echo $WORD")?, "hello");
    ensure_has!(proc::cmdline(t.ctr().shim(&new)?), new);
    Ok(())
}

fn a_restored_container_has_the_files_that_it_wrote(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    // A file kept open and appended to, a removed one, one in a tmpfs.
    let script =
        "echo before >/file; rm /etc/group; mkdir /folder; ln -s /file /folder/link; echo volatile >/dev/shm/file
        exec 5>>/log; i=0; while :; do i=$((i+1)); echo $i >&5; echo $i >/count; tick; done";
    t.ctr().start(&old, &[], &["sh", "-c", &ticking(script)])?;
    counts_past(t, &old, 3)?;
    t.ctr().moves(&old, &new)?;
    let now = count(t, &new)?;
    counts_past(t, &new, now)?;
    let seen = t.ctr().exec_prints(&new, "cat /folder/link /dev/shm/file; [ ! -e /etc/group ] && echo removed")?;
    ensure_eq!(seen, "before\nvolatile\nremoved");
    // No line of the log is missing or double.
    let log = t.ctr().exec_prints(&new, "cat /log")?;
    for (at, line) in (1..).zip(log.lines()) {
        ensure_eq!(line, at.to_string(), "line {at} of the log");
    }
    Ok(())
}

fn a_restored_container_is_paused_killed_and_deleted_as_before(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    start_counting(t, &old, &[])?;
    t.ctr().moves(&old, &new)?;
    t.ctr().task(&["pause", &new]).ok()?;
    ensure_eq!(t.ctr().status(&new)?, "PAUSED");
    ensure!(cgroup::frozen(t.ctr().pid(&new)?)?, "its cgroup is not frozen");
    t.ctr().task(&["resume", &new]).ok()?;
    let now = count(t, &new)?;
    counts_past(t, &new, now)?;
    t.ctr().exec(&new, &["sh", "-c", "exit 5"]).run()?.expect_code(5)?;
    ensure_has!(t.ctr().task(&["ps", &new]).ok()?.text(), t.ctr().pid(&new)?.to_string());
    let shim = t.ctr().shim(&new)?;
    t.ctr().kill(&new, "SIGTERM")?;
    t.ctr().becomes(&new, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&new)?, 9);
    proc::gone(shim)?;
    // A new task of the same container, without a restore, begins again.
    start_task(t, &new)?;
    t.ctr().remove(&new)
}

fn a_restored_container_can_have_the_old_id(t: &Test) -> Result<()> {
    let id = t.id("c");
    let before = start_counting(t, &id, &[])?;
    t.ctr().moves(&id, &id)?;
    counts_past(t, &id, before)?;
    t.ctr().kill(&id, "SIGTERM")?;
    t.ctr().becomes(&id, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&id)?, 9);
    Ok(())
}

fn a_restored_container_has_its_limits(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    start_counting(t, &old, &["--memory-limit", "50331648", "--cpus", "0.5"])?;
    t.ctr().moves(&old, &new)?;
    let init = t.ctr().pid(&new)?;
    ensure_eq!(cgroup::memory_limit(init)?, 48 << 20);
    ensure_eq!(cgroup::cpu_quota(init)?, (50_000, 100_000));
    // The children are in the same cgroup.
    for child in proc::children(init) {
        if let Ok(folder) = cgroup::folder(child, "memory") {
            ensure_eq!(folder, cgroup::folder(init, "memory")?, "the cgroup of {}", proc::cmdline(child));
        }
    }
    Ok(())
}

fn a_restored_container_has_stats(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    start_counting(t, &old, &[])?;
    t.ctr().moves(&old, &new)?;
    let cpu = || -> Result<u64> {
        let metrics = t.ctr().metrics(&new)?;
        let number = |path| metrics.pointer(path).and_then(Value::as_u64);
        number("/cpu/usage/total").or(number("/cpu/usage_usec")).with_context(|| metrics.to_string())
    };
    let first = cpu()?;
    eventually("processor time to grow", || {
        let now = cpu()?;
        ensure!(now > first, "still {now}");
        Ok(())
    })
}

fn a_restored_container_out_of_memory_is_told(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    // The trap lets init, a script, outlive its child.
    let script = "i=0; while [ ! -e /go ]; do i=$((i+1)); echo $i >/count; tick; done; exec tail /dev/zero";
    t.ctr().start(&old, &["--memory-limit", "33554432"], &["sh", "-c", &ticking(script)])?;
    counts_past(t, &old, 3)?;
    t.ctr().moves(&old, &new)?;
    let events = Events::subscribe(t)?;
    t.ctr().exec(&new, &["touch", "/go"]).run()?;
    events.of_task_until(&new, "/tasks/oom")?;
    t.ctr().becomes(&new, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&new)?, 137);
    Ok(())
}

const PRINT: &str = "i=0; while :; do i=$((i+1)); echo line $i; echo error $i >&2; echo $i >/count; tick; done";

fn a_restored_container_prints_to_its_new_streams(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    t.ctr().run(&old, &["--detach"], &["sh", "-c", &ticking(PRINT)]).ok()?;
    let before = counts_past(t, &old, 3)?;
    t.ctr().moves(&old, &new)?;
    let client = t.ctr().task(&["attach", &new]).spawn()?;
    client.sees(&format!("line {}\n", before + 10))?;
    client.sees_error(&format!("error {}\n", before + 20))
}

fn a_restored_container_reads_its_new_stdin(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    let script = "echo ready >/count; while read line; do echo got $line; done; exit 5";
    t.ctr().run(&old, &["--detach"], &["sh", "-c", script]).ok()?;
    eventually("it to read", || {
        ensure_eq!(t.ctr().exec_prints(&old, "cat /count")?, "ready");
        Ok(())
    })?;
    t.ctr().moves(&old, &new)?;
    let mut client = t.ctr().task(&["attach", &new]).spawn()?;
    client.write(b"hello\n")?;
    client.sees("got hello")
}

fn a_restored_container_has_a_terminal(t: &Test) -> Result<()> {
    let (old, new, image) = (t.id("old"), t.id("new"), t.id("checkpoint"));
    let script =
        "n=0; while read line; do n=$((n+1)); echo \"$n: $line\"; stty size; [ \"$line\" != bye ] || exit 6; done";
    let mut pty = Pty::spawn(&t.ctr().run(&old, &["--tty"], &["sh", "-c", script]), 31, 91)?;
    has_size(&mut pty, "31 91")?;
    t.ctr().checkpoint(&old, &image).ok()?;
    t.ctr().remove(&old)?;
    drop(pty);
    let mut pty = Pty::spawn(&t.ctr().restore(&new, &image), 44, 132)?;
    has_size(&mut pty, "44 132")?;
    eventually("a terminal of size 25 80", || {
        // ctr does not yet listen for the next size after the first one.
        pty.resize(24, 80)?;
        pty.resize(25, 80)?;
        asks_size(&mut pty, "25 80")
    })?;
    let begins_again = pty.screen().split(['\r', '\n']).any(|line| line.starts_with("1: "));
    ensure!(!begins_again, "it began again: {:?}", pty.screen());
    ensure_has!(t.ctr().exec_prints(&new, "readlink /proc/1/fd/0")?, "/dev/pts/0");
    pty.types("bye\n")?;
    pty.shows(": bye")?;
    // Like `ctr run`, the client waits for the end of its output on a terminal.
    ensure_eq!(pty.wait()?.0, 6);
    Ok(())
}

/// Asks until the answer matches: the client sends the size after the container's start.
fn has_size(pty: &mut Pty, size: &str) -> Result<()> {
    eventually(&format!("a terminal of size {size}"), || asks_size(pty, size))
}

fn asks_size(pty: &mut Pty, size: &str) -> Result<()> {
    pty.types("size\n")?;
    std::thread::sleep(Duration::from_millis(100));
    ensure_has!(pty.screen(), size);
    Ok(())
}

fn a_restore_is_told_as_a_creation_and_a_start(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    start_counting(t, &old, &[])?;
    let events = Events::subscribe(t)?;
    t.ctr().moves(&old, &new)?;
    let told = events.of_task_until(&new, "/tasks/start")?;
    let create = position(&told, "creation", |event| event.topic == "/tasks/create")?;
    let start = position(&told, "start", |event| event.topic == "/tasks/start")?;
    ensure!(create < start, "{:?}", topics(&told));
    ensure_eq!(told[start].body["pid"].as_u64(), Some(u64::from(t.ctr().pid(&new)?)));
    Ok(())
}

fn a_restore_under_an_id_in_use_is_refused(t: &Test) -> Result<()> {
    let (id, image) = (t.id("c"), t.id("checkpoint"));
    let before = start_counting(t, &id, &[])?;
    t.ctr().checkpoint(&id, &image).ok()?;
    t.ctr().restore(&id, &image).run()?.expect_failure()?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    counts_past(t, &id, before).map(drop)
}

fn the_state_can_be_asked_during_a_dump(t: &Test) -> Result<()> {
    let id = t.id("c");
    hold_memory(t, &id, 512)?;
    let folder = t.folder()?.join("image").to_string_lossy().into_owned();
    let dump = t.ctr().checkpoint_task(&id, &["--image-path", &folder]).spawn()?;
    let mut asked = 0;
    while proc::alive(dump.pid()) {
        t.ctr().status(&id)?;
        asked += usize::from(proc::alive(dump.pid()));
    }
    dump.wait()?.expect_code(0)?;
    // A shim that answers only after the dump gives a single answer, too late.
    ensure!(asked > 3, "{asked} answers came during the dump");
    Ok(())
}

/// Starts a counting container with this many megabytes of incompressible memory.
pub(crate) fn hold_memory(t: &Test, id: &str, megabytes: u32) -> Result<u64> {
    hold_memory_with(t, id, &[], megabytes)
}

/// Starts such a container with further options of `ctr run`.
pub(crate) fn hold_memory_with(t: &Test, id: &str, options: &[&str], megabytes: u32) -> Result<u64> {
    let program = format!(
        "import os, time
pages = {megabytes} << 8
memory = bytearray(pages << 12)
for page in range(pages):
    memory[page << 12 : (page << 12) + 8] = page.to_bytes(8, 'little')
count = 0
while True:
    count += 1
    with open('/new', 'w') as file:
        # One page in a hundred is looked at each time, so that damage would end the program.
        for page in range(count % 100, pages, 100):
            assert memory[page << 12 : (page << 12) + 8] == page.to_bytes(8, 'little'), page
        file.write(str(count))
    os.replace('/new', '/count')
    time.sleep(0.02)"
    );
    t.ctr().start_python(id, options, &program)?;
    counts_past(t, id, 3)
}
