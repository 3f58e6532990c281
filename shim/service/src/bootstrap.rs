//! Actions of the binary, one per command line of containerd: `start`, `delete`, `-info`, and
//! serving.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim::publisher::RemotePublisher;
use containerd_shim::util::convert_to_any;
use containerd_shim::{Config, Error, ExitSignal, Flags, Result, Shim, StartOpts};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use reaper::Reaper;
use runtime::{Choice, Prepare};
use serde::Deserialize;
use session::{NodeStore, Sessions};
use tokio::signal::unix::{SignalKind, signal};

use crate::container::Context;
use crate::error::chain;
use crate::events::Events;
use crate::task::{TaskService, timestamp};
use crate::{bundle, options, pod, rootfs};

/// Labels by which containers ask to share a shim, strongest first, as in containerd's Go shim.
const GROUP_LABELS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];
/// Exit code "killed", as reported by containerd's Go shim for a container with a dead shim.
const KILLED: u32 = 137;
/// Longest time for the last events at the end, as in containerd's Go shim.
const LAST_EVENTS: Duration = Duration::from_secs(5);
/// Environment variable for the folder of the node's store, if not the usual one.
const STORE: &str = "GPUSNAP_STORE";
/// Environment variable for the size limit of the store, such as `200G`. Unset: no limit.
const QUOTA: &str = "GPUSNAP_QUOTA";
/// Environment variable for the repository from which missing snapshots are pulled.
const REGISTRY: &str = "GPUSNAP_REGISTRY";
/// Returns the preparation of containers without an annotation: by the environment, else the one of a runtime name. Under
/// runc's name containers are what their specifications say. A wrong setting is logged and must not keep containers
/// from starting.
fn preparation(runtime: &str) -> Prepare {
    let usual = if runtime == crate::RUNC_RUNTIME { Prepare::Nothing } else { Prepare::Seccomp };
    let Some(name) = std::env::var(Prepare::VARIABLE).ok().filter(|name| !name.is_empty()) else { return usual };
    Prepare::parse(&name).unwrap_or_else(|| {
        tracing::error!("{} is {name:?}, neither \"none\" nor \"seccomp\"", Prepare::VARIABLE);
        usual
    })
}

/// Type of the features in a RuntimeInfo.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Returns the quota. A wrong setting is logged and must not keep containers from starting.
fn quota() -> Option<u64> {
    let text = std::env::var(QUOTA).ok()?;
    snapshot::parse_size(&text)
        .inspect_err(|error| tracing::error!("{QUOTA}: {error}; the store of snapshots has no limit"))
        .ok()
}

/// A run of the binary.
pub(crate) struct GpusnapShim {
    flags: Arc<Invocation>,
    /// Preparation of containers without an annotation.
    prepare: Prepare,
    exit: Arc<ExitSignal>,
    /// Set once the service runs.
    events: std::sync::OnceLock<Events>,
}

struct Invocation {
    namespace: String,
    id: String,
    socket: String,
    bundle: PathBuf,
}

/// Parts of a config.json for the choice of a shim.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Grouping {
    annotations: BTreeMap<String, String>,
}

fn failed(message: impl std::fmt::Display) -> Error {
    Error::Other(message.to_string())
}

#[async_trait]
impl Shim for GpusnapShim {
    type T = TaskService;

    async fn new(runtime_id: &str, flags: &Flags, _config: &mut Config) -> Self {
        // containerd runs every action in the bundle; only `delete` may name another.
        let bundle =
            if flags.bundle.is_empty() { std::env::current_dir().unwrap_or_default() } else { (&flags.bundle).into() };
        let flags = Invocation {
            namespace: flags.namespace.clone(),
            id: flags.id.clone(),
            socket: flags.socket.clone(),
            bundle,
        };
        Self {
            flags: Arc::new(flags),
            prepare: preparation(runtime_id),
            exit: Arc::default(),
            events: std::sync::OnceLock::new(),
        }
    }

    async fn start_shim(&mut self, mut opts: StartOpts) -> Result<String> {
        if opts.namespace.is_empty() || opts.id.is_empty() {
            return Err(Error::InvalidArgument("start needs -namespace and -id".into()));
        }
        // The shim's own cgroup is set where runc's options are understood: translate TOML first.
        let extension = opts.extensions.first();
        let decoded = options::decode(extension).map_err(|error| failed(chain(&error)))?;
        let prepare = options::preparation(extension).map_err(|error| failed(chain(&error)))?.unwrap_or(self.prepare);
        opts.extensions = vec![convert_to_any(Box::new(decoded))?];
        let group = group(&self.flags.bundle)?.unwrap_or_else(|| opts.id.clone());
        let address = containerd_shim::spawn(opts, &group, vec![(Prepare::VARIABLE, prepare.name())]).await?;
        std::fs::write(self.flags.bundle.join("address"), &address)
            .map_err(|err| Error::IoError { context: "write the shim's address".into(), err })?;
        Ok(address)
    }

