//! The fault matrix: a kill, or a full disk, in each step of a checkpoint and of a restore.
//!
//! A session halts at the step (`GPUSNAP_TEST_HALTS`), so that each kill hits the intended step.
//! After any fault the container computes on with its GPU, or was restored whole, or the folder is
//! refused; and nothing is left locked, frozen, traced, mounted, or running.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::gpu::{Gpu, HALTS};
use e2e::target::Shim;
use e2e::{Case, Cmd, Output, Running, Test, case, cgroup, ensure_eq, eventually, proc};
use rustix::process::Signal;
use serde_json::Value;

use crate::checkpoint_faults::{below, nothing_runs, shim_now, shim_of};
use crate::checkpoint_memory::{gpusnap, remove_snapshots_of, snapshot_of};

pub(crate) fn cases() -> Vec<Case> {
    let cases = vec![
        case!(a_session_that_is_killed_in_a_step_of_a_checkpoint_leaves_the_container_whole),
        case!(a_client_that_is_killed_in_a_step_of_a_checkpoint_leaves_the_container_whole),
        case!(a_caller_or_criu_that_is_killed_in_a_step_of_a_checkpoint_leaves_the_container_whole),
        case!(a_shim_that_is_killed_in_a_step_of_a_checkpoint_leaves_nothing),
        case!(a_disk_that_is_full_in_a_step_of_a_checkpoint_leaves_the_container_whole).alone(),
        case!(whoever_is_killed_in_a_step_of_a_restore_leaves_nothing_or_a_whole_container),
        case!(a_disk_that_is_full_in_a_step_of_a_restore_leaves_nothing_or_a_whole_container).alone(),
    ];
    let stock = "runc's shim has no sessions";
    let runc = "runc drives CRIU, without the store and its steps, and nerdctl cannot ask for it";
    cases.into_iter().map(|case| case.except(Shim::Stock, stock).except(Shim::GpusnapRunc, runc)).collect()
}

/// Memory on the GPU, and memory of a forked process, both stored through the store.
const PROGRAM: [&str; 8] = ["--size", "32", "--fork", "1", "--ballast", "32", "--pinned", "4"];

/// Fate of the container in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    LeaveRunning,
    Exit,
}

/// Steps of a checkpoint of [`PROGRAM`], in order.
fn steps(after: After) -> &'static [&'static str] {
    match after {
        After::LeaveRunning => &[
            "freeze",
            "discover",
            "lock",
            "hold",
            "cuda-checkpoint",
            "save-memory",
            "remap",
            "dump",
            "cuda-restore",
            "unlock",
            "release",
            "publish",
        ],
        After::Exit => &[
            "freeze",
            "discover",
            "lock",
            "hold",
            "cuda-checkpoint",
            "save-memory",
            "remap",
            "dump",
            "move-memory",
            "publish",
            "release",
        ],
    }
}

/// Steps of a restore of [`PROGRAM`], in order.
const RESTORE_STEPS: [&str; 8] =
    ["inspect", "prepare", "cgroup", "restore", "fill", "cuda-restore", "unlock", "resume"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Session,
    Client,
    /// The driver's caller, and CRIU: each exists in some steps only.
    Caller,
    Criu,
    Shim,
    /// Init of the container in a restore.
    Init,
}

const CHECKPOINT: &str = "step";
const GOOD: &str = "good";

/// A container of nerdctl's with GPU state and restorable checkpoints.
struct Scene<'t> {
    t: &'t Test,
    gpu: Gpu<'t>,
    name: String,
    id: String,
    /// Fate of the container in each of its checkpoints.
    after: After,
}

impl<'t> Scene<'t> {
    fn start(t: &'t Test, after: After) -> Result<Self> {
        let (gpu, name) = (Gpu::one(t)?, t.id("g"));
        // nerdctl passes a choice about the end to runc's shims only.
        let options = if after == After::Exit { t.nerdctl().ends_on_checkpoint() } else { &[] };
        let id = gpu.start_by_nerdctl(&name, options, &PROGRAM)?;
        Ok(Self { t, gpu, name, id, after })
    }

