//! Tests with a script as the runtime; the contract suite covers the real runtimes.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use oci_spec::runtime::{LinuxMemoryBuilder, LinuxResourcesBuilder, ProcessBuilder};

use super::*;
use crate::Prepare;

/// A runtime made of the shell script `script`, after a preamble that parses runc's global options.
struct Bench {
    folder: tempfile::TempDir,
    command: Command,
}

const PREAMBLE: &str = r#"#!/bin/sh
echo "$@" >>"$0.calls"
log= pid_file=
while [ $# -gt 0 ]; do
  case $1 in
    --root) root=$2; shift;;
    --log) log=$2; shift;;
    --log-format) shift;;
    --systemd-cgroup) ;;
    *) break;;
  esac
  shift
done
verb=$1
while [ $# -gt 0 ]; do
  case $1 in
    --pid-file) pid_file=$2; shift;;
    --process) cp "$2" "$0.process"; shift;;
    --resources) cp "$2" "$0.resources"; shift;;
    --console-socket) echo "$2" >"$0.socket"; shift;;
  esac
  shift
done
fail() { echo "{\"level\":\"error\",\"msg\":\"$1\"}" >>"$log"; exit 1; }
"#;

impl Bench {
    fn new(reaper: &Reaper, script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let binary = folder.path().join("runc");
        fs::write(&binary, format!("{PREAMBLE}{script}")).unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        let command = Command::new(reaper.clone(), binary, folder.path().join("root"), false);
        Self { folder, command }
    }

    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.folder.path().join("runc.calls")).unwrap_or_default();
        // The scratch folder has another name each time.
        let scratch = self.folder.path().join("root/.gpusnap-");
        calls.lines().map(|call| shorten(call, scratch.to_str().unwrap())).collect()
    }

    fn written(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(format!("runc.{name}"))).unwrap()
    }

    fn is_clean(&self) -> bool {
        fs::read_dir(self.folder.path().join("root")).unwrap().next().is_none()
    }
}

fn shorten(call: &str, scratch: &str) -> String {
    let mut shortened = String::new();
    for word in call.split(' ') {
        let word = match word.strip_prefix(scratch) {
            Some(rest) => rest.split_once('/').map_or("S", |(_, name)| name),
            None => word,
        };
        shortened = if shortened.is_empty() { word.to_owned() } else { format!("{shortened} {word}") };
    }
    shortened
}

fn pipe() -> (std::io::PipeReader, OwnedFd) {
    let (read, write) = std::io::pipe().unwrap();
    (read, write.into())
}

fn null() -> OwnedFd {
    fs::File::open("/dev/null").unwrap().into()
}

fn create(io: ProcessIo) -> CreateRequest {
    CreateRequest {
        id: "web".into(),
        bundle: "/b".into(),
        io,
        no_pivot_root: false,
        no_new_keyring: false,
        prepare: Prepare::Nothing,
    }
}

fn exec(io: ProcessIo) -> ExecRequest {
    let process = ProcessBuilder::default().args(["true".to_owned()]).build().unwrap();
    ExecRequest { id: "web".into(), exec_id: "e".into(), bundle: "/b".into(), process, io, prepare: Prepare::Nothing }
}

fn nulls() -> ProcessIo {
    ProcessIo::Fds { stdin: null(), stdout: null(), stderr: null() }
}

// The tests of one process share its children: sub-reaping and P_ALL are per process, so all run as
// one.
#[tokio::test]
async fn a_runtime_that_is_a_program_is_called_and_understood() {
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).unwrap();
    let reaper = Reaper::start().unwrap();

    the_process_of_a_creation_gets_the_descriptors_and_is_adopted(&reaper).await;
    options_become_flags(&reaper).await;
    a_terminal_is_asked_for_by_its_socket(&reaper).await;
    the_reason_of_a_failure_comes_from_the_log(&reaper).await;
    without_a_log_the_reason_is_what_was_printed(&reaper).await;
    a_program_that_is_missing_is_named(&reaper).await;
    a_runtime_runs_in_the_directory_of_this_process(&reaper).await;
    a_creation_whose_pid_is_unknown_is_undone(&reaper).await;
    a_container_that_exists_is_not_undone_by_a_second_creation(&reaper).await;
    a_deletion_that_fails_after_the_state_is_gone_has_succeeded(&reaper).await;
    an_operation_goes_on_when_nobody_waits_for_it(&reaper).await;
    what_is_printed_as_features_is_parsed(&reaper).await;
    a_runtime_is_not_told_what_systemd_told_the_shim(&reaper).await;
    a_criu_that_a_killed_runtime_has_left_is_waited_for(&reaper).await;
    connections_are_allowed_to_a_runtime_that_leaves_out_those_not_accepted(&reaper).await;
}

