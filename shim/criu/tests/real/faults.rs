//! Failing callbacks, a dying criu, and clients that disconnect.

use async_trait::async_trait;
use criu::{BoxError, CallError, DumpError, NetworkLock, NotifyRestore, OnKilled, RestoreError, RestoreRequest, Stage};
use reaper::Child;
use rustix::process::{Pid, Signal};

use crate::life::with_pid_namespace;
use crate::world::{
    Does, Saboteur, Sentence, Target, World, chain, children, children_of, criu_pids, names, sentence, until,
};

pub(crate) fn sentences() -> Vec<Sentence> {
    let mut sentences = vec![
        sentence!(a_tree_survives_criu_killed_while_it_reads_memory),
        sentence!(a_cgroup_that_criu_froze_is_thawed_when_criu_is_killed),
        sentence!(a_cgroup_that_was_frozen_before_stays_frozen),
        sentence!(a_network_that_criu_blocked_works_again_however_the_dump_fails),
        sentence!(what_lay_in_the_images_directory_is_not_removed),
        sentence!(a_directory_with_an_image_is_not_dumped_into),
    ];
    for does in [Does::Fail, Does::KillCriu, Does::Hang] {
        for stage in [Stage::PreDump, Stage::QueryExternalFiles, Stage::PostDump] {
            let name = format!("a tree runs on when a dump's {stage} {}", said(does));
            sentences.push(Sentence::new(name, move |world| Box::pin(sabotaged_dump(world, stage, does))));
        }
        for stage in [Stage::PreRestore, Stage::PostRestore, Stage::PreResume, Stage::PostResume] {
            let name = format!("nothing is left, and a second try works, when a restore's {stage} {}", said(does));
            sentences.push(Sentence::new(name, move |world| Box::pin(sabotaged_restore(world, stage, does, false))));
        }
        for stage in [
            Stage::PreRestore,
            Stage::SetupNamespaces,
            Stage::PostSetupNamespaces,
            Stage::PostRestore,
            Stage::PreResume,
            Stage::PostResume,
        ] {
            let name = format!("nothing is left of a pid namespace when a restore's {stage} {}", said(does));
            sentences.push(Sentence::new(name, move |world| Box::pin(sabotaged_restore(world, stage, does, true))));
        }
        let name = format!("nothing is left of a frozen tree when a restore's pre-resume {}", said(does));
        sentences.push(Sentence::new(name, move |world| Box::pin(sabotaged_restore_of_a_frozen_tree(world, does))));
    }
    sentences
}

fn said(does: Does) -> &'static str {
    match does {
        Does::Fail => "fails",
        Does::KillCriu => "finds criu killed",
        Does::Hang => "hangs and the call is cancelled",
    }
}

async fn sabotaged_dump(world: World, stage: Stage, does: Does) {
    let target = world.target(&["child", "threads"]).await;
    let request = world.dump_request(&target);
    let mut notify = Saboteur::at(stage.clone(), does);
    let hangs = notify.hangs.clone();
    let stands = stage == Stage::PostDump && does == Does::KillCriu;
    tokio::select! {
        result = world.criu.dump(request, &mut notify) => expect(&result.unwrap_err(), &stage, does),
        () = hangs.notified() => {}
    }
    if stands {
        // The callback had succeeded: then the images are kept, whatever became of the tree.
        assert!(names(&world.path("images")).contains(&"inventory.img".to_owned()));
        until("criu to end", || criu_pids().is_empty()).await;
    } else {
        world.is_clean(&world.path("images")).await;
    }
    target.runs().await;
    if !stands {
        // A dump works after all that.
        world.criu.dump(world.dump_request(&target), &mut ()).await.unwrap();
        target.child.wait().await;
        world.restored().await.kill().await;
    } else {
        target.kill().await;
    }
}

fn expect(error: &DumpError, stage: &Stage, does: Does) {
    let DumpError::Criu { source, .. } = error else { panic!("{}", chain(error)) };
    expect_call(source, stage, does);
}

fn expect_call(error: &CallError, stage: &Stage, does: Does) {
    match (does, error) {
        (Does::Fail, CallError::Notify { stage: at, source }) => {
            assert_eq!((at, source.to_string().as_str()), (stage, "sabotage"));
        }
        (Does::KillCriu, CallError::Died { exit, stage: at, .. }) => {
            assert_eq!((exit.code, at.as_ref()), (128 + 9, Some(stage)));
        }
        _ => panic!("{}", chain(error)),
    }
}

