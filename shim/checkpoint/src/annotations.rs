//! The container's annotations that concern checkpoints.

use std::collections::HashMap;
use std::time::Duration;

use runtime::{Privileges, Tcp};
use serde::{Deserialize, Serialize};

/// The beginning of the names of all of them.
const PREFIX: &str = "gpusnap.dev/";
/// `exit` or `continue`: what becomes of the container where the client does not say. nerdctl and the CRI say it to
/// runtimes of runc's name only.
pub(crate) const ON_CHECKPOINT: &str = "gpusnap.dev/on-checkpoint";
/// `refuse`, `keep` or `close`: what is done about established TCP connections.
pub(crate) const TCP: &str = "gpusnap.dev/tcp";
/// Seconds for which a checkpoint waits for GPU work that is under way.
pub(crate) const GPU_PATIENCE: &str = "gpusnap.dev/gpu-patience";
/// `store`, `inline` or `images`: the place of big memory.
pub(crate) const MEMORY: &str = "gpusnap.dev/memory";
/// The repository in a registry from which the snapshot can be pulled where it is not in the node's store.
const REGISTRY: &str = "gpusnap.dev/registry";
/// `container` or `snapshot`: whose rights restored processes have.
const PRIVILEGES: &str = "gpusnap.dev/restore-privileges";
/// All of ours, in the order in which they are told.
const KNOWN: [&str; 6] = [GPU_PATIENCE, MEMORY, ON_CHECKPOINT, REGISTRY, PRIVILEGES, TCP];
/// The Kubernetes namespace of the pod, by the CRI.
const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// Long enough for most work that is not training, and below the deadlines of those who ask for checkpoints.
pub(crate) const DEFAULT_GPU_PATIENCE: Duration = Duration::from_secs(60);

/// The container's annotations that concern checkpoints.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Annotations {
    on_checkpoint: Option<String>,
    tcp: Option<String>,
    gpu_patience: Option<String>,
    memory: Option<String>,
    registry: Option<String>,
    privileges: Option<String>,
    pod_namespace: Option<String>,
}

/// An annotation that is not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// There is none of this name.
    #[error("there is no annotation {name}; gpusnap has {}", KNOWN.join(", "))]
    Unknown {
        /// The name.
        name: String,
    },
    /// The annotation has a value that it cannot have.
    #[error("{name}: {value:?} is {rule}")]
    Value {
        /// The name.
        name: &'static str,
        /// The value.
        value: String,
        /// What the value is or is not.
        rule: &'static str,
    },
}

/// The place of the big memory of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryPlace {
    /// In the node's store, as part of a snapshot.
    #[default]
    Store,
    /// Beside the images, which then stand alone.
    Inline,
    /// In the images, as CRIU writes them: what runc can restore.
    Images,
}

impl Annotations {
    /// Picks them out of all annotations, unchecked: each is checked when it is used.
    pub(crate) fn of(all: &HashMap<String, String>) -> Self {
        let of = |name| all.get(name).cloned();
        Self {
            on_checkpoint: of(ON_CHECKPOINT),
            tcp: of(TCP),
            gpu_patience: of(GPU_PATIENCE),
            memory: of(MEMORY),
            registry: of(REGISTRY),
            privileges: of(PRIVILEGES),
            pod_namespace: of(POD_NAMESPACE),
        }
    }

    /// Picks them out of all annotations and checks each. Called when a container is created: a typing error must not
    /// surface at the checkpoint, days later.
    ///
    /// # Errors
    /// An annotation with our prefix that gpusnap does not know, or a value that the annotation cannot have.
    pub fn parse(all: &HashMap<String, String>) -> Result<Self, AnnotationError> {
        let ours = all.keys().filter(|name| name.starts_with(PREFIX));
        if let Some(name) = ours.into_iter().find(|name| !KNOWN.contains(&name.as_str())) {
            return Err(AnnotationError::Unknown { name: name.clone() });
        }
        let annotations = Self::of(all);
        annotations.exit()?;
        annotations.tcp()?;
        annotations.gpu_patience()?;
        annotations.memory()?;
        annotations.privileges()?;
        Ok(annotations)
    }

    /// Returns from where the snapshot can be pulled.
    #[must_use]
    pub fn registry(&self) -> Option<String> {
        self.registry.clone().filter(|registry| !registry.is_empty())
    }

    /// Returns the Kubernetes namespace of the pod.
    #[must_use]
    pub fn pod_namespace(&self) -> Option<&str> {
        self.pod_namespace.as_deref()
    }

