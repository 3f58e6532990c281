//! Kinds of programs that survive a checkpoint and a restore as another container.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::pty::Pty;
use e2e::target::Shim;
use e2e::{Case, Cmd, Test, bed, case, ensure_eq, ensure_has, eventually, proc};

use crate::checkpoint_ctr::{count, counts_past, hold_memory, start_counting, ticking};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(python_threads_survive),
        case!(a_tree_of_processes_with_pipes_survives),
        case!(a_server_that_listens_survives),
        case!(shared_memory_with_semaphores_survives),
        case!(a_file_mapped_from_dev_shm_survives),
        case!(a_small_file_that_is_deleted_but_open_survives),
        case!(a_large_file_that_is_deleted_but_open_survives)
            .except(Shim::Stock, LIMIT)
            .except(Shim::GpusnapRunc, LIMIT),
        case!(a_shell_on_a_terminal_with_a_job_survives),
        case!(sockets_timers_and_signals_survive),
        case!(a_container_with_its_own_user_survives),
        case!(dropped_capabilities_and_filters_survive),
        case!(a_shell_that_starts_programs_all_the_time_survives)
            .except(Shim::Stock, "CRIU fails on a process that waits for its vfork, and runc does not try again"),
        case!(an_exec_session_is_part_of_the_checkpoint),
        case!(twenty_generations_of_new_containers_survive),
        case!(one_container_survives_many_cycles).alone(),
        case!(two_gigabytes_of_memory_survive).alone(),
    ]
}

const LIMIT: &str = "runc leaves CRIU's limit for deleted files at 1 MB";

/// Function that records progress in a file, never half-written for a reader.
pub(crate) const TELL: &str = "import os, time
def tell(value, name='/count'):
    with open('/new', 'w') as file:
        file.write(str(value))
    os.replace('/new', name)
";

/// Starts a Python program that records its progress, and then moves it into another container.
fn moves(t: &Test, options: &[&str], program: &str) -> Result<String> {
    let (old, new) = (t.id("old"), t.id("new"));
    t.ctr().start_python(&old, options, &format!("{TELL}{program}"))?;
    counts_past(t, &old, 3)?;
    moved(t, &old, &new)?;
    Ok(new)
}

/// Moves a counting container, and expects further counts.
fn moved(t: &Test, old: &str, new: &str) -> Result<()> {
    let before = count(t, old)?;
    t.ctr().moves(old, new)?;
    let now = count(t, new)?;
    ensure!(now >= before, "it was at {before} and goes on at {now}");
    counts_past(t, new, now).map(drop)
}

fn python_threads_survive(t: &Test) -> Result<()> {
    let program = "
import threading, queue
counts, lock, done = [0] * 8, threading.Lock(), queue.Queue()
def work(at):
    local = threading.local()
    local.mine = 0
    while True:
        time.sleep(0.01)
        local.mine += 1
        with lock:
            counts[at] += 1
        assert counts[at] == local.mine, (counts, local.mine)
        done.put(at)
for at in range(8):
    threading.Thread(target=work, args=(at,), daemon=True, name=f'work{at}').start()
while True:
    for _ in range(8):
        done.get()
    tell(min(counts))
";
    let new = moves(t, &[], program)?;
    ensure_eq!(proc::status(t.ctr().pid(&new)?, "Threads")?, "9");
    Ok(())
}

fn a_tree_of_processes_with_pipes_survives(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    // Three stages; the last ends everything if a number is missing or double.
    let script = "(i=0; while :; do i=$((i+1)); echo $i; tick; done) | (while read n; do echo $n; done) |
        (last=0; while read n; do
            [ $n = $((last+1)) ] || { echo \"$n after $last\" >/wrong; exit 3; }; last=$n; echo $n >/count
        done); echo over >/wrong";
    t.ctr().start(&old, &[], &["sh", "-c", &ticking(script)])?;
    counts_past(t, &old, 3)?;
    moved(t, &old, &new)?;
    ensure_eq!(t.ctr().exec_prints(&new, "cat /wrong 2>/dev/null || echo fine")?, "fine");
    ensure!(proc::children(t.ctr().pid(&new)?).len() >= 3, "a stage is missing");
    Ok(())
}

fn a_server_that_listens_survives(t: &Test) -> Result<()> {
    let program = "
import http.server, threading
answers = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global answers
        answers += 1
        text = f'answer {answers} to {self.path}'.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
tell(server.server_port, '/port')
threading.Thread(target=server.serve_forever, daemon=True).start()
count = 0
while True:
    count += 1
    tell(count)
    time.sleep(0.02)
";
    let (old, new) = (t.id("old"), t.id("new"));
    t.ctr().start_python(&old, &["--net-host"], &format!("{TELL}{program}"))?;
    counts_past(t, &old, 3)?;
    let port = t.ctr().exec_prints(&old, "cat /port")?;
    let get = |path: &str| -> Result<String> {
        let client = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{port}; printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3; exec 3>&-"
        );
        Ok(Cmd::new("bash").args(&["-c", &client]).stdin_null().ok()?.text())
    };
    ensure_has!(get("/a")?, "answer 1 to /a");
    // Wait for the connection's end: an open one would be part of the checkpoint.
    closed(&port)?;
    moved(t, &old, &new)?;
    ensure_has!(get("/b")?, "answer 2 to /b");
    ensure_has!(get("/c")?, "answer 3 to /c");
    Ok(())
}

