//! Creation of a container: from containerd's request to an actor that owns the result.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};

use cgroup::Cgroup;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::shim::oci::Options;
use reaper::Child;
use runtime::{CreateRequest, OciRuntime, Prepare, ProcessIo};
use serde::Deserialize;

use super::freezer::Freezer;
use super::operations::end;
use super::restore::FromCheckpoint;
use super::{Accounts, Actor, Config, Container, Context, PidNamespace, Process, ProcessRef};
use crate::error::{BundleError, TaskError};
use crate::stdio::{Copies, Owner, Prepared, Stdio};
use crate::table::Registration;
use crate::{options, pod, rootfs};
use checkpoint::{AnnotationError, Annotations, DeviceNode, Shm};

/// Parts of a config.json for the shim's own use; the runtime reads the rest.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Spec {
    linux: Option<Linux>,
    annotations: HashMap<String, String>,
    mounts: Vec<Mount>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Mount {
    destination: PathBuf,
    #[serde(rename = "type")]
    kind: String,
    source: PathBuf,
    options: Vec<String>,
}

impl Mount {
    fn is_bind(&self) -> bool {
        self.kind == "bind" || self.options.iter().any(|option| option == "bind" || option == "rbind")
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Linux {
    cgroups_path: Option<PathBuf>,
    namespaces: Vec<Namespace>,
    devices: Vec<DeviceNode>,
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

impl Spec {
    fn read(container: &str, bundle: &Path) -> Result<Self, TaskError> {
        let spec = crate::bundle::read_config(bundle);
        spec.map_err(|source| TaskError::Bundle { container: container.to_owned(), source })
    }

    /// Returns the container's /dev/shm, if mounted from outside.
    fn shm(&self) -> Option<Shm> {
        let binds = self.mounts.iter().filter(|mount| mount.is_bind());
        Shm::find(binds.map(|mount| (mount.destination.as_path(), mount.source.as_path())))
    }

    fn pids(&self) -> PidNamespace {
        let mut namespaces = self.linux.iter().flat_map(|linux| &linux.namespaces);
        // A namespace with a path is joined; without one, the runtime makes a new namespace.
        let is_own = namespaces.any(|namespace| namespace.kind == "pid" && namespace.path.is_empty());
        if is_own { PidNamespace::Own } else { PidNamespace::Shared }
    }

    /// Returns the container's annotations about checkpoints. A typing error is reported at the
    /// creation, not at the checkpoint days later.
    fn annotations(&self, container: &str) -> Result<Annotations, TaskError> {
        Annotations::parse(&self.annotations).map_err(|error| bad_annotation(container, &error))
    }

    /// Returns the preparation of the container: by its annotation, else that of the node.
    fn prepare(&self, container: &str, annotations: &Annotations, node: Prepare) -> Result<Prepare, TaskError> {
        let own = annotations.prepare().map_err(|error| bad_annotation(container, &error))?;
        Ok(own.unwrap_or(node))
    }

    fn into_config(self, annotations: Annotations, prepare: Prepare) -> Config {
        let (shm, pids) = (self.shm(), self.pids());
        Config { shm, annotations, prepare, pids, devices: self.linux.unwrap_or_default().devices }
    }
}

fn bad_annotation(container: &str, error: &AnnotationError) -> TaskError {
    TaskError::BadRequest { container: container.to_owned(), field: "annotation", message: error.to_string() }
}

/// Makes the container of `request`. A failure leaves only containerd's own bundle.
pub(crate) async fn create(
    context: &Context,
    request: CreateTaskRequest,
    registration: Registration,
) -> Result<Container, TaskError> {
    let bundle = PathBuf::from(&request.bundle);
    let options = options::decode(request.options.as_ref())?;
    let spec = Spec::read(&request.id, &bundle)?;
    let annotations = spec.annotations(&request.id)?;
    let prepare = spec.prepare(&request.id, &annotations, context.prepare)?;
    let cgroups_path = spec.linux.as_ref().and_then(|linux| linux.cgroups_path.as_deref());
    let choice = options::choose_runtime(&options, &context.namespace, cgroups_path);
    let saved = choice.save(&bundle).and_then(|()| pod::join(&context.bundle, &bundle, &choice));
    saved.map_err(|source| TaskError::Bundle {
        container: request.id.clone(),
        source: BundleError::File { action: "write the runtime choice into", path: bundle.clone(), source },
    })?;

    let target = bundle.join("rootfs");
    rootfs::mount(&request.id, &request.rootfs, &target).await.inspect_err(|_| pod::leave(&context.bundle, &bundle))?;
    let runtime = (context.runtime_of)(&choice, &context.reaper);
    let stdio = stdio(&request);
    let new = NewContainer { context, request: &request, bundle, options, prepare, stdio: &stdio, runtime: &*runtime };
    let made = match new.make_or_wait().await {
        Ok(made) => made,
        Err(error) => {
            if !request.rootfs.is_empty() {
                rootfs::unmount(&target);
            }
            pod::leave(&context.bundle, Path::new(&request.bundle));
            return Err(error);
        }
    };
    let NewContainer { bundle, options, .. } = new;
    let container = Container::start(|mailbox| {
        let (child, copies, cgroup) = match made {
            Some(Made { child, copies, cgroup }) => (Some(child), Some(copies), Some(cgroup)),
            None => (None, None, None),
        };
        let actor = Actor {
            id: request.id.clone(),
            bundle,
            context: context.clone(),
            runtime,
            owner: owner(context, &request.id, &options),
            choice,
            config: spec.into_config(annotations, prepare),
            accounts: cgroup.map(Accounts::new),
            checkpoint: FromCheckpoint::of(&request, &options),
            freezer: Freezer::default(),
            session: None,
            init: Process::init(stdio, child.clone(), copies),
            execs: BTreeMap::new(),
            mailbox,
            operations: VecDeque::new(),
            registration: Some(registration),
        };
        // Before the watch: no event of a container may precede its creation.
        tell_created(context, request, actor.init.pid());
        if let Some(child) = child {
            actor.watch(ProcessRef::Init, child);
            actor.watch_oom();
        }
        actor
    });
    Ok(container)
}

fn stdio(request: &CreateTaskRequest) -> Stdio {
    Stdio::new(request.stdin.clone(), request.stdout.clone(), request.stderr.clone(), request.terminal)
}

fn owner(context: &Context, id: &str, options: &Options) -> Owner {
    Owner { namespace: context.namespace.clone(), id: id.to_owned(), uid: options.io_uid, gid: options.io_gid }
}

fn tell_created(context: &Context, request: CreateTaskRequest, pid: u32) {
    let io = TaskIO {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
        ..TaskIO::default()
    };
    context.events.publish(TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: Some(io).into(),
        checkpoint: request.checkpoint,
        pid,
        ..TaskCreate::default()
    });
}

struct NewContainer<'a> {
    context: &'a Context,
    request: &'a CreateTaskRequest,
    bundle: PathBuf,
    options: Options,
    prepare: Prepare,
    stdio: &'a Stdio,
    runtime: &'a dyn OciRuntime,
}

struct Made {
    child: Child,
    copies: Copies,
    cgroup: Cgroup,
}

impl NewContainer<'_> {
    /// Makes the container, except one from a checkpoint: its processes are made at the start,
    /// because containerd may change the root until then.
    async fn make_or_wait(&self) -> Result<Option<Made>, TaskError> {
        if self.request.checkpoint.is_empty() { self.make().await.map(Some) } else { Ok(None) }
    }

