//! Statistics of a dump.

use std::io;
use std::path::Path;

use crate::format::{ImageError, SERVICE_MAGIC, STATS, STATS_MAGIC};
use crate::wire::{Field, MAX_ENTRY, Value, fields, first_entry};

/// Costs of a dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// Time until the tree was stopped, in microseconds.
    pub freezing_us: u64,
    /// Time during which the tree was stopped, in microseconds.
    pub frozen_us: u64,
    /// Time for reading memory, in microseconds.
    pub memory_dump_us: u64,
    /// Time for writing memory, in microseconds.
    pub memory_write_us: u64,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages already in the parent image.
    pub pages_skipped_parent: u64,
    /// Pages stored, of private and of shared memory.
    pub pages_written: u64,
}

/// Reads `stats-dump`, written by CRIU into the work directory of a dump. `None` without the file.
///
/// # Errors
/// Fails if the file cannot be read or is damaged.
pub fn dump_stats(directory: &Path) -> Result<Option<DumpStats>, ImageError> {
    let path = directory.join(STATS);
    let entry = match first_entry(&path, &[SERVICE_MAGIC, STATS_MAGIC], MAX_ENTRY) {
        Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut stats = None;
    fields(&path, &entry, |Field { number, value, .. }| {
        if let (1, Value::Bytes(dump)) = (number, value) {
            stats = Some(dump_stats_of(&path, dump)?);
        }
        Ok(())
    })?;
    Ok(stats)
}

fn dump_stats_of(path: &Path, entry: &[u8]) -> Result<DumpStats, ImageError> {
    let mut stats = DumpStats::default();
    fields(path, entry, |Field { number, value, .. }| {
        let Value::Number(value) = value else { return Ok(()) };
        match number {
            1 => stats.freezing_us = value,
            2 => stats.frozen_us = value,
            3 => stats.memory_dump_us = value,
            4 => stats.memory_write_us = value,
            5 => stats.pages_scanned = value,
            6 => stats.pages_skipped_parent = value,
            // Shared memory is counted separately.
            7 | 14 => stats.pages_written = stats.pages_written.saturating_add(value),
            _ => {}
        }
        Ok(())
    })?;
    Ok(stats)
}
