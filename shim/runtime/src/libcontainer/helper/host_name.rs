//! Host name of the pod's UTS namespace, joined by a restored container. CRIU overwrites the name
//! with the one at the checkpoint.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::system::{setdomainname, sethostname, uname};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::error::{Context, Result};

/// The names of a namespace, to be kept.
#[derive(Debug)]
pub(in crate::libcontainer) struct HostName {
    namespace: File,
    host: Vec<u8>,
    domain: Vec<u8>,
}

impl HostName {
    /// Reads the names of the namespace at `path`.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let names = || -> io::Result<Self> {
            let namespace = File::open(path)?;
            let (host, domain) = inside(&namespace, || {
                let names = uname();
                Ok((names.nodename().to_bytes().to_vec(), names.domainname().to_bytes().to_vec()))
            })?;
            Ok(Self { namespace, host, domain })
        };
        names().context(|| format!("read the host name of {}", path.display()))
    }

    /// Sets the namespace's names again.
    pub(super) fn put_back(&self) -> Result<()> {
        inside(&self.namespace, || {
            sethostname(&self.host)?;
            setdomainname(&self.domain)?;
            Ok(())
        })
        .context(|| "give the pod its host name again")
    }
}

/// Runs `work` in a UTS namespace, in a thread with no other use.
fn inside<T: Send>(namespace: &File, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let kind = Some(LinkNameSpaceType::HostNameAndNISDomainName);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            move_into_link_name_space(namespace.as_fd(), kind)?;
            work()
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread died")))
    })
}
