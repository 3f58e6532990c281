//! CRIU's log, and explanations of errors.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Most error lines in an error. The first is the cause, the rest are consequences.
const MAX_ERRORS: usize = 5;
/// Longest line examined, in bytes.
const MAX_LINE: usize = 1024;
/// Most established connections remembered: enough to name one.
const MAX_CONNECTIONS: usize = 10_000;
/// Most bytes read of a log. A dump of thousands of mappings writes some ten MB at level 4.
const MAX_LOG: u64 = 256 << 20;

/// Harmless errors in every log on some machines.
const HARMLESS: [&str; 2] = [
    // Without CAP_SYS_RESOURCE: CRIU keeps the current limit.
    "Can't setup RLIMIT_NOFILE",
    // /run is no tmpfs: CRIU asks the kernel anew each time.
    "Can't keep kdat cache on non-tempfs",
];

/// Errors in a log.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Log {
    pub(crate) errors: Vec<String>,
    /// `None` without a log.
    pub(crate) path: Option<PathBuf>,
}

/// Explains a failure on one line, by a log of another client's criu, with the log's path; `None`
/// if the log has no error.
#[must_use]
pub fn explain(path: &Path) -> Option<String> {
    let log = read(path, "");
    if log.errors.is_empty() {
        return None;
    }
    let cause = cause(&log.errors).unwrap_or_else(|| "criu failed".to_owned());
    Some(format!("{cause}: {} (log: {})", log.errors.join("; "), path.display()))
}

/// Reads the log at `path`. Without an error there, reads criu's output from before the log.
pub(crate) fn read(path: &Path, output: &str) -> Log {
    let mut log = Log::default();
    match File::open(path) {
        Ok(file) => {
            log.errors = errors(file.take(MAX_LOG));
            log.path = Some(path.to_owned());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(path = %path.display(), %error, "cannot read criu's log"),
    }
    if log.errors.is_empty() {
        log.errors = errors(output.as_bytes());
    }
    log
}

/// Returns the first error lines, without time, source position and harmless errors.
pub(crate) fn errors(text: impl Read) -> Vec<String> {
    let mut errors: Vec<String> = vec![];
    let mut lines = BufReader::new(text);
    let mut line = vec![];
    let mut context = Context::default();
    while errors.len() < MAX_ERRORS {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "cannot read on in criu's log");
                break;
            }
        }
        line.truncate(MAX_LINE);
        let line = String::from_utf8_lossy(&line);
        context.learn(&line);
        let Some(error) = error_in(&line) else { continue };
        if HARMLESS.iter().any(|harmless| error.contains(harmless)) {
            continue;
        }
        let error = context.complete(error);
        if errors.last() != Some(&error) {
            errors.push(error);
        }
    }
    errors
}

/// Objects of errors, named in an earlier line.
#[derive(Default)]
struct Context {
    /// A unix socket connected to the outside.
    unix_socket: Option<String>,
    /// Established connections: inode number, and addresses.
    connections: HashMap<String, String>,
    /// The inode number of the socket being dumped.
    socket: Option<String>,
    /// The image file last found missing; to CRIU the same as an empty file.
    missing_image: Option<String>,
}

impl Context {
    fn learn(&mut self, line: &str) {
        if let Some((_, socket)) = line.split_once("Runaway socket: ") {
            // `sk unix: Runaway socket: ino 12 ... name /run/x`
            self.unix_socket = Some(socket.trim().to_owned());
        } else if let Some((_, socket)) = line.split_once("Collected: ino ")
            && line.contains("TCP_ESTABLISHED")
        {
            self.connection(socket);
        } else if let Some((_, socket)) = line.split_once("Searching for socket ") {
            self.socket = socket.split_whitespace().next().map(str::to_owned);
        } else if let Some((_, rest)) = line.split_once(") No ")
            && let Some(image) = rest.trim_end().strip_suffix(" image")
        {
            self.missing_image = Some(image.to_owned());
        }
    }

    /// Records a line `0xf1 family AF_INET type SOCK_STREAM port 5000 state TCP_ESTABLISHED
    /// src_addr 127.0.0.1`.
    fn connection(&mut self, socket: &str) {
        let words: Vec<&str> = socket.split_whitespace().collect();
        let after = |name: &str| words.iter().position(|word| *word == name).and_then(|at| words.get(at + 1));
        if let (Some(inode), Some(port), Some(address)) = (words.first(), after("port"), after("src_addr"))
            && self.connections.len() < MAX_CONNECTIONS
        {
            self.connections.insert((*inode).to_owned(), format!("{address} port {port}"));
        }
    }

    fn complete(&self, error: String) -> String {
        let object = if error.contains("Consider using --ext-unix-sk") {
            self.unix_socket.as_ref()
        } else if error.contains("Connected TCP socket, ") {
            self.socket.as_ref().and_then(|inode| self.connections.get(inode))
        } else if error.contains("(empty-image)") {
            return match &self.missing_image {
                Some(image) => error.replace("(empty-image)", &format!("{image}, which is missing")),
                None => error,
            };
        } else {
            None
        };
        object.map_or_else(|| error.clone(), |object| format!("{error} [{object}]"))
    }
}

