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
use crate::residue::{self, Residue};
use crate::swrk::Swrk;

/// Name of the log in the work directory, as runc has it: containerd copies it out of there.
const LOG: &str = "dump.log";
/// What CRIU writes last, besides images.
const STATS: &str = "stats-dump";

/// A process tree to dump.
#[derive(Clone, Debug, Default)]
pub struct DumpRequest {
    /// Root of the tree, in this process's pid namespace.
    pub pid: i32,
    /// Where the images go: an existing directory that holds no image yet.
    pub images_dir: PathBuf,
    /// Where dump.log goes, and stats-dump. The images directory if None.
    pub work_dir: Option<PathBuf>,
    /// Root of the tree's mount namespace, as a path of this one. Needed when the tree has its own.
    pub root: Option<PathBuf>,
    /// Let the tree run afterwards. Otherwise CRIU kills it once the images are whole.
    pub leave_running: bool,
    /// Cgroup to freeze the tree by: the directory, in the v1 freezer hierarchy or in v2. By ptrace if None. If it is
    /// frozen already, it stays so.
    pub freeze_cgroup: Option<PathBuf>,
    /// Where the tree's cgroups begin, in each hierarchy. A tree can have processes in several cgroups below; without
    /// this each of these is a root of its own, and a restore puts them all into one.
    pub cgroup_roots: Vec<CgroupRoot>,
    /// Mounts that are not dumped.
    pub external_mounts: Vec<ExternalMount>,
    /// Other things outside the tree.
    pub external: Vec<External>,
    /// Images of an earlier dump, relative to the images directory: only memory changed since is written, on kernels
    /// that can tell (feature `mem_track`).
    pub parent_image: Option<PathBuf>,
    /// What dump and restore share.
    pub options: Options,
}

/// A dump that stands.
#[derive(Clone, Debug)]
pub struct Dumped {
    /// CRIU's log.
    pub log: PathBuf,
}

impl Criu {
    /// Dumps a process tree. `notify` is called while CRIU waits; `&mut ()` does nothing.
    ///
    /// # Errors
    /// The tree runs on as before then, frozen if its cgroup was, and the files that CRIU wrote are removed, the log
    /// excepted. The same holds when the future is dropped. Once `post_dump` has succeeded, the images are kept in any
    /// case: CRIU may have ended the tree, and they be all that is left of it.
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
        let marker = residue::marker();
        let swrk = Swrk::start(self, work_path, &marker, vec![], Reaper::spawn).map_err(failed)?;
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

fn message(request: &DumpRequest, place: Place<'_>) -> Criu_req {
    let mut opts = to_rpc(&request.options, place, request.root.as_deref(), &request.external_mounts);
    opts.set_pid(request.pid);
    opts.leave_running = request.leave_running.then_some(true);
    opts.freeze_cgroup = request.freeze_cgroup.as_deref().map(crate::options::text);
    opts.cg_root = request.cgroup_roots.iter().map(cgroup_root).collect();
    opts.external = request.external.iter().map(External::notation).collect();
    if let Some(parent) = &request.parent_image {
        opts.set_parent_img(crate::options::text(parent));
        opts.set_track_mem(true);
    }
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
            // Also while CRIU undoes its work: what network_lock did has to be undone with it.
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
                // With the acknowledgement CRIU may end the tree, of which the images are then all that is left.
                undo.stands = true;
            }
            Stage::QueryExternalFiles => {
                let mut opts = Criu_opts::new();
                // Required by the protocol, and not read here; -1 is its default.
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
    /// The network that CRIU has blocked, or is about to.
    blocked: Option<Network>,
    reaper: Reaper,
    marker: String,
    images: PathBuf,
    /// Names in the images directory before the dump. What a user kept there is not removed.
    existing: HashSet<OsString>,
    /// None if none is used.
    freezer: Option<Freezer>,
    /// The images are whole, and may be all that is left of the tree.
    stands: bool,
    /// The images and the work directory, which CRIU opens by number as long as it runs.
    open: (File, File),
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
