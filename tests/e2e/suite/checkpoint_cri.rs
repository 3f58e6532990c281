//! Checkpoint and restore by the kubelet's interface.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use e2e::cri::Pod;
use e2e::target::{Containerd, Shim, Target};
use e2e::{Case, Cmd, IMAGE, PYTHON, Skip, Test, case, cgroup, ensure_eq, ensure_has, eventually, lines, proc};
use serde_json::{Value, json};

use crate::checkpoint_ctr::ticking;
use crate::checkpoint_workloads::TELL;
use crate::cri_pods::own_processes;
use crate::ctr_exit::IDLE;

pub(crate) fn cases() -> Vec<Case> {
    let loses = "the container's /dev/shm is the sandbox's, whose contents runc's shim does not save";
    vec![
        case!(a_checkpoint_of_a_pods_container_is_an_archive_and_the_container_goes_on),
        case!(a_checkpoint_of_a_pods_container_can_be_taken_again_and_again),
        case!(a_container_that_has_exited_has_no_checkpoint),
        restoring(case!(a_pods_container_is_restored_from_its_archive_into_another_pod)),
        restoring(case!(a_restored_pods_container_works_as_any_other)),
        restoring(case!(a_restored_pods_container_can_be_checkpointed_and_restored_again)),
        restoring(case!(the_files_of_a_pods_container_are_restored)),
        restoring(case!(a_server_in_a_pod_answers_after_its_restore)),
        restoring(case!(sockets_at_a_pods_address_are_at_the_next_pods_address))
            .except(Shim::Stock, "CRIU cannot bind a socket to an address that is gone"),
        restoring(case!(dev_shm_of_a_pod_is_restored)).except(Shim::Stock, loses),
        restoring(case!(a_file_mapped_from_a_pods_dev_shm_survives)).except(Shim::Stock, loses),
        restoring(case!(an_archive_without_images_is_refused_and_the_pod_works)),
    ]
}

/// Marks cases that create a container from an archive, impossible with newer containerds.
fn restoring(case: Case) -> Case {
    let gone = "containerd 2.4 does not restore when a container is created";
    let cells = Target::all().into_iter().filter(|target| target.containerd == Containerd::V2_4);
    cells.fold(case, |case, target| case.except_target(target, gone))
}

/// Script that counts in the log and in a file.
const COUNT: &str = "trap 'exit 9' TERM; i=0; while :; do i=$((i+1)); echo line $i.; echo $i >/count; tick; done";

/// `crictl checkpoint` into a file of this name, in the test's folder.
fn checkpoint(t: &Test, id: &str, name: &str) -> Result<String> {
    let archive = t.folder()?.join(name).to_string_lossy().into_owned();
    t.cri().cmd(&["checkpoint", "--export", &archive, id]).ok()?;
    Ok(archive)
}

/// A registry in the bed.
pub(crate) fn registry() -> Result<&'static str> {
    static STARTING: Mutex<()> = Mutex::new(());
    let _one = STARTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let out = Cmd::new("testbed").args(&["registry", "start"]).stdin_null().run()?;
    if out.stderr.contains("no docker-registry") {
        return Err(Skip::because("this test bed has no registry"));
    }
    out.expect_code(0)?;
    Ok("127.0.0.1:5000")
}

/// Name of the image in a registry: a restore pulls the image even if it is present.
fn from_registry(t: &Test, image: &str) -> Result<String> {
    static PUSHING: Mutex<()> = Mutex::new(());
    let _one = PUSHING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let name = image.replace("docker.io", registry()?);
    let ctr = || t.bed().client("ctr").args(&["--address", &t.bed().address(), "--namespace", "k8s.io", "image"]);
    ctr().args(&["tag", "--force", image, &name]).ok()?;
    ctr().args(&["push", "--plain-http", &name]).ok()?;
    // Only a pulled image has a digest for pulls.
    t.cri().cmd(&["pull", &name]).ok()?;
    Ok(name)
}

/// A container of this image (or archive) with its own processes, as requested by the kubelet.
fn image(name: &str) -> Value {
    let mut config = own_processes();
    config["image"] = json!({ "image": name });
    config
}

/// Waits until the log has lines with a higher number.
fn counts_past(t: &Test, id: &str, from: u64) -> Result<u64> {
    eventually(&format!("{id} to count past {from}"), || {
        let now: u64 = t.cri().exec_prints(id, "cat /count")?.parse()?;
        ensure!(now > from, "still {now}");
        Ok(now)
    })
}

