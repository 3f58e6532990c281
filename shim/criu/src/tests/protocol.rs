//! Conversations.

use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use protobuf::Message;
use reaper::Reaper;
use rust_criu::rust_criu_protobuf::rpc::Criu_req;
use tempfile::TempDir;

use super::{fake, formats};
use crate::*;

/// Lock for one test at a time: all tests share one process's children.
static ONE: Mutex<()> = Mutex::new(());

struct Bed {
    folder: TempDir,
    criu: Criu,
}

impl Bed {
    fn request(&self) -> DumpRequest {
        DumpRequest { pid: 17, images_dir: self.folder.path().to_owned(), ..DumpRequest::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn dump(&self, notify: &mut dyn NotifyDump) -> Result<Dumped, DumpError> {
        self.criu.dump(self.request(), notify).await
    }

    async fn dump_error(&self) -> String {
        let error = self.dump(&mut ()).await.unwrap_err();
        chain(&error)
    }
}

fn with<F: Future<Output = ()>>(part: &str, test: impl FnOnce(Bed) -> F) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let folder = TempDir::new().unwrap();
        let criu = Criu::at(fake::criu(folder.path(), part), Reaper::start().unwrap());
        // A hang is a failure.
        tokio::time::timeout(Duration::from_secs(120), test(Bed { folder, criu })).await.unwrap();
    });
}

fn chain(error: &dyn std::error::Error) -> String {
    let source = error.source().map(|source| format!(": {}", chain(source)));
    format!("{error}{}", source.unwrap_or_default())
}

/// Recorder of calls, with a failure or a wait at one stage.
#[derive(Default)]
struct Recorder {
    seen: Vec<&'static str>,
    fails_at: &'static str,
    waits_at: &'static str,
    waits: Arc<tokio::sync::Notify>,
}

impl Recorder {
    async fn reach(&mut self, stage: &'static str) -> Result<(), BoxError> {
        self.seen.push(stage);
        if stage == self.waits_at {
            self.waits.notify_one();
            std::future::pending::<()>().await;
        }
        if stage == self.fails_at { Err("no".into()) } else { Ok(()) }
    }
}

#[async_trait]
impl NotifyDump for Recorder {
    async fn pre_dump(&mut self) -> Result<(), BoxError> {
        self.reach("pre-dump").await
    }
    async fn network_lock(&mut self) -> Result<(), BoxError> {
        self.reach("network-lock").await
    }
    async fn query_external_files(&mut self) -> Result<Vec<String>, BoxError> {
        self.reach("query-ext-files").await?;
        Ok(vec!["file[1:2]".to_owned()])
    }
    async fn post_dump(&mut self) -> Result<(), BoxError> {
        self.reach("post-dump").await
    }
    async fn network_unlock(&mut self) -> Result<(), BoxError> {
        self.reach("network-unlock").await
    }
}

#[test]
fn callbacks_are_called_in_the_order_of_the_notifications_and_unknown_ones_are_acknowledged() {
    with("orderly", async |bed| {
        let mut notify = Recorder::default();
        let dumped = bed.dump(&mut notify).await.unwrap();
        assert_eq!(notify.seen, ["pre-dump", "network-lock", "query-ext-files", "post-dump", "network-unlock"]);
        assert_eq!(dumped.log, bed.path("dump.log"));
    });
}

#[test]
fn the_request_says_what_was_asked_for_and_nothing_else() {
    with("orderly", async |bed| {
        let mut request = bed.request();
        request.leave_running = true;
        request.root = Some("/root/fs".into());
        request.external_mounts = vec![ExternalMount { key: "/etc/hosts".to_owned(), value: "/etc/hosts".to_owned() }];
        request.external = vec![External::Namespace { kind: Namespace::Network, inode: 4026531840 }];
        request.options.tcp_established = true;
        request.options.manage_cgroups = Some(CgroupMode::Default);
        request.options.empty_network_namespace = true;
        bed.criu.dump(request, &mut ()).await.unwrap();
        let sent = Criu_req::parse_from_bytes(&std::fs::read(bed.path("request")).unwrap()).unwrap();
        let opts = sent.opts.unwrap();
        assert_eq!(opts.pid, Some(17));
        assert_eq!(opts.root(), "/root/fs");
        assert_eq!((opts.leave_running, opts.tcp_established, opts.tcp_close), (Some(true), Some(true), None));
        assert_eq!((opts.notify_scripts, opts.log_level, opts.log_file()), (Some(true), Some(4), "dump.log"));
        assert_eq!(opts.external, ["net[4026531840]:extRootNetNS"]);
        assert_eq!((opts.ext_mnt[0].key(), opts.ext_mnt[0].val()), ("/etc/hosts", "/etc/hosts"));
        assert_eq!((opts.empty_ns, opts.manage_cgroups_mode.map(|mode| mode.value())), (Some(0x4000_0000), Some(6)));
        assert_eq!((opts.ghost_limit, opts.shell_job), (None, None));
    });
}

