//! Dump.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use reaper::Reaper;
use rust_criu::rust_criu_protobuf::rpc::{Criu_opts, Criu_req, Criu_req_type};
use rustix::fs::AtFlags;

use crate::call::{Answers, Call, Notification, Undo};
use crate::client::Criu;
use crate::error::DumpError;
use crate::freezer::Freezer;
use crate::network::Network;
use crate::notify::{BoxError, NotifyDump, Stage};
use crate::options::{CgroupRoot, External, ExternalMount, Options, Place, cgroup_root, to_rpc};
use crate::plugin::DevicePlugin;
use crate::residue::{self, Residue};
use crate::sparse::{Preload, Sparse};
use crate::swrk::{Loaded, Swrk};

/// Name of the log in the work directory, as in runc: containerd copies the log from there.
const LOG: &str = "dump.log";
/// CRIU's last file beside images.
const STATS: &str = "stats-dump";

/// A process tree to dump.
#[derive(Clone, Debug, Default)]
pub struct DumpRequest {
    /// Root of the tree, in this process's pid namespace.
    pub pid: i32,
    /// Directory for the images, existing and without an image.
    pub images_dir: PathBuf,
    /// Directory for dump.log and stats-dump; `None` for the images directory.
    pub work_dir: Option<PathBuf>,
    /// Root of the tree's mount namespace, as a path of this one. Needed for a tree in a separate
    /// namespace.
    pub root: Option<PathBuf>,
    /// Let the tree run afterwards. Otherwise CRIU kills the tree once the images are complete.
    pub leave_running: bool,
    /// Directory of the cgroup for the freeze, in the v1 freezer hierarchy or in v2; `None` for a
    /// freeze by ptrace. A frozen cgroup stays frozen.
    pub freeze_cgroup: Option<PathBuf>,
    /// Top cgroups of the tree, one per hierarchy. A tree can have processes in several cgroups
    /// below. Without a top, each is a separate root, and a restore merges all into one.
    pub cgroup_roots: Vec<CgroupRoot>,
    /// Mounts left out of the dump.
    pub external_mounts: Vec<ExternalMount>,
    /// Other things outside the tree.
    pub external: Vec<External>,
    /// Files in memory whose data is saved elsewhere in part.
    pub sparse: Vec<Sparse>,
    /// Accept descriptors and mappings of the NVIDIA driver's device nodes. Only after
    /// [`images::replace_devices`] the images can be restored then.
    pub devices: bool,
    /// Options common to dump and restore.
    pub options: Options,
}

/// A completed dump.
#[derive(Clone, Debug)]
pub struct Dumped {
    /// CRIU's log.
    pub log: PathBuf,
}

impl Criu {
    /// Dumps a process tree. `notify` is called while CRIU waits; `&mut ()` does nothing.
    ///
    /// # Errors
    /// After a failure the tree runs on as before, frozen if the cgroup was, and CRIU's files are
    /// removed except the log. A dropped future has the same effect. After a successful `post_dump`
    /// the images are kept in any case: CRIU may have ended the tree, leaving the images as the
    /// only copy.
    pub async fn dump(&self, request: DumpRequest, notify: &mut dyn NotifyDump) -> Result<Dumped, DumpError> {
        let pid = request.pid;
        let at = |action: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| DumpError::Directory { pid, action, path, source }
        };
        let images_path = &request.images_dir;
        let work_path = request.work_dir.as_ref().unwrap_or(images_path);
        let images = File::open(images_path).map_err(at("open", images_path))?;
        let work = File::open(work_path).map_err(at("open", work_path))?;
        let existing = names(images_path).map_err(at("list", images_path))?;
        if existing.contains(&OsString::from(images::INVENTORY)) {
            return Err(DumpError::Occupied { pid, path: images_path.clone() });
        }
        let freezer = match &request.freeze_cgroup {
            Some(cgroup) => Some(Freezer::remember(cgroup).map_err(at("read the freezer of", cgroup))?),
            None => None,
        };

