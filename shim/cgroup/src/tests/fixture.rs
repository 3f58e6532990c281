//! Files with what real kernels wrote into them, in a temporary directory.

use std::fs;
use std::path::Path;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::{cgroups, cgroups_v2};
use proc::HostPid;
use rustix::process::{Pid, Signal, WaitOptions};

use crate::v1::Directories;
use crate::{Cgroup, CgroupError, Hierarchy};

/// A kernel 6.18, v1, with the files of older ones (CFQ, hugetlb, rdma) added.
const V1: &[(&str, &str)] = &[
    ("cpu/cpu.stat", "nr_periods 12\nnr_throttled 3\nthrottled_time 41200000\nnr_bursts 0\nburst_time 0\n"),
    ("cpuacct/cpuacct.stat", "user 126260\nsystem 31501\n"),
    ("cpuacct/cpuacct.usage", "1577624658455332\n"),
    ("cpuacct/cpuacct.usage_percpu", "788812329227666 788812329227666 \n"),
    ("freezer/cgroup.procs", "17\n3\n"),
    ("freezer/freezer.state", "THAWED\n"),
    ("freezer/freezer.self_freezing", "0\n"),
    ("freezer/inner/cgroup.procs", "0\n18\n"),
    ("freezer/inner/deeper/cgroup.procs", "19\n"),
    (
        "memory/memory.stat",
        "cache 11657216\nrss 9588736\nrss_huge 2097152\nshmem 9068544\nmapped_file 7618560\ndirty 192512\nwriteback 4096\n\
         workingset_refault_anon 0\nworkingset_refault_file 2542\nswap 0\nswapcached 0\npgpgin 40436\npgpgout 35249\n\
         pgfault 43335\npgmajfault 7\ninactive_anon 11\nactive_anon 1531904\ninactive_file 77824\nactive_file 2510848\n\
         unevictable 17125376\nhierarchical_memory_limit 268435456\nhierarchical_memsw_limit 9223372036854771712\n\
         total_cache 5758701568\ntotal_rss 658653184\ntotal_rss_huge 4194304\ntotal_shmem 15486976\n\
         total_mapped_file 161460224\ntotal_dirty 435265536\ntotal_writeback 8192\ntotal_workingset_refault_anon 0\n\
         total_workingset_refault_file 792359\ntotal_swap 0\ntotal_swapcached 0\ntotal_pgpgin 54087565\n\
         total_pgpgout 53222252\ntotal_pgfault 61518116\ntotal_pgmajfault 5166\ntotal_inactive_anon 654155776\n\
         total_active_anon 2736128\ntotal_inactive_file 3323756544\ntotal_active_file 2419478528\n\
         total_unevictable 17125377\n",
    ),
    ("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n"),
    ("memory/inner/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
    ("memory/memory.usage_in_bytes", "25165824\n"),
    ("memory/memory.max_usage_in_bytes", "33554432\n"),
    ("memory/memory.failcnt", "5\n"),
    ("memory/memory.limit_in_bytes", "268435456\n"),
    ("memory/memory.memsw.usage_in_bytes", "25165825\n"),
    ("memory/memory.memsw.max_usage_in_bytes", "33554433\n"),
    ("memory/memory.memsw.failcnt", "6\n"),
    ("memory/memory.memsw.limit_in_bytes", "9223372036854771712\n"),
    ("memory/memory.kmem.usage_in_bytes", "1\n"),
    ("memory/memory.kmem.max_usage_in_bytes", "2\n"),
    ("memory/memory.kmem.failcnt", "3\n"),
    ("memory/memory.kmem.limit_in_bytes", "4\n"),
    ("memory/memory.kmem.tcp.usage_in_bytes", "5\n"),
    ("memory/memory.kmem.tcp.max_usage_in_bytes", "6\n"),
    ("memory/memory.kmem.tcp.failcnt", "7\n"),
    ("memory/memory.kmem.tcp.limit_in_bytes", "8\n"),
    ("pids/pids.current", "4\n"),
    ("pids/pids.max", "max\n"),
    (
        "blkio/blkio.throttle.io_service_bytes",
        "254:0 Read 4096\n254:0 Write 8192\n254:0 Sync 12288\n254:0 Async 0\n254:0 Discard 0\n254:0 Total 12288\nTotal 12288\n",
    ),
    ("blkio/blkio.throttle.io_serviced", "254:0 Read 1\n254:0 Total 1\nTotal 1\n"),
    ("rdma/rdma.current", "mlx4_0 hca_handle=1 hca_object=20\nocrdma1 hca_handle=1 hca_object=23\n"),
    ("rdma/rdma.max", "mlx4_0 hca_handle=2 hca_object=2000\nocrdma1 hca_handle=3 hca_object=max\n"),
    ("hugetlb/hugetlb.2MB.usage_in_bytes", "4194304\n"),
    ("hugetlb/hugetlb.2MB.max_usage_in_bytes", "6291456\n"),
    ("hugetlb/hugetlb.2MB.failcnt", "1\n"),
    ("hugetlb/hugetlb.2MB.rsvd.usage_in_bytes", "9\n"),
    ("hugetlb/hugetlb.1GB.usage_in_bytes", "0\n"),
    ("hugetlb/hugetlb.1GB.max_usage_in_bytes", "0\n"),
    ("hugetlb/hugetlb.1GB.failcnt", "0\n"),
];

/// A kernel 6.8, v2.
const V2: &[(&str, &str)] = &[
    ("cgroup.procs", "17\n"),
    ("inner/cgroup.procs", "18\n"),
    ("cgroup.freeze", "0\n"),
    ("cgroup.events", "populated 1\nfrozen 0\n"),
    ("pids.current", "4\n"),
    ("pids.max", "max\n"),
    (
        "cpu.stat",
        "usage_usec 1577624\nuser_usec 1262600\nsystem_usec 315024\ncore_sched.force_idle_usec 0\nnr_periods 12\n\
         nr_throttled 3\nthrottled_usec 41200\nnr_bursts 2\nburst_usec 77\n",
    ),
    (
        "cpu.pressure",
        "some avg10=1.50 avg60=0.25 avg300=0.05 total=123456\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
    ),
    (
        "memory.stat",
        "anon 658653184\nfile 5758701568\nkernel 1000000\nkernel_stack 163840\npagetables 400000\nsec_pagetables 0\n\
         percpu 720\nsock 4096\nvmalloc 0\nshmem 15486976\nzswap 0\nzswapped 0\nfile_mapped 161460224\n\
         file_dirty 435265536\nfile_writeback 8192\nswapcached 0\nanon_thp 4194304\nfile_thp 0\nshmem_thp 0\n\
         inactive_anon 654155776\nactive_anon 2736128\ninactive_file 3323756544\nactive_file 2419478528\n\
         unevictable 17125376\nslab_reclaimable 300000\nslab_unreclaimable 200000\nslab 500000\n\
         workingset_refault_anon 1\nworkingset_refault_file 792359\nworkingset_activate_anon 0\n\
         workingset_activate_file 88\nworkingset_restore_anon 0\nworkingset_restore_file 0\nworkingset_nodereclaim 9\n\
         pgscan 10\npgsteal 11\npgscan_kswapd 0\npgscan_direct 10\npgfault 61518116\npgmajfault 5166\npgrefill 12\n\
         pgactivate 13\npgdeactivate 14\npglazyfree 15\npglazyfreed 16\nthp_fault_alloc 17\nthp_collapse_alloc 18\n",
    ),
    ("memory.current", "6500000000\n"),
    ("memory.max", "max\n"),
    ("memory.peak", "7000000000\n"),
    ("memory.swap.current", "0\n"),
    ("memory.swap.max", "1048576\n"),
    ("memory.swap.peak", "4096\n"),
    ("memory.events", "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n"),
    (
        "memory.pressure",
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=2\n",
    ),
    (
        "io.stat",
        "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=2 rios=3 wios=4\n7:0 \n",
    ),
    ("rdma.current", "mlx4_0 hca_handle=1 hca_object=20\n"),
    ("rdma.max", "mlx4_0 hca_handle=2 hca_object=max\n"),
    ("hugetlb.2MB.current", "4194304\n"),
    ("hugetlb.2MB.max", "max\n"),
    ("hugetlb.2MB.events", "max 7\n"),
    ("hugetlb.2MB.rsvd.current", "1\n"),
];

fn write(directory: &Path, files: &[(&str, &str)]) {
    for (name, content) in files {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

fn v1(directory: &Path) -> Cgroup {
    let controllers = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .collect();
    Cgroup { hierarchy: Hierarchy::V1(Directories::new(controllers)) }
}

fn v2(directory: &Path) -> Cgroup {
    Cgroup { hierarchy: Hierarchy::V2(directory.to_owned()) }
}

fn fixture(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), files);
    directory
}

fn v1_metrics(cgroup: &Cgroup) -> cgroups::metrics::Metrics {
    let any = cgroup.metrics().unwrap();
    assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
    cgroups::metrics::Metrics::parse_from_bytes(&any.value).unwrap()
}

fn v2_metrics(cgroup: &Cgroup) -> cgroups_v2::metrics::Metrics {
    let any = cgroup.metrics().unwrap();
    assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
    cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).unwrap()
}

