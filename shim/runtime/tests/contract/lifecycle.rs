//! The life of a container, from creation to deletion.

use std::time::Duration;

use cgroup::Cgroup;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResourcesBuilder};
use rustix::process::Signal;

use crate::bed::{Bed, sentences};
use crate::container::until;
use crate::spec::{Edit, process, shell};

sentences![
    a_created_container_waits_until_it_is_started,
    the_exit_code_is_the_programs,
    an_exit_before_start_returns_is_seen,
    input_and_output_go_through_the_given_descriptors,
    a_created_container_that_is_killed_is_seen_to_end,
    a_container_is_started_once,
    pause_stops_progress_and_resume_lets_it_go_on,
    exec_while_paused_is_refused,
    a_created_container_is_deleted,
    a_running_container_is_deleted,
    a_paused_container_is_deleted,
    delete_is_repeatable,
    an_unknown_container_is_deleted_without_complaint,
    delete_kills_all_that_runs_without_a_pid_namespace_of_its_own,
    containers_are_made_at_the_same_time,
    an_id_is_free_again_after_deletion,
    operations_on_an_unknown_container_are_refused,
    features_name_what_it_can_do,
];

async fn a_created_container_waits_until_it_is_started(bed: &Bed) {
    let bundle = bed.bundle(&shell("echo started"));
    let running = bundle.create().await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.pipes.stdout.so_far(), "");
    assert_eq!(running.child.exit(), None);
    bed.runtime.start(&bundle.id).await.unwrap();
    let ended = running.end().await;
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (0, "started\n", ""));
    bundle.delete().await;
}

