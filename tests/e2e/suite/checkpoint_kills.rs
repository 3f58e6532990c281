//! The node's store of snapshots, under kills of its users.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::target::Shim;
use e2e::{Case, Cmd, Test, case, eventually, proc};

use crate::checkpoint_cri::registry;
use crate::checkpoint_ctr::{counts_past, hold_memory_with};
use crate::checkpoint_memory::{gpusnap, remove_snapshots_of, snapshot_of, snapshots};

pub(crate) fn cases() -> Vec<Case> {
    let through_images = "all memory goes through the images, by runc";
    let case = case!(the_store_is_whole_whoever_is_killed_and_when).alone();
    vec![case.except(Shim::Stock, through_images).except(Shim::GpusnapRunc, through_images)]
}

const MEGABYTES: u32 = 256;

/// Number of kills: `GPUSNAP_E2E_KILLS`, or one for each victim in each step.
fn kills() -> Result<u32> {
    match std::env::var("GPUSNAP_E2E_KILLS") {
        Ok(text) => text.parse().with_context(|| format!("GPUSNAP_E2E_KILLS={text}")),
        Err(_) => Ok(12),
    }
}

/// The shim of the step's container; other shims in the bed are never killed.
const SHIM: &str = "containerd-shim";

/// Steps with use of the store, and the victims in turns.
const STEPS: [(Step, &[&str]); 4] = [
    (Step::Checkpoint, &["gpusnap-session", "criu", SHIM]),
    (Step::Push, &["gpusnap"]),
    (Step::Pull, &["gpusnap"]),
    (Step::Restore, &["gpusnap-session", "criu", SHIM]),
];

#[derive(Clone, Copy, Debug)]
enum Step {
    Checkpoint,
    Push,
    Pull,
    Restore,
}

/// A container, its checkpoint, and a second container from the checkpoint.
struct Scene<'t> {
    t: &'t Test,
    id: String,
    to: String,
    image: String,
    target: String,
}

fn the_store_is_whole_whoever_is_killed_and_when(t: &Test) -> Result<()> {
    let (id, to, image) = (t.id("c"), t.id("c"), t.id("checkpoint"));
    let target = format!("{}/{id}:kept", registry()?);
    let scene = Scene { t, id, to, image, target };
    // The store is verified after each kill: remove other tests' leftovers, unused now.
    for name in snapshots(t)? {
        gpusnap(t, &["rm", "--wait", &name])?.ok()?;
    }
    let mut usual = Vec::new();
    for (step, _) in STEPS {
        scene.prepare(step)?;
        let begin = Instant::now();
        scene.command(step)?.ok().with_context(|| format!("{step:?}, undisturbed"))?;
        usual.push(begin.elapsed());
        scene.succeeds(step)?;
    }
    let mut killed = 0;
    for kill in 0..kills()? {
        let number = usize::try_from(kill)? % STEPS.len();
        let (step, roles) = STEPS[number];
        let role = roles[usize::try_from(kill)? / STEPS.len() % roles.len()];
        // Spread over the duration without repetition: multiples of the golden ratio, in 1024ths.
        let moment = usual[number] * (kill * 633 % 1024) / 1024;
        let what = || format!("kill {kill}: of {role} {moment:?} after the begin of {step:?}");
        killed += scene.struck(step, role, moment).with_context(what)?;
    }
    eprintln!("e2e: {}: {killed} programs killed", t.target());
    ensure!(killed > 0, "there was nothing to kill");
    remove_snapshots_of(t, &scene.id)
}

impl Scene<'_> {
    /// Prepares the scene of a step.
    fn prepare(&self, step: Step) -> Result<()> {
        match step {
            Step::Checkpoint => {
                self.t.ctr().cmd().args(&["image", "rm", &self.image]).run()?;
                remove_snapshots_of(self.t, &self.id)?;
                if !self.runs() {
                    self.forget(&self.id)?;
                    hold_memory_with(self.t, &self.id, &[], MEGABYTES)?;
                }
            }
            Step::Push => {}
            Step::Pull => remove_snapshots_of(self.t, &self.id)?,
            // The other container has the required cgroup.
            Step::Restore => {
                self.forget(&self.id)?;
                self.forget(&self.to)?;
            }
        }
        Ok(())
    }

    fn command(&self, step: Step) -> Result<Cmd> {
        Ok(match step {
            Step::Checkpoint => self.t.ctr().checkpoint(&self.id, &self.image),
            Step::Push => gpusnap(self.t, &["push", &snapshot_of(self.t, &self.id)?, &self.target])?,
            Step::Pull => gpusnap(self.t, &["pull", &self.target, &format!("default/{}.pulled", self.id)])?,
            Step::Restore => self.t.ctr().restore(&self.to, &self.image),
        })
    }

    /// Checks the result of a finished step.
    fn succeeds(&self, step: Step) -> Result<()> {
        match step {
            Step::Checkpoint => counts_past(self.t, &self.id, 3).map(drop),
            Step::Push => Ok(()),
            Step::Pull => snapshot_of(self.t, &self.id).map(drop),
            Step::Restore => {
                counts_past(self.t, &self.to, 3)?;
                self.forget(&self.to)
            }
        }
    }

    /// Kills a process during a step, and expects a whole store and a second try that works.
    /// Returns the number of killed processes.
    fn struck(&self, step: Step, role: &str, moment: Duration) -> Result<usize> {
        self.prepare(step)?;
        let running = self.command(step)?.spawn()?;
        std::thread::sleep(moment);
        let id = if matches!(step, Step::Restore) { &self.to } else { &self.id };
        let is_shim = |pid: &u32| {
            let line = proc::cmdline(*pid);
            line.contains(SHIM) && line.contains(id.as_str())
        };
        let victims = match role {
            SHIM => proc::all().into_iter().filter(is_shim).collect(),
            _ => proc::acting_as(role),
        };
        let killed = victims.into_iter().filter(|pid| proc::kill(*pid).is_ok()).count();
        // The step may have succeeded all the same.
        running.wait()?;
        gpusnap(self.t, &["verify"])?.ok().context("the store")?;
        if matches!(step, Step::Checkpoint) {
            ensure!(role == SHIM || self.runs(), "the container does not run any more");
        }
        if matches!(step, Step::Pull) && snapshot_of(self.t, &self.id).is_ok() {
            return Ok(killed);
        }
        if !matches!(step, Step::Pull) {
            self.prepare(step)?;
        }
        self.command(step)?.ok().context("a second try")?;
        self.succeeds(step)?;
        gpusnap(self.t, &["verify"])?.ok().context("the store after a second try")?;
        Ok(killed)
    }

    fn runs(&self) -> bool {
        self.t.ctr().status(&self.id).is_ok_and(|status| status == "RUNNING")
    }

    /// Removes a container in any state.
    fn forget(&self, id: &str) -> Result<()> {
        let ctr = self.t.ctr();
        if !ctr.cmd().args(&["container", "ls", "-q"]).ok()?.text().lines().any(|line| line == id) {
            return Ok(());
        }
        // containerd may still be busy with a container of a killed shim.
        eventually(&format!("{id} to be removed"), || ctr.remove(id))
    }
}
