//! Limits of a container, by the cgroup.

use std::fs;
use std::path::{Path, PathBuf};

use cgroup::Cgroup;
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroupBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources,
    LinuxResourcesBuilder, Spec,
};
use reaper::Child;
use rustix::fs::{FileType, Mode};

use crate::bed::{Bed, sentences};
use crate::container::{Bundle, Running, soon};
use crate::spec::{Edit, shell};
use crate::world::cgroup_hierarchies;

sentences![
    a_container_is_in_its_own_cgroup_everywhere,
    a_container_has_the_limits_of_its_resources,
    update_changes_the_limits,
    update_of_one_limit_keeps_the_others,
    a_cgroup_that_is_there_already_is_used,
    a_container_of_a_pod_is_below_the_pods_cgroup,
    a_privileged_container_may_use_all_devices,
    a_container_that_wants_too_much_memory_is_killed_and_counted,
];

/// Returns a file of the container's cgroup, by its name on v1 or on v2.
fn read(bundle: &Bundle<'_>, v1: &str, v2: &str) -> String {
    let files = cgroups(bundle).into_iter().flat_map(|cgroup| [cgroup.join(v1), cgroup.join(v2)]);
    let value = files.filter_map(|path| fs::read_to_string(path).ok()).next();
    value.unwrap_or_else(|| panic!("neither {v1} nor {v2}")).trim().to_owned()
}

/// Returns the container's cgroup in each hierarchy.
fn cgroups(bundle: &Bundle<'_>) -> Vec<PathBuf> {
    let path = bundle.cgroup();
    let path = path.strip_prefix("/").unwrap();
    cgroup_hierarchies().into_iter().map(|hierarchy| hierarchy.join(path)).collect()
}

pub(crate) fn memory(bundle: &Bundle<'_>) -> String {
    read(bundle, "memory.limit_in_bytes", "memory.max")
}

pub(crate) fn pids(bundle: &Bundle<'_>) -> String {
    read(bundle, "pids.max", "pids.max")
}

pub(crate) fn limits(memory: i64, pids: i64) -> LinuxResources {
    LinuxResourcesBuilder::default()
        .memory(LinuxMemoryBuilder::default().limit(memory).build().unwrap())
        .pids(LinuxPidsBuilder::default().limit(pids).build().unwrap())
        .build()
        .unwrap()
}

/// Returns an idle container with `resources` beside the usual device rules.
fn idle(resources: LinuxResources) -> Spec {
    with_limits(shell("echo up; sleep 600"), resources)
}

/// Returns a container with `resources` beside the device rules.
pub(crate) fn with_limits(spec: Spec, mut resources: LinuxResources) -> Spec {
    spec.with_linux(|linux| {
        resources.set_devices(linux.resources().as_ref().unwrap().devices().clone());
        linux.set_resources(Some(resources));
    })
}

/// Checks that a process is in the container's cgroup, in every hierarchy. Not every runtime cares
/// about the named and the unified hierarchy of a machine with v1 controllers.
pub(crate) fn assert_in_its_cgroup(bundle: &Bundle<'_>, child: &Child) {
    let outside = fs::read_to_string(format!("/proc/{}/cgroup", child.pid())).unwrap();
    for line in outside.lines().filter(has_controllers) {
        assert_eq!(Path::new(line.splitn(3, ':').nth(2).unwrap()), bundle.cgroup(), "{line}");
    }
}

fn has_controllers(line: &&str) -> bool {
    !line.contains("name=") && !line.starts_with("0::")
}