    async fn delete_shim(&mut self) -> Result<DeleteResponse> {
        let bundle = &self.flags.bundle;
        let reaper = Reaper::start().map_err(|err| Error::IoError { context: "start reaping".into(), err })?;
        let deleted = clean_up(bundle, bundle, &self.flags.id, &reaper).await;
        // containerd 2.1 runs `delete` once per pod and removes the members' bundles itself.
        if !is_served(bundle) {
            for pod_member in pod::members(bundle) {
                if let Err(error) = clean_up(&pod_member.folder, &pod_member.bundle, &pod_member.id, &reaper).await {
                    eprintln!("{error}");
                }
            }
        }
        // containerd logs the error: nothing may be left behind silently.
        deleted?;
        let pid = std::fs::read_to_string(bundle.join("init.pid")).ok().and_then(|pid| pid.trim().parse().ok());
        Ok(DeleteResponse {
            pid: pid.unwrap_or(0),
            exit_status: KILLED,
            exited_at: Some(timestamp(SystemTime::now())).into(),
            ..DeleteResponse::default()
        })
    }

    async fn wait(&mut self) {
        self.exit.wait().await;
        if let Some(events) = self.events.get() {
            events.drain(LAST_EVENTS).await;
        }
        // The bundle with the address may be gone; the library then leaves the socket.
        let path = self.flags.socket.strip_prefix("unix://").unwrap_or(&self.flags.socket);
        if let Err(error) = std::fs::remove_file(path) {
            tracing::debug!("cannot remove {path}: {error}");
        }
    }

    async fn create_task_service(&self, publisher: RemotePublisher) -> TaskService {
        let events = Events::start(&publisher.address, &self.flags.namespace);
        // The library calls wait() later, once.
        let _ = self.events.set(events.clone());
        let reaper = match Reaper::start() {
            Ok(reaper) => reaper,
            Err(error) => {
                tracing::error!("cannot listen for exits of children: {error}");
                self.exit.signal();
                std::future::pending().await
            }
        };
        if let Err(error) = reaper::raise_descriptor_limit() {
            tracing::warn!("cannot raise the limit on open descriptors: {error}");
        }
        end_when_told(&self.exit);
        let runtime_of = Arc::new(Choice::runtime);
        let (namespace, bundle) = (self.flags.namespace.clone(), self.flags.bundle.clone());
        let logs = checkpoint::LOGS.into();
        let root = std::env::var_os(STORE).map_or_else(|| snapshot::DEFAULT_ROOT.into(), PathBuf::from);
        let registry = std::env::var(REGISTRY).ok().filter(|registry| !registry.is_empty());
        let store = NodeStore { root, quota: quota(), registry };
        let conductor = Arc::new(Sessions::new(reaper.clone()));
        let prepare = self.prepare;
        let context = Context { namespace, bundle, logs, store, reaper, prepare, events, runtime_of, conductor };
        TaskService::new(context, Arc::clone(&self.exit))
    }

    fn runtime_info(runtime_id: &str, options: Option<&Any>) -> Result<RuntimeInfo> {
        let decoded = options::decode(options).map_err(|error| failed(chain(&error)))?;
        let choice = options::choose_runtime(&decoded, "", None);
        let features = features(choice)?;
        Ok(RuntimeInfo {
            name: runtime_id.to_owned(),
            version: Some(RuntimeVersion {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                ..RuntimeVersion::default()
            })
            .into(),
            options: options.cloned().into(),
            features: Some(Any { type_url: FEATURES_TYPE.to_owned(), value: features, ..Any::default() }).into(),
            ..RuntimeInfo::default()
        })
    }
}

/// Ends the shim on SIGTERM and SIGINT, as containerd's Go shim does: a shutdown of the machine
/// waits for processes that ignore both. Containers run on; containerd cleans up after the dead
/// shim.
fn end_when_told(exit: &Arc<ExitSignal>) {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        match signal(kind) {
            Ok(mut signals) => {
                let exit = Arc::clone(exit);
                tokio::spawn(async move {
                    if signals.recv().await.is_some() {
                        tracing::warn!("the shim was asked to end");
                        exit.signal();
                    }
                });
            }
            Err(error) => tracing::warn!("cannot listen for {kind:?}: {error}"),
        }
    }
}

