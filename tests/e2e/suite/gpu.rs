//! Checkpoints of containers that compute on a GPU, a real or a simulated one.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::gpu::Gpu;
use e2e::target::Shim;
use e2e::{Case, Test, case, cgroup, ensure_eq, ensure_has, eventually, proc};
use rustix::process::Signal;
use serde_json::{Value, json};

pub(crate) fn cases() -> Vec<Case> {
    let cases = vec![
        case!(a_gpu_program_computes_on_after_its_checkpoint),
        case!(a_restored_gpu_program_computes_on_where_it_was),
        case!(a_gpu_program_whose_gpu_comes_by_cdi_is_restored),
        case!(a_restored_gpu_program_can_be_checkpointed_again),
        case!(a_gpu_checkpoint_that_exits_ends_the_task),
        case!(a_paused_gpu_container_stays_paused_after_its_checkpoint),
        case!(what_a_process_beside_a_gpu_program_writes_is_saved_as_the_process_knows_it),
        case!(nothing_runs_of_a_restored_container_whose_gpu_state_cannot_be_given_back),
        case!(a_checkpoint_of_a_gpu_program_says_what_it_had),
        case!(processes_forked_from_a_gpu_program_are_saved_with_it),
        case!(a_process_beside_a_gpu_program_keeps_its_devices_and_a_restored_one_has_them_anew),
        case!(processes_with_much_memory_beside_a_gpu_program_are_restored_whole),
        case!(much_gpu_memory_is_in_place_when_the_program_goes_on).alone(),
        case!(who_is_killed_while_memory_is_filled_fails_the_restore_cleanly).alone(),
        case!(gpu_workers_under_a_process_without_gpu_are_saved),
        case!(a_program_on_two_gpus_is_saved),
        case!(a_program_on_one_of_two_gpus_whose_driver_made_nodes_of_both_is_restored),
        case!(two_containers_on_one_gpu_are_saved_each_by_itself),
        case!(a_gpu_programs_thread_that_reads_driver_memory_survives),
        case!(a_stopped_gpu_process_is_saved_and_stays_stopped),
        case!(a_long_gpu_kernel_is_waited_for),
        case!(a_gpu_kernel_that_outlasts_the_patience_is_told_and_computed_to_its_end),
        case!(managed_gpu_memory_is_told_and_the_program_computes_on),
        case!(a_gpu_program_that_was_started_by_exec_goes_on_and_what_is_saved_is_restored),
        case!(a_filter_that_kills_for_calls_of_a_checkpoint_kills_nobody),
        case!(gpu_memory_that_does_not_fit_into_the_limit_is_told_before_it_kills),
        case!(a_gpu_driver_that_refuses_is_told_and_the_program_computes_on),
        case!(a_gpu_driver_that_fails_to_restore_once_is_asked_again),
        case!(a_gpu_driver_that_hangs_is_told_and_the_program_computes_on),
        case!(a_gpu_program_that_dies_in_its_checkpoint_is_told),
        case!(a_session_that_is_killed_leaves_the_gpu_working).alone(),
        case!(a_caller_of_the_gpu_driver_that_is_killed_leaves_the_gpu_working).alone(),
        case!(a_criu_that_is_killed_leaves_the_gpu_working).alone(),
    ];
    let stock = "runc's shim knows nothing of GPUs";
    cases.into_iter().map(|case| case.except(Shim::Stock, stock)).collect()
}

fn a_gpu_program_computes_on_after_its_checkpoint(t: &Test) -> Result<()> {
    let (gpu, id) = (Gpu::one(t)?, t.id("g"));
    gpu.start(&id, &["--pinned"])?;
    let init = t.ctr().pid(&id)?;
    for _ in 0..3 {
        t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
        gpu.computes(&id)?;
    }
    ensure_eq!(t.ctr().pid(&id)?, init);
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    Ok(())
}

fn a_restored_gpu_program_computes_on_where_it_was(t: &Test) -> Result<()> {
    let (gpu, id, to) = (Gpu::one(t)?, t.id("g"), t.id("g"));
    gpu.start(&id, &["--size", "64", "--pinned"])?;
    let before = gpu.rounds(&id)?;
    t.ctr().moves(&id, &to)?;
    ensure!(gpu.rounds(&to)? >= before, "it began again");
    gpu.computes(&to)
}

