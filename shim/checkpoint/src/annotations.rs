//! Annotations of a container about checkpoints.

use std::collections::HashMap;
use std::time::Duration;

use runtime::{Prepare, Privileges, Tcp};
use serde::{Deserialize, Serialize};

/// Prefix of the names.
const PREFIX: &str = "gpusnap.dev/";
/// `exit` or `continue`: the container's fate if the client does not choose. nerdctl and the CRI
/// pass a choice to runtimes named runc only.
pub(crate) const ON_CHECKPOINT: &str = "gpusnap.dev/on-checkpoint";
/// `auto`, `refuse`, `keep` or `close`: treatment of established TCP connections.
pub(crate) const TCP: &str = "gpusnap.dev/tcp";
/// Seconds for which a checkpoint waits for running GPU work.
pub(crate) const GPU_PATIENCE: &str = "gpusnap.dev/gpu-patience";
/// `store`, `inline` or `images`: the place of big memory.
pub(crate) const MEMORY: &str = "gpusnap.dev/memory";
/// Repository in a registry from which a snapshot missing in the node's store can be pulled.
const REGISTRY: &str = "gpusnap.dev/registry";
/// `container` or `snapshot`: origin of the privileges of restored processes.
const PRIVILEGES: &str = "gpusnap.dev/restore-privileges";
/// `none` or `seccomp`: preparation of the container at its creation.
const PREPARE: &str = "gpusnap.dev/prepare";
/// Known annotations, in the order of messages.
const KNOWN: [&str; 7] = [GPU_PATIENCE, MEMORY, ON_CHECKPOINT, PREPARE, REGISTRY, PRIVILEGES, TCP];
/// The pod's Kubernetes namespace, from the CRI.
const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// Default patience: long enough for most work but training, and below the deadlines of clients.
pub(crate) const DEFAULT_GPU_PATIENCE: Duration = Duration::from_secs(60);

/// Annotations of a container about checkpoints.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Annotations {
    on_checkpoint: Option<String>,
    tcp: Option<String>,
    gpu_patience: Option<String>,
    memory: Option<String>,
    registry: Option<String>,
    privileges: Option<String>,
    #[serde(default)]
    prepare: Option<String>,
    pod_namespace: Option<String>,
}

/// Failure to read an annotation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// No annotation has this name.
    #[error("unknown annotation {name}: gpusnap knows {}", KNOWN.join(", "))]
    Unknown {
        /// The name.
        name: String,
    },
    /// The value is not allowed for the annotation.
    #[error("{name}: {value:?} is {rule}")]
    Value {
        /// The name.
        name: &'static str,
        /// The value.
        value: String,
        /// The violated rule, as it reads after "is".
        rule: &'static str,
    },
}

/// Place of a checkpoint's big memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryPlace {
    /// The node's store, as part of a snapshot.
    #[default]
    Store,
    /// Files beside the images; the folder then stands alone.
    Inline,
    /// The images, as CRIU writes them: the form that runc can restore.
    Images,
}

impl Annotations {
    /// Picks the known annotations, unchecked until their use.
    pub(crate) fn of(all: &HashMap<String, String>) -> Self {
        let of = |name| all.get(name).cloned();
        Self {
            on_checkpoint: of(ON_CHECKPOINT),
            tcp: of(TCP),
            gpu_patience: of(GPU_PATIENCE),
            memory: of(MEMORY),
            registry: of(REGISTRY),
            privileges: of(PRIVILEGES),
            prepare: of(PREPARE),
            pod_namespace: of(POD_NAMESPACE),
        }
    }

    /// Picks and checks the annotations. Called when a container is created: a typing error must
    /// not surface at the checkpoint, days later.
    ///
    /// # Errors
    /// An unknown annotation with our prefix, or a value that is not allowed.
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
        annotations.prepare()?;
        Ok(annotations)
    }

    /// Returns the repository for pulls.
    #[must_use]
    pub fn registry(&self) -> Option<String> {
        self.registry.clone().filter(|registry| !registry.is_empty())
    }

    /// Returns the pod's Kubernetes namespace.
    #[must_use]
    pub fn pod_namespace(&self) -> Option<&str> {
        self.pod_namespace.as_deref()
    }

    /// Returns whether the container ends with the checkpoint if the client does not choose.
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

    /// Returns the treatment of TCP connections; `None` without the annotation.
    ///
    /// # Errors
    /// A value that is not allowed.
    pub fn tcp(&self) -> Result<Option<Tcp>, AnnotationError> {
        match self.tcp.as_deref() {
            None => Ok(None),
            Some("auto") => Ok(Some(Tcp::Auto)),
            Some("refuse") => Ok(Some(Tcp::Refuse)),
            Some("keep") => Ok(Some(Tcp::Keep)),
            Some("close") => Ok(Some(Tcp::Close)),
            Some(other) => Err(bad(TCP, other, "none of \"auto\", \"refuse\", \"keep\" and \"close\"")),
        }
    }

    /// Returns the preparation; `None` without the annotation.
    ///
    /// # Errors
    /// A value that is not allowed.
    pub fn prepare(&self) -> Result<Option<Prepare>, AnnotationError> {
        let Some(value) = self.prepare.as_deref() else { return Ok(None) };
        Prepare::parse(value).map(Some).ok_or_else(|| bad(PREPARE, value, "neither \"none\" nor \"seccomp\""))
    }

    /// Returns the origin of the privileges of restored processes.
    ///
    /// # Errors
    /// A value that is not allowed.
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
    fn an_unknown_annotation_is_refused_with_a_list_of_the_known_ones() {
        let error = parse(&[("gpusnap.dev/on-checkpiont", "exit")]).unwrap_err();
        assert!(error.contains("gpusnap.dev/on-checkpiont"), "{error}");
        assert!(KNOWN.iter().all(|known| error.contains(known)), "{error}");
        parse(&[("example.com/on-checkpiont", "exit"), ("gpusnap.development", "x")]).unwrap();
    }

    #[test]
    fn a_value_that_is_not_allowed_is_refused_with_a_list_of_the_allowed_ones() {
        for (name, value, said) in [
            (ON_CHECKPOINT, "stop", "\"continue\""),
            (TCP, "drop", "\"close\""),
            (GPU_PATIENCE, "5m", "seconds"),
            (MEMORY, "tape", "\"inline\""),
            (PRIVILEGES, "all", "\"snapshot\""),
            (PREPARE, "all", "\"seccomp\""),
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
