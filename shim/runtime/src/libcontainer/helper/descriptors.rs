//! Targets of the standard streams of a container's init, recorded at the creation: init may
//! redirect streams before a checkpoint, while child processes keep the old ones.
//!
//! The file is runc's `descriptors.json`, in the state directory here and among the images there:
//! three links as in `/proc/PID/fd`. A restore replaces pipes, `pipe:[INODE]`.

use std::fs;
use std::io;
use std::path::Path;

use proc::HostPid;

use super::error::{Context, Failure, Result};
use super::state::read_json;

const FILE: &str = "descriptors.json";

/// Records the streams of a new process before any code of it has run.
pub(super) fn note(pid: HostPid, directory: &Path) -> Result<()> {
    let link = |fd: i32| -> io::Result<String> {
        Ok(fs::read_link(pid.path(&format!("fd/{fd}")))?.to_string_lossy().into_owned())
    };
    let links = [link(0), link(1), link(2)].into_iter().collect::<io::Result<Vec<String>>>();
    write(&links.context(|| format!("look at the standard streams of process {pid}"))?, directory)
}

/// Records the streams of a restored container: the old ones, except that new ones stand for the
/// replaced pipes. Init's current descriptors do not count: init may have closed or redirected a
/// stream still used by other processes.
pub(super) fn note_restored(old: &[String], new: &[String], directory: &Path) -> Result<()> {
    // Images without a record had nothing replaced.
    if old.is_empty() {
        return Ok(());
    }
    let links: Vec<String> = old
        .iter()
        .enumerate()
        .map(|(index, link)| if is_pipe(link) { new.get(index).unwrap_or(link).clone() } else { link.clone() })
        .collect();
    write(&links, directory)
}

/// Returns whether a restore replaces a stream.
pub(in crate::libcontainer) fn is_pipe(link: &str) -> bool {
    link.starts_with("pipe:[")
}

fn write(links: &[String], directory: &Path) -> Result<()> {
    let path = directory.join(FILE);
    let json = serde_json::to_vec(links).context(|| "write a list of links")?;
    fs::write(&path, json).context(|| format!("write {}", path.display()))
}

/// Copies the record, if any, to the images.
pub(super) fn copy(directory: &Path, images: &Path) -> Result<()> {
    let (from, to) = (directory.join(FILE), images.join(FILE));
    if !from.exists() {
        return Ok(());
    }
    fs::copy(&from, &to).map(drop).context(|| format!("copy {} to {}", from.display(), to.display()))
}

/// Returns the streams of the process in the images; none without a record.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn links(links: &[&str]) -> Vec<String> {
        links.iter().map(|&link| link.to_owned()).collect()
    }

    #[test]
    fn the_note_of_a_restored_container_has_the_new_pipes_in_place_of_the_old_ones() {
        let directory = tempfile::tempdir().unwrap();
        let old = links(&["/dev/null", "pipe:[1]", "pipe:[2]"]);
        note_restored(&old, &links(&["pipe:[7]", "pipe:[8]", "pipe:[9]"]), directory.path()).unwrap();
        assert_eq!(read(directory.path()).unwrap(), links(&["/dev/null", "pipe:[8]", "pipe:[9]"]));
    }

    #[test]
    fn without_a_note_there_is_none_later() {
        let [directory, images] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        note_restored(&[], &links(&["pipe:[7]"]), directory.path()).unwrap();
        copy(directory.path(), images.path()).unwrap();
        assert_eq!(read(images.path()).unwrap(), links(&[]));
    }

    #[test]
    fn a_terminal_is_noted_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let old = links(&["/dev/pts/0", "/dev/pts/0", "/dev/pts/0"]);
        note_restored(&old, &[], directory.path()).unwrap();
        assert_eq!(read(directory.path()).unwrap(), old);
    }
}
