//! Further processes in a running container.

use std::collections::BTreeSet;
use std::fs;

use oci_spec::runtime::{
    Capability, LinuxCapabilitiesBuilder, PosixRlimitBuilder, PosixRlimitType, Process, UserBuilder,
};
use rustix::process::Signal;

use crate::bed::{Bed, sentences};
use crate::container::{Bundle, Running, assert_says_missing};
use crate::spec::{Edit, capabilities, process, shell};

sentences![
    exec_has_its_own_exit_code,
    exec_killed_by_a_signal_says_so,
    an_exec_that_ends_before_exec_returns_is_seen,
    execs_run_at_the_same_time,
    exec_reads_and_writes_through_its_own_descriptors,
    exec_is_in_the_containers_namespaces_and_cgroup,
    exec_has_its_own_environment_and_folder,
    exec_has_its_own_user_and_groups,
    exec_has_its_own_capabilities,
    exec_is_under_the_containers_seccomp_filter,
    exec_has_its_own_no_new_privileges,
    exec_has_its_own_limits,
    exec_has_no_descriptors_but_three,
    exec_of_a_missing_program_is_refused_and_leaves_nothing,
    exec_of_a_file_that_is_no_program_is_refused,
    exec_in_a_missing_folder_is_refused,
    exec_in_an_ended_container_is_refused,
    exec_ends_with_its_container,
];

fn sh(script: &str) -> Process {
    process(&["/bin/sh", "-c", script])
}

/// Returns a container that waits to be killed.
async fn idle<'bed>(bed: &'bed Bed) -> (Bundle<'bed>, Running) {
    idle_as(bed, shell("echo up; sleep 600")).await
}

async fn idle_as<'bed>(bed: &'bed Bed, spec: oci_spec::runtime::Spec) -> (Bundle<'bed>, Running) {
    let bundle = bed.bundle(&spec);
    let running = bundle.start().await;
    running.says("up").await;
    (bundle, running)
}

/// Returns the output of such a process; the process must succeed.
async fn says(bundle: &Bundle<'_>, process: &Process) -> String {
    let ended = bundle.exec(process).await.unwrap().end().await;
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    ended.stdout
}

/// Returns the value of a line of /proc/self/status.
async fn status(bundle: &Bundle<'_>, mut process: Process, key: &str) -> String {
    process.set_args(Some(["cat", "/proc/self/status"].map(str::to_owned).to_vec()));
    let status = says(bundle, &process).await;
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{key}:"))).unwrap();
    line.trim().to_owned()
}

async fn exec_has_its_own_exit_code(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let ended = bundle.exec(&sh("echo out; echo err >&2; exit 5")).await.unwrap().end().await;
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (5, "out\n", "err\n"));
    assert_eq!(running.child.exit(), None);
    bundle.kill(running).await;
}

async fn exec_killed_by_a_signal_says_so(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let exec = bundle.exec(&sh("echo up; sleep 600")).await.unwrap();
    exec.says("up").await;
    exec.child.signal(Signal::TERM).unwrap();
    assert_eq!(exec.end().await.code, 143);
    bundle.kill(running).await;
}

async fn an_exec_that_ends_before_exec_returns_is_seen(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    for code in 0..10 {
        assert_eq!(bundle.exec(&sh(&format!("exit {code}"))).await.unwrap().end().await.code, code);
    }
    bundle.kill(running).await;
}

async fn execs_run_at_the_same_time(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let one = async |code: u32| {
        let ended = bundle.exec(&sh(&format!("echo {code}; exit {code}"))).await.unwrap().end().await;
        assert_eq!((ended.code, ended.stdout), (code, format!("{code}\n")));
    };
    tokio::join!(one(1), one(2), one(3), one(4), one(5), one(6), one(7), one(8));
    bundle.kill(running).await;
}

async fn exec_reads_and_writes_through_its_own_descriptors(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let exec = bundle.exec(&sh("while read line; do echo \"got $line\"; done")).await.unwrap();
    exec.tell("one");
    exec.says("got one\n").await;
    let ended = exec.end().await;
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "got one\n"));
    assert_eq!(running.pipes.stdout.so_far(), "up\n", "nothing of it came out of the container's");
    bundle.kill(running).await;
}