fn a_checkpoint_of_a_pods_container_is_an_archive_and_the_container_goes_on(t: &Test) -> Result<()> {
    let pod = t.cri().pod(&own_processes())?;
    let id = pod.start("one", &ticking(COUNT), &own_processes())?;
    let neighbour = pod.start("two", &ticking(COUNT), &own_processes())?;
    counts_past(t, &id, 3)?;
    let init = t.cri().pid(&id)?;
    let archive = checkpoint(t, &id, "one.tar")?;
    let names = Cmd::new("tar").args(&["--list", "--file", &archive]).ok()?.text();
    for name in [
        "spec.dump",
        "config.dump",
        "status.dump",
        "rootfs-diff.tar",
        "checkpoint/inventory.img",
        "checkpoint/core-1.img",
    ] {
        ensure!(lines(&names).contains(&name), "no {name} in {names}");
    }
    ensure_eq!(t.cri().pid(&id)?, init);
    ensure_eq!(t.cri().inspect(&id)?["status"]["state"], "CONTAINER_RUNNING");
    ensure!(!cgroup::frozen(init)?, "its cgroup is frozen");
    for id in [&id, &neighbour] {
        let now = counts_past(t, id, 0)?;
        counts_past(t, id, now)?;
    }
    t.cri().cmd(&["stop", "--timeout", "5", &id]).ok()?;
    ensure_eq!(t.cri().exited(&id)?["exitCode"], 9);
    Ok(())
}

fn a_checkpoint_of_a_pods_container_can_be_taken_again_and_again(t: &Test) -> Result<()> {
    let pod = t.cri().pod(&own_processes())?;
    let id = pod.start("one", &ticking(COUNT), &own_processes())?;
    let mut last = counts_past(t, &id, 3)?;
    for round in 0..5 {
        checkpoint(t, &id, &format!("{round}.tar"))?;
        last = counts_past(t, &id, last)?;
    }
    Ok(())
}

fn a_container_that_has_exited_has_no_checkpoint(t: &Test) -> Result<()> {
    let pod = t.cri().pod(&own_processes())?;
    let id = pod.start("one", "exit 3", &own_processes())?;
    t.cri().exited(&id)?;
    let archive = t.folder()?.join("one.tar").to_string_lossy().into_owned();
    let out = t.cri().cmd(&["checkpoint", "--export", &archive, &id]).run()?.expect_failure()?;
    ensure_has!(out.stderr.to_lowercase(), "running");
    ensure!(!Path::new(&archive).exists(), "there is an archive");
    Ok(())
}

/// Runs a script in a pod until it counts, checkpoints the container, removes the pod, and restores
/// in another.
fn moves<'a>(t: &'a Test, source: &str, script: &str) -> Result<(Pod<'a>, String)> {
    let source = from_registry(t, source)?;
    let old = t.cri().pod(&own_processes())?;
    let id = old.start("one", script, &image(&source))?;
    counts_past(t, &id, 3)?;
    let archive = checkpoint(t, &id, "one.tar")?;
    t.cri().cmd(&["rmp", "--force", &old.id]).ok()?;
    let new = t.cri().pod(&own_processes())?;
    let restored = new.start("one", script, &image(&archive))?;
    Ok((new, restored))
}

fn a_pods_container_is_restored_from_its_archive_into_another_pod(t: &Test) -> Result<()> {
    let (pod, id) = moves(t, IMAGE, &ticking(COUNT))?;
    let first = counts_past(t, &id, 3)?;
    counts_past(t, &id, first)?;
    // The log continues with whole lines, from the same number.
    t.cri().logs_have(&id, &format!("line {}.", first + 5))?;
    let log = t.cri().cmd(&["logs", &id]).ok()?.text();
    let numbers: Vec<u64> = lines(&log)
        .iter()
        .map(|line| line.trim_start_matches("line ").trim_end_matches('.').parse().with_context(|| (*line).to_owned()))
        .collect::<Result<_>>()?;
    // The container ran on, and containerd saved the log after the processes: lines in between come
    // once more.
    let jumps: Vec<&[u64]> = numbers.windows(2).filter(|pair| pair[1] != pair[0] + 1).collect();
    ensure!(jumps.len() <= 1 && jumps.iter().all(|pair| pair[1] <= pair[0]), "{numbers:?}");
    for kind in ["net", "ipc", "uts"] {
        ensure_eq!(proc::namespace(t.cri().pid(&id)?, kind)?, proc::namespace(pod.pid()?, kind)?, "{kind}");
    }
    Ok(())
}

