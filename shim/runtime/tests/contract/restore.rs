//! Containers restored from checkpoints.

use std::fs;

use oci_spec::runtime::{LinuxMemoryBuilder, Spec};
use runtime::Allow;
use rustix::process::{Pid, Signal};

use crate::bed::{Bed, sentences};
use crate::checkpoint::{COUNTER, counter, counter_as, counts_on};
use crate::image::{Image, chain};
use crate::limits;
use crate::spec::{Edit, hook, mount, process, shell};
use crate::terminal::Console;
use crate::world::Which;

sentences![
    a_restored_container_goes_on_where_it_was,
    a_restored_container_has_a_new_id_and_cgroup,
    exec_pause_resume_update_kill_and_delete_work_after_a_restore,
    a_restored_container_is_a_child_in_a_session_of_its_own,
    a_restored_container_keeps_its_limits,
    output_goes_to_the_new_streams,
    a_terminal_is_handed_over_again,
    a_container_is_restored_several_times_at_once,
    a_restored_container_is_saved_and_restored_again,
    twenty_rounds_leave_nothing,
    a_tree_of_processes_is_restored,
    a_deleted_file_that_is_open_comes_back,
    an_exec_that_ran_at_the_checkpoint_is_not_restored,
    a_restored_container_that_wants_too_much_memory_is_killed_and_counted,
    a_checkpoint_made_by_one_runtime_is_restored_by_another,
    a_terminal_that_another_runtime_saved_is_handed_over,
    a_restore_that_fails_leaves_nothing_and_can_be_tried_again,
    a_checkpoint_is_restored_with_a_terminal_only_where_it_has_one,
];

async fn a_restored_container_goes_on_where_it_was(bed: &Bed) {
    // Once into the same bundle, and once by itself in between. A pause without a program: a shell
    // in a vfork cannot be dumped.
    let script = "n=0; while :; do n=$((n+1)); echo $n; read -t 0.01 line; done";
    let bundle = bed.bundle(&bed.savable(&shell(script)));
    let running = bundle.start().await;
    running.says("\n10\n").await;
    let (image, ended) = bundle.swap_out(running).await;
    let last: u32 = ended.stdout.lines().last().unwrap().parse().unwrap();
    let running = bundle.restore(&image).await;
    running.says(&format!("{}\n", last + 20)).await;
    let said = running.pipes.stdout.so_far();
    let numbers: Vec<u32> = said.lines().take(20).map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers, (last + 1..=last + 20).collect::<Vec<_>>());
    bundle.kill(running).await;
}

async fn a_restored_container_has_a_new_id_and_cgroup(bed: &Bed) {
    let (first, running) = counter(bed).await;
    let image = first.checkpoint(&running).await;
    let second = bed.bundle(&bed.savable(&shell(COUNTER)));
    let other = second.restore(&image).await;
    assert_ne!(running.child.pid(), other.child.pid());
    for (bundle, running) in [(&first, &running), (&second, &other)] {
        let cgroup = cgroup::Cgroup::of_process(running.child.process()).unwrap();
        assert_eq!(cgroup.pids().unwrap(), [running.child.process()]);
        limits::assert_in_its_cgroup(bundle, &running.child);
        let root = fs::metadata(bundle.rootfs().join("etc/hostname")).unwrap();
        let inside = fs::metadata(format!("/proc/{}/root/etc/hostname", running.child.pid())).unwrap();
        let inode = |data: &fs::Metadata| {
            (std::os::unix::fs::MetadataExt::dev(data), std::os::unix::fs::MetadataExt::ino(data))
        };
        assert_eq!(inode(&root), inode(&inside), "its root is its own");
    }
    for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "uts"] {
        let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(running.child.pid()), of(other.child.pid()), "{namespace}");
        if namespace != "cgroup" {
            assert_ne!(of(std::process::id().try_into().unwrap()), of(other.child.pid()), "{namespace}");
        }
    }
    counts_on(&second, other, 2).await;
    counts_on(&first, running, 2).await;
}