async fn exec_is_in_the_containers_namespaces_and_cgroup(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let exec = bundle.exec(&sh("echo up; sleep 600")).await.unwrap();
    exec.says("up").await;
    for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_eq!(of(exec.child.pid()), of(running.child.pid()), "{namespace}");
    }
    let cgroup = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(cgroup(exec.child.pid()), cgroup(running.child.pid()));
    let root =
        |pid: i32| fs::metadata(format!("/proc/{pid}/root/bin")).map(|data| std::os::unix::fs::MetadataExt::ino(&data));
    assert_eq!(root(exec.child.pid()).unwrap(), root(running.child.pid()).unwrap());
    exec.child.signal(Signal::KILL).unwrap();
    exec.end().await;
    bundle.kill(running).await;
}

async fn exec_has_its_own_environment_and_folder(bed: &Bed) {
    let container = shell("echo up; sleep 600").with_process(|process| {
        process.set_env(Some(["PATH=/bin".to_owned(), "OF=container".to_owned()].to_vec()));
    });
    let (bundle, running) = idle_as(bed, container).await;
    let mut process = process(&["/bin/env"]);
    process.set_env(Some(["PATH=/bin", "EMPTY=", "WITH=a b=c"].map(str::to_owned).to_vec()));
    process.set_cwd("/home/user".into());
    let environment = says(&bundle, &process).await;
    let mut environment: BTreeSet<&str> = environment.lines().collect();
    // Runtimes may add the home of the user.
    environment.retain(|variable| !variable.starts_with("HOME="));
    assert_eq!(environment, BTreeSet::from(["PATH=/bin", "EMPTY=", "WITH=a b=c"]));
    process.set_args(Some(["pwd".to_owned()].to_vec()));
    assert_eq!(says(&bundle, &process).await, "/home/user\n");
    bundle.kill(running).await;
}

async fn exec_has_its_own_user_and_groups(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let mut process = process(&["cat", "/proc/self/status"]);
    let user = UserBuilder::default().uid(1000_u32).gid(1001_u32).additional_gids([2002_u32, 3003]);
    process.set_user(user.build().unwrap());
    let status = says(&bundle, &process).await;
    let words: BTreeSet<String> =
        status.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for line in ["Uid: 1000 1000 1000 1000", "Gid: 1001 1001 1001 1001"] {
        assert!(words.contains(line), "{line} is not in {status}");
    }
    let groups = words.iter().find_map(|line| line.strip_prefix("Groups: ")).unwrap();
    let groups: BTreeSet<&str> = groups.split(' ').filter(|group| *group != "1001").collect();
    assert_eq!(groups, BTreeSet::from(["2002", "3003"]));
    bundle.kill(running).await;
}

async fn exec_has_its_own_capabilities(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let mut process = process(&[]);
    process.set_capabilities(Some(capabilities(&[Capability::Chown, Capability::Kill])));
    // Bit numbers of linux/capability.h: chown 0, kill 5.
    for (set, expected) in
        [("CapBnd", "0000000000000021"), ("CapPrm", "0000000000000021"), ("CapEff", "0000000000000021")]
    {
        assert_eq!(status(&bundle, process.clone(), set).await, expected, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status(&bundle, process.clone(), set).await, "0000000000000000", "{set}");
    }
    // Another user has them only if they are ambient.
    let user = UserBuilder::default().uid(1000_u32).gid(1000_u32).build().unwrap();
    process.set_user(user.clone());
    assert_eq!(status(&bundle, process.clone(), "CapEff").await, "0000000000000000");
    let kill = std::collections::HashSet::from([Capability::Kill]);
    let ambient = LinuxCapabilitiesBuilder::default()
        .bounding(kill.clone())
        .permitted(kill.clone())
        .effective(kill.clone())
        .inheritable(kill.clone())
        .ambient(kill)
        .build()
        .unwrap();
    process.set_capabilities(Some(ambient));
    assert_eq!(status(&bundle, process.clone(), "CapEff").await, "0000000000000020");
    bundle.kill(running).await;
}

