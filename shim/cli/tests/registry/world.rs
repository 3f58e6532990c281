//! A store, a registry, and the programs that use them.

#![expect(clippy::disallowed_methods, reason = "there is no reaper in these tests")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use memory::{Control, FileSource, Saved, save_files};
use proc::ContainerPid;
use rustix::process::{Pid, Signal, kill_process};
use snapshot::{Config, Digest, Host, IfTaken, NewLayer, NewSnapshot, Process, Store};

/// Size of a test's pack, in bytes.
const PACK: usize = 1 << 20;

/// `open sesame` in bcrypt.
const PASSWORD: &str = "$2b$04$bLx1c8hVSmEHJ47DkJXt7.wku8ddzWfan2qoEMfU0VRljT5f4c/Oa";

/// A private store.
pub(crate) struct World {
    root: tempfile::TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.root.path().join("store")
    }

    fn open(&self) -> Store {
        Store::open(&self.store()).unwrap()
    }

    /// Publishes a snapshot of `packs` packs, `other` of which differ from all other snapshots'.
    pub(crate) fn publish(&self, name: &str, packs: usize, other: usize) -> Digest {
        let draft = self.open().draft().unwrap();
        let folder = draft.folder().to_owned();
        let mut saved = Saved::default();
        for number in 0..packs {
            let seed = if number < other { number + 1000 } else { number };
            let path = folder.join(format!("memory-{number}"));
            std::fs::write(&path, noise(seed)).unwrap();
            let file = File::open(&path).unwrap();
            let address = 0x7000_0000_0000 + (number * PACK) as u64;
            let pid = ContainerPid::new(1).unwrap();
            let source = FileSource { file: &file, path: &path, offset: 0, pid, address, length: PACK as u64 };
            let into = memory::Draft { folder: folder.clone(), prefix: format!("pack-{number}") };
            saved = saved.merge(save_files(&[source], &into, &Control::new()).unwrap()).unwrap();
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::write(folder.join("segments"), saved.table.encode()).unwrap();
        let layer = |media_type: &str, path: PathBuf| NewLayer {
            media_type: media_type.to_owned(),
            path,
            digest: None,
            annotations: BTreeMap::new(),
        };
        let mut layers: Vec<NewLayer> =
            saved.packs.iter().map(|path| layer(snapshot::GPU_MEMORY_TYPE, path.clone())).collect();
        layers.push(layer(snapshot::SEGMENTS_TYPE, "segments".into()));
        let mut config = Config::new(1_795_000_000, name, "libcontainer", Host::default());
        config.processes.push(Process { pid: 1, comm: "python3".to_owned(), gpu: true, staged: (packs * PACK) as u64 });
        let new = NewSnapshot {
            name: Some(name.parse().unwrap()),
            if_taken: IfTaken::Move,
            config,
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        draft.publish(new, &|_| ()).unwrap().digest()
    }

    /// Writes docker's config.json, and a credential helper with this script.
    pub(crate) fn docker_config(&self, config: &str, helper: &str) {
        std::fs::write(self.root.path().join("config.json"), config).unwrap();
        let path = self.root.path().join("docker-credential-cave");
        std::fs::write(&path, format!("#!/bin/sh\nread -r registry\n{helper}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
    }

    /// Digests and sizes of all blobs.
    pub(crate) fn blobs(&self) -> BTreeMap<String, u64> {
        let files = std::fs::read_dir(self.store().join("blobs/sha256")).unwrap().map(Result::unwrap);
        files.map(|file| (file.file_name().into_string().unwrap(), file.metadata().unwrap().len())).collect()
    }

    /// Lines of a verification.
    pub(crate) fn problems(&self) -> Vec<String> {
        let report = self.open().verify(None, None, &|_| ()).unwrap();
        report.problems.iter().map(ToString::to_string).collect()
    }

    pub(crate) fn drafts(&self) -> usize {
        std::fs::read_dir(self.store().join("drafts")).unwrap().count()
    }

    /// Drafts and partial blobs.
    pub(crate) fn garbage(&self) -> Vec<String> {
        let names = |folder: &str| {
            let files = std::fs::read_dir(self.store().join(folder)).unwrap().map(Result::unwrap);
            files.map(|file| file.file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        [names("drafts"), names("partial")].concat()
    }

    pub(crate) fn gpusnap(&self, arguments: &[&str]) -> Gpusnap {
        self.gpusnap_at(&self.store(), arguments)
    }

    pub(crate) fn gpusnap_at(&self, store: &Path, arguments: &[&str]) -> Gpusnap {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gpusnap"));
        command.arg("--store").arg(store).args(arguments);
        // Ignore the user's credentials.
        command.env("DOCKER_CONFIG", self.root.path()).env_remove("CONTAINERD_NAMESPACE");
        // A dead proxy: connections to this machine's registries must not use it.
        command.env("http_proxy", "http://127.0.0.1:1").env("HTTPS_PROXY", "http://127.0.0.1:1");
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", self.root.path().display()));
        Gpusnap { command }
    }
}

pub(crate) fn names_of(world: &World) -> Vec<String> {
    let listed = world.open().list().unwrap();
    listed.iter().flat_map(|listed| &listed.names).map(ToString::to_string).collect()
}

/// Memory without a zero chunk that does not compress.
fn noise(seed: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()
    };
    (0..PACK / 8).flat_map(|_| word()).collect()
}

/// A run of the program.
pub(crate) struct Gpusnap {
    command: Command,
}

impl Gpusnap {
    fn run(mut self) -> (String, Output) {
        let output = self.command.output().unwrap();
        (format!("{:?}\n{}", self.command, String::from_utf8_lossy(&output.stderr)), output)
    }

    /// Runs the program to success; returns standard output.
    pub(crate) fn succeeds(self) -> String {
        let (said, output) = self.run();
        assert!(output.status.success(), "{said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the program up to this exit code; returns standard error.
    pub(crate) fn code(self, code: i32) -> String {
        let (said, output) = self.run();
        assert_eq!(output.status.code(), Some(code), "{said}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Duration of a successful run.
    pub(crate) fn takes(self) -> Duration {
        let begun = Instant::now();
        self.succeeds();
        begun.elapsed()
    }

    /// Kills the program after `moment`; returns whether it was still running.
    pub(crate) fn killed_after(mut self, moment: Duration) -> bool {
        let mut child = self.command.stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(moment);
        child.kill().unwrap();
        child.wait().unwrap().signal().is_some()
    }

    /// Interrupts the program as Ctrl-C does; returns standard error.
    pub(crate) fn interrupted_after(mut self, moment: Duration) -> String {
        let child = self.command.stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(moment);
        kill_process(pid(&child), Signal::INT).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{:?}", output.status);
        String::from_utf8(output.stderr).unwrap()
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Debian's docker-registry on a free port.
pub(crate) struct Registry {
    child: Child,
    port: u16,
    root: tempfile::TempDir,
}

impl Registry {
    /// Starts a registry; `None` if it is not installed.
    pub(crate) fn start() -> Option<Self> {
        Self::start_with("")
    }

    /// Starts a registry that admits only `ali` with the password `open sesame`.
    pub(crate) fn start_locked() -> Option<Self> {
        Self::start_with("auth: {htpasswd: {realm: cave, path: PASSWORDS}}\n")
    }

    fn start_with(more: &str) -> Option<Self> {
        let program = std::env::var("GPUSNAP_DOCKER_REGISTRY").unwrap_or_else(|_| "docker-registry".to_owned());
        let root = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (config, log) = (root.path().join("config.yml"), root.path().join("log"));
        let (data, passwords) = (root.path().join("data"), root.path().join("passwords"));
        write!(
            File::create(&config).unwrap(),
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n{}",
            data.display(),
            more.replace("PASSWORDS", passwords.to_str().unwrap())
        )
        .unwrap();
        std::fs::write(&passwords, format!("ali:{PASSWORD}\n")).unwrap();
        std::fs::create_dir(data).unwrap();
        let spawned = Command::new(&program)
            .arg("serve")
            .arg(config)
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                println!("skipped: no {program} ({error}); `make test-registry` brings it");
                return None;
            }
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                child.try_wait().unwrap().is_none() && Instant::now() < deadline,
                "{program} does not begin to serve: {}",
                std::fs::read_to_string(&log).unwrap()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(Self { child, port, root })
    }

    pub(crate) fn at(&self, place: &str) -> String {
        format!("localhost:{}/{place}", self.port)
    }

    /// Size of the registry's blobs.
    pub(crate) fn bytes(&self) -> u64 {
        sizes(&self.root.path().join("data/docker/registry/v2/blobs"))
    }

    pub(crate) fn pause(&self) {
        kill_process(pid(&self.child), Signal::STOP).unwrap();
    }

    pub(crate) fn resume(&self) {
        kill_process(pid(&self.child), Signal::CONT).unwrap();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn sizes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|entry| match entry.metadata().unwrap() {
            metadata if metadata.is_dir() => sizes(&entry.path()),
            metadata => metadata.len(),
        })
        .sum()
}

/// Runs skopeo to success; returns standard output. `None` if skopeo is not installed.
pub(crate) fn skopeo(arguments: &[&str]) -> Option<String> {
    let output = match Command::new("skopeo").arg("--insecure-policy").args(arguments).output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: no skopeo ({error}); `make test-registry` brings it");
            return None;
        }
    };
    assert!(output.status.success(), "skopeo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}