async fn exec_pause_resume_update_kill_and_delete_work_after_a_restore(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    let (image, _) = bundle.swap_out(running).await;
    let running = bundle.restore(&image).await;
    let pid = running.child.pid();
    // Exec, in the container's namespaces and cgroup.
    let exec = bundle.exec(&process(&["/bin/sh", "-c", "echo up; read line; exit 9"])).await.unwrap();
    exec.says("up").await;
    for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_eq!(of(exec.child.pid()), of(pid), "{namespace}");
    }
    let cgroup = |pid: i32| -> Vec<String> {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        // Beside v1, crun ignores the unified hierarchy (world.rs), where CRIU puts restored
        // processes.
        let lines = cgroup.lines().filter(|line| bed.which != Which::Crun || !line.starts_with("0::"));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(cgroup(exec.child.pid()), cgroup(pid));
    assert_eq!(exec.end().await.code, 9);
    // Pause and resume.
    bed.runtime.pause(&bundle.id).await.unwrap();
    assert!(cgroup::Cgroup::of_process(running.child.process()).unwrap().is_frozen().unwrap());
    let error = bundle.exec(&process(&["true"])).await.err().unwrap().to_string();
    assert!(error.contains("paused"), "{error}");
    bed.runtime.resume(&bundle.id).await.unwrap();
    running.tell("on");
    running.says("2 on\n").await;
    // Update.
    bed.runtime.update(&bundle.id, &limits::limits(48 << 20, 70)).await.unwrap();
    assert_eq!((limits::memory(&bundle).as_str(), limits::pids(&bundle).as_str()), ("50331648", "70"));
    // The id is taken, and the container cannot be started.
    bed.runtime.start(&bundle.id).await.unwrap_err();
    let error = bundle.create().await.err().unwrap().to_string();
    assert!(error.contains("exist"), "{error}");
    let error = bundle.restore_allowing(&image, Allow::default()).await.err().unwrap().to_string();
    assert!(error.contains("exist"), "{error}");
    assert_eq!(running.child.exit(), None);
    // Kill and delete, and delete of a running container.
    running.child.signal(Signal::KILL).unwrap();
    assert_eq!(running.end().await.code, 137);
    bundle.delete().await;
    let running = bundle.restore(&image).await;
    bundle.delete().await;
    assert_eq!(running.end().await.code, 137);
    assert_eq!(bed.say(&shell("echo new")).await, "new\n");
}

async fn a_restored_container_is_a_child_in_a_session_of_its_own(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    let (image, _) = bundle.swap_out(running).await;
    let running = bundle.restore(&image).await;
    let pid = Pid::from_raw(running.child.pid());
    assert_eq!(rustix::process::getsid(pid).unwrap(), pid.unwrap());
    assert_eq!(rustix::process::getpgid(pid).unwrap(), pid.unwrap());
    assert_eq!(bundle.ask("ls /proc/1/fd").await.lines().count(), 3, "and has no descriptors but three");
    counts_on(&bundle, running, 2).await;
}

async fn a_restored_container_keeps_its_limits(bed: &Bed) {
    let spec = |memory, pids| limits::with_limits(shell(COUNTER), limits::limits(memory, pids));
    let (bundle, running) = counter_as(bed, &spec(64 << 20, 50)).await;
    let (image, _) = bundle.swap_out(running).await;
    let running = bundle.restore(&image).await;
    assert_eq!((limits::memory(&bundle).as_str(), limits::pids(&bundle).as_str()), ("67108864", "50"));
    bundle.kill(running).await;
    // The limits of the new specification.
    for (memory, pids, expected) in [(32 << 20, 40, ("33554432", "40")), (96 << 20, 60, ("100663296", "60"))] {
        let other = bed.bundle(&bed.savable(&spec(memory, pids)));
        let running = other.restore(&image).await;
        assert_eq!((limits::memory(&other).as_str(), limits::pids(&other).as_str()), expected);
        counts_on(&other, running, 2).await;
    }
}

async fn output_goes_to_the_new_streams(bed: &Bed) {
    let script =
        "echo up; while read line; do echo \"out $line\"; echo \"err $line\" >&2; sh -c 'echo child'; done; exit 3";
    let (bundle, running) = {
        let bundle = bed.bundle(&bed.savable(&shell(script)));
        let running = bundle.start().await;
        running.says("up\n").await;
        (bundle, running)
    };
    let image = bundle.checkpoint(&running).await;
    let second = bed.bundle(&bed.savable(&shell(script)));
    let other = second.restore(&image).await;
    other.tell("new");
    other.says("child\n").await;
    running.tell("old");
    running.says("child\n").await;
    for (bundle, running, name, start) in [(second, other, "new", ""), (bundle, running, "old", "up\n")] {
        let ended = running.end().await;
        assert_eq!(
            (ended.code, ended.stdout, ended.stderr),
            (3, format!("{start}out {name}\nchild\n"), format!("err {name}\n"))
        );
        bundle.delete().await;
    }
}