fn a_gpu_program_whose_gpu_comes_by_cdi_is_restored(t: &Test) -> Result<()> {
    let (gpu, id, to) = (Gpu::by_cdi(t)?, t.id("g"), t.id("g"));
    gpu.start(&id, &["--size", "64", "--pinned"])?;
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    gpu.computes(&id)?;
    t.ctr().moves(&id, &to)?;
    gpu.computes(&to)
}

fn a_restored_gpu_program_can_be_checkpointed_again(t: &Test) -> Result<()> {
    let (gpu, mut id) = (Gpu::one(t)?, t.id("g"));
    // Pinned memory is shared memory: from the second generation on CRIU's own.
    gpu.start(&id, &["--pinned", "4"])?;
    for _ in 0..4 {
        let to = t.id("g");
        t.ctr().moves(&id, &to)?;
        gpu.computes(&to)?;
        id = to;
    }
    Ok(())
}

fn a_gpu_checkpoint_that_exits_ends_the_task(t: &Test) -> Result<()> {
    let (gpu, id) = (Gpu::one(t)?, t.id("g"));
    gpu.start(&id, &[])?;
    let folder = t.folder()?.join("images").to_string_lossy().into_owned();
    t.ctr().checkpoint_task(&id, &["--exit", "--image-path", &folder]).ok()?;
    eventually("the task to be stopped", || {
        ensure_eq!(t.ctr().status(&id)?, "STOPPED");
        Ok(())
    })
}

fn a_paused_gpu_container_stays_paused_after_its_checkpoint(t: &Test) -> Result<()> {
    let (gpu, id) = (Gpu::one(t)?, t.id("g"));
    gpu.start(&id, &[])?;
    t.ctr().task(&["pause", &id]).ok()?;
    let folder = t.folder()?.join("images").to_string_lossy().into_owned();
    t.ctr().checkpoint_task(&id, &["--image-path", &folder]).ok()?;
    // ctr resumes any paused task, also one paused before; the shim's state shows in between.
    eventually("the task to run or be paused", || {
        let status = t.ctr().status(&id)?;
        ensure!(status == "RUNNING" || status == "PAUSED", "{status}");
        Ok(())
    })?;
    if t.ctr().status(&id)? == "PAUSED" {
        ensure!(cgroup::frozen(t.ctr().pid(&id)?)?, "it is paused and runs");
        t.ctr().task(&["resume", &id]).ok()?;
    }
    gpu.computes(&id)
}

/// Program that appends numbers to a file of the writable layer, without a pause and without a gap.
const APPENDER: &str = "
with open('/numbers', 'a', buffering=1) as file:
    n = 0
    while True:
        n += 1
        print(n, file=file)
";

fn what_a_process_beside_a_gpu_program_writes_is_saved_as_the_process_knows_it(t: &Test) -> Result<()> {
    let (gpu, id, to) = (Gpu::one(t)?, t.id("g"), t.id("g"));
    gpu.start_beside(&id, APPENDER)?;
    t.ctr().moves(&id, &to)?;
    gpu.computes(&to)?;
    let init = t.ctr().pid(&to)?;
    let numbers = || -> Result<Vec<u64>> {
        let text = fs::read_to_string(format!("/proc/{init}/root/numbers"))?;
        // The last line may be incomplete.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        Ok(whole.lines().map(str::parse).collect::<Result<_, _>>()?)
    };
    let from = numbers()?.len();
    eventually("the process to append on", || {
        let now = numbers()?;
        ensure!(now.len() > from, "still {from} numbers");
        ensure!(
            now.iter().zip(1..).all(|(number, expected)| *number == expected),
            "a number is missing or twice there"
        );
        Ok(())
    })
}

/// Program that makes directories in a folder of the host: a restore compares no sizes of open
/// files then.
const MARKER: &str = "
import os, time
n = 0
while True:
    n += 1
    os.mkdir('/marks/%d' % n)
    time.sleep(.001)
