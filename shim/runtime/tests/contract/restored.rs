//! Things given to a restored container, and things kept from it: as before, except for the new
//! specification.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cgroup::Cgroup;
use oci_spec::runtime::{
    LinuxDeviceBuilder, LinuxDeviceType, LinuxIdMappingBuilder, LinuxNamespaceType, PosixRlimitBuilder,
    PosixRlimitType, Spec, UserBuilder,
};
use proc::{HostPid, ProcessHandle};
use runtime::{Allow, OciRuntime};
use rustix::fs::{FileType, Mode};
use rustix::process::Signal;

use crate::bed::{Bed, sentences};
use crate::checkpoint::{COUNTER, counter_as, counts_on};
use crate::container::{Bundle, Running};
use crate::hooks::with_hooks;
use crate::image::Image;
use crate::spec::{Edit, mount, namespace, shell};
use crate::world::{Which, cgroup_hierarchies};

sentences![
    bind_mounts_come_from_the_new_container,
    mounts_are_restored_as_they_were,
    files_in_memory_come_back,
    masked_and_readonly_paths_hold_after_a_restore,
    a_readonly_root_stays_so_after_a_restore,
    hooks_run_at_a_restore,
    a_restored_container_of_a_pod_is_in_the_namespaces_of_the_new_pod,
    a_restored_container_can_share_the_processes_of_another,
    a_restored_process_is_who_it_was,
    a_restored_container_can_have_its_own_users,
    device_rules_hold_after_a_restore,
    a_cgroup_mount_shows_the_new_cgroup,
    loopback_is_up_after_a_restore,
    a_container_can_be_restored_frozen,
    a_restore_whose_criu_is_killed_when_the_tree_is_frozen_leaves_nothing,
];

/// Saves a counting container, and restores another one from the images.
async fn moved<'bed>(bed: &'bed Bed, old: &Spec, new: &Spec) -> (Bundle<'bed>, Running) {
    let (bundle, running) = counter_as(bed, old).await;
    let (image, _) = bundle.swap_out(running).await;
    let bundle = bed.bundle(&bed.savable(new));
    let running = bundle.restore(&image).await;
    (bundle, running)
}

async fn a_container_can_be_restored_frozen(bed: &Bed) {
    let (bundle, running) = counter_as(bed, &shell(COUNTER)).await;
    let (image, _) = bundle.swap_out(running).await;
    let bundle = bed.bundle(&bed.savable(&shell(COUNTER)));
    let running = bundle.restore_frozen(&image).await;
    let cgroup = Cgroup::of_process(running.child.process()).unwrap();
    assert!(cgroup.is_frozen().unwrap());
    assert_eq!(cgroup.pids().unwrap(), [running.child.process()], "CRIU is not in it");
    running.tell("frozen");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.pipes.stdout.so_far(), "");
    cgroup.thaw().unwrap();
    running.says("2 frozen\n").await;
    counts_on(&bundle, running, 3).await;
}

/// Kills the criu working in a folder as soon as the container's cgroup is about to freeze; gives
/// up once `over` is set.
fn kill_criu_at_the_freeze(runtime: &dyn OciRuntime, id: &str, work: &Path, over: &AtomicBool) {
    let is_ours = |pid: &HostPid| {
        proc::name(*pid).is_ok_and(|name| name == "criu") && fs::read_link(pid.path("cwd")).is_ok_and(|cwd| cwd == work)
    };
    while !over.load(Ordering::Relaxed) {
        let Some(criu) = descendants(HostPid::own()).into_iter().find(is_ours) else { continue };
        let is_freezing = runtime.cgroup(id, criu).is_ok_and(|cgroup| cgroup.stands_still().unwrap_or(false));
        if is_freezing {
            // Gone already: the next try.
            let _ = ProcessHandle::open(criu).and_then(|criu| criu.signal(Signal::KILL));
            return;
        }
    }
}

fn descendants(pid: HostPid) -> Vec<HostPid> {
    proc::children(pid).into_iter().flat_map(|child| [vec![child], descendants(child)].concat()).collect()
}