fn a_restored_pods_container_works_as_any_other(t: &Test) -> Result<()> {
    let (pod, id) = moves(t, IMAGE, &ticking(COUNT))?;
    let cri = t.cri();
    ensure_eq!(cri.exec(&id, "exit 42")?.0, 42);
    let init = cri.pid(&id)?;
    ensure_eq!(proc::parent(init)?, proc::parent(pod.pid()?)?, "the shim");
    cri.cmd(&["update", "--memory", "67108864", &id]).ok()?;
    ensure_eq!(cgroup::memory_limit(init)?, 64 << 20);
    eventually("its stats", || {
        let text = cri.cmd(&["stats", "--output", "json", "--id", &id]).ok()?.text();
        ensure_has!(text, "usageCoreNanoSeconds");
        Ok(())
    })?;
    cri.cmd(&["stop", "--timeout", "5", &id]).ok()?;
    ensure_eq!(cri.exited(&id)?["exitCode"], 9);
    cri.cmd(&["rm", &id]).ok()?;
    cri.cmd(&["rmp", "--force", &pod.id]).ok().map(drop)
}

fn a_restored_pods_container_can_be_checkpointed_and_restored_again(t: &Test) -> Result<()> {
    let (pod, id) = moves(t, IMAGE, &ticking(COUNT))?;
    let before = counts_past(t, &id, 3)?;
    let archive = checkpoint(t, &id, "two.tar")?;
    t.cri().cmd(&["rmp", "--force", &pod.id]).ok()?;
    let pod = t.cri().pod(&own_processes())?;
    let id = pod.start("one", "", &image(&archive))?;
    counts_past(t, &id, before).map(drop)
}

fn the_files_of_a_pods_container_are_restored(t: &Test) -> Result<()> {
    let script = format!("echo mine >/file; rm /etc/group; {COUNT}");
    let (_pod, id) = moves(t, IMAGE, &ticking(&script))?;
    ensure_eq!(t.cri().exec_prints(&id, "cat /file; [ -e /etc/group ] || echo removed")?, "mine\nremoved");
    let now = counts_past(t, &id, 3)?;
    counts_past(t, &id, now).map(drop)
}

fn a_server_in_a_pod_answers_after_its_restore(t: &Test) -> Result<()> {
    let script = format!("(while :; do echo hello | nc -l -p 8080; done) & {COUNT}");
    let (pod, id) = moves(t, IMAGE, &ticking(&script))?;
    counts_past(t, &id, 3)?;
    let address = address(t, &pod)?;
    eventually("the server to answer", || {
        let client = format!("exec 3<>/dev/tcp/{address}/8080; cat <&3");
        ensure_eq!(Cmd::new("bash").args(&["-c", &client]).stdin_null().ok()?.trimmed(), "hello");
        Ok(())
    })
}

/// A listener, a connection of its own to itself, a connected UDP socket, and a connection that was reset, all at the
/// container's own address.
const AT_OWN_ADDRESS: &str = "
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect(('192.0.2.1', 53))
me = udp.getsockname()[0]
server = socket.create_server((me, 8080))
server.setblocking(False)
to_itself = socket.create_server((me, 0))
a, reset = [socket.create_connection(to_itself.getsockname()) for _ in range(2)]
b, other = [to_itself.accept()[0] for _ in range(2)]
other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
other.close()
count = 0
while True:
    count += 1
    a.sendall(b'%08d' % count)
    assert b.recv(8) == b'%08d' % count
    try:
        client = server.accept()[0]
        client.sendall(b'hello')
        client.close()
    except BlockingIOError:
        pass
    tell(udp.getsockname()[0], '/address')
    tell(count)
    time.sleep(0.02)
";

