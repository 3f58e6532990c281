//! Standard output.

use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use serde::Serialize;

use crate::error::CliError;

/// Writes all text at once. A reader that has gone (`gpusnap ls | head`) is no error.
pub(crate) fn print(text: &[u8]) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(CliError::File { action: "write", path: PathBuf::from("standard output"), source: error })
        }
        _ => Ok(()),
    }
}

pub(crate) fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let json = serde_json::to_string_pretty(value);
    let json = json.map_err(|error| CliError::File {
        action: "write",
        path: PathBuf::from("standard output"),
        source: error.into(),
    })?;
    print(format!("{json}\n").as_bytes())
}

/// Lines with aligned columns; columns from `right` on are right-aligned.
pub(crate) fn table<const N: usize>(rows: &[[String; N]], right: usize) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| match column >= right {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// Text from a snapshot's maker, fit for a terminal.
pub(crate) fn clean(text: &str) -> String {
    text.replace(|c: char| c.is_control(), "?")
}
