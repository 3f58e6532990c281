//! `nerdctl`, containerd's client for people.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::target::Shim;
use crate::{Cmd, IMAGE, Test, eventually, proc};

/// `nerdctl` of the test's containerd, with the test's shim.
pub struct Nerdctl<'a> {
    test: &'a Test,
}

impl<'a> Nerdctl<'a> {
    pub(crate) fn new(test: &'a Test) -> Self {
        Self { test }
    }

    /// `nerdctl ...`, for commands without a method here.
    pub fn cmd(&self, args: &[&str]) -> Cmd {
        let bed = self.test.bed();
        bed.client("nerdctl").args(&["--address", &bed.address(), "--namespace", "default"]).args(args)
    }

    /// `nerdctl run` of the image, without network unless the options choose one. The container is
    /// removed at the end of the test in any case.
    pub fn run(&self, name: &str, options: &[&str], argv: &[&str]) -> Cmd {
        self.run_image(IMAGE, name, options, argv)
    }

    /// `nerdctl run` of an image of the test's choice.
    pub fn run_image(&self, image: &str, name: &str, options: &[&str], argv: &[&str]) -> Cmd {
        self.test.at_end(self.cmd(&["rm", "--force", "--volumes", name]));
        // nerdctl refuses to kill a paused container.
        self.test.at_end(self.cmd(&["unpause", name]));
        let runtime = self.test.target().shim.runtime();
        let network = if options.contains(&"--net") { &[][..] } else { &["--net", "none"] };
        let fixed = ["run", "--name", name, "--runtime", runtime, "--pull", "never"];
        self.cmd(&fixed).args(network).args(options).arg(image).args(argv)
    }

    /// Runs a container to the end and returns the output.
    pub fn prints(&self, options: &[&str], script: &str) -> Result<String> {
        let name = self.test.id("once");
        let options = [&["--rm"], options].concat();
        Ok(self.run(&name, &options, &["sh", "-c", script]).ok()?.trimmed())
    }

    /// Starts a container in the background.
    pub fn start(&self, name: &str, options: &[&str], argv: &[&str]) -> Result<()> {
        let options = [&["--detach"], options].concat();
        let id = self.run(name, &options, argv).ok()?.trimmed();
        self.test.note_id(&id);
        Ok(())
    }

    /// Starts a container with this script in the background.
    pub fn start_sh(&self, name: &str, options: &[&str], script: &str) -> Result<()> {
        self.start(name, options, &["sh", "-c", script])
    }

    /// Options of `run` for a container that is to end at a checkpoint: nerdctl tells only
    /// `runc.v2` itself.
    pub fn ends_on_checkpoint(&self) -> &'static [&'static str] {
        match self.test.target().shim {
            Shim::Stock | Shim::AsRunc => &[],
            Shim::Gpusnap | Shim::GpusnapRunc => &["--annotation", "gpusnap.dev/on-checkpoint=exit"],
        }
    }

    /// `nerdctl checkpoint create` in a folder of the test, in the subfolder of that name.
    pub fn checkpoint(&self, name: &str, checkpoint: &str, options: &[&str]) -> Result<Cmd> {
        let folder = self.checkpoints()?.to_string_lossy().into_owned();
        let create = ["checkpoint", "create", "--checkpoint-dir", &folder];
        Ok(self.cmd(&create).args(options).args(&[name, checkpoint]))
    }

    /// `nerdctl start --checkpoint` from that folder.
    pub fn restore(&self, name: &str, checkpoint: &str) -> Result<Cmd> {
        let folder = self.checkpoints()?.to_string_lossy().into_owned();
        Ok(self.cmd(&["start", "--checkpoint-dir", &folder, "--checkpoint", checkpoint, name]))
    }

    /// `nerdctl start --checkpoint` until a success. nerdctl packs the files anew. If the result is
    /// the same blob that `checkpoint create` made and released, the garbage collector may take the
    /// blob before its use.
    pub fn restored(&self, name: &str, checkpoint: &str) -> Result<()> {
        eventually(&format!("{name} to start from {checkpoint}"), || {
            let out = self.restore(name, checkpoint)?.run()?;
            let collected = out.stderr.contains("content digest") && out.stderr.contains("not found");
            ensure!(!collected, "{out}");
            Ok(out)
        })?
        .expect_code(0)
        .map(drop)
    }

    /// The folder of the checkpoints.
    pub fn checkpoints(&self) -> Result<PathBuf> {
        let folder = self.test.folder()?.join("checkpoints");
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// The id, which is `ctr`'s name of the container.
    pub fn id(&self, name: &str) -> Result<String> {
        Ok(self.inspect(name)?["Id"].as_str().context("Id")?.to_owned())
    }

    /// `nerdctl exec`.
    pub fn exec(&self, name: &str, argv: &[&str]) -> Cmd {
        self.cmd(&["exec", name]).args(argv)
    }

    /// Output of an exec.
    pub fn exec_prints(&self, name: &str, script: &str) -> Result<String> {
        Ok(self.exec(name, &["sh", "-c", script]).ok()?.trimmed())
    }

    /// `nerdctl inspect`.
    pub fn inspect(&self, name: &str) -> Result<Value> {
        let text = self.cmd(&["inspect", "--mode", "dockercompat", name]).ok()?.text();
        let all: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        all.get(0).cloned().with_context(|| format!("nothing about {name} in {text}"))
    }

    /// A field of `State`.
    pub fn state(&self, name: &str, field: &str) -> Result<Value> {
        let all = self.inspect(name)?;
        all.pointer(&format!("/State/{field}")).cloned().with_context(|| format!("State/{field} in {all}"))
    }

    /// Init's pid.
    pub fn pid(&self, name: &str) -> Result<u32> {
        let pid = self.state(name, "Pid")?.as_u64().context("Pid")?;
        ensure!(pid > 0, "{name} has no process");
        u32::try_from(pid).context("Pid")
    }

    /// The container's shim.
    pub fn shim(&self, name: &str) -> Result<u32> {
        proc::parent(self.pid(name)?)
    }

    /// Waits until `State.Status` has this value, such as `exited`.
    pub fn becomes(&self, name: &str, status: &str) -> Result<()> {
        eventually(&format!("container {name} to be {status}"), || {
            let state = self.inspect(name)?["State"].clone();
            ensure!(state["Status"] == status, "{state}");
            Ok(())
        })
    }

    /// Waits for the end and returns the exit code.
    pub fn exit_code(&self, name: &str) -> Result<i64> {
        self.becomes(name, "exited")?;
        self.state(name, "ExitCode")?.as_i64().context("ExitCode")
    }

    /// The log so far, stdout and stderr apart.
    pub fn logs(&self, name: &str) -> Result<(String, String)> {
        let out = self.cmd(&["logs", name]).ok()?;
        Ok((out.text(), out.stderr))
    }

    /// Waits until the log contains this text on stdout.
    pub fn logs_have(&self, name: &str, text: &str) -> Result<()> {
        eventually(&format!("{text:?} in the log of {name}"), || {
            let (stdout, stderr) = self.logs(name)?;
            ensure!(stdout.contains(text), "stdout: {stdout:?}, stderr: {stderr:?}");
            Ok(())
        })
    }
}