async fn a_restore_whose_criu_is_killed_when_the_tree_is_frozen_leaves_nothing(bed: &Bed) {
    if bed.which == Which::Crun {
        return bed.not_tried("crun freezes when criu has ended");
    }
    let (bundle, running) = counter_as(bed, &shell(COUNTER)).await;
    let (image, _) = bundle.swap_out(running).await;
    let bundle = bed.bundle(&bed.savable(&shell(COUNTER)));
    // A criu that ends before the kill has restored the container: try another one.
    for _ in 0..20 {
        let over = Arc::new(AtomicBool::new(false));
        let (runtime, id, work) = (bed.runtime.clone(), bundle.id.clone(), image.work());
        let told = over.clone();
        let killer = std::thread::spawn(move || kill_criu_at_the_freeze(&*runtime, &id, &work, &told));
        let restored = bundle.try_restore_frozen(&image).await;
        over.store(true, Ordering::Relaxed);
        killer.join().unwrap();
        let Ok(running) = restored else {
            let running = bundle.restore(&image).await;
            return counts_on(&bundle, running, 2).await;
        };
        bundle.delete().await;
        running.end().await;
    }
    panic!("criu was never hit between the freeze and its end");
}

async fn bind_mounts_come_from_the_new_container(bed: &Bed) {
    let spec = |name: &str| {
        let source = |part: &str| {
            let path = bed.folder().join(format!("{name}-{part}"));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("file"), format!("{name} {part}\n")).unwrap();
            path
        };
        shell(COUNTER)
            .with_mount(mount("/mnt", "bind", source("outer"), &["rbind", "rw"]))
            .with_mount(mount("/mnt/inner", "bind", source("inner"), &["rbind", "ro"]))
            .with_mount(mount("/missing/deep", "bind", source("deep"), &["rbind", "rw"]))
            .with_mount(mount("/etc/missing", "bind", source("file").join("file"), &["bind", "ro"]))
            .with_mount(mount("/etc/hostname", "bind", source("hostname").join("file"), &["bind", "ro"]))
    };
    let (bundle, running) = moved(bed, &spec("old"), &spec("new")).await;
    let said = bundle.ask("cat /mnt/file /mnt/inner/file /missing/deep/file /etc/missing /etc/hostname").await;
    assert_eq!(said, "new outer\nnew inner\nnew deep\nnew file\nnew hostname\n");
    // Mounts, not copies.
    bundle.ask("echo written >/mnt/written; ! echo x 2>/dev/null >/mnt/inner/file").await;
    assert_eq!(fs::read_to_string(bed.folder().join("new-outer/written")).unwrap(), "written\n");
    counts_on(&bundle, running, 2).await;
}

/// Returns places, filesystems, options and propagation.
fn mountinfo(running: &Running) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{}/mountinfo", running.child.pid())).unwrap();
    let line = |line: &str| {
        let (mount, system) = line.split_once(" - ").unwrap();
        let fields: Vec<&str> = mount.split(' ').collect();
        let propagation: Vec<&str> = fields[6..].iter().map(|field| field.split(':').next().unwrap()).collect();
        // The first mount of a filesystem decides about the filesystem's own options.
        let kind = system.split(' ').next().unwrap();
        format!("{} {kind} {} {}", fields[4], fields[5], propagation.join(" "))
    };
    // CRIU gives all mounts over files the options of one of them.
    let is_mask = |line: &&str| line.contains(" /null ");
    let mut lines: Vec<String> = text.lines().filter(|line| !is_mask(line)).map(line).collect();
    lines.sort();
    lines
}

async fn mounts_are_restored_as_they_were(bed: &Bed) {
    let source = bed.folder().join("source");
    fs::create_dir(&source).unwrap();
    let spec = shell(COUNTER)
        .with_mount(mount("/mnt", "bind", &source, &["rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"]))
        .with_mount(mount("/tmp", "tmpfs", "tmpfs", &["nosuid", "size=1024k", "mode=1711"]));
    let (bundle, running) = counter_as(bed, &spec).await;
    let before = mountinfo(&running);
    let (image, _) = bundle.swap_out(running).await;
    let running = bundle.restore(&image).await;
    assert_eq!(mountinfo(&running), before);
    assert_eq!(bundle.ask("stat -c %a /tmp /dev/shm; dd if=/dev/zero of=/tmp/big bs=1024 count=2000 2>/dev/null; stat -c %s /tmp/big").await, "1711\n1777\n1048576\n");
    counts_on(&bundle, running, 2).await;
}

