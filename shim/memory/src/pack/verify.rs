//! Checking whole packs.

use std::os::unix::fs::FileExt;

use crate::buffer::{Buffer, SIZE};
use crate::control::Control;
use crate::error::VerifyError;
use crate::pack::{CHUNK_BYTES, Pack};
use crate::units;

/// Reads every chunk of packs and checks it, one pack per thread.
///
/// # Errors
/// When a chunk is damaged or cannot be read, or it is cancelled.
pub fn verify(packs: &[Pack], control: &Control) -> Result<(), VerifyError> {
    control.each(control.threads(), packs.len(), Buffer::new, |buffer, index| one(&packs[index], buffer, control))
}

fn one(pack: &Pack, buffer: &mut Buffer, control: &Control) -> Result<(), VerifyError> {
    let length = units::bytes(pack.data_length());
    for offset in (0..length).step_by(SIZE) {
        control.check()?;
        let bytes = &mut buffer[..SIZE.min(length - offset)];
        pack.file()
            .read_exact_at(bytes, units::wide(offset))
            .map_err(|source| VerifyError::Read { path: pack.path().to_owned(), source })?;
        if let Some(chunk) = pack.damaged(offset / CHUNK_BYTES, bytes) {
            return Err(VerifyError::Corrupt { path: pack.path().to_owned(), chunk });
        }
        control.add(units::wide(bytes.len()));
    }
    Ok(())
}
