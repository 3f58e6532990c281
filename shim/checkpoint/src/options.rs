//! Options of a checkpoint: the client's, and the container's annotations as defaults.

use std::path::PathBuf;
use std::time::Duration;

use containerd_shim_protos::api::CheckpointTaskRequest;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci;
use runtime::{Allow, Tcp};
use serde::{Deserialize, Serialize};

use crate::annotations::{AnnotationError, Annotations, MemoryPlace};

/// A field of containerd 2.4's options, unknown to containerd-shim-protos.
const PARENT_PATH: u32 = 10;
const OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";

/// A request for a checkpoint that cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("request for container {container} carries an unusable {field}: {message}")]
pub struct RequestError {
    /// The container.
    pub container: String,
    /// The part of the request.
    pub field: &'static str,
    /// The reason, in words.
    pub message: String,
}

/// Options of one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointOptions {
    /// The checkpoint's folder.
    pub folder: PathBuf,
    /// The client's folder for CRIU's log.
    pub work: Option<PathBuf>,
    /// True if the container is to end.
    pub exit: bool,
    /// Conditions that are tolerated instead of failing.
    pub allow: Allow,
    /// Longest wait for running GPU work before the checkpoint fails.
    pub patience: Duration,
    /// The place of big memory.
    pub memory: MemoryPlace,
    /// The repository for pulls of the snapshot.
    pub registry: Option<String>,
    /// The Kubernetes namespace of the snapshot.
    pub pod_namespace: Option<String>,
}

impl CheckpointOptions {
    /// Reads a request, with the annotations as defaults.
    ///
    /// # Errors
    /// A field or an annotation that is not valid.
    pub fn of(request: &CheckpointTaskRequest, annotations: &Annotations) -> Result<Self, RequestError> {
        let bad = |field: &'static str, message: String| RequestError { container: request.id.clone(), field, message };
        let absolute = |field: &'static str, path: &str| {
            let path = PathBuf::from(path);
            if path.is_absolute() { Ok(path) } else { Err(bad(field, format!("{path:?} is not absolute"))) }
        };
        let folder = absolute("path", &request.path)?;
        let annotation = |error: AnnotationError| bad("annotation", error.to_string());
        let annotated_tcp = annotations.tcp().map_err(annotation)?;
        let patience = annotations.gpu_patience().map_err(annotation)?;
        let memory = annotations.memory().map_err(annotation)?;
        let (registry, pod_namespace) = (annotations.registry(), annotations.pod_namespace().map(str::to_owned));
        let Some(options) = request.options.as_ref().filter(|options| !options.type_url.is_empty()) else {
            let exit = annotations.exit().map_err(annotation)?;
            let allow = Allow { tcp: annotated_tcp.unwrap_or_default(), ..Allow::default() };
            return Ok(Self { folder, work: None, exit, allow, patience, memory, registry, pod_namespace });
        };
        if options.type_url.rsplit('/').next() != Some(OPTIONS) {
            return Err(bad("options", format!("type {} is not {OPTIONS}", options.type_url)));
        }
        let options = oci::CheckpointOptions::parse_from_bytes(&options.value)
            .map_err(|error| bad("options", error.to_string()))?;
        if options.special_fields.unknown_fields().get(PARENT_PATH).is_some() {
            return Err(bad("options", "checkpoints on top of others (parent_path) are not supported".into()));
        }
        let work = Some(&options.work_path).filter(|path| !path.is_empty());
        Ok(Self {
            folder,
            work: work.map(|path| absolute("work_path", path)).transpose()?,
            exit: options.exit,
            allow: Allow {
                tcp: annotated_tcp.unwrap_or(if options.open_tcp { Tcp::Keep } else { Tcp::Auto }),
                external_unix_sockets: options.external_unix_sockets,
                shell_job: options.terminal,
            },
            patience,
            memory,
            registry,
            pod_namespace,
        })
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;
    use crate::annotations::{DEFAULT_GPU_PATIENCE, GPU_PATIENCE, MEMORY, ON_CHECKPOINT, TCP};

