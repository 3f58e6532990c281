//! `gpusnap inspect`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use memory::Place;
use serde::Serialize;
use snapshot::{Config, Listed, Manifest, Name, SEGMENTS_TYPE, Snapshot};

use super::Context;
use super::list::{ago, seconds};
use super::verify::segments;
use crate::error::{CliError, chain};
use crate::output::{clean, print, print_json, table};
use crate::units::{age, bytes};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Inspected<'a> {
    names: &'a [Name],
    digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_used: Option<u64>,
    in_use: bool,
    size: u64,
    unique: u64,
    layers: Vec<Layers>,
    memory: Vec<Memory>,
    config: &'a Config,
}

/// Layers of one media type.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Layers {
    media_type: String,
    count: usize,
    size: u64,
}

pub(super) fn inspect(context: &Context, given: &str, json: bool) -> Result<(), CliError> {
    let reference = context.reference(given)?;
    let store = context.open_to_read()?;
    let failed =
        |source| CliError::Snapshot { action: "inspect", snapshot: reference.to_string(), source: Box::new(source) };
    // Only the list knows of sharing and use. Read the list first: opening the snapshot is a use,
    // too.
    let listed = store.list().map_err(|source| CliError::List { source })?;
    let snapshot = store.open_snapshot(&reference).map_err(failed)?;
    let listed = listed.iter().find(|listed| listed.digest == snapshot.digest());
    let (manifest, config) = (snapshot.manifest(), snapshot.config());
    let layers = layers(manifest);
    let memory = memory(&snapshot).map_err(|what| CliError::Segments { snapshot: reference.to_string(), what })?;
    if json {
        return print_json(&Inspected {
            names: snapshot.names(),
            digest: snapshot.digest().to_string(),
            last_used: seconds(listed.and_then(|listed| listed.last_used)),
            in_use: listed.is_some_and(|listed| listed.in_use),
            size: manifest.size(),
            unique: listed.map_or(0, |listed| listed.unique),
            layers,
            memory,
            config,
        });
    }
    let mut text = about(snapshot.names(), manifest, config, listed);
    text += &of_gpus(config);
    text += &of_processes(config, &memory);
    text += &of_layers(&layers);
    text += &of_phases(config);
    print(text.as_bytes())
}

fn layers(manifest: &Manifest) -> Vec<Layers> {
    let mut sums: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for layer in manifest.layers() {
        let sum = sums.entry(&layer.media_type).or_default();
        sum.0 += 1;
        sum.1 += layer.size;
    }
    let layers = sums.into_iter();
    layers.map(|(media_type, (count, size))| Layers { media_type: media_type.to_owned(), count, size }).collect()
}

fn about(names: &[Name], manifest: &Manifest, config: &Config, listed: Option<&Listed>) -> String {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let created = age(UNIX_EPOCH + Duration::from_secs(config.created));
    let unique = listed.map_or(0, |listed| listed.unique);
    let in_use = listed.is_some_and(|listed| listed.in_use);
    let last_used = if in_use { "now".to_owned() } else { ago(listed.and_then(|listed| listed.last_used)) };
    let sizes = &config.sizes;
    let mut rows = vec![
        ["Names:", &*if names.is_empty() { "-".to_owned() } else { names.join(", ") }].map(str::to_owned),
        ["Digest:".to_owned(), manifest.digest().to_string()],
        ["Created:".to_owned(), created],
        ["Last used:".to_owned(), last_used],
        ["Container:".to_owned(), clean(&config.container)],
    ];
    rows.extend(config.image.iter().map(|image| ["Image:".to_owned(), clean(image)]));
    let host = &config.host;
    let machine = format!("{}, kernel {}, CRIU {}", host.architecture, host.kernel, host.criu);
    rows.push(["Made by:".to_owned(), clean(&format!("{} on {machine}", config.runtime))]);
    let prepared = Some(config.prepared.join(", ")).filter(|prepared| !prepared.is_empty());
    rows.push(["Prepared by:".to_owned(), clean(prepared.as_deref().unwrap_or("nothing"))]);
    rows.extend(host.driver.iter().map(|driver| ["GPU driver:".to_owned(), clean(driver)]));
    rows.push(["Size:".to_owned(), format!("{}, {} unique", bytes(manifest.size()), bytes(unique))]);
    let memory = format!("{} of GPUs, {} of the host", bytes(sizes.gpu_memory), bytes(sizes.host_memory));
    rows.push(["Memory:".to_owned(), memory]);
    let left_out = format!("{} zero, {} equal to other memory", bytes(sizes.zero), bytes(sizes.shared));
    rows.push(["Left out:".to_owned(), left_out]);
    let resident = Some(sizes.resident).filter(|resident| *resident > 0);
    rows.extend(resident.map(|resident| ["Container had:".to_owned(), format!("{} in memory", bytes(resident))]));
    table(&rows, 2)
}

