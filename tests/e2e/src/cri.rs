//! `crictl`, a client of the kubelet's interface.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{Cmd, IMAGE, Test, eventually};

/// `crictl` of the test's containerd, with the test's runtime handler.
pub struct Cri<'a> {
    test: &'a Test,
}

/// A running pod, removed at the end of the test in any case.
pub struct Pod<'a> {
    cri: Cri<'a>,
    /// The pod's id, also the sandbox container's.
    pub id: String,
    config: String,
}

impl<'a> Cri<'a> {
    pub(crate) fn new(test: &'a Test) -> Self {
        Self { test }
    }

    /// `crictl ...`
    pub fn cmd(&self, args: &[&str]) -> Cmd {
        let bed = self.test.bed();
        let endpoint = format!("unix://{}", bed.address());
        // crictl's own timeout is 2 s, too short for a loaded machine.
        bed.client("crictl").args(&["--timeout", "60s", "--runtime-endpoint", &endpoint]).args(args)
    }

    /// `crictl runp --runtime HANDLER`, with changes to the pod's config.
    pub fn pod(self, changes: &Value) -> Result<Pod<'a>> {
        let name = self.test.id("pod");
        let logs = self.test.folder()?.join("logs");
        fs::create_dir_all(&logs)?;
        let mut config = json!({
            "metadata": { "name": name, "namespace": "e2e", "uid": name, "attempt": 0 },
            "log_directory": logs,
            "linux": { "cgroup_parent": format!("/{name}") },
        });
        merge(&mut config, changes);
        let config = self.test.file(&format!("{name}.json"), config.to_string())?;
        let handler = self.test.target().shim.handler();
        let id = self.cmd(&["runp", "--runtime", handler, &config]).ok()?.trimmed();
        self.test.note_id(&id);
        self.test.at_end(self.cmd(&["rmp", "--force", &id]));
        Ok(Pod { cri: self, id, config })
    }

    /// `crictl inspect`.
    pub fn inspect(&self, container: &str) -> Result<Value> {
        let text = self.cmd(&["inspect", "--output", "json", container]).ok()?.text();
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    /// Waits for the container's exit, and returns the status.
    pub fn exited(&self, container: &str) -> Result<Value> {
        eventually(&format!("container {container} to exit"), || {
            let status = self.inspect(container)?["status"].clone();
            ensure_eq!(status["state"], "CONTAINER_EXITED");
            Ok(status)
        })
    }

    /// `crictl exec --sync`, with the exit code in the message only.
    pub fn exec(&self, container: &str, script: &str) -> Result<(i32, String)> {
        let out = self.cmd(&["exec", "--sync", container, "/bin/sh", "-c", script]).run()?;
        if out.code == 0 {
            return Ok((0, out.trimmed()));
        }
        let code = out.stderr.split("exited with ").nth(1).and_then(|rest| rest.split(':').next()?.parse().ok());
        Ok((code.with_context(|| format!("no exit code in {out}"))?, out.trimmed()))
    }

    /// Output of a successful exec.
    pub fn exec_prints(&self, container: &str, script: &str) -> Result<String> {
        let (code, text) = self.exec(container, script)?;
        ensure!(code == 0, "exit code {code}: {text}");
        Ok(text)
    }

    /// Init's pid.
    pub fn pid(&self, container: &str) -> Result<u32> {
        let all = self.inspect(container)?;
        let pid = all.pointer("/info/pid").and_then(Value::as_u64).with_context(|| format!("info/pid in {all}"))?;
        u32::try_from(pid).context("pid")
    }

    /// Waits until the log contains this text.
    pub fn logs_have(&self, container: &str, text: &str) -> Result<()> {
        eventually(&format!("{text:?} in the log of {container}"), || {
            let out = self.cmd(&["logs", container]).ok()?;
            ensure!(out.text().contains(text) || out.stderr.contains(text), "{out}");
            Ok(())
        })
    }
}

impl Pod<'_> {
    /// Creates and starts a container with this script, and with changes to the config.
    pub fn start(&self, role: &str, script: &str, changes: &Value) -> Result<String> {
        let id = self.create(role, script, changes)?;
        self.cri.cmd(&["start", &id]).ok()?;
        Ok(id)
    }

    /// Creates a container with this script.
    pub fn create(&self, role: &str, script: &str, changes: &Value) -> Result<String> {
        let test = self.cri.test;
        let mut config = json!({
            "metadata": { "name": role, "attempt": 0 },
            "image": { "image": IMAGE },
            "command": ["/bin/sh", "-c", script],
            "log_path": format!("{role}.log"),
            "linux": {},
        });
        merge(&mut config, changes);
        let config = test.file(&format!("{}.json", test.id(role)), config.to_string())?;
        let id = self.cri.cmd(&["create", "--no-pull", &self.id, &config, &self.config]).ok()?.trimmed();
        test.note_id(&id);
        Ok(id)
    }

    /// The pause container's pid.
    pub fn pid(&self) -> Result<u32> {
        let text = self.cri.cmd(&["inspectp", "--output", "json", &self.id]).ok()?.text();
        let all: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        let pid = all.pointer("/info/pid").and_then(Value::as_u64).with_context(|| format!("info/pid in {text}"))?;
        u32::try_from(pid).context("pid")
    }
}

/// Merges objects; replaces everything else.
fn merge(base: &mut Value, changes: &Value) {
    if let (Value::Object(base), Value::Object(changes)) = (&mut *base, changes) {
        for (key, change) in changes {
            merge(base.entry(key).or_insert(Value::Null), change);
        }
    } else if !changes.is_null() {
        *base = changes.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_go_into_nested_objects_and_replace_the_rest() {
        let mut base = json!({ "a": { "b": 1, "c": [1] }, "d": 2 });
        merge(&mut base, &json!({ "a": { "c": [2], "e": { "f": 3 } }, "d": null }));
        assert_eq!(base, json!({ "a": { "b": 1, "c": [2], "e": { "f": 3 } }, "d": 2 }));
    }
}