    fn annotations(all: &[(&str, &str)]) -> Annotations {
        Annotations::of(&all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    fn request(options: Option<oci::CheckpointOptions>) -> CheckpointTaskRequest {
        let options = options.map(|options| Any {
            type_url: OPTIONS.into(),
            value: options.write_to_bytes().unwrap(),
            ..Any::default()
        });
        CheckpointTaskRequest {
            id: "c".into(),
            path: "/images".into(),
            options: options.into(),
            ..CheckpointTaskRequest::default()
        }
    }

    #[test]
    fn without_options_the_container_goes_on_unless_it_says_otherwise() {
        assert!(!CheckpointOptions::of(&request(None), &annotations(&[])).unwrap().exit);
        assert!(!CheckpointOptions::of(&request(None), &annotations(&[(ON_CHECKPOINT, "continue")])).unwrap().exit);
        assert!(CheckpointOptions::of(&request(None), &annotations(&[(ON_CHECKPOINT, "exit")])).unwrap().exit);
        let error =
            CheckpointOptions::of(&request(None), &annotations(&[(ON_CHECKPOINT, "stop")])).unwrap_err().to_string();
        assert!(error.contains("on-checkpoint") && error.contains("stop"), "{error}");
    }

    #[test]
    fn options_have_the_last_word_on_the_end() {
        let options = oci::CheckpointOptions { work_path: "/work".into(), ..oci::CheckpointOptions::default() };
        let wishes = CheckpointOptions::of(&request(Some(options)), &annotations(&[(ON_CHECKPOINT, "exit")])).unwrap();
        assert!(!wishes.exit);
        assert_eq!(wishes.work, Some("/work".into()));
    }

    #[test]
    fn the_container_has_the_last_word_on_its_connections() {
        let tcp = |open_tcp, all: &[_]| {
            let options = oci::CheckpointOptions { open_tcp, ..oci::CheckpointOptions::default() };
            CheckpointOptions::of(&request(Some(options)), &annotations(all)).unwrap().allow.tcp
        };
        assert_eq!(tcp(false, &[]), Tcp::Auto);
        assert_eq!(tcp(false, &[(TCP, "refuse")]), Tcp::Refuse);
        assert_eq!(tcp(true, &[]), Tcp::Keep);
        assert_eq!(tcp(true, &[(TCP, "close")]), Tcp::Close);
    }

    #[test]
    fn the_container_says_how_long_its_gpu_work_may_take() {
        let patience =
            |all: &[_]| CheckpointOptions::of(&request(None), &annotations(all)).map(|wishes| wishes.patience);
        assert_eq!(patience(&[]).unwrap(), DEFAULT_GPU_PATIENCE);
        assert_eq!(patience(&[(GPU_PATIENCE, "5")]).unwrap(), Duration::from_secs(5));
        assert!(patience(&[(GPU_PATIENCE, "5m")]).unwrap_err().to_string().contains("5m"));
    }

    #[test]
    fn the_container_says_where_its_memory_is_kept() {
        let memory = |all: &[_]| CheckpointOptions::of(&request(None), &annotations(all)).map(|wishes| wishes.memory);
        assert_eq!(memory(&[]).unwrap(), MemoryPlace::Store);
        assert_eq!(memory(&[(MEMORY, "inline")]).unwrap(), MemoryPlace::Inline);
        assert!(memory(&[(MEMORY, "tape")]).unwrap_err().to_string().contains("tape"));
    }

    #[test]
    fn relative_paths_and_foreign_options_are_refused() {
        let mut relative = request(None);
        relative.path = "images".into();
        assert!(CheckpointOptions::of(&relative, &annotations(&[])).unwrap_err().to_string().contains("absolute"));
        let mut foreign = request(None);
        foreign.options = Some(Any { type_url: "example.Options".into(), ..Any::default() }).into();
        assert!(
            CheckpointOptions::of(&foreign, &annotations(&[])).unwrap_err().to_string().contains("example.Options")
        );
    }
}
