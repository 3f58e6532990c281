//! Device nodes that CRIU cannot save, and that a plugin made it accept.
//!
//! CRIU writes such a descriptor as an entry of the kind "external", and such a mapping with a mark;
//! a restore then needs the plugin again. Here both become what every CRIU restores: a descriptor is
//! opened anew by path, and a mapping is private anonymous memory without contents.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proc::ContainerPid;

use crate::files::OpenFiles;
use crate::format::{COMMON_MAGIC, FDINFO_MAGIC, FILES_MAGIC, IDS_MAGIC, ImageError, damaged};
use crate::rewrite::{RewriteError, replace};
use crate::vma::{self, VMAS, Vma, mm_path, read_mm, vmas};
use crate::wire::{
    MAX_ENTRY, Reader, Value, fields, first_entry, put_message, put_number, put_signed, with_numbers, write_entry,
    write_magic,
};

/// The file of all open files of all processes.
pub(crate) const FILES: &str = "files.img";
pub(crate) const FILES_START: [u32; 2] = [COMMON_MAGIC, FILES_MAGIC];
const FDINFO_START: [u32; 2] = [COMMON_MAGIC, FDINFO_MAGIC];
const IDS_START: [u32; 2] = [COMMON_MAGIC, IDS_MAGIC];

/// Kinds of open files, in images/fdinfo.proto.
const REGULAR: u64 = 1;
const EXTERNAL: u64 = 16;

/// `files_id` of images/core.proto.
const FILES_ID: u32 = 2;

/// Fields of a descriptor, in images/fdinfo.proto.
const FD_ID: u32 = 1;
const FD_TYPE: u32 = 3;
const FD_NUMBER: u32 = 4;

/// Fields of an open file, in images/fdinfo.proto.
pub(crate) const FILE_TYPE: u32 = 1;
const FILE_ID: u32 = 2;
const FILE_REGULAR: u32 = 3;
const FILE_EXTERNAL: u32 = 15;

/// Fields of a regular file, in images/regfile.proto; the owner has the same number in
/// images/ext-file.proto.
const REGULAR_ID: u32 = 1;
const REGULAR_FLAGS: u32 = 2;
const REGULAR_POSITION: u32 = 3;
const OWNER: u32 = 5;
const REGULAR_NAME: u32 = 6;
const REGULAR_MOUNT: u32 = 7;

/// `O_RDWR | O_LARGEFILE` of x86-64, as CRIU writes it.
const READ_WRITE: u64 = 0o2 | 0o100_000;
/// The position of a file that has none: the driver's devices refuse to seek, and CRIU would fail.
const NO_POSITION: u64 = u64::MAX;
/// The mount of a file whose mount nobody has noted: CRIU then opens the file below the root.
const NO_MOUNT: i32 = -1;

/// The null device: stands in for a file without a path.
pub const NULL: &str = "/dev/null";

/// Device nodes that a dumped process has open or mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// The process, by its number in the dumped tree's pid namespace.
    pub pid: ContainerPid,
    /// Paths to be opened in a restored container, by the numbers of descriptors.
    pub paths: BTreeMap<u32, PathBuf>,
}

/// Gives descriptors and mappings that a plugin accepted a form that CRIU restores alone. `devices` has
/// all processes with any of them. A descriptor without a path becomes one of [`NULL`].
///
/// # Errors
/// Fails if a file is damaged, or cannot be read or written. The images are useless then.
pub fn replace_devices(images: &Path, devices: &[Devices]) -> Result<(), RewriteError> {
    if devices.is_empty() {
        return Ok(());
    }
    let mut files = BTreeMap::new();
    for of in devices {
        // Processes may share a table: a second look changes nothing.
        replace_descriptors(images, of, &mut files)?;
    }
    replace_files(images, &files)?;
    devices.iter().try_for_each(|of| replace_mappings(images, of.pid))
}

/// Beginning of the paths of the NVIDIA driver's devices.
const DRIVER: &str = "/dev/nvidia";

impl OpenFiles {
    /// Replaces devices of the NVIDIA driver that `is_missing` by [`NULL`].
    ///
    /// # Errors
    /// Fails if a file is damaged.
    pub fn replace_missing_devices(&mut self, is_missing: &dyn Fn(&Path) -> bool) -> Result<(), ImageError> {
        for entry in &mut self.entries {
            let (mut id, mut name, mut owner) = (0, None, None);
            fields(&self.path, entry, |field| {
                match (field.number, field.value) {
                    (FILE_ID, Value::Number(value)) => id = value,
                    (FILE_REGULAR, Value::Bytes(file)) => fields(&self.path, file, |field| {
                        match (field.number, field.value) {
                            (OWNER, Value::Bytes(bytes)) => owner = Some(bytes.to_vec()),
                            (REGULAR_NAME, Value::Bytes(bytes)) => name = std::str::from_utf8(bytes).ok(),
                            _ => {}
                        }
                        Ok(())
                    })?,
                    _ => {}
                }
                Ok(())
            })?;
            let (Some(name), Some(owner)) = (name, owner) else { continue };
            if name.starts_with(DRIVER) && is_missing(Path::new(name)) {
                *entry = open_file(id, Path::new(NULL), &owner);
                self.is_changed = true;
            }
        }
        Ok(())
    }
}