/// Returns the message of an error line: `tty: what` in `(00.001) pie: 12: Error (criu/tty.c:1):
/// tty: what`.
fn error_in(line: &str) -> Option<String> {
    let rest = line.split_once("Error (").map(|(_, rest)| rest)?;
    let message = rest.split_once("): ").map_or(rest, |(_, message)| message);
    Some(message.trim().to_owned())
}

/// Returns a sentence for a well-known cause, with the object's name.
pub(crate) fn cause(errors: &[String]) -> Option<String> {
    errors.iter().find_map(|error| sentence(error))
}

/// The way out for programs that use what a preparation refuses.
const PREPARED: &str = "start the program in a container that is prepared (gpusnap.dev/prepare: seccomp), in which it \
                        does without";

fn sentence(error: &str) -> Option<String> {
    let has = |text: &str| error.contains(text);
    let between = |start: &str, end: &str| {
        let (_, rest) = error.split_once(start)?;
        let (found, _) = rest.split_once(end)?;
        Some(found.trim().to_owned())
    };
    let known = if has("Connected TCP socket in image") {
        "the image holds an established TCP connection, and neither keeping nor closing it is allowed".to_owned()
    } else if has("Connected TCP socket") {
        let connection = between("[", "]").map_or_else(String::new, |connection| format!(" ({connection})"));
        format!(
            "the process has an established TCP connection{connection}, and neither keeping nor closing it is allowed"
        )
    } else if has("External socket is used") {
        let socket = between("[", "]").map_or_else(String::new, |socket| format!(" ({socket})"));
        format!("the process uses a unix socket whose other end is outside{socket}, and that is not allowed")
    } else if let Some(file) = between("File ", " has bad size") {
        let sizes = error.split_once("has bad size ").map_or("", |(_, sizes)| sizes);
        format!("the file {file} has changed since the dump: its size is {sizes}")
    } else if let Some(file) = between("Can't open file ", " on restore") {
        format!("the file {file}, which the dumped process had open, cannot be opened")
    } else if let Some(place) = after(error, "Unsupported mapping found ") {
        format!("the process maps something at {place} that CRIU cannot dump")
    } else if has("handle_device_vma plugin failed") {
        "the process maps the memory of a device".to_owned()
    } else if let Some(pid) = between("Can't fork for ", ": File exists") {
        format!("pid {pid}, which the dumped process had, is in use here")
    } else if let Some(pid) = between("Unseizable non-zombie ", " found, state D") {
        format!("process {pid} waits in the kernel (for a vforked child, or for a device), where it cannot be stopped")
    } else if let Some(pid) = between("Unseizable non-zombie ", " found") {
        format!("process {pid} is traced by another process (a debugger)")
    } else if let Some(pid) = between("Unable to detach from ", ": No such process") {
        format!("there is no process {pid}")
    } else if has("send_fds failed (-22)") || has("anon_inode:[io_uring]") {
        // Of all files, the kernel refuses only rings in this way (scm_fp_copy in net/core/scm.c).
        format!("the process uses io_uring, which CRIU cannot dump: {PREPARED}")
    } else if has("Unsupported proto 262") {
        format!(
            "the process has a socket of MPTCP, which CRIU cannot dump: {PREPARED}; or switch MPTCP off (for Go \
             GODEBUG=multipathtcp=0, for the container sysctl net.mptcp.enabled=0)"
        )
    } else if has("criu itself is within dumped tree") {
        "criu runs inside the tree that it is to dump".to_owned()
    } else if has("Missing required plugin: gpusnap") {
        "big memory is not in the images: only gpusnap restores them, by their gpusnap.json".to_owned()
    } else if let Some(plugin) = after(error, "Missing required plugin: ") {
        format!("the image was made with CRIU's plugin {plugin}, which is switched off here")
    } else if let Some(file) = between("Can't dump ghost file ", " of ") {
        format!("the deleted file {file} is larger than what may be stored in the image (ghost-limit)")
    } else if let Some(file) = between("Can't create link remap for ", ". Use") {
        format!("the open file {file} has no name any more, and giving it one (link-remap) is not allowed")
    } else if has("Some file locks are hold") {
        "the process holds a file lock, and dumping locks (file-locks) is not allowed".to_owned()
    } else if has("Need to set the --tcp-close") {
        "the image was dumped with its TCP connections closed, which the restore must allow too (tcp-close)".to_owned()
    } else if let Some(what) = after(error, "Can't dump file ") {
        format!("the process has a file open that CRIU cannot dump: {what}")
    } else if has("is not a session leader") {
        "the process is not the leader of its session, and that is not allowed (shell-job)".to_owned()
    } else if let Some(mount) = between("No mapping for ", " mountpoint") {
        format!("the image has a mount ({mount}) for which the restore has no source")
    } else if has("capabilities do not match run time") {
        "this CPU lacks instructions that the dumped process may use".to_owned()
    } else if let Some(version) = after(error, "Not supported images version ") {
        format!("the image has version {version}, which this criu does not know")
    } else if let Some(file) = after(error, "Magic doesn't match for ").or_else(|| after(error, "Unexpected EOF on ")) {
        match file.strip_suffix(", which is missing") {
            Some(file) => format!("the image file {file} is missing"),
            None => format!("the image file {file} is damaged"),
        }
    } else {
        return None;
    };
    Some(known)
}

fn after(error: &str, start: &str) -> Option<String> {
    error.split_once(start).map(|(_, rest)| rest.trim().to_owned())
}
