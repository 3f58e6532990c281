//! GPUs of a test's containers: real or simulated ones (tests/fake-cuda).

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use serde_json::json;

use crate::{Cmd, PYTHON, Skip, Test, eventually};

/// Environment variable with the folder of the simulated driver under the names of the real one.
pub const SIMULATED: &str = "GPUSNAP_E2E_FAKE_CUDA";

/// The driver's folder on a machine with a GPU.
const REAL: &str = "/usr/local/nvidia";

/// The self-checking program on GPUs.
const PROGRAM: &str = "tests/programs";

/// Folder of the halts of sessions: a session that enters a phase stops itself if there is a file
/// `ID.PHASE`.
pub const HALTS: &str = "/run/e2e/halts";

/// Returns containerd's environment: the halts of sessions, and the simulated driver for shims.
pub(crate) fn environment() -> Vec<String> {
    let halts = format!("GPUSNAP_TEST_HALTS={HALTS}");
    let Some(folder) = simulated() else { return vec![halts] };
    vec![
        halts,
        format!("GPUSNAP_LIBCUDA={}", folder.join("libcuda.so.1").display()),
        format!("GPUSNAP_NVML={}", folder.join("libnvidia-ml.so.1").display()),
    ]
}

fn simulated() -> Option<PathBuf> {
    std::env::var_os(SIMULATED).filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// Start of the command line of [`PROGRAM`] in a container.
const COMMAND: [&str; 4] = ["python3", "/opt/programs/gpu.py", "--log", "/dev/shm/log"];

/// Nodes that every GPU needs.
const COMMON: [&str; 2] = ["/dev/nvidiactl", "/dev/nvidia-uvm"];

/// The driver's libraries: the folder here, the folder in containers, and the loader's folder
/// there.
struct Driver {
    source: PathBuf,
    target: String,
    library: String,
}

fn driver() -> Result<Driver> {
    let Some(source) = simulated() else {
        return Ok(Driver { source: REAL.into(), target: REAL.into(), library: format!("{REAL}/lib64") });
    };
    static NODES: OnceLock<Result<(), String>> = OnceLock::new();
    let nodes = crate::checkout().join("tests/fake-cuda/nodes");
    let make = || Cmd::new(nodes.to_string_lossy()).args(&["/dev", "2"]).ok();
    let made = NODES.get_or_init(|| make().map(drop).map_err(|error| format!("{error:#}")));
    made.clone().map_err(anyhow::Error::msg)?;
    Ok(Driver { source, target: "/opt/cuda".into(), library: "/opt/cuda".into() })
}

fn program() -> Result<String> {
    Ok(bind(&crate::checkout().join(PROGRAM).canonicalize().context("the GPU program")?, "/opt/programs"))
}

fn bind(source: &Path, target: &str) -> String {
    format!("type=bind,src={},dst={target},options=rbind:ro", source.display())
}

/// Containers with GPUs.
pub struct Gpu<'a> {
    test: &'a Test,
    options: Vec<String>,
}

impl<'a> Gpu<'a> {
    /// Containers with one GPU.
    ///
    /// # Errors
    /// A [`Skip`] without a GPU.
    pub fn one(test: &'a Test) -> Result<Self> {
        Self::several(test, 1)
    }

    /// Containers with `count` GPUs.
    ///
    /// # Errors
    /// A [`Skip`] with fewer GPUs.
    pub fn several(test: &'a Test, count: usize) -> Result<Self> {
        let Driver { source, target, library } = driver()?;
        let nodes: Vec<String> = (0..count).map(|minor| format!("/dev/nvidia{minor}")).collect();
        if !nodes.iter().all(|node| Path::new(node).exists()) {
            return Err(Skip::because(format!("there are no {count} GPUs, real or simulated ({SIMULATED})")));
        }
        let mut options = vec!["--mount".to_owned(), bind(&source, &target), "--mount".to_owned(), program()?];
        options.extend(["--env".to_owned(), format!("LD_LIBRARY_PATH={library}")]);
        options
            .extend(nodes.into_iter().chain(COMMON.map(str::to_owned)).flat_map(|node| ["--device".to_owned(), node]));
        Ok(Self { test, options })
    }