#[test]
fn a_process_below_a_frozen_cgroup_stands_still() {
    let root = tempfile::tempdir().unwrap();
    let below = root.path().join("below");
    fs::create_dir(&below).unwrap();
    for (folder, frozen) in [(root.path(), "0\n"), (below.as_path(), "0\n")] {
        fs::write(folder.join("cgroup.procs"), "").unwrap();
        fs::write(folder.join("cgroup.freeze"), frozen).unwrap();
    }
    let cgroup = Cgroup { hierarchy: Hierarchy::V2(below) };
    assert!(!cgroup.stands_still().unwrap());
    fs::write(root.path().join("cgroup.freeze"), "1\n").unwrap();
    assert!(cgroup.stands_still().unwrap());
    assert!(!cgroup.is_frozen().unwrap(), "its own freezer is open");
}

#[test]
fn v1_processor_time_is_in_nanoseconds() {
    let directory = fixture(V1);
    let cpu = v1_metrics(&v1(directory.path())).cpu;
    assert_eq!(cpu.usage.total, 1_577_624_658_455_332);
    assert_eq!(cpu.usage.user, 1_262_600_000_000);
    assert_eq!(cpu.usage.kernel, 315_010_000_000);
    assert_eq!(cpu.usage.per_cpu, [788_812_329_227_666, 788_812_329_227_666]);
    assert_eq!(cpu.throttling.periods, 12);
    assert_eq!(cpu.throttling.throttled_periods, 3);
    assert_eq!(cpu.throttling.throttled_time, 41_200_000);
}