async fn the_process_of_a_creation_gets_the_descriptors_and_is_adopted(reaper: &Reaper) {
    let bench = Bench::new(
        reaper,
        "exec 3<&0; (read line; echo \"got $line\"; echo bad >&2; exit 7) <&3 & echo $! >\"$pid_file\"",
    );
    let (stdin, mut line) = std::io::pipe().unwrap();
    let ((mut stdout, out), (mut stderr, err)) = (pipe(), pipe());
    let io = ProcessIo::Fds { stdin: stdin.into(), stdout: out, stderr: err };
    let child = bench.command.create(create(io)).await.unwrap();
    std::io::Write::write_all(&mut line, b"it\n").unwrap();
    assert_eq!(child.wait().await.code, 7);
    let (mut out, mut err) = (String::new(), String::new());
    // The end comes only after every copy of the descriptor in this process is closed.
    stdout.read_to_string(&mut out).unwrap();
    stderr.read_to_string(&mut err).unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("got it\n", "bad\n"));
    assert!(bench.is_clean());
}

async fn options_become_flags(reaper: &Reaper) {
    let script = "[ -z \"$pid_file\" ] || { sleep 600 & echo $! >\"$pid_file\"; }";
    let mut bench = Bench::new(reaper, script);
    let inner = &bench.command.inner;
    bench.command = Command::new(reaper.clone(), inner.binary.clone(), inner.root.clone(), true);
    let request = CreateRequest { no_pivot_root: true, no_new_keyring: true, ..create(nulls()) };
    let child = bench.command.create(request).await.unwrap();
    child.signal(rustix::process::Signal::KILL).unwrap();
    bench.command.start("web").await.unwrap();
    bench.command.pause("web").await.unwrap();
    bench.command.resume("web").await.unwrap();
    let memory = LinuxMemoryBuilder::default().limit(4096).build().unwrap();
    let resources = LinuxResourcesBuilder::default().memory(memory).build().unwrap();
    bench.command.update("web", &resources).await.unwrap();
    let child = bench.command.exec(exec(nulls())).await.unwrap();
    child.signal(rustix::process::Signal::KILL).unwrap();
    fs::create_dir_all(bench.folder.path().join("root/web")).unwrap();
    bench.command.delete("web").await.unwrap();
    fs::remove_dir(bench.folder.path().join("root/web")).unwrap();
    bench.command.delete("web").await.unwrap();
    let root = bench.command.inner.root.display();
    let global = format!("--root {root} --log log.json --log-format json --systemd-cgroup");
    let expected = [
        "create --bundle /b --no-pivot --no-new-keyring --pid-file pid web",
        "start web",
        "pause web",
        "resume web",
        "update --resources resources.json web",
        "exec --detach --process process.json --pid-file pid web",
        // Once: the second call has nothing to delete.
        "delete web",
    ];
    assert_eq!(bench.calls(), expected.map(|call| format!("{global} {call}")));
    assert_eq!(bench.written("resources").trim(), r#"{"memory":{"limit":4096}}"#);
    assert!(bench.written("process").contains(r#""args":["true"]"#));
    assert!(bench.is_clean());
}

async fn a_terminal_is_asked_for_by_its_socket(reaper: &Reaper) {
    let bench = Bench::new(reaper, "sleep 600 & echo $! >\"$pid_file\"");
    let io = ProcessIo::Terminal { console_socket: "/run/s".into() };
    let child = bench.command.exec(exec(io)).await.unwrap();
    child.signal(rustix::process::Signal::KILL).unwrap();
    assert_eq!(bench.written("socket"), "/run/s\n");
    assert!(bench.written("process").contains(r#""terminal":true"#), "whatever the request says");
}

async fn the_reason_of_a_failure_comes_from_the_log(reaper: &Reaper) {
    let bench = Bench::new(reaper, "echo printed >&2; fail 'no such thing'");
    let error = bench.command.start("web").await.unwrap_err();
    assert_eq!(error.to_string(), "runc start of container web failed: no such thing");
    let (mut stderr, err) = pipe();
    let io = ProcessIo::Fds { stdin: null(), stdout: null(), stderr: err };
    let error = bench.command.exec(exec(io)).await.unwrap_err();
    assert_eq!(error.to_string(), "runc exec of container web failed: no such thing");
    let mut err = String::new();
    stderr.read_to_string(&mut err).unwrap();
    assert_eq!(err, "printed\n", "the descriptor is the container's, and nothing of ours is written to it");
    assert!(bench.is_clean());
}

async fn without_a_log_the_reason_is_what_was_printed(reaper: &Reaper) {
    let bench = Bench::new(reaper, "echo first >&2; echo 'unknown flag' >&2; echo >&2; exit 2");
    let error = bench.command.pause("web").await.unwrap_err();
    assert_eq!(error.to_string(), "runc pause of container web failed: unknown flag");
    let error = bench.command.exec(exec(nulls())).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Answer { message, .. } if message.contains("exit code 2")), "{error}");
    let bench = Bench::new(reaper, "kill -9 $$");
    let error = bench.command.pause("web").await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Answer { message, .. } if message.contains("signal 9")), "{error}");
}

async fn a_program_that_is_missing_is_named(reaper: &Reaper) {
    let root = tempfile::tempdir().unwrap();
    let command = Command::new(reaper.clone(), "/nonexistent/runc".into(), root.path().to_owned(), false);
    let error = command.create(create(nulls())).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot run \"/nonexistent/runc\" to create container web");
    let RuntimeError::Spawn { source, .. } = error else { panic!("{error}") };
    assert_eq!(source.kind(), io::ErrorKind::NotFound);
}

