//! Restores of containers changed since the creation; and images with more rights than a container.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capability, LinuxDeviceBuilder, LinuxDeviceType, LinuxIdMappingBuilder, LinuxNamespaceType};
use runtime::{Allow, Privileges};

use crate::bed::{Bed, sentences};
use crate::checkpoint::{COUNTER, counter_as, counts_on};
use crate::container::{Pipes, until};
use crate::image::chain;
use crate::spec::{Edit, capabilities, namespace, process, shell};
use crate::world::{Which, cgroup_hierarchies};

sentences![
    an_init_that_has_closed_its_streams_is_restored,
    a_child_writes_to_the_streams_of_each_generation,
    processes_in_cgroups_below_are_restored_there,
    an_exec_has_the_clocks_of_a_restored_init,
    a_restore_with_more_rights_than_the_container_gives_is_refused,
    a_restore_can_be_allowed_the_rights_that_were_saved,
    a_device_that_is_listed_twice_is_made_once,
    a_container_can_have_several_ranges_of_ids,
    an_exec_under_a_frozen_cgroup_is_refused,
];

/// A pause without a program: a shell in a vfork cannot be dumped.
const PAUSE: &str = "/bin/busybox mkfifo /dev/shm/pause; exec 9<>/dev/shm/pause; pause() { read -t 0.02 line <&9; }; ";

async fn an_init_that_has_closed_its_streams_is_restored(bed: &Bed) {
    let script = format!("{PAUSE} exec 0<&- 2>&-; n=0; while :; do n=$((n+1)); echo $n; pause; done");
    let bundle = bed.bundle(&bed.savable(&shell(&script)));
    let running = bundle.start().await;
    running.says("\n5\n").await;
    let (image, _) = bundle.swap_out(running).await;
    let running = bundle.restore(&image).await;
    running.says("\n").await;
    assert!(!running.child.process().path("fd/2").exists());
    bundle.kill(running).await;
}

async fn a_child_writes_to_the_streams_of_each_generation(bed: &Bed) {
    let script = format!("{PAUSE} (while :; do echo line; pause; done) & exec >/dev/null; wait");
    let bundle = bed.bundle(&bed.savable(&shell(&script)));
    let mut running = bundle.start().await;
    // crun records init's streams after a restore, and init has closed this one.
    let generations = if bed.which == Which::Crun { 1 } else { 3 };
    for _generation in 0..generations {
        running.says("line\nline\n").await;
        let (image, ended) = bundle.swap_out(running).await;
        assert_eq!(ended.stderr, "");
        running = bundle.restore(&image).await;
    }
    running.says("line\nline\n").await;
    bundle.kill(running).await;
}