async fn sabotaged_restore(world: World, stage: Stage, does: Does, namespace: bool) {
    if namespace {
        let (outer, inner) = with_pid_namespace(&world).await;
        world.criu.dump(world.dump_request(&inner), &mut ()).await.unwrap();
        outer.child.wait().await;
        inner.child.wait().await;
    } else {
        world.dumped(&["child", "threads"]).await;
    }
    let mut notify = Saboteur::at(stage.clone(), does);
    let hangs = notify.hangs.clone();
    tokio::select! {
        result = world.criu.restore(world.restore_request(), &mut notify) => {
            let RestoreError::Criu { source, .. } = result.unwrap_err() else { panic!("{stage}") };
            expect_call(&source, &stage, does);
        }
        () = hangs.notified() => {}
    }
    until("the half-restored tree to end", || children().is_empty()).await;
    let target = world.restored().await;
    target.runs().await;
    target.kill().await;
}

/// A restore with a tree frozen in pre-resume, before the sabotage.
struct Frozen {
    cgroup: Cgroup,
    saboteur: Saboteur,
}

#[async_trait]
impl NotifyRestore for Frozen {
    async fn started(&mut self, criu: &Child) -> Result<(), BoxError> {
        self.saboteur.started(criu).await
    }

    async fn post_restore(&mut self, root: &Child) -> Result<(), BoxError> {
        self.cgroup.take(root.pid());
        Ok(())
    }

    async fn pre_resume(&mut self) -> Result<(), BoxError> {
        self.cgroup.freeze(true);
        self.saboteur.pre_resume().await
    }
}

async fn sabotaged_restore_of_a_frozen_tree(world: World, does: Does) {
    world.dumped(&["child", "threads"]).await;
    let cgroup = Cgroup::new();
    let path = cgroup.0.clone();
    let thaw = OnKilled::new(move || Cgroup(path.clone()).freeze(false));
    let mut notify = Frozen { cgroup, saboteur: Saboteur::at(Stage::PreResume, does) };
    let hangs = notify.saboteur.hangs.clone();
    let request = RestoreRequest { on_killed: Some(thaw), ..world.restore_request() };
    tokio::select! {
        result = world.criu.restore(request, &mut notify) => {
            let RestoreError::Criu { source, .. } = result.unwrap_err() else { panic!("{does:?}") };
            expect_call(&source, &Stage::PreResume, does);
        }
        () = hangs.notified() => {}
    }
    until("the half-restored tree to end", || children().is_empty()).await;
    notify.cgroup.remove().await;
    let target = world.restored().await;
    target.runs().await;
    target.kill().await;
}