/// Waits until no process of ours can hold a connection with this port.
fn closed(port: &str) -> Result<()> {
    eventually("the connection to be closed", || {
        let text =
            Cmd::new("ss").args(&["--tcp", "--no-header", "--numeric", "sport", "=", &format!(":{port}")]).ok()?;
        ensure_eq!(text.trimmed(), "");
        Ok(())
    })
}

fn shared_memory_with_semaphores_survives(t: &Test) -> Result<()> {
    let program = "
import multiprocessing
context = multiprocessing.get_context('fork')
total, turn = context.Value('q', 0), [context.Semaphore(1), context.Semaphore(0)]
def work(at):
    while True:
        turn[at].acquire()
        with total.get_lock():
            assert total.value % 2 == at, (total.value, at)
            total.value += 1
            if at == 0:
                tell(total.value)
        time.sleep(0.005)
        turn[1 - at].release()
workers = [context.Process(target=work, args=(at,)) for at in range(2)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
";
    moves(t, &[], program).map(drop)
}

fn a_file_mapped_from_dev_shm_survives(t: &Test) -> Result<()> {
    let program = "
import mmap
file = os.open('/dev/shm/area', os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 1 << 20)
area = mmap.mmap(file, 1 << 20)
area[1000:1005] = b'hello'
count = 0
while True:
    count += 1
    area[0:8] = count.to_bytes(8, 'little')
    with open('/dev/shm/area', 'rb') as again:
        seen = again.read(1 << 20)
    assert seen[0:8] == area[0:8] and seen[1000:1005] == b'hello'
    tell(count)
    time.sleep(0.02)
";
    let new = moves(t, &[], program)?;
    ensure_eq!(t.ctr().exec_prints(&new, "dd if=/dev/shm/area bs=1 skip=1000 count=5 2>/dev/null")?, "hello");
    Ok(())
}

/// Holds a nameless file open, reads it and writes to it.
fn with_deleted_file(t: &Test, kilobytes: u32) -> Result<()> {
    let program = format!(
        "
file = open('/gone', 'w+b', buffering=0)
file.write(bytes(range(256)) * 4 * {kilobytes})
os.remove('/gone')
count = 0
while True:
    count += 1
    file.seek(0)
    seen = file.read()
    assert len(seen) == 1024 * {kilobytes} + 8 * (count - 1), len(seen)
    assert seen[: 1024 * {kilobytes}] == bytes(range(256)) * 4 * {kilobytes}
    file.write(count.to_bytes(8, 'little'))
    tell(count)
    time.sleep(0.02)
"
    );
    let new = moves(t, &[], &program)?;
    let files = t.ctr().exec_prints(&new, "ls -l /proc/1/fd; ls /")?;
    ensure_has!(files, "(deleted)");
    ensure!(!files.lines().any(|line| line.starts_with("gone") || line.contains("link_remap")), "{files}");
    Ok(())
}

fn a_small_file_that_is_deleted_but_open_survives(t: &Test) -> Result<()> {
    with_deleted_file(t, 10)
}

fn a_large_file_that_is_deleted_but_open_survives(t: &Test) -> Result<()> {
    with_deleted_file(t, 3 << 10)
}

fn a_shell_on_a_terminal_with_a_job_survives(t: &Test) -> Result<()> {
    let (old, new, image) = (t.id("old"), t.id("new"), t.id("checkpoint"));
    let mut pty = Pty::spawn(&t.ctr().run(&old, &["--tty"], &["sh", "-i"]), 25, 80)?;
    // Typed text is on the screen too: the expected text must differ from it.
    pty.types(&ticking("word=hel; (i=0; while :; do i=$((i+1)); echo $i >/count; tick; done) &\n"))?;
    counts_past(t, &old, 3)?;
    pty.types("echo ${word}lo\n")?;
    pty.shows("hello")?;
    t.ctr().checkpoint(&old, &image).ok()?;
    t.ctr().remove(&old)?;
    drop(pty);
    let mut pty = Pty::spawn(&t.ctr().restore(&new, &image), 25, 80)?;
    let now = count(t, &new)?;
    counts_past(t, &new, now)?;
    pty.types("echo ${word}p\n")?;
    pty.shows("help")?;
    pty.types("jobs | grep -c Runn''ing\n")?;
    pty.types("kill %1; exit 4\n")?;
    ensure_eq!(pty.wait()?.0, 4);
    Ok(())
}

fn sockets_timers_and_signals_survive(t: &Test) -> Result<()> {
    let program = "
import select, signal, socket
left, right = socket.socketpair()
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
unix = socket.socket(socket.AF_UNIX)
unix.bind('/socket'); unix.listen()
reader, writer = os.pipe()
os.write(writer, b'unread'); left.send(b'in flight')
poll = select.epoll(); poll.register(right, select.EPOLLIN)
event = os.eventfd(5)
ticks = 0
def tick(*args):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
while True:
    signal.pause()
    assert poll.poll(0) and right.recv(100, socket.MSG_PEEK) == b'in flight'
    assert select.select([reader], [], [], 0)[0] and os.eventfd_read(event) == 5
    os.eventfd_write(event, 5)
    client = socket.socket(socket.AF_UNIX); client.connect('/socket'); unix.accept()[0].close(); client.close()
    tell(ticks)
";
    moves(t, &[], program).map(drop)
}

fn a_container_with_its_own_user_survives(t: &Test) -> Result<()> {
    // CRIU reads the resource limits of a process of another user.
    let sys_resource = 1 << 24;
    let ours = u64::from_str_radix(&proc::status(std::process::id(), "CapEff")?, 16)?;
    if ours & sys_resource == 0 {
        return Err(e2e::Skip::because("CRIU needs CAP_SYS_RESOURCE, which this machine does not give"));
    }
    let new = keeps_its_credentials(t, &["--user", "1000:1000", "--seccomp"])?;
    ensure_has!(proc::status(t.ctr().pid(&new)?, "Uid")?, "1000");
    ensure_eq!(t.ctr().exec_prints(&new, "id -u")?, "1000");
    Ok(())
}

fn dropped_capabilities_and_filters_survive(t: &Test) -> Result<()> {
    let new = keeps_its_credentials(t, &["--cap-drop", "CAP_CHOWN", "--cap-drop", "CAP_KILL", "--seccomp"])?;
    let init = t.ctr().pid(&new)?;
    ensure_eq!(proc::status(init, "NoNewPrivs")?, "1");
    ensure_eq!(proc::status(init, "Seccomp")?, "2");
    ensure!(t.ctr().exec_prints(&new, "chown app /tmp/count 2>&1 || echo refused")?.contains("refused"));
    Ok(())
}

/// Moves a container with these options, compares the kernel's view of init's privileges, and
/// returns the new one.
fn keeps_its_credentials(t: &Test, options: &[&str]) -> Result<String> {
    let (old, new) = (t.id("old"), t.id("new"));
    let script = "cd /tmp; i=0; while :; do i=$((i+1)); echo $i >/tmp/count; tick; done";
    t.ctr().start(&old, options, &["sh", "-c", &ticking(script)])?;
    let count = |id: &str| -> Result<u64> {
        eventually("a number", || Ok(t.ctr().exec_prints(id, "cat /tmp/count")?.parse()?))
    };
    let passes = |id: &str, from| {
        eventually("it to count", || {
            ensure!(count(id)? > from, "still {}", count(id)?);
            Ok(())
        })
    };
    passes(&old, 3)?;
    let fields = ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"];
    let credentials = |id: &str| -> Result<Vec<String>> {
        let init = t.ctr().pid(id)?;
        fields.iter().map(|field| proc::status(init, field)).collect()
    };
    let before = credentials(&old)?;
    t.ctr().moves(&old, &new)?;
    passes(&new, count(&new)?)?;
    ensure_eq!(credentials(&new)?, before, "{fields:?}");
    Ok(new)
}

fn a_shell_that_starts_programs_all_the_time_survives(t: &Test) -> Result<()> {
    let (old, new) = (t.id("old"), t.id("new"));
    // busybox's shell uses vfork, as dash does.
    let script = "i=0; while :; do i=$((i+1)); /bin/echo $i >/count; done";
    t.ctr().start(&old, &[], &["sh", "-c", script])?;
    counts_past(t, &old, 3)?;
    let folder = t.folder()?.join("image").to_string_lossy().into_owned();
    for _ in 0..20 {
        t.ctr().checkpoint_task(&old, &["--image-path", &folder]).ok()?;
        t.ctr().remove_checkpoints(&old).ok()?;
    }
    moved(t, &old, &new)
}

fn an_exec_session_is_part_of_the_checkpoint(t: &Test) -> Result<()> {
    let (old, new, image) = (t.id("old"), t.id("new"), t.id("checkpoint"));
    start_counting(t, &old, &[])?;
    let script = "j=0; while :; do j=$((j+1)); echo $j >/other; tick; done";
    t.ctr().task(&["exec", "--detach", "--exec-id", &t.id("x"), &old, "sh", "-c", &ticking(script)]).run()?;
    let other =
        |id: &str| -> Result<u64> { eventually("a number", || Ok(t.ctr().exec_prints(id, "cat /other")?.parse()?)) };
    eventually("the exec to count", || other(&old))?;
    t.ctr().checkpoint(&old, &image).ok()?;
    // Both run on here.
    let now = count(t, &old)?;
    counts_past(t, &old, now)?;
    t.ctr().remove(&old)?;
    t.ctr().restore(&new, &image).ok()?;
    let now = count(t, &new)?;
    counts_past(t, &new, now)?;
    Ok(())
}

fn twenty_generations_of_new_containers_survive(t: &Test) -> Result<()> {
    let mut id = t.id("generation");
    start_counting(t, &id, &[])?;
    for generation in 1..=20 {
        let next = t.id("generation");
        moved(t, &id, &next).with_context(|| format!("generation {generation}"))?;
        id = next;
    }
    t.ctr().remove(&id)
}

/// Number of cycles of a test: `GPUSNAP_E2E_CYCLES`, or enough to notice an accumulation.
fn cycles() -> Result<u64> {
    match std::env::var("GPUSNAP_E2E_CYCLES") {
        Ok(text) => text.parse().with_context(|| format!("GPUSNAP_E2E_CYCLES={text}")),
        Err(_) => Ok(30),
    }
}

/// Folders with checkpoints unpacked by containerd.
fn unpacked() -> BTreeSet<String> {
    let names = fs::read_dir("/tmp").into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("ctrd-checkpoint")).collect()
}