#[test]
fn v1_memory_has_every_field() {
    let directory = fixture(V1);
    let metrics = v1_metrics(&v1(directory.path()));
    let memory = &metrics.memory;
    let own = [
        memory.cache,
        memory.rss,
        memory.rss_huge,
        memory.mapped_file,
        memory.dirty,
        memory.writeback,
        memory.pg_pg_in,
        memory.pg_pg_out,
        memory.pg_fault,
        memory.pg_maj_fault,
        memory.inactive_anon,
        memory.active_anon,
        memory.inactive_file,
        memory.active_file,
        memory.unevictable,
        memory.hierarchical_memory_limit,
        memory.hierarchical_swap_limit,
    ];
    assert_eq!(
        own,
        [
            11_657_216,
            9_588_736,
            2_097_152,
            7_618_560,
            192_512,
            4096,
            40436,
            35249,
            43335,
            7,
            11,
            1_531_904,
            77824,
            2_510_848,
            17_125_376,
            268_435_456,
            9_223_372_036_854_771_712
        ]
    );
    let total = [
        memory.total_cache,
        memory.total_rss,
        memory.total_rss_huge,
        memory.total_mapped_file,
        memory.total_dirty,
        memory.total_writeback,
        memory.total_pg_pg_in,
        memory.total_pg_pg_out,
        memory.total_pg_fault,
        memory.total_pg_maj_fault,
        memory.total_inactive_anon,
        memory.total_active_anon,
        memory.total_inactive_file,
        memory.total_active_file,
        memory.total_unevictable,
    ];
    assert_eq!(
        total,
        [
            5_758_701_568,
            658_653_184,
            4_194_304,
            161_460_224,
            435_265_536,
            8192,
            54_087_565,
            53_222_252,
            61_518_116,
            5166,
            654_155_776,
            2_736_128,
            3_323_756_544,
            2_419_478_528,
            17_125_377
        ]
    );
    let entry = |entry: &cgroups::metrics::MemoryEntry| (entry.usage, entry.max, entry.failcnt, entry.limit);
    assert_eq!(entry(&memory.usage), (25_165_824, 33_554_432, 5, 268_435_456));
    assert_eq!(entry(&memory.swap), (25_165_825, 33_554_433, 6, 9_223_372_036_854_771_712));
    assert_eq!(entry(&memory.kernel), (1, 2, 3, 4));
    assert_eq!(entry(&memory.kernel_tcp), (5, 6, 7, 8));
    let oom = &metrics.memory_oom_control;
    assert_eq!((oom.oom_kill_disable, oom.under_oom, oom.oom_kill), (0, 1, 2));
}

