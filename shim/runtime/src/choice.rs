//! The choice of a container's runtime, kept in the bundle from creation to deletion.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reaper::Reaper;
use serde::{Deserialize, Serialize};

use crate::OciRuntime;
use crate::command::Command;
use crate::libcontainer::Libcontainer;

/// Name of the file in the bundle. Format: docs/format.md.
const FILE: &str = "gpusnap-runtime.json";
const VERSION: u32 = 1;
/// Largest file, in bytes. A choice has at most two paths; a longer file is not ours.
const SIZE_LIMIT: u64 = 64 << 10;

/// Kind of runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The runtime in this binary.
    Libcontainer,
    /// A command line like runc's: a path, or a name in `PATH`.
    Command(PathBuf),
}

/// A runtime, with the settings of the container's creation for every later call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Choice {
    version: u32,
    /// Kind of the runtime.
    pub kind: Kind,
    /// Directory for the runtime's state, with one folder per container.
    pub root: PathBuf,
    /// Cgroups are made through systemd.
    pub systemd_cgroup: bool,
}

impl Choice {
    /// Returns a choice for a new container.
    #[must_use]
    pub fn new(kind: Kind, root: PathBuf, systemd_cgroup: bool) -> Self {
        Self { version: VERSION, kind, root, systemd_cgroup }
    }

    /// Writes the choice into a bundle.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn save(&self, bundle: &Path) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(bundle)?;
        serde_json::to_writer(&mut file, self)?;
        file.persist(bundle.join(FILE))?;
        Ok(())
    }

    /// Reads the choice back; `None` if creation ended before writing one.
    ///
    /// # Errors
    /// Fails if the file cannot be read, or is not ours.
    pub fn load(bundle: &Path) -> io::Result<Option<Self>> {
        let path = bundle.join(FILE);
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() > SIZE_LIMIT => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "larger than any runtime choice"));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
        let choice: Self = serde_json::from_slice(&std::fs::read(path)?)?;
        if choice.version != VERSION {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("version {} of a runtime choice, where {VERSION} is known", choice.version),
            ));
        }
        Ok(Some(choice))
    }

    /// Returns the runtime's name, without the folder.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::Libcontainer => "libcontainer".to_owned(),
            Kind::Command(binary) => binary.file_name().unwrap_or(binary.as_os_str()).to_string_lossy().into_owned(),
        }
    }

    /// Returns the chosen runtime.
    #[must_use]
    pub fn runtime(&self, reaper: &Reaper) -> Arc<dyn OciRuntime> {
        match &self.kind {
            Kind::Libcontainer => Arc::new(Libcontainer::new(reaper.clone(), self.root.clone(), self.systemd_cgroup)),
            Kind::Command(binary) => {
                Arc::new(Command::new(reaper.clone(), binary.clone(), self.root.clone(), self.systemd_cgroup))
            }
        }
    }
}
