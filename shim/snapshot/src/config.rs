//! The config of a snapshot: what it was made from, where, and how. Format: docs/format.md.

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::manifest::DOCUMENT_LIMIT;

const VERSION: u32 = 1;

/// What a snapshot was made from, where, and how. Unknown fields are passed over: later gpusnaps may say more within a
/// version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    version: u32,
    /// Seconds since 1970.
    pub created: u64,
    /// Id of the container that was saved.
    pub container: String,
    /// Reference of the image that it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Digest of what of its specification a restored container must have in common with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_digest: Option<Digest>,
    /// Which runtime dumped it.
    pub runtime: String,
    /// The machine and the programs that made it.
    pub host: Host,
    /// The GPUs that the container could use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<Gpu>,
    /// Its processes.
    pub processes: Vec<Process>,
    /// How long each step took until it was published.
    #[serde(default)]
    pub phases: Vec<Step>,
    /// How much of what it has.
    #[serde(default)]
    pub sizes: Sizes,
}

/// The machine and the programs that made a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    /// CRIU's version.
    pub criu: String,
    /// The kernel's release, as `uname -r` says.
    pub kernel: String,
    /// The machine's architecture, as `uname -m` says.
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
    /// N of its node `/dev/nvidiaN`.
    pub minor: u32,
    /// Its memory, in bytes.
    pub memory: u64,
}

/// A process of the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// In its own, innermost pid namespace.
    pub pid: i32,
    /// Its name, as in `/proc/PID/comm`.
    pub comm: String,
    /// It has state on a GPU.
    #[serde(default)]
    pub gpu: bool,
    /// Bytes that the driver moved from GPUs to its memory.
    #[serde(default)]
    pub staged: u64,
}

/// A step of the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// A name of `phase::Phase`.
    pub phase: String,
    /// How long it took.
    pub seconds: f64,
}

/// How much of what a snapshot has, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sizes {
    /// CRIU's images and the rest that is small.
    #[serde(default)]
    pub images: u64,
    /// GPU memory in packs.
    #[serde(default)]
    pub gpu_memory: u64,
    /// Host memory in packs.
    #[serde(default)]
    pub host_memory: u64,
    /// Memory that is zero, and in no pack.
    #[serde(default)]
    pub zero: u64,
    /// Memory equal to other memory of the snapshot, and in packs once.
    #[serde(default)]
    pub shared: u64,
    /// Memory that the container had before, in no file, each page once; without what was on GPUs. 0 if that is not known.
    #[serde(default)]
    pub resident: u64,
}

/// Not a config that can be understood.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Larger than any real one.
    #[error("the config is larger than {DOCUMENT_LIMIT} bytes")]
    TooLarge,
    /// Not JSON, or a field is missing or of a wrong type.
    #[error("the config is not understood")]
    Json(#[source] serde_json::Error),
    /// Of a later version of gpusnap.
    #[error("the config is of version {found}, and this gpusnap knows {VERSION}: use a newer one")]
    Version {
        /// Its version.
        found: u32,
    },
}

impl Config {
    /// A config that says the least.
    #[must_use]
    pub fn new(created: u64, container: &str, runtime: &str, host: Host) -> Self {
        Self {
            version: VERSION,
            created,
            container: container.to_owned(),
            image: None,
            spec_digest: None,
            runtime: runtime.to_owned(),
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
    /// A blob that is too large, of another version, or no config.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        if bytes.len() > DOCUMENT_LIMIT {
            return Err(ConfigError::TooLarge);
        }
        // A later version may lack fields that this one must have: its number is looked at first.
        let Version { version } = serde_json::from_slice(bytes).map_err(ConfigError::Json)?;
        if version != VERSION {
            return Err(ConfigError::Version { found: version });
        }
        serde_json::from_slice(bytes).map_err(ConfigError::Json)
    }

    /// What [`Config::parse`] reads.
    ///
    /// # Errors
    /// One that nobody could read: too large, or with a time that is no number.
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
