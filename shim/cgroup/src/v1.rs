//! Version 1: a directory for each controller.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat, Metrics,
    PidsStat, RdmaEntry, RdmaStat, Throttle,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};

use crate::{CgroupError, file, pack, process};

const METRICS: &str = "io.containerd.cgroups.v1.Metrics";

/// Nanoseconds of one USER_HZ tick, in which cpuacct.stat counts. USER_HZ is part of the kernel's ABI: 100 a second,
/// whatever the kernel's own HZ.
const NANOSECONDS_PER_TICK: u64 = 1_000_000_000 / 100;

/// The hierarchies that may decide who is in the container, best first.
const OF_PROCESSES: [&str; 4] = ["freezer", "devices", "pids", "name=systemd"];

/// Where each controller's files of one container are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Directories {
    by_controller: HashMap<String, PathBuf>,
    of_processes: PathBuf,
}

impl Directories {
    /// `controllers` is not empty.
    pub(crate) fn new(controllers: Vec<(String, PathBuf)>) -> Self {
        let any = controllers.first().map(|(_, directory)| directory.clone());
        let by_controller: HashMap<_, _> = controllers.into_iter().collect();
        let of_processes = OF_PROCESSES.iter().find_map(|name| by_controller.get(*name)).cloned().or(any);
        Self { by_controller, of_processes: of_processes.unwrap_or_default() }
    }

    pub(crate) fn get(&self, controller: &str) -> Option<&Path> {
        self.by_controller.get(controller).map(PathBuf::as_path)
    }

    /// Each directory once.
    pub(crate) fn all(&self) -> Vec<PathBuf> {
        let all: BTreeSet<&PathBuf> = self.by_controller.values().collect();
        all.into_iter().cloned().collect()
    }

    pub(crate) fn of_processes(&self) -> &Path {
        &self.of_processes
    }

    /// The kernel counts a kill where the victim was, not above it: those of cgroups that the container made below its
    /// own are added up here.
    pub(crate) fn oom_kills(&self) -> u64 {
        let Some(memory) = self.get("memory") else { return 0 };
        let cgroups = process::subtree(memory).unwrap_or_default();
        cgroups
            .iter()
            .filter_map(|cgroup| file::pairs(&cgroup.join("memory.oom_control")).ok())
            .fold(0, |kills, control| kills.saturating_add(control.get("oom_kill")))
    }

    pub(crate) fn metrics(&self) -> Result<Any, CgroupError> {
        if !self.by_controller.values().any(|directory| directory.is_dir()) {
            return Err(CgroupError::File {
                action: "read",
                path: self.of_processes.clone(),
                source: io::ErrorKind::NotFound.into(),
            });
        }
        let metrics = Metrics {
            cpu: MessageField::some(self.cpu()?),
            memory: field(self.get("memory"), memory)?,
            memory_oom_control: field(self.get("memory"), oom_control)?,
            pids: field(self.get("pids"), pids)?,
            blkio: field(self.get("blkio"), blkio)?,
            rdma: field(self.get("rdma"), rdma)?,
            hugetlb: self.get("hugetlb").map_or(Ok(vec![]), hugetlb)?,
            ..Metrics::default()
        };
        pack(&metrics, METRICS, &self.of_processes)
    }

    fn cpu(&self) -> Result<CPUStat, CgroupError> {
        let mut usage = CPUUsage::default();
        if let Some(cpuacct) = self.get("cpuacct") {
            let stat = file::pairs(&cpuacct.join("cpuacct.stat"))?;
            usage.total = file::number(&cpuacct.join("cpuacct.usage"), 0)?;
            usage.user = stat.get("user").saturating_mul(NANOSECONDS_PER_TICK);
            usage.kernel = stat.get("system").saturating_mul(NANOSECONDS_PER_TICK);
            let per_cpu = file::text(&cpuacct.join("cpuacct.usage_percpu"))?.unwrap_or_default();
            usage.per_cpu = per_cpu.split_ascii_whitespace().map(|value| file::parse(value, 0)).collect();
        }
        let mut throttling = Throttle::default();
        if let Some(cpu) = self.get("cpu") {
            let stat = file::pairs(&cpu.join("cpu.stat"))?;
            throttling.periods = stat.get("nr_periods");
            throttling.throttled_periods = stat.get("nr_throttled");
            throttling.throttled_time = stat.get("throttled_time");
        }
        Ok(CPUStat {
            usage: MessageField::some(usage),
            throttling: MessageField::some(throttling),
            ..CPUStat::default()
        })
    }
}