";

fn nothing_runs_of_a_restored_container_whose_gpu_state_cannot_be_given_back(t: &Test) -> Result<()> {
    let (marks, control) = (t.folder()?.join("marks"), t.folder()?.join("control"));
    fs::create_dir_all(&marks)?;
    fs::create_dir_all(&control)?;
    let bind =
        |source: &std::path::Path, to: &str| format!("type=bind,src={},dst={to},options=rbind", source.display());
    let mounts = [bind(&marks, "/marks"), bind(&control, "/control")];
    let gpu = Gpu::one(t)?.fails("")?;
    let gpu = gpu.with(&["--mount", &mounts[0], "--mount", &mounts[1], "--env", "FAKE_CUDA_FILE=/control/options"]);
    let (id, to, image) = (t.id("g"), t.id("g"), t.id("checkpoint"));
    gpu.start_beside(&id, MARKER)?;
    t.ctr().checkpoint(&id, &image).ok()?;
    t.ctr().remove(&id)?;
    let marked = || -> Result<usize> { Ok(fs::read_dir(&marks)?.count()) };
    // Once empty, the folder shows whether a restored process ran.
    fs::remove_dir_all(&marks)?;
    fs::create_dir_all(&marks)?;
    fs::write(control.join("options"), "restore-fails=999:always")?;
    let out = t.ctr().restore(&to, &image).run()?.expect_failure()?;
    ensure_has!(out.stderr, "cannot restore process");
    ensure_eq!(marked()?, 0);
    t.ctr().remove(&to)?;
    fs::remove_file(control.join("options"))?;
    t.ctr().restore(&to, &image).ok()?;
    gpu.computes(&to)?;
    ensure!(marked()? > 0, "it does not run");
    Ok(())
}

fn a_checkpoint_of_a_gpu_program_says_what_it_had(t: &Test) -> Result<()> {
    let (gpu, id) = (Gpu::one(t)?, t.id("g"));
    gpu.start(&id, &["--size", "32"])?;
    let folder = t.folder()?.join("images");
    t.ctr().checkpoint_task(&id, &["--image-path", &folder.to_string_lossy()]).ok()?;
    let manifest: Value = serde_json::from_slice(&fs::read(folder.join("gpusnap.json"))?)?;
    let gpus = manifest["gpu"]["gpus"].as_array().context("no GPUs")?;
    ensure_eq!(gpus.len(), 1);
    ensure!(gpus[0]["uuid"].as_str().is_some_and(|uuid| uuid.starts_with("GPU-")), "{gpus:?}");
    let processes = manifest["gpu"]["processes"].as_array().context("no processes")?;
    ensure_eq!(processes.len(), 1);
    ensure_eq!(processes[0]["pid"], 1);
    ensure!(processes[0]["staged"].as_u64() >= Some(32 << 20), "{processes:?}");
    let phases: Vec<&str> =
        manifest["phases"].as_array().into_iter().flatten().filter_map(|p| p["phase"].as_str()).collect();
    for phase in ["discover", "lock", "hold", "cuda-checkpoint", "dump"] {
        ensure!(phases.contains(&phase), "{phase} is not among {phases:?}");
    }
    Ok(())
}

/// Saves and restores the program with these arguments, and expects rounds on both sides.
fn is_saved(t: &Test, gpu: &Gpu<'_>, arguments: &[&str]) -> Result<()> {
    let (id, to) = (t.id("g"), t.id("g"));
    gpu.start(&id, arguments)?;
    if arguments.contains(&"--spawn") {
        workers_compute(gpu, &id)?;
    }
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    gpu.computes(&id)?;
    t.ctr().moves(&id, &to)?;
    gpu.computes(&to)
}

fn processes_forked_from_a_gpu_program_are_saved_with_it(t: &Test) -> Result<()> {
    is_saved(t, &Gpu::one(t)?, &["--fork", "4"])
}

