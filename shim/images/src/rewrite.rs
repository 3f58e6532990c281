//! Images without some of their memory.
//!
//! Messages are changed field by field and not decoded as a whole, so that unknown fields survive.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use thiserror::Error;

use proc::ContainerPid;

use crate::cut::mark;
use crate::format::{ImageError, damaged};
use crate::pages::{self, PAGES_ID, Pagemap, page_size, pagemap_path, pagemaps, pages_path};
use crate::vma::{self, VMAS, Vma, anonymous, mm_path, read_mm, vmas};
use crate::wire::{Value, fields, open, put_message, with_numbers, write_entry, write_magic};

/// Changes to a process's images.
#[derive(Clone, Debug)]
pub struct Changes {
    /// The process, by its number in the dumped tree's pid namespace.
    pub pid: ContainerPid,
    /// Addresses of memory to be taken out: [`crate::Run`]s, or parts of runs. Whole pages.
    pub without: Vec<Range<u64>>,
    /// Ranges to become anonymous memory.
    pub staging: Vec<Staging>,
}

/// A range of private mappings, of files or anonymous, to become one anonymous mapping without
/// contents, readable and writable. Pages of the range in the images are dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staging {
    /// Addresses. Whole pages, mapped without a gap.
    pub range: Range<u64>,
    /// Ask for huge pages (MADV_HUGEPAGE) at the restore. The restore then fails on a kernel
    /// without huge pages.
    pub huge: bool,
}

/// Failure of a rewrite. The images are useless then.
#[derive(Debug, Error)]
pub enum RewriteError {
    /// The images cannot be read, or are damaged.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file cannot be written or removed.
    #[error("cannot {action} {path}")]
    File {
        /// Action on the file.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Reason from the system.
        source: io::Error,
    },
    /// A range cannot be taken out.
    #[error("process {pid}: {start:#x}-{end:#x} {what}")]
    Range {
        /// The process.
        pid: ContainerPid,
        /// Start address.
        start: u64,
        /// End address.
        end: u64,
        /// Fault of the range.
        what: &'static str,
    },
}

/// Takes memory out of a directory of images, after [marking](mark) it. Only the remaining memory is
/// copied, into new files of pages.
///
/// # Errors
/// Fails if a range does not fit the images, or a file cannot be read or written. Then some
/// processes' images may be rewritten and others not, and the directory is useless.
pub fn rewrite(images: &Path, changes: &[Changes]) -> Result<(), RewriteError> {
    let first_id = first_unused_id(images)?;
    if changes.iter().any(|of| !of.without.is_empty() || !of.staging.is_empty()) {
        mark(images)?;
    }
    for (changes, id) in changes.iter().zip(first_id..) {
        let range = |range: &Range<u64>, what| {
            let Range { start, end } = *range;
            RewriteError::Range { pid: changes.pid, start, end, what }
        };
        let mut gone: Vec<Range<u64>> = changes.without.clone();
        gone.extend(changes.staging.iter().map(|staging| staging.range.clone()));
        gone.sort_by_key(|range| range.start);
        let page = page_size();
        for gone in &gone {
            if gone.start >= gone.end || gone.start % page != 0 || gone.end % page != 0 {
                return Err(range(gone, "is not made of pages"));
            }
        }
        if let Some(pair) = gone.windows(2).find(|pair| pair[0].end > pair[1].start) {
            return Err(range(&pair[1], "is named twice"));
        }
        rewrite_mm(images, changes)?;
        if !gone.is_empty() {
            rewrite_pages(images, changes.pid, &gone, id)?;
        }
    }
    Ok(())
}