#[test]
fn v1_without_a_limit_of_processes_reports_0() {
    let directory = fixture(V1);
    let pids = v1_metrics(&v1(directory.path())).pids;
    assert_eq!((pids.current, pids.limit), (4, 0));
    fs::write(directory.path().join("pids/pids.max"), "100\n").unwrap();
    assert_eq!(v1_metrics(&v1(directory.path())).pids.limit, 100);
}

#[test]
fn v1_disk_traffic_comes_from_the_throttle_when_there_is_no_cfq() {
    let directory = fixture(V1);
    let blkio = v1_metrics(&v1(directory.path())).blkio;
    let bytes: Vec<_> = blkio
        .io_service_bytes_recursive
        .iter()
        .map(|entry| (entry.major, entry.minor, entry.op.as_str(), entry.value))
        .collect();
    assert_eq!(
        bytes,
        [
            (254, 0, "Read", 4096),
            (254, 0, "Write", 8192),
            (254, 0, "Sync", 12288),
            (254, 0, "Async", 0),
            (254, 0, "Discard", 0),
            (254, 0, "Total", 12288)
        ]
    );
    assert_eq!(blkio.io_serviced_recursive.len(), 2);

    write(directory.path(), &[("blkio/blkio.time_recursive", "8:0 42\n")]);
    let blkio = v1_metrics(&v1(directory.path())).blkio;
    assert_eq!(blkio.io_time_recursive.len(), 1);
    assert_eq!((blkio.io_time_recursive[0].op.as_str(), blkio.io_time_recursive[0].value), ("", 42));
    assert!(blkio.io_serviced_recursive.is_empty(), "with CFQ the throttle's numbers are not mixed in");
}

