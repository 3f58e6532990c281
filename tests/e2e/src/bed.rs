//! A containerd in the test bed, with the operations of the test bed's script.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, ensure};

use crate::target::{Containerd, Shim, Target};
use crate::{Cmd, Output, gpu, proc};

/// Environment variable with the folder of our shim (default: `target/release`).
pub const SHIM_DIR: &str = "GPUSNAP_SHIM_DIR";

/// A running containerd of one target.
pub struct Bed {
    name: String,
    target: Target,
}

type SharedBeds = HashMap<Target, Result<Arc<Bed>, String>>;

static SHARED: Mutex<Option<SharedBeds>> = Mutex::new(None);

/// The test bed's notes about running containerds.
const INSTANCES: &str = "/run/gpusnap-testbed/instances";

/// Folder of containerd 2.4's programs in the test bed; those of 2.1 are Debian's.
const OWN_2_4: &str = "/opt/containerd-2.4/bin";

impl Bed {
    /// The containerd shared by all tests of a target, started for the first one.
    pub fn shared(target: Target) -> Result<Arc<Self>> {
        let mut all = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let all = all.get_or_insert_default();
        let bed = all.entry(target).or_insert_with(|| {
            let bed = Self { name: format!("e2e-{target}").replace('.', "").replace('/', "-"), target };
            // A killed suite may have left its containerd.
            let started = bed.testbed(&["stop", &bed.name]).and_then(|_| bed.start());
            started.map(|()| Arc::new(bed)).map_err(|error| format!("{error:#}"))
        });
        bed.clone().map_err(|error| anyhow!("containerd of {target} did not start: {error}"))
    }

    /// Gives up all shared containerds at the end of the suite.
    pub fn take_shared() -> Vec<Arc<Self>> {
        let all = SHARED.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        all.into_values().filter_map(Result::ok).collect()
    }

    /// Returns whether this process is inside the test bed.
    pub fn is_here() -> bool {
        Path::new("/run/gpusnap-testbed/inside").exists()
    }

    fn testbed(&self, args: &[&str]) -> Result<Output> {
        Cmd::new("testbed").args(args).stdin_null().ok()
    }

    /// Starts a containerd with the target's shim first in the PATH.
    pub fn start(&self) -> Result<()> {
        let mut args = vec!["start", &self.name, "--containerd", self.target.containerd.version()];
        let folder = shim_folder(self.target.shim)?.map(|folder| folder.to_string_lossy().into_owned());
        if let Some(folder) = &folder {
            args.extend(["--shims", folder]);
        }
        let environment = gpu::environment();
        args.extend(environment.iter().flat_map(|variable| ["--env", variable]));
        fs::create_dir_all(gpu::HALTS)?;
        fs::write(self.runc_options(), "BinaryName = \"runc\"\n")?;
        self.testbed(&args).map(drop)
    }

    /// The target of this containerd.
    pub fn target(&self) -> Target {
        self.target
    }

    /// containerd's folder for running containers: bundles, mounts.
    pub fn run_folder(&self) -> PathBuf {
        Path::new("/run").join(&self.name)
    }

    /// containerd's socket.
    pub fn address(&self) -> String {
        self.run_folder().join("containerd.sock").to_string_lossy().into_owned()
    }

    /// containerd's log, with the shims' logs.
    pub fn log(&self) -> PathBuf {
        PathBuf::from(format!("/var/log/containerd-{}.log", self.name))
    }

    /// A client, in the version that belongs to this containerd.
    pub fn client(&self, program: &str) -> Cmd {
        let own = Path::new(OWN_2_4).join(program);
        match self.target.containerd {
            Containerd::V2_4 if own.exists() => Cmd::new(own.to_string_lossy()),
            Containerd::V2_1 | Containerd::V2_4 => Cmd::new(program),
        }
    }

    /// The program of containerd's shim.
    pub fn shim_binary(&self) -> Result<PathBuf> {
        let name = self.target.shim.binary();
        let folder = match (shim_folder(self.target.shim)?, self.target.containerd) {
            (Some(folder), _) => folder,
            (None, Containerd::V2_1) => PathBuf::from("/usr/bin"),
            (None, Containerd::V2_4) => PathBuf::from(OWN_2_4),
        };
        Ok(folder.join(name))
    }

    /// A runtime options file that selects runc.
    pub fn runc_options(&self) -> &'static str {
        "/run/e2e/runc.toml"
    }

    /// Pid of containerd.
    pub fn containerd_pid(&self) -> Result<u32> {
        let text = fs::read_to_string(Path::new(INSTANCES).join(&self.name).join("pid"))?;
        text.split_whitespace().next().unwrap_or_default().parse().with_context(|| format!("a pid in {text:?}"))
    }

    /// Kills containerd with SIGKILL and starts containerd again; containers are left alone.
    pub fn restart(&self) -> Result<()> {
        self.testbed(&["restart", &self.name]).map(drop)
    }

    /// Kills containerd with SIGKILL, until [`Bed::start`].
    pub fn kill_containerd(&self) -> Result<()> {
        let pid = self.containerd_pid()?;
        proc::kill(pid)?;
        proc::gone(pid)
    }

    /// Stops containerd and removes all data.
    pub fn stop(&self) -> Result<()> {
        self.testbed(&["stop", &self.name]).map(drop)
    }
}

/// Leftovers of containers of any containerd in the bed: processes, mounts, cgroups, sockets,
/// bundles, one a line.
pub fn leaks() -> Result<BTreeSet<String>> {
    let text = Cmd::new("testbed").arg("leaks").stdin_null().ok()?.text();
    Ok(text.lines().map(str::to_owned).collect())
}

/// A folder with our binary under the target's name.
fn shim_folder(shim: Shim) -> Result<Option<PathBuf>> {
    if !shim.is_ours() {
        return Ok(None);
    }
    // On a disk, as when installed: the pages of a tmpfs count as shared memory.
    let folder = Path::new("/var/tmp/e2e-shims").join(shim.name());
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !installed.contains(&folder) {
        install(&folder, "containerd-shim-gpusnap-v2", shim.binary())?;
        install(&folder, "gpusnap", "gpusnap")?;
        installed.push(folder.clone());
    }
    Ok(Some(folder))
}

/// Folders with our binaries, installed by this run.
static INSTALLED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn install(folder: &Path, program: &str, name: &str) -> Result<()> {
    let built = std::env::var_os(SHIM_DIR)
        .map_or_else(|| crate::checkout().join("target/release"), PathBuf::from)
        .join(program);
    ensure!(built.exists(), "{} does not exist: build it with `make build`", built.display());
    fs::create_dir_all(folder)?;
    // Renamed into place: a shim of an earlier run may still execute the old file.
    let new = folder.join(".new");
    fs::copy(&built, &new).with_context(|| format!("copy of {}", built.display()))?;
    fs::rename(&new, folder.join(name))?;
    Ok(())
}
