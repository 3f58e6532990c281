//! Version 2: one directory for all controllers.

use std::io;
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat, RdmaEntry,
    RdmaStat,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;

use crate::{CgroupError, file, pack};

const METRICS: &str = "io.containerd.cgroups.v2.Metrics";

/// What `max` is in containerd's v2 metrics.
const UNLIMITED: u64 = u64::MAX;

/// Fields of MemoryStat that containerd has and our generated message, older, has not: field number, and key in
/// memory.stat. Linux 5.9 split the workingset counters into these.
const NEWER_MEMORY_FIELDS: [(u32, &str); 4] = [
    (39, "workingset_refault_anon"),
    (40, "workingset_refault_file"),
    (41, "workingset_activate_anon"),
    (42, "workingset_activate_file"),
];

/// Kills in it and in the cgroups below it: the kernel counts upwards.
pub(crate) fn oom_kills(directory: &Path) -> u64 {
    file::pairs(&directory.join("memory.events")).map_or(0, |events| events.get("oom_kill"))
}

pub(crate) fn metrics(directory: &Path) -> Result<Any, CgroupError> {
    if !directory.is_dir() {
        return Err(CgroupError::File {
            action: "read",
            path: directory.to_owned(),
            source: io::ErrorKind::NotFound.into(),
        });
    }
    let number = |name: &str| file::number(&directory.join(name), UNLIMITED);
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: number("pids.current")?,
            limit: number("pids.max")?,
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(directory)?),
        memory: MessageField::some(memory(directory)?),
        memory_events: MessageField::from_option(memory_events(directory)?),
        io: MessageField::some(IOStat {
            usage: io_usage(&file::text(&directory.join("io.stat"))?.unwrap_or_default()),
            psi: pressure(&directory.join("io.pressure"))?,
            ..IOStat::default()
        }),
        rdma: MessageField::some(RdmaStat {
            current: rdma(&directory.join("rdma.current"))?,
            limit: rdma(&directory.join("rdma.max"))?,
            ..RdmaStat::default()
        }),
        hugetlb: hugetlb(directory)?,
        ..Metrics::default()
    };
    pack(&metrics, METRICS, directory)
}

fn cpu(directory: &Path) -> Result<CPUStat, CgroupError> {
    let stat = file::pairs(&directory.join("cpu.stat"))?;
    Ok(CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: pressure(&directory.join("cpu.pressure"))?,
        ..CPUStat::default()
    })
}

fn memory(directory: &Path) -> Result<MemoryStat, CgroupError> {
    let stat = file::pairs(&directory.join("memory.stat"))?;
    if !stat.is_present() {
        return Ok(MemoryStat::default());
    }
    let number = |name: &str| file::number(&directory.join(name), UNLIMITED);
    let mut memory = MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        workingset_refault: stat.get("workingset_refault"),
        workingset_activate: stat.get("workingset_activate"),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage: number("memory.current")?,
        usage_limit: number("memory.max")?,
        max_usage: number("memory.peak")?,
        swap_usage: number("memory.swap.current")?,
        swap_limit: number("memory.swap.max")?,
        swap_max_usage: number("memory.swap.peak")?,
        psi: pressure(&directory.join("memory.pressure"))?,
        ..MemoryStat::default()
    };
    for (field, key) in NEWER_MEMORY_FIELDS {
        // As proto3 has it: 0 is not written.
        match stat.get(key) {
            0 => {}
            value => memory.special_fields.mut_unknown_fields().add_varint(field, value),
        }
    }
    Ok(memory)
}

fn memory_events(directory: &Path) -> Result<Option<MemoryEvents>, CgroupError> {
    let events = file::pairs(&directory.join("memory.events"))?;
    Ok(events.is_present().then(|| MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..MemoryEvents::default()
    }))
}

/// `major:minor key=value key=value`.
fn io_usage(stat: &str) -> Vec<IOEntry> {
    stat.lines()
        .filter_map(|line| {
            let (device, values) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let mut entry = IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IOEntry::default() };
            for (key, value) in values.split(' ').filter_map(|pair| pair.split_once('=')) {
                let value = file::parse(value, UNLIMITED);
                match key {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same with `full`.
fn pressure(path: &Path) -> Result<MessageField<PSIStats>, CgroupError> {
    let Some(text) = file::text(path)? else { return Ok(MessageField::none()) };
    let mut stats = PSIStats::default();
    for line in text.lines() {
        let Some((kind, values)) = line.split_once(' ') else { continue };
        let mut data = PSIData::default();
        for (key, value) in values.split(' ').filter_map(|pair| pair.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = file::parse(value, UNLIMITED),
                _ => {}
            }
        }
        match kind {
            "some" => stats.some = MessageField::some(data),
            "full" => stats.full = MessageField::some(data),
            _ => {}
        }
    }
    Ok(MessageField::some(stats))
}

fn rdma(path: &Path) -> Result<Vec<RdmaEntry>, CgroupError> {
    let text = file::text(path)?.unwrap_or_default();
    Ok(file::rdma(&text)
        .map(|(device, hca_handles, hca_objects)| RdmaEntry {
            device,
            hca_handles,
            hca_objects,
            ..RdmaEntry::default()
        })
        .collect())
}

fn hugetlb(directory: &Path) -> Result<Vec<HugeTlbStat>, CgroupError> {
    file::huge_page_sizes(directory, "current")?
        .into_iter()
        .map(|pagesize| {
            let path = |name: &str| directory.join(format!("hugetlb.{pagesize}.{name}"));
            Ok(HugeTlbStat {
                current: file::number(&path("current"), UNLIMITED)?,
                max: file::number(&path("max"), UNLIMITED)?,
                failcnt: file::pairs(&path("events"))?.get("max"),
                pagesize: pagesize.clone(),
                ..HugeTlbStat::default()
            })
        })
        .collect()
}
