//! Contents of `gpusnap.json`: how a checkpoint was made. Format: docs/format.md.

use std::time::{SystemTime, UNIX_EPOCH};

use runtime::{Allow, Tcp, Timeline};
use serde::{Deserialize, Serialize};

use crate::SavedGpus;

/// How a checkpoint was made, and what a restore has to allow therefore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// The container that was saved.
    container: String,
    /// Seconds since 1970.
    created: u64,
    /// The runtime that dumped it.
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
    /// Seconds that each step took.
    phases: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SavedTcp {
    Refuse,
    Keep,
    Close,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
            container: container.to_owned(),
            created: now(),
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

    /// Returns what was on GPUs.
    #[must_use]
    pub fn gpu(&self) -> Option<&SavedGpus> {
        self.gpu.as_ref()
    }

    /// Returns where the memory is that is not in the images.
    #[must_use]
    pub fn memory(&self) -> Option<&bulk::Published> {
        self.memory.as_ref()
    }

    /// Returns how much memory it had, if that is known.
    #[must_use]
    pub fn resident(&self) -> Option<u64> {
        self.resident
    }

    /// Returns what a restore has to allow, which [`crate::allow`] does not always do.
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

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_file_is_understood() {
        for golden in [include_str!("testdata/gpusnap.json"), include_str!("testdata/gpusnap-complete.json")] {
            let manifest: Manifest = serde_json::from_str(golden).unwrap();
            assert_eq!(manifest.allow(), Allow { tcp: Tcp::Close, external_unix_sockets: false, shell_job: true });
            assert_eq!((manifest.container.as_str(), manifest.created), ("web", 1_795_000_000));
            assert_eq!(manifest.phases[1], Step { phase: "dump".into(), seconds: 0.25 });
        }
    }
}
