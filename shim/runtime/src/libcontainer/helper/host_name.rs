//! The host name of a UTS namespace that a restored container joins: the pod's. CRIU gives it the name that the
//! namespace had in which the container was saved.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::system::{setdomainname, sethostname, uname};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::error::{Context, Result};

/// The names of a namespace, as they are to stay.
#[derive(Debug)]
pub(in crate::libcontainer) struct HostName {
    namespace: File,
    host: Vec<u8>,
    domain: Vec<u8>,
}

impl HostName {
    /// The names of the namespace at `path`.
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

    /// Gives the namespace its names again.
    pub(super) fn put_back(&self) -> Result<()> {
        inside(&self.namespace, || {
            sethostname(&self.host)?;
            setdomainname(&self.domain)?;
            Ok(())
        })
        .context(|| "give the pod its host name again")
    }
}

/// Does something in a UTS namespace, in a thread that ends there.
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