    /// Returns whether the container ends with its checkpoint where the client does not say.
    pub(crate) fn exit(&self) -> Result<bool, AnnotationError> {
        match self.on_checkpoint.as_deref() {
            None | Some("continue") => Ok(false),
            Some("exit") => Ok(true),
            Some(other) => Err(bad(ON_CHECKPOINT, other, "neither \"exit\" nor \"continue\"")),
        }
    }

    pub(crate) fn gpu_patience(&self) -> Result<Duration, AnnotationError> {
        let Some(seconds) = &self.gpu_patience else { return Ok(DEFAULT_GPU_PATIENCE) };
        let parsed = seconds.parse().map_err(|_| bad(GPU_PATIENCE, seconds, "not a number of seconds"))?;
        Ok(Duration::from_secs(parsed))
    }

    pub(crate) fn memory(&self) -> Result<MemoryPlace, AnnotationError> {
        match self.memory.as_deref() {
            None | Some("store") => Ok(MemoryPlace::Store),
            Some("inline") => Ok(MemoryPlace::Inline),
            Some("images") => Ok(MemoryPlace::Images),
            Some(other) => Err(bad(MEMORY, other, "none of \"store\", \"inline\" and \"images\"")),
        }
    }

    /// Returns what is done about TCP connections; None where nothing is said.
    ///
    /// # Errors
    /// A value that is none.
    pub fn tcp(&self) -> Result<Option<Tcp>, AnnotationError> {
        match self.tcp.as_deref() {
            None => Ok(None),
            Some("refuse") => Ok(Some(Tcp::Refuse)),
            Some("keep") => Ok(Some(Tcp::Keep)),
            Some("close") => Ok(Some(Tcp::Close)),
            Some(other) => Err(bad(TCP, other, "none of \"refuse\", \"keep\" and \"close\"")),
        }
    }

    /// Returns whose rights restored processes have.
    ///
    /// # Errors
    /// A value that is none.
    pub fn privileges(&self) -> Result<Privileges, AnnotationError> {
        match self.privileges.as_deref() {
            None | Some("container") => Ok(Privileges::Container),
            Some("snapshot") => Ok(Privileges::Snapshot),
            Some(other) => Err(bad(PRIVILEGES, other, "neither \"container\" nor \"snapshot\"")),
        }
    }
}

fn bad(name: &'static str, value: &str, rule: &'static str) -> AnnotationError {
    AnnotationError::Value { name, value: value.chars().take(100).collect(), rule }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(all: &[(&str, &str)]) -> Result<Annotations, String> {
        let all = all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Annotations::parse(&all).map_err(|error| error.to_string())
    }

    #[test]
    fn an_annotation_that_there_is_not_is_refused_with_those_that_there_are() {
        let error = parse(&[("gpusnap.dev/on-checkpiont", "exit")]).unwrap_err();
        assert!(error.contains("gpusnap.dev/on-checkpiont"), "{error}");
        assert!(KNOWN.iter().all(|known| error.contains(known)), "{error}");
        parse(&[("example.com/on-checkpiont", "exit"), ("gpusnap.development", "x")]).unwrap();
    }

    #[test]
    fn a_value_that_an_annotation_cannot_have_is_refused_with_those_that_it_can() {
        for (name, value, said) in [
            (ON_CHECKPOINT, "stop", "\"continue\""),
            (TCP, "drop", "\"close\""),
            (GPU_PATIENCE, "5m", "seconds"),
            (MEMORY, "tape", "\"inline\""),
            (PRIVILEGES, "all", "\"snapshot\""),
        ] {
            let error = parse(&[(name, value)]).unwrap_err();
            assert!(error.contains(name) && error.contains(value) && error.contains(said), "{error}");
        }
        for (name, value) in [(ON_CHECKPOINT, "exit"), (TCP, "keep"), (GPU_PATIENCE, "5"), (MEMORY, "inline")] {
            parse(&[(name, value)]).unwrap();
        }
    }

    #[test]
    fn restored_processes_have_the_containers_rights_unless_it_says_otherwise() {
        let privileges = |all: &[_]| parse(all).unwrap().privileges().unwrap();
        assert_eq!(privileges(&[]), Privileges::Container);
        assert_eq!(privileges(&[(PRIVILEGES, "container")]), Privileges::Container);
        assert_eq!(privileges(&[(PRIVILEGES, "snapshot")]), Privileges::Snapshot);
    }
}
