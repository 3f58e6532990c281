//! `gpusnap.json`: how a checkpoint was made. Format: docs/format.md.

use std::io::{self, Read};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use runtime::{Allow, Tcp, Timeline};
use serde::{Deserialize, Serialize};

use crate::SavedGpus;

/// Its name among the images.
pub(crate) const FILE: &str = "gpusnap.json";
/// One whose images are all that there is of it.
const VERSION: u32 = 1;
/// One whose big memory is elsewhere: who does not know that must not restore it.
const VERSION_WITH_MEMORY: u32 = 2;
/// A few hundred bytes are usual.
const SIZE_LIMIT: u64 = 1 << 20;

/// How a checkpoint was made, and what a restore has to allow therefore.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    version: u32,
    /// The container that was saved.
    container: String,
    /// Seconds since 1970.
    created: u64,
    /// Which runtime dumped it.
    runtime: String,
    tcp: SavedTcp,
    external_unix_sockets: bool,
    shell_job: bool,
    /// None without GPU state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gpu: Option<SavedGpus>,
    /// None if all memory is in the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory: Option<bulk::Published>,
    /// Bytes of memory that it had before, in no file, each page once; without what was on GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resident: Option<u64>,
    /// How long each step took, in seconds.
    phases: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SavedTcp {
    Refuse,
    Keep,
    Close,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Step {
    phase: String,
    seconds: f64,
}

impl Manifest {
    /// Tells of a checkpoint that has come this far.
    #[must_use]
    pub fn new(
        container: &str,
        runtime: String,
        allow: Allow,
        gpu: Option<SavedGpus>,
        memory: Option<bulk::Published>,
        resident: Option<u64>,
        timeline: &Timeline,
    ) -> Self {
        let phases = timeline.phases().into_iter();
        Self {
            version: if memory.is_some() { VERSION_WITH_MEMORY } else { VERSION },
            container: container.to_owned(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            runtime,
            tcp: match allow.tcp {
                Tcp::Refuse => SavedTcp::Refuse,
                Tcp::Keep => SavedTcp::Keep,
                Tcp::Close => SavedTcp::Close,
            },
            external_unix_sockets: allow.external_unix_sockets,
            shell_job: allow.shell_job,
            gpu,
            memory,
            resident,
            phases: phases
                .map(|(phase, duration)| Step { phase: phase.name().to_owned(), seconds: duration.as_secs_f64() })
                .collect(),
        }
    }

    /// Writes it among the images.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&mut file, self)?;
        file.persist(folder.join(FILE))?;
        Ok(())
    }

    /// None for a checkpoint that runc's shim made.
    ///
    /// # Errors
    /// A file that cannot be read, or is not understood.
    pub fn read(folder: &Path) -> io::Result<Option<Self>> {
        let file = match std::fs::File::open(folder.join(FILE)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(SIZE_LIMIT + 1).read_to_end(&mut bytes)?;
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        if bytes.len() as u64 > SIZE_LIMIT {
            return Err(invalid(format!("larger than {SIZE_LIMIT} bytes")));
        }
        let manifest: Self = serde_json::from_slice(&bytes)?;
        if !(VERSION..=VERSION_WITH_MEMORY).contains(&manifest.version) {
            let version = manifest.version;
            return Err(invalid(format!("version {version}, where {VERSION} and {VERSION_WITH_MEMORY} are known")));
        }
        Ok(Some(manifest))
    }

    /// What was on GPUs.
    #[must_use]
    pub fn gpu(&self) -> Option<&SavedGpus> {
        self.gpu.as_ref()
    }

    /// Where the memory is that is not in the images.
    #[must_use]
    pub fn memory(&self) -> Option<&bulk::Published> {
        self.memory.as_ref()
    }

    /// How much memory it had, if that is known.
    #[must_use]
    pub fn resident(&self) -> Option<u64> {
        self.resident
    }

    /// What a restore has to allow.
    #[must_use]
    pub fn allow(&self) -> Allow {
        Allow {
            tcp: match self.tcp {
                SavedTcp::Refuse => Tcp::Refuse,
                SavedTcp::Keep => Tcp::Keep,
                SavedTcp::Close => Tcp::Close,
            },
            external_unix_sockets: self.external_unix_sockets,
            shell_job: self.shell_job,
        }
    }
}

#[cfg(test)]
mod tests {
    use runtime::Phase;

    use super::*;

    #[test]
    fn the_golden_file_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), include_bytes!("testdata/gpusnap.json")).unwrap();
        let manifest = Manifest::read(folder.path()).unwrap().unwrap();
        assert_eq!(manifest.allow(), Allow { tcp: Tcp::Close, external_unix_sockets: false, shell_job: true });
        assert_eq!((manifest.container.as_str(), manifest.created), ("web", 1_795_000_000));
        assert_eq!(manifest.phases[1], Step { phase: "dump".into(), seconds: 0.25 });
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Manifest::read(folder.path()).unwrap().is_none());
        let timeline = Timeline::start(Phase::Freeze);
        let manifest = Manifest::new("c", "runc".into(), Allow::default(), None, None, Some(5), &timeline);
        manifest.write(folder.path()).unwrap();
        assert_eq!(Manifest::read(folder.path()).unwrap(), Some(manifest));
    }

    #[test]
    fn what_a_later_version_wrote_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let read = |content: &str| {
            std::fs::write(folder.path().join(FILE), content).unwrap();
            Manifest::read(folder.path()).unwrap_err().to_string()
        };
        let later = include_str!("testdata/gpusnap.json").replace("\"version\":1", "\"version\":3");
        assert!(read(&later).contains("version 3"));
        read("{");
        assert!(read(&" ".repeat(2 << 20)).contains("larger"));
    }
}