async fn a_tree_survives_criu_killed_while_it_reads_memory(world: World) {
    let target = world.target(&["memory", "child"]).await;
    let images = world.folder("images");
    let request = world.dump_request(&target);
    let mut notify = ();
    let dump = world.criu.dump(request, &mut notify);
    let kill = async {
        let reading = || names(&images).iter().any(|name| name.starts_with("pages-"));
        until("criu to read memory", reading).await;
        for pid in criu_pids() {
            rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
    };
    let (result, ()) = tokio::join!(dump, kill);
    let DumpError::Criu { source: CallError::Died { .. }, .. } = result.unwrap_err() else { panic!() };
    world.is_clean(&images).await;
    target.runs().await;
    target.kill().await;
}

/// A freezer cgroup, removed on drop.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn with(target: &Target) -> Self {
        let cgroup = Self::new();
        cgroup.take(target.child.pid());
        cgroup
    }

    fn new() -> Self {
        let name = format!("criu-real-{}", std::process::id());
        let parent = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup"];
        let parent = parent.into_iter().find(|path| std::path::Path::new(path).join("cgroup.procs").exists());
        let path = std::path::Path::new(parent.unwrap()).join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Moves a process and all children here.
    fn take(&self, pid: i32) {
        for pid in [vec![pid], children_of(pid)].concat() {
            std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    }

    fn freeze(&self, freeze: bool) {
        let v1 = self.0.join("freezer.state");
        if v1.exists() {
            std::fs::write(v1, if freeze { "FROZEN" } else { "THAWED" }).unwrap();
        } else {
            std::fs::write(self.0.join("cgroup.freeze"), if freeze { "1" } else { "0" }).unwrap();
        }
    }

    fn is_frozen(&self) -> bool {
        let v1 = std::fs::read_to_string(self.0.join("freezer.state"));
        match v1 {
            Ok(state) => state.trim() != "THAWED",
            Err(_) => std::fs::read_to_string(self.0.join("cgroup.freeze")).unwrap().trim() == "1",
        }
    }

    async fn remove(self) {
        until("the cgroup to be empty", || std::fs::remove_dir(&self.0).is_ok()).await;
    }
}

async fn a_cgroup_that_criu_froze_is_thawed_when_criu_is_killed(world: World) {
    let target = world.target(&["child"]).await;
    let cgroup = Cgroup::with(&target);
    let mut request = world.dump_request(&target);
    request.freeze_cgroup = Some(cgroup.0.clone());
    let mut notify = Saboteur::at(Stage::QueryExternalFiles, Does::KillCriu);
    let error = world.criu.dump(request, &mut notify).await.unwrap_err();
    expect(&error, &Stage::QueryExternalFiles, Does::KillCriu);
    assert!(!cgroup.is_frozen());
    target.runs().await;
    target.kill().await;
    cgroup.remove().await;
}

async fn a_cgroup_that_was_frozen_before_stays_frozen(world: World) {
    let target = world.target(&["child"]).await;
    let cgroup = Cgroup::with(&target);
    for does in [None, Some(Does::Fail), Some(Does::KillCriu)] {
        cgroup.freeze(true);
        let mut request = world.dump_request(&target);
        request.freeze_cgroup = Some(cgroup.0.clone());
        request.leave_running = true;
        let mut notify = does.map_or_else(Saboteur::none, |does| Saboteur::at(Stage::QueryExternalFiles, does));
        let result = world.criu.dump(request, &mut notify).await;
        assert_eq!(result.is_err(), does.is_some(), "{does:?}");
        assert!(cgroup.is_frozen(), "{does:?}");
        cgroup.freeze(false);
        target.runs().await;
        std::fs::remove_dir_all(world.path("images")).unwrap();
    }
    target.kill().await;
    cgroup.remove().await;
}

async fn a_network_that_criu_blocked_works_again_however_the_dump_fails(world: World) {
    let inside = ["unshare", "--net", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh", "setsid"];
    let mut command = world.command(&inside, &["talk"]);
    let target = world.started(&mut command).await;
    for lock in [NetworkLock::Iptables, NetworkLock::Nftables] {
        for does in [Does::Fail, Does::KillCriu, Does::Hang] {
            let mut request = world.dump_request(&target);
            request.options.empty_network_namespace = true;
            request.options.network_lock = Some(lock);
            // The first stage after the network is blocked.
            let mut notify = Saboteur::at(Stage::QueryExternalFiles, does);
            let hangs = notify.hangs.clone();
            tokio::select! {
                result = world.criu.dump(request, &mut notify) => {
                    expect(&result.unwrap_err(), &Stage::QueryExternalFiles, does);
                }
                () = hangs.notified() => {}
            }
            assert!(notify.seen.contains(&Stage::NetworkLock), "{:?}", notify.seen);
            target.runs().await;
            until("the dump to be undone", || children().len() == 1).await;
            std::fs::remove_dir_all(world.path("images")).unwrap();
        }
    }
    target.kill().await;
}

async fn what_lay_in_the_images_directory_is_not_removed(world: World) {
    let target = world.target(&[]).await;
    let images = world.folder("images");
    for name in ["kept.img", "descriptors.json"] {
        std::fs::write(images.join(name), "kept").unwrap();
    }
    let mut notify = Saboteur::at(Stage::PostDump, Does::Fail);
    world.criu.dump(world.dump_request(&target), &mut notify).await.unwrap_err();
    let mut left = names(&images);
    left.sort();
    assert_eq!(left, ["descriptors.json", "kept.img"]);
    target.kill().await;
}

async fn a_directory_with_an_image_is_not_dumped_into(world: World) {
    let target = world.target(&[]).await;
    let mut request = world.dump_request(&target);
    request.leave_running = true;
    world.criu.dump(request.clone(), &mut ()).await.unwrap();
    let before = names(&world.path("images")).len();
    let error = world.criu.dump(request, &mut ()).await.unwrap_err();
    assert!(error.to_string().contains("holds a checkpoint already"), "{error}");
    assert_eq!(names(&world.path("images")).len(), before);
    target.kill().await;
}