async fn files_in_memory_come_back(bed: &Bed) {
    let script = format!(
        "for place in /run /dev/shm /tmp; do mkdir $place/d; echo $place >$place/d/file; chmod 640 $place/d/file; done; {COUNTER}"
    );
    let spec = shell(&script).with_mount(mount("/tmp", "tmpfs", "tmpfs", &["nosuid", "mode=1777"]));
    let (bundle, running) = moved(bed, &spec, &spec).await;
    let said =
        bundle.ask("cd /; for place in /run /dev/shm /tmp; do stat -c %a $place/d/file; cat $place/d/file; done").await;
    assert_eq!(said, "640\n/run\n640\n/dev/shm\n640\n/tmp\n");
    counts_on(&bundle, running, 2).await;
}

async fn masked_and_readonly_paths_hold_after_a_restore(bed: &Bed) {
    let spec = shell(COUNTER).with_linux(|linux| {
        linux.masked_paths_mut().as_mut().unwrap().extend(["/etc/hostname".to_owned(), "/nosuch".to_owned()]);
        linux.readonly_paths_mut().as_mut().unwrap().extend(["/var".to_owned(), "/nosuch".to_owned()]);
    });
    let (bundle, running) = moved(bed, &spec, &spec).await;
    assert_eq!(bundle.ask("cat /proc/keys /proc/timer_list /etc/hostname").await, "");
    if bed.which != Which::Crun {
        assert_eq!(bundle.ask("ls /sys/firmware").await, "");
    }
    let written = "{ echo 1 >/proc/sys/kernel/domainname; touch /var/new; } 2>&1 | grep -c 'Read-only file system'";
    assert_eq!(bundle.ask(written).await, "2\n");
    bundle.ask("touch /etc/new").await;
    counts_on(&bundle, running, 2).await;
}

async fn a_readonly_root_stays_so_after_a_restore(bed: &Bed) {
    let mut spec = shell(COUNTER);
    let mut root = spec.root().clone().unwrap();
    root.set_readonly(Some(true));
    spec.set_root(Some(root));
    let (bundle, running) = moved(bed, &spec, &spec).await;
    let written =
        "{ touch /new; touch /etc/new; echo here >/run/file; } 2>&1 | grep -c 'Read-only file system'; cat /run/file";
    assert_eq!(bundle.ask(written).await, "2\nhere\n");
    counts_on(&bundle, running, 2).await;
}

async fn hooks_run_at_a_restore(bed: &Bed) {
    let (bundle, running) = counter_as(bed, &shell(COUNTER)).await;
    let (image, _) = bundle.swap_out(running).await;
    let mut spec = bed.savable(&shell(COUNTER));
    spec.set_annotations(Some([("dev.example/key".to_owned(), "value".to_owned())].into()));
    let told = bed.folder().join("told");
    fs::create_dir(&told).unwrap();
    let script = |kind: &str| {
        format!(
            "echo \"$state\" >{told}/{kind}; readlink /proc/self/ns/net >{told}/{kind}.net; echo {kind} >>{told}/order",
            told = told.display()
        )
    };
    let bundle = bed.bundle(&with_hooks(spec, script));
    let running = bundle.restore(&image).await;
    let order =
        || fs::read_to_string(told.join("order")).unwrap().lines().map(str::to_owned).collect::<Vec<_>>().join(" ");
    // The container's other hooks ran at the first creation, as with runc.
    assert_eq!(order(), "prestart createRuntime");
    let pid = running.child.pid();
    counts_on(&bundle, running, 2).await;
    assert_eq!(order(), "prestart createRuntime poststop");
    for kind in ["prestart", "createRuntime", "poststop"] {
        let state: serde_json::Value = serde_json::from_str(&fs::read_to_string(told.join(kind)).unwrap()).unwrap();
        assert_eq!(state["id"], bundle.id.as_str(), "{kind}");
        assert_eq!(state["bundle"], bundle.folder.to_str().unwrap(), "{kind}");
        assert_eq!(state["annotations"]["dev.example/key"], "value", "{kind}");
        match kind {
            "poststop" => assert_eq!(state["status"], "stopped"),
            _ => assert_eq!(state["pid"], pid, "{kind}"),
        }
        let network = fs::read_to_string(told.join(format!("{kind}.net"))).unwrap();
        assert_eq!(Path::new(network.trim()), fs::read_link("/proc/self/ns/net").unwrap(), "the host's, for {kind}");
    }
}

