//! Where the standard streams of a container's init lead, kept from its creation on: by the time of a checkpoint it may
//! have redirected its own, while its children still have them.
//!
//! The file is runc's `descriptors.json`, in the state directory here and among the images there: three links as in
//! `/proc/PID/fd`. Those that are pipes, `pipe:[INODE]`, are what a restore replaces.

use std::fs;
use std::io;
use std::path::Path;

use super::error::{Context, Failure, Result};
use super::state::read_json;

const FILE: &str = "descriptors.json";

/// Notes the streams of a process that has just been made.
pub(super) fn note(pid: i32, directory: &Path) -> Result<()> {
    let link = |fd: i32| -> io::Result<String> {
        Ok(fs::read_link(format!("/proc/{pid}/fd/{fd}"))?.to_string_lossy().into_owned())
    };
    let links = [link(0), link(1), link(2)].into_iter().collect::<io::Result<Vec<String>>>();
    let links = links.context(|| format!("look at the standard streams of process {pid}"))?;
    let path = directory.join(FILE);
    let json = serde_json::to_vec(&links).context(|| "write a list of links")?;
    fs::write(&path, json).context(|| format!("write {}", path.display()))
}

/// Puts the note among the images.
pub(super) fn copy(directory: &Path, images: &Path) -> Result<()> {
    let (from, to) = (directory.join(FILE), images.join(FILE));
    fs::copy(&from, &to).map(drop).context(|| format!("copy {} to {}", from.display(), to.display()))
}

/// The streams of the process in the images; none if they were made without a note of them.
pub(super) fn read(images: &Path) -> Result<Vec<String>> {
    let path = images.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let links: Vec<String> = read_json(&path)?;
    if links.len() > 3 {
        return Err(Failure::new(format!("{} names {} streams, where there are 3", path.display(), links.len())));
    }
    Ok(links)
}
