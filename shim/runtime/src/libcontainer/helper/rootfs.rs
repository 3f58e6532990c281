//! Files below a container's root, possibly full of links that lead elsewhere.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use super::error::{Context, Result};

/// Largest passwd file, in bytes; no honest one is larger.
const PASSWD_LIMIT: u64 = 1 << 20;

/// A directory that confines every path opened below.
#[derive(Debug)]
pub(super) struct Root {
    directory: OwnedFd,
    path: PathBuf,
}

impl Root {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(path, flags, Mode::empty()).context(|| format!("open the root {}", path.display()))?;
        Ok(Self { directory, path: path.to_owned() })
    }

    /// Opens a file, with links resolved as a process inside would see them.
    pub(super) fn resolve(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(&self.directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// Returns the path without links, as a process inside would see it. Missing parts are taken
    /// unchanged.
    pub(super) fn real_path(&self, path: &Path) -> io::Result<PathBuf> {
        /// Most links, as in the kernel.
        const LINKS: usize = 40;
        let mut links = 0;
        let mut real = PathBuf::from("/");
        let mut left: VecDeque<OsString> = names(path).collect();
        while let Some(name) = left.pop_front() {
            if name == ".." {
                real.pop();
                continue;
            }
            real.push(&name);
            let entry = match self.resolve(&real, OFlags::PATH | OFlags::NOFOLLOW) {
                Ok(entry) => entry,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if FileType::from_raw_mode(rustix::fs::fstat(&entry)?.st_mode) != FileType::Symlink {
                continue;
            }
            links += 1;
            if links > LINKS {
                return Err(rustix::io::Errno::LOOP.into());
            }
            let target = rustix::fs::readlinkat(&entry, "", Vec::new())?;
            let target = Path::new(OsStr::from_bytes(target.as_bytes()));
            real.pop();
            if target.is_absolute() {
                real = PathBuf::from("/");
            }
            for name in names(target).collect::<Vec<_>>().into_iter().rev() {
                left.push_front(name);
            }
        }
        Ok(real)
    }

    /// Makes a directory and its missing parents, for this owner.
    pub(super) fn make_directory(&self, path: &Path, owner: (u32, u32)) -> Result<()> {
        let make = || -> io::Result<()> {
            let open = OFlags::PATH | OFlags::DIRECTORY;
            let mut done = PathBuf::from("/");
            let mut parent = self.resolve(&done, open)?;
            for component in path.components() {
                let Component::Normal(name) = component else { continue };
                done.push(name);
                parent = match self.resolve(&done, open) {
                    Ok(directory) => directory,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
                        let directory = self.resolve(&done, open)?;
                        let (uid, gid) = owner;
                        rustix::fs::chownat(
                            &directory,
                            "",
                            Some(rustix::fs::Uid::from_raw(uid)),
                            Some(rustix::fs::Gid::from_raw(gid)),
                            rustix::fs::AtFlags::EMPTY_PATH,
                        )?;
                        directory
                    }
                    Err(error) => return Err(error),
                };
            }
            drop(parent);
            Ok(())
        };
        make().context(|| format!("make the directory {} in {}", path.display(), self.path.display()))
    }

    /// Makes an empty file and its missing parents, for this owner.
    pub(super) fn make_file(&self, path: &Path, owner: (u32, u32)) -> Result<()> {
        let action = || format!("make the file {} in {}", path.display(), self.path.display());
        match self.resolve(path, OFlags::PATH) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context(action),
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        self.make_directory(parent, owner)?;
        let make = || -> io::Result<()> {
            let parent = self.resolve(parent, OFlags::PATH | OFlags::DIRECTORY)?;
            let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644))?;
            let (uid, gid) = owner;
            Ok(rustix::fs::fchown(&file, Some(rustix::fs::Uid::from_raw(uid)), Some(rustix::fs::Gid::from_raw(gid)))?)
        };
        make().context(action)
    }

    /// Returns the home of a user according to the container's passwd file.
    pub(super) fn home(&self, uid: u32) -> Option<String> {
        let file = self.resolve(Path::new("/etc/passwd"), OFlags::RDONLY | OFlags::NONBLOCK).ok()?;
        let file = File::from(file);
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut passwd = Vec::new();
        file.take(PASSWD_LIMIT).read_to_end(&mut passwd).ok()?;
        home(&String::from_utf8_lossy(&passwd), uid)
    }
}

/// Returns the names in a path, `..` included.
fn names(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

impl AsFd for Root {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

fn home(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        (fields.next()?.parse::<u32>().ok()? == uid).then_some(())?;
        let home = fields.nth(2)?;
        (!home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\n\nbad line\nmy user:x:1000:1000::/home/me:/bin/sh\nx:x:7:7:::\n";

    fn owner() -> (u32, u32) {
        (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
    }

    #[test]
    fn a_home_is_found_by_uid() {
        assert_eq!(home(PASSWD, 1000).as_deref(), Some("/home/me"));
        assert_eq!(home(PASSWD, 7), None);
        assert_eq!(home(PASSWD, 8), None);
    }

    #[test]
    fn a_link_to_the_hosts_passwd_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("etc")).unwrap();
        symlink("../../../../../../../../etc/passwd", directory.path().join("etc/passwd")).unwrap();
        let root = Root::open(directory.path()).unwrap();
        // The link now leads to itself, as for a process inside.
        assert_eq!(root.home(0), None);
    }

    #[test]
    fn a_path_is_followed_inside_even_to_what_is_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let link = |to: &str, name: &str| symlink(to, directory.path().join(name)).unwrap();
        fs::create_dir_all(directory.path().join("run/user")).unwrap();
        fs::create_dir(directory.path().join("var")).unwrap();
        link("/run", "var/run");
        link("../../../../not/there", "up");
        link("loop", "loop");
        let root = Root::open(directory.path()).unwrap();
        let real = |path: &str| root.real_path(Path::new(path)).map(|path| path.display().to_string());
        assert_eq!(real("/var/run/secrets/x").unwrap(), "/run/secrets/x");
        assert_eq!(real("var/run/user/../y").unwrap(), "/run/y");
        assert_eq!(real("/up/z").unwrap(), "/not/there/z");
        assert_eq!(real("/../..").unwrap(), "/");
        assert_eq!(real("/run/user").unwrap(), "/run/user");
        real("/loop/x").unwrap_err();
    }

    #[test]
    fn a_missing_directory_is_made_inside_whatever_the_links() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), directory.path().join("link")).unwrap();
        symlink("/there", directory.path().join("inner")).unwrap();
        fs::create_dir(directory.path().join("there")).unwrap();
        let root = Root::open(directory.path()).unwrap();
        root.make_directory(Path::new("/a/b/../c"), owner()).unwrap();
        assert!(directory.path().join("a/b/c").is_dir());
        let mode = fs::metadata(directory.path().join("a/b")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        root.make_directory(Path::new("/inner/x"), owner()).unwrap();
        assert!(directory.path().join("there/x").is_dir());
        root.make_directory(Path::new("/link/x"), owner()).unwrap_err();
        assert!(!outside.path().join("x").exists());
    }
}