#[test]
fn v1_rdma_and_huge_pages_are_reported() {
    let directory = fixture(V1);
    let metrics = v1_metrics(&v1(directory.path()));
    let rdma = |entries: &[cgroups::metrics::RdmaEntry]| -> Vec<_> {
        entries.iter().map(|entry| (entry.device.clone(), entry.hca_handles, entry.hca_objects)).collect()
    };
    assert_eq!(rdma(&metrics.rdma.current), [("mlx4_0".to_owned(), 1, 20), ("ocrdma1".to_owned(), 1, 23)]);
    assert_eq!(rdma(&metrics.rdma.limit), [("mlx4_0".to_owned(), 2, 2000), ("ocrdma1".to_owned(), 3, u32::MAX)]);
    let huge: Vec<_> =
        metrics.hugetlb.iter().map(|stat| (stat.pagesize.as_str(), stat.usage, stat.max, stat.failcnt)).collect();
    assert_eq!(huge, [("1GB", 0, 0, 0), ("2MB", 4_194_304, 6_291_456, 1)]);
}

#[test]
fn v1_controllers_that_are_missing_are_left_out() {
    let directory = fixture(&[("freezer/cgroup.procs", "")]);
    let metrics = v1_metrics(&v1(directory.path()));
    assert!(metrics.cpu.is_some(), "clients expect this one always");
    assert!(metrics.memory.is_none() && metrics.pids.is_none() && metrics.blkio.is_none() && metrics.rdma.is_none());
    assert!(metrics.memory_oom_control.is_none() && metrics.hugetlb.is_empty());
}

#[test]
fn v2_metrics_have_every_field() {
    let directory = fixture(V2);
    let metrics = v2_metrics(&v2(directory.path()));
    assert_eq!((metrics.pids.current, metrics.pids.limit), (4, u64::MAX));

    let cpu = &metrics.cpu;
    assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (1_577_624, 1_262_600, 315_024));
    assert_eq!((cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec), (12, 3, 41200));
    assert_eq!((cpu.nr_bursts, cpu.burst_usec), (2, 77));
    assert!((cpu.psi.some.avg10 - 1.5).abs() < 1e-9 && (cpu.psi.some.avg60 - 0.25).abs() < 1e-9);
    assert_eq!((cpu.psi.some.total, cpu.psi.full.total), (123_456, 7));

    let memory = &metrics.memory;
    assert_eq!((memory.anon, memory.file, memory.kernel_stack), (658_653_184, 5_758_701_568, 163_840));
    assert_eq!((memory.slab, memory.sock, memory.shmem), (500_000, 4096, 15_486_976));
    assert_eq!((memory.file_mapped, memory.file_dirty, memory.file_writeback), (161_460_224, 435_265_536, 8192));
    assert_eq!((memory.anon_thp, memory.inactive_anon, memory.active_anon), (4_194_304, 654_155_776, 2_736_128));
    assert_eq!((memory.inactive_file, memory.active_file), (3_323_756_544, 2_419_478_528));
    assert_eq!(
        (memory.unevictable, memory.slab_reclaimable, memory.slab_unreclaimable),
        (17_125_376, 300_000, 200_000)
    );
    assert_eq!((memory.pgfault, memory.pgmajfault, memory.workingset_nodereclaim), (61_518_116, 5166, 9));
    assert_eq!((memory.pgscan, memory.pgsteal, memory.pgrefill), (10, 11, 12));
    assert_eq!((memory.pgactivate, memory.pgdeactivate, memory.pglazyfree, memory.pglazyfreed), (13, 14, 15, 16));
    assert_eq!((memory.thp_fault_alloc, memory.thp_collapse_alloc), (17, 18));
    assert_eq!((memory.usage, memory.usage_limit, memory.max_usage), (6_500_000_000, u64::MAX, 7_000_000_000));
    assert_eq!((memory.swap_usage, memory.swap_limit, memory.swap_max_usage), (0, 1_048_576, 4096));
    assert_eq!(memory.psi.full.total, 2);

    let events = &metrics.memory_events;
    assert_eq!(
        (events.low, events.high, events.max, events.oom, events.oom_kill, events.oom_group_kill),
        (1, 2, 3, 4, 5, 6)
    );

    let io: Vec<_> = metrics
        .io
        .usage
        .iter()
        .map(|entry| (entry.major, entry.minor, entry.rbytes, entry.wbytes, entry.rios, entry.wios))
        .collect();
    assert_eq!(io, [(254, 0, 4096, 8192, 1, 2), (8, 16, 1, 2, 3, 4), (7, 0, 0, 0, 0, 0)]);
    assert_eq!((metrics.rdma.current[0].hca_objects, metrics.rdma.limit[0].hca_objects), (20, u32::MAX));
    let huge = &metrics.hugetlb;
    assert_eq!(huge.len(), 1);
    assert_eq!(
        (huge[0].pagesize.as_str(), huge[0].current, huge[0].max, huge[0].failcnt),
        ("2MB", 4_194_304, u64::MAX, 7)
    );
}