/// Directory of the shim: the bundle, in which wrappers of runc look for config.json.
async fn a_runtime_runs_in_the_directory_of_this_process(reaper: &Reaper) {
    let bench = Bench::new(reaper, "pwd >\"$0.pwd\"");
    bench.command.start("web").await.unwrap();
    assert_eq!(bench.written("pwd").trim_end(), std::env::current_dir().unwrap().to_str().unwrap());
}

async fn a_creation_whose_pid_is_unknown_is_undone(reaper: &Reaper) {
    let bench = Bench::new(reaper, "if [ $verb = create ]; then mkdir -p $root/web; else rm -r $root/web; fi");
    let error = bench.command.create(create(nulls())).await.unwrap_err();
    assert!(matches!(error, RuntimeError::File { action: "read", .. }), "{error}");
    assert!(bench.calls()[1].ends_with("delete web"), "{:?}", bench.calls());
    assert!(bench.is_clean());

    let bench = Bench::new(
        reaper,
        "if [ $verb = create ]; then mkdir -p $root/web; echo 0x >\"$pid_file\"; else rm -r $root/web; fi",
    );
    let error = bench.command.create(create(nulls())).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Answer { message, .. } if message.contains("0x")), "{error}");
    assert!(bench.calls()[1].ends_with("delete web"), "{:?}", bench.calls());
}

async fn a_container_that_exists_is_not_undone_by_a_second_creation(reaper: &Reaper) {
    let bench = Bench::new(reaper, "exit 0");
    fs::create_dir_all(bench.folder.path().join("root/web")).unwrap();
    let error = bench.command.create(create(nulls())).await.unwrap_err();
    assert!(matches!(&error, RuntimeError::Refused { message, .. } if message.contains("exists")), "{error}");
    assert!(bench.calls().is_empty());
}

