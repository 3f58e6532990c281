//! Containers, and the output of containers.

use std::fs;
use std::io::{PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oci_spec::runtime::{Capability, Process, Spec};
use reaper::Child;
use runtime::{CreateRequest, ExecRequest, Prepare, ProcessIo, RuntimeError};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::bed::Bed;
use crate::spec;
use crate::world::Which;

/// Longest time for steps that take milliseconds as a rule.
const SOON: Duration = Duration::from_secs(20);

/// A folder with a config.json and a mounted root, in containerd's layout.
pub(crate) struct Bundle<'bed> {
    pub(crate) bed: &'bed Bed,
    pub(crate) id: String,
    pub(crate) folder: PathBuf,
}

impl<'bed> Bundle<'bed> {
    pub(crate) fn new(bed: &'bed Bed, id: String, spec: &Spec) -> Self {
        let folder = bed.folder().join(&id);
        for name in ["rootfs", "upper", "work"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        let bundle = Self { bed, id, folder };
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            bed.world.files().display(),
            bundle.folder.join("upper").display(),
            bundle.folder.join("work").display()
        );
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("overlay", bundle.rootfs(), "overlay", MountFlags::empty(), options.as_c_str()).unwrap();
        bundle.write(spec);
        bundle
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.folder.join("rootfs")
    }

    /// Returns the path of the container's cgroup in every hierarchy, from the root as seen by this
    /// process.
    pub(crate) fn cgroup(&self) -> PathBuf {
        PathBuf::from("/").join(&self.bed.world.cgroup).join(&self.id)
    }

    /// Writes the container's config.json.
    pub(crate) fn write(&self, spec: &Spec) {
        let mut spec = spec.clone();
        if let Some(linux) = spec.linux_mut() {
            linux.set_cgroups_path(Some(self.cgroup()));
        }
        fs::write(self.folder.join("config.json"), serde_json::to_vec_pretty(&spec).unwrap()).unwrap();
    }

    /// Creates the container with pipes as standard input and output.
    pub(crate) async fn create(&self) -> Result<Running, RuntimeError> {
        let (io, pipes) = Pipes::new();
        self.create_with(io).await.map(|child| Running { child, pipes })
    }

    pub(crate) async fn create_with(&self, io: ProcessIo) -> Result<Child, RuntimeError> {
        self.bed.runtime.create(self.request(io)).await
    }

    pub(crate) fn request(&self, io: ProcessIo) -> CreateRequest {
        let (id, bundle) = (self.id.clone(), self.folder.clone());
        CreateRequest { id, bundle, io, no_pivot_root: false, no_new_keyring: false, prepare: Prepare::Seccomp }
    }

    /// Creates and starts the container.
    pub(crate) async fn start(&self) -> Running {
        let running = self.create().await.unwrap();
        self.bed.runtime.start(&self.id).await.unwrap();
        running
    }

    /// Starts a further process in the container.
    pub(crate) async fn exec(&self, process: &Process) -> Result<Running, RuntimeError> {
        let (io, pipes) = Pipes::new();
        self.exec_with(process, io).await.map(|child| Running { child, pipes })
    }

    pub(crate) async fn exec_with(&self, process: &Process, io: ProcessIo) -> Result<Child, RuntimeError> {
        let request = ExecRequest {
            id: self.id.clone(),
            exec_id: format!("exec-{}", self.bed.world.number()),
            bundle: self.folder.clone(),
            process: process.clone(),
            io,
            prepare: Prepare::Seccomp,
        };
        self.bed.runtime.exec(request).await
    }

    /// Returns the output of a shell script in the container; the script must succeed.
    pub(crate) async fn ask(&self, script: &str) -> String {
        self.ask_as(script, &spec::DEFAULT_CAPABILITIES).await
    }

    /// Runs [`Self::ask`] with these capabilities.
    pub(crate) async fn ask_as(&self, script: &str, capabilities: &[Capability]) -> String {
        let mut process = spec::process(&["/bin/sh", "-c", script]);
        process.set_capabilities(Some(spec::capabilities(capabilities)));
        let ended = self.exec(&process).await.unwrap().end().await;
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "of {script:?}");
        ended.stdout
    }

    pub(crate) async fn delete(&self) {
        self.bed.runtime.delete(&self.id).await.unwrap();
        if self.bed.which == Which::Crun {
            // Invisible to this runtime, this hierarchy is used by its CRIU.
            let path = self.cgroup();
            let _ = fs::remove_dir(Path::new("/sys/fs/cgroup/unified").join(path.strip_prefix("/").unwrap()));
        }
    }

    /// Kills and deletes a running container.
    pub(crate) async fn kill(&self, running: Running) {
        let _ = running.child.signal(Signal::KILL);
        running.end().await;
        self.delete().await;
    }
}

