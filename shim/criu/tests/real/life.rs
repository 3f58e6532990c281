//! Successful operations.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;

use criu::{Inherit, MINIMUM, Options, Stage};
use rustix::process::Signal;
use rustix::pty::OpenptFlags;

use crate::world::{Saboteur, Sentence, Target, World, children_of, sentence, until};

pub(crate) fn sentences() -> Vec<Sentence> {
    vec![
        sentence!(criu_is_new_enough),
        sentence!(a_tree_goes_on_where_it_was_dumped),
        sentence!(a_tree_with_threads_pipes_and_children_goes_on),
        sentence!(a_tree_with_a_pid_namespace_goes_on),
        sentence!(a_tree_left_running_runs_on),
        sentence!(an_image_is_restored_twice),
        sentence!(a_restored_tree_is_dumped_and_restored_again),
        sentence!(a_restored_root_is_a_child_whose_exit_is_seen),
        sentence!(a_restored_tree_writes_to_the_pipe_that_it_is_given),
        sentence!(a_restored_terminal_comes_with_its_master),
        sentence!(an_image_can_be_read),
    ]
}

async fn criu_is_new_enough(world: World) {
    let version = world.criu.version().await.unwrap();
    assert!(version >= MINIMUM, "{version}");
}

async fn a_tree_goes_on_where_it_was_dumped(world: World) {
    let count = world.dumped(&[]).await;
    let mut notify = Saboteur::none();
    let restored = world.criu.restore(world.restore_request(), &mut notify).await.unwrap();
    let target = Target::of(restored.root, &world);
    target.runs().await;
    assert!(target.count() > count);
    assert_eq!(notify.seen, [Stage::PreRestore, Stage::PostRestore, Stage::PreResume, Stage::PostResume]);
    target.kill().await;
}

async fn a_tree_with_threads_pipes_and_children_goes_on(world: World) {
    let count = world.dumped(&["child", "threads"]).await;
    let target = world.restored().await;
    target.runs().await;
    assert!(target.count() > count);
    assert_eq!(children_of(target.child.pid()).len(), 1);
    target.kill().await;
}

/// Starts a tree with a pid namespace, and the process that waits for the tree.
pub(crate) async fn with_pid_namespace(world: &World) -> (Target, Target) {
    let mut command = world.command(&["unshare", "--pid", "--fork", "setsid"], &["child"]);
    // The namespace has no /proc of its own: CRIU mounts one below the working directory.
    command.current_dir(world.folder("cwd"));
    let outer = world.started(&mut command).await;
    let inner = children_of(outer.child.pid())[0];
    // Watched like a child, for its pid and its signals; a restore makes it one.
    let child = world.reaper.adoption().adopt(inner).unwrap();
    (outer, Target::of(child, world))
}

async fn a_tree_with_a_pid_namespace_goes_on(world: World) {
    let (outer, inner) = with_pid_namespace(&world).await;
    let mut notify = Saboteur::none();
    world.criu.dump(world.dump_request(&inner), &mut notify).await.unwrap();
    outer.child.wait().await;
    let count = inner.count();
    let mut notify = Saboteur::none();
    let restored = world.criu.restore(world.restore_request(), &mut notify).await.unwrap();
    assert_eq!(notify.seen[..2], [Stage::PreRestore, Stage::SetupNamespaces]);
    let target = Target::of(restored.root, &world);
    target.runs().await;
    assert!(target.count() > count);
    target.kill().await;
}

async fn a_tree_left_running_runs_on(world: World) {
    let target = world.target(&[]).await;
    let mut request = world.dump_request(&target);
    request.leave_running = true;
    let mut notify = Saboteur::none();
    let dumped = world.criu.dump(request, &mut notify).await.unwrap();
    assert_eq!(notify.seen, [Stage::PreDump, Stage::QueryExternalFiles, Stage::PostDump]);
    assert!(std::fs::read_to_string(dumped.log).unwrap().contains("Dumping finished successfully"));
    target.runs().await;
    target.kill().await;
    let again = world.restored().await;
    again.runs().await;
    again.kill().await;
}