/// Moves a process in every hierarchy to a cgroup below the container's.
fn move_below(hierarchies: &[PathBuf], cgroup: &Path, name: &str, pid: i32) {
    for hierarchy in hierarchies {
        let own = hierarchy.join(cgroup.strip_prefix("/").unwrap());
        let below = own.join(name);
        if !own.is_dir() {
            continue;
        }
        fs::create_dir(&below).unwrap();
        // A new cgroup of v1 has no processors and no memory.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if below.join(file).exists() {
                fs::write(below.join(file), fs::read(own.join(file)).unwrap()).unwrap();
            }
        }
        fs::write(below.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

async fn processes_in_cgroups_below_are_restored_there(bed: &Bed) {
    if !bed.runtime.drives_criu() {
        return bed.not_tried("the runtime tells its own criu the cgroups");
    }
    for with_namespace in [true, false] {
        let kind = LinuxNamespaceType::Cgroup;
        let script = format!("{PAUSE} (while :; do pause; done) & {COUNTER}");
        let spec = shell(&script).with_namespace(kind, with_namespace.then(|| namespace(kind, None)));
        let (bundle, running) = counter_as(bed, &spec).await;
        let init = running.child.process();
        let child = proc::children(init)[0];
        let hierarchies = cgroup_hierarchies();
        move_below(&hierarchies, &bundle.cgroup(), "a", init.raw());
        move_below(&hierarchies, &bundle.cgroup(), "b", child.raw());
        // A pause freezes all processes, wherever they are.
        bed.runtime.pause(&bundle.id).await.unwrap();
        let cgroup = bed.runtime.cgroup(&bundle.id, init).unwrap();
        assert_eq!(cgroup.pids().unwrap().len(), 2);
        let (image, _) = bundle.swap_out(running).await;
        let bundle = bed.bundle(&bed.savable(&spec));
        let running = bundle.restore_frozen(&image).await;
        let init = running.child.process();
        let cgroup = bed.runtime.cgroup(&bundle.id, init).unwrap();
        assert!(cgroup.is_frozen().unwrap());
        let child = proc::children(init)[0];
        let mut both = [init, child];
        both.sort_unstable();
        assert_eq!(cgroup.pids().unwrap(), both, "all of it, and CRIU is not in it");
        for (pid, below) in [(init, "a"), (child, "b")] {
            let text = fs::read_to_string(pid.path("cgroup")).unwrap();
            let expected = format!("{}/{below}", bundle.cgroup().display());
            for line in text.lines().filter(|line| line.contains(&bundle.id)) {
                assert!(line.ends_with(&expected), "{line}");
            }
        }
        cgroup.thaw().unwrap();
        counts_on(&bundle, running, 2).await;
    }
}

async fn an_exec_has_the_clocks_of_a_restored_init(bed: &Bed) {
    let (bundle, running) = counter_as(bed, &shell(COUNTER)).await;
    let (image, _) = bundle.swap_out(running).await;
    let running = bundle.restore(&image).await;
    if bed.which == Which::Crun {
        bed.not_tried("crun is tried for its images");
    } else {
        let said = bundle.ask("readlink /proc/1/ns/time; readlink /proc/self/ns/time").await;
        let links: Vec<&str> = said.lines().collect();
        assert_eq!(links[0], links[1]);
    }
    counts_on(&bundle, running, 2).await;
}

async fn a_restore_with_more_rights_than_the_container_gives_is_refused(bed: &Bed) {
    if !bed.runtime.drives_criu() {
        return bed.not_tried("the runtime lets what it restores run at once");
    }
    let more = |capability| {
        shell(COUNTER).with_process(|process| _ = process.set_capabilities(Some(capabilities(&[capability]))))
    };
    let (bundle, running) = counter_as(bed, &more(Capability::SysAdmin)).await;
    let (image, _) = bundle.swap_out(running).await;
    let bundle = bed.bundle(&bed.savable(&shell(COUNTER)));
    let refusal = bed.restore_refusal(&bundle, &image).await;
    assert!(refusal.contains("has CAP_SYS_ADMIN in its bounding set"), "{refusal}");
    assert!(refusal.contains("gpusnap.dev/restore-privileges"), "{refusal}");
    // Also images of a container without a filter, in a container with one.
    let (bundle, running) = counter_as(bed, &shell(COUNTER).with_linux(|linux| _ = linux.set_seccomp(None))).await;
    let (image, _) = bundle.swap_out(running).await;
    let bundle = bed.bundle(&bed.savable(&shell(COUNTER)));
    let refusal = bed.restore_refusal(&bundle, &image).await;
    assert!(refusal.contains("has no seccomp filter"), "{refusal}");
    // Also images of a container in the host's network, in a container with its own.
    let network = LinuxNamespaceType::Network;
    let (bundle, running) = counter_as(bed, &shell(COUNTER).with_namespace(network, None)).await;
    let (image, _) = bundle.swap_out(running).await;
    let bundle = bed.bundle(&bed.savable(&shell(COUNTER)));
    let refusal = bed.restore_refusal(&bundle, &image).await;
    assert!(refusal.contains("is in the host's network namespace"), "{refusal}");
}

async fn a_restore_can_be_allowed_the_rights_that_were_saved(bed: &Bed) {
    if !bed.runtime.drives_criu() {
        return bed.not_tried("the runtime compares nothing");
    }
    let spec = shell(COUNTER).with_linux(|linux| _ = linux.set_seccomp(None));
    let (bundle, running) = counter_as(bed, &spec).await;
    let (image, _) = bundle.swap_out(running).await;
    let bundle = bed.bundle(&bed.savable(&shell(COUNTER)));
    let (io, pipes) = Pipes::new();
    let mut request = bundle.restore_request(&image, io, Allow::default());
    request.privileges = Privileges::Snapshot;
    let child = bed.runtime.restore(request).await.map_err(|error| chain(&error)).unwrap();
    counts_on(&bundle, crate::container::Running { child, pipes }, 2).await;
}

async fn a_device_that_is_listed_twice_is_made_once(bed: &Bed) {
    let device = |path: &str, minor: i64| {
        let device = LinuxDeviceBuilder::default().path(path).typ(LinuxDeviceType::C).major(1).minor(minor);
        device.file_mode(0o666_u32).uid(0_u32).gid(0_u32).build().unwrap()
    };
    let spec = shell("stat -c '%t %T' /dev/twice; stat -c '%t %T' /dev/null").with_linux(|linux| {
        linux.set_devices(Some(vec![device("/dev/twice", 5), device("/dev/twice", 5), device("/dev/null", 3)]));
    });
    assert_eq!(bed.say(&spec).await, "1 5\n1 3\n");
}

async fn a_container_can_have_several_ranges_of_ids(bed: &Bed) {
    let spec = shell("cat /proc/self/uid_map /proc/self/gid_map")
        .with_namespace(LinuxNamespaceType::User, Some(namespace(LinuxNamespaceType::User, None)))
        .with_linux(|linux| {
            let mapping = |inside: u32, outside: u32, size: u32| {
                LinuxIdMappingBuilder::default().container_id(inside).host_id(outside).size(size).build().unwrap()
            };
            linux.set_uid_mappings(Some(vec![mapping(0, 100_000, 10), mapping(10, 200_000, 1000)]));
            linux.set_gid_mappings(Some(vec![mapping(0, 300_000, 10), mapping(10, 400_000, 1000)]));
        });
    let said = bed.say(&spec).await;
    let words: Vec<&str> = said.split_whitespace().collect();
    assert_eq!(words, ["0", "100000", "10", "10", "200000", "1000", "0", "300000", "10", "10", "400000", "1000"]);
}

async fn an_exec_under_a_frozen_cgroup_is_refused(bed: &Bed) {
    if bed.which != Which::Libcontainer {
        return bed.not_tried("the runtime may wait for the thaw");
    }
    let bundle = bed.bundle(&shell("echo up; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    let files = [("freezer.state", "FROZEN", "THAWED"), ("cgroup.freeze", "1", "0")];
    let above = cgroup_hierarchies().into_iter().map(|hierarchy| hierarchy.join(&bed.world.cgroup));
    let (file, frozen, thawed) = above
        .flat_map(|above| files.map(|(file, frozen, thawed)| (above.join(file), frozen, thawed)))
        .find(|(file, ..)| file.exists())
        .unwrap();
    fs::write(&file, frozen).unwrap();
    let refused = bundle.exec(&process(&["true"])).await.err().map(|error| error.to_string());
    fs::write(&file, thawed).unwrap();
    let error = refused.unwrap();
    assert!(error.contains("paused"), "{error}");
    until("it is thawed", || !bed.runtime.cgroup(&bundle.id, running.child.process()).unwrap().is_frozen().unwrap())
        .await;
    assert_eq!(bundle.ask("echo again").await, "again\n");
    bundle.kill(running).await;
}
