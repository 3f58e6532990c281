//! Contents of `gpusnap.json`: origin of a checkpoint. Format: docs/format.md.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use runtime::{Allow, Tcp, Timeline};
use serde::{Deserialize, Serialize};

use crate::SavedGpus;

/// Origin of a checkpoint, and the permissions that a restore needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// The saved container.
    container: String,
    /// Seconds since 1970.
    created: u64,
    /// Runtime that made the dump.
    runtime: String,
    tcp: SavedTcp,
    /// All connections in the images are of the container with itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    tcp_inside: bool,
    external_unix_sockets: bool,
    shell_job: bool,
    /// GPU state; `None` without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gpu: Option<SavedGpus>,
    /// Memory outside the images; `None` if all memory is in the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory: Option<bulk::Published>,
    /// Bytes of memory before the checkpoint, in no file, each page counted once; GPU memory is
    /// left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resident: Option<u64>,
    /// Addresses in the container's network; empty in the host's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<Address>,
    /// Durations of the steps, in seconds.
    phases: Vec<Step>,
}

/// Most addresses in a record: room for it is reserved.
const MAX_ADDRESSES: usize = 256;

/// An address in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// Name of the interface.
    pub interface: String,
    /// The address.
    pub address: IpAddr,
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
    /// Describes a checkpoint up to the current step of `timeline`.
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
                Tcp::Keep | Tcp::Auto => SavedTcp::Keep,
                Tcp::Close => SavedTcp::Close,
            },
            tcp_inside: allow.tcp == Tcp::Auto,
            external_unix_sockets: allow.external_unix_sockets,
            shell_job: allow.shell_job,
            gpu,
            memory,
            resident,
            addresses: Vec::new(),
            phases: phases
                .map(|(phase, duration)| Step { phase: phase.name().to_owned(), seconds: duration.as_secs_f64() })
                .collect(),
        }
    }

    /// Notes the addresses in the container's network.
    #[must_use]
    pub fn with_addresses(mut self, mut addresses: Vec<Address>) -> Self {
        addresses.truncate(MAX_ADDRESSES);
        self.addresses = addresses;
        self
    }

    /// Returns the addresses that the container's network had, but for those of the loopback.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Returns the GPU state.
    #[must_use]
    pub fn gpu(&self) -> Option<&SavedGpus> {
        self.gpu.as_ref()
    }

    /// Returns the memory outside the images.
    #[must_use]
    pub fn memory(&self) -> Option<&bulk::Published> {
        self.memory.as_ref()
    }

    /// Returns the container's memory before the checkpoint, if known.
    #[must_use]
    pub fn resident(&self) -> Option<u64> {
        self.resident
    }

    /// Returns the permissions that a restore needs; [`crate::allow`] may grant less.
    #[must_use]
    pub fn allow(&self) -> Allow {
        Allow {
            tcp: match self.tcp {
                SavedTcp::Refuse => Tcp::Refuse,
                SavedTcp::Keep if self.tcp_inside => Tcp::Auto,
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
    fn connections_within_a_container_are_kept_by_a_gpusnap_that_knows_no_others() {
        let timeline = Timeline::start(runtime::Phase::Freeze);
        for tcp in [Tcp::Auto, Tcp::Refuse, Tcp::Keep, Tcp::Close] {
            let allow = Allow { tcp, ..Allow::default() };
            let manifest = Manifest::new("c", "runc".into(), allow, None, None, None, &timeline);
            let text = serde_json::to_value(&manifest).unwrap();
            assert_eq!(text["tcp"] == "keep", matches!(tcp, Tcp::Auto | Tcp::Keep), "{text}");
            assert_eq!(serde_json::from_value::<Manifest>(text).unwrap().allow(), allow);
        }
    }

    #[test]
    fn addresses_are_noted_up_to_a_limit() {
        let timeline = Timeline::start(runtime::Phase::Freeze);
        let manifest = Manifest::new("c", "runc".into(), Allow::default(), None, None, None, &timeline);
        assert!(serde_json::to_value(&manifest).unwrap().get("addresses").is_none());
        let address = |last: u32| Address { interface: "eth0".into(), address: IpAddr::V4(last.into()) };
        let noted = manifest.with_addresses((0..300).map(address).collect());
        let read: Manifest = serde_json::from_value(serde_json::to_value(&noted).unwrap()).unwrap();
        assert_eq!(read.addresses(), (0..256).map(address).collect::<Vec<_>>());
    }

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
