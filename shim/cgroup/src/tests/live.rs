//! On the hierarchies that this machine has. Needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use containerd_shim_protos::cgroups::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use proc::HostPid;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::{Cgroup, CgroupError, Hierarchy};

/// Cgroups of its own name in hierarchies of this machine, removed when it goes.
struct Bed {
    directories: Vec<PathBuf>,
}

impl Bed {
    /// In all v1 hierarchies. `None`, with the reason printed, where there are none or they are read-only.
    fn v1() -> Option<Self> {
        let hierarchies = ["freezer", "memory", "pids", "cpu", "cpuacct", "devices", "blkio"]
            .map(|controller| Path::new("/sys/fs/cgroup").join(controller));
        let present: Vec<_> = hierarchies.into_iter().filter(|path| path.join("cgroup.procs").exists()).collect();
        if !present.iter().any(|path| path.ends_with("freezer")) {
            eprintln!("skipped: no v1 freezer on this machine");
            return None;
        }
        Self::make(&present)
    }

    /// In the unified hierarchy, which may have no controllers.
    fn v2() -> Option<Self> {
        let found = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .map(PathBuf::from)
            .into_iter()
            .find(|path| path.join("cgroup.controllers").exists());
        let Some(unified) = found else {
            eprintln!("skipped: no unified hierarchy on this machine");
            return None;
        };
        Self::make(&[unified])
    }

    fn make(hierarchies: &[PathBuf]) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("gpusnap-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let bed = Self { directories: hierarchies.iter().map(|path| path.join(&name)).collect() };
        for directory in &bed.directories {
            if let Err(error) = fs::create_dir(directory) {
                eprintln!("skipped: cannot make the cgroup {}: {error}", directory.display());
                return None;
            }
        }
        Some(bed)
    }

    fn directory(&self, controller: &str) -> Option<&Path> {
        let of = |path: &&PathBuf| path.parent().is_some_and(|parent| parent.ends_with(controller));
        self.directories.iter().find(of).map(PathBuf::as_path)
    }