/// Registers the removal of containerd's unpacked folders, in memory here. Only for tests that are
/// alone.
pub(crate) fn forget_unpacked(t: &Test) {
    t.at_end(Cmd::new("sh").args(&["-c", "rm -rf /tmp/ctrd-checkpoint*"]));
}

fn one_container_survives_many_cycles(t: &Test) -> Result<()> {
    let id = t.id("c");
    let mut last = start_counting(t, &id, &[])?;
    let (before, folders) = (bed::leaks()?, unpacked());
    for cycle in 1..=cycles()? {
        moved(t, &id, &id).with_context(|| format!("cycle {cycle}"))?;
        let now = count(t, &id)?;
        ensure!(now > last, "cycle {cycle}: it was at {last} and is at {now}");
        last = now;
    }
    // The same container runs: all its resources exist once. (Sockets have other names, and a
    // restored container has no start socket.)
    let after = bed::leaks()?;
    let (sockets, rest): (Vec<_>, Vec<_>) = after.into_iter().partition(|line| line.starts_with("socket "));
    let (sockets_before, rest_before): (Vec<_>, Vec<_>) =
        before.into_iter().partition(|line| line.starts_with("socket "));
    ensure_eq!(rest, rest_before);
    ensure!(sockets.len() <= sockets_before.len(), "{sockets:?}, before {sockets_before:?}");
    if t.target().shim.is_ours() {
        ensure_eq!(unpacked(), folders, "unpacked checkpoints in /tmp");
    }
    Ok(())
}

fn two_gigabytes_of_memory_survive(t: &Test) -> Result<()> {
    let free = fs::read_to_string("/proc/meminfo")?;
    let free: u64 = proc::status_line(&free, "MemAvailable")?.trim_end_matches(" kB").parse()?;
    if free < 9 << 20 {
        return Err(e2e::Skip::because(format!("there is too little memory: {free} kB")));
    }
    let (old, new) = (t.id("old"), t.id("new"));
    forget_unpacked(t);
    hold_memory(t, &old, 2048)?;
    moved(t, &old, &new)?;
    ensure!(proc::kilobytes(t.ctr().pid(&new)?, "VmRSS")? > 2 << 20, "it does not hold its memory");
    // A hundred counts have read all pages.
    let now = count(t, &new)?;
    counts_past(t, &new, now + 100).map(drop)
}
