//! Last step of a process: search and exec of the user's program.
//!
//! Replaces libcontainer's own executor, which needs a PATH in the environment, requires a program
//! executable by everybody, and leaves SIGPIPE ignored.

use std::collections::HashMap;
use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::container::State;
use libcontainer::hooks::run_hooks;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::{Hook, Process, Spec};
use rustix::fs::{Access, FileType, Mode, OFlags};
use rustix::termios::Winsize;

use super::seccomp::Filter;
use crate::libcontainer::sys;

/// Search path without a PATH in the environment.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Clone, Debug)]
pub(super) struct Program {
    /// Filter from then on.
    pub(super) seccomp: Option<Filter>,
    /// Print errors: after a container's start, only a user reading the output learns of errors.
    pub(super) complain: bool,
    /// Descriptors 0, 1 and 2, unless the process has a terminal.
    pub(super) stdio: Option<Rc<Stdio>>,
    /// Hooks to run first.
    pub(super) hooks: Option<Rc<StartHooks>>,
}

/// The startContainer hooks. libcontainer's own run would pass them the status "creating".
#[derive(Debug)]
pub(super) struct StartHooks {
    pub(super) hooks: Vec<Hook>,
    pub(super) state: State,
}

impl StartHooks {
    fn run(&self, process: &Process) -> Result<(), String> {
        // Default environment of a hook, as by runc.
        let environment = process.env().iter().flatten().filter_map(|variable| variable.split_once('='));
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        run_hooks(Some(&self.hooks), Some(&self.state), None, None, Some(&environment))
            .map_err(|error| format!("a startContainer hook failed: {error}"))
    }
}

impl Executor for Program {
    /// Runs inside the container as its user, before the start: faults of the program can still be
    /// reported.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        self.prepare(spec).map_err(ExecutorValidationError::ArgValidationError)
    }

    fn setup_envs(&self, _environment: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // execve passes the environment, in the specification's order.
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let words = match self.execute(spec) {
            Ok(never) => match never {},
            Err(words) => words,
        };
        if self.complain {
            let _ = writeln!(io::stderr(), "{words}");
            // runc's code. The helper, libcontainer's receiver of errors, has gone.
            sys::exit(1);
        }
        Err(ExecutorError::Other(words))
    }
}

/// Standard input, output and error of a process.
#[derive(Debug)]
pub(super) struct Stdio {
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

impl Stdio {
    /// Makes the streams this process's. libcontainer would do so at once: errors of hooks would
    /// then go to the container's output, not to the shim.
    fn take_effect(&self) -> io::Result<()> {
        rustix::stdio::dup2_stdin(inner(&self.stdin)?)?;
        rustix::stdio::dup2_stdout(inner(&self.stdout)?)?;
        rustix::stdio::dup2_stderr(inner(&self.stderr)?)?;
        Ok(())
    }
}

/// Returns the container's own `/dev/null` for the host's; any other file unchanged.
fn inner(fd: &OwnedFd) -> io::Result<OwnedFd> {
    if is_null(fd)?
        && let Ok(own) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
        && is_null(&own)?
    {
        return Ok(own);
    }
    fd.try_clone()
}

/// Returns whether a file is the real null device.
pub(super) fn is_null(fd: impl AsFd) -> io::Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    Ok(is_device && stat.st_rdev == rustix::fs::makedev(1, 3))
}

enum Never {}

impl Program {
    fn prepare(&self, spec: &Spec) -> Result<(), String> {
        let process = process(spec)?;
        if let Some(stdio) = &self.stdio {
            stdio.take_effect().map_err(|error| format!("cannot set standard input and output: {error}"))?;
        }
        if process.terminal() == Some(true)
            && let Some(size) = process.console_size()
        {
            let cells = |cells: u64| u16::try_from(cells).unwrap_or(u16::MAX);
            let size =
                Winsize { ws_row: cells(size.height()), ws_col: cells(size.width()), ws_xpixel: 0, ws_ypixel: 0 };
            // A wrong size is no reason to fail the start.
            let _ = rustix::termios::tcsetwinsize(rustix::stdio::stdin(), size);
        }
        self.seccomp.as_ref().map_or(Ok(()), Filter::before_start)?;
        // With the program's later capabilities: execution depends on them.
        find(process).map(drop)
    }

