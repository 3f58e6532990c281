//! Standard streams over real fifos and terminals.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::pty::OpenptFlags;
use tempfile::TempDir;

use super::*;
use crate::container::tests::reaper;

/// Capacity of a pipe or fifo.
const PIPE: usize = 65536;
/// Bytes for the copy's own buffer: less than 8 KiB, so the copy reads on while its writes block.
const MORE: usize = 4000;

fn owner() -> Owner {
    Owner { namespace: "test".into(), id: "c".into(), uid: 0, gid: 0 }
}

/// Makes a folder with the fifos `in` and `out`.
pub(crate) fn fifos() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["in", "out"] {
        let path = folder.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
    folder
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Returns both sides of a terminal that passes bytes on unchanged.
fn terminal() -> (OwnedFd, File) {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let name = PathBuf::from(rustix::pty::ptsname(&master, Vec::new()).unwrap().into_string().unwrap());
    let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    let mut settings = rustix::termios::tcgetattr(&slave).unwrap();
    settings.make_raw();
    rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &settings).unwrap();
    (master, File::from(slave))
}

/// Hands a terminal over, as a runtime does.
fn send(socket: &Path, master: &OwnedFd) {
    let stream = UnixStream::connect(socket).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files = [master.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    rustix::net::sendmsg(&stream, &[IoSlice::new(b"tty")], &mut ancillary, SendFlags::empty()).unwrap();
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| b'a' + u8::try_from(n % 23).unwrap()).collect()
}

/// Writes all of `data` to the terminal and closes it, as an ending process does; the copies run
/// meanwhile.
async fn write_and_end(mut slave: File, data: Vec<u8>) {
    let process = tokio::task::spawn_blocking(move || slave.write_all(&data).unwrap());
    process.await.unwrap();
    // Enough for a copy to read until the terminal's end, without being able to write.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

async fn read_to_end(from: File) -> Vec<u8> {
    let read = move || {
        let mut from = from;
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        all
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

#[tokio::test]
async fn the_end_of_a_terminals_output_waits_for_a_slow_client() {
    let folder = fifos();
    let out = folder.path().join("out");
    let stdio = Stdio::new(String::new(), text(&out), String::new(), true);
    let (io, prepared) = stdio.prepare(&owner(), &reaper()).await.unwrap();
    let ProcessIo::Terminal { console_socket } = io else { panic!("{io:?}") };
    let (master, slave) = terminal();
    send(&console_socket, &master);
    drop(master);
    let copies = prepared.connect().await.unwrap();
    let client = rustix::fs::open(&out, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    rustix::fs::fcntl_setfl(&client, OFlags::empty()).unwrap();

    let data = pattern(PIPE + MORE);
    write_and_end(slave, data.clone()).await;
    let shut_down = tokio::spawn(copies.shut_down());
    let read = read_to_end(File::from(client)).await;
    assert_eq!(read.len(), data.len());
    assert!(read == data);
    shut_down.await.unwrap();
}

#[tokio::test]
async fn the_end_of_a_terminals_output_waits_for_a_slow_logger() {
    let (master, slave) = terminal();
    let (read, write) = io::pipe().unwrap();
    let copies = Copies::default();
    let output = TerminalOutput(Pty::new(File::from(master)).unwrap());
    copies.copy(output, pipe::Sender::from_owned_fd(write.into()).unwrap());

    let data = pattern(PIPE + MORE);
    write_and_end(slave, data.clone()).await;
    let read = read_to_end(File::from(OwnedFd::from(read))).await;
    assert_eq!(read.len(), data.len());
    assert!(read == data);
}