/// Checks the ranges against the mappings, and writes the mappings with staging in place of the
/// replaced ones.
fn rewrite_mm(images: &Path, changes: &Changes) -> Result<(), RewriteError> {
    let path = mm_path(images, changes.pid);
    let mm = read_mm(&path)?;
    let vmas = vmas(&path, &mm)?;
    for range in &changes.without {
        let fits = |vma: &Vma<'_>| vma.is_plain() && vma.is_writable();
        covered(changes.pid, range, &vmas, fits, "is not plain writable memory")?;
    }
    for Staging { range, .. } in &changes.staging {
        let fits = |vma: &Vma<'_>| {
            let ends = range.start <= vma.start && vma.end <= range.end;
            vma.is_read_write() && (vma.is_plain() || vma.is_private_file() && ends)
        };
        covered(changes.pid, range, &vmas, fits, "is not private memory, readable and writable")?;
    }
    if changes.staging.is_empty() {
        return Ok(());
    }
    let mut messages = vec![];
    for vma in &vmas {
        place(&path, vma, &changes.staging, &mut messages)?;
    }
    let mut messages = Some(messages);
    let mut entry = vec![];
    fields(&path, &mm, |field| {
        match field.value {
            Value::Bytes(_) if field.number == VMAS => {
                for message in messages.take().unwrap_or_default() {
                    put_message(&mut entry, VMAS, &message);
                }
            }
            _ => entry.extend_from_slice(field.raw),
        }
        Ok(())
    })?;
    replace(&path, |out| {
        write_magic(out, &vma::MAGIC)?;
        write_entry(out, &entry)
    })
}