impl Drop for Bundle<'_> {
    fn drop(&mut self) {
        // Lazily, as the shim does: after a failure the mount may still be in use.
        let _ = rustix::mount::unmount(self.rootfs(), UnmountFlags::DETACH);
    }
}

impl Bed {
    /// Runs a container from creation to deletion.
    pub(crate) async fn run(&self, spec: &Spec) -> Ended {
        let bundle = self.bundle(spec);
        let ended = bundle.start().await.end().await;
        bundle.delete().await;
        ended
    }

    /// Returns the output of a container that must succeed.
    pub(crate) async fn say(&self, spec: &Spec) -> String {
        let ended = self.run(spec).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "it said {:?}", ended.stdout);
        ended.stdout
    }

    /// Returns the reason of a refused creation; nothing may be left of the container.
    pub(crate) async fn refusal(&self, bundle: &Bundle<'_>) -> String {
        let before = self.traces();
        match bundle.create().await {
            Ok(running) => {
                bundle.kill(running).await;
                panic!("it was created");
            }
            Err(error) => {
                let left = self.settle(&before);
                assert!(left.is_empty(), "after {error}: {left:?}");
                error.to_string()
            }
        }
    }
}

/// A process of a container, with pipes.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) pipes: Pipes,
}

/// Exit code and output of a process.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Running {
    /// Waits for the process's end, and for the end of its output, after the last writer has
    /// closed.
    pub(crate) async fn end(self) -> Ended {
        drop(self.pipes.stdin);
        let code = soon("the process ends", self.child.wait()).await.code;
        Ended { code, stdout: self.pipes.stdout.all().await, stderr: self.pipes.stderr.all().await }
    }

    /// Waits for a piece of output.
    pub(crate) async fn says(&self, what: &str) {
        until(&format!("it says {what:?}"), || self.pipes.stdout.so_far().contains(what)).await;
    }

    pub(crate) fn tell(&self, line: &str) {
        (&self.pipes.stdin).write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

/// This process's ends of standard input, output and error.
pub(crate) struct Pipes {
    pub(crate) stdin: PipeWriter,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
}

impl Pipes {
    pub(crate) fn new() -> (ProcessIo, Self) {
        let (stdin, in_write) = std::io::pipe().unwrap();
        let (out_read, stdout) = std::io::pipe().unwrap();
        let (err_read, stderr) = std::io::pipe().unwrap();
        let io = ProcessIo::Fds { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into() };
        (io, Self { stdin: in_write, stdout: Output::read(out_read.into()), stderr: Output::read(err_read.into()) })
    }
}

/// Output of a pipe.
pub(crate) struct Output {
    text: Arc<Mutex<Vec<u8>>>,
    done: tokio::task::JoinHandle<()>,
}

impl Output {
    fn read(pipe: OwnedFd) -> Self {
        let text = Arc::new(Mutex::new(vec![]));
        let sink = Arc::clone(&text);
        let mut pipe = pipe::Receiver::from_owned_fd(pipe).unwrap();
        let done = tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
                sink.lock().unwrap().extend_from_slice(&buffer[..length]);
            }
        });
        Self { text, done }
    }

    pub(crate) fn so_far(&self) -> String {
        String::from_utf8(self.text.lock().unwrap().clone()).unwrap()
    }

    pub(crate) async fn all(self) -> String {
        let Self { text, done } = self;
        soon("the output ends", done).await.unwrap();
        String::from_utf8(text.lock().unwrap().clone()).unwrap()
    }
}

/// Checks the message about a missing program, by which clients know the case: runc's, checked by
/// containerd's tests, or crun's.
pub(crate) fn assert_says_missing(error: &str, program: &str) {
    let words = match program.contains('/') {
        true => ["no such file or directory".to_owned(), "No such file or directory".to_owned()],
        false => {
            let crun = format!("executable file `{program}` not found in $PATH");
            ["executable file not found in $PATH".to_owned(), crun]
        }
    };
    assert!(words.iter().any(|words| error.contains(words)), "{error}");
    assert!(error.contains(program), "{error}");
}

/// Waits for something certain to come.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(SOON, future).await {
        Ok(value) => value,
        Err(_elapsed) => panic!("not within {SOON:?}: {what}"),
    }
}

/// Waits for an effect of another process.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    soon(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