/// A process with a device open and mapped, and no GPU state, as one that uses NVML.
const MONITOR: &str = "
import mmap, os, time
fd = os.open('/dev/nvidia0', os.O_RDWR | os.O_CLOEXEC)
page = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
while True:
    time.sleep(.1)
    if os.path.exists('/dev/shm/read'):
        same = os.path.samestat(os.fstat(fd), os.stat('/dev/nvidia0'))
        open('/dev/shm/found', 'w').write(f'{page[5]} {same}')
";

fn a_process_beside_a_gpu_program_keeps_its_devices_and_a_restored_one_has_them_anew(t: &Test) -> Result<()> {
    let (gpu, id, to) = (Gpu::one(t)?, t.id("g"), t.id("g"));
    gpu.start_beside(&id, MONITOR)?;
    let devices = |id: &str| -> Result<String> {
        let count = "ls -l /proc/1/fd | grep -c nvidia; grep -c nvidia /proc/1/maps || :";
        Ok(t.ctr().exec(id, &["sh", "-c", count]).ok()?.trimmed())
    };
    // Python has a descriptor of its own for the mapping.
    ensure_eq!(devices(&id)?, "2\n1");
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    ensure_eq!(devices(&id)?, "2\n1");
    gpu.computes(&id)?;
    t.ctr().moves(&id, &to)?;
    gpu.computes(&to)?;
    ensure_eq!(devices(&to)?, "2\n0");
    t.ctr().exec(&to, &["touch", "/dev/shm/read"]).ok()?;
    eventually("the restored process to read its memory", || {
        ensure_eq!(t.ctr().exec(&to, &["cat", "/dev/shm/found"]).ok()?.trimmed(), "0 True");
        Ok(())
    })
}

/// Memory of two forked processes beside the GPU program, above the limit of the fill that delays
/// all else.
const BALLAST: [&str; 4] = ["--fork", "2", "--ballast", "64"];

fn processes_with_much_memory_beside_a_gpu_program_are_restored_whole(t: &Test) -> Result<()> {
    is_saved(t, &Gpu::one(t)?, &BALLAST)
}

/// Above the size from which the driver begins before all memory is there.
fn much_gpu_memory_is_in_place_when_the_program_goes_on(t: &Test) -> Result<()> {
    let (gpu, id, to) = (Gpu::one(t)?, t.id("g"), t.id("g"));
    gpu.start(&id, &["--size", "1100", "--fork", "1", "--ballast", "80"])?;
    t.ctr().moves(&id, &to)?;
    gpu.computes(&to)?;
    t.ctr().kill(&to, "USR2")?;
    eventually("all memory to be looked at", || {
        let log = gpu.log(&to)?;
        ensure!(!log.contains("FAILED"), "{}", log.lines().last().unwrap_or_default());
        ensure_has!(log, "full ");
        Ok(())
    })
}

fn who_is_killed_while_memory_is_filled_fails_the_restore_cleanly(t: &Test) -> Result<()> {
    let gpu = Gpu::one(t)?;
    // Long in comparison with the fill of the others, so that held threads are held at the time of
    // the kill.
    let gpu = if gpu.is_simulated() { gpu.fails("restore-ms=600")? } else { gpu };
    let (id, image) = (t.id("g"), t.id("checkpoint"));
    gpu.start(&id, &BALLAST)?;
    t.ctr().checkpoint(&id, &image).ok()?;
    t.ctr().remove(&id)?;
    let moments = [
        ("gpusnap-session", [0, 100, 300, 500]),
        ("gpusnap-session", [700, 800, 900, 1000]),
        ("cuda-caller", [0, 100, 300, 500]),
    ];
    for (role, after) in moments.into_iter().flat_map(|(role, moments)| moments.map(|after| (role, after))) {
        let what = || format!("after a kill of {role} {after} ms after its start");
        let to = t.id("g");
        let restore = t.ctr().restore(&to, &image).spawn()?;
        let killed = killed_after(role, restore.pid(), after);
        let restored = restore.wait()?;
        ensure!(killed > 0 || restored.code == 0, "nobody was killed {}: {}", what(), restored.stderr);
        if restored.code == 0 {
            gpu.computes(&to).with_context(what)?;
        }
        t.ctr().remove(&to).with_context(what)?;
    }
    let to = t.id("g");
    t.ctr().restore(&to, &image).ok()?;
    gpu.computes(&to)
}

