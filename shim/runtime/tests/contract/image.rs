//! Checkpoints of containers, and containers restored from checkpoints.

use std::fs;
use std::path::PathBuf;

use oci_spec::runtime::Spec;
use reaper::Child;
use runtime::{Allow, Cancel, CheckpointRequest, Phase, Privileges, ProcessIo, RestoreRequest, RuntimeError, Timeline};

use crate::bed::Bed;
use crate::container::{Bundle, Ended, Pipes, Running};
use crate::spec::Edit;
use crate::world::Which;

/// Masked paths of specifications that are directories.
const DIRECTORIES: [&str; 4] = ["/proc/acpi", "/proc/asound", "/proc/scsi", "/sys/firmware"];

/// A folder for a checkpoint: images, and the logs of makers and users.
pub(crate) struct Image {
    folder: PathBuf,
}

impl Image {
    pub(crate) fn new(bed: &Bed) -> Self {
        let image = Self { folder: bed.folder().join(format!("checkpoint-{}", bed.world.number())) };
        fs::create_dir_all(image.images()).unwrap();
        fs::create_dir(image.work()).unwrap();
        image
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.folder.join("images")
    }

    pub(crate) fn work(&self) -> PathBuf {
        self.folder.join("work")
    }

    /// Returns a copy, to be damaged.
    pub(crate) fn copy(&self, bed: &Bed) -> Self {
        let copy = Self::new(bed);
        for entry in fs::read_dir(self.images()).unwrap().map(|entry| entry.unwrap()) {
            fs::copy(entry.path(), copy.images().join(entry.file_name())).unwrap();
        }
        copy
    }
}

impl Bundle<'_> {
    /// Saves the container, which goes on.
    pub(crate) async fn checkpoint(&self, running: &Running) -> Image {
        let image = Image::new(self.bed);
        self.checkpoint_to(&image, &running.child, |request| request.leave_running = true).await.unwrap();
        image
    }

    /// Saves, ends and deletes the container.
    pub(crate) async fn swap_out(&self, running: Running) -> (Image, Ended) {
        let image = Image::new(self.bed);
        self.checkpoint_to(&image, &running.child, |_| {}).await.unwrap();
        let ended = running.end().await;
        assert_eq!(ended.code, 137);
        self.delete().await;
        (image, ended)
    }

    pub(crate) async fn checkpoint_to(
        &self,
        image: &Image,
        init: &Child,
        change: impl FnOnce(&mut CheckpointRequest),
    ) -> Result<(), RuntimeError> {
        let mut request = CheckpointRequest {
            id: self.id.clone(),
            init: init.process(),
            images: image.images(),
            work: image.work(),
            leave_running: false,
            allow: Allow::default(),
            cancel: Cancel::default(),
            external_files: vec![],
            sparse: Vec::new(),
            devices: false,
            review: None,
        };
        change(&mut request);
        self.bed.runtime.checkpoint(request).await
    }

    /// Restores the container from a checkpoint, with new pipes as standard input and output.
    pub(crate) async fn restore(&self, image: &Image) -> Running {
        self.restore_allowing(image, Allow::default()).await.unwrap()
    }

    pub(crate) async fn restore_allowing(&self, image: &Image, allow: Allow) -> Result<Running, RuntimeError> {
        let (io, pipes) = Pipes::new();
        self.restore_with(image, io, allow).await.map(|child| Running { child, pipes })
    }

    /// Restores the container from a checkpoint, left frozen.
    pub(crate) async fn restore_frozen(&self, image: &Image) -> Running {
        self.try_restore_frozen(image).await.unwrap()
    }

    pub(crate) async fn try_restore_frozen(&self, image: &Image) -> Result<Running, RuntimeError> {
        let (io, pipes) = Pipes::new();
        let request = RestoreRequest { frozen: true, ..self.restore_request(image, io, Allow::default()) };
        self.bed.runtime.restore(request).await.map(|child| Running { child, pipes })
    }

    pub(crate) async fn restore_with(&self, image: &Image, io: ProcessIo, allow: Allow) -> Result<Child, RuntimeError> {
        self.bed.runtime.restore(self.restore_request(image, io, allow)).await
    }

    pub(crate) fn restore_request(&self, image: &Image, io: ProcessIo, allow: Allow) -> RestoreRequest {
        RestoreRequest {
            id: self.id.clone(),
            bundle: self.folder.clone(),
            images: image.images(),
            work: image.work(),
            io,
            no_pivot_root: false,
            frozen: false,
            cut: false,
            allow,
            privileges: Privileges::default(),
            timeline: Timeline::start(Phase::Inspect),
            cancel: Cancel::default(),
        }
    }
}

impl Bed {
    /// Returns `spec`, changed as far as needed for a restore. crun before 1.29 restores no
    /// container with masked directories, unless the state is in the default folder:
    /// containers/crun#2239.
    pub(crate) fn savable(&self, spec: &Spec) -> Spec {
        spec.clone().with_linux(|linux| {
            if self.which == Which::Crun {
                linux
                    .masked_paths_mut()
                    .iter_mut()
                    .for_each(|paths| paths.retain(|path| !DIRECTORIES.contains(&path.as_str())));
            }
        })
    }

    /// Returns the reason of a refused restore; nothing may be left of the container.
    pub(crate) async fn restore_refusal(&self, bundle: &Bundle<'_>, image: &Image) -> String {
        let before = self.traces();
        match bundle.restore_allowing(image, Allow::default()).await {
            Ok(running) => {
                bundle.kill(running).await;
                panic!("it was restored");
            }
            Err(error) => {
                let left = self.settle(&before);
                assert!(left.is_empty(), "after {error}: {left:?}");
                chain(&error)
            }
        }
    }
}

/// Returns an error with all causes.
pub(crate) fn chain(error: &RuntimeError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
