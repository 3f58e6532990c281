//! Reading packs, from the page cache or past it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

use crate::pack::{PAGE, Pack};
use crate::units;

/// A pack that is read once.
pub(super) struct Source<'a> {
    pack: &'a Pack,
    /// The same file for reads past the page cache; `None` where there are none.
    direct: OnceLock<Option<File>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(pack: &'a Pack) -> Self {
        Self { pack, direct: OnceLock::new() }
    }

    pub(super) fn pack(&self) -> &'a Pack {
        self.pack
    }

    /// Whether its first page is in the page cache, or it has no disk.
    pub(super) fn begins_in_cache(&self) -> bool {
        let mut page = [0; 1];
        self.pack.read_cached(&mut page, 0) == page.len() || self.direct().is_none()
    }

    /// Reads whole pages.
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let cached = units::wide(self.pack.read_cached(bytes, offset)) / PAGE * PAGE;
        let rest = &mut bytes[units::bytes(cached)..];
        if rest.is_empty() {
            return Ok(());
        }
        let offset = offset + cached;
        match self.direct().map(|file| file.read_exact_at(rest, offset)) {
            // A disk of larger blocks, or a filesystem that cannot after all.
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidInput => {
                self.pack.file().read_exact_at(rest, offset)
            }
            Some(result) => result,
            None => self.pack.file().read_exact_at(rest, offset),
        }
    }

    fn direct(&self) -> Option<&File> {
        let open = || {
            let path = format!("/proc/self/fd/{}", self.pack.file().as_raw_fd());
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
            rustix::fs::open(path, flags, Mode::empty()).ok().map(File::from)
        };
        self.direct.get_or_init(open).as_ref()
    }
}