/// What `read` finds in a controller's directory, if there is the controller.
fn field<T>(
    directory: Option<&Path>,
    read: impl FnOnce(&Path) -> Result<Option<T>, CgroupError>,
) -> Result<MessageField<T>, CgroupError> {
    Ok(MessageField::from_option(directory.map(read).transpose()?.flatten()))
}

fn memory(directory: &Path) -> Result<Option<MemoryStat>, CgroupError> {
    let stat = file::pairs(&directory.join("memory.stat"))?;
    if !stat.is_present() {
        return Ok(None);
    }
    Ok(Some(MemoryStat {
        cache: stat.get("cache"),
        rss: stat.get("rss"),
        rss_huge: stat.get("rss_huge"),
        mapped_file: stat.get("mapped_file"),
        dirty: stat.get("dirty"),
        writeback: stat.get("writeback"),
        pg_pg_in: stat.get("pgpgin"),
        pg_pg_out: stat.get("pgpgout"),
        pg_fault: stat.get("pgfault"),
        pg_maj_fault: stat.get("pgmajfault"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        hierarchical_memory_limit: stat.get("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat.get("hierarchical_memsw_limit"),
        total_cache: stat.get("total_cache"),
        total_rss: stat.get("total_rss"),
        total_rss_huge: stat.get("total_rss_huge"),
        total_mapped_file: stat.get("total_mapped_file"),
        total_dirty: stat.get("total_dirty"),
        total_writeback: stat.get("total_writeback"),
        total_pg_pg_in: stat.get("total_pgpgin"),
        total_pg_pg_out: stat.get("total_pgpgout"),
        total_pg_fault: stat.get("total_pgfault"),
        total_pg_maj_fault: stat.get("total_pgmajfault"),
        total_inactive_anon: stat.get("total_inactive_anon"),
        total_active_anon: stat.get("total_active_anon"),
        total_inactive_file: stat.get("total_inactive_file"),
        total_active_file: stat.get("total_active_file"),
        total_unevictable: stat.get("total_unevictable"),
        usage: MessageField::some(memory_entry(directory, "memory")?),
        // The kernel's memsw counts memory and swap together.
        swap: MessageField::some(memory_entry(directory, "memory.memsw")?),
        kernel: MessageField::some(memory_entry(directory, "memory.kmem")?),
        kernel_tcp: MessageField::some(memory_entry(directory, "memory.kmem.tcp")?),
        ..MemoryStat::default()
    }))
}

fn memory_entry(directory: &Path, prefix: &str) -> Result<MemoryEntry, CgroupError> {
    let number = |name: &str| file::number(&directory.join(format!("{prefix}.{name}")), 0);
    Ok(MemoryEntry {
        limit: number("limit_in_bytes")?,
        usage: number("usage_in_bytes")?,
        max: number("max_usage_in_bytes")?,
        failcnt: number("failcnt")?,
        ..MemoryEntry::default()
    })
}

fn oom_control(directory: &Path) -> Result<Option<MemoryOomControl>, CgroupError> {
    let control = file::pairs(&directory.join("memory.oom_control"))?;
    Ok(control.is_present().then(|| MemoryOomControl {
        oom_kill_disable: control.get("oom_kill_disable"),
        under_oom: control.get("under_oom"),
        oom_kill: control.get("oom_kill"),
        ..MemoryOomControl::default()
    }))
}

fn pids(directory: &Path) -> Result<Option<PidsStat>, CgroupError> {
    Ok(Some(PidsStat {
        current: file::number(&directory.join("pids.current"), 0)?,
        // No limit is 0 in containerd's v1 metrics, not the biggest number.
        limit: file::number(&directory.join("pids.max"), 0)?,
        ..PidsStat::default()
    }))
}

fn blkio(directory: &Path) -> Result<Option<BlkIOStat>, CgroupError> {
    let names = device_names(&file::text(Path::new("/proc/partitions"))?.unwrap_or_default());
    let entries = |name: &str| -> Result<Vec<BlkIOEntry>, CgroupError> {
        let text = file::text(&directory.join(format!("blkio.{name}")))?.unwrap_or_default();
        Ok(text.lines().filter_map(|line| blkio_entry(line, &names)).collect())
    };
    let mut stat = BlkIOStat {
        sectors_recursive: entries("sectors_recursive")?,
        io_service_bytes_recursive: entries("io_service_bytes_recursive")?,
        io_serviced_recursive: entries("io_serviced_recursive")?,
        io_queued_recursive: entries("io_queued_recursive")?,
        io_service_time_recursive: entries("io_service_time_recursive")?,
        io_wait_time_recursive: entries("io_wait_time_recursive")?,
        io_merged_recursive: entries("io_merged_recursive")?,
        io_time_recursive: entries("time_recursive")?,
        ..BlkIOStat::default()
    };
    // Those were of the CFQ scheduler, which kernels before 5.0 have; others count only in the throttle's files.
    if stat == BlkIOStat::default() {
        stat.io_serviced_recursive = entries("throttle.io_serviced")?;
        stat.io_service_bytes_recursive = entries("throttle.io_service_bytes")?;
    }
    Ok(Some(stat))
}

/// `major:minor [operation] value`. The line "Total value" sums up, and is passed over.
fn blkio_entry(line: &str, names: &HashMap<(u64, u64), String>) -> Option<BlkIOEntry> {
    let fields: Vec<&str> = line.split([' ', ':']).collect();
    let (major, minor, op, value) = match fields.as_slice() {
        [major, minor, op, value] => (major, minor, *op, value),
        [major, minor, value] => (major, minor, "", value),
        _ => return None,
    };
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    Some(BlkIOEntry {
        op: op.to_owned(),
        device: names.get(&(major, minor)).cloned().unwrap_or_default(),
        major,
        minor,
        value: value.parse().ok()?,
        ..BlkIOEntry::default()
    })
}

/// Device paths by number, from /proc/partitions: two lines of heading, then `major minor blocks name`.
fn device_names(partitions: &str) -> HashMap<(u64, u64), String> {
    let mut names = HashMap::new();
    for line in partitions.lines().skip(2) {
        let mut fields = line.split_ascii_whitespace();
        let (Some(major), Some(minor), Some(name)) = (fields.next(), fields.next(), fields.nth(1)) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        names.entry((major, minor)).or_insert_with(|| format!("/dev/{name}"));
    }
    names
}

fn rdma(directory: &Path) -> Result<Option<RdmaStat>, CgroupError> {
    let entries = |name: &str| -> Result<Option<Vec<RdmaEntry>>, CgroupError> {
        let Some(text) = file::text(&directory.join(name))? else { return Ok(None) };
        Ok(Some(
            file::rdma(&text)
                .map(|(device, hca_handles, hca_objects)| RdmaEntry {
                    device,
                    hca_handles,
                    hca_objects,
                    ..RdmaEntry::default()
                })
                .collect(),
        ))
    };
    let (Some(current), Some(limit)) = (entries("rdma.current")?, entries("rdma.max")?) else { return Ok(None) };
    Ok(Some(RdmaStat { current, limit, ..RdmaStat::default() }))
}

fn hugetlb(directory: &Path) -> Result<Vec<HugetlbStat>, CgroupError> {
    file::huge_page_sizes(directory, "usage_in_bytes")?
        .into_iter()
        .map(|pagesize| {
            let number = |name: &str| file::number(&directory.join(format!("hugetlb.{pagesize}.{name}")), 0);
            Ok(HugetlbStat {
                usage: number("usage_in_bytes")?,
                max: number("max_usage_in_bytes")?,
                failcnt: number("failcnt")?,
                pagesize: pagesize.clone(),
                ..HugetlbStat::default()
            })
        })
        .collect()
}
