//! Terminals: the socket for the hand-over by a runtime, and the output.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use containerd_shim::io::Pty;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tempfile::TempDir;
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::UnixListener;

use super::StdioError;

/// Folder for sockets, on a tmpfs. Bundle paths are too long for a socket address (108 bytes).
const FOLDER: &str = "/run/containerd/gpusnap";
/// Longest wait for the terminal. A runtime sends the terminal before `create` returns; the limit
/// is for a faulty one.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A listening socket in its own folder, removed with the socket.
pub(super) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
    _folder: TempDir,
}

impl ConsoleSocket {
    pub(super) fn bind() -> Result<Self, StdioError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| StdioError::File { action: "make a console socket in", path, source }
        };
        std::fs::create_dir_all(FOLDER).map_err(failed(Path::new(FOLDER)))?;
        // Created 0700: nobody else may offer the shim a terminal.
        let folder = tempfile::Builder::new().prefix("pty-").tempdir_in(FOLDER).map_err(failed(Path::new(FOLDER)))?;
        let path = folder.path().join("s");
        let listener = StdUnixListener::bind(&path).map_err(failed(&path))?;
        listener.set_nonblocking(true).map_err(failed(&path))?;
        let listener = UnixListener::from_std(listener).map_err(failed(&path))?;
        Ok(Self { listener, path, _folder: folder })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the terminal's master.
    pub(super) async fn receive(self) -> Result<File, StdioError> {
        match tokio::time::timeout(TIMEOUT, self.accept()).await {
            Ok(received) => received.map_err(StdioError::NoTerminal),
            Err(_) => Err(StdioError::NoTerminal(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn accept(self) -> io::Result<File> {
        let (stream, _) = self.listener.accept().await?;
        loop {
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || receive_file(&stream)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => return received,
            }
        }
    }
}

fn receive_file(stream: &tokio::net::UnixStream) -> io::Result<File> {
    // The message's bytes are the terminal's name, unused here.
    let mut name = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [io::IoSliceMut::new(&mut name)];
    rustix::net::recvmsg(stream, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut files) = message
            && let Some(file) = files.next()
        {
            return Ok(File::from(file));
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the message carried no file"))
}

/// Output of a terminal, read from its master, with the end of file of a pipe.
///
/// The kernel reports EIO after the last process has closed the slave. On an error,
/// `tokio::io::copy` drops the bytes not yet written; at an end of file such bytes are written
/// first.
pub(super) struct TerminalOutput(pub(super) Pty);

impl AsyncRead for TerminalOutput {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.0).poll_read(cx, buffer)) {
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Poll::Ready(Ok(())),
            read => Poll::Ready(read),
        }
    }
}
