//! The config of a snapshot: the snapshot's origin and contents. Format: docs/format.md.

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::manifest::DOCUMENT_LIMIT;

const VERSION: u32 = 1;

/// Origin and contents of a snapshot. Unknown fields are ignored: a later gpusnap may add fields
/// within a version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    version: u32,
    /// Seconds since 1970.
    pub created: u64,
    /// Id of the saved container.
    pub container: String,
    /// Reference of the container's image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Digest of the part of the specification that a restored container must have in common.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_digest: Option<Digest>,
    /// Runtime that made the dump.
    pub runtime: String,
    /// Preparations of the container at its creation: `seccomp`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prepared: Vec<String>,
    /// Machine and programs that made the snapshot.
    pub host: Host,
    /// GPUs that the container could use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<Gpu>,
    /// Processes of the container.
    pub processes: Vec<Process>,
    /// Duration of each step up to the publication.
    #[serde(default)]
    pub phases: Vec<Step>,
    /// Sizes by kind of content.
    #[serde(default)]
    pub sizes: Sizes,
}

/// Machine and programs that made a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    /// CRIU's version.
    pub criu: String,
    /// The kernel's release, as in `uname -r`.
    pub kernel: String,
    /// The machine's architecture, as in `uname -m`.
    pub architecture: String,
    /// Flags of the CPU as in `/proc/cpuinfo`, sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpu_features: Vec<String>,
    /// Version of the NVIDIA driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}

/// A GPU that the container could use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// `GPU-` and 36 characters.
    pub uuid: String,
    /// The product's name.
    pub name: String,
    /// N of the device node `/dev/nvidiaN`.
    pub minor: u32,
    /// The GPU's memory, in bytes.
    pub memory: u64,
}

/// A process of the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Pid in the process's innermost pid namespace.
    pub pid: i32,
    /// The process's name, as in `/proc/PID/comm`.
    pub comm: String,
    /// True if the process has state on a GPU.
    #[serde(default)]
    pub gpu: bool,
    /// Bytes that the driver moved from GPUs to the process's memory.
    #[serde(default)]
    pub staged: u64,
}

/// A step of the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// A name of `phase::Phase`.
    pub phase: String,
    /// The step's duration.
    pub seconds: f64,
}

/// Sizes of a snapshot by kind of content, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sizes {
    /// CRIU's images and other small parts.
    #[serde(default)]
    pub images: u64,
    /// GPU memory in packs.
    #[serde(default)]
    pub gpu_memory: u64,
    /// Host memory in packs.
    #[serde(default)]
    pub host_memory: u64,
    /// Memory of zeros, in no pack.
    #[serde(default)]
    pub zero: u64,
    /// Memory equal to other memory of the snapshot, stored once in the packs.
    #[serde(default)]
    pub shared: u64,
    /// Memory of the container before the checkpoint, in no file, each page counted once; GPU
    /// memory is left out. 0 if unknown.
    #[serde(default)]
    pub resident: u64,
}

/// Failure to read or write a config.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The config is larger than any real one.
    #[error("the config is larger than {DOCUMENT_LIMIT} bytes")]
    TooLarge,
    /// The config is not JSON, or a field is missing or of a wrong type.
    #[error("the config is not valid")]
    Json(#[source] serde_json::Error),
    /// The config is of a later version of gpusnap.
    #[error("the config is of version {found}, and this gpusnap knows {VERSION}: use a newer one")]
    Version {
        /// The config's version.
        found: u32,
    },
}

impl Config {
    /// A config with the required fields only.
    #[must_use]
    pub fn new(created: u64, container: &str, runtime: &str, host: Host) -> Self {
        Self {
            version: VERSION,
            created,
            container: container.to_owned(),
            image: None,
            spec_digest: None,
            runtime: runtime.to_owned(),
            prepared: Vec::new(),
            host,
            gpus: Vec::new(),
            processes: Vec::new(),
            phases: Vec::new(),
            sizes: Sizes::default(),
        }
    }

    /// Reads a config blob.
    ///
    /// # Errors
    /// A blob that is too large, of another version, or not a config.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        if bytes.len() > DOCUMENT_LIMIT {
            return Err(ConfigError::TooLarge);
        }
        // Check the version first: a later version may lack fields that are required here.
        let Version { version } = serde_json::from_slice(bytes).map_err(ConfigError::Json)?;
        if version != VERSION {
            return Err(ConfigError::Version { found: version });
        }
        serde_json::from_slice(bytes).map_err(ConfigError::Json)
    }

    /// The config as bytes for [`Config::parse`].
    ///
    /// # Errors
    /// A config that cannot be read back: too large, or with a duration that is not a number.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ConfigError> {
        let bytes = serde_json::to_vec(self).map_err(ConfigError::Json)?;
        Self::parse(&bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = include_str!("testdata/config.json");

    #[test]
    fn the_golden_file_is_what_is_written() {
        let config = Config::parse(GOLDEN.as_bytes()).unwrap();
        assert_eq!((config.container.as_str(), config.created), ("web", 1_795_000_000));
        assert_eq!(config.host.driver.as_deref(), Some("580.95.05"));
        assert_eq!((config.gpus[0].memory, config.processes[0].staged), (85_520_809_984, 28_800_000_000));
        assert_eq!(config.sizes.zero, 4096);
        let written: serde_json::Value = serde_json::from_slice(&config.to_bytes().unwrap()).unwrap();
        assert_eq!(written, serde_json::from_str::<serde_json::Value>(GOLDEN).unwrap());
    }

    #[test]
    fn a_later_version_is_refused_by_its_number_and_more_fields_are_passed_over() {
        let later = Config::parse(br#"{"version":2,"everything":"else"}"#).unwrap_err();
        assert!(later.to_string().contains("version 2") && later.to_string().contains("use a newer one"), "{later}");
        let more = GOLDEN.replacen('{', r#"{"later":{"x":[1]},"#, 1);
        assert_eq!(Config::parse(more.as_bytes()).unwrap(), Config::parse(GOLDEN.as_bytes()).unwrap());
    }

    #[test]
    fn what_is_no_config_is_refused() {
        for bytes in [&b""[..], b"{", b"{}", b"[]", br#"{"version":-1}"#, br#"{"version":1}"#] {
            assert!(matches!(Config::parse(bytes), Err(ConfigError::Json(_))));
        }
        assert!(matches!(Config::parse(&vec![b' '; DOCUMENT_LIMIT + 1]), Err(ConfigError::TooLarge)));
        let deep = "[".repeat(100_000);
        assert!(matches!(Config::parse(deep.as_bytes()), Err(ConfigError::Json(_))));
        let mut endless = Config::new(0, "c", "r", Host::default());
        endless.phases.push(Step { phase: "dump".into(), seconds: f64::NAN });
        assert!(endless.to_bytes().is_err());
    }
}