    fn execute(&self, spec: &Spec) -> Result<Never, String> {
        let process = process(spec)?;
        self.hooks.as_ref().map_or(Ok(()), |hooks| hooks.run(process))?;
        let program = find(process)?;
        let strings = |strings: &Option<Vec<String>>| -> Result<Vec<CString>, String> {
            let strings = strings.as_deref().unwrap_or_default().iter();
            strings.map(|string| CString::new(string.as_str())).collect::<Result<_, _>>().map_err(|error| {
                format!("an argument or environment variable of the process cannot be passed: {error}")
            })
        };
        let path = CString::new(program.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
        let arguments = strings(process.args())?;
        let environment = strings(process.env())?;
        self.seccomp.as_ref().map_or(Ok(()), Filter::before_exec)?;
        let error = sys::execute(&path, &arguments, &environment);
        Err(format!("exec {}: {}", program.display(), words(&error)))
    }
}

fn process(spec: &Spec) -> Result<&Process, &'static str> {
    spec.process().as_ref().ok_or("the specification has no process")
}

/// Returns the file to execute, found as by runc (and Go). Clients look for runc's messages.
fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process.args().as_ref().and_then(|args| args.first()).ok_or("process.args is empty")?;
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(not_found(name, &words(&error))),
            Err(error) => Err(not_found(name, &format!("stat {name}: {}", words(&error)))),
        };
    }
    let mut denied = false;
    for directory in path(process.env().as_deref().unwrap_or_default()).split(':') {
        // An empty entry means the working directory, which nobody intends.
        if directory.is_empty() {
            continue;
        }
        let candidate = Path::new(directory).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) => denied |= error.kind() == io::ErrorKind::PermissionDenied,
        }
    }
    Err(not_found(name, if denied { "permission denied" } else { "executable file not found in $PATH" }))
}

fn not_found(name: &str, why: &str) -> String {
    format!("exec: {name:?}: {why}")
}

fn path(environment: &[String]) -> &str {
    environment.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH)
}

/// Checks that this user can execute a file.
fn executable(path: &Path) -> io::Result<()> {
    let stat = rustix::fs::stat(path)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(rustix::fs::access(path, Access::EXEC_OK)?),
        FileType::Directory => Err(io::ErrorKind::IsADirectory.into()),
        _ => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Returns the kernel's message in Go's form: lower case, without the number.
pub(super) fn words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error ").next().unwrap_or(&text);
    let mut characters = text.chars();
    characters.next().map(|first| first.to_lowercase().chain(characters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use oci_spec::runtime::ProcessBuilder;

    use super::*;

    fn found(arguments: &[&str], environment: &[&str]) -> Result<PathBuf, String> {
        let strings = |list: &[&str]| list.iter().map(|&string| string.to_owned()).collect::<Vec<_>>();
        find(&ProcessBuilder::default().args(strings(arguments)).env(strings(environment)).build().unwrap())
    }

    #[test]
    fn a_program_is_found_in_the_path_of_its_environment() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tool");
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        let path = format!("PATH=/nowhere::{}", directory.path().display());
        assert_eq!(found(&["tool"], &["PATH=/first-is-overridden", &path]).unwrap(), file);
        assert_eq!(
            found(&["./../nope"], &[]).unwrap_err(),
            r#"exec: "./../nope": stat ./../nope: no such file or directory"#
        );
    }

    #[test]
    fn without_a_path_the_usual_directories_are_searched() {
        assert!(found(&["sh"], &[]).unwrap().ends_with("sh"));
    }

    #[test]
    fn clients_recognise_what_was_not_found() {
        assert_eq!(found(&["nope"], &[]).unwrap_err(), r#"exec: "nope": executable file not found in $PATH"#);
        assert_eq!(found(&["/etc/passwd"], &[]).unwrap_err(), r#"exec: "/etc/passwd": permission denied"#);
        assert_eq!(found(&["/etc"], &[]).unwrap_err(), r#"exec: "/etc": stat /etc: is a directory"#);
        found(&[], &[]).unwrap_err();
    }
}
