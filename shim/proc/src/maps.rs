//! `/proc/PID/maps`.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{HostPid, living, malformed};

/// A range of a process's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Range {
    /// The first address.
    pub start: u64,
    /// The address after the last one.
    pub end: u64,
}

impl Range {
    /// Returns the size in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Returns whether the range is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

/// A line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses of the mapping.
    pub range: Range,
    /// `r-xp` and the like.
    pub access: [u8; 4],
    /// Offset of the first address in the mapped file, in bytes.
    pub offset: u64,
    /// Device of the mapped file's filesystem, as in `st_dev`; 0 without a file.
    pub device: u64,
    /// Inode of the mapped file; 0 without a file.
    pub inode: u64,
    /// A path, with " (deleted)" behind a deleted file's; a name in brackets; or nothing.
    pub path: PathBuf,
}

impl Mapping {
    /// Returns whether code can run in the mapping.
    #[must_use]
    pub fn is_executable(&self) -> bool {
        self.access[2] == b'x'
    }

    /// Returns whether processes that map the same part of the file share it, and this one reads and
    /// writes it.
    #[must_use]
    pub fn is_shared_memory(&self) -> bool {
        self.access.starts_with(b"rw") && self.access[3] == b's'
    }

    /// Returns whether the mapping is writable.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.access[1] == b'w'
    }

    /// Parses a line like `7f00-7f10 r-xp 00000000 08:01 42      /usr/lib/x y.so`. Only the path
    /// may have bytes outside UTF-8.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let range = std::str::from_utf8(fields.next()?).ok()?;
        let (start, end) = range.split_once('-')?;
        let range = Range { start: u64::from_str_radix(start, 16).ok()?, end: u64::from_str_radix(end, 16).ok()? };
        let access = fields.next()?.try_into().ok()?;
        let offset = u64::from_str_radix(std::str::from_utf8(fields.next()?).ok()?, 16).ok()?;
        let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        let device = rustix::fs::makedev(number(major)?, number(minor)?);
        let inode = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let path = fields.next().unwrap_or_default();
        let blanks = path.iter().take_while(|byte| **byte == b' ').count();
        let path = PathBuf::from(OsString::from_vec(path.get(blanks..)?.to_vec()));
        Some(Self { range, access, offset, device, inode, path })
    }
}

/// Returns the mappings of a process, in order of addresses.
///
/// # Errors
/// Fails if there is no such process.
pub fn mappings(pid: HostPid) -> io::Result<Vec<Mapping>> {
    let maps = fs::read(living(pid)?.join("maps"))?;
    let lines = maps.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| Mapping::parse(line).ok_or_else(|| malformed(pid, "maps"))).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_line_of_maps_is_read_with_whatever_is_in_its_path() {
        let line =
            b"7f2b40000000-7f2b40200000 rw-s 00201000 103:05 381                        /dev/nvidia-uvm (deleted)";
        let expected = Mapping {
            range: Range { start: 0x7f2b_4000_0000, end: 0x7f2b_4020_0000 },
            access: *b"rw-s",
            offset: 0x20_1000,
            device: rustix::fs::makedev(0x103, 5),
            inode: 381,
            path: PathBuf::from("/dev/nvidia-uvm (deleted)"),
        };
        assert_eq!(Mapping::parse(line), Some(expected));
        assert_eq!(Mapping::parse(b"1000-2000 rw-p 00000000 00:00 0 ").unwrap().path, Path::new(""));
        assert_eq!(Mapping::parse(b"1000-2000 r-xp 00000000 00:00 7 /a b  c").unwrap().path, Path::new("/a b  c"));
        assert_eq!(Mapping::parse(b"1000-2000 rw-p"), None);
        assert_eq!(Mapping::parse(b"x-2000 rw-p 00000000 00:00 0 "), None);
        assert_eq!(Mapping::parse(b"1000-2000 rw-p 00000000 00:00 0").unwrap().path, Path::new(""));
        assert!(Mapping::parse(b"1000-2000 r-xp 00000000 08:01 42    /a \xff b").unwrap().is_executable());
    }

    #[test]
    fn this_process_runs_from_a_mapping_of_its_executable() {
        let executable = std::env::current_exe().unwrap();
        let own = mappings(HostPid::own()).unwrap();
        assert!(own.iter().any(|mapping| mapping.path == executable && mapping.is_executable()));
        assert!(own.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start));
    }
}
