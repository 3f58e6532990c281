//! The network of a dumped tree. A criu killed between blocking and unblocking leaves the block in
//! place.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use reaper::Reaper;
use rustix::process::Signal;

use crate::sys;

/// Removes CRIU's additions to a network namespace: the chain CRIU of iptables with all jumps, or a
/// table of nftables named after criu (criu/net.c). Each may exist several times, once per killed
/// criu, or not at all.
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

/// Limit for the programs above: other users of the tables cause delays.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Unblocks the network of process `pid`, in case another client's criu died after the block.
/// Called after the end of that criu.
pub async fn unblock_network(pid: i32, reaper: &Reaper) {
    match Network::of(pid) {
        Ok(network) => network.unblock(reaper).await,
        // The process has ended.
        Err(error) => tracing::debug!(pid, %error, "no network to unblock"),
    }
}

/// A tree's network namespace, held while blocked by CRIU.
#[derive(Debug)]
pub(crate) struct Network {
    namespace: File,
    path: PathBuf,
}

impl Network {
    /// Opens the namespace of process `pid`.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let path = Path::new("/proc").join(pid.to_string()).join("ns/net");
        Ok(Self { namespace: File::open(&path)?, path })
    }

    /// Unblocks the network. Called if criu has ended without unblocking.
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