/// Waits until the first two started processes of a program, or the only one, compute.
fn workers_compute(gpu: &Gpu<'_>, id: &str) -> Result<()> {
    eventually("the workers to compute", || {
        let log = gpu.log(id)?;
        ensure!(log.lines().filter(|line| line.starts_with("w0 n=")).count() > 1, "{log}");
        ensure!(!log.contains("w1 ") || log.contains("w1 n="), "{log}");
        Ok(())
    })
}

fn gpu_workers_under_a_process_without_gpu_are_saved(t: &Test) -> Result<()> {
    is_saved(t, &Gpu::one(t)?, &["--front", "--spawn", "2"])
}

fn a_program_on_two_gpus_is_saved(t: &Test) -> Result<()> {
    is_saved(t, &Gpu::several(t, 2)?, &["--devices", "2", "--size", "16"])
}

/// The real driver's library makes such nodes, if the container may.
fn a_program_on_one_of_two_gpus_whose_driver_made_nodes_of_both_is_restored(t: &Test) -> Result<()> {
    Gpu::several(t, 2)?;
    let (gpu, id, to) = (Gpu::one(t)?, t.id("g"), t.id("g"));
    gpu.start(&id, &[])?;
    t.ctr().exec(&id, &["sh", "-c", "test -e /dev/nvidia1 || mknod /dev/nvidia1 c 195 1"]).ok()?;
    t.ctr().moves(&id, &to)?;
    gpu.computes(&to)
}

fn two_containers_on_one_gpu_are_saved_each_by_itself(t: &Test) -> Result<()> {
    let (gpu, one, other) = (Gpu::one(t)?, t.id("g"), t.id("g"));
    gpu.start(&one, &[])?;
    gpu.start(&other, &[])?;
    let moved = t.id("g");
    t.ctr().moves(&one, &moved)?;
    gpu.computes(&other)?;
    gpu.computes(&moved)
}

fn a_gpu_programs_thread_that_reads_driver_memory_survives(t: &Test) -> Result<()> {
    let gpu = Gpu::one(t)?.fails("poll")?;
    is_saved(t, &gpu, &[])
}

fn a_stopped_gpu_process_is_saved_and_stays_stopped(t: &Test) -> Result<()> {
    let (gpu, id, to) = (Gpu::one(t)?, t.id("g"), t.id("g"));
    gpu.start(&id, &["--front", "--spawn", "1"])?;
    workers_compute(&gpu, &id)?;
    let worker = |id: &str| -> Result<u32> {
        let init = t.ctr().pid(id)?;
        proc::children(init).first().copied().context("no worker")
    };
    let stopped = |pid: u32| {
        eventually("the worker to be stopped", || {
            ensure_eq!(proc::state(pid)?, 'T');
            Ok(())
        })
    };
    let of_worker =
        |id: &str| -> Result<usize> { Ok(gpu.log(id)?.lines().filter(|line| line.starts_with("w0 ")).count()) };
    proc::signal(worker(&id)?, Signal::STOP)?;
    stopped(worker(&id)?)?;
    let before = of_worker(&id)?;
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    stopped(worker(&id)?)?;
    t.ctr().moves(&id, &to)?;
    stopped(worker(&to)?)?;
    ensure_eq!(of_worker(&to)?, before, "what the worker has said");
    proc::signal(worker(&to)?, Signal::CONT)?;
    eventually("the worker to compute on", || {
        ensure!(of_worker(&to)? > before, "still {before} lines");
        Ok(())
    })
}

fn a_long_gpu_kernel_is_waited_for(t: &Test) -> Result<()> {
    let (gpu, id) = (Gpu::one(t)?, t.id("g"));
    gpu.start(&id, &["--spin", "2500"])?;
    spins(t, &gpu, &id)?;
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    gpu.computes(&id)
}

