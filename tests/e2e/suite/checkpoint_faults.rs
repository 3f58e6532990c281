//! Checkpoints and restores that cannot work, and programs that die in the middle of one.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::target::Shim;
use e2e::{Case, Output, Running, Test, case, cgroup, ensure_eq, ensure_has, eventually, lines, proc};
use rustix::process::Signal;

use crate::checkpoint_ctr::{count, counts_past, hold_memory, start_counting, ticking};
use crate::checkpoint_workloads::forget_unpacked;
use crate::nerdctl_life::nerdctl_cases;

pub(crate) fn cases() -> Vec<Case> {
    let hangs = "CRIU waits for ever for pages that a short file does not have, and runc with it";
    let restores = nerdctl_cases(vec![
        case!(a_restore_from_an_empty_folder_fails_and_a_second_try_works),
        case!(a_restore_from_foreign_files_fails_and_a_second_try_works),
        case!(a_restore_from_a_truncated_process_fails_and_a_second_try_works),
        case!(a_restore_from_truncated_pages_fails_and_a_second_try_works).except(Shim::Stock, hangs),
        case!(a_restore_without_a_processs_file_fails_and_a_second_try_works),
        case!(a_restore_from_a_folder_that_does_not_exist_fails_and_a_second_try_works),
        case!(a_criu_that_is_killed_while_it_restores_leaves_nothing_and_a_second_try_works)
            .alone()
            .except(Shim::Stock, "runc leaves the processes that CRIU had made, and nobody knows them"),
        case!(a_shim_that_is_killed_while_it_restores_leaves_nothing_and_a_second_try_works).alone().except(
            Shim::Stock,
            "runc keeps the state of the unfinished restore, so that a second try finds the id in use",
        ),
    ]);
    let dumps = vec![
        case!(an_established_connection_is_named_and_the_container_runs_on),
        case!(an_external_unix_socket_is_named_and_the_container_runs_on),
        case!(io_uring_is_refused_and_the_container_runs_on),
        case!(a_prepared_container_does_without_what_cannot_be_saved)
            .except(Shim::Stock, "runc's shim prepares nothing")
            .except(Shim::GpusnapRunc, "runc reads the configuration itself: nothing is prepared"),
        case!(an_image_folder_that_cannot_be_made_is_named_and_the_container_runs_on),
        case!(without_criu_a_checkpoint_says_so_and_the_container_runs_on).alone(),
        case!(a_criu_that_is_too_old_is_named_and_the_container_runs_on)
            .alone()
            .except(Shim::Stock, "runc does not ask for CRIU's version unless it needs a feature"),
        case!(a_criu_that_is_killed_while_it_dumps_leaves_the_container_running).alone(),
        case!(a_runtime_that_is_killed_while_it_dumps_leaves_the_container_running)
            .alone()
            .except(Shim::Stock, "criu outlives runc, and freezes the container again when containerd has resumed it"),
        case!(a_runtime_that_is_killed_while_it_restores_leaves_nothing)
            .alone()
            .except(Shim::Stock, "runc's shim answers that the restore failed while criu goes on with it"),
        case!(a_shim_that_is_killed_while_it_dumps_is_cleaned_up).alone(),
        case!(a_client_that_is_killed_while_it_dumps_leaves_the_container_running).alone(),
    ];
    restores.into_iter().chain(dumps).collect()
}

/// Fails unless the command failed with a helpful message: short, and with this word.
fn clear_error(t: &Test, out: Output, word: &str) -> Result<()> {
    let out = out.expect_failure()?;
    if t.target().shim.is_ours() {
        ensure_has!(out.stderr, word);
        let text = out.stderr.trim();
        ensure!(text.lines().count() <= 3 && text.len() < 2000, "not one clear line: {text}");
    }
    Ok(())
}