/// Returns a container whose namespaces others join.
async fn sandbox<'bed>(bed: &'bed Bed, name: &str) -> (Bundle<'bed>, Running) {
    let mut spec = shell("echo up; while :; do sleep 600; done");
    spec.set_hostname(Some(name.to_owned()));
    let bundle = bed.bundle(&spec);
    let running = bundle.start().await;
    running.says("up").await;
    (bundle, running)
}

fn inside(mut spec: Spec, sandbox: &Running, kinds: &[LinuxNamespaceType]) -> Spec {
    for &kind in kinds {
        let path = format!("/proc/{}/ns/{kind}", sandbox.child.pid());
        spec = spec.with_namespace(kind, Some(namespace(kind, Some(Path::new(&path)))));
    }
    // The host name is the sandbox's.
    spec.set_hostname(None);
    spec
}

fn namespaces(running: &Running, kinds: &[LinuxNamespaceType]) -> Vec<PathBuf> {
    kinds.iter().map(|kind| fs::read_link(format!("/proc/{}/ns/{kind}", running.child.pid())).unwrap()).collect()
}

async fn a_restored_container_of_a_pod_is_in_the_namespaces_of_the_new_pod(bed: &Bed) {
    let kinds = [LinuxNamespaceType::Network, LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts];
    let (old, old_pause) = sandbox(bed, "old").await;
    let (new, new_pause) = sandbox(bed, "new").await;
    let (bundle, running) = counter_as(bed, &inside(shell(COUNTER), &old_pause, &kinds)).await;
    assert_eq!(namespaces(&running, &kinds), namespaces(&old_pause, &kinds));
    let (image, _) = bundle.swap_out(running).await;
    for (pause, name) in [(&old_pause, "old"), (&new_pause, "new")] {
        let bundle = bed.bundle(&bed.savable(&inside(shell(COUNTER), pause, &kinds)));
        let running = bundle.restore(&image).await;
        assert_eq!(namespaces(&running, &kinds), namespaces(pause, &kinds), "{name}");
        // runc and crun leave the name to CRIU, and the new pod gets the old one's.
        if bed.which == Which::Libcontainer {
            assert_eq!(bundle.ask("hostname").await, format!("{name}\n"));
        }
        counts_on(&bundle, running, 2).await;
        assert_eq!(pause.child.exit(), None);
    }
    old.kill(old_pause).await;
    new.kill(new_pause).await;
}

/// Restores among other processes: a pid may be taken, if only by a helper of CRIU's, and free at
/// the next try.
async fn restore_among_others(bundle: &Bundle<'_>, image: &Image) -> Running {
    let mut refusals = Vec::new();
    while refusals.len() < 5 {
        match bundle.restore_allowing(image, Allow::default()).await {
            Ok(running) => return running,
            Err(error) => refusals.push(error.to_string()),
        }
        assert!(refusals.iter().all(|refusal| refusal.contains("is in use here")), "{refusals:?}");
    }
    panic!("{refusals:?}");
}

async fn a_restored_container_can_share_the_processes_of_another(bed: &Bed) {
    let kinds = [LinuxNamespaceType::Pid];
    let (old, old_pause) = sandbox(bed, "old").await;
    let (new, new_pause) = sandbox(bed, "new").await;
    let (bundle, running) = counter_as(bed, &inside(shell(COUNTER), &old_pause, &kinds)).await;
    let (image, _) = bundle.swap_out(running).await;
    for (pause, name) in [(&old_pause, "old"), (&new_pause, "new")] {
        let bundle = bed.bundle(&bed.savable(&inside(shell(COUNTER), pause, &kinds)));
        let running = restore_among_others(&bundle, &image).await;
        assert_eq!(namespaces(&running, &kinds), namespaces(pause, &kinds), "{name}");
        counts_on(&bundle, running, 2).await;
        assert_eq!(pause.child.exit(), None);
    }
    old.kill(old_pause).await;
    new.kill(new_pause).await;
}

/// Returns the identity and the rights of a process, from /proc.
fn who(running: &Running) -> Vec<String> {
    let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", running.child.pid())).unwrap();
    let status = read("status");
    const KEYS: [&str; 17] = [
        "Name",
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "NStgid",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
    ];
    let mut lines: Vec<String> =
        status.lines().filter(|line| KEYS.contains(&line.split(':').next().unwrap())).map(str::to_owned).collect();
    // Outside, the pid is another one.
    lines
        .iter_mut()
        .filter(|line| line.starts_with("NStgid"))
        .for_each(|line| *line = line.split('\t').next_back().unwrap().to_owned());
    lines.extend(["limits", "oom_score_adj", "environ", "cmdline", "personality", "timerslack_ns"].map(read));
    for link in ["cwd", "exe"] {
        lines.push(fs::read_link(format!("/proc/{}/{link}", running.child.pid())).unwrap().display().to_string());
    }
    lines
}