#[test]
fn criu_gets_its_socket_and_no_other_descriptor_environment_or_plugin() {
    with("orderly", async |bed| {
        let flags = rustix::fs::OFlags::RDONLY;
        // A descriptor that stays open across an exec.
        let leaky = rustix::fs::open("/etc/passwd", flags, rustix::fs::Mode::empty()).unwrap();
        bed.dump(&mut ()).await.unwrap();
        drop(leaky);
        let descriptors = std::fs::read_to_string(bed.path("descriptors")).unwrap();
        assert!(!descriptors.contains("passwd"), "{descriptors}");
        assert!(descriptors.contains("0 /dev/null") && descriptors.contains("3 socket:["), "{descriptors}");
        assert!(descriptors.contains("1 /memfd:criu-output") && descriptors.contains("2 /memfd:"), "{descriptors}");
        let environment = std::fs::read_to_string(bed.path("environment")).unwrap();
        let names = environment.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name);
        let of_the_script = ["PWD", "SHLVL", "_", "OLDPWD", "FAKE_CRIU_PART", "FAKE_CRIU_ARGS"];
        let mut names: Vec<&str> = names.filter(|name| !of_the_script.contains(name)).collect();
        names.sort_unstable();
        assert_eq!(names, ["CRIU_LIBS_DIR", residue::MARKER, "LC_ALL", "PATH"]);
        let arguments = std::fs::read_to_string(bed.path("arguments")).unwrap();
        assert_eq!(arguments, "--libdir /proc/self/fdinfo swrk 3");
    });
}

#[test]
fn a_failed_callback_is_refused_and_its_error_is_kept_while_the_network_is_still_unlocked() {
    with("half", async |bed| {
        let mut notify = Recorder { fails_at: "post-dump", ..Recorder::default() };
        let error = bed.dump(&mut notify).await.unwrap_err();
        assert_eq!(chain(&error), "cannot dump process 17: post-dump failed: no");
        assert_eq!(notify.seen, ["pre-dump", "post-dump", "network-unlock"]);
        assert!(!bed.path("inventory.img").exists() && !bed.path("core-1.img").exists());
    });
}

#[test]
fn a_cancelled_dump_leaves_no_criu_and_no_half_dump() {
    with("half", async |bed| {
        let mut notify = Recorder { waits_at: "post-dump", ..Recorder::default() };
        let waits = notify.waits.clone();
        tokio::select! {
            _ = bed.dump(&mut notify) => panic!("it waits"),
            () = waits.notified() => {}
        }
        while bed.path("inventory.img").exists() || bed.path("core-1.img").exists() || criu_runs() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
}

#[test]
fn a_criu_that_does_not_hear_of_the_cancellation_is_killed() {
    with("deaf", async |bed| {
        let criu = bed.criu.clone().cancel_grace(Duration::from_millis(20));
        let mut notify = Recorder { waits_at: "pre-dump", ..Recorder::default() };
        let waits = notify.waits.clone();
        tokio::select! {
            _ = criu.dump(bed.request(), &mut notify) => panic!("it waits"),
            () = waits.notified() => {}
        }
        while bed.path("core-1.img").exists() || criu_runs() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
}

/// Returns whether this process has any child.
fn criu_runs() -> bool {
    !proc::children(proc::HostPid::own()).is_empty()
}

#[test]
fn a_criu_that_dies_is_reported_with_its_signal_the_stage_and_its_last_words() {
    with("dies", async |bed| {
        let log = bed.path("dump.log");
        let line = format!(
            "cannot dump process 17: criu was killed by signal 6 after pre-dump: it hurts (log: {})",
            log.display()
        );
        assert_eq!(bed.dump_error().await, line);
    });
}

#[test]
fn a_refusal_carries_the_errors_of_the_log_without_the_harmless_ones() {
    with("fails", async |bed| {
        let log = bed.path("dump.log");
        let line = format!(
            "cannot dump process 17: criu failed (Invalid argument (os error 22)): something new; Dumping FAILED. \
             (log: {})",
            log.display()
        );
        assert_eq!(bed.dump_error().await, line);
    });
}

#[test]
fn a_request_that_criu_does_not_understand_is_a_refusal() {
    with("baffled", async |bed| {
        assert_eq!(bed.dump_error().await, "cannot dump process 17: criu failed: Invalid req");
    });
}

#[test]
fn garbage_for_an_answer_is_an_error() {
    for (part, said) in [
        ("garbles", "read its answer before its first stage: "),
        ("shouts", "it is longer than 65536 bytes"),
        ("confuses", "it answers DUMP with CHECK"),
    ] {
        with(part, async |bed| {
            let line = bed.dump_error().await;
            assert!(line.contains(said), "{line}");
            assert!(proc::children(proc::HostPid::own()).is_empty());
        });
    }
}

#[test]
fn a_restore_that_names_no_process_or_a_foreign_one_fails() {
    for (part, said) in [("anonymous", "it did not name the restored process"), ("strangers", "post-restore failed: ")]
    {
        with(part, async |bed| {
            formats::write_image(bed.folder.path());
            let images_dir = bed.folder.path().to_owned();
            let request = RestoreRequest { images_dir, ..RestoreRequest::default() };
            let error = bed.criu.restore(request, &mut ()).await.unwrap_err();
            assert!(chain(&error).contains(said), "{}", chain(&error));
        });
    }
}

#[test]
fn the_version_is_asked_for() {
    with("orderly", async |bed| {
        assert_eq!(bed.criu.version().await.unwrap().to_string(), "4.2.1");
    });
}

#[test]
fn a_criu_that_is_not_there_or_cannot_be_executed_is_named() {
    with("orderly", async |bed| {
        let reaper = bed.criu.reaper.clone();
        let missing = Criu::at(bed.path("none"), reaper.clone()).version().await.unwrap_err();
        assert_eq!(missing.to_string(), format!("criu is not installed: there is no {}", bed.path("none").display()));
        let folder = Criu::at(bed.folder.path(), reaper).version().await.unwrap_err();
        assert!(matches!(folder, CallError::Start { .. }), "{folder}");
    });
}
