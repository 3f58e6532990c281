//! Mappings, as in `mm-PID.img`.

use std::path::{Path, PathBuf};

use proc::ContainerPid;

use crate::format::{COMMON_MAGIC, ImageError, MM_MAGIC, damaged};
use crate::pages::page_size;
use crate::wire::{Field, Value, fields, first_entry, put_number, with_numbers};

pub(crate) const MAGIC: [u32; 2] = [COMMON_MAGIC, MM_MAGIC];
/// Largest file: 64 bytes for each of a million mappings. `vm.max_map_count` is 65530, and 262144
/// or a million for databases.
const MAX_MM: u32 = 64 << 20;
/// Number of the mappings' field in images/mm.proto.
pub(crate) const VMAS: u32 = 14;

/// Numbers of the fields in images/vma.proto.
const START: u32 = 1;
const END: u32 = 2;
const OFFSET: u32 = 3;
const SHMID: u32 = 4;
const PROTECTION: u32 = 5;
const FLAGS: u32 = 6;
const STATUS: u32 = 7;
const FD: u32 = 8;
const ADVICE: u32 = 9;

/// Flags of criu/include/image.h.
const REGULAR: u64 = 1 << 0;
const HEAP: u64 = 1 << 5;
const FILE_PRIVATE: u64 = 1 << 6;
const ANONYMOUS_PRIVATE: u64 = 1 << 9;
const GUARD: u64 = 1 << 16;
const PLUGIN: u64 = 1 << 27;

/// Flags of Linux's include/uapi/asm-generic/mman-common.h and mman.h, for x86-64 and arm64.
const READ_WRITE: u64 = 0x1 | 0x2;
const WRITE: u64 = 0x2;
const TYPE: u64 = 0x0f;
const PRIVATE: u64 = 0x02;
const ANONYMOUS: u64 = 0x20;
const NO_RESERVE: u64 = 0x4000;
const GROWS_DOWN: u64 = 0x0100;
const HUGETLB: u64 = 0x4_0000;
/// `MADV_HUGEPAGE`; CRIU stores advice as bits (criu/proc_parse.c), and repeats it after reading
/// the memory.
const ADVICE_HUGE: u64 = 14;
/// The field `fd` is always -1, in zigzag form.
const NO_FD: u64 = 1;

/// A mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vma<'a> {
    pub(crate) start: u64,
    pub(crate) end: u64,
    protection: u64,
    flags: u64,
    status: u64,
    pub(crate) message: &'a [u8],
}

impl<'a> Vma<'a> {
    pub(crate) fn of(path: &Path, message: &'a [u8]) -> Result<Self, ImageError> {
        let mut vma = Self { start: 0, end: 0, protection: 0, flags: 0, status: 0, message };
        fields(path, message, |Field { number, value, .. }| {
            let Value::Number(value) = value else { return Ok(()) };
            match number {
                START => vma.start = value,
                END => vma.end = value,
                PROTECTION => vma.protection = value,
                FLAGS => vma.flags = value,
                STATUS => vma.status = value,
                _ => {}
            }
            Ok(())
        })?;
        if vma.start >= vma.end {
            return Err(damaged(path, "a mapping has no length"));
        }
        if !vma.start.is_multiple_of(page_size()) || !vma.end.is_multiple_of(page_size()) {
            return Err(damaged(path, "a mapping is not made of pages"));
        }
        Ok(vma)
    }

    /// Returns whether this is memory and nothing else: private and anonymous, heap or not. No
    /// growing stack, no huge pages of hugetlbfs, no mapping of the kernel's.
    pub(crate) fn is_plain(&self) -> bool {
        self.status & !HEAP == REGULAR | ANONYMOUS_PRIVATE
            && self.flags & TYPE == PRIVATE
            && self.flags & ANONYMOUS != 0
            && self.flags & (GROWS_DOWN | HUGETLB) == 0
    }

    /// Returns whether process_vm_writev can write there.
    pub(crate) fn is_writable(&self) -> bool {
        self.protection & WRITE != 0
    }

    /// Returns whether this is a private mapping of a file.
    pub(crate) fn is_private_file(&self) -> bool {
        self.status == REGULAR | FILE_PRIVATE && self.flags & TYPE == PRIVATE && self.flags & HUGETLB == 0
    }

    pub(crate) fn is_read_write(&self) -> bool {
        self.protection == READ_WRITE
    }

    /// Returns whether this is a guard (MADV_GUARD_INSTALL): no mapping, but a range inside others
    /// that faults. Guards come after all mappings.
    pub(crate) fn is_guard(&self) -> bool {
        self.status & GUARD != 0
    }

    /// Returns whether this is a mapping of a device that CRIU left to a plugin.
    pub(crate) fn is_of_plugin(&self) -> bool {
        self.status & PLUGIN != 0
    }

    /// Returns the message of private anonymous memory in place of the mapping. Nothing is reserved:
    /// the memory may be larger than the machine's, and nobody uses it.
    pub(crate) fn without_file(&self) -> Vec<u8> {
        memory(self.start, self.end, self.protection, PRIVATE | ANONYMOUS | NO_RESERVE)
    }

    /// Returns the message of a part. Only for anonymous memory: a file's part would start
    /// elsewhere in the file.
    pub(crate) fn part(&self, path: &Path, start: u64, end: u64) -> Result<Vec<u8>, ImageError> {
        with_numbers(path, self.message, &[(START, start), (END, end)])
    }
}

/// Returns the message of private anonymous memory, readable and writable, in CRIU's form.
pub(crate) fn anonymous(start: u64, end: u64, huge: bool) -> Vec<u8> {
    let mut message = memory(start, end, READ_WRITE, PRIVATE | ANONYMOUS);
    if huge {
        put_number(&mut message, ADVICE, 1 << ADVICE_HUGE);
    }
    message
}

fn memory(start: u64, end: u64, protection: u64, flags: u64) -> Vec<u8> {
    let mut message = vec![];
    for (number, value) in [
        (START, start),
        (END, end),
        (OFFSET, 0),
        (SHMID, 0),
        (PROTECTION, protection),
        (FLAGS, flags),
        (STATUS, REGULAR | ANONYMOUS_PRIVATE),
        (FD, NO_FD),
    ] {
        put_number(&mut message, number, value);
    }
    message
}

pub(crate) fn mm_path(images: &Path, pid: ContainerPid) -> PathBuf {
    images.join(format!("mm-{pid}.img"))
}

/// Returns the single entry of `mm-PID.img`.
pub(crate) fn read_mm(path: &Path) -> Result<Vec<u8>, ImageError> {
    first_entry(path, &MAGIC, MAX_MM)
}

/// Returns the mappings of an entry: ascending, then the guards.
pub(crate) fn vmas<'a>(path: &Path, mm: &'a [u8]) -> Result<Vec<Vma<'a>>, ImageError> {
    let mut found: Vec<Vma<'a>> = vec![];
    fields(path, mm, |field| {
        if let (VMAS, Value::Bytes(message)) = (field.number, field.value) {
            let vma = Vma::of(path, message)?;
            let in_order = found.last().is_none_or(|last| !last.is_guard() && last.end <= vma.start);
            if !vma.is_guard() && !in_order {
                return Err(damaged(path, "its mappings are not in order"));
            }
            found.push(vma);
        }
        Ok(())
    })?;
    Ok(found)
}