async fn a_restored_process_is_who_it_was(bed: &Bed) {
    let limit =
        |kind, soft: u64, hard: u64| PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build().unwrap();
    let user = UserBuilder::default().uid(1000_u32).gid(1001_u32).additional_gids([1001_u32, 2002]).umask(0o027_u32);
    let user = user.build().unwrap();
    let forbidden = "read line; hostname other 2>&1; read line; ";
    // CRIU asks for the limits of every process.
    let (may, cannot) = (has_capability(SYS_RESOURCE), "CRIU needs CAP_SYS_RESOURCE for processes of another user");
    for (user, no_new_privileges) in [(None, true), (Some(user), true), (None, false)] {
        if user.is_some() && !may {
            bed.not_tried(cannot);
            continue;
        }
        let spec = shell(&format!("{COUNTER_HEAD}{forbidden}{COUNTER_LOOP}")).with_process(|process| {
            if let Some(user) = user {
                process.set_user(user);
            }
            process.set_no_new_privileges(Some(no_new_privileges));
            process.set_oom_score_adj(Some(789));
            process.set_cwd("/home/user".into());
            process.set_rlimits(Some(vec![
                limit(PosixRlimitType::RlimitNofile, 64, 512),
                limit(PosixRlimitType::RlimitCore, 0, 0),
                limit(PosixRlimitType::RlimitNproc, 1000, 2000),
            ]));
        });
        let bundle = bed.bundle(&bed.savable(&spec));
        let running = bundle.start().await;
        running.says("up\n").await;
        let before = who(&running);
        let (image, _) = bundle.swap_out(running).await;
        let running = bundle.restore(&image).await;
        assert_eq!(who(&running), before);
        running.tell("try");
        running.says("Function not implemented\n").await;
        running.tell("go on");
        running.tell("one");
        running.says("1 one\n").await;
        assert_eq!(running.end().await.code, 7);
        bundle.delete().await;
    }
}

/// Number in linux/capability.h.
const SYS_RESOURCE: u32 = 24;

fn has_capability(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() >> number & 1 == 1
}

/// Parts of [`COUNTER`].
const COUNTER_HEAD: &str = "n=0; echo up; ";
const COUNTER_LOOP: &str = "while read line; do n=$((n+1)); echo \"$n $line\"; done; exit 7";

async fn a_restored_container_can_have_its_own_users(bed: &Bed) {
    if bed.which == Which::Runc && Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return bed.not_tried("on version 2 runc has CRIU mount cgroups, which a user namespace may not");
    }
    let spec = shell(COUNTER)
        .with_namespace(LinuxNamespaceType::User, Some(namespace(LinuxNamespaceType::User, None)))
        // Together they need a CRIU later than 4.2.1: checkpoint-restore/criu#2902.
        .with_namespace(LinuxNamespaceType::Cgroup, None)
        .with_linux(|linux| {
            let mapping = |host: u32| {
                vec![LinuxIdMappingBuilder::default().container_id(0_u32).host_id(host).size(1000_u32).build().unwrap()]
            };
            linux.set_uid_mappings(Some(mapping(100_000)));
            linux.set_gid_mappings(Some(mapping(200_000)));
        });
    let (bundle, running) = moved(bed, &spec, &spec).await;
    let data = fs::metadata(format!("/proc/{}", running.child.pid())).unwrap();
    assert_eq!((data.uid(), data.gid()), (100_000, 200_000));
    let said = bundle
        .ask("id -u; cat /proc/self/uid_map /proc/self/gid_map; touch /dev/shm/file; stat -c %u /dev/shm/file")
        .await;
    let words: Vec<&str> = said.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "100000", "1000", "0", "200000", "1000", "0"]);
    counts_on(&bundle, running, 2).await;
}