async fn a_deletion_that_fails_after_the_state_is_gone_has_succeeded(reaper: &Reaper) {
    let bench = Bench::new(reaper, "fail 'container does not exist'");
    bench.command.delete("web").await.unwrap();
    let bench = Bench::new(reaper, "rmdir $root/web; fail 'poststop hook failed'");
    fs::create_dir_all(bench.folder.path().join("root/web")).unwrap();
    bench.command.delete("web").await.unwrap();
    let bench = Bench::new(reaper, "fail 'device or resource busy'");
    fs::create_dir_all(bench.folder.path().join("root/web")).unwrap();
    assert!(bench.command.delete("web").await.is_err());
    assert!(bench.calls()[1].ends_with("delete --force web"), "{:?}", bench.calls());
}

async fn an_operation_goes_on_when_nobody_waits_for_it(reaper: &Reaper) {
    let bench = Bench::new(reaper, "sleep 0.1; touch \"$0.done\"");
    let waiting = bench.command.start("web");
    assert!(tokio::time::timeout(std::time::Duration::from_millis(20), waiting).await.is_err());
    let done = bench.folder.path().join("runc.done");
    while !done.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

async fn what_is_printed_as_features_is_parsed(reaper: &Reaper) {
    let bench = Bench::new(reaper, r#"echo '{"ociVersionMin":"1.0.0","ociVersionMax":"1.2.1","hooks":["poststop"]}'"#);
    let features = bench.command.features().await.unwrap();
    assert_eq!(features.oci_version_max(), "1.2.1");
    assert_eq!(features.hooks().as_deref(), Some(["poststop".to_owned()].as_slice()));
    let bench = Bench::new(reaper, "echo no");
    assert!(matches!(bench.command.features().await, Err(RuntimeError::Answer { .. })));
}

async fn a_runtime_is_not_told_what_systemd_told_the_shim(reaper: &Reaper) {
    let bench = Bench::new(reaper, "umask >\"$0.umask\"");
    bench.command.start("web").await.unwrap();
    assert_eq!(bench.written("umask"), "0022\n");
    let call = bench.command.call(Operation::Start, "web");
    let command = call.command(&call.scratch().unwrap(), vec![]);
    let removed: Vec<_> = command.get_envs().filter(|(_, value)| value.is_none()).map(|(name, _)| name).collect();
    assert_eq!(removed, ["LISTEN_FDNAMES", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET"]);
}

async fn a_criu_that_a_killed_runtime_has_left_is_waited_for(reaper: &Reaper) {
    let folder = tempfile::tempdir().unwrap();
    let criu = folder.path().join("criu");
    let ended = folder.path().join("ended");
    fs::write(&criu, "#!/bin/sh\ncd ${0%/*}; touch started; sleep 0.3; touch ended\n").unwrap();
    fs::set_permissions(&criu, fs::Permissions::from_mode(0o755)).unwrap();
    let script = "FOLDER/criu & until [ -e FOLDER/started ]; do :; done; kill -9 $$";
    let script = script.replace("FOLDER", folder.path().to_str().unwrap());
    let bench = Bench::new(reaper, &script);
    bench.command.checkpoint(request(folder.path())).await.unwrap_err();
    assert!(ended.exists());
}

async fn connections_are_allowed_to_a_runtime_that_leaves_out_those_not_accepted(reaper: &Reaper) {
    let folder = tempfile::tempdir().unwrap();
    let help = r#"tail -n 1 "$0.calls" | grep -q -- --help && echo "   --tcp-skip-in-flight  skip" ; exit 0"#;
    for (script, is_allowed) in [(help, true), ("exit 0", false)] {
        let bench = Bench::new(reaper, script);
        bench.command.checkpoint(request(folder.path())).await.unwrap();
        let calls = bench.calls();
        let call = calls.last().unwrap();
        for flag in ["--tcp-established", "--tcp-skip-in-flight"] {
            assert_eq!(call.contains(flag), is_allowed, "{call}");
        }
    }
}

/// A request to save a container that goes on, with the images in `work`.
fn request(work: &Path) -> CheckpointRequest {
    CheckpointRequest {
        id: "web".into(),
        init: proc::HostPid::own(),
        images: work.to_owned(),
        work: work.to_owned(),
        leave_running: true,
        allow: crate::Allow::default(),
        cancel: crate::Cancel::default(),
        external_files: vec![],
        sparse: Vec::new(),
        devices: false,
        review: None,
    }
}
