//! Memory beside images: `memory.segments`, and the packs in the order in which that counts them.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use memory::{MAX_TABLE, SegmentTable};

const SEGMENTS: &str = "memory.segments";

/// Whether a file of this name is of memory beside images.
#[must_use]
pub fn is_inline(name: &str) -> bool {
    name == SEGMENTS || name.strip_prefix("memory-").is_some_and(|rest| rest.ends_with(".pack"))
}

pub(crate) fn pack(images: &Path, index: usize) -> PathBuf {
    images.join(format!("memory-{index:06}.pack"))
}

pub(crate) fn write<'a>(
    images: &Path,
    table: &SegmentTable,
    packs: impl Iterator<Item = &'a PathBuf>,
) -> io::Result<()> {
    for (index, from) in packs.enumerate() {
        let to = pack(images, index);
        match fs::rename(from, &to) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                fs::copy(from, &to)?;
                fs::remove_file(from)?;
            }
            renamed => renamed?,
        }
    }
    fs::write(images.join(SEGMENTS), table.encode())
}

pub(crate) fn segments(images: &Path) -> io::Result<Vec<u8>> {
    read(fs::File::open(images.join(SEGMENTS))?)
}

/// A table, of which no more is read than it may have.
pub(crate) fn read(file: fs::File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_TABLE + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
