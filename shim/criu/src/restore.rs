//! Restore.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use images::Unmarked;
use proc::Identity;
use reaper::{Child, Reaper};
use rust_criu::rust_criu_protobuf::rpc::{Criu_opts, Criu_req, Criu_req_type, Inherit_fd};

use crate::call::{Answers, Call, Notification, Undo};
use crate::client::Criu;
use crate::error::{CallError, RestoreError};
use crate::notify::{BoxError, NotifyRestore, OnKilled, Stage};
use crate::options::{
    CgroupRoots, ExternalMount, Inherit, JoinNamespace, Options, Place, cgroup_root, join_namespace, to_rpc,
};
use crate::residue::{self, Residue};
use crate::swrk::{FIRST_INHERITED, Loaded, Swrk};

/// Name of the log in the work directory, as in runc.
const LOG: &str = "restore.log";

/// A process tree to restore.
#[derive(Debug, Default)]
pub struct RestoreRequest {
    /// Directory with the images.
    pub images_dir: PathBuf,
    /// Directory for restore.log and stats-restore; `None` for the images directory.
    pub work_dir: Option<PathBuf>,
    /// Root of the tree's mount namespace: a mount point with no other mount over the parent.
    pub root: Option<PathBuf>,
    /// Mounts from outside.
    pub external_mounts: Vec<ExternalMount>,
    /// Descriptors for pipes, namespaces and files named in the images.
    pub inherit: Vec<Inherit>,
    /// Namespaces for the tree to join.
    pub join_namespaces: Vec<JoinNamespace>,
    /// Cgroups for the tree.
    pub cgroup_roots: CgroupRoots,
    /// Security module and profile instead of the dumped one: `apparmor:NAME`, `selinux:LABEL`.
    pub lsm_profile: Option<String>,
    /// The caller fills memory missing from the images before the tree runs. Without this flag CRIU
    /// refuses such images.
    pub cut: bool,
    /// Called when the processes of a failed restore have been killed, before the wait for the end.
    /// A callback for freezing the tree needs this one for thawing.
    pub on_killed: Option<OnKilled>,
    /// Options common to dump and restore.
    pub options: Options,
}

/// A restored tree, running.
#[derive(Clone, Debug)]
pub struct Restored {
    /// The root, a child of this process. Watched since before the first instruction.
    pub root: Child,
    /// CRIU's log.
    pub log: PathBuf,
}

impl Criu {
    /// Restores a process tree, as a child of this process. `notify` is called while CRIU waits;
    /// `&mut ()` does nothing.
    ///
    /// # Errors
    /// A failure leaves no process of the tree, and unchanged images: the restore can be tried
    /// again. A dropped future has the same effect.
    pub async fn restore(
        &self,
        request: RestoreRequest,
        notify: &mut dyn NotifyRestore,
    ) -> Result<Restored, RestoreError> {
        let images_path = request.images_dir.clone();
        let at = |action: &'static str, path: &Path| {
            let (images, path) = (images_path.clone(), path.to_owned());
            move |source| RestoreError::Directory { images, action, path, source }
        };
        let work_path = request.work_dir.clone().unwrap_or_else(|| images_path.clone());
        let image = images::check(&images_path).map_err(RestoreError::Image)?;
        let dumped_pid = images::root_pid(&images_path).map_err(RestoreError::Image)?;
        let unmarked = (request.cut && image.is_cut())
            .then(|| Unmarked::of(&images_path, &work_path))
            .transpose()
            .map_err(RestoreError::Unmark)?;
        let opened_path = unmarked.as_ref().map_or(images_path.as_path(), Unmarked::path);
        let images = File::open(opened_path).map_err(at("open", opened_path))?;
        let work = File::open(&work_path).map_err(at("open", &work_path))?;
        let place = Place { images_dir_fd: images.as_raw_fd(), work_dir_fd: work.as_raw_fd(), log_file: LOG };
        let log = work_path.join(LOG);
        let failed = |source| RestoreError::Criu { images: images_path.clone(), source };

        let mut message = message(&request, place);
        let marker = residue::marker();
        // Before anything can become this process's child.
        let adoption = self.reaper.adoption();
        let inherited: Vec<OwnedFd> = request.inherit.into_iter().map(|inherit| inherit.fd).collect();
        let swrk = Swrk::start(self, Loaded::default(), &work_path, &marker, inherited, Reaper::spawn_lasting)
            .map_err(failed)?;
        let criu = swrk.child.clone();
        let since = Identity::of(criu.process()).map_or(u64::MAX, |criu| criu.start_time);
        let residue = Residue { adoption, root: None, marker, dumped_pid, since };
        let mut call = Call::new(
            swrk,
            UndoRestore {
                residue,
                on_killed: request.on_killed,
                work: work_path.clone(),
                _open: (images, work, unmarked),
            },
            log.clone(),
        );

        let roots = request.cgroup_roots;
        let restored = async {
            notify.started(&criu).await.map_err(|source| CallError::Started { source })?;
            let roots = match roots {
                CgroupRoots::Dumped => vec![],
                CgroupRoots::OfCriu => cgroups_of(criu.pid())?,
            };
            if let Some(opts) = message.opts.as_mut() {
                opts.cg_root = roots.iter().map(cgroup_root).collect();
            }
            call.converse(message, &mut AnswersRestore { notify }).await?;
            let (_, undo) = call.parts()?;
            // CRIU names the root before success; a reply without the root is no success.
            let missing = || io::Error::new(io::ErrorKind::InvalidData, "it did not name the restored process");
            undo.residue.root.clone().ok_or_else(|| CallError::Protocol {
                action: "find the restored process",
                stage: None,
                source: missing(),
            })
        };
        match restored.await {
            Ok(root) => {
                call.complete().await;
                Ok(Restored { root, log })
            }
            Err(source) => {
                call.abandon().await;
                Err(failed(self.too_old().await.unwrap_or(source)))
            }
        }
    }
}