/// Returns the runtime's features, as JSON. The calling thread is inside a tokio runtime and must
/// not block there.
fn features(choice: Choice) -> Result<Vec<u8>> {
    let ask = move || {
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        tokio.block_on(async {
            let reaper = Reaper::start().map_err(failed)?;
            let features = choice.runtime(&reaper).features().await.map_err(|error| failed(chain(&error)))?;
            serde_json::to_vec(&features).map_err(failed)
        })
    };
    std::thread::spawn(ask).join().unwrap_or_else(|_| Err(failed("asking the runtime for its features failed")))
}

/// Removes the remains of a container: processes, cgroup, the runtime's state and mounts. `folder`
/// holds the runtime choice.
async fn clean_up(folder: &Path, bundle: &Path, id: &str, reaper: &Reaper) -> Result<()> {
    let ended = session::end_restores(bundle)
        .map_err(|err| Error::IoError { context: format!("end the restore of container {id}"), err });
    let deleted = match Choice::load(folder) {
        Ok(Some(choice)) => choice.runtime(reaper).delete(id).await.map_err(|error| failed(chain(&error))),
        // Without a choice the runtime never made anything; a mount may exist.
        Ok(None) => Ok(()),
        Err(err) => Err(Error::IoError { context: format!("read which runtime container {id} has"), err }),
    };
    rootfs::unmount(&bundle.join("rootfs"));
    ended.and(deleted)
}

/// Returns true if the shim started in `bundle` still answers.
fn is_served(bundle: &Path) -> bool {
    let address = std::fs::read_to_string(bundle.join("address")).unwrap_or_default();
    UnixStream::connect(address.trim_start_matches("unix://")).is_ok()
}

/// Returns the group requested by the container in `bundle`, if any.
fn group(bundle: &Path) -> Result<Option<String>> {
    let grouping: Grouping = bundle::read_config(bundle).map_err(|error| failed(chain(&error)))?;
    Ok(GROUP_LABELS.iter().find_map(|label| grouping.annotations.get(*label).cloned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group_of(config: &str) -> Option<String> {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), config).unwrap();
        group(bundle.path()).unwrap()
    }

    #[test]
    fn containers_of_a_pod_share_a_shim() {
        let config = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod1","other":"x"}}"#;
        assert_eq!(group_of(config).as_deref(), Some("pod1"));
    }

    #[test]
    fn the_runc_group_annotation_is_honoured() {
        let config = r#"{"annotations":{"io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(group_of(config).as_deref(), Some("g"));
    }

    #[test]
    fn other_containers_have_a_shim_of_their_own() {
        assert_eq!(group_of(r#"{"ociVersion":"1.2.0"}"#), None);
    }

    #[test]
    fn a_shim_that_does_not_answer_is_dead() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(!is_served(bundle.path()), "it never wrote an address");
        let socket = bundle.path().join("s");
        std::fs::write(bundle.path().join("address"), format!("unix://{}", socket.display())).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(is_served(bundle.path()));
        drop(listener);
        assert!(!is_served(bundle.path()), "its socket is there, and nobody behind it");
    }

    #[tokio::test]
    async fn an_unreadable_choice_does_not_keep_the_rootfs_mounted() {
        let bundle = tempfile::tempdir().unwrap();
        let (rootfs, from) = (bundle.path().join("rootfs"), tempfile::tempdir().unwrap());
        std::fs::create_dir(&rootfs).unwrap();
        if let Err(error) = rustix::mount::mount_bind(from.path(), &rootfs) {
            eprintln!("skipped: cannot mount: {error}");
            return;
        }
        Choice::new(runtime::Kind::Libcontainer, "/run/x".into(), false).save(bundle.path()).unwrap();
        let files = std::fs::read_dir(bundle.path()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.is_file()).for_each(|path| std::fs::write(path, "{").unwrap());
        let cleaned = clean_up(bundle.path(), bundle.path(), "c", &crate::container::tests::reaper()).await;
        assert!(cleaned.unwrap_err().to_string().contains("which runtime"));
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(rootfs.to_str().unwrap()), "{mounts}");
    }

    #[test]
    fn a_bundle_without_a_usable_config_is_refused_by_name() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(group(bundle.path()).unwrap_err().to_string().contains("config.json"));
        std::fs::write(bundle.path().join("config.json"), "{").unwrap();
        assert!(group(bundle.path()).unwrap_err().to_string().contains("config.json"));
    }
}