#[test]
fn v2_counters_newer_than_our_message_are_sent_all_the_same() {
    let directory = fixture(V2);
    let memory = v2_metrics(&v2(directory.path())).memory;
    let unknown = memory.special_fields.unknown_fields();
    let varint = |number| match unknown.get(number) {
        Some(containerd_shim_protos::protobuf::UnknownValueRef::Varint(value)) => Some(value),
        _ => None,
    };
    assert_eq!([varint(39), varint(40), varint(41), varint(42)], [Some(1), Some(792_359), None, Some(88)]);
}

#[test]
fn v2_without_controllers_still_reports_what_clients_expect() {
    let directory = fixture(&[("cgroup.procs", "")]);
    let metrics = v2_metrics(&v2(directory.path()));
    assert!(metrics.cpu.is_some() && metrics.memory.is_some() && metrics.pids.is_some() && metrics.io.is_some());
    assert!(metrics.memory_events.is_none() && metrics.cpu.psi.is_none() && metrics.hugetlb.is_empty());
}

#[test]
fn a_cgroup_that_is_gone_has_no_metrics_no_processes_and_no_kills() {
    let directory = fixture(V1);
    let (first, second) = (v1(directory.path()), v2(&directory.path().join("gone")));
    drop(directory);
    for cgroup in [first, second] {
        assert!(matches!(cgroup.metrics(), Err(CgroupError::File { action: "read", .. })));
        assert_eq!(cgroup.pids().unwrap(), []);
        assert_eq!(cgroup.oom_kills(), 0);
        assert!(!cgroup.is_frozen().unwrap());
        cgroup.thaw().unwrap();
        cgroup.signal_all(Signal::TERM).unwrap();
        cgroup.signal_all(Signal::KILL).unwrap();
    }
}

#[test]
fn processes_of_cgroups_below_belong_to_it() {
    let directory = fixture(V1);
    let pids = |numbers: &[i32]| numbers.iter().map(|pid| HostPid::new(*pid).unwrap()).collect::<Vec<_>>();
    assert_eq!(v1(directory.path()).pids().unwrap(), pids(&[3, 17, 18, 19]), "0 is a process of another pid namespace");
    let directory = fixture(V2);
    assert_eq!(v2(directory.path()).pids().unwrap(), pids(&[17, 18]));
}

#[test]
fn kills_of_v1_cgroups_below_are_added_because_the_kernel_does_not() {
    let directory = fixture(V1);
    assert_eq!(v1(directory.path()).oom_kills(), 5);
    let directory = fixture(V2);
    assert_eq!(v2(directory.path()).oom_kills(), 5);
}

#[test]
fn every_process_is_signalled_by_pidfd() {
    let directory = fixture(&[("freezer/cgroup.procs", "")]);
    // The files of the fixture are ours: a process is in the cgroup when it is listed.
    let children: Vec<_> = (0..3).map(|_| std::process::Command::new("sleep").arg("600").spawn().unwrap()).collect();
    let list: String = children.iter().map(|child| format!("{}\n", child.id())).collect();
    write(directory.path(), &[("freezer/cgroup.procs", &list)]);
    v1(directory.path()).signal_all(Signal::TERM).unwrap();
    for child in children {
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let (_, status) = rustix::process::waitpid(pid, WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.terminating_signal(), Some(Signal::TERM.as_raw()));
    }
}