    fn shim(&self) -> Result<u32> {
        shim_of(&self.id)
    }

    fn checkpoint(&self) -> Result<Cmd> {
        let folder = self.folder(CHECKPOINT)?;
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        remove_snapshots_of(self.t, &self.id)?;
        let options: &[&str] = if self.after == After::LeaveRunning { &["--leave-running"] } else { &[] };
        self.t.nerdctl().checkpoint(&self.name, CHECKPOINT, options)
    }

    fn folder(&self, checkpoint: &str) -> Result<PathBuf> {
        Ok(self.t.nerdctl().checkpoints()?.join(checkpoint))
    }

    /// Starts the client's command, and returns it with the halted session when the step is reached.
    fn halt(&self, command: Cmd, step: &str) -> Result<(Running, u32)> {
        let mark = Path::new(HALTS).join(format!("{}.{step}", self.id));
        fs::write(&mark, "")?;
        let client = command.spawn()?;
        let halted = eventually("the session to halt", || {
            if !proc::alive(client.pid()) {
                // No step of this name: reported by the missing halt below.
                return Ok(None);
            }
            ensure!(!mark.exists(), "not there yet");
            let session = below(self.shim()?, "gpusnap-session")?;
            ensure_eq!(proc::state(session)?, 'T');
            Ok(Some(session))
        })?;
        match halted {
            Some(session) => Ok((client, session)),
            None => {
                let _ = fs::remove_file(&mark);
                anyhow::bail!("no halt: {}", client.wait()?)
            }
        }
    }

    /// Kills a process while the session is halted. Returns `false` if that role has no process in
    /// this step.
    fn strike(&self, victim: Victim, step: &str, client: &Running, session: u32) -> Result<bool> {
        let shim = self.shim()?;
        match victim {
            Victim::Session => proc::kill(session)?,
            Victim::Client => client.signal(Signal::KILL)?,
            Victim::Shim => proc::kill(shim)?,
            Victim::Caller => {
                let callers: Vec<u32> = proc::children(session).into_iter().filter(|pid| is_caller(*pid)).collect();
                for caller in &callers {
                    proc::kill(*caller)?;
                }
                return Ok(!callers.is_empty());
            }
            Victim::Criu if step == "dump" || step == "restore" => {
                // CRIU is started in this step.
                proc::signal(session, Signal::CONT)?;
                return Ok(killed_when_there(client, || below(shim, "criu")));
            }
            Victim::Criu => return Ok(below(shim, "criu").and_then(proc::kill).is_ok()),
            Victim::Init => return Ok(self.init().and_then(proc::kill).is_ok()),
        }
        Ok(true)
    }

    /// The restored program.
    fn init(&self) -> Result<u32> {
        let children = proc::children(self.shim()?);
        children.into_iter().find(|pid| proc::cmdline(*pid).contains("gpu.py")).context("no init yet")
    }

    /// Expects the container as before, or ended by a checkpoint that restores it.
    fn is_whole(&self, victim: Victim, session: u32, out: &Output) -> Result<()> {
        self.settles(session)?;
        if victim == Victim::Client {
            // The client would have resumed the container.
            self.t.nerdctl().cmd(&["unpause", &self.name]).run()?;
        }
        let status = self.t.ctr().status(&self.id)?;
        if status == "STOPPED" {
            ensure!(self.after == After::Exit, "the container has ended: {out}");
            ensure!(
                victim == Victim::Client || out.code == 0,
                "the container has ended, and the client was told: {out}"
            );
            self.t.nerdctl().becomes(&self.name, "exited")?;
            self.t.nerdctl().restored(&self.name, CHECKPOINT).context("the container has ended")?;
        } else {
            self.t.ctr().becomes(&self.id, "RUNNING")?;
            // A killed client has not fetched the checkpoint, unknown to the shim.
            if victim != Victim::Client {
                self.is_complete_or_refused(out)?;
            }
        }
        self.runs_free()
    }

