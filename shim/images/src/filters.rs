//! Seccomp filters in images.

use std::io;
use std::path::Path;

use crate::format::{COMMON_MAGIC, ImageError, SECCOMP_MAGIC};
use crate::wire::{Value, fields, first_entry};

/// Numbers in images/seccomp.proto.
const FILTERS: u32 = 1;
const PROGRAM: u32 = 1;
/// Largest file: some thousand filters of 4096 instructions of 8 bytes.
const MAX: u32 = 64 << 20;

/// Returns the programs of all filters of all threads, in the kernel's form.
///
/// # Errors
/// Fails if the file is damaged or cannot be read.
pub fn filters(images: &Path) -> Result<Vec<Vec<u8>>, ImageError> {
    let path = images.join("seccomp.img");
    let entry = match first_entry(&path, &[COMMON_MAGIC, SECCOMP_MAGIC], MAX) {
        Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entry => entry?,
    };
    let mut programs = vec![];
    fields(&path, &entry, |field| {
        let (FILTERS, Value::Bytes(filter)) = (field.number, field.value) else { return Ok(()) };
        fields(&path, filter, |field| {
            if let (PROGRAM, Value::Bytes(program)) = (field.number, field.value) {
                programs.push(program.to_vec());
            }
            Ok(())
        })
    })?;
    Ok(programs)
}
