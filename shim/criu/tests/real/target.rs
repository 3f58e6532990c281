//! The process to be dumped: this program again, as `target FILE [THING]...`. The target counts in
//! the file, and holds each named thing.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::pages::{self, Pages};
use crate::sys;

/// Argument that makes this program a target.
pub(crate) const TARGET: &str = "target";
/// Exit code of a target unable to get the thing here.
pub(crate) const CANNOT: u32 = 77;
/// Size of the thing `memory`, in bytes.
pub(crate) const MEMORY: usize = 512 << 20;

/// Environment variable with the address of the thing `unix`.
pub(crate) const UNIX_SOCKET: &str = "UNIX_SOCKET";

#[derive(Default)]
struct Held {
    child: Option<Child>,
    /// Both ends of one connection.
    talk: Option<(TcpStream, TcpStream)>,
    echo: bool,
    memory: Vec<u8>,
    pages: Option<Pages>,
    files: Vec<OwnedFd>,
}

/// Counts until killed. Returns an exit code if that fails.
pub(crate) fn main(arguments: &[String]) -> u8 {
    let [file, things @ ..] = arguments else { return 1 };
    if file == "echo-child" {
        return echo();
    }
    let count = open(file);
    let mut held = Held::default();
    for thing in things {
        if !hold(&mut held, file, thing) {
            return u8::try_from(CANNOT).unwrap();
        }
    }
    for number in 0_u64.. {
        if let Some(child) = &mut held.child {
            child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        }
        if let Some((one, other)) = &mut held.talk {
            one.write_all(b"x").unwrap();
            other.read_exact(&mut [0]).unwrap();
        }
        if let Some(pages) = &mut held.pages {
            pages.verify();
        }
        if held.echo {
            println!("{number}");
        }
        write_count(&count, number);
        std::thread::sleep(Duration::from_millis(5));
    }
    1
}

/// Writes the count, always in the same length: a restore compares the sizes of files.
pub(crate) fn write_count(count: &File, number: u64) {
    count.write_at(format!("{number:019}\n").as_bytes(), 0).unwrap();
}

pub(crate) fn open(path: &str) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

fn hold(held: &mut Held, file: &str, thing: &str) -> bool {
    let named = |suffix: &str| format!("{file}.{suffix}");
    match thing {
        "threads" => {
            for _ in 0..4 {
                std::thread::spawn(|| std::thread::sleep(Duration::MAX));
            }
        }
        // The child passes each byte on through two pipes.
        "child" => held.child = Some(spawn(&["echo-child"])),
        "echo" => held.echo = true,
        "family" => held.pages = Some(pages::family(&named)),
        "deep" => pages::deep_thread(&named),
        "staging" => held.pages = Some(pages::staging(&named)),
        "memory" => held.memory = vec![1; MEMORY],
        "tcp" => {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
            let accepted = server.accept().unwrap().0;
            held.files.extend([server.into(), client.into(), accepted.into()]);
        }
        "talk" => {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
            held.talk = Some((client, server.accept().unwrap().0));
        }
        "unix" => held.files.push(UnixStream::connect(std::env::var(UNIX_SOCKET).unwrap()).unwrap().into()),
        "lock" => {
            let locked = open(&named("lock"));
            locked.lock().unwrap();
            held.files.push(locked.into());
        }
        "ghost" => {
            let mut ghost = open(&named("ghost"));
            ghost.write_all(&vec![1; 2 << 20]).unwrap();
            std::fs::remove_file(named("ghost")).unwrap();
            held.files.push(ghost.into());
        }
        "linked" => {
            held.files.push(open(&named("linked")).into());
            std::fs::hard_link(named("linked"), named("linked.other")).unwrap();
            std::fs::remove_file(named("linked")).unwrap();
        }
        "size" => {
            let mut sized = open(&named("size"));
            sized.write_all(b"x").unwrap();
            held.files.push(sized.into());
        }
        // The test has made the device.
        "fuse" => match File::options().read(true).write(true).open(named("fuse")) {
            Ok(device) => held.files.push(device.into()),
            Err(_) => return false,
        },
        "io_uring" => match sys::io_uring() {
            Ok(ring) => held.files.push(ring),
            Err(_) => return false,
        },
        "traced" => sys::traced_child(),
        other => panic!("no thing {other}"),
    }
    true
}

/// Starts a child that ends with the input. Nobody waits for it: the target only ends by a kill.
#[allow(clippy::zombie_processes)]
fn spawn(arguments: &[&str]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(TARGET).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn echo() -> u8 {
    let mut byte = [0];
    while std::io::stdin().read_exact(&mut byte).is_ok() {
        std::io::stdout().write_all(&byte).unwrap();
        std::io::stdout().flush().unwrap();
    }
    0
}