    /// Expects the program to compute, and nothing to stand still.
    fn runs_free(&self) -> Result<()> {
        self.gpu.computes(&self.id)?;
        let init = self.t.ctr().pid(&self.id)?;
        ensure!(!cgroup::frozen(init)?, "the cgroup is frozen");
        for pid in [vec![init], proc::descendants(init)].concat() {
            ensure_eq!(proc::status(pid, "TracerPid")?, "0", "the tracer of {pid}");
        }
        Ok(())
    }

    /// Waits until no session, caller or CRIU is left.
    fn settles(&self, session: u32) -> Result<()> {
        proc::gone(session)?;
        eventually("the session to end", || {
            // A session of a killed shim has no successor.
            let Some(shim) = shim_now(&self.id) else { return Ok(()) };
            for name in ["gpusnap-session", "cuda-caller", "criu"] {
                ensure!(below(shim, name).is_err(), "{name} is there");
            }
            Ok(())
        })
    }

    /// Expects an undisturbed checkpoint to work after all faults.
    fn is_still_saved(&self) -> Result<()> {
        self.checkpoint()?.ok()?;
        if self.after == After::Exit {
            self.t.nerdctl().becomes(&self.name, "exited")?;
            self.t.nerdctl().restored(&self.name, CHECKPOINT)?;
        }
        self.runs_free()
    }

    /// Expects a whole checkpoint, or none and no snapshot.
    fn is_complete_or_refused(&self, out: &Output) -> Result<()> {
        if out.code == 0 {
            let record = fs::read(self.folder(CHECKPOINT)?.join("gpusnap.json"))?;
            let record: Value = serde_json::from_slice(&record).context("gpusnap.json")?;
            ensure_eq!(record["state"], "complete");
            let name = snapshot_of(self.t, &self.id)?;
            return gpusnap(self.t, &["verify", &name])?.ok().map(drop);
        }
        let left = snapshot_of(self.t, &self.id);
        ensure!(left.is_err(), "the snapshot of no checkpoint is left: {left:?}");
        Ok(())
    }
}

fn is_caller(pid: u32) -> bool {
    proc::cmdline(pid).split(' ').nth(1) == Some("cuda-caller")
}

