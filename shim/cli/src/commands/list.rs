//! `gpusnap ls`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use snapshot::{Listed, Name, OpenError};

use super::Context;
use crate::error::CliError;
use crate::output::{print, print_json, table};
use crate::units::{age, bytes};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    names: Vec<Name>,
    digest: String,
    /// Seconds since 1970; absent if the config cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_used: Option<u64>,
    in_use: bool,
    size: u64,
    unique: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

pub(super) fn list(context: &Context, json: bool) -> Result<(), CliError> {
    let listed = match context.open_to_read() {
        // Nothing has ever been published here.
        Err(CliError::Open { source: OpenError::Missing { .. }, .. }) => Vec::new(),
        store => store?.list().map_err(|source| CliError::List { source })?,
    };
    if json {
        return print_json(&listed.iter().map(line).collect::<Vec<_>>());
    }
    let heading = ["NAME", "DIGEST", "CREATED", "LAST USED", "SIZE", "UNIQUE"].map(str::to_owned);
    let mut rows = vec![heading];
    for snapshot in &listed {
        let created =
            snapshot.content.as_ref().ok().map(|(_, config)| UNIX_EPOCH + Duration::from_secs(config.created));
        let last_used = if snapshot.in_use { "in use".to_owned() } else { ago(snapshot.last_used) };
        let mut names: Vec<String> = snapshot.names.iter().map(ToString::to_string).collect();
        if names.is_empty() {
            names.push("-".to_owned());
        }
        for name in names {
            rows.push([
                name,
                snapshot.digest.short(),
                created.map_or_else(|| "damaged".to_owned(), age),
                last_used.clone(),
                bytes(snapshot.size),
                bytes(snapshot.unique),
            ]);
        }
    }
    print(table(&rows, 4).as_bytes())
}

fn line(listed: &Listed) -> Line {
    Line {
        names: listed.names.clone(),
        digest: listed.digest.to_string(),
        created: listed.content.as_ref().ok().map(|(_, config)| config.created),
        last_used: seconds(listed.last_used),
        in_use: listed.in_use,
        size: listed.size,
        unique: listed.unique,
        problem: listed.content.as_ref().err().map(ToString::to_string),
    }
}

pub(super) fn seconds(time: Option<SystemTime>) -> Option<u64> {
    Some(time?.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

pub(super) fn ago(time: Option<SystemTime>) -> String {
    time.map_or_else(|| "never".to_owned(), age)
}