    /// Containers with one GPU, by the Container Device Interface: a file lists nodes, mounts and
    /// variables.
    ///
    /// # Errors
    /// A [`Skip`] without a GPU.
    pub fn by_cdi(test: &'a Test) -> Result<Self> {
        // Checks for a GPU, and makes a simulated one.
        Self::one(test)?;
        let Driver { source, target, library } = driver()?;
        let node = |path: &str| json!({ "path": path });
        let mount = json!({ "hostPath": source, "containerPath": target, "options": ["rbind", "ro"] });
        let interface = json!({
            "cdiVersion": "0.6.0",
            "kind": "e2e.test/gpu",
            "devices": [{ "name": "0", "containerEdits": { "deviceNodes": [node("/dev/nvidia0")] } }],
            "containerEdits": {
                "deviceNodes": COMMON.map(node),
                "env": [format!("LD_LIBRARY_PATH={library}")],
                "mounts": [mount],
            },
        });
        let folder = Path::new("/run/cdi");
        std::fs::create_dir_all(folder)?;
        let new = folder.join(format!(".{}", test.id("cdi")));
        std::fs::write(&new, interface.to_string())?;
        std::fs::rename(new, folder.join("e2e.json"))?;
        let options = ["--mount", &program()?, "--device", "e2e.test/gpu=0"].map(str::to_owned).to_vec();
        Ok(Self { test, options })
    }

    /// Returns whether the driver is simulated: such a driver fails on demand.
    #[must_use]
    pub fn is_simulated(&self) -> bool {
        simulated().is_some()
    }

    /// Makes the driver fail, possible with the simulated driver only.
    ///
    /// # Errors
    /// A [`Skip`] on a real GPU.
    pub fn fails(mut self, how: &str) -> Result<Self> {
        if !self.is_simulated() {
            return Err(Skip::because("a real driver does not fail on demand"));
        }
        self.options.extend(["--env".to_owned(), format!("FAKE_CUDA={how}")]);
        Ok(self)
    }

    /// Further options of `ctr run`.
    #[must_use]
    pub fn with(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(|option| (*option).to_owned()));
        self
    }

    /// Starts a container with the GPU program and waits for the first round.
    pub fn start(&self, id: &str, arguments: &[&str]) -> Result<()> {
        // The log is in memory of the container, which leaves the writable layer alone.
        self.run(id, &[&COMMAND, arguments].concat())
    }

    /// Starts a container with this Python program as init and the GPU program beside it, and waits
    /// for the latter's first round.
    pub fn start_beside(&self, id: &str, program: &str) -> Result<()> {
        let line = "python3 /opt/programs/gpu.py --log /dev/shm/log & exec python3 -c \"$0\"";
        self.run(id, &["sh", "-c", line, program])
    }

    fn run(&self, id: &str, argv: &[&str]) -> Result<()> {
        let options: Vec<&str> =
            ["--detach", "--null-io"].into_iter().chain(self.options.iter().map(String::as_str)).collect();
        self.test.ctr().run_image(PYTHON, id, &options, argv).ok()?;
        self.computes(id)
    }

    /// Starts the program in a container of nerdctl's, with further options. Returns the id.
    pub fn start_by_nerdctl(&self, name: &str, options: &[&str], arguments: &[&str]) -> Result<String> {
        // The same options except for the syntax of mounts.
        let own = self.options.iter().map(|option| option.replace(",options=rbind:ro", ",readonly"));
        let all: Vec<String> = ["--detach"].iter().chain(options).map(|&option| option.to_owned()).chain(own).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let started = self.test.nerdctl().run_image(PYTHON, name, &all, &[&COMMAND, arguments].concat());
        let id = started.ok()?.trimmed();
        self.test.note_id(&id);
        self.computes(&id)?;
        Ok(id)
    }

    /// Waits until the program in the container has done and checked two more rounds.
    pub fn computes(&self, id: &str) -> Result<()> {
        self.computes_in(id, "log")
    }

    /// Waits for two more rounds of the program with this log.
    pub fn computes_in(&self, id: &str, log: &str) -> Result<()> {
        let from = rounds(&self.said(id, log)?);
        eventually(&format!("{id} to compute past round {from}"), || {
            let log = self.said(id, log)?;
            anyhow::ensure!(!log.contains("FAILED"), "{}", log.lines().last().unwrap_or_default());
            let now = rounds(&log);
            anyhow::ensure!(now > from + 1, "still at round {now}");
            Ok(())
        })
    }

    /// Number of rounds so far.
    pub fn rounds(&self, id: &str) -> Result<u64> {
        Ok(rounds(&self.log(id)?))
    }

    /// The program's log.
    pub fn log(&self, id: &str) -> Result<String> {
        self.said(id, "log")
    }

    fn said(&self, id: &str, log: &str) -> Result<String> {
        let pid = self.test.ctr().pid(id)?;
        Ok(std::fs::read_to_string(format!("/proc/{pid}/root/dev/shm/{log}")).unwrap_or_default())
    }
}

/// N of the last line `n=N sum=... ok`.
fn rounds(log: &str) -> u64 {
    let round = |line: &str| line.split_whitespace().find_map(|word| word.strip_prefix("n=")?.parse().ok());
    log.lines().rev().find_map(round).unwrap_or(0)
}