/// Starts the program's long kernel.
fn spins(t: &Test, gpu: &Gpu<'_>, id: &str) -> Result<()> {
    t.ctr().kill(id, "USR1")?;
    eventually("the kernel to run", || {
        ensure_has!(gpu.log(id)?, "spin");
        Ok(())
    })
}

fn a_gpu_kernel_that_outlasts_the_patience_is_told_and_computed_to_its_end(t: &Test) -> Result<()> {
    let gpu = Gpu::one(t)?.with(&["--annotation", "gpusnap.dev/gpu-patience=1"]);
    let id = t.id("g");
    gpu.start(&id, &["--spin", "6000"])?;
    spins(t, &gpu, &id)?;
    let out = t.ctr().checkpoint(&id, &t.id("checkpoint")).run()?.expect_failure()?;
    ensure_has!(out.stderr, "has had GPU work under way");
    ensure_has!(out.stderr, "python3");
    gpu.computes(&id)
}

fn managed_gpu_memory_is_told_and_the_program_computes_on(t: &Test) -> Result<()> {
    let (gpu, id) = (Gpu::one(t)?, t.id("g"));
    gpu.start(&id, &["--managed"])?;
    let out = t.ctr().checkpoint(&id, &t.id("checkpoint")).run()?.expect_failure()?;
    ensure_has!(out.stderr, "managed memory");
    gpu.computes(&id)
}

fn a_gpu_program_that_was_started_by_exec_goes_on_and_what_is_saved_is_restored(t: &Test) -> Result<()> {
    let (gpu, id, to) = (Gpu::one(t)?, t.id("g"), t.id("g"));
    gpu.start(&id, &["--size", "64"])?;
    let program = ["python3", "/opt/programs/gpu.py", "--log", "/dev/shm/exec"];
    t.ctr().task(&["exec", "--detach", "--exec-id", "gpu", &id]).args(&program).ok()?;
    gpu.computes_in(&id, "exec")?;
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    gpu.computes(&id)?;
    gpu.computes_in(&id, "exec")?;
    t.ctr().moves(&id, &to)?;
    gpu.computes(&to)
}

fn a_filter_that_kills_for_calls_of_a_checkpoint_kills_nobody(t: &Test) -> Result<()> {
    // Calls that remap memory: the program itself makes none of them.
    for call in ["socketpair", "recvmsg", "dup3"] {
        let (gpu, id) = (Gpu::one(t)?, t.id("g"));
        let rule = json!({ "names": [call], "action": "SCMP_ACT_KILL_PROCESS" });
        let profile =
            json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [rule] });
        let path = std::env::temp_dir().join(t.id("profile"));
        fs::write(&path, profile.to_string())?;
        let gpu = gpu.with(&["--seccomp", "--seccomp-profile", &path.to_string_lossy()]);
        gpu.start(&id, &["--size", "64", "--fork", "2"])?;
        t.ctr().checkpoint(&id, &t.id("checkpoint")).ok().with_context(|| format!("with {call}"))?;
        gpu.computes(&id).with_context(|| format!("after a checkpoint with {call}"))?;
    }
    Ok(())
}

fn gpu_memory_that_does_not_fit_into_the_limit_is_told_before_it_kills(t: &Test) -> Result<()> {
    let gpu = Gpu::one(t)?;
    // The simulated GPU's memory counts as the container's as well.
    let (limit, size) = if gpu.is_simulated() { (256 << 20, "160") } else { (2_u64 << 30, "4096") };
    let gpu = gpu.with(&["--memory-limit", &limit.to_string()]);
    let id = t.id("g");
    gpu.start(&id, &["--size", size])?;
    let out = t.ctr().checkpoint(&id, &t.id("checkpoint")).run()?.expect_failure()?;
    ensure_has!(out.stderr, "GiB on the GPU have to be moved to memory");
    gpu.computes(&id)
}

fn a_gpu_driver_that_refuses_is_told_and_the_program_computes_on(t: &Test) -> Result<()> {
    let gpu = Gpu::one(t)?.fails("checkpoint-fails=999")?;
    let id = t.id("g");
    gpu.start(&id, &[])?;
    let out = t.ctr().checkpoint(&id, &t.id("checkpoint")).run()?.expect_failure()?;
    ensure_has!(out.stderr, "CUDA_ERROR_UNKNOWN (999)");
    gpu.computes(&id)?;
    // The driver refused once only.
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    gpu.computes(&id)
}

