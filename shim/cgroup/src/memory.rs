//! How much memory a container has, and may still take.

use std::path::Path;

use crate::{Cgroup, Hierarchy, file};

/// Names of the files that say so, in one version.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// What the kernel can take back at once, in `memory.stat`.
    inactive: &'static str,
    /// Likewise, what is in no file.
    anonymous: &'static str,
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    inactive: "total_inactive_file",
    anonymous: "total_rss",
};
const V2: Files = Files { limit: "memory.max", usage: "memory.current", inactive: "inactive_file", anonymous: "anon" };

/// What version 1 says where there is no limit: the largest number of pages of 4 KiB, or of larger ones.
const UNLIMITED_V1: u64 = 1 << 60;

fn place(cgroup: &Cgroup) -> Option<(&Path, Files)> {
    match &cgroup.hierarchy {
        Hierarchy::V1(directories) => Some((directories.get("memory")?, V1)),
        Hierarchy::V2(directory) => Some((directory.as_path(), V2)),
    }
}

/// Bytes that are in no file. None where the kernel does not count them.
pub(crate) fn anonymous(cgroup: &Cgroup) -> Option<u64> {
    let (directory, files) = place(cgroup)?;
    Some(file::pairs(&directory.join("memory.stat")).ok()?.get(files.anonymous))
}

/// The least that it, or any cgroup above it, leaves. None without a limit.
pub(crate) fn left(cgroup: &Cgroup) -> Option<u64> {
    let (directory, files) = place(cgroup)?;
    directory
        .ancestors()
        .take_while(|above| above.join("cgroup.procs").exists())
        .filter_map(|at| left_in(at, &files))
        .min()
}

fn left_in(directory: &Path, files: &Files) -> Option<u64> {
    let text = file::text(&directory.join(files.limit)).ok().flatten()?;
    let limit = Some(file::parse(text.trim(), u64::MAX)).filter(|limit| *limit < UNLIMITED_V1)?;
    let usage = file::number(&directory.join(files.usage), 0).ok()?;
    let inactive = file::pairs(&directory.join("memory.stat")).map_or(0, |stat| stat.get(files.inactive));
    Some(limit.saturating_sub(usage.saturating_sub(inactive)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_counts_and_caches_do_not() {
        let pod = tempfile::tempdir().unwrap();
        let container = pod.path().join("container");
        std::fs::create_dir(&container).unwrap();
        let write = |directory: &Path, name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
        for directory in [pod.path(), &container] {
            write(directory, "cgroup.procs", "");
            write(directory, "memory.stat", "anon 5\ninactive_file 20\n");
        }
        write(pod.path(), "memory.max", "100\n");
        write(pod.path(), "memory.current", "90\n");
        write(&container, "memory.max", "max\n");
        write(&container, "memory.current", "60\n");
        let cgroup = Cgroup { hierarchy: Hierarchy::V2(container.clone()) };
        assert_eq!((left(&cgroup), anonymous(&cgroup)), (Some(30), Some(5)));
        write(&container, "memory.max", "50\n");
        assert_eq!(left(&Cgroup { hierarchy: Hierarchy::V2(container) }), Some(10));
    }
}