/// Checks that suitable mappings cover a range, without a gap.
fn covered(
    pid: ContainerPid,
    range: &Range<u64>,
    vmas: &[Vma<'_>],
    fits: impl Fn(&Vma<'_>) -> bool,
    what: &'static str,
) -> Result<(), RewriteError> {
    let (mappings, guards) = vmas.split_at(vmas.partition_point(|vma| !vma.is_guard()));
    let first = mappings.partition_point(|vma| vma.end <= range.start);
    let mut reached = range.start;
    for vma in mappings[first..].iter().take_while(|vma| vma.start < range.end) {
        if !fits(vma) || vma.start > reached {
            break;
        }
        reached = vma.end;
    }
    let guarded = guards.iter().any(|vma| vma.start < range.end && vma.end > range.start);
    if reached < range.end || guarded {
        return Err(RewriteError::Range { pid, start: range.start, end: range.end, what });
    }
    Ok(())
}

/// Appends the replacement of a mapping: the parts outside of staging ranges, and each staging
/// range with its start inside.
fn place(path: &Path, vma: &Vma<'_>, staging: &[Staging], messages: &mut Vec<Vec<u8>>) -> Result<(), ImageError> {
    let mut inside: Vec<&Staging> =
        staging.iter().filter(|staging| staging.range.start < vma.end && staging.range.end > vma.start).collect();
    if inside.is_empty() {
        messages.push(vma.message.to_vec());
        return Ok(());
    }
    inside.sort_by_key(|staging| staging.range.start);
    let mut from = vma.start;
    for Staging { range, huge } in inside {
        if from < range.start {
            messages.push(vma.part(path, from, range.start)?);
        }
        if range.start >= vma.start {
            messages.push(anonymous(range.start, range.end, *huge));
        }
        from = range.end;
    }
    if from < vma.end {
        messages.push(vma.part(path, from, vma.end)?);
    }
    Ok(())
}

/// Writes a new file of pages, number `id`, with the remaining pages, and then the pagemap for it.
/// `gone` ascends.
fn rewrite_pages(images: &Path, pid: ContainerPid, gone: &[Range<u64>], id: u64) -> Result<(), RewriteError> {
    let path = pagemap_path(images, pid);
    let mut pagemap = Pagemap::open(&path)?;
    let old_path = pages_path(images, pagemap.pages_id);
    let new_path = pages_path(images, id);
    let mut copy = Copy { old: open(&old_path)?, old_path, new: create(&new_path)?, new_path, run: 0..0 };
    let mut entries = vec![with_numbers(&path, &pagemap.head, &[(PAGES_ID, id)])?];
    let mut offset = 0_u64;
    let mut next = 0;
    while let Some((entry, message)) = pagemap.next_in_order()? {
        while gone.get(next).is_some_and(|gone| gone.end <= entry.address) {
            next += 1;
        }
        let mut from = entry.address;
        let cuts = gone[next..].iter().take_while(|gone| gone.start < entry.end());
        for cut in cuts.cloned().chain(std::iter::once(entry.end()..entry.end())) {
            if !entry.present && !cut.is_empty() {
                let Range { start, end } = cut;
                return Err(RewriteError::Range { pid, start, end, what: "is not all in these images" });
            }
            let to = cut.start.max(from);
            if from < to {
                entries.push(with_numbers(&path, &message, &entry.piece(from, to - from))?);
                if entry.present {
                    copy.add(offset.saturating_add(from - entry.address), to - from)?;
                }
            }
            from = cut.end.min(entry.end()).max(from);
        }
        if entry.present {
            offset = offset.saturating_add(entry.length);
        }
    }
    let old_path = copy.finish()?;
    if entries.len() == 1 {
        // CRIU follows a pointer to the first entry without a check for one (`premap_priv_vmas`).
        return Err(damaged(&path, "nothing would be left in it").into());
    }
    replace(&path, |out| {
        write_magic(out, &pages::MAGIC)?;
        entries.iter().try_for_each(|entry| write_entry(out, entry))
    })?;
    std::fs::remove_file(&old_path).map_err(|source| RewriteError::File { action: "remove", path: old_path, source })
}

/// A copy of ranges of a file to the end of another.
struct Copy {
    old: File,
    old_path: PathBuf,
    new: File,
    new_path: PathBuf,
    /// Next range to copy: adjacent ranges are copied as one.
    run: Range<u64>,
}

impl Copy {
    fn add(&mut self, offset: u64, length: u64) -> Result<(), RewriteError> {
        if offset != self.run.end {
            self.flush()?;
            self.run = offset..offset;
        }
        self.run.end = offset.saturating_add(length);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), RewriteError> {
        let length = self.run.end - self.run.start;
        let path = self.new_path.clone();
        let failed = |source| RewriteError::File { action: "write", path, source };
        let copied = self.old.seek(SeekFrom::Start(self.run.start)).and_then(|_| {
            // In the kernel, by copy_file_range if the filesystem can.
            io::copy(&mut (&self.old).take(length), &mut self.new)
        });
        if copied.map_err(failed)? < length {
            return Err(damaged(&self.old_path, "it is cut off").into());
        }
        Ok(())
    }

    /// Returns the old file's path.
    fn finish(mut self) -> Result<PathBuf, RewriteError> {
        self.flush()?;
        Ok(self.old_path)
    }
}

/// Returns a number above all files of pages. No two pagemaps may have the same one.
fn first_unused_id(images: &Path) -> Result<u64, ImageError> {
    let mut ids = BTreeSet::new();
    for path in pagemaps(images)? {
        if !ids.insert(Pagemap::open(&path)?.pages_id) {
            return Err(damaged(&path, "another pagemap has the same file of pages"));
        }
    }
    let highest = ids.last().copied().unwrap_or_default();
    // A `uint32` in images/pagemap.proto; there are fewer processes than half the range.
    if highest > u64::from(u32::MAX / 2) {
        return Err(damaged(images, "its files of pages have impossible numbers"));
    }
    Ok(highest + 1)
}

/// Replaces a file by another under the same name.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> Result<(), RewriteError> {
    let new_path = path.with_extension("new");
    let file = create(&new_path)?;
    let mut out = BufWriter::new(&file);
    let written = write(&mut out).and_then(|()| out.flush()).and_then(|()| std::fs::rename(&new_path, path));
    written.map_err(|source| RewriteError::File { action: "write", path: path.to_owned(), source })
}

fn create(path: &Path) -> Result<File, RewriteError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR);
    file.map(File::from).map_err(|errno| RewriteError::File {
        action: "create",
        path: path.to_owned(),
        source: errno.into(),
    })
}
