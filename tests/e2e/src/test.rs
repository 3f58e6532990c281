//! A run of one test on one target: names, clean-up, evidence.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use crate::Cmd;
use crate::bed::Bed;
use crate::cri::Cri;
use crate::ctr::Ctr;
use crate::nerdctl::Nerdctl;
use crate::target::Target;

/// Context of a test function.
pub struct Test {
    bed: Arc<Bed>,
    prefix: String,
    scratch: PathBuf,
    log_start: u64,
    ids: RefCell<Vec<String>>,
    undo: RefCell<Vec<Cmd>>,
}

/// Number of a name. Two suites on one machine share cgroups and sockets' names: the pid keeps them
/// apart.
static NUMBER: AtomicU32 = AtomicU32::new(1);

impl Test {
    /// A test on this containerd.
    pub fn new(bed: Arc<Bed>) -> Self {
        let prefix = format!("e{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let log_start = fs::metadata(bed.log()).map_or(0, |m| m.len());
        let scratch = Path::new("/run/e2e").join(&prefix);
        let ids = RefCell::new(vec![prefix.clone()]);
        Self { bed, prefix, scratch, log_start, ids, undo: RefCell::default() }
    }

    /// The test's target.
    pub fn target(&self) -> Target {
        self.bed.target()
    }

    /// The test's containerd.
    pub fn bed(&self) -> &Bed {
        &self.bed
    }

    /// A unique name for a container, exec, pod, ...
    pub fn id(&self, role: &str) -> String {
        format!("{}-{role}{}", self.prefix, NUMBER.fetch_add(1, Ordering::Relaxed))
    }

    /// A folder of the test, removed at the end.
    pub fn folder(&self) -> Result<&Path> {
        fs::create_dir_all(&self.scratch)?;
        Ok(&self.scratch)
    }

    /// Writes a file into the test's folder and returns the path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> Result<String> {
        let path = self.folder()?.join(name);
        fs::write(&path, content)?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// Writes an executable bash script into the test's folder.
    pub fn script(&self, name: &str, lines: &str) -> Result<String> {
        let path = self.file(name, format!("#!/bin/bash\n{lines}"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// `ctr`.
    pub fn ctr(&self) -> Ctr<'_> {
        Ctr::new(self)
    }

    /// `nerdctl`.
    pub fn nerdctl(&self) -> Nerdctl<'_> {
        Nerdctl::new(self)
    }

    /// `crictl`.
    pub fn cri(&self) -> Cri<'_> {
        Cri::new(self)
    }

    /// Registers a command for the end of the test, in any case; the latest runs first. The command
    /// may fail: most tests remove their containers already.
    pub fn at_end(&self, cmd: Cmd) {
        self.undo.borrow_mut().push(cmd.stdin_null());
    }

    /// Notes an id that clients gave to a part of this test, for a search in the log.
    pub fn note_id(&self, id: &str) {
        self.ids.borrow_mut().push(id.to_owned());
    }

    /// Removes all traces of the test.
    pub fn clean_up(&self) {
        // Several attempts may have registered the same command.
        let mut undo = self.undo.take();
        undo.reverse();
        let mut seen = std::collections::HashSet::new();
        for cmd in undo.into_iter().filter(|cmd| seen.insert(cmd.line())) {
            cmd.run().ok();
        }
        fs::remove_dir_all(&self.scratch).ok();
    }

    /// Log lines of containerd and the shims about this test, for a failure's message.
    pub fn evidence(&self) -> String {
        let mut log = String::new();
        if let Ok(mut file) = File::open(self.bed.log()) {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(self.log_start)).ok();
            file.read_to_end(&mut bytes).ok();
            log = String::from_utf8_lossy(&bytes).into_owned();
        }
        let ids = self.ids.borrow();
        let ours = log.lines().filter(|line| ids.iter().any(|id| line.contains(id.as_str())));
        let ours: Vec<&str> = ours.filter(|line| !line.contains("DEPRECATION")).collect();
        let last: Vec<&str> = log.lines().rev().filter(|line| line.contains("shim")).take(10).collect();
        let mut text =
            format!("--- {} (its lines about this test, then the last about any shim)\n", self.bed.log().display());
        for line in ours.iter().skip(ours.len().saturating_sub(40)).chain(last.iter().rev()) {
            text.extend(line.chars().take(600));
            text.push('\n');
        }
        text
    }
}
