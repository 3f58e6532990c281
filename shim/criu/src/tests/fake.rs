//! A test that plays criu in a separate process.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use protobuf::Message;
use rust_criu::rust_criu_protobuf::rpc::{
    Criu_notify, Criu_req, Criu_req_type, Criu_resp, Criu_restore_resp, Criu_version,
};
use rustix::net::{RecvFlags, SendFlags};

/// Environment variable with the part to play.
const PART: &str = "FAKE_CRIU_PART";

/// Makes a program at `folder` that plays `part` when run as criu.
pub(super) fn criu(folder: &Path, part: &str) -> PathBuf {
    let path = folder.join("criu");
    let test = std::env::current_exe().unwrap();
    let run = format!("{PART}={part} exec '{}' --ignored --exact tests::fake::plays_criu", test.display());
    // The arguments, meaningless to the test's own parser, are kept for the part.
    let mut script = std::fs::File::create(&path).unwrap();
    write!(script, "#!/bin/sh\nFAKE_CRIU_ARGS=\"$*\" {run}\n").unwrap();
    script.set_permissions(std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

struct Peer(OwnedFd);

impl Peer {
    /// Receives a request, or `None` after the peer's close.
    fn receive(&self) -> Option<Criu_req> {
        let mut bytes = vec![0; 1 << 20];
        let (length, _) = rustix::net::recv(&self.0, &mut bytes, RecvFlags::empty()).unwrap();
        (length > 0).then(|| Criu_req::parse_from_bytes(&bytes[..length]).unwrap())
    }

    fn send(&self, response: &Criu_resp) {
        self.send_bytes(&response.write_to_bytes().unwrap());
    }

    fn send_bytes(&self, bytes: &[u8]) {
        // The peer may have gone.
        let _ = rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL);
    }

    /// Returns the client's answer, or false for a closed client.
    fn notify(&self, script: &str, pid: Option<i32>) -> bool {
        let mut notify = Criu_notify::new();
        notify.set_script(script.to_owned());
        notify.pid = pid;
        let mut response = response(Criu_req_type::NOTIFY, true);
        response.notify = Some(notify).into();
        self.send(&response);
        self.receive().is_some_and(|answer| {
            assert_eq!(answer.type_(), Criu_req_type::NOTIFY);
            answer.notify_success()
        })
    }
}

fn response(kind: Criu_req_type, success: bool) -> Criu_resp {
    let mut response = Criu_resp::new();
    response.set_type(kind);
    response.set_success(success);
    response
}

#[test]
#[ignore = "plays criu for the other tests"]
fn plays_criu() {
    let Ok(part) = std::env::var(PART) else { return };
    let arguments = std::env::var("FAKE_CRIU_ARGS").unwrap_or_default();
    assert!(arguments.ends_with("swrk 3"), "{arguments}");
    let peer = Peer(crate::sys::inherited(3));
    let request = peer.receive().unwrap();
    match request.type_() {
        Criu_req_type::VERSION => {
            let mut version = Criu_version::new();
            version.set_major_number(4);
            version.set_minor_number(2);
            version.set_sublevel(1);
            let mut response = response(Criu_req_type::VERSION, true);
            response.version = Some(version).into();
            peer.send(&response);
        }
        kind => play(&part, kind, &request, &peer),
    }
}

fn play(part: &str, kind: Criu_req_type, request: &Criu_req, peer: &Peer) {
    let write = |name: &str, text: &str| std::fs::write(name, text).unwrap();
    match part {
        "orderly" => {
            std::fs::write("request", request.write_to_bytes().unwrap()).unwrap();
            write(
                "environment",
                &std::env::vars().map(|(name, value)| format!("{name}={value}\n")).collect::<String>(),
            );
            write("arguments", &std::env::var("FAKE_CRIU_ARGS").unwrap());
            let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
            let kind_of = |entry: std::io::Result<std::fs::DirEntry>| {
                let path = entry.unwrap().path();
                let target = std::fs::read_link(&path).unwrap_or_default();
                format!("{} {}\n", path.file_name().unwrap().display(), target.display())
            };
            write("descriptors", &descriptors.map(kind_of).collect::<String>());
            for script in ["pre-dump", "network-lock", "of-tomorrow", "query-ext-files", "post-dump", "network-unlock"]
            {
                assert!(peer.notify(script, None), "{script}");
            }
            peer.send(&response(kind, true));
        }
        "half" => {
            write("inventory.img", "half");
            write("core-1.img", "half");
            assert!(peer.notify("pre-dump", None));
            if !peer.notify("post-dump", None) {
                // As CRIU does: undo first, answer then.
                assert!(!peer.notify("network-unlock", None));
                peer.send(&response(kind, false));
            }
        }
        "dies" => {
            assert!(peer.notify("pre-dump", None));
            write("dump.log", "(00.1) Error (criu/x.c:1): it hurts\n");
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::ABORT).unwrap();
        }
        "fails" => {
            write(
                "dump.log",
                "(00.0) Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                 (00.1) Error (criu/net.c:1): something new\n(00.2) Error (criu/cr-dump.c:1): Dumping FAILED.\n",
            );
            let mut response = response(kind, false);
            response.set_cr_errno(22);
            response.set_cr_errmsg("Error (criu/util.c:1): rlimit".to_owned());
            peer.send(&response);
        }
        "baffled" => {
            let mut response = response(Criu_req_type::EMPTY, false);
            response.set_cr_errmsg("Invalid req".to_owned());
            peer.send(&response);
        }
        "garbles" => peer.send_bytes(&[0xff; 40]),
        "shouts" => peer.send_bytes(&[0; 70_000]),
        "confuses" => peer.send(&response(Criu_req_type::CHECK, true)),
        "anonymous" => {
            let mut response = response(kind, true);
            response.restore = Some(Criu_restore_resp { pid: Some(1), ..Default::default() }).into();
            peer.send(&response);
        }
        "strangers" => {
            // No child of the client.
            assert!(!peer.notify("post-restore", Some(i32::MAX)));
            peer.send(&response(kind, false));
        }
        "deaf" => {
            write("core-1.img", "half");
            assert!(!peer.notify("pre-dump", None));
            std::thread::sleep(std::time::Duration::MAX);
        }
        other => panic!("no part {other}"),
    }
}