async fn a_terminal_is_handed_over_again(bed: &Bed) {
    let spec = shell("stty -echo; tty; n=0; while read line; do n=$((n+1)); echo \"$n $line\"; done; exit 4")
        .with_process(|process| {
            process.set_terminal(Some(true));
        });
    let bundle = bed.bundle(&bed.savable(&spec));
    let console = Console::new(bed);
    let child = bundle.create_with(console.io()).await.unwrap();
    let mut master = console.master().await;
    bed.runtime.start(&bundle.id).await.unwrap();
    master.hears("/dev/").await;
    master.resize(40, 120);
    master.types("one\n");
    master.hears("1 one\r\n").await;
    let image = Image::new(bed);
    bundle.checkpoint_to(&image, &child, |_| {}).await.unwrap();
    assert_eq!(child.wait().await.code, 137);
    master.ends().await;
    bundle.delete().await;

    let console = Console::new(bed);
    let (restored, mut master) =
        tokio::join!(bundle.restore_with(&image, console.io(), Allow::default()), async { console.master().await });
    let child = restored.unwrap();
    master.types("two\n");
    assert_eq!(master.hears("2 two\r\n").await, "", "it does not echo, as before");
    master.resize(41, 121);
    assert_eq!(bundle.ask("stty size </proc/1/fd/0").await, "41 121\n");
    // Control-D.
    master.types("\u{4}");
    assert_eq!(child.wait().await.code, 4);
    master.ends().await;
    bundle.delete().await;
}

async fn a_container_is_restored_several_times_at_once(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    let (image, _) = bundle.swap_out(running).await;
    let one = async || {
        let bundle = bed.bundle(&bed.savable(&shell(COUNTER)));
        // Separate logs.
        let image = image.copy(bed);
        let running = bundle.restore(&image).await;
        counts_on(&bundle, running, 2).await;
    };
    tokio::join!(one(), one(), one());
}

async fn a_restored_container_is_saved_and_restored_again(bed: &Bed) {
    let (mut bundle, mut running) = counter(bed).await;
    for generation in 2..5 {
        let (image, _) = bundle.swap_out(running).await;
        bundle = bed.bundle(&bed.savable(&shell(COUNTER)));
        running = bundle.restore(&image).await;
        running.tell("again");
        running.says(&format!("{generation} again\n")).await;
        // Also of a running container.
        bundle.checkpoint(&running).await;
    }
    counts_on(&bundle, running, 5).await;
}

async fn twenty_rounds_leave_nothing(bed: &Bed) {
    let (bundle, mut running) = counter(bed).await;
    let mut before = None;
    for round in 2..22 {
        let (image, _) = bundle.swap_out(running).await;
        let left = before.as_ref().map_or_else(Vec::new, |before| bed.settle(before));
        assert!(left.is_empty(), "{left:?}");
        before = Some(bed.traces());
        running = bundle.restore(&image).await;
        running.tell("round");
        running.says(&format!("{round} round\n")).await;
        fs::remove_dir_all(image.images()).unwrap();
    }
    counts_on(&bundle, running, 22).await;
}

async fn a_tree_of_processes_is_restored(bed: &Bed) {
    // A child that ticks through a pipe, one in its own session, and an orphan.
    let script = "setsid sh -c 'while :; do sleep 1; done' & (sh -c 'while :; do sleep 2; done' &)
        (while read go; do echo tick; done) | (n=0; echo up; while read tick; do n=$((n+1)); echo \"$n $tick\"; done; echo end)";
    let bundle = bed.bundle(&bed.savable(&shell(script)));
    let running = bundle.start().await;
    running.says("up\n").await;
    running.tell("first");
    running.says("1 tick\n").await;
    // Without the short-lived ones.
    const PROCESSES: &str = "for p in /proc/[0-9]*; do
            read pid name state parent group session rest 2>/dev/null <$p/stat || continue
            case $name:$pid:$parent in \\(sh\\):$$:* | *:$$) ;; \\(sh\\):*) echo $pid $parent $group $session ;; esac
        done | sort";
    let before = bundle.ask(PROCESSES).await;
    assert_eq!(before.lines().count(), 5, "{before}");
    let (image, _) = bundle.swap_out(running).await;
    let running = bundle.restore(&image).await;
    assert_eq!(bundle.ask(PROCESSES).await, before);
    running.tell("second");
    running.says("2 tick\n").await;
    let ended = running.end().await;
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "2 tick\nend\n"));
    bundle.delete().await;
}