    /// A child in the cgroup that runs `script`. It waits for a line on its standard input before, so that all its
    /// children are in the cgroup too.
    fn run(&self, script: &str) -> Running {
        let mut child = Command::new("sh")
            .args(["-c", &format!("read go; {script}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        for directory in &self.directories {
            fs::write(directory.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"go\n").unwrap();
        Running { child }
    }

    fn unified(&self) -> Cgroup {
        Cgroup { hierarchy: Hierarchy::V2(self.directories[0].clone()) }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for directory in &self.directories {
            let below = crate::process::subtree(directory).unwrap_or_default();
            for cgroup in below.iter().rev() {
                while fs::remove_dir(cgroup).is_err() {
                    let pids = crate::process::pids(cgroup).unwrap_or_default();
                    pids.iter().for_each(|pid| {
                        let _ = rustix::process::kill_process(pid.as_pid(), Signal::KILL);
                    });
                    let _ = fs::write(cgroup.join("freezer.state"), "THAWED");
                    let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }
}

struct Running {
    child: Child,
}

impl Running {
    fn pid(&self) -> HostPid {
        Pid::from_child(&self.child).into()
    }

    fn wait(&self) -> WaitStatus {
        rustix::process::waitpid(Some(self.pid().as_pid()), WaitOptions::empty()).unwrap().unwrap().1
    }
}

/// Polls for something that the kernel brings about; hangs (and is killed by the harness) if it never comes.
fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Twenty processes that fork one child each and end at once, and so do their children, for ever: who kills them one
/// by one always comes a pid too late.
const HOPPERS: &str = r#"export HOP='sh -c "$HOP" &'; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sh -c "$HOP" & done; sleep 600"#;

#[test]
fn v1_is_found_from_a_process_and_knows_all_of_it() {
    let Some(bed) = Bed::v1() else { return };
    let running = bed.run("sleep 600 & sleep 600 & wait");
    let cgroup = Cgroup::of_process(running.pid()).unwrap();
    assert!(matches!(cgroup.hierarchy, Hierarchy::V1(_)));
    until(|| cgroup.pids().unwrap().len() == 3);

    let inner = bed.directory("freezer").unwrap().join("inner");
    fs::create_dir(&inner).unwrap();
    let moved = cgroup.pids().unwrap().into_iter().find(|pid| *pid != running.pid()).unwrap();
    fs::write(inner.join("cgroup.procs"), moved.to_string()).unwrap();
    assert_eq!(cgroup.pids().unwrap().len(), 3, "one of them in a cgroup below");

    let any = cgroup.metrics().unwrap();
    let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
    assert!(!metrics.cpu.usage.per_cpu.is_empty());
    if bed.directory("memory").is_some() {
        assert!(metrics.memory.usage.limit > 0 && metrics.memory.hierarchical_memory_limit > 0);
    }
    if bed.directory("pids").is_some() {
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
    }

    cgroup.signal_all(Signal::TERM).unwrap();
    assert_eq!(running.wait().terminating_signal(), Some(Signal::TERM.as_raw()));
    until(|| cgroup.pids().unwrap().is_empty());
}

#[test]
fn a_dead_process_has_no_cgroup() {
    let Some(bed) = Bed::v1() else { return };
    let running = bed.run("exit 3");
    until(|| fs::read_to_string(format!("/proc/{}/stat", running.pid())).unwrap().contains(") Z "));
    // The kernel says that a v1 zombie is in the root cgroup, where everybody else is too.
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        assert!(matches!(Cgroup::of_process(running.pid()), Err(CgroupError::None { .. })));
    }
    assert_eq!(running.wait().exit_status(), Some(3));
    assert!(matches!(Cgroup::of_process(running.pid()), Err(CgroupError::File { action: "read", .. })));
}

#[test]
fn v1_a_frozen_cgroup_stands_still_and_is_killed_all_the_same() {
    let Some(bed) = Bed::v1() else { return };
    let running = bed.run("while :; do :; done");
    let cgroup = Cgroup::of_process(running.pid()).unwrap();
    assert!(!cgroup.is_frozen().unwrap());
    cgroup.freeze().unwrap();
    assert!(cgroup.is_frozen().unwrap());
    assert_stands_still(running.pid());
    cgroup.thaw().unwrap();
    assert!(!cgroup.is_frozen().unwrap());
    cgroup.freeze().unwrap();
    cgroup.signal_all(Signal::KILL).unwrap();
    assert_eq!(running.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
    assert!(!cgroup.is_frozen().unwrap());
}

#[test]
fn v1_what_the_container_froze_itself_is_killed_too() {
    let Some(bed) = Bed::v1() else { return };
    let running = bed.run("sleep 600");
    let cgroup = Cgroup::of_process(running.pid()).unwrap();
    let inner = bed.directory("freezer").unwrap().join("inner");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("cgroup.procs"), running.pid().to_string()).unwrap();
    fs::write(inner.join("freezer.state"), "FROZEN").unwrap();
    cgroup.signal_all(Signal::KILL).unwrap();
    assert_eq!(running.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
}

#[test]
fn v1_processes_that_fork_all_the_time_do_not_outrun_a_kill() {
    let Some(bed) = Bed::v1() else { return };
    let running = bed.run(HOPPERS);
    let cgroup = Cgroup::of_process(running.pid()).unwrap();
    let first = cgroup.pids().unwrap();
    until(|| cgroup.pids().unwrap().iter().filter(|pid| !first.contains(pid)).count() > 10);
    cgroup.signal_all(Signal::KILL).unwrap();
    running.wait();
    until(|| cgroup.pids().unwrap().is_empty());
}

#[test]
fn v1_a_shell_that_starts_programs_all_the_time_is_frozen_between_them() {
    if let Some(bed) = Bed::v1() {
        let running = bed.run(BUSY);
        assert_is_frozen_at_rest(&Cgroup::of_process(running.pid()).unwrap());
    }
}

#[test]
fn v2_a_shell_that_starts_programs_all_the_time_is_frozen_between_them() {
    if let Some(bed) = Bed::v2() {
        let _running = bed.run(BUSY);
        assert_is_frozen_at_rest(&bed.unified());
    }
}

/// Debian's shell uses vfork.
const BUSY: &str = "while :; do /bin/true; done";

fn assert_is_frozen_at_rest(cgroup: &Cgroup) {
    for round in 0..30 {
        // As a runtime leaves it that has paused it at any moment.
        let is_frozen = round % 2 == 0;
        if is_frozen {
            cgroup.freeze().unwrap();
        }
        cgroup.freeze_at_rest(is_frozen).unwrap();
        assert!(cgroup.is_frozen().unwrap());
        assert_eq!(crate::vfork::waiting_in_frozen(&cgroup.pids().unwrap()), None);
        cgroup.thaw().unwrap();
    }
}

#[test]
fn v1_a_process_that_waits_for_a_vforked_child_for_ever_is_named_and_left_frozen() {
    let Some(bed) = Bed::v1() else { return };
    if !Path::new("/usr/bin/perl").exists() {
        return eprintln!("skipped: no perl on this machine");
    }
    // CLONE_VFORK and SIGCHLD, without CLONE_VM: the child may do as it likes.
    let running = bed.run(&format!("exec perl -e 'syscall({}, 0x4011, 0, 0, 0, 0); sleep 600'", libc::SYS_clone));
    let cgroup = Cgroup::of_process(running.pid()).unwrap();
    until(|| cgroup.pids().unwrap().len() == 2);
    match crate::freezer::freeze_at_rest(&cgroup, false, 3) {
        Err(CgroupError::Vfork { pid }) => assert_eq!(pid, running.pid()),
        other => panic!("{other:?}"),
    }
    assert!(cgroup.is_frozen().unwrap());
}

#[test]
fn v2_is_frozen_thawed_and_killed() {
    let Some(bed) = Bed::v2() else { return };
    let cgroup = bed.unified();
    let running = bed.run("sleep 600 & while :; do :; done");
    until(|| cgroup.pids().unwrap().len() == 2);
    cgroup.freeze().unwrap();
    assert!(cgroup.is_frozen().unwrap());
    assert_stands_still(running.pid());
    cgroup.thaw().unwrap();
    assert!(!cgroup.is_frozen().unwrap());
    cgroup.freeze().unwrap();
    cgroup.signal_all(Signal::KILL).unwrap();
    assert_eq!(running.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
    assert!(!cgroup.is_frozen().unwrap());
    until(|| cgroup.pids().unwrap().is_empty());
    cgroup.metrics().unwrap();
}

#[test]
fn v2_is_killed_one_by_one_where_the_kernel_cannot_do_it_at_once() {
    let Some(bed) = Bed::v2() else { return };
    let cgroup = bed.unified();
    let running = bed.run("sleep 600 & sleep 600 & wait");
    until(|| cgroup.pids().unwrap().len() == 3);
    crate::process::kill(&cgroup).unwrap();
    assert_eq!(running.wait().terminating_signal(), Some(Signal::KILL.as_raw()));
    until(|| cgroup.pids().unwrap().is_empty());
    assert!(!cgroup.is_frozen().unwrap());
}

#[tokio::test]
async fn v1_an_out_of_memory_kill_is_told_and_counted_and_the_watch_ends_with_the_cgroup() {
    let Some(bed) = Bed::v1() else { return };
    let Some(memory) = bed.directory("memory") else { return eprintln!("skipped: no v1 memory controller") };
    fs::write(memory.join("memory.limit_in_bytes"), "16M").unwrap();
    // The shell survives and keeps the cgroup alive.
    let running = bed.run("tail /dev/zero; sleep 600");
    let cgroup = Cgroup::of_process(running.pid()).unwrap();
    // Started late on purpose when the kill was quicker: then the count has it.
    let mut watch = cgroup.watch_oom().unwrap();
    if cgroup.oom_kills() == 0 {
        assert_eq!(watch.next().await, Some(()));
    }
    assert_eq!(cgroup.oom_kills(), 1);
    cgroup.signal_all(Signal::KILL).unwrap();
    running.wait();
    drop(bed);
    while watch.next().await.is_some() {}
    assert_eq!(cgroup.oom_kills(), 0);
}

fn assert_stands_still(pid: HostPid) {
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().map(str::to_owned).collect();
        // utime and stime: fields 14 and 15 of proc_pid_stat(5), of which two are before the parenthesis.
        (fields[11].clone(), fields[12].clone())
    };
    let before = ticks();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(ticks(), before);
}