async fn a_container_is_in_its_own_cgroup_everywhere(bed: &Bed) {
    let bundle = bed.bundle(&shell("cat /proc/self/cgroup; echo up; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    let inside = running.pipes.stdout.so_far();
    // A cgroup namespace makes its own cgroup the root.
    for line in inside.lines().filter(|line| line.contains(':')).filter(has_controllers) {
        assert!(line.ends_with(":/"), "{line}");
    }
    assert_in_its_cgroup(&bundle, &running.child);
    bundle.kill(running).await;
}

async fn a_container_has_the_limits_of_its_resources(bed: &Bed) {
    let mut resources = limits(64 << 20, 50);
    let cpu =
        LinuxCpuBuilder::default().shares(512_u64).quota(30_000_i64).period(100_000_u64).cpus("0").build().unwrap();
    resources.set_cpu(Some(cpu));
    let bundle = bed.bundle(&idle(resources));
    let running = bundle.start().await;
    running.says("up").await;
    assert_eq!((memory(&bundle).as_str(), pids(&bundle).as_str()), ("67108864", "50"));
    // The weight of 512 shares on v2 depends on the runtime's age.
    let weight = read(&bundle, "cpu.shares", "cpu.weight");
    assert!(weight == "512" || (10..100).contains(&weight.parse::<u32>().unwrap()), "{weight}");
    let quota = read(&bundle, "cpu.cfs_quota_us", "cpu.max");
    assert!(["30000", "30000 100000"].contains(&quota.as_str()), "{quota}");
    assert_eq!(read(&bundle, "cpuset.cpus", "cpuset.cpus"), "0");
    bundle.kill(running).await;
}

async fn update_changes_the_limits(bed: &Bed) {
    let bundle = bed.bundle(&idle(limits(64 << 20, 50)));
    let running = bundle.start().await;
    running.says("up").await;
    for (new, expected) in [(limits(32 << 20, 60), ("33554432", "60")), (limits(128 << 20, 40), ("134217728", "40"))] {
        bed.runtime.update(&bundle.id, &new).await.unwrap();
        assert_eq!((memory(&bundle).as_str(), pids(&bundle).as_str()), expected);
    }
    // As sent by containerd's clients: memory and swap together.
    let both = LinuxMemoryBuilder::default().limit(256 << 20).swap(256 << 20).build().unwrap();
    bed.runtime.update(&bundle.id, &LinuxResourcesBuilder::default().memory(both).build().unwrap()).await.unwrap();
    assert_eq!(memory(&bundle), "268435456");
    bundle.kill(running).await;
}

async fn update_of_one_limit_keeps_the_others(bed: &Bed) {
    let mut resources = limits(64 << 20, 50);
    resources.set_cpu(Some(LinuxCpuBuilder::default().quota(30_000_i64).period(100_000_u64).build().unwrap()));
    let bundle = bed.bundle(&idle(resources));
    let running = bundle.start().await;
    running.says("up").await;
    let quota = read(&bundle, "cpu.cfs_quota_us", "cpu.max");
    let shares = LinuxCpuBuilder::default().shares(2048_u64).build().unwrap();
    bed.runtime.update(&bundle.id, &LinuxResourcesBuilder::default().cpu(shares).build().unwrap()).await.unwrap();
    assert_eq!((memory(&bundle).as_str(), pids(&bundle).as_str()), ("67108864", "50"));
    assert_eq!(read(&bundle, "cpu.cfs_quota_us", "cpu.max"), quota);
    // Devices too: an update has no rules for them.
    assert_eq!(bundle.ask("echo >/dev/null && echo ok").await, "ok\n");
    bundle.kill(running).await;
}

async fn a_cgroup_that_is_there_already_is_used(bed: &Bed) {
    let bundle = bed.bundle(&idle(limits(64 << 20, 50)));
    let cgroups = cgroups(&bundle);
    cgroups.iter().for_each(|cgroup| fs::create_dir_all(cgroup).unwrap());
    let running = bundle.start().await;
    running.says("up").await;
    assert_eq!(memory(&bundle), "67108864");
    bundle.kill(running).await;
    // Controllers unused by the runtime still have our cgroup.
    for cgroup in cgroups {
        let _ = fs::remove_dir(cgroup);
    }
}

async fn a_container_of_a_pod_is_below_the_pods_cgroup(bed: &Bed) {
    let first = bed.bundle(&idle(LinuxResources::default()));
    let running = first.start().await;
    running.says("up").await;
    let second = bed.bundle(&idle(limits(64 << 20, 50)));
    let other = second.start().await;
    other.says("up").await;
    let of = |child: &Child| Cgroup::of_process(child.process()).unwrap().pids().unwrap();
    assert_eq!(of(&running.child), [running.child.process()]);
    assert_eq!(of(&other.child), [other.child.process()]);
    second.kill(other).await;
    assert_eq!(of(&running.child), [running.child.process()], "the pod's other container is untouched");
    first.kill(running).await;
}

async fn a_privileged_container_may_use_all_devices(bed: &Bed) {
    let everything = LinuxDeviceCgroupBuilder::default().allow(true).access("rwm").build().unwrap();
    let spec = shell("head -c 1 /mnt/zero | tr '\\0' 0; mknod /tmp/port c 1 4 && test -c /tmp/port && echo made")
        .with_linux(|linux| {
            linux.resources_mut().as_mut().unwrap().set_devices(Some(vec![everything]));
            linux.set_masked_paths(None);
            linux.set_readonly_paths(None);
            linux.set_seccomp(None);
        });
    let bundle = bed.bundle(&spec);
    let place = bundle.rootfs().join("mnt/zero");
    let device = rustix::fs::makedev(1, 5);
    rustix::fs::mknodat(rustix::fs::CWD, place, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device).unwrap();
    let ended = bundle.start().await.end().await;
    assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("0made\n", ""));
    bundle.delete().await;
}

async fn a_container_that_wants_too_much_memory_is_killed_and_counted(bed: &Bed) {
    let spec = shell("read go; tail /dev/zero").with_linux(|linux| {
        let memory = LinuxMemoryBuilder::default().limit(32 << 20).swap(32 << 20).build().unwrap();
        linux.resources_mut().as_mut().unwrap().set_memory(Some(memory));
    });
    let bundle = bed.bundle(&spec);
    let running = bundle.start().await;
    want_is_told(&bundle, running).await;
}

/// Lets a waiting container run out of memory, and checks for the report.
pub(crate) async fn want_is_told(bundle: &Bundle<'_>, running: Running) {
    let cgroup = Cgroup::of_process(running.child.process()).unwrap();
    let mut watch = match cgroup.watch_oom() {
        Ok(watch) => watch,
        Err(error) => {
            bundle.bed.not_tried(&format!("no word of a lack of memory: {error}"));
            return bundle.kill(running).await;
        }
    };
    running.tell("go");
    // Version 2 also tells of each time that the limit was reached, before the kill.
    soon("the kill is told", async {
        while cgroup.oom_kills() == 0 {
            let events = || read(bundle, "memory.oom_control", "memory.events");
            assert!(watch.next().await.is_some(), "the watch has ended, and no kill is counted: {}", events());
        }
    })
    .await;
    assert_eq!(cgroup.oom_kills(), 1);
    assert_eq!(running.end().await.code, 137);
    bundle.delete().await;
    soon("the watch ends", async { while watch.next().await.is_some() {} }).await;
}