fn of_gpus(config: &Config) -> String {
    if config.gpus.is_empty() {
        return String::new();
    }
    let mut rows = vec![["GPU", "PRODUCT", "NODE", "MEMORY"].map(str::to_owned)];
    rows.extend(
        config
            .gpus
            .iter()
            .map(|gpu| [clean(&gpu.uuid), clean(&gpu.name), format!("/dev/nvidia{}", gpu.minor), bytes(gpu.memory)]),
    );
    format!("\n{}", table(&rows, 3))
}

/// Memory of a process in the segment table, in bytes.
#[derive(Clone, Copy, Default, Serialize)]
struct Memory {
    /// Pid in the process's own pid namespace.
    pid: i32,
    /// Memory in packs, or zero; the rest is in CRIU's images.
    memory: u64,
    zero: u64,
}

fn memory(snapshot: &Snapshot) -> Result<Vec<Memory>, String> {
    let Some(layer) = snapshot.layers_of(SEGMENTS_TYPE).next() else { return Ok(Vec::new()) };
    let file = snapshot.open(layer).map_err(|error| chain(&error))?;
    let table = segments(layer, &file)?;
    let processes = table.processes().iter().map(|process| {
        let sum = |zero: bool| {
            let kind = process.segments.iter().filter(|segment| !zero || segment.place == Place::Zero);
            kind.map(|segment| segment.length).sum()
        };
        Memory { pid: process.pid.raw(), memory: sum(false), zero: sum(true) }
    });
    Ok(processes.collect())
}

fn of_processes(config: &Config, memory: &[Memory]) -> String {
    let mut rows = vec![["PID", "PROCESS", "MEMORY", "ZERO", "GPU MEMORY"].map(str::to_owned)];
    rows.extend(config.processes.iter().map(|process| {
        let memory = memory.iter().find(|memory| memory.pid == process.pid).copied().unwrap_or_default();
        let staged = if process.gpu { bytes(process.staged) } else { "-".to_owned() };
        [process.pid.to_string(), clean(&process.comm), bytes(memory.memory), bytes(memory.zero), staged]
    }));
    format!("\n{}", table(&rows, 2))
}

fn of_layers(layers: &[Layers]) -> String {
    let mut rows = vec![["LAYERS", "COUNT", "SIZE"].map(str::to_owned)];
    rows.extend(layers.iter().map(|layers| [clean(&layers.media_type), layers.count.to_string(), bytes(layers.size)]));
    format!("\n{}", table(&rows, 1))
}

/// Durations of the steps of the checkpoint, with bars in proportion.
fn of_phases(config: &Config) -> String {
    let longest = config.phases.iter().map(|step| step.seconds).fold(0.0, f64::max);
    if config.phases.is_empty() || longest <= 0.0 {
        return String::new();
    }
    let mut text = format!("\n{:<16} {:>9}\n", "STEP", "TOOK");
    for step in &config.phases {
        let bar: String =
            (1..=30).take_while(|tick| step.seconds / longest * 30.0 >= f64::from(*tick)).map(|_| '█').collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "{:<16} {:>7.3} s {bar}", clean(&step.phase), step.seconds);
    }
    text.replace(" \n", "\n")
}
