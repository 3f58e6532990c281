//! Files in memory that look sparser to CRIU than they are.
//!
//! CRIU writes the contents of shared memory with one thread, page by page, and has no option to
//! leave memory out. But CRIU asks the kernel for each file's data and holes (`lseek` with
//! `SEEK_DATA` and `SEEK_HOLE`; criu/shmem.c), and writes the data only. A seccomp filter on the
//! criu of a dump passes these two questions to this process, which answers for the files of a
//! list. Nothing changes for the dumped processes, so nothing has to be undone:
//! ```text
//!   criu: lseek(fd, 0, SEEK_DATA) ──► kernel ──► Watch: fd is a file of the list? ─┬─ no ──► the kernel answers
//!                                                                                  └─ yes ─► "no data behind 0x1000"
//! ```
//!
//! If this process dies, the kernel fails the questions, and CRIU gives up the dump. A CRIU that
//! does not ask writes all contents: more than necessary, and right.

#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use sys::{Answer, Question};

/// A file in memory whose contents are saved elsewhere in part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sparse {
    /// Device of the file, as in `st_dev`.
    pub device: u64,
    /// Inode of the file.
    pub inode: u64,
    /// Data left to CRIU, in bytes of the file: ascending, whole pages, with holes between.
    pub data: Vec<Range<u64>>,
}

impl Sparse {
    /// Returns the next data at or behind an offset.
    fn data_from(&self, offset: u64) -> Option<u64> {
        let next = self.data.get(self.data.partition_point(|data| data.end <= offset))?;
        Some(next.start.max(offset))
    }

    /// Returns the next hole at or behind an offset.
    fn hole_from(&self, offset: u64) -> u64 {
        let next = self.data.get(self.data.partition_point(|data| data.end <= offset));
        next.filter(|data| data.start <= offset).map_or(offset, |data| data.end)
    }
}

/// A thread that answers for files as long as this value lives.
#[derive(Debug)]
pub(crate) struct Watch {
    thread: Option<JoinHandle<()>>,
    /// Closed, it ends the thread.
    end: Option<io::PipeWriter>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A thread that has panicked answers nothing any more: CRIU knows.
            let _ = thread.join();
        }
    }
}

/// Runs `spawn`, with answers for `files` to all processes that `spawn` makes. `None` where the
/// kernel has no such filters, or this process may not make one: the questions are answered by the
/// kernel then.
pub(crate) fn spawn_watched<T: Send>(files: Vec<Sparse>, spawn: impl FnOnce() -> T + Send) -> (T, Option<Watch>) {
    if files.is_empty() {
        return (spawn(), None);
    }
    let runtime = tokio::runtime::Handle::try_current().ok();
    let (tell, told) = mpsc::sync_channel(1);
    // A filter is for ever: of the thread that installs it, and of that thread's children.
    let run = move || {
        let _runtime = runtime.as_ref().map(tokio::runtime::Handle::enter);
        // The receiver waits for it.
        let _ = tell.send(sys::listen());
        spawn()
    };
    let (spawned, watch) = std::thread::scope(|scope| {
        let thread = scope.spawn(run);
        let listener = told.recv().map_err(io::Error::other).flatten();
        let watch = listener.and_then(|listener| begin(files, listener.into()));
        (thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), watch)
    });
    match watch {
        Ok(watch) => (spawned, Some(watch)),
        Err(error) => {
            tracing::warn!(%error, "criu cannot be told to leave out shared memory, and writes all of it");
            (spawned, None)
        }
    }
}

/// Starts the answers.
fn begin(files: Vec<Sparse>, listener: File) -> io::Result<Watch> {
    let (ended, end) = io::pipe()?;
    let answer = move || answer_all(&files, &listener, &ended);
    let thread = std::thread::Builder::new().name("sparse".into()).spawn(answer)?;
    Ok(Watch { thread: Some(thread), end: Some(end) })
}

/// Answers until `ended` is closed or no process has the filter.
fn answer_all(files: &[Sparse], listener: &File, ended: &io::PipeReader) {
    loop {
        let mut ready = [PollFd::new(listener, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        if !ready[1].revents().is_empty() || ready[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            return;
        }
        if ready[0].revents().is_empty() {
            continue;
        }
        // A process that was killed meanwhile has no question any more.
        let Ok(question) = sys::receive(listener) else { continue };
        let _ = sys::send(listener, question.id, answer(files, &question));
    }
}

fn answer(files: &[Sparse], question: &Question) -> Answer {
    let Question { pid, fd, offset, .. } = question;
    // The asking thread waits, so that its descriptor stays the same file.
    let Ok(found) = fs::metadata(format!("/proc/{pid}/fd/{fd}")) else { return Answer::Kernel };
    let of = files.iter().find(|file| (file.device, file.inode) == (found.dev(), found.ino()));
    match of {
        Some(file) if *offset < found.size() => match question.is_hole {
            false => file.data_from(*offset).map_or(Answer::Error(Errno::NXIO), Answer::Offset),
            true => Answer::Offset(file.hole_from(*offset).min(found.size())),
        },
        // The kernel refuses an offset behind the end.
        _ => Answer::Kernel,
    }
}