async fn a_deleted_file_that_is_open_comes_back(bed: &Bed) {
    let script = "exec 3>>/tmp/gone 4</tmp/gone; rm /tmp/gone; echo up; while read line; do echo \"$line\" >&3; cat <&4; ls /tmp; done";
    let bundle = bed.bundle(&bed.savable(&shell(script)));
    let running = bundle.start().await;
    running.says("up\n").await;
    running.tell("first");
    running.says("first\n").await;
    let (image, _) = bundle.swap_out(running).await;
    let bundle = bed.bundle(&bed.savable(&shell(script)));
    let running = bundle.restore(&image).await;
    running.tell("second");
    running.says("second\n").await;
    assert_eq!(running.end().await.stdout, "second\n");
    bundle.delete().await;
}

async fn an_exec_that_ran_at_the_checkpoint_is_not_restored(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    let exec = bundle.exec(&process(&["/bin/sh", "-c", COUNTER])).await.unwrap();
    exec.says("up\n").await;
    let (image, _) = bundle.swap_out(running).await;
    assert_eq!(exec.end().await.code, 137);
    let running = bundle.restore(&image).await;
    let cgroup = cgroup::Cgroup::of_process(running.child.process()).unwrap();
    assert_eq!(cgroup.pids().unwrap(), [running.child.process()]);
    counts_on(&bundle, running, 2).await;
}

async fn a_restored_container_that_wants_too_much_memory_is_killed_and_counted(bed: &Bed) {
    let spec = shell("echo up; read go; tail /dev/zero").with_linux(|linux| {
        let memory = LinuxMemoryBuilder::default().limit(32 << 20).swap(32 << 20).build().unwrap();
        linux.resources_mut().as_mut().unwrap().set_memory(Some(memory));
    });
    let bundle = bed.bundle(&bed.savable(&spec));
    let running = bundle.start().await;
    running.says("up\n").await;
    let (image, _) = bundle.swap_out(running).await;
    let running = bundle.restore(&image).await;
    cgroup::Cgroup::of_process(running.child.process()).unwrap().metrics().unwrap();
    limits::want_is_told(&bundle, running).await;
}

/// Returns the other runtimes able to restore this one's checkpoints, as far as present.
fn others(bed: &Bed) -> Vec<Bed> {
    // runc wants to mount a cgroup itself in a cgroup namespace; crun saves it as a mount from
    // outside.
    let possible = |which: &Which| (bed.which, *which) != (Which::Crun, Which::Runc);
    let others = Which::ALL.into_iter().filter(|which| *which != bed.which).filter(possible);
    let (here, missing): (Vec<_>, Vec<_>) = others.partition(|which| bed.world.missing(*which).is_none());
    missing.iter().for_each(|which| bed.not_tried(&format!("{which} is not here")));
    here.into_iter().map(|which| bed.beside(which)).collect()
}

/// Returns `spec`, changed for a container saved by one runtime and restored by the other.
fn exchangeable(from: &Bed, to: &Bed, spec: &Spec) -> Spec {
    let mut spec = from.savable(&to.savable(spec));
    // crun looks for a masked file by its place, and the others save it as /dev/null.
    if to.which == Which::Crun {
        spec.linux_mut().as_mut().unwrap().set_masked_paths(None);
    }
    spec
}

async fn a_checkpoint_made_by_one_runtime_is_restored_by_another(bed: &Bed) {
    for other in others(bed) {
        let spec =
            |name: &str| {
                let source = bed.folder().join(format!("{name}-{}", other.which));
                fs::create_dir(&source).unwrap();
                fs::write(source.join("file"), name).unwrap();
                let spec = shell(COUNTER)
                    .with_mount(mount("/mnt", "bind", &source, &["rbind", "rw"]))
                    .with_mount(mount("/etc/hostname", "bind", source.join("file"), &["rbind", "ro"]));
                exchangeable(bed, &other, &spec)
            };
        let (bundle, running) = counter_as(bed, &spec("old")).await;
        let (image, _) = bundle.swap_out(running).await;
        let bundle = other.bundle(&spec("new"));
        let running = bundle.restore(&image).await;
        assert_eq!(bundle.ask("cat /mnt/file /etc/hostname").await, "newnew");
        if other.which != Which::Crun {
            assert_eq!(bundle.ask("cat /proc/keys /proc/timer_list").await, "");
        }
        counts_on(&bundle, running, 2).await;
        // And back: the other one's restored container.
        if bed.which == Which::Crun {
            continue;
        }
        let running = bundle.restore(&image).await;
        let (image, _) = bundle.swap_out(running).await;
        let bundle = bed.bundle(&spec("newer"));
        if (other.which, bed.which) != (Which::Crun, Which::Runc) {
            let running = bundle.restore(&image).await;
            counts_on(&bundle, running, 2).await;
        }
    }
}