async fn the_exit_code_is_the_programs(bed: &Bed) {
    assert_eq!(bed.run(&shell("exit 42")).await.code, 42);
    // The first process of a pid namespace ignores signals from inside.
    let bundle = bed.bundle(&shell("echo up; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    running.child.signal(Signal::KILL).unwrap();
    assert_eq!(running.end().await.code, 137);
    bundle.delete().await;
}

async fn an_exit_before_start_returns_is_seen(bed: &Bed) {
    for code in 1..=10 {
        let bundle = bed.bundle(&shell(&format!("exit {code}")));
        let running = bundle.create().await.unwrap();
        let (started, exit) = tokio::join!(bed.runtime.start(&bundle.id), running.child.wait());
        started.unwrap();
        assert_eq!(exit.code, code);
        assert_eq!(running.child.wait().await, exit, "who asks later gets the same answer");
        running.end().await;
        bundle.delete().await;
    }
}

async fn input_and_output_go_through_the_given_descriptors(bed: &Bed) {
    let bundle = bed.bundle(&shell("while read line; do echo \"out $line\"; echo \"err $line\" >&2; done; echo end"));
    let running = bundle.start().await;
    running.tell("one");
    running.says("out one\n").await;
    running.tell("two");
    let ended = running.end().await;
    assert_eq!(ended.stdout, "out one\nout two\nend\n");
    assert_eq!(ended.stderr, "err one\nerr two\n");
    bundle.delete().await;
}

async fn a_created_container_that_is_killed_is_seen_to_end(bed: &Bed) {
    let bundle = bed.bundle(&shell("echo never"));
    let running = bundle.create().await.unwrap();
    running.child.signal(Signal::KILL).unwrap();
    let ended = running.end().await;
    assert_eq!((ended.code, ended.stdout.as_str()), (137, ""));
    assert!(bed.runtime.start(&bundle.id).await.is_err());
    bundle.delete().await;
}

async fn a_container_is_started_once(bed: &Bed) {
    let bundle = bed.bundle(&shell("echo up; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    assert!(bed.runtime.start(&bundle.id).await.is_err(), "started while it ran");
    assert_eq!(running.child.exit(), None, "it goes on");
    running.child.signal(Signal::KILL).unwrap();
    running.end().await;
    assert!(bed.runtime.start(&bundle.id).await.is_err(), "started after its end");
    bundle.delete().await;
}

async fn pause_stops_progress_and_resume_lets_it_go_on(bed: &Bed) {
    let bundle = bed.bundle(&shell("while :; do echo .; sleep 0.01; done"));
    let running = bundle.start().await;
    running.says(".").await;
    bed.runtime.pause(&bundle.id).await.unwrap();
    assert!(Cgroup::of_process(running.child.process()).unwrap().is_frozen().unwrap());
    // The pipe's contents may still come.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let paused = running.pipes.stdout.so_far().len();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.pipes.stdout.so_far().len(), paused);
    bed.runtime.resume(&bundle.id).await.unwrap();
    until("it goes on", || running.pipes.stdout.so_far().len() > paused).await;
    bundle.kill(running).await;
}

async fn exec_while_paused_is_refused(bed: &Bed) {
    let bundle = bed.bundle(&shell("echo up; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    bed.runtime.pause(&bundle.id).await.unwrap();
    let error = bundle.exec(&process(&["true"])).await.err().unwrap().to_string();
    assert!(error.contains("paused"), "{error}");
    bed.runtime.resume(&bundle.id).await.unwrap();
    assert_eq!(bundle.ask("echo again").await, "again\n");
    bundle.kill(running).await;
}

async fn a_created_container_is_deleted(bed: &Bed) {
    let bundle = bed.bundle(&shell("echo never"));
    let running = bundle.create().await.unwrap();
    bundle.delete().await;
    let ended = running.end().await;
    assert_eq!((ended.code, ended.stdout.as_str()), (137, ""));
}

async fn a_running_container_is_deleted(bed: &Bed) {
    // With a process outside the first one's children, and one deaf to every ignorable signal.
    let bundle = bed.bundle(&shell("setsid sh -c 'sleep 600' & trap '' TERM INT HUP; echo up; sleep 600; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    bundle.delete().await;
    assert_eq!(running.end().await.code, 137);
}

async fn a_paused_container_is_deleted(bed: &Bed) {
    let bundle = bed.bundle(&shell("sleep 600 & echo up; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    bed.runtime.pause(&bundle.id).await.unwrap();
    bundle.delete().await;
    assert_eq!(running.end().await.code, 137);
}

async fn delete_is_repeatable(bed: &Bed) {
    let bundle = bed.bundle(&shell("true"));
    bundle.start().await.end().await;
    bundle.delete().await;
    bundle.delete().await;
}

async fn an_unknown_container_is_deleted_without_complaint(bed: &Bed) {
    bed.runtime.delete("contract-unknown").await.unwrap();
}

async fn delete_kills_all_that_runs_without_a_pid_namespace_of_its_own(bed: &Bed) {
    let spec = shell("setsid sleep 600 & setsid sleep 600 & echo up").with_namespace(LinuxNamespaceType::Pid, None);
    let bundle = bed.bundle(&spec);
    let running = bundle.start().await;
    running.says("up").await;
    let cgroup = Cgroup::of_process(running.child.process());
    // The others keep the output open, so only the first process is waited for.
    assert_eq!(running.child.wait().await.code, 0);
    bundle.delete().await;
    running.end().await;
    // The process may have ended before the look at its cgroup.
    if let Ok(cgroup) = cgroup {
        assert_eq!(cgroup.pids().unwrap(), []);
    }
}

async fn containers_are_made_at_the_same_time(bed: &Bed) {
    let one = async |code: u32| {
        let ended = bed.run(&shell(&format!("echo {code}; exit {code}"))).await;
        assert_eq!((ended.code, ended.stdout), (code, format!("{code}\n")));
    };
    tokio::join!(one(1), one(2), one(3), one(4));
}

async fn an_id_is_free_again_after_deletion(bed: &Bed) {
    let bundle = bed.bundle(&shell("exit 3"));
    for _ in 0..3 {
        assert_eq!(bundle.start().await.end().await.code, 3);
        bundle.delete().await;
    }
}

async fn operations_on_an_unknown_container_are_refused(bed: &Bed) {
    let id = "contract-unknown";
    let resources = LinuxResourcesBuilder::default().build().unwrap();
    let bundle = bed.bundle(&shell("true"));
    let errors = [
        bed.runtime.start(id).await,
        bed.runtime.pause(id).await,
        bed.runtime.resume(id).await,
        bed.runtime.update(id, &resources).await,
        bundle.exec(&process(&["true"])).await.map(|_| ()),
    ]
    .map(|result| result.unwrap_err().to_string());
    for error in &errors[..4] {
        assert!(error.contains(id), "the container is named: {error}");
    }
}

async fn features_name_what_it_can_do(bed: &Bed) {
    let features = bed.runtime.features().await.unwrap();
    let hooks = features.hooks().as_ref().unwrap();
    for hook in ["createRuntime", "createContainer", "startContainer", "poststart", "poststop"] {
        assert!(hooks.iter().any(|name| name == hook), "{hook} is not in {hooks:?}");
    }
    let linux = features.linux().as_ref().unwrap();
    let namespaces = linux.namespaces().as_ref().unwrap();
    for kind in [LinuxNamespaceType::User, LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup] {
        assert!(namespaces.contains(&kind), "{kind} is not in {namespaces:?}");
    }
    assert_eq!(linux.seccomp().as_ref().unwrap().enabled(), &Some(true));
}