/// Kills a process as soon as it exists, unless the client ends first.
fn killed_when_there(client: &Running, find: impl Fn() -> Result<u32>) -> bool {
    while proc::alive(client.pid()) {
        if find().and_then(proc::kill).is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// Returns whether a role may have a process in a step, which a fault of that process can harm.
fn is_there(victim: Victim, after: After, step: &str) -> bool {
    match victim {
        Victim::Criu => matches!(step, "dump" | "move-memory" | "publish"),
        // After the commit the container has ended, and containerd discards what no client fetches.
        Victim::Client => after == After::LeaveRunning || step != "release",
        _ => true,
    }
}

/// Kills these roles in each step of a checkpoint, one after the other, and expects a whole
/// container each time.
fn killed_in_checkpoints(t: &Test, victims: &[Victim]) -> Result<()> {
    let mut struck = 0;
    for after in [After::LeaveRunning, After::Exit] {
        let scene = Scene::start(t, after)?;
        for (step, victim) in steps(after).iter().flat_map(|step| victims.iter().map(move |victim| (step, *victim))) {
            if !is_there(victim, after, step) {
                continue;
            }
            let what = || format!("{victim:?} is killed in the step {step} of a checkpoint to {after:?}");
            let (client, session) = scene.halt(scene.checkpoint()?, step).with_context(what)?;
            struck += usize::from(scene.strike(victim, step, &client, session).with_context(what)?);
            // The session may be the victim.
            let _ = proc::signal(session, Signal::CONT);
            let out = client.wait()?;
            scene.is_whole(victim, session, &out).with_context(what)?;
        }
        scene.is_still_saved()?;
    }
    eprintln!("e2e: {}: {struck} times somebody was killed: {victims:?}", t.target());
    ensure!(struck > 3, "{victims:?} had a process {struck} times only");
    Ok(())
}

fn a_session_that_is_killed_in_a_step_of_a_checkpoint_leaves_the_container_whole(t: &Test) -> Result<()> {
    killed_in_checkpoints(t, &[Victim::Session])
}

fn a_client_that_is_killed_in_a_step_of_a_checkpoint_leaves_the_container_whole(t: &Test) -> Result<()> {
    killed_in_checkpoints(t, &[Victim::Client])
}

fn a_caller_or_criu_that_is_killed_in_a_step_of_a_checkpoint_leaves_the_container_whole(t: &Test) -> Result<()> {
    killed_in_checkpoints(t, &[Victim::Caller, Victim::Criu])
}

fn a_shim_that_is_killed_in_a_step_of_a_checkpoint_leaves_nothing(t: &Test) -> Result<()> {
    for after in [After::LeaveRunning, After::Exit] {
        for step in steps(after) {
            let what = || format!("the shim is killed in the step {step} of a checkpoint to {after:?}");
            let scene = Scene::start(t, after)?;
            let (client, session) = scene.halt(scene.checkpoint()?, step).with_context(what)?;
            let everybody = proc::descendants(scene.shim()?);
            scene.strike(Victim::Shim, step, &client, session)?;
            // containerd may have ended the session together with the container by now.
            let _ = proc::signal(session, Signal::CONT);
            let out = client.wait()?;
            for pid in everybody {
                proc::gone(pid).with_context(what)?;
            }
            nothing_runs(&scene.id).with_context(what)?;
            // After the commit, the checkpoint is all that there is of the container, and stays.
            if *step != "release" {
                scene.is_complete_or_refused(&out).with_context(what)?;
            }
            remove_snapshots_of(t, &scene.id)?;
            t.nerdctl().cmd(&["rm", "--force", &scene.name]).ok().with_context(what)?;
        }
    }
    Ok(())
}

/// A container that has ended with a good checkpoint.
fn ended(t: &Test) -> Result<Scene<'_>> {
    let scene = Scene::start(t, After::Exit)?;
    t.nerdctl().checkpoint(&scene.name, GOOD, &[])?.ok()?;
    t.nerdctl().becomes(&scene.name, "exited")?;
    Ok(scene)
}

/// Expects a whole container or none from a disturbed restore, and removes it.
fn whole_or_none(scene: &Scene<'_>, victim: Option<Victim>, session: u32, out: &Output) -> Result<()> {
    let t = scene.t;
    scene.settles(session)?;
    let runs = t.ctr().status(&scene.id).is_ok_and(|status| status == "RUNNING");
    if out.code == 0 && victim == Some(Victim::Init) {
        ensure_eq!(t.nerdctl().exit_code(&scene.name)?, 137, "the exit code of a killed program");
    } else if out.code == 0 {
        ensure!(runs, "the client takes the container for restored: {out}");
    }
    if runs {
        scene.runs_free()?;
        t.nerdctl().cmd(&["kill", &scene.name]).ok()?;
    } else if out.code != 0 {
        eventually("the cgroups to be removed", || {
            let left = cgroup::folders_named(&scene.id);
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })?;
    }
    eventually("the container to have ended", || {
        let status = t.nerdctl().state(&scene.name, "Status")?;
        ensure!(status != "running", "{status}");
        Ok(())
    })?;
    nothing_runs(&scene.id)
}

fn restores_whole(scene: &Scene<'_>) -> Result<()> {
    scene.t.nerdctl().restored(&scene.name, GOOD)?;
    scene.runs_free()
}

fn whoever_is_killed_in_a_step_of_a_restore_leaves_nothing_or_a_whole_container(t: &Test) -> Result<()> {
    let scene = ended(t)?;
    let victims = [Victim::Session, Victim::Client, Victim::Caller, Victim::Criu, Victim::Init, Victim::Shim];
    let mut struck = 0;
    for (step, victim) in RESTORE_STEPS.iter().flat_map(|step| victims.map(|victim| (*step, victim))) {
        let what = || format!("{victim:?} is killed in the step {step} of a restore");
        let command = t.nerdctl().restore(&scene.name, GOOD)?;
        let (client, session) = scene.halt(command, step).with_context(what)?;
        let is_struck = scene.strike(victim, step, &client, session).with_context(what)?;
        struck += usize::from(is_struck);
        // The session may be the victim.
        let _ = proc::signal(session, Signal::CONT);
        let out = client.wait()?;
        whole_or_none(&scene, is_struck.then_some(victim), session, &out).with_context(what)?;
    }
    eprintln!("e2e: {}: {struck} times somebody was killed in a restore", t.target());
    restores_whole(&scene)
}

/// A file system of this many MiB at a place, until dropped.
struct SmallDisk {
    place: PathBuf,
}

impl SmallDisk {
    fn mount(place: PathBuf, mebibytes: u32) -> Result<Self> {
        fs::create_dir_all(&place)?;
        let size = format!("size={mebibytes}m,mode=1777");
        Cmd::new("mount").args(&["-t", "tmpfs", "-o", &size, "e2e"]).arg(place.to_string_lossy()).ok()?;
        Ok(Self { place })
    }

    /// Writes a file until the disk is full. The removal of the file frees the room.
    fn fill(&self) -> Result<Filler> {
        let path = self.place.join(".filler");
        let mut file = fs::File::create(&path)?;
        for size in [1 << 20, 4096] {
            let block = vec![0; size];
            while file.write_all(&block).is_ok() {}
        }
        Ok(Filler { path })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Cmd::new("umount").arg("--lazy").arg(self.place.to_string_lossy()).run().ok();
    }
}

struct Filler {
    path: PathBuf,
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The node's store, unless containerd's environment names another.
const STORE: &str = "/var/lib/gpusnap";

/// Folder in which containerd makes the folders of checkpoints, and packs or unpacks them for its
/// clients.
const FOLDERS: &str = "/tmp";

/// Small disks for the store and for the folders of checkpoints.
fn small_disks() -> Result<[SmallDisk; 2]> {
    Ok([SmallDisk::mount(STORE.into(), 600)?, SmallDisk::mount(FOLDERS.into(), 600)?])
}

fn a_disk_that_is_full_in_a_step_of_a_checkpoint_leaves_the_container_whole(t: &Test) -> Result<()> {
    let disks = small_disks()?;
    let mut refused = 0;
    for after in [After::LeaveRunning, After::Exit] {
        let scene = Scene::start(t, after)?;
        // The disks take turns, which saves two minutes. A step missing in one mode occurs in the
        // other.
        let turn = usize::from(after == After::Exit);
        for (step, disk) in steps(after).iter().zip(disks.iter().cycle().skip(turn)) {
            let what = || format!("{} is full in the step {step} of a checkpoint to {after:?}", disk.place.display());
            let (client, session) = scene.halt(scene.checkpoint()?, step).with_context(what)?;
            let filler = disk.fill()?;
            proc::signal(session, Signal::CONT)?;
            let out = client.wait()?;
            drop(filler);
            refused += usize::from(out.code != 0);
            scene.is_whole(Victim::Session, session, &out).with_context(what)?;
        }
        scene.is_still_saved()?;
        t.nerdctl().cmd(&["rm", "--force", &scene.name]).ok()?;
    }
    eprintln!("e2e: {}: {refused} checkpoints found the disk full", t.target());
    ensure!(refused > 3, "{refused} checkpoints only found the disk full");
    Ok(())
}

fn a_disk_that_is_full_in_a_step_of_a_restore_leaves_nothing_or_a_whole_container(t: &Test) -> Result<()> {
    let disks = small_disks()?;
    let scene = ended(t)?;
    for (step, disk) in RESTORE_STEPS.iter().flat_map(|step| disks.iter().map(move |disk| (step, disk))) {
        let what = || format!("{} is full in the step {step} of a restore", disk.place.display());
        let command = t.nerdctl().restore(&scene.name, GOOD)?;
        let (client, session) = scene.halt(command, step).with_context(what)?;
        let filler = disk.fill()?;
        proc::signal(session, Signal::CONT)?;
        let out = client.wait()?;
        drop(filler);
        whole_or_none(&scene, None, session, &out).with_context(what)?;
    }
    restores_whole(&scene)?;
    t.nerdctl().cmd(&["rm", "--force", &scene.name]).ok().map(drop)
}
