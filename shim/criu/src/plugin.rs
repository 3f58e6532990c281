//! A plugin that makes CRIU's dump accept the NVIDIA driver's device nodes (plugin/devices.c).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;

const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/devices.so"));
/// Folder in the directory of the log, for the time of a dump.
const FOLDER: &str = "criu-plugin";
/// CRIU takes every file of its folder that ends so for a plugin.
const LINK: &str = "devices.so";

/// The plugin in a folder of its own, as CRIU's option `libdir` wants it. The library is a file in
/// memory of this process: folders for data may lie on file systems from which nothing may be executed.
#[derive(Debug)]
pub struct DevicePlugin {
    folder: PathBuf,
    library: File,
}

impl DevicePlugin {
    /// Variable of CRIU's environment with the folder of plugins.
    pub const VARIABLE: &str = "CRIU_LIBS_DIR";

    /// Makes the folder in a directory. What a dead process has left there is replaced.
    ///
    /// # Errors
    /// Fails if the machine allows no executable files in memory, or the folder cannot be made.
    pub fn within(directory: &Path) -> io::Result<Self> {
        let memory = rustix::fs::memfd_create("criu-plugin", MemfdFlags::CLOEXEC)?;
        let mut library = File::from(memory);
        library.write_all(LIBRARY)?;
        let folder = directory.join(FOLDER);
        remove(&folder);
        fs::create_dir(&folder)?;
        let plugin = Self { folder, library };
        let target = format!("/proc/{}/fd/{}", std::process::id(), plugin.library.as_raw_fd());
        std::os::unix::fs::symlink(target, plugin.folder.join(LINK))?;
        Ok(plugin)
    }

    /// Returns the folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for DevicePlugin {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

fn remove(folder: &Path) {
    // There may be none, and a folder more does no harm.
    let _ = fs::remove_file(folder.join(LINK));
    let _ = fs::remove_dir(folder);
}