    async fn make(&self) -> Result<Made, TaskError> {
        let id = &self.request.id;
        let owner = owner(self.context, id, &self.options);
        let (io, prepared) =
            self.stdio.prepare(&owner, &self.context.reaper).await.map_err(|source| self.stdio(source))?;
        let child = match self.create(io).await {
            Ok(child) => child,
            Err(error) => {
                prepared.abandon().await;
                return Err(error);
            }
        };
        match self.finish(&child, prepared).await {
            Ok((copies, cgroup)) => Ok(Made { child, copies, cgroup }),
            Err(error) => {
                undo(self.runtime, id, &child).await;
                Err(error)
            }
        }
    }

    fn stdio(&self, source: crate::stdio::StdioError) -> TaskError {
        TaskError::Stdio { process: ProcessRef::Init.name(&self.request.id), source }
    }

    async fn create(&self, io: ProcessIo) -> Result<Child, TaskError> {
        let request = CreateRequest {
            id: self.request.id.clone(),
            bundle: self.bundle.clone(),
            io,
            no_pivot_root: self.options.no_pivot_root,
            no_new_keyring: self.options.no_new_keyring,
            prepare: self.prepare,
        };
        Ok(self.runtime.create(request).await?)
    }

    async fn finish(&self, child: &Child, prepared: Prepared) -> Result<(Copies, Cgroup), TaskError> {
        let copies = prepared.connect().await.map_err(|source| self.stdio(source))?;
        let pid_file = self.bundle.join("init.pid");
        let ready = std::fs::write(&pid_file, child.pid().to_string())
            .map_err(|source| TaskError::Bundle {
                container: self.request.id.clone(),
                source: BundleError::File { action: "write", path: pid_file, source },
            })
            .and_then(|()| {
                Cgroup::of_process(child.process()).map_err(|source| TaskError::Cgroup {
                    action: "find",
                    container: self.request.id.clone(),
                    source,
                })
            });
        match ready {
            Ok(cgroup) => Ok((copies, cgroup)),
            Err(error) => {
                copies.shut_down().await;
                Err(error)
            }
        }
    }
}

/// Removes a container that the runtime has made and nobody can use.
pub(super) async fn undo(runtime: &dyn OciRuntime, id: &str, child: &Child) {
    if let Err(error) = runtime.delete(id).await {
        tracing::error!(container = id, "a container may be left behind: {}", phase::chain(&error));
    }
    end(child, &ProcessRef::Init.name(id)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(name: &str, value: &str) -> Result<Annotations, String> {
        let spec = serde_json::json!({ "annotations": { name: value, "example.com/checkpont": "exit" } });
        let spec: Spec = serde_json::from_value(spec).unwrap();
        spec.annotations("web").map_err(|error| error.to_string())
    }

    #[test]
    fn a_container_with_a_misspelt_annotation_is_refused_with_those_that_there_are() {
        let refused = annotations("gpusnap.dev/on-checkpont", "exit").unwrap_err();
        for said in ["container web", "gpusnap.dev/on-checkpont", "gpusnap.dev/on-checkpoint,"] {
            assert!(refused.contains(said), "{refused}");
        }
        let refused = annotations("gpusnap.dev/on-checkpoint", "stop").unwrap_err();
        assert!(refused.contains("neither \"exit\" nor \"continue\""), "{refused}");
        annotations("gpusnap.dev/on-checkpoint", "exit").unwrap();
    }
}