/// Returns the number of a process's table of descriptors.
fn table(images: &Path, pid: ContainerPid) -> Result<u64, ImageError> {
    let path = images.join(format!("ids-{pid}.img"));
    let mut id = None;
    fields(&path, &first_entry(&path, &IDS_START, MAX_ENTRY)?, |field| {
        if let (FILES_ID, Value::Number(value)) = (field.number, field.value) {
            id = Some(value);
        }
        Ok(())
    })?;
    id.ok_or_else(|| damaged(&path, "it names no table of descriptors"))
}

/// Makes the external descriptors of a process regular ones, and notes the paths of their open files.
fn replace_descriptors(images: &Path, of: &Devices, files: &mut BTreeMap<u64, PathBuf>) -> Result<(), RewriteError> {
    let path = images.join(format!("fdinfo-{}.img", table(images, of.pid)?));
    let mut changed = false;
    let mut entries = vec![];
    let mut reader = Reader::open(&path, &FDINFO_START)?;
    while let Some(entry) = reader.entry(MAX_ENTRY)? {
        let (mut id, mut kind, mut number) = (0, 0, 0);
        fields(&path, &entry, |field| {
            match (field.number, field.value) {
                (FD_ID, Value::Number(value)) => id = value,
                (FD_TYPE, Value::Number(value)) => kind = value,
                (FD_NUMBER, Value::Number(value)) => number = value,
                _ => {}
            }
            Ok(())
        })?;
        if kind != EXTERNAL {
            entries.push(entry);
            continue;
        }
        changed = true;
        entries.push(with_numbers(&path, &entry, &[(FD_TYPE, REGULAR)])?);
        let device = u32::try_from(number).ok().and_then(|number| of.paths.get(&number));
        if let Some(device) = device {
            files.insert(id, device.clone());
        }
    }
    if changed { write(&path, &FDINFO_START, &entries) } else { Ok(()) }
}

/// Makes the external open files regular ones.
fn replace_files(images: &Path, files: &BTreeMap<u64, PathBuf>) -> Result<(), RewriteError> {
    let path = images.join(FILES);
    let mut changed = false;
    let mut entries = vec![];
    let mut reader = Reader::open(&path, &FILES_START)?;
    while let Some(entry) = reader.entry(MAX_ENTRY)? {
        let (mut id, mut kind, mut owner) = (0, 0, None);
        fields(&path, &entry, |field| {
            match (field.number, field.value) {
                (FILE_TYPE, Value::Number(value)) => kind = value,
                (FILE_ID, Value::Number(value)) => id = value,
                (FILE_EXTERNAL, Value::Bytes(external)) => fields(&path, external, |field| {
                    if let (OWNER, Value::Bytes(bytes)) = (field.number, field.value) {
                        owner = Some(bytes.to_vec());
                    }
                    Ok(())
                })?,
                _ => {}
            }
            Ok(())
        })?;
        if kind != EXTERNAL {
            entries.push(entry);
            continue;
        }
        changed = true;
        let owner = owner.ok_or_else(|| damaged(&path, "an open file has no owner"))?;
        let name = files.get(&id).map_or(Path::new(NULL), PathBuf::as_path);
        entries.push(open_file(id, name, &owner));
    }
    if changed { write(&path, &FILES_START, &entries) } else { Ok(()) }
}

/// Returns an open file to be opened by its path.
fn open_file(id: u64, name: &Path, owner: &[u8]) -> Vec<u8> {
    let mut message = vec![];
    put_number(&mut message, FILE_TYPE, REGULAR);
    put_number(&mut message, FILE_ID, id);
    put_message(&mut message, FILE_REGULAR, &regular_file(id, name, owner));
    message
}

fn regular_file(id: u64, name: &Path, owner: &[u8]) -> Vec<u8> {
    let mut file = vec![];
    put_number(&mut file, REGULAR_ID, id);
    put_number(&mut file, REGULAR_FLAGS, READ_WRITE);
    put_number(&mut file, REGULAR_POSITION, NO_POSITION);
    put_message(&mut file, OWNER, owner);
    put_message(&mut file, REGULAR_NAME, name.as_os_str().as_encoded_bytes());
    put_signed(&mut file, REGULAR_MOUNT, NO_MOUNT);
    file
}

/// Makes the marked mappings of a process private anonymous memory of the same protection.
fn replace_mappings(images: &Path, pid: ContainerPid) -> Result<(), RewriteError> {
    let path = mm_path(images, pid);
    let mm = read_mm(&path)?;
    if !vmas(&path, &mm)?.iter().any(Vma::is_of_plugin) {
        return Ok(());
    }
    let mut entry = vec![];
    fields(&path, &mm, |field| {
        match field.value {
            Value::Bytes(message) if field.number == VMAS => {
                let vma = Vma::of(&path, message)?;
                let message = if vma.is_of_plugin() { vma.without_file() } else { message.to_vec() };
                put_message(&mut entry, VMAS, &message);
            }
            _ => entry.extend_from_slice(field.raw),
        }
        Ok(())
    })?;
    write(&path, &vma::MAGIC, &[entry])
}

pub(crate) fn write(path: &Path, magic: &[u32], entries: &[Vec<u8>]) -> Result<(), RewriteError> {
    replace(path, |out| {
        write_magic(out, magic)?;
        entries.iter().try_for_each(|entry| write_entry(out, entry))
    })
}