fn sockets_at_a_pods_address_are_at_the_next_pods_address(t: &Test) -> Result<()> {
    let script = format!("exec python3 -c \"{TELL}{AT_OWN_ADDRESS}\"");
    let (pod, id) = moves(t, PYTHON, &script)?;
    let now = counts_past(t, &id, 3)?;
    counts_past(t, &id, now)?;
    let address = address(t, &pod)?;
    ensure_eq!(t.cri().exec_prints(&id, "cat /address")?, address);
    let client = format!("exec 3<>/dev/tcp/{address}/8080; cat <&3");
    ensure_eq!(Cmd::new("bash").args(&["-c", &client]).stdin_null().ok()?.trimmed(), "hello");
    Ok(())
}

/// The pod's address.
fn address(t: &Test, pod: &Pod<'_>) -> Result<String> {
    let text = t.cri().cmd(&["inspectp", "--output", "json", &pod.id]).ok()?.text();
    let all: Value = serde_json::from_str(&text)?;
    Ok(all.pointer("/status/network/ip").and_then(Value::as_str).context("the pod's address")?.to_owned())
}

fn dev_shm_of_a_pod_is_restored(t: &Test) -> Result<()> {
    let script = format!("mkdir /dev/shm/folder; echo kept >/dev/shm/folder/file; exec 5>>/dev/shm/open; {COUNT}");
    let (pod, id) = moves(t, IMAGE, &ticking(&script))?;
    ensure_eq!(t.cri().exec_prints(&id, "cat /dev/shm/folder/file; readlink /proc/1/fd/5")?, "kept\n/dev/shm/open");
    // The folder is the pod's: another container of the pod sees the same.
    let other = pod.start("two", IDLE, &own_processes())?;
    ensure_eq!(t.cri().exec_prints(&other, "cat /dev/shm/folder/file")?, "kept");
    let now = counts_past(t, &id, 3)?;
    counts_past(t, &id, now).map(drop)
}

fn a_file_mapped_from_a_pods_dev_shm_survives(t: &Test) -> Result<()> {
    let program = "
import mmap, os, time
file = os.open('/dev/shm/area', os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 1 << 20)
area = mmap.mmap(file, 1 << 20)
gone = os.open('/dev/shm/gone', os.O_RDWR | os.O_CREAT)
os.ftruncate(gone, 1 << 16)
deleted = mmap.mmap(gone, 1 << 16)
os.remove('/dev/shm/gone')
area[1000:1005] = deleted[1000:1005] = b'hello'
count = 0
while True:
    count += 1
    area[0:8] = count.to_bytes(8, 'little')
    assert open('/dev/shm/area', 'rb').read(1005)[0:8] == area[0:8]
    assert area[1000:1005] == deleted[1000:1005] == b'hello'
    with open('/new', 'w') as new:
        new.write(str(count))
    os.replace('/new', '/count')
    time.sleep(0.02)";
    let script = format!("exec python3 -c \"{program}\"");
    let (_pod, id) = moves(t, PYTHON, &script)?;
    let now = counts_past(t, &id, 3)?;
    counts_past(t, &id, now).map(drop)
}

fn an_archive_without_images_is_refused_and_the_pod_works(t: &Test) -> Result<()> {
    let source = from_registry(t, IMAGE)?;
    let pod = t.cri().pod(&own_processes())?;
    let id = pod.start("one", &ticking(COUNT), &image(&source))?;
    counts_past(t, &id, 3)?;
    let archive = checkpoint(t, &id, "one.tar")?;
    let folder = t.folder()?.join("unpacked");
    fs::create_dir_all(&folder)?;
    let (folder, bad) =
        (folder.to_string_lossy().into_owned(), t.folder()?.join("bad.tar").to_string_lossy().into_owned());
    Cmd::new("tar").args(&["-C", &folder, "-xf", &archive]).ok()?;
    for entry in fs::read_dir(Path::new(&folder).join("checkpoint"))?.flatten() {
        if entry.file_name() != "descriptors.json" {
            fs::remove_file(entry.path())?;
        }
    }
    Cmd::new("sh").args(&["-c", &format!("cd {folder} && tar -cf {bad} *")]).ok()?;
    let new = t.cri().pod(&own_processes())?;
    let restored = new.create("one", "", &image(&bad))?;
    t.cri().cmd(&["start", &restored]).run()?.expect_failure()?;
    t.cri().cmd(&["rm", "--force", &restored]).ok()?;
    let again = new.start("one", "", &image(&archive))?;
    let now = counts_past(t, &again, 3)?;
    counts_past(t, &again, now).map(drop)
}