fn cgroups_of(pid: i32) -> Result<Vec<crate::options::CgroupRoot>, CallError> {
    let failed = |source| CallError::Protocol { action: "read its cgroups", stage: None, source };
    Ok(CgroupRoots::parse(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(failed)?))
}

fn message(request: &RestoreRequest, place: Place<'_>) -> Criu_req {
    let mut opts = to_rpc(&request.options, place, request.root.as_deref(), &request.external_mounts);
    // The root becomes a child of criu's parent, not an orphan.
    opts.set_rst_sibling(true);
    opts.inherit_fd =
        request.inherit.iter().zip(FIRST_INHERITED..).map(|(inherit, fd)| inherit_fd(inherit, fd)).collect();
    opts.join_ns = request.join_namespaces.iter().map(join_namespace).collect();
    opts.cgroup_yard = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|cgroup| cgroup_yard(&cgroup));
    opts.lsm_profile.clone_from(&request.lsm_profile);
    let mut message = Criu_req::new();
    message.set_type(Criu_req_type::RESTORE);
    message.opts = Some(opts).into();
    message
}

/// Returns the folder with the mounts of all cgroup v1 hierarchies, if named as by CRIU. Otherwise
/// CRIU mounts all hierarchies in the working directory during a restore. Others take such mounts
/// for the machine's, and a killed criu leaves the mounts behind.
fn cgroup_yard(cgroup: &str) -> Option<String> {
    const YARD: &str = "/sys/fs/cgroup";
    let names = cgroup.lines().filter_map(|line| line.split(':').nth(1));
    let folder = |name: &str| match name {
        "" => "unified".to_owned(),
        name => name.strip_prefix("name=").unwrap_or(name).to_owned(),
    };
    let mut is_mounted = names.map(|name| Path::new(YARD).join(folder(name)).join("cgroup.procs").exists());
    is_mounted.all(|is_mounted| is_mounted).then(|| YARD.to_owned())
}

fn inherit_fd(inherit: &Inherit, fd: i32) -> Inherit_fd {
    let mut rpc = Inherit_fd::new();
    rpc.set_key(inherit.key.clone());
    rpc.set_fd(fd);
    rpc
}

struct AnswersRestore<'a> {
    notify: &'a mut dyn NotifyRestore,
}

#[async_trait]
impl Answers<UndoRestore> for AnswersRestore<'_> {
    async fn notified(&mut self, mut at: Notification, undo: &mut UndoRestore) -> Result<Option<Criu_opts>, BoxError> {
        if let Some(pid) = at.pid {
            // Also after a failure: only a known root can be killed.
            undo.adopt(pid)?;
        }
        if at.failed {
            return Ok(None);
        }
        match at.stage {
            Stage::PreRestore => self.notify.pre_restore().await?,
            Stage::SetupNamespaces => self.notify.setup_namespaces(undo.root()?).await?,
            Stage::PostSetupNamespaces => self.notify.post_setup_namespaces().await?,
            Stage::OrphanPtsMaster => {
                let master = at.descriptors.pop().ok_or("criu sent no descriptor with it")?;
                self.notify.orphan_pts_master(master).await?;
            }
            Stage::PostRestore => self.notify.post_restore(undo.root()?).await?,
            Stage::NetworkUnlock => self.notify.network_unlock().await?,
            Stage::PreResume => self.notify.pre_resume().await?,
            Stage::PostResume => self.notify.post_resume().await?,
            _ => {}
        }
        Ok(None)
    }
}

struct UndoRestore {
    residue: Residue,
    on_killed: Option<OnKilled>,
    /// The work directory.
    work: PathBuf,
    /// The images and the work directory. CRIU opens both by number during the whole run.
    _open: (File, File, Option<Unmarked>),
}

impl UndoRestore {
    fn adopt(&mut self, pid: i32) -> io::Result<()> {
        if self.residue.root.as_ref().is_none_or(|root| root.pid() != pid) {
            self.residue.root = Some(self.residue.adoption.adopt(pid)?);
        }
        Ok(())
    }

    fn root(&self) -> Result<&Child, BoxError> {
        Ok(self.residue.root.as_ref().ok_or("criu did not name the root process")?)
    }
}

#[async_trait]
impl Undo for UndoRestore {
    async fn undo(&mut self) {
        self.residue.kill(self.on_killed.as_ref()).await;
        residue::remove_cgroup_mounts(&self.work);
    }

    /// From pre-resume on CRIU only logs a refusal, and lets the tree run. (At network-unlock too,
    /// but CRIU must go on from there: rules in an outside network namespace would stay.) The tree
    /// is killed first, so that no process runs after criu's detach.
    async fn refusing(&mut self, stage: &Stage) -> bool {
        let heedless = matches!(stage, Stage::PreResume | Stage::PostResume);
        if heedless && let Some(root) = &self.residue.root {
            residue::kill_tree(root);
        }
        heedless
    }
}
