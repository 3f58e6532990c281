//! Where the standard streams of a container's init lead, kept from its creation on: by the time of a checkpoint it may
//! have redirected its own, while its children still have them.
//!
//! The file is runc's `descriptors.json`, in the state directory here and among the images there: three links as in
//! `/proc/PID/fd`. Those that are pipes, `pipe:[INODE]`, are what a restore replaces.

use std::fs;
use std::io;
use std::path::Path;

use proc::HostPid;

use super::error::{Context, Failure, Result};
use super::state::read_json;

const FILE: &str = "descriptors.json";

/// Notes the streams of a process that has just been made, and has run nothing yet.
pub(super) fn note(pid: HostPid, directory: &Path) -> Result<()> {
    let link = |fd: i32| -> io::Result<String> {
        Ok(fs::read_link(pid.path(&format!("fd/{fd}")))?.to_string_lossy().into_owned())
    };
    let links = [link(0), link(1), link(2)].into_iter().collect::<io::Result<Vec<String>>>();
    write(&links.context(|| format!("look at the standard streams of process {pid}"))?, directory)
}

/// Notes the streams of a restored container: those that it had, with the new ones in place of the pipes that were
/// replaced. The descriptors that init has now do not count: init may have closed or redirected them, while other
/// processes of the container use them.
pub(super) fn note_restored(old: &[String], new: &[String], directory: &Path) -> Result<()> {
    // Images that say nothing of streams had nothing replaced.
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

/// Puts the note among the images, if there is one.
pub(super) fn copy(directory: &Path, images: &Path) -> Result<()> {
    let (from, to) = (directory.join(FILE), images.join(FILE));
    if !from.exists() {
        return Ok(());
    }
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