fn a_gpu_driver_that_fails_to_restore_once_is_asked_again(t: &Test) -> Result<()> {
    let gpu = Gpu::one(t)?.fails("restore-fails=2")?;
    let id = t.id("g");
    gpu.start(&id, &[])?;
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    gpu.computes(&id)
}

fn a_gpu_driver_that_hangs_is_told_and_the_program_computes_on(t: &Test) -> Result<()> {
    let gpu = Gpu::one(t)?.fails("hang-at=lock")?;
    let id = t.id("g");
    gpu.start(&id, &[])?;
    let out = t.ctr().checkpoint(&id, &t.id("checkpoint")).run()?.expect_failure()?;
    ensure_has!(out.stderr, "the driver does not answer");
    gpu.computes(&id)
}

fn a_gpu_program_that_dies_in_its_checkpoint_is_told(t: &Test) -> Result<()> {
    let gpu = Gpu::one(t)?.fails("crash-at=checkpoint")?;
    let id = t.id("g");
    // Not init: the kernel spares init signals from inside.
    gpu.start(&id, &["--front", "--spawn", "1"])?;
    workers_compute(&gpu, &id)?;
    let out = t.ctr().checkpoint(&id, &t.id("checkpoint")).run()?.expect_failure()?;
    ensure_has!(out.stderr, "cannot checkpoint process");
    eventually("the death to be told", || {
        ensure_eq!(t.ctr().status(&id)?, "STOPPED");
        Ok(())
    })
}

/// Kills the processes of a role, some milliseconds after the first one appears. Returns their
/// number; 0 if the client ends first.
fn killed_after(role: &str, client: u32, milliseconds: u64) -> usize {
    // Look often: some live for some tens of milliseconds.
    while proc::acting_as(role).is_empty() && proc::alive(client) {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(milliseconds));
    proc::acting_as(role).into_iter().filter(|pid| proc::kill(*pid).is_ok()).count()
}

/// Kills the process of this name again and again during a checkpoint of a container with a slow
/// driver, each time some milliseconds after its start, and expects the container to compute on.
/// `role` is the first argument or the name.
fn is_killed(t: &Test, role: &str, after_ms: &[u64]) -> Result<()> {
    let gpu = Gpu::one(t)?;
    let gpu = if gpu.is_simulated() { gpu.fails("lock-ms=150,checkpoint-ms=300,restore-ms=150")? } else { gpu };
    let id = t.id("g");
    gpu.start(&id, &["--size", "64"])?;
    let mut killed = 0;
    for after in after_ms {
        let image = t.id("checkpoint");
        let checkpoint = t.ctr().checkpoint(&id, &image).spawn()?;
        killed += killed_after(role, checkpoint.pid(), *after);
        // The checkpoint may have succeeded all the same: only the container counts.
        checkpoint.wait()?;
        ensure_eq!(t.ctr().status(&id)?, "RUNNING", "after a kill {after} ms after its start");
        gpu.computes(&id).with_context(|| format!("after a kill {after} ms after its start"))?;
    }
    ensure!(killed > 0, "there was nothing to kill");
    t.ctr().checkpoint(&id, &t.id("checkpoint")).ok()?;
    gpu.computes(&id)
}

fn a_session_that_is_killed_leaves_the_gpu_working(t: &Test) -> Result<()> {
    is_killed(t, "gpusnap-session", &[20, 120, 220, 320, 420, 520, 620, 720, 820, 920])
}

fn a_caller_of_the_gpu_driver_that_is_killed_leaves_the_gpu_working(t: &Test) -> Result<()> {
    is_killed(t, "cuda-caller", &[20, 120, 220, 320, 420, 520, 620, 720, 820, 920])
}

fn a_criu_that_is_killed_leaves_the_gpu_working(t: &Test) -> Result<()> {
    is_killed(t, "criu", &[0, 5, 10, 20, 40, 80])
}