async fn device_rules_hold_after_a_restore(bed: &Bed) {
    let script = "n=0; echo up; while read line; do n=$((n+1)); head -c 1 /mnt/kmsg 2>&1; cat /mnt/allowed; head -c 1 /dev/mine | tr '\\0' 0; echo \"$n $line\"; done; exit 7";
    let spec = shell(script).with_linux(|linux| {
        // Number of /dev/zero.
        let mine = LinuxDeviceBuilder::default()
            .path("/dev/mine")
            .typ(LinuxDeviceType::C)
            .major(1)
            .minor(5)
            .file_mode(0o666_u32)
            .uid(0_u32)
            .gid(0_u32)
            .build()
            .unwrap();
        linux.set_devices(Some(vec![mine]));
    });
    let nodes = |bundle: &Bundle<'_>| {
        // /dev/null, and /dev/kmsg, missing from the rules.
        for (name, minor) in [("allowed", 3), ("kmsg", 11)] {
            let path = bundle.rootfs().join("mnt").join(name);
            let device = rustix::fs::makedev(1, minor);
            let mode = Mode::from_raw_mode(0o666);
            rustix::fs::mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, mode, device).unwrap();
        }
    };
    let bundle = bed.bundle(&bed.savable(&spec));
    nodes(&bundle);
    let running = bundle.start().await;
    running.says("up\n").await;
    let (image, _) = bundle.swap_out(running).await;
    let other = bed.bundle(&bed.savable(&spec));
    nodes(&other);
    let running = other.restore(&image).await;
    running.tell("on");
    running.says("1 on\n").await;
    assert_eq!(running.pipes.stdout.so_far(), "head: /mnt/kmsg: Operation not permitted\n01 on\n");
    assert_eq!(
        other.ask("head -c 1 /mnt/kmsg 2>&1 || cat /mnt/allowed; echo ok >/dev/null").await,
        "head: /mnt/kmsg: Operation not permitted\n"
    );
    other.kill(running).await;
}

async fn a_cgroup_mount_shows_the_new_cgroup(bed: &Bed) {
    if bed.which == Which::Runc && !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return bed.not_tried("on version 1 runc restores the mount as its own cgroup");
    }
    for with_namespace in [true, false] {
        let kind = LinuxNamespaceType::Cgroup;
        let spec = shell(COUNTER).with_namespace(kind, with_namespace.then(|| namespace(kind, None)));
        let (bundle, running) = moved(bed, &spec, &spec).await;
        let top = Path::new("/sys/fs/cgroup");
        let mut seen = BTreeSet::new();
        for hierarchy in cgroup_hierarchies() {
            let name = hierarchy.strip_prefix(top).unwrap();
            // Without a namespace, version 2 shows all cgroups.
            let is_all = !with_namespace && hierarchy.join("cgroup.controllers").exists();
            let own = hierarchy.join(bundle.cgroup().strip_prefix("/").unwrap());
            let outside = if is_all { hierarchy.clone() } else { own };
            let inside = PathBuf::from(format!("/proc/{}/root/sys/fs/cgroup", running.child.pid())).join(name);
            // Not every runtime cares about named hierarchies, and the unified one beside v1.
            if ["systemd", "unified"].map(Path::new).contains(&name) {
                continue;
            }
            let (Ok(inside), Ok(outside)) = (fs::metadata(inside), fs::metadata(outside)) else { continue };
            assert_eq!((inside.dev(), inside.ino()), (outside.dev(), outside.ino()), "{}", hierarchy.display());
            seen.insert(name.to_owned());
        }
        assert!(!seen.is_empty());
        // Nothing of the old cgroup is left except the root of its namespace.
        let inside = bundle.ask("cat /proc/1/cgroup").await;
        let expected = if with_namespace { PathBuf::from("/") } else { bundle.cgroup() };
        for line in inside.lines().filter(|line| !line.contains("name=") && !line.starts_with("0::")) {
            assert_eq!(Path::new(line.splitn(3, ':').nth(2).unwrap()), expected, "{line}");
        }
        counts_on(&bundle, running, 2).await;
    }
}

async fn loopback_is_up_after_a_restore(bed: &Bed) {
    let spec = shell(COUNTER);
    let (bundle, running) = moved(bed, &spec, &spec).await;
    if bed.which != Which::Libcontainer {
        bed.not_tried("the runtime leaves the loopback down");
        return counts_on(&bundle, running, 2).await;
    }
    assert_eq!(
        bundle.ask("nc -l -p 7000 -e cat & until echo loop | nc 127.0.0.1 7000 2>/dev/null; do sleep 0.01; done").await,
        "loop\n"
    );
    counts_on(&bundle, running, 2).await;
}
