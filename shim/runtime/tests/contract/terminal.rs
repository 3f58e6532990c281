//! Containers and execs with a terminal.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use oci_spec::runtime::BoxBuilder;
use runtime::ProcessIo;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::Winsize;
use tokio::net::UnixListener;

use crate::bed::{Bed, sentences};
use crate::container::soon;
use crate::spec::{Edit, process, shell};

sentences![
    a_container_gets_a_terminal_of_its_own,
    an_exec_gets_a_terminal_of_its_own,
    a_terminal_has_the_size_it_asks_for_and_can_be_resized,
    a_terminal_controls_its_processes,
    a_terminal_ends_with_its_container,
    without_anybody_at_the_console_socket_nothing_stays,
];

/// The listening end of a console socket.
pub(crate) struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    pub(crate) fn new(bed: &Bed) -> Self {
        let path = bed.folder().join(format!("console-{}", bed.world.number()));
        Self { listener: UnixListener::bind(&path).unwrap(), path }
    }

    pub(crate) fn io(&self) -> ProcessIo {
        ProcessIo::Terminal { console_socket: self.path.clone() }
    }

    /// Receives the master from the runtime.
    pub(crate) async fn master(self) -> Master {
        let (stream, _) = soon("the runtime connects", self.listener.accept()).await.unwrap();
        let stream = stream.into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        let (mut name, mut space) = ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))]);
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&stream, &mut [IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        let mut descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(descriptors.len(), 1);
        let file = std::fs::File::from(descriptors.remove(0));
        assert!(rustix::termios::isatty(&file));
        Master { file, heard: String::new() }
    }
}

pub(crate) struct Master {
    file: std::fs::File,
    heard: String,
}

impl Master {
    /// Reads until `what`; returns all output before.
    pub(crate) async fn hears(&mut self, what: &str) -> String {
        let Self { file, heard } = self;
        loop {
            if let Some((before, after)) = heard.split_once(what) {
                let (before, after) = (before.to_owned(), after.to_owned());
                *heard = after;
                return before;
            }
            let mut file = file.try_clone().unwrap();
            let read = tokio::task::spawn_blocking(move || {
                let mut buffer = [0; 1024];
                file.read(&mut buffer).map(|length| String::from_utf8(buffer[..length].to_vec()).unwrap())
            });
            let more = soon(&format!("it says {what:?}, not {heard:?}"), read).await.unwrap().unwrap();
            heard.push_str(&more);
        }
    }

    pub(crate) fn types(&mut self, text: &str) {
        self.file.write_all(text.as_bytes()).unwrap();
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.file, size).unwrap();
    }

    /// Waits until nobody has the other end any more.
    pub(crate) async fn ends(mut self) {
        let end = tokio::task::spawn_blocking(move || {
            let mut buffer = [0; 1024];
            loop {
                match self.file.read(&mut buffer) {
                    Ok(1..) => {}
                    other => return other,
                }
            }
        });
        let end = soon("the terminal ends", end).await.unwrap();
        assert_eq!(end.unwrap_err().raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    }
}

async fn a_container_gets_a_terminal_of_its_own(bed: &Bed) {
    let spec = shell("tty; test -t 0 && test -t 1 && test -t 2 && echo three; test -c /dev/console && echo console; read line; echo \"got $line\"; exit 3")
        .with_process(|process| {
            process.set_terminal(Some(true));
        });
    let bundle = bed.bundle(&spec);
    let console = Console::new(bed);
    let child = bundle.create_with(console.io()).await.unwrap();
    let mut master = console.master().await;
    bed.runtime.start(&bundle.id).await.unwrap();
    let tty = master.hears("\r\n").await;
    assert!(tty.starts_with("/dev/pts/") || tty == "/dev/console", "{tty}");
    master.hears("three\r\nconsole\r\n").await;
    master.types("it\n");
    assert_eq!(master.hears("got it\r\n").await, "it\r\n", "what is typed is echoed");
    assert_eq!(soon("it ends", child.wait()).await.code, 3);
    master.ends().await;
    bundle.delete().await;
}

async fn an_exec_gets_a_terminal_of_its_own(bed: &Bed) {
    let bundle = bed.bundle(&shell("echo up; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    for expected in [4, 5] {
        let mut process =
            process(&["/bin/sh", "-c", &format!("tty; test -t 0 && test -t 2 && echo both; exit {expected}")]);
        process.set_terminal(Some(true));
        let console = Console::new(bed);
        let child = bundle.exec_with(&process, console.io()).await.unwrap();
        let mut master = console.master().await;
        let tty = master.hears("\r\n").await;
        assert!(tty.starts_with("/dev/pts/"), "{tty}");
        master.hears("both\r\n").await;
        assert_eq!(soon("it ends", child.wait()).await.code, expected);
        master.ends().await;
    }
    bundle.kill(running).await;
}

async fn a_terminal_has_the_size_it_asks_for_and_can_be_resized(bed: &Bed) {
    let spec = shell("trap 'stty size' WINCH; stty size; while :; do sleep 0.05; done").with_process(|process| {
        process.set_terminal(Some(true));
        process.set_console_size(Some(BoxBuilder::default().height(33_u64).width(101_u64).build().unwrap()));
    });
    let bundle = bed.bundle(&spec);
    let console = Console::new(bed);
    let child = bundle.create_with(console.io()).await.unwrap();
    let mut master = console.master().await;
    bed.runtime.start(&bundle.id).await.unwrap();
    master.hears("33 101\r\n").await;
    master.resize(40, 120);
    master.hears("40 120\r\n").await;
    bundle.delete().await;
    assert_eq!(child.wait().await.code, 137);
    master.ends().await;
}

async fn a_terminal_controls_its_processes(bed: &Bed) {
    // The kernel sends the signal first, and then discards output that is on its way: also a word about the signal that
    // comes too early.
    let script = "trap 'sleep 0.2; echo interrupted; exit 6' INT; echo up; while :; do sleep 0.05; done";
    let spec = shell(script).with_process(|process| {
        process.set_terminal(Some(true));
    });
    let bundle = bed.bundle(&spec);
    let console = Console::new(bed);
    let child = bundle.create_with(console.io()).await.unwrap();
    let mut master = console.master().await;
    bed.runtime.start(&bundle.id).await.unwrap();
    master.hears("up\r\n").await;
    // Control-C.
    master.types("\u{3}");
    master.hears("interrupted\r\n").await;
    assert_eq!(soon("it ends", child.wait()).await.code, 6);
    bundle.delete().await;
}

async fn a_terminal_ends_with_its_container(bed: &Bed) {
    let spec = shell("sleep 600 & echo up; sleep 600").with_process(|process| {
        process.set_terminal(Some(true));
    });
    let bundle = bed.bundle(&spec);
    let console = Console::new(bed);
    let child = bundle.create_with(console.io()).await.unwrap();
    let mut master = console.master().await;
    bed.runtime.start(&bundle.id).await.unwrap();
    master.hears("up\r\n").await;
    bundle.delete().await;
    assert_eq!(child.wait().await.code, 137);
    master.ends().await;
}

async fn without_anybody_at_the_console_socket_nothing_stays(bed: &Bed) {
    let spec = shell("true").with_process(|process| {
        process.set_terminal(Some(true));
    });
    let bundle = bed.bundle(&spec);
    let io = ProcessIo::Terminal { console_socket: bed.folder().join("nobody") };
    let before = bed.traces();
    let error = bundle.create_with(io).await.unwrap_err().to_string();
    let left = bed.settle(&before);
    assert!(left.is_empty(), "after {error}: {left:?}");
}