async fn a_terminal_that_another_runtime_saved_is_handed_over(bed: &Bed) {
    let spec = shell("stty -echo; tty; n=0; while read line; do n=$((n+1)); echo \"$n $line\"; done; exit 4")
        .with_process(|process| {
            process.set_terminal(Some(true));
        });
    for other in others(bed) {
        let spec = exchangeable(bed, &other, &spec);
        let bundle = bed.bundle(&spec);
        let console = Console::new(bed);
        let child = bundle.create_with(console.io()).await.unwrap();
        let mut master = console.master().await;
        bed.runtime.start(&bundle.id).await.unwrap();
        master.hears("/dev/").await;
        master.types("one\n");
        master.hears("1 one\r\n").await;
        let image = Image::new(bed);
        bundle.checkpoint_to(&image, &child, |_| {}).await.unwrap();
        child.wait().await;
        bundle.delete().await;
        let bundle = other.bundle(&spec);
        let console = Console::new(&other);
        let child = bundle.restore_with(&image, console.io(), Allow::default()).await.unwrap();
        let mut master = console.master().await;
        master.types("two\n");
        master.hears("2 two\r\n").await;
        // Control-D.
        master.types("\u{4}");
        assert_eq!(child.wait().await.code, 4);
        bundle.delete().await;
    }
}

async fn a_restore_that_fails_leaves_nothing_and_can_be_tried_again(bed: &Bed) {
    let (bundle, running) = counter(bed).await;
    let (image, _) = bundle.swap_out(running).await;
    let spec = bed.savable(&shell(COUNTER));
    let bundle = bed.bundle(&spec);

    bed.restore_refusal(&bundle, &Image::new(bed)).await;
    for name in ["inventory.img", "pstree.img", "core-1.img", "pages-1.img", "fdinfo-2.img"] {
        let spoilt = image.copy(bed);
        let path = spoilt.images().join(name);
        let length = fs::metadata(&path).unwrap().len();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
        let error = bed.restore_refusal(&bundle, &spoilt).await;
        if bed.which == Which::Libcontainer {
            assert!(error.contains(name) || error.contains("restore.log"), "{name}: {error}");
        }
    }
    let mut failing = spec.clone();
    failing.hooks_mut().get_or_insert_default().set_create_runtime(Some(vec![hook("exit 9")]));
    bundle.write(&failing);
    let error = bed.restore_refusal(&bundle, &image).await;
    if bed.which == Which::Libcontainer {
        assert!(error.contains("createRuntime") && error.contains('9'), "{error}");
    }

    bundle.write(&spec);
    let running = bundle.restore(&image).await;
    counts_on(&bundle, running, 2).await;
}

async fn a_checkpoint_is_restored_with_a_terminal_only_where_it_has_one(bed: &Bed) {
    if bed.which != Which::Libcontainer {
        return bed.not_tried("the command line takes it as it comes");
    }
    let with_terminal = bed.savable(&shell(COUNTER)).with_process(|process| {
        process.set_terminal(Some(true));
    });
    let (bundle, running) = counter(bed).await;
    let (image, _) = bundle.swap_out(running).await;
    bundle.write(&with_terminal);
    let console = Console::new(bed);
    let error = bundle.restore_with(&image, console.io(), Allow::default()).await.unwrap_err();
    assert!(chain(&error).contains("terminal"), "{}", chain(&error));

    let console = Console::new(bed);
    let child = bundle.create_with(console.io()).await.unwrap();
    let mut master = console.master().await;
    bed.runtime.start(&bundle.id).await.unwrap();
    master.hears("up\r\n").await;
    let image = Image::new(bed);
    bundle.checkpoint_to(&image, &child, |_| {}).await.unwrap();
    child.wait().await;
    bundle.delete().await;
    bundle.write(&bed.savable(&shell(COUNTER)));
    let error = bed.restore_refusal(&bundle, &image).await;
    assert!(error.contains("terminal"), "{error}");
}
