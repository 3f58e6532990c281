//! The network of a dumped tree, which stays blocked when criu is killed between blocking and unblocking it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use reaper::Reaper;
use rustix::process::Signal;

use crate::sys;

/// Takes away what CRIU adds to a network namespace: the chain CRIU of iptables and its jumps, or a table of nftables
/// named after it (criu/net.c). Each may be there several times, once for each criu that was killed, or not at all.
const UNBLOCK: &str = r#"
for iptables in iptables ip6tables; do
  for chain in INPUT OUTPUT; do
    while "$iptables" -w -D "$chain" -j CRIU; do :; done
  done
  "$iptables" -w -F CRIU
  "$iptables" -w -X CRIU
done
nft list tables inet | while read -r _ family name; do
  case $name in CRIU-*) nft delete table "$family" "$name" ;; esac
done
"#;

/// Bounds the programs above, which wait for other users of the tables.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Unblocks the network of process `pid`, in case another client's criu was killed when it had blocked it. To be called
/// when that criu has ended.
pub async fn unblock_network(pid: i32, reaper: &Reaper) {
    match Network::of(pid) {
        Ok(network) => network.unblock(reaper).await,
        // The process has ended.
        Err(error) => tracing::debug!(pid, %error, "no network to unblock"),
    }
}

/// A tree's network namespace, held while CRIU blocks it.
#[derive(Debug)]
pub(crate) struct Network {
    namespace: File,
    path: PathBuf,
}

impl Network {
    /// The namespace of process `pid`.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let path = Path::new("/proc").join(pid.to_string()).join("ns/net");
        Ok(Self { namespace: File::open(&path)?, path })
    }

    /// Unblocks it. To be called when criu has ended without doing so.
    pub(crate) async fn unblock(self, reaper: &Reaper) {
        let path = self.path.display().to_string();
        tracing::info!(path, "criu may have left a network blocked, which is unblocked");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", UNBLOCK]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        sys::enter_network(&mut command, self.namespace.into());
        match reaper.spawn(&mut command) {
            Ok(child) => {
                if tokio::time::timeout(TIMEOUT, child.wait()).await.is_err() {
                    tracing::error!(path, "unblocking a network does not end");
                    let _ = child.signal(Signal::KILL);
                }
            }
            Err(error) => tracing::error!(path, %error, "cannot unblock a network"),
        }
    }
}
