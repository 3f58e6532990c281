//! `ctr`, containerd's own client.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::target::Shim;
use crate::{Cmd, IMAGE, Output, PYTHON, Test, eventually, proc};

/// `ctr` of the test's containerd, with the test's shim.
pub struct Ctr<'a> {
    test: &'a Test,
}

impl<'a> Ctr<'a> {
    pub(crate) fn new(test: &'a Test) -> Self {
        Self { test }
    }

    /// `ctr` with the address, for commands without a method here.
    pub fn cmd(&self) -> Cmd {
        let bed = self.test.bed();
        bed.client("ctr").args(&["--address", &bed.address(), "--namespace", "default"])
    }

    /// Options that select the target's shim.
    fn runtime(&self) -> Vec<String> {
        let shim = self.test.target().shim;
        let mut args = vec!["--runtime".to_owned(), shim.runtime().to_owned()];
        if shim == Shim::GpusnapRunc {
            args.extend(["--runtime-config-path".to_owned(), self.test.bed().runc_options().to_owned()]);
        }
        args
    }

    /// `ctr run` of the image. The container is removed at the end of the test in any case.
    pub fn run(&self, id: &str, options: &[&str], argv: &[&str]) -> Cmd {
        self.run_image(IMAGE, id, options, argv)
    }

    /// `ctr run` of an image of the test's choice.
    pub fn run_image(&self, image: &str, id: &str, options: &[&str], argv: &[&str]) -> Cmd {
        self.removed_at_the_end(id);
        self.cmd().arg("run").args(&self.runtime()).args(options).args(&[image, id]).args(argv)
    }

    /// `ctr run` of the image with a runtime and options of the test's choice.
    pub fn run_by(&self, runtime: &str, id: &str, options: &[&str], argv: &[&str]) -> Cmd {
        self.removed_at_the_end(id);
        self.cmd().args(&["run", "--runtime", runtime]).args(options).args(&[IMAGE, id]).args(argv)
    }

    /// Creates a container without a task.
    pub fn create(&self, id: &str, argv: &[&str]) -> Result<()> {
        self.removed_at_the_end(id);
        self.cmd().args(&["container", "create"]).args(&self.runtime()).args(&[IMAGE, id]).args(argv).ok().map(drop)
    }

    /// `ctr run --config FILE`: the test gives the whole spec.
    pub fn run_spec(&self, id: &str, options: &[&str], config: &str) -> Cmd {
        self.removed_at_the_end(id);
        self.cmd().arg("run").args(&self.runtime()).args(options).args(&["--config", config, id])
    }

    /// Writable copy of the image's files in a folder of the test, for specs with a separate root.
    pub fn rootfs(&self) -> Result<String> {
        let folder = self.test.folder()?.join(self.test.id("root"));
        std::fs::create_dir_all(&folder)?;
        let folder = folder.to_string_lossy().into_owned();
        self.test.at_end(self.cmd().args(&["image", "unmount", "--rm", &folder]));
        self.cmd().args(&["image", "mount", "--rw", IMAGE, &folder]).ok()?;
        Ok(folder)
    }

    /// containerd's default spec for changes, with these arguments and a separate root.
    pub fn spec(&self, argv: &[&str]) -> Result<Value> {
        let text = self.cmd().args(&["oci", "spec"]).ok()?.text();
        let mut spec: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        spec["root"] = json!({ "path": self.rootfs()?, "readonly": false });
        spec["process"]["args"] = json!(argv);
        spec["process"]["terminal"] = json!(false);
        spec["process"]["env"] = json!(["PATH=/bin"]);
        // Containers of two suites must not share a cgroup.
        spec["linux"]["cgroupsPath"] = json!(format!("/default/{}", self.test.id("cgroup")));
        Ok(spec)
    }

    /// Runs a spec to the end.
    pub fn run_value(&self, spec: &Value) -> Result<Output> {
        let file = self.test.file(&format!("{}.json", self.test.id("spec")), spec.to_string())?;
        self.run_spec(&self.test.id("c"), &["--rm"], &file).run()
    }

    /// Starts a spec in the background.
    pub fn start_value(&self, id: &str, spec: &Value) -> Result<()> {
        let file = self.test.file(&format!("{id}.json"), spec.to_string())?;
        self.run_spec(id, &["--detach", "--null-io"], &file).ok().map(drop)
    }

    /// Starts a container in the background, without output.
    pub fn start(&self, id: &str, options: &[&str], argv: &[&str]) -> Result<()> {
        let options = [&["--detach", "--null-io"], options].concat();
        self.run(id, &options, argv).ok().map(drop)
    }

    /// Starts a container with this script in the background.
    pub fn start_sh(&self, id: &str, script: &str) -> Result<()> {
        self.start(id, &[], &["sh", "-c", script])
    }

    /// Starts a container with this Python program in the background.
    pub fn start_python(&self, id: &str, options: &[&str], program: &str) -> Result<()> {
        let options = [&["--detach", "--null-io"], options].concat();
        self.run_image(PYTHON, id, &options, &["python3", "-c", program]).ok().map(drop)
    }