async fn exec_is_under_the_containers_seccomp_filter(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    // 2 is SECCOMP_MODE_FILTER.
    assert_eq!(status(&bundle, process(&[]), "Seccomp").await, "2");
    let ended = bundle.exec(&process(&["hostname", "other"])).await.unwrap().end().await;
    assert_ne!(ended.code, 0);
    assert!(ended.stderr.contains("Function not implemented"), "{}", ended.stderr);
    bundle.kill(running).await;
}

async fn exec_has_its_own_no_new_privileges(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let mut process = process(&[]);
    assert_eq!(status(&bundle, process.clone(), "NoNewPrivs").await, "1");
    process.set_no_new_privileges(Some(false));
    assert_eq!(status(&bundle, process.clone(), "NoNewPrivs").await, "0");
    bundle.kill(running).await;
}

async fn exec_has_its_own_limits(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let mut process = sh("ulimit -Sn; ulimit -Hn; ulimit -Sc");
    let limit =
        |kind, soft: u64, hard: u64| PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build().unwrap();
    process.set_rlimits(Some(vec![
        limit(PosixRlimitType::RlimitNofile, 100, 200),
        limit(PosixRlimitType::RlimitCore, 0, 0),
    ]));
    assert_eq!(says(&bundle, &process).await, "100\n200\n0\n");
    bundle.kill(running).await;
}

async fn exec_has_no_descriptors_but_three(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    // ls itself has the listed folder open as well.
    let count = |listing: String| listing.lines().count();
    assert_eq!(count(says(&bundle, &process(&["ls", "/proc/self/fd"])).await), 4);
    assert_eq!(count(bundle.ask("ls /proc/1/fd").await), 3);
    bundle.kill(running).await;
}

async fn exec_of_a_missing_program_is_refused_and_leaves_nothing(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    for program in ["nosuch", "/bin/nosuch"] {
        let before = bed.traces();
        let error = bundle.exec(&process(&[program, "argument"])).await.err().unwrap().to_string();
        assert_says_missing(&error, program);
        assert!(error.contains(&bundle.id), "{error}");
        let left = bed.settle_beside(&before, &bundle.id);
        assert!(left.is_empty(), "{left:?}");
    }
    assert_eq!(running.child.exit(), None);
    assert_eq!(bundle.ask("echo on").await, "on\n");
    bundle.kill(running).await;
}

async fn exec_of_a_file_that_is_no_program_is_refused(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    for file in ["/etc/passwd", "/etc"] {
        let error = bundle.exec(&process(&[file])).await.err().unwrap().to_string();
        assert!(error.contains(file), "{error}");
    }
    bundle.kill(running).await;
}

async fn exec_in_a_missing_folder_is_refused(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let mut process = process(&["true"]);
    process.set_cwd("/nosuch".into());
    // Runtimes may make the folder instead, as runc does for a container's first process.
    match bundle.exec(&process).await {
        Ok(exec) => assert_eq!(exec.end().await.code, 0),
        Err(error) => assert!(error.to_string().contains("/nosuch"), "{error}"),
    }
    bundle.kill(running).await;
}

async fn exec_in_an_ended_container_is_refused(bed: &Bed) {
    let bundle = bed.bundle(&shell("true"));
    bundle.start().await.end().await;
    let error = bundle.exec(&process(&["true"])).await.err().unwrap().to_string();
    assert!(error.contains(&bundle.id), "{error}");
    bundle.delete().await;
}

async fn exec_ends_with_its_container(bed: &Bed) {
    let (bundle, running) = idle(bed).await;
    let exec = bundle.exec(&sh("echo up; sleep 600")).await.unwrap();
    exec.says("up").await;
    running.child.signal(Signal::KILL).unwrap();
    assert_eq!(running.end().await.code, 137);
    assert_eq!(exec.end().await.code, 137);
    bundle.delete().await;
}