#[test]
fn a_process_neither_signals_nor_freezes_a_cgroup_that_it_is_in_itself() {
    let own = format!("{}\n", std::process::id());
    let directory = fixture(V1);
    write(directory.path(), &[("freezer/inner/deeper/cgroup.procs", &own)]);
    let cgroup = v1(directory.path());
    for result in [cgroup.signal_all(Signal::TERM), cgroup.signal_all(Signal::KILL), cgroup.freeze()] {
        assert!(matches!(result, Err(CgroupError::Own { .. })), "{result:?}");
    }
    let directory = fixture(V2);
    write(directory.path(), &[("inner/cgroup.procs", &own), ("cgroup.kill", "")]);
    let cgroup = v2(directory.path());
    for result in [cgroup.signal_all(Signal::TERM), cgroup.signal_all(Signal::KILL), cgroup.freeze()] {
        assert!(matches!(result, Err(CgroupError::Own { .. })), "{result:?}");
    }
    assert_eq!(fs::read_to_string(directory.path().join("cgroup.kill")).unwrap(), "");
}

#[test]
fn what_does_not_freeze_in_time_is_thawed_again() {
    // A plain file for cgroup.events never says that it is frozen.
    let directory = fixture(V2);
    let error = v2(directory.path()).freeze().unwrap_err();
    assert!(matches!(error, CgroupError::Unfinished { action: "freeze", .. }), "{error:?}");
    assert_eq!(fs::read_to_string(directory.path().join("cgroup.freeze")).unwrap(), "0\n");
}

#[test]
fn a_thread_that_waits_uninterruptibly_is_named_when_a_cgroup_does_not_freeze() {
    let directory = fixture(V2);
    let Some(parent) = crate::vfork::tests::Parent::start(directory.path()) else { return };
    let pid = parent.pid;
    while !proc::Stat::of(pid).is_ok_and(|stat| stat.state() == b'D') {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    write(directory.path(), &[("cgroup.procs", &format!("{pid}\n"))]);
    let error = v2(directory.path()).freeze().unwrap_err();
    let CgroupError::Uninterruptible { wait, .. } = &error else { panic!("{error:?}") };
    assert_eq!((wait.pid, wait.tid), (pid, pid.raw()));
    assert!(error.to_string().contains(&format!("of process {pid} waits uninterruptibly")), "{error}");
    parent.let_child_go();
    parent.ends();
}

#[tokio::test]
async fn v2_kills_are_told_and_the_end_after_them() {
    let directory = fixture(V2);
    let cgroup = v2(directory.path());
    let mut watch = cgroup.watch_oom().unwrap();
    let modify = |name: &str, content: &str| {
        // In place, as the kernel does: a new file would be another inode, unwatched.
        crate::file::write(&directory.path().join(name), content).unwrap();
    };
    modify("memory.events", "low 1\nhigh 2\nmax 3\noom 4\noom_kill 6\n");
    assert_eq!(watch.next().await, Some(()));
    assert_eq!(cgroup.oom_kills(), 6);
    modify("memory.events", "low 1\nhigh 2\nmax 3\noom 4\noom_kill 7\n");
    modify("cgroup.events", "populated 0\n");
    assert_eq!(watch.next().await, Some(()), "the kill that ended the cgroup is still told");
    assert_eq!(watch.next().await, None);
    assert_eq!(watch.next().await, None);
}

#[tokio::test]
async fn without_a_memory_controller_there_is_nothing_to_watch() {
    let directory = fixture(&[("freezer/cgroup.procs", ""), ("unified/cgroup.procs", "")]);
    for cgroup in [v1(directory.path()), v2(&directory.path().join("unified"))] {
        assert!(matches!(cgroup.watch_oom(), Err(CgroupError::NoMemoryController { .. })));
    }
}