    /// `ctr task checkpoint`. The resulting images are removed at the end of the test.
    pub fn checkpoint_task(&self, id: &str, options: &[&str]) -> Cmd {
        self.test.at_end(self.remove_checkpoints(id));
        self.task(&["checkpoint"]).args(options).arg(id)
    }

    /// Removes the images of `ctr task checkpoint`: the names have whole seconds, so that two in
    /// one second collide.
    pub fn remove_checkpoints(&self, id: &str) -> Cmd {
        let ctr = self.cmd().line();
        let remove = format!("for i in $({ctr} image ls -q | grep -F /checkpoint/{id}:); do {ctr} image rm $i; done");
        Cmd::new("sh").args(&["-c", &remove])
    }

    /// `ctr container checkpoint` of memory and writable layer into an image, removed at the end of
    /// the test. The container runs on.
    pub fn checkpoint(&self, id: &str, image: &str) -> Cmd {
        self.test.at_end(self.cmd().args(&["image", "rm", image]));
        self.cmd().args(&["container", "checkpoint", "--task", "--rw", "--image", id, image])
    }

    /// `ctr container restore` of such an image as a new container.
    pub fn restore(&self, id: &str, image: &str) -> Cmd {
        self.removed_at_the_end(id);
        self.cmd().args(&["container", "restore", "--live", "--rw", id, image])
    }

    /// Checkpoints and removes a container, and restores it under another id (or the same).
    pub fn moves(&self, id: &str, to: &str) -> Result<()> {
        let image = self.test.id("checkpoint");
        self.checkpoint(id, &image).ok()?;
        self.remove(id)?;
        self.restore(to, &image).ok()?;
        self.cmd().args(&["image", "rm", &image]).ok().map(drop)
    }

    /// `ctr task exec` with a fresh exec id.
    pub fn exec(&self, id: &str, argv: &[&str]) -> Cmd {
        self.exec_as(id, &self.test.id("x"), argv)
    }

    /// Output of a successful script in a container.
    pub fn exec_prints(&self, id: &str, script: &str) -> Result<String> {
        Ok(self.exec(id, &["sh", "-c", script]).ok()?.trimmed())
    }

    /// `ctr task exec` with this exec id.
    pub fn exec_as(&self, id: &str, exec: &str, argv: &[&str]) -> Cmd {
        self.task(&["exec", "--exec-id", exec, id]).args(argv)
    }

    /// `ctr task ...`.
    pub fn task(&self, args: &[&str]) -> Cmd {
        self.cmd().arg("task").args(args)
    }

    /// `ctr task metrics`, on either cgroup version.
    pub fn metrics(&self, id: &str) -> Result<Value> {
        let text = self.task(&["metrics", "--format", "json", id]).ok()?.text();
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    /// Sends a signal to init.
    pub fn kill(&self, id: &str, signal: &str) -> Result<()> {
        self.task(&["kill", "--signal", signal, id]).ok().map(drop)
    }

    /// Init's pid.
    pub fn pid(&self, id: &str) -> Result<u32> {
        Ok(self.row(id)?.0)
    }

    /// The task's status: `RUNNING`, `STOPPED`, `PAUSED`, ...
    pub fn status(&self, id: &str) -> Result<String> {
        Ok(self.row(id)?.1)
    }

    fn row(&self, id: &str) -> Result<(u32, String)> {
        let out = self.task(&["ls"]).ok()?.text();
        let words = out.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).find(|w| w.first() == Some(&id));
        let words = words.with_context(|| format!("no task {id} in {out}"))?;
        let [_, pid, status] = words[..] else { anyhow::bail!("not three columns: {words:?}") };
        Ok((pid.parse().context("the pid column")?, status.to_owned()))
    }

    /// Waits until the task has this status.
    pub fn becomes(&self, id: &str, status: &str) -> Result<()> {
        eventually(&format!("task {id} to be {status}"), || {
            ensure_eq!(self.status(id)?, status);
            Ok(())
        })
    }

    /// Deletes a stopped task and returns the exit code, printed by `ctr` in a warning unless 0.
    pub fn delete_task(&self, id: &str) -> Result<i32> {
        let out = self.task(&["rm", id]).ok()?;
        match out.stderr.split("non-zero exit code ").nth(1) {
            None => Ok(0),
            Some(rest) => {
                let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
                digits.parse().with_context(|| format!("no exit code in {out}"))
            }
        }
    }

    /// Kills, deletes and removes the container, as a user would.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.task(&["rm", "--force", id]).run()?;
        self.cmd().args(&["container", "rm", id]).ok().map(drop)
    }

    /// The container's shim: the parent of init.
    pub fn shim(&self, id: &str) -> Result<u32> {
        proc::parent(self.pid(id)?)
    }

    fn removed_at_the_end(&self, id: &str) {
        self.test.at_end(self.cmd().args(&["container", "rm", id]));
        self.test.at_end(self.task(&["rm", "--force", id]));
        // A paused task takes no signal, and the removal would wait for one.
        self.test.at_end(self.task(&["resume", id]));
    }
}
