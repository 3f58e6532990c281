//! Common failures, and the lines for users.

use criu::{Criu, Options};
use rustix::process::Signal;

use crate::world::{Sentence, Target, World, chain, sentence};

pub(crate) fn sentences() -> Vec<Sentence> {
    let mut sentences = vec![
        sentence!(a_missing_criu_is_named),
        sentence!(a_process_that_is_not_there_is_named),
        sentence!(a_file_that_grew_after_the_dump_is_named),
        sentence!(a_file_that_was_removed_after_the_dump_is_named),
        sentence!(a_pid_that_is_in_use_is_named),
        sentence!(a_directory_without_an_image_is_named),
        sentence!(damaged_images_are_refused_and_nothing_is_left),
        sentence!(a_tcp_connection_may_be_kept),
    ];
    for (thing, said) in [
        ("tcp", "the process has an established TCP connection"),
        ("unix", "a unix socket whose other end is outside"),
        ("io_uring", "io_uring"),
        ("lock", "holds a file lock"),
        ("ghost", "count.ghost is larger than what may be stored"),
        ("linked", "count.linked has no name any more"),
        ("traced", "is traced by another process"),
        ("fuse", "has a file open that CRIU cannot dump"),
    ] {
        let name = format!("a dump of a process with {thing} is refused with a reason, and it runs on");
        sentences.push(Sentence::new(name, move |world| Box::pin(refused(world, thing, said))));
    }
    sentences
}

async fn refused(world: World, thing: &'static str, said: &'static str) {
    let listener = std::os::unix::net::UnixListener::bind(world.path("socket")).unwrap();
    if thing == "fuse" {
        let device = rustix::fs::makedev(10, 229);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let path = world.path("count.fuse");
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::CharacterDevice, mode, device).unwrap();
    }
    let target = world.target(&[thing]).await;
    let _outside = (thing == "unix").then(|| listener.accept().unwrap());
    let error = world.criu.dump(world.dump_request(&target), &mut ()).await.unwrap_err();
    let line = chain(&error);
    assert!(line.contains(said), "{line}");
    assert!(!line.contains('\n') && line.contains(&target.child.pid().to_string()), "{line}");
    assert!(line.contains(&format!("(log: {})", world.path("work/dump.log").display())), "{line}");
    world.is_clean(&world.path("images")).await;
    target.runs().await;
    target.kill().await;
}

async fn a_missing_criu_is_named(world: World) {
    let criu = Criu::at("/nowhere/criu", world.reaper.clone());
    let error = criu.version().await.unwrap_err();
    assert_eq!(chain(&error), "criu is not installed: there is no /nowhere/criu");
    let target = world.target(&[]).await;
    let error = criu.dump(world.dump_request(&target), &mut ()).await.unwrap_err();
    assert!(chain(&error).ends_with("criu is not installed: there is no /nowhere/criu"), "{}", chain(&error));
    target.runs().await;
    target.kill().await;
}

async fn a_process_that_is_not_there_is_named(world: World) {
    let target = world.target(&[]).await;
    let request = world.dump_request(&target);
    let pid = target.child.pid();
    target.kill().await;
    let error = world.criu.dump(request, &mut ()).await.unwrap_err();
    assert!(chain(&error).contains(&format!("there is no process {pid}")), "{}", chain(&error));
}

async fn restore_error(world: &World) -> String {
    let error = world.criu.restore(world.restore_request(), &mut ()).await.unwrap_err();
    assert_eq!(crate::world::children(), [] as [i32; 0]);
    chain(&error)
}

async fn a_file_that_grew_after_the_dump_is_named(world: World) {
    world.dumped(&["size"]).await;
    std::fs::write(world.path("count.size"), "longer").unwrap();
    let line = restore_error(&world).await;
    assert!(line.contains("count.size has changed since the dump: its size is 6 (expect 1)"), "{line}");
}

async fn a_file_that_was_removed_after_the_dump_is_named(world: World) {
    world.dumped(&["size"]).await;
    std::fs::remove_file(world.path("count.size")).unwrap();
    let line = restore_error(&world).await;
    assert!(line.contains("count.size, which the dumped process had open, cannot be opened"), "{line}");
}

async fn a_pid_that_is_in_use_is_named(world: World) {
    let target = world.target(&[]).await;
    let mut request = world.dump_request(&target);
    request.leave_running = true;
    world.criu.dump(request, &mut ()).await.unwrap();
    let error = world.criu.restore(world.restore_request(), &mut ()).await.unwrap_err();
    let line = chain(&error);
    assert!(line.contains(&format!("pid {}, which the dumped process had, is in use", target.child.pid())), "{line}");
    // The process with the pid is not touched.
    target.runs().await;
    target.kill().await;
}

async fn a_directory_without_an_image_is_named(world: World) {
    let line = restore_error(&world).await;
    assert!(line.ends_with("images holds no checkpoint: there is no inventory.img"), "{line}");
}

async fn damaged_images_are_refused_and_nothing_is_left(world: World) {
    world.dumped(&["child"]).await;
    let images = world.path("images");
    let mut names = crate::world::names(&images);
    names.sort();
    let mut refused = 0;
    for name in names {
        let path = images.join(&name);
        let whole = std::fs::read(&path).unwrap();
        for damaged in [whole[..whole.len() / 2].to_vec(), vec![0xff; whole.len()], b"\0".repeat(whole.len())] {
            std::fs::write(&path, damaged).unwrap();
            match world.criu.restore(world.restore_request(), &mut ()).await {
                Err(_) => refused += 1,
                // Some damage does not matter to CRIU, such as in a file of statistics or in
                // memory.
                Ok(restored) => {
                    let _ = restored.root.signal(Signal::KILL);
                    restored.root.wait().await;
                }
            }
            crate::world::until("nothing to be left", || crate::world::children().iter().all(|pid| kill(*pid))).await;
        }
        std::fs::write(&path, whole).unwrap();
    }
    assert!(refused >= 10, "{refused}");
    world.restored().await.kill().await;
}

/// Kills an orphan of a restored root with damaged memory. Returns false: the process was there.
fn kill(pid: i32) -> bool {
    let _ = rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::KILL);
    false
}

async fn a_tcp_connection_may_be_kept(world: World) {
    let target = world.target(&["tcp"]).await;
    let options = Options { tcp_established: true, ..Options::default() };
    let mut request = world.dump_request(&target);
    request.options = options.clone();
    world.criu.dump(request, &mut ()).await.unwrap();
    target.child.wait().await;
    let mut request = world.restore_request();
    request.options = options;
    let restored = world.criu.restore(request, &mut ()).await.unwrap();
    let target = Target::of(restored.root, &world);
    target.runs().await;
    target.kill().await;
}