/// Checkpoints a container, spoils a copy of the checkpoint, and expects a failed restore from the
/// copy.
fn refused(t: &Test, word: &str, spoil: fn(&Path) -> Result<()>) -> Result<()> {
    let name = t.id("c");
    let script = "trap 'exit 7' TERM; i=0; while :; do i=$((i+1)); echo line $i; tick; done";
    t.nerdctl().start_sh(&name, t.nerdctl().ends_on_checkpoint(), &ticking(script))?;
    t.nerdctl().logs_have(&name, "line 3\n")?;
    let id = t.nerdctl().id(&name)?;
    t.nerdctl().checkpoint(&name, "good", &[])?.ok()?;
    t.nerdctl().becomes(&name, "exited")?;
    let before = t.nerdctl().logs(&name)?.0;
    let bad = t.nerdctl().checkpoints()?.join("bad");
    copy(&t.nerdctl().checkpoints()?.join("good"), &bad)?;
    spoil(&bad)?;
    clear_error(t, t.nerdctl().restore(&name, "bad")?.run()?, word)?;
    nothing_runs(&id)?;
    ensure_eq!(t.nerdctl().logs(&name)?.0, before, "the log");
    t.nerdctl().restored(&name, "good")?;
    t.nerdctl().logs_have(&name, &format!("line {}\n", lines(&before).len() + 3))?;
    t.nerdctl().cmd(&["stop", &name]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 7);
    t.nerdctl().cmd(&["rm", &name]).ok().map(drop)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)?.flatten() {
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Waits until no process is in the cgroup of this container (of containerd's default namespace).
pub(crate) fn nothing_runs(id: &str) -> Result<()> {
    eventually(&format!("no process of {id}"), || {
        let own = format!("/{id}");
        let left: Vec<_> = proc::all()
            .into_iter()
            .filter(|pid| {
                proc::alive(*pid) && proc::read(*pid, "cgroup").is_ok_and(|c| c.lines().any(|l| l.ends_with(&own)))
            })
            .map(|pid| format!("{pid} {}", proc::cmdline(pid)))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

fn shorten(file: &Path, part: u64) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).open(file).with_context(|| file.display().to_string())?;
    Ok(file.set_len(file.metadata()?.len() / part)?)
}

fn empty(folder: &Path) -> Result<()> {
    fs::remove_dir_all(folder)?;
    Ok(fs::create_dir(folder)?)
}

fn a_restore_from_an_empty_folder_fails_and_a_second_try_works(t: &Test) -> Result<()> {
    refused(t, "ctrd-checkpoint", empty)
}

fn a_restore_from_foreign_files_fails_and_a_second_try_works(t: &Test) -> Result<()> {
    refused(t, "ctrd-checkpoint", |folder| {
        empty(folder)?;
        Ok(fs::write(folder.join("readme.txt"), "holiday pictures\n")?)
    })
}

fn a_restore_from_a_truncated_process_fails_and_a_second_try_works(t: &Test) -> Result<()> {
    refused(t, "core-1.img", |folder| shorten(&folder.join("core-1.img"), 20))
}

fn a_restore_from_truncated_pages_fails_and_a_second_try_works(t: &Test) -> Result<()> {
    refused(t, "pages-1.img", |folder| shorten(&folder.join("pages-1.img"), 3))
}

fn a_restore_without_a_processs_file_fails_and_a_second_try_works(t: &Test) -> Result<()> {
    refused(t, "core-1.img", |folder| Ok(fs::remove_file(folder.join("core-1.img"))?))
}

fn a_restore_from_a_folder_that_does_not_exist_fails_and_a_second_try_works(t: &Test) -> Result<()> {
    // nerdctl itself notices.
    refused(t, "bad", |folder| Ok(fs::remove_dir_all(folder)?))
}

/// A container of nerdctl's with much memory, and a checkpoint of it named `good`.
fn with_large_checkpoint(t: &Test, name: &str) -> Result<()> {
    forget_unpacked(t);
    let program = "
import time
memory = bytearray(400 << 20)
for at in range(0, len(memory), 4096):
    memory[at : at + 8] = at.to_bytes(8, 'little')
count = 0
while True:
    count += 1
    print('line', count, flush=True)
    time.sleep(0.05)
";
    // Through the images, which leaves time for a kill of CRIU.
    let slow = ["--detach", "--annotation", "gpusnap.dev/memory=images"];
    let options = [slow.as_slice(), t.nerdctl().ends_on_checkpoint()].concat();
    let id = t.nerdctl().run_image(e2e::PYTHON, name, &options, &["python3", "-c", program]).ok()?.trimmed();
    t.note_id(&id);
    t.nerdctl().logs_have(name, "line 3\n")?;
    t.nerdctl().checkpoint(name, "good", &[])?.ok()?;
    t.nerdctl().becomes(name, "exited")
}

/// The current shim of a container, if there is one.
pub(crate) fn shim_now(id: &str) -> Option<u32> {
    let fits = |pid: &u32| {
        let line = proc::cmdline(*pid);
        line.contains("containerd-shim") && line.contains(id) && proc::parent(*pid).is_ok_and(|parent| parent == 1)
    };
    proc::all().into_iter().find(fits)
}

/// The shim of a container, from its start on.
pub(crate) fn shim_of(id: &str) -> Result<u32> {
    eventually(&format!("the shim of {id}"), || shim_now(id).context("none yet"))
}

/// The oldest process below this one with this beginning of its name.
pub(crate) fn below(ancestor: u32, name: &str) -> Result<u32> {
    let named = |pid: &u32| proc::read(*pid, "comm").is_ok_and(|comm| comm.starts_with(name));
    proc::descendants(ancestor).into_iter().find(named).with_context(|| format!("no {name} below {ancestor}"))
}

/// The shim's child that started this CRIU: runc, or CRIU itself.
fn begun_by(shim: u32, criu: u32) -> Result<u32> {
    let leads = |pid: &u32| *pid == criu || proc::descendants(*pid).contains(&criu);
    proc::children(shim).into_iter().find(leads).context("no child of the shim leads to CRIU")
}

/// Starts a restore of much memory, calls `kill` with the shim when CRIU restores, and expects no
/// leftovers.
fn killed_restore(t: &Test, kill: fn(u32) -> Result<()>) -> Result<()> {
    let name = t.id("c");
    with_large_checkpoint(t, &name)?;
    let id = t.nerdctl().id(&name)?;
    let before = t.nerdctl().logs(&name)?.0;
    let client = t.nerdctl().restore(&name, "good")?.spawn()?;
    eventually("CRIU to restore", || {
        ensure!(proc::alive(client.pid()), "it is over: {} {}", client.stdout(), client.stderr());
        let shim = shim_of(&id)?;
        below(shim, "criu")?;
        kill(shim)
    })?;
    client.wait()?.expect_failure()?;
    nothing_runs(&id)?;
    ensure_eq!(t.nerdctl().logs(&name)?.0, before, "the log");
    t.nerdctl().restored(&name, "good")?;
    t.nerdctl().logs_have(&name, &format!("line {}\n", lines(&before).len() + 3))?;
    t.nerdctl().cmd(&["rm", "--force", &name]).ok()?;
    nothing_runs(&id)
}

fn a_criu_that_is_killed_while_it_restores_leaves_nothing_and_a_second_try_works(t: &Test) -> Result<()> {
    killed_restore(t, |shim| proc::kill(below(shim, "criu")?))
}

fn a_shim_that_is_killed_while_it_restores_leaves_nothing_and_a_second_try_works(t: &Test) -> Result<()> {
    killed_restore(t, proc::kill)
}

/// Checks that the container has not noticed a failed checkpoint, by 10 more steps.
fn runs_on(t: &Test, id: &str) -> Result<()> {
    ensure_eq!(t.ctr().status(id)?, "RUNNING");
    let init = t.ctr().pid(id)?;
    ensure!(!cgroup::frozen(init)?, "its cgroup is frozen");
    ensure_eq!(proc::status(init, "TracerPid")?, "0");
    let now = count(t, id)?;
    counts_past(t, id, now + 10)?;
    ensure_eq!(t.ctr().exec(id, &["sh", "-c", "exit 3"]).run()?.code, 3, "the exit code of an exec");
    Ok(())
}

/// A Python program that sets something up and then counts.
fn counting(setup: &str) -> String {
    format!(
        "import os, time
{setup}
count = 0
while True:
    count += 1
    with open('/new', 'w') as file:
        file.write(str(count))
    os.replace('/new', '/count')
    time.sleep(0.02)"
    )
}

/// Expects a checkpoint to fail for the program's sake, twice: with and without exit.
fn cannot_be_dumped(t: &Test, options: &[&str], setup: &str, word: &str) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_python(&id, options, &counting(setup))?;
    counts_past(t, &id, 3)?;
    for exit in [&["--exit"][..], &[]] {
        clear_error(t, t.ctr().checkpoint_task(&id, exit).run()?, word)?;
        runs_on(t, &id)?;
    }
    t.ctr().remove(&id)
}

fn an_established_connection_is_named_and_the_container_runs_on(t: &Test) -> Result<()> {
    let setup = "
import socket
server = socket.create_server(('127.0.0.1', 0))
client = socket.create_connection(server.getsockname())
served = server.accept()";
    // In the host's network, because an empty one has no loopback.
    cannot_be_dumped(t, &["--net-host", "--annotation", "gpusnap.dev/tcp=refuse"], setup, "127.0.0.1")
}

fn an_external_unix_socket_is_named_and_the_container_runs_on(t: &Test) -> Result<()> {
    let folder = t.folder()?.join("outside");
    fs::create_dir_all(&folder)?;
    let listener = UnixListener::bind(folder.join("service.sock"))?;
    let accepted = std::thread::spawn(move || listener.accept().map(|(stream, _)| (listener, stream)));
    let mount = format!("type=bind,src={},dst=/outside,options=rbind:rw", folder.display());
    let setup = "
import socket
client = socket.socket(socket.AF_UNIX)
client.connect('/outside/service.sock')";
    cannot_be_dumped(t, &["--mount", &mount], setup, "service.sock")?;
    drop(accepted);
    Ok(())
}

fn io_uring_is_refused_and_the_container_runs_on(t: &Test) -> Result<()> {
    let id = t.id("c");
    let setup = "
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
ring = libc.syscall(425, 8, ctypes.create_string_buffer(120))
with open('/ring', 'w') as file:
    file.write(str(ring if ring >= 0 else -ctypes.get_errno()))";
    t.ctr().start_python(&id, &["--annotation", "gpusnap.dev/prepare=none"], &counting(setup))?;
    counts_past(t, &id, 3)?;
    let ring: i64 = t.ctr().exec_prints(&id, "cat /ring")?.parse()?;
    if ring < 0 {
        return Err(e2e::Skip::because(format!("no io_uring here: error {}", -ring)));
    }
    clear_error(t, t.ctr().checkpoint_task(&id, &[]).run()?, "io_uring")?;
    runs_on(t, &id)
}

/// As libuv does: a ring if there are rings, and a server by MPTCP, as Go does.
const WITH_FALLBACKS: &str = "
import ctypes, errno, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    found = libc.syscall(number, *arguments)
    return found if found >= 0 else -ctypes.get_errno()
answers = [call(425, 8, ctypes.create_string_buffer(120)), call(426, 0, 0, 0, 0, 0, 0), call(447, 0)]
try:
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
except OSError as error:
    answers.append(-error.errno)
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
server.bind(('0.0.0.0', 0))
server.listen()
with open('/answers', 'w') as file:
    file.write(' '.join(map(str, answers)))";

fn a_prepared_container_does_without_what_cannot_be_saved(t: &Test) -> Result<()> {
    let (id, to) = (t.id("c"), t.id("c"));
    // Under runc's name only on demand.
    let prepared: &[&str] = match t.target().shim {
        Shim::AsRunc => &["--annotation", "gpusnap.dev/prepare=seccomp"],
        _ => &[],
    };
    t.ctr().start_python(&id, prepared, &counting(WITH_FALLBACKS))?;
    counts_past(t, &id, 3)?;
    // ENOSYS, and EPROTONOSUPPORT.
    ensure_eq!(t.ctr().exec_prints(&id, "cat /answers")?, "-38 -38 -38 -93");
    let in_exec = "python3 -c 'import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.syscall(425, 8, \
                   ctypes.create_string_buffer(120)); print(ctypes.get_errno())'";
    ensure_eq!(t.ctr().exec_prints(&id, in_exec)?, "38");
    t.ctr().moves(&id, &to)?;
    counts_past(t, &to, 3)?;
    Ok(())
}

fn an_image_folder_that_cannot_be_made_is_named_and_the_container_runs_on(t: &Test) -> Result<()> {
    let id = t.id("c");
    start_counting(t, &id, &[])?;
    let folder = format!("{}/image", t.file("a-file", "")?);
    clear_error(t, t.ctr().checkpoint_task(&id, &["--image-path", &folder]).run()?, &folder)?;
    runs_on(t, &id)
}

/// Another program in the place of the bed's `criu`, until dropped.
struct OtherCriu {
    criu: PathBuf,
}

impl OtherCriu {
    fn put(t: &Test, program: &str) -> Result<Self> {
        let criu = e2e::Cmd::new("sh").args(&["-c", "readlink -f $(command -v criu)"]).ok()?.trimmed();
        let program = if program.starts_with('/') { program.to_owned() } else { t.script("criu", program)? };
        e2e::Cmd::new("mount").args(&["--bind", &program, &criu]).ok()?;
        Ok(Self { criu: PathBuf::from(criu) })
    }
}

impl Drop for OtherCriu {
    fn drop(&mut self) {
        e2e::Cmd::new("umount").arg("--lazy").arg(self.criu.to_string_lossy()).run().ok();
    }
}

fn without_criu_a_checkpoint_says_so_and_the_container_runs_on(t: &Test) -> Result<()> {
    let id = t.id("c");
    start_counting(t, &id, &[])?;
    {
        // The file exists but is not executable, as seen by any search for programs.
        let _nothing = OtherCriu::put(t, "/dev/null")?;
        clear_error(t, t.ctr().checkpoint_task(&id, &[]).run()?, "criu")?;
        runs_on(t, &id)?;
    }
    t.ctr().checkpoint_task(&id, &[]).ok()?;
    runs_on(t, &id)
}

fn a_criu_that_is_too_old_is_named_and_the_container_runs_on(t: &Test) -> Result<()> {
    let id = t.id("c");
    start_counting(t, &id, &[])?;
    // Answers like `criu swrk`: criu_resp { type: as requested, success: if VERSION (10), version:
    // { major 3, minor 8 } }.
    let old = "if [ \"$1\" = swrk ]; then
  exec python3 -c '
import socket, sys
peer = socket.socket(fileno=int(sys.argv[1]))
while True:
    asked = peer.recv(1 << 20)
    if not asked:
        break
    peer.send(bytes([8, asked[1], 16, asked[1] == 10, 0x52, 4, 8, 3, 16, 8]))' \"$2\"
fi
echo Version: 3.8";
    {
        let _old = OtherCriu::put(t, old)?;
        let out = t.ctr().checkpoint_task(&id, &[]).run()?;
        ensure_has!(out.stderr, "3.8");
        clear_error(t, out, "criu")?;
        runs_on(t, &id)?;
    }
    t.ctr().checkpoint_task(&id, &[]).ok()?;
    runs_on(t, &id)
}

/// A dump in progress.
struct Dump {
    client: Running,
    shim: u32,
    criu: u32,
}

impl Dump {
    /// Kills a process of the dump, and lets CRIU run on if possible.
    fn kill(&self, victim: u32) -> Result<()> {
        proc::kill(victim)?;
        // CRIU has gone if it is the victim, or goes with the victim.
        let _ = proc::signal(self.criu, Signal::CONT);
        Ok(())
    }
}

/// Starts a dump of much memory, waits until CRIU writes, and stops CRIU: the dump would be over
/// before a slow machine has found the victim.
fn large_dump(t: &Test, id: &str) -> Result<Dump> {
    hold_memory(t, id, 1000)?;
    // Look for the shim first, because not every shim answers during a dump.
    let shim = t.ctr().shim(id)?;
    let folder = t.folder()?.join("image");
    let client = t.ctr().checkpoint_task(id, &["--image-path", &folder.to_string_lossy()]).spawn()?;
    let written = || fs::metadata(folder.join("pages-1.img")).map_or(0, |file| file.len());
    // Look often: CRIU writes a gigabyte in a second.
    while written() < 1 << 20 {
        ensure!(proc::alive(client.pid()), "the dump was over too soon: {} {}", client.stdout(), client.stderr());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // Not earlier: before a dump another criu reports its version.
    let criu = below(shim, "criu")?;
    proc::signal(criu, Signal::STOP)?;
    Ok(Dump { client, shim, criu })
}

/// Expects a second dump to work after a failed one.
fn can_be_dumped_again(t: &Test, id: &str) -> Result<()> {
    t.ctr().remove_checkpoints(id).ok()?;
    let folder = t.folder()?.join("again").to_string_lossy().into_owned();
    t.ctr().checkpoint_task(id, &["--image-path", &folder]).ok()?;
    runs_on(t, id)?;
    t.ctr().remove(id)
}

/// Expects the processes and the container to run on after a kill in a dump.
fn survives(t: &Test, id: &str, dump: Dump) -> Result<()> {
    let init = t.ctr().pid(id)?;
    dump.client.wait()?.expect_failure()?;
    proc::gone(dump.criu)?;
    ensure_eq!(proc::status(init, "TracerPid")?, "0");
    let counted = || -> Result<u64> { Ok(fs::read_to_string(format!("/proc/{init}/root/count"))?.trim().parse()?) };
    let now = counted()?;
    eventually("its process to count on", || {
        ensure!(counted()? > now + 10, "still {}", counted()?);
        Ok(())
    })?;
    if !t.target().shim.is_ours() {
        // CRIU has thawed the container that the client paused. runc's shim counts it as paused for
        // ever, refuses execs, and cannot resume it.
        return Ok(());
    }
    runs_on(t, id)?;
    can_be_dumped_again(t, id)
}

fn a_criu_that_is_killed_while_it_dumps_leaves_the_container_running(t: &Test) -> Result<()> {
    let id = t.id("c");
    let dump = large_dump(t, &id)?;
    dump.kill(dump.criu)?;
    survives(t, &id, dump)
}

fn a_runtime_that_is_killed_while_it_dumps_leaves_the_container_running(t: &Test) -> Result<()> {
    let id = t.id("c");
    let dump = large_dump(t, &id)?;
    dump.kill(begun_by(dump.shim, dump.criu)?)?;
    survives(t, &id, dump)
}

fn a_runtime_that_is_killed_while_it_restores_leaves_nothing(t: &Test) -> Result<()> {
    forget_unpacked(t);
    let (old, new, image) = (t.id("old"), t.id("new"), t.id("checkpoint"));
    hold_memory(t, &old, 400)?;
    t.ctr().checkpoint(&old, &image).ok()?;
    t.ctr().remove(&old)?;
    let client = t.ctr().restore(&new, &image).spawn()?;
    eventually("CRIU to restore", || {
        ensure!(proc::alive(client.pid()), "it is over: {} {}", client.stdout(), client.stderr());
        let shim = shim_of(&new)?;
        proc::kill(begun_by(shim, below(shim, "criu")?)?)
    })?;
    client.wait()?.expect_failure()?;
    nothing_runs(&new)?;
    t.ctr().remove(&new)?;
    let left = cgroup::folders_named(&new);
    ensure!(left.is_empty(), "cgroups are left: {left:?}");
    t.ctr().restore(&new, &image).ok()?;
    let now = count(t, &new)?;
    counts_past(t, &new, now)?;
    t.ctr().remove(&new)
}

fn a_shim_that_is_killed_while_it_dumps_is_cleaned_up(t: &Test) -> Result<()> {
    let id = t.id("c");
    let dump = large_dump(t, &id)?;
    // The container's processes, and the processes of the dump.
    let below = proc::descendants(dump.shim);
    dump.kill(dump.shim)?;
    dump.client.wait()?.expect_failure()?;
    // containerd ends the container of a dead shim; no process may be stuck.
    for pid in below {
        proc::gone(pid)?;
    }
    nothing_runs(&id)?;
    eventually("the task to be cleaned up", || {
        t.ctr().task(&["rm", "--force", &id]).run()?;
        ensure!(!t.ctr().task(&["ls"]).ok()?.text().contains(&id), "it is still listed");
        Ok(())
    })?;
    // containerd may still be busy with a task that it no longer lists.
    eventually("a new task", || t.ctr().task(&["start", "--detach", "--null-io", &id]).ok())?;
    counts_past(t, &id, 3)?;
    t.ctr().remove(&id)
}

fn a_client_that_is_killed_while_it_dumps_leaves_the_container_running(t: &Test) -> Result<()> {
    let id = t.id("c");
    let dump = large_dump(t, &id)?;
    dump.client.signal(Signal::KILL)?;
    proc::signal(dump.criu, Signal::CONT)?;
    proc::gone(dump.criu)?;
    // The client would have resumed the container.
    t.ctr().task(&["resume", &id]).run()?;
    runs_on(t, &id)?;
    can_be_dumped_again(t, &id)
}