async fn an_image_is_restored_twice(world: World) {
    world.dumped(&[]).await;
    for _ in 0..2 {
        let target = world.restored().await;
        target.runs().await;
        target.kill().await;
    }
}

async fn a_restored_tree_is_dumped_and_restored_again(world: World) {
    let mut count = world.dumped(&["child"]).await;
    for generation in 0..3 {
        let target = world.restored().await;
        target.runs().await;
        std::fs::rename(world.path("images"), world.path(&format!("images{generation}"))).unwrap();
        world.criu.dump(world.dump_request(&target), &mut ()).await.unwrap();
        target.child.wait().await;
        assert!(target.count() > count);
        count = target.count();
    }
}

async fn a_restored_root_is_a_child_whose_exit_is_seen(world: World) {
    world.dumped(&[]).await;
    let target = world.restored().await;
    target.child.signal(Signal::TERM).unwrap();
    assert_eq!(target.child.wait().await.code, 128 + 15);
}

async fn a_restored_tree_writes_to_the_pipe_that_it_is_given(world: World) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let name = std::fs::read_link(format!("/proc/self/fd/{}", writer.as_raw_fd())).unwrap();
    let mut command = world.command(&["setsid"], &["echo"]);
    command.stdout(writer);
    let target = world.started(&mut command).await;
    drop(command);
    let request = world.dump_request(&target);
    world.criu.dump(request, &mut ()).await.unwrap();
    target.child.wait().await;
    let mut before = String::new();
    reader.read_to_string(&mut before).unwrap();

    let (reader, writer) = std::io::pipe().unwrap();
    let mut request = world.restore_request();
    request.inherit = vec![Inherit { key: name.to_str().unwrap().to_owned(), fd: writer.into() }];
    let restored = world.criu.restore(request, &mut ()).await.unwrap();
    let target = Target::of(restored.root, &world);
    target.runs().await;
    let mut reader = BufReader::new(reader);
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    let last: u64 = before.lines().last().unwrap().parse().unwrap();
    assert_eq!(first.trim().parse::<u64>().unwrap(), last + 1);
    target.kill().await;
    // The pipe is held neither by this process nor by leftovers of CRIU.
    reader.read_to_string(&mut first).unwrap();
}

async fn a_restored_terminal_comes_with_its_master(world: World) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let slave = rustix::pty::ptsname(&master, vec![]).unwrap().into_string().unwrap();
    let slave = std::fs::File::options().read(true).write(true).open(slave).unwrap();
    let mut command = world.command(&["setsid", "--ctty"], &["echo"]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let target = world.started(&mut command).await;
    drop(command);
    let options = Options { orphan_pts_master: true, ..Options::default() };
    let mut request = world.dump_request(&target);
    request.options = options.clone();
    world.criu.dump(request, &mut ()).await.unwrap();
    target.child.wait().await;
    drop(master);

    let mut request = world.restore_request();
    request.options = options;
    let mut notify = Saboteur::none();
    let restored = world.criu.restore(request, &mut notify).await.unwrap();
    let target = Target::of(restored.root, &world);
    target.runs().await;
    let mut master = std::fs::File::from(notify.terminal.take().unwrap());
    let mut line = String::new();
    BufReader::new(master.try_clone().unwrap()).read_line(&mut line).unwrap();
    line.trim().parse::<u64>().unwrap();
    // The controlling terminal, as before: ^C ends the target.
    master.write_all(b"\x03").unwrap();
    let drain = std::thread::spawn(move || std::io::copy(&mut master, &mut std::io::sink()));
    assert_ne!(target.child.wait().await.code, 0);
    // EIO: nobody holds the other end any more.
    drain.join().unwrap().unwrap_err();
}

async fn an_image_can_be_read(world: World) {
    world.dumped(&["memory"]).await;
    let found = images::inspect(&world.path("images")).unwrap();
    assert_eq!((found.version, found.plugins, found.tcp_close), (2, Some(vec![]), false));
    until("everything to end", || crate::world::children().is_empty()).await;
}
