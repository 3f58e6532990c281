//! Containers with a thread in an uninterruptible wait, beyond the reach of freezers and tracers.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use e2e::target::Shim;
use e2e::{Case, Cmd, PYTHON, Running, Skip, Test, case, ensure_eq, ensure_has, eventually, proc};

pub(crate) fn cases() -> Vec<Case> {
    let words = "runc pauses, and tells neither process nor reason";
    let case = case!(a_thread_in_an_uninterruptible_wait_is_named_and_the_container_goes_on);
    vec![case.except(Shim::Stock, words).except(Shim::GpusnapRunc, words)]
}

/// Program that counts, and looks up a name in a file system all the time.
const PROGRAM: &str = "
import os, threading, time
def look():
    while True:
        os.path.exists('/silent/name')
threading.Thread(target=look, daemon=True).start()
n = 0
while True:
    n += 1
    with open('/dev/shm/new', 'w') as new: new.write(str(n))
    os.rename('/dev/shm/new', '/dev/shm/n')
    time.sleep(.01)
";

/// A file system that falls silent on demand.
struct SilentFs {
    folder: PathBuf,
    silent: PathBuf,
    server: Running,
}

impl SilentFs {
    fn start(t: &Test) -> Result<Self> {
        if !Path::new("/dev/fuse").exists() {
            return Err(Skip::because("there is no /dev/fuse"));
        }
        if Cmd::new("python3").args(&["-c", "import ctypes"]).run()?.code != 0 {
            return Err(Skip::because("the test bed's Python has no ctypes"));
        }
        let (folder, silent) = (t.folder()?.join("fs"), t.folder()?.join("silent"));
        fs::create_dir_all(&folder)?;
        let program = e2e::checkout().join("tests/programs/silent_fs.py");
        let arguments = [&program, &folder, &silent].map(|path| path.to_string_lossy().into_owned());
        t.at_end(Cmd::new("umount").args(&["--lazy", &arguments[1]]));
        let server = Cmd::new("python3").args(&arguments).spawn()?;
        server.sees("ready")?;
        Ok(Self { folder, silent, server })
    }
}

fn counts(t: &Test, id: &str) -> Result<()> {
    let pid = t.ctr().pid(id)?;
    let count = || -> Result<u64> { Ok(fs::read_to_string(format!("/proc/{pid}/root/dev/shm/n"))?.parse()?) };
    let from = eventually("a count", count)?;
    eventually("it to count on", || {
        let now = count()?;
        ensure!(now > from + 1, "still at {now}");
        Ok(())
    })
}

/// Returns the state of the second thread.
fn state_of_looker(init: u32) -> Result<char> {
    for task in fs::read_dir(format!("/proc/{init}/task"))? {
        let tid: u32 = task?.file_name().to_string_lossy().parse()?;
        if tid != init {
            return proc::state(tid);
        }
    }
    anyhow::bail!("it has one thread")
}

fn a_thread_in_an_uninterruptible_wait_is_named_and_the_container_goes_on(t: &Test) -> Result<()> {
    let (silent_fs, id, image) = (SilentFs::start(t)?, t.id("c"), t.id("checkpoint"));
    let mount = format!("type=bind,src={},dst=/silent,options=rbind", silent_fs.folder.display());
    let options = ["--detach", "--null-io", "--mount", &mount];
    t.ctr().run_image(PYTHON, &id, &options, &["python3", "-c", PROGRAM]).ok()?;
    counts(t, &id)?;
    fs::write(&silent_fs.silent, "")?;
    silent_fs.server.sees("silent")?;
    let init = t.ctr().pid(&id)?;
    let out = t.ctr().checkpoint(&id, &image).run()?.expect_failure()?;
    ensure_has!(out.stderr, "waits uninterruptibly");
    ensure_has!(out.stderr, &format!("of process {init}"));
    // Only the thread still waits.
    ensure_eq!(state_of_looker(init)?, 'D');
    counts(t, &id)?;
    fs::remove_file(&silent_fs.silent)?;
    eventually("the wait to end", || {
        ensure!(state_of_looker(init)? != 'D', "it waits");
        Ok(())
    })?;
    counts(t, &id)?;
    t.ctr().checkpoint(&id, &image).ok()?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    counts(t, &id)
}
