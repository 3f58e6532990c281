//! Mounts of a container's root filesystem.

use std::io;
use std::path::{Path, PathBuf};

use containerd_shim::mount::{mount_rootfs, umount_recursive};
use containerd_shim_protos::types::mount::Mount;

use self::id_map::IdMap;
use crate::error::TaskError;

mod id_map;

/// Forced, lazy unmount (MNT_DETACH): open files in the filesystem must not keep the mount.
const DETACH: i32 = 2;

/// Failure to mount a root filesystem.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    #[error(transparent)]
    Mount(#[from] containerd_shim::Error),
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the mount option {option} maps no ids: it should be like {name}=0:100000:65536")]
    IdMap { option: String, name: &'static str },
    #[error("the mount options map ids of users or of groups, and not both")]
    HalfAnIdMap,
    #[error("cannot start a thread or process for the mount")]
    Start(#[source] io::Error),
    #[error("the mount was cut off")]
    CutOff,
}

/// Mounts everything in `mounts`, in order, on `target`; a failure leaves nothing mounted.
pub(crate) async fn mount(container: &str, mounts: &[Mount], target: &Path) -> Result<(), TaskError> {
    if mounts.is_empty() {
        return Ok(());
    }
    let failed = |source| TaskError::Mount { container: container.to_owned(), target: target.to_owned(), source };
    let (mounts, folder) = (mounts.to_vec(), target.to_owned());
    let (done, result) = tokio::sync::oneshot::channel();
    // containerd-shim changes the working directory of the thread during a mount of many layers:
    // use a separate thread.
    let thread = std::thread::Builder::new().spawn(move || {
        let mounted = std::fs::create_dir_all(&folder)
            .map_err(|source| RootfsError::File { action: "make", path: folder.clone(), source })
            .and_then(|()| mounts.iter().try_for_each(|mount| mount_one(mount, &folder)));
        // The receiver is dropped only with the whole shim.
        let _ = done.send(mounted);
    });
    thread.map_err(|source| failed(RootfsError::Start(source)))?;
    let mounted = result.await.unwrap_or(Err(RootfsError::CutOff));
    if mounted.is_err() {
        unmount(target);
    }
    mounted.map_err(failed)
}

fn mount_one(mount: &Mount, target: &Path) -> Result<(), RootfsError> {
    match IdMap::take(&mount.options)? {
        (None, _) => Ok(mount_plainly(mount, &mount.options, target)?),
        (Some(map), options) => id_map::mount(mount, options, &map, target),
    }
}

fn mount_plainly(mount: &Mount, options: &[String], target: &Path) -> containerd_shim::Result<()> {
    let named = |name: &str| Some(name.to_owned()).filter(|name| !name.is_empty());
    mount_rootfs(named(&mount.type_).as_deref(), named(&mount.source).as_deref(), options, target)
}

/// Unmounts everything at and below `target`. A failure is logged: the caller is cleaning up.
pub(crate) fn unmount(target: &Path) {
    let Some(path) = target.to_str() else { return };
    if let Err(error) = umount_recursive(Some(path), DETACH) {
        tracing::warn!("cannot unmount {path}: {error}");
    }
}
