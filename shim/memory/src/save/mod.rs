//! Memory into packs.

mod files;
mod process;

use std::path::PathBuf;

use proc::ContainerPid;

use crate::error::SaveError;
use crate::pack::{CHUNK, PAGE};
use crate::table::SegmentTable;
pub use files::{FileSource, save_files};
pub use process::{save_processes, save_together};

/// Where packs are written: files `PREFIX-000000`, `PREFIX-000001`, ... of their owner alone. The caller removes the
/// folder if saving fails.
#[derive(Clone, Debug)]
pub struct Draft {
    /// A folder that nobody else writes to.
    pub folder: PathBuf,
    /// What the names of packs begin with. No other call uses it in this folder.
    pub prefix: String,
}

/// What was saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// The packs, in the order in which the table counts them.
    pub packs: Vec<PathBuf>,
    /// What is in them.
    pub table: SegmentTable,
}

impl Draft {
    fn path(&self, number: usize) -> PathBuf {
        self.folder.join(format!("{}-{number:06}", self.prefix))
    }
}

impl Saved {
    /// Both in one; the packs of the other come after those of this one.
    ///
    /// # Errors
    /// When the same memory of a process is in both.
    pub fn merge(mut self, other: Self) -> Result<Self, SaveError> {
        self.packs.extend(other.packs);
        Ok(Self { packs: self.packs, table: self.table.merge(other.table)? })
    }
}

/// The end of a range of whole pages in the address space.
fn check_range(pid: ContainerPid, address: u64, length: u64) -> Result<u64, SaveError> {
    let pages = address.is_multiple_of(PAGE) && length.is_multiple_of(PAGE);
    // Room for one chunk more, so that no sum of an address and a chunk has to be checked again.
    let end = address.checked_add(length).filter(|end| pages && end.checked_add(CHUNK).is_some());
    end.ok_or(SaveError::Range { pid, address, length })
}