        let failed = |source| DumpError::Criu { pid, source };
        let plugin = request.devices.then(|| DevicePlugin::within(work_path)).transpose();
        let plugin = plugin.map_err(at("put a plugin into", work_path))?;
        let plugins = plugin.as_ref().map(DevicePlugin::folder);
        let marker = residue::marker();
        let preload = preload(&request.sparse);
        let loaded = Loaded { plugins, preload: preload.as_ref() };
        let swrk = Swrk::start(self, loaded, work_path, &marker, vec![], Reaper::spawn).map_err(failed)?;
        let log = work_path.join(LOG);
        let place = Place { images_dir_fd: images.as_raw_fd(), work_dir_fd: work.as_raw_fd(), log_file: LOG };
        let message = message(&request, place);
        let undo = UndoDump {
            pid,
            blocked: None,
            reaper: self.reaper.clone(),
            marker,
            images: images_path.clone(),
            existing,
            freezer,
            stands: false,
            open: (images, work),
            _preload: preload,
        };
        let mut call = Call::new(swrk, undo, log.clone());
        match call.converse(message, &mut AnswersDump { notify }).await {
            Ok(_) => {
                call.complete().await;
                Ok(Dumped { log })
            }
            Err(source) => {
                call.abandon().await;
                Err(failed(self.too_old().await.unwrap_or(source)))
            }
        }
    }
}

/// Returns the library that hides data from criu, if any is to be hidden.
fn preload(files: &[Sparse]) -> Option<Preload> {
    if files.is_empty() {
        return None;
    }
    let preload = Preload::of(files);
    preload.inspect_err(|error| tracing::warn!(%error, "criu writes all shared memory, which is saved already")).ok()
}

fn message(request: &DumpRequest, place: Place<'_>) -> Criu_req {
    let mut opts = to_rpc(&request.options, place, request.root.as_deref(), &request.external_mounts);
    opts.set_pid(request.pid);
    opts.leave_running = request.leave_running.then_some(true);
    opts.freeze_cgroup = request.freeze_cgroup.as_deref().map(crate::options::text);
    opts.cg_root = request.cgroup_roots.iter().map(cgroup_root).collect();
    opts.external = request.external.iter().map(External::notation).collect();
    let mut message = Criu_req::new();
    message.set_type(Criu_req_type::DUMP);
    message.opts = Some(opts).into();
    message
}

struct AnswersDump<'a> {
    notify: &'a mut dyn NotifyDump,
}

#[async_trait]
impl Answers<UndoDump> for AnswersDump<'_> {
    async fn notified(&mut self, at: Notification, undo: &mut UndoDump) -> Result<Option<Criu_opts>, BoxError> {
        match at.stage {
            // Also while CRIU undoes its work: the effects of network_lock must be undone too.
            Stage::NetworkUnlock => {
                undo.blocked = None;
                self.notify.network_unlock().await?;
            }
            _ if at.failed => {}
            Stage::PreDump => self.notify.pre_dump().await?,
            Stage::NetworkLock => {
                self.notify.network_lock().await?;
                undo.blocked = Some(Network::of(undo.pid)?);
            }
            Stage::PostDump => {
                self.notify.post_dump().await?;
                // After the acknowledgement CRIU may end the tree; the images are then the only
                // copy.
                undo.stands = true;
            }
            Stage::QueryExternalFiles => {
                let mut opts = Criu_opts::new();
                // Required by the protocol, and unused here; -1 is the default.
                opts.set_images_dir_fd(-1);
                opts.external = self.notify.query_external_files().await?;
                return Ok(Some(opts));
            }
            _ => {}
        }
        Ok(None)
    }
}

struct UndoDump {
    pid: i32,
    /// Network blocked by CRIU, now or soon.
    blocked: Option<Network>,
    reaper: Reaper,
    marker: String,
    images: PathBuf,
    /// Names in the images directory before the dump. A user's own files there are not removed.
    existing: HashSet<OsString>,
    /// `None` for a freeze by ptrace.
    freezer: Option<Freezer>,
    /// The images are complete, and may be the only copy of the tree.
    stands: bool,
    /// The images and the work directory. CRIU opens both by number during the whole run.
    open: (File, File),
    /// Answers criu's questions for shared memory.
    _preload: Option<Preload>,
}

#[async_trait]
impl Undo for UndoDump {
    async fn undo(&mut self) {
        Residue::of_helpers(self.reaper.adoption(), self.marker.clone()).kill(None).await;
        if let Some(network) = self.blocked.take() {
            network.unblock(&self.reaper).await;
        }
        if let Some(freezer) = &self.freezer {
            freezer.restore();
        }
        if self.stands {
            return;
        }
        if let Err(error) = self.remove_images() {
            tracing::warn!(path = %self.images.display(), %error, "cannot remove the images of a failed dump");
        }
    }
}

impl UndoDump {
    fn remove_images(&self) -> io::Result<()> {
        for name in names(&self.images)? {
            let ours = name.as_bytes().ends_with(b".img") || name == STATS;
            if ours && !self.existing.contains(&name) {
                rustix::fs::unlinkat(&self.open.0, name.as_os_str(), AtFlags::empty())?;
            }
        }
        Ok(())
    }
}

fn names(directory: &Path) -> io::Result<HashSet<OsString>> {
    std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect()
}
