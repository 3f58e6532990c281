//! Id maps of several ranges. libcontainer leaves such maps to newuidmap and newgidmap. Both
//! programs serve users other than root by /etc/subuid, and may not be installed. Root can write
//! the maps directly, as runc does, so libcontainer finds this binary under both names.
//! libcontainer ignores exit codes, so a failure is noted in a file.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libcontainer::user_ns::UserNamespaceConfig;
use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};

use super::adapt;
use super::error::{Context, Failure, Result};

/// Names for this binary, each with the map to write.
const NAMES: [(&str, &str); 2] = [("newuidmap", "uid_map"), ("newgidmap", "gid_map")];
/// Name of the note, beside the links.
const NOTE: &str = "id-maps.failed";

/// Links to this binary for libcontainer, removed on drop.
pub(super) struct Mappers {
    folder: PathBuf,
}

/// Returns whether a map has several ranges.
pub(super) fn has_several(linux: &Linux) -> bool {
    [linux.uid_mappings(), linux.gid_mappings()].into_iter().flatten().any(|maps| maps.len() > 1)
}

/// Returns libcontainer's configuration of a new user namespace, and the links to keep until the
/// namespace exists.
pub(super) fn config(spec: &Spec, folder: &Path) -> Result<(Option<UserNamespaceConfig>, Option<Mappers>)> {
    let linux = adapt::linux(spec)?;
    if !has_several(linux) || !adapt::has_new(linux, LinuxNamespaceType::User) {
        return Ok((UserNamespaceConfig::new(spec)?, None));
    }
    let mut config = UserNamespaceConfig::try_from(linux)?;
    let mappers = Mappers::link(folder).context(|| format!("make links in {}", folder.display()))?;
    let [uids, gids] = NAMES.map(|(name, _)| Some(folder.join(name)));
    (config.newuidmap, config.newgidmap) = (uids, gids);
    Ok((Some(config), Some(mappers)))
}

impl Mappers {
    fn link(folder: &Path) -> io::Result<Self> {
        let mappers = Self { folder: folder.to_owned() };
        for (name, _) in NAMES {
            // Resolved by the executing process: a child of this process, still with this
            // executable.
            std::os::unix::fs::symlink("/proc/self/exe", folder.join(name))?;
        }
        Ok(mappers)
    }

    /// Returns the reason for a missing map.
    pub(super) fn failure(&self) -> Option<Failure> {
        fs::read_to_string(self.folder.join(NOTE)).ok().map(Failure::new)
    }
}

impl Drop for Mappers {
    fn drop(&mut self) {
        for name in NAMES.map(|(name, _)| name).into_iter().chain([NOTE]) {
            // The note exists only after a failure; any rest goes with the folder.
            let _ = fs::remove_file(self.folder.join(name));
        }
    }
}

/// Returns whether a program of this name is to write a map.
#[must_use]
pub fn is_mapper(name: &OsStr) -> bool {
    map(Path::new(name)).is_some()
}

fn map(program: &Path) -> Option<&'static str> {
    let name = program.file_name()?;
    NAMES.iter().find_map(|(mapper, map)| (name == *mapper).then_some(*map))
}

/// Writes a map: `newuidmap PID INSIDE OUTSIDE SIZE...`. For `main`, if [`is_mapper`] returns true.
#[must_use]
pub fn mapper_main(program: &OsStr, arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let program = Path::new(program);
    let arguments: Option<Vec<String>> = arguments.map(|argument| argument.into_string().ok()).collect();
    let written = match (map(program), arguments.as_deref().map(split)) {
        (Some(map), Some(Some((pid, ranges)))) => write(&format!("/proc/{pid}/{map}"), &ranges),
        _ => Err("invalid arguments for an id map".to_owned()),
    };
    let Err(message) = written else { return ExitCode::SUCCESS };
    // Nobody else would hear of the failure.
    let _ = fs::write(program.with_file_name(NOTE), message);
    ExitCode::FAILURE
}

/// Splits the arguments into the pid and the ranges, in the kernel's format.
fn split(arguments: &[String]) -> Option<(u32, String)> {
    let (pid, ranges) = arguments.split_first()?;
    let numbers = ranges.iter().map(|number| number.parse().ok()).collect::<Option<Vec<u32>>>()?;
    if numbers.is_empty() || numbers.len() % 3 != 0 {
        return None;
    }
    let lines = numbers.chunks(3).map(|range| format!("{} {} {}\n", range[0], range[1], range[2]));
    Some((pid.parse().ok()?, lines.collect()))
}

/// Writes a map in a single write, as the kernel requires.
fn write(path: &str, ranges: &str) -> std::result::Result<(), String> {
    fs::write(path, ranges).map_err(|error| {
        format!("cannot write {path}: {error}; the ranges are {}", ranges.trim_end().replace('\n', ", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_become_lines() {
        let split = |arguments: &str| split(&arguments.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(split("7 0 1000 1 1 2000 5"), Some((7, "0 1000 1\n1 2000 5\n".into())));
        for arguments in ["7", "7 0 1000", "7 0 -1 1", "x 0 1000 1"] {
            assert_eq!(split(arguments), None, "{arguments}");
        }
    }

    #[test]
    fn a_mapper_is_known_by_its_name() {
        assert!(is_mapper(OsStr::new("/run/gpusnap/x/newuidmap")));
        assert!(!is_mapper(OsStr::new("containerd-shim-gpusnap-v2")));
    }

    #[test]
    fn a_map_that_cannot_be_written_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let mappers = Mappers::link(folder.path()).unwrap();
        assert!(mappers.failure().is_none());
        let program = folder.path().join("newgidmap");
        // This process already has a map.
        let pid = std::process::id().to_string();
        let arguments = [pid.as_str(), "0", "1000", "1", "1", "2000", "5"].map(OsString::from);
        let _ = mapper_main(program.as_os_str(), arguments.into_iter());
        let failure = mappers.failure().unwrap().to_string();
        assert!(failure.contains("gid_map") && failure.contains("0 1000 1, 1 2000 5"), "{failure}");
        drop(mappers);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
