//! Comparison of restored processes with the specification of their container.
//!
//! Images decide user, capabilities, seccomp filter and namespaces of CRIU's processes, and the
//! images' author can have written anything. So each thread is checked when the tree is complete
//! and nothing has run. A thread with more rights than a new program in the new container ends the
//! restore. A saved container with more rights than the new one is refused too, unless the owner
//! decides otherwise ([`Privileges::Snapshot`](crate::Privileges::Snapshot)).
//!
//! A seccomp filter must exist; the rules are not compared. The user is not compared either: a
//! user's power in a container lies in capabilities.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxCapabilities, LinuxIdMapping, LinuxNamespaceType, Process, Spec};
use proc::{Capabilities, HostPid, Seccomp, Status};

use super::capability;
use super::helper::is_preparation;

/// Annotation that asks for the saved container's rights.
const ANNOTATION: &str = "gpusnap.dev/restore-privileges: snapshot";

/// Most rights for a process of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Allowed {
    bounding: u64,
    /// Limit of the other sets: given by the specification, or gained by executing a program.
    others: u64,
    needs_filter: bool,
    /// The images have filters, and none but the preparation's.
    has_preparation_only: bool,
    needs_no_new_privileges: bool,
    /// Normalized; `None` if the container gets no new user namespace.
    maps: Option<[Vec<[u64; 3]>; 2]>,
    /// Kinds of namespace that must not be the host's.
    own: Vec<Kind>,
    /// Inodes of joined namespaces.
    joined: Vec<(Kind, u64)>,
    /// AppArmor's profile, if AppArmor is on.
    profile: Option<String>,
}

/// Kind of a namespace that isolates processes. Cgroup and time namespaces only hide names and
/// offsets, and a container is restored with the old ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind(&'static str);

impl Kind {
    const ALL: [Self; 6] = [Self("mnt"), Self("pid"), Self("net"), Self("ipc"), Self("uts"), Self("user")];

    fn of(kind: LinuxNamespaceType) -> Option<Self> {
        Some(Self(match kind {
            LinuxNamespaceType::Mount => "mnt",
            LinuxNamespaceType::Pid => "pid",
            LinuxNamespaceType::Network => "net",
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::Uts => "uts",
            LinuxNamespaceType::User => "user",
            LinuxNamespaceType::Cgroup | LinuxNamespaceType::Time => return None,
        }))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            "mnt" => "mount",
            "net" => "network",
            other => other,
        })
    }
}

/// Rights of one thread.
#[derive(Clone, Debug)]
struct Found {
    capabilities: Capabilities,
    seccomp: Option<Seccomp>,
    no_new_privileges: bool,
    /// Inodes.
    namespaces: BTreeMap<Kind, u64>,
    maps: [Vec<[u64; 3]>; 2],
    profile: Option<String>,
}

impl Allowed {
    /// Returns the rights given by the specification of the new container.
    pub(super) fn by(spec: &Spec) -> io::Result<Self> {
        let process = spec.process().as_ref();
        let linux = spec.linux().as_ref();
        let given = process.and_then(|process| process.capabilities().as_ref());
        let no_new_privileges = process.and_then(Process::no_new_privileges).unwrap_or(false);
        let (bounding, others) = sets(given, no_new_privileges);
        let mut allowed = Self {
            bounding,
            others,
            needs_filter: linux.is_some_and(|linux| linux.seccomp().is_some()),
            has_preparation_only: false,
            needs_no_new_privileges: no_new_privileges,
            maps: None,
            own: Vec::new(),
            joined: Vec::new(),
            profile: profile(process),
        };
        for namespace in linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten() {
            let Some(kind) = Kind::of(namespace.typ()) else { continue };
            match namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
                Some(path) => allowed.joined.push((kind, inode(path)?)),
                None => allowed.own.push(kind),
            }
        }
        if allowed.own.contains(&Kind("user")) {
            let maps = |mappings: Option<&Vec<LinuxIdMapping>>| sorted(mappings.into_iter().flatten().map(mapping));
            allowed.maps =
                linux.map(|linux: &Linux| [maps(linux.uid_mappings().as_ref()), maps(linux.gid_mappings().as_ref())]);
        }
        Ok(allowed)
    }

    /// Notes the filters of the images: the preparation's is no profile.
    pub(super) fn look_at_filters(&mut self, images: &Path) -> Result<(), images::ImageError> {
        let filters = images::filters(images)?;
        self.has_preparation_only = !filters.is_empty() && filters.iter().all(|filter| is_preparation(filter));
        Ok(())
    }

    /// Returns the profile for CRIU, in place of the images' own.
    pub(super) fn lsm_profile(&self) -> Option<String> {
        self.profile.as_ref().map(|profile| format!("apparmor:{profile}"))
    }

    /// Compares a frozen tree with these rights, thread by thread.
    pub(super) fn check(&self, root: HostPid) -> Result<(), String> {
        let read = |pid: HostPid| {
            move |error: io::Error| format!("cannot look at what the restored process {pid} may do: {error}")
        };
        let host = namespaces(HostPid::own()).map_err(read(HostPid::own()))?;
        let mut next = vec![root];
        while let Some(pid) = next.pop() {
            next.extend(proc::children(pid));
            let process = match Of::process(pid) {
                // A zombie does nothing, and its files are empty.
                Err(_) if proc::Stat::of(pid).is_ok_and(|stat| stat.has_ended()) => continue,
                of => of.map_err(read(pid))?,
            };
            for tid in proc::tids(pid).map_err(read(pid))? {
                let found = process.thread(pid, tid).map_err(read(pid))?;
                if let Some(excess) = self.excess(&found, &host, pid == root) {
                    let name = proc::name(pid).unwrap_or_default();
                    return Err(format!(
                        "the restored process {pid} ({name}) {excess}, as it was saved, and the specification of this \
                         container does not allow that; the annotation {ANNOTATION} does"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Returns the excess right of a thread, as a phrase after "the process"; `None` if there is
    /// none.
    fn excess(&self, found: &Found, host: &BTreeMap<Kind, u64>, is_root: bool) -> Option<String> {
        let Capabilities { inheritable, permitted, effective, bounding, ambient } = found.capabilities;
        let sets = [
            ("bounding", bounding, self.bounding),
            ("permitted", permitted, self.others),
            ("effective", effective, self.others),
            ("inheritable", inheritable, self.others),
            ("ambient", ambient, self.others),
        ];
        if let Some((name, set, allowed)) = sets.into_iter().find(|(_, set, allowed)| set & !allowed != 0) {
            return Some(format!("has {} in its {name} set", names(set & !allowed)));
        }
        if self.needs_filter && (found.seccomp != Some(Seccomp::Filter) || self.has_preparation_only) {
            return Some("has no seccomp filter".into());
        }
        if self.needs_no_new_privileges && !found.no_new_privileges {
            return Some("can gain privileges (no_new_privs is not set)".into());
        }
        let is_in = |kind: &Kind, inode: u64| found.namespaces.get(kind) == Some(&inode);
        let of_host = |kind: &&Kind| host.get(kind).is_some_and(|inode| is_in(kind, *inode));
        if let Some(kind) = self.own.iter().find(of_host) {
            return Some(format!("is in the host's {kind} namespace"));
        }
        let strays = |(kind, inode): &&(Kind, u64)| {
            !is_in(kind, *inode) && (is_root || host.get(kind).is_some_and(|host| is_in(kind, *host)))
        };
        if let Some((kind, _)) = self.joined.iter().find(strays) {
            return Some(format!("is not in the {kind} namespace that it should be in"));
        }
        if self.maps.as_ref().is_some_and(|maps| is_root && *maps != found.maps) {
            return Some("has other ids outside its user namespace".into());
        }
        if self.profile.is_some() && self.profile != found.profile {
            let profile = found.profile.as_deref().unwrap_or("none");
            return Some(format!("has the AppArmor profile {profile}"));
        }
        None
    }
}

/// Returns the bounding set, and the limit of the others. An executed program can gain the bounding
/// set, except with no_new_privs.
fn sets(given: Option<&LinuxCapabilities>, no_new_privileges: bool) -> (u64, u64) {
    let bits = |set: Option<&oci_spec::runtime::Capabilities>| {
        set.into_iter().flatten().fold(0, |bits, one| bits | capability::bit(*one))
    };
    let Some(given) = given else { return (0, 0) };
    let bounding = bits(given.bounding().as_ref());
    let own = [given.permitted(), given.effective(), given.inheritable(), given.ambient()];
    let own = own.into_iter().fold(0, |all, set| all | bits(set.as_ref()));
    (bounding, if no_new_privileges { own } else { own | bounding })
}

fn names(set: u64) -> String {
    let known = capability::ALL.into_iter().filter(|known| capability::is_in(set, *known)).map(capability::name);
    let names: Vec<String> = known.collect();
    if names.is_empty() { format!("capabilities {set:#x}") } else { names.join(", ") }
}

fn mapping(mapping: &LinuxIdMapping) -> [u64; 3] {
    [mapping.container_id(), mapping.host_id(), mapping.size()].map(u64::from)
}

fn sorted(lines: impl Iterator<Item = [u64; 3]>) -> Vec<[u64; 3]> {
    let mut lines: Vec<_> = lines.collect();
    lines.sort_unstable();
    lines
}

/// Returns the specification's AppArmor profile, if AppArmor is on.
fn profile(process: Option<&Process>) -> Option<String> {
    let profile = process?.apparmor_profile().clone().filter(|profile| !profile.is_empty())?;
    Path::new("/sys/kernel/security/apparmor").exists().then_some(profile)
}

fn inode(path: &Path) -> io::Result<u64> {
    fs::metadata(path).map(|metadata| std::os::unix::fs::MetadataExt::ino(&metadata))
}

fn namespaces(pid: HostPid) -> io::Result<BTreeMap<Kind, u64>> {
    let of = |kind: Kind| match inode(&pid.path(&format!("ns/{}", kind.0))) {
        Ok(inode) => Ok(Some((kind, inode))),
        // A kind unknown to this kernel.
        Err(error) if proc::is_gone(&error) && pid.path("ns/mnt").exists() => Ok(None),
        Err(error) => Err(error),
    };
    Kind::ALL.into_iter().filter_map(|kind| of(kind).transpose()).collect()
}

/// Rights common to the threads of a process.
struct Of {
    namespaces: BTreeMap<Kind, u64>,
    maps: [Vec<[u64; 3]>; 2],
}

impl Of {
    fn process(pid: HostPid) -> io::Result<Self> {
        let map = |name: &str| -> io::Result<Vec<[u64; 3]>> {
            let text = fs::read_to_string(pid.path(name))?;
            let line = |line: &str| {
                let mut numbers = line.split_ascii_whitespace().map(|number| number.parse().ok());
                Some([numbers.next()??, numbers.next()??, numbers.next()??])
            };
            Ok(sorted(text.lines().filter_map(line)))
        };
        Ok(Self { namespaces: namespaces(pid)?, maps: [map("uid_map")?, map("gid_map")?] })
    }

    fn thread(&self, pid: HostPid, tid: i32) -> io::Result<Found> {
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "the kernel does not tell its capabilities");
        let status = Status::of_thread(pid, tid)?;
        Ok(Found {
            capabilities: status.capabilities().ok_or_else(missing)?,
            seccomp: status.seccomp(),
            no_new_privileges: status.has_no_new_privileges().unwrap_or(false),
            namespaces: self.namespaces.clone(),
            maps: self.maps.clone(),
            profile: current_profile(&pid.path(&format!("task/{tid}/attr"))),
        })
    }
}

/// Returns the profile in `PROFILE (enforce)`; older kernels have the file in the folder itself.
fn current_profile(folder: &Path) -> Option<String> {
    let files: [PathBuf; 2] = [folder.join("apparmor/current"), folder.join("current")];
    let text = files.iter().find_map(|file| fs::read_to_string(file).ok())?;
    let text = text.trim_end_matches(['\n', '\0']);
    Some(text.rsplit_once(" (").map_or(text, |(name, _)| name).to_owned())
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Capability, LinuxBuilder, LinuxCapabilitiesBuilder, ProcessBuilder, SpecBuilder};

    use super::*;

    const NET_ADMIN: u64 = 1 << 12;
    const CHOWN: u64 = 1;

    fn spec(no_new_privileges: bool) -> Spec {
        let set =
            |capabilities: &[Capability]| capabilities.iter().copied().collect::<oci_spec::runtime::Capabilities>();
        let capabilities = LinuxCapabilitiesBuilder::default()
            .bounding(set(&[Capability::Chown, Capability::NetAdmin]))
            .permitted(set(&[Capability::Chown]))
            .effective(set(&[Capability::Chown]))
            .inheritable(set(&[]))
            .ambient(set(&[]))
            .build()
            .unwrap();
        let process =
            ProcessBuilder::default().capabilities(capabilities).no_new_privileges(no_new_privileges).build().unwrap();
        let linux = LinuxBuilder::default().build().unwrap();
        SpecBuilder::default().process(process).linux(linux).build().unwrap()
    }

    /// Returns a thread with exactly the specification's rights.
    fn thread(allowed: &Allowed) -> Found {
        Found {
            capabilities: Capabilities {
                bounding: CHOWN | NET_ADMIN,
                permitted: CHOWN,
                effective: CHOWN,
                ..Capabilities::default()
            },
            seccomp: Some(Seccomp::Filter),
            no_new_privileges: true,
            namespaces: Kind::ALL.iter().map(|kind| (*kind, 7)).collect(),
            maps: allowed.maps.clone().unwrap_or_default(),
            profile: None,
        }
    }

    fn host() -> BTreeMap<Kind, u64> {
        Kind::ALL.iter().map(|kind| (*kind, 1)).collect()
    }

    #[test]
    fn a_thread_with_the_specified_rights_may_run() {
        let allowed = Allowed::by(&spec(true)).unwrap();
        assert_eq!(allowed.excess(&thread(&allowed), &host(), true), None);
        let mut less = thread(&allowed);
        less.capabilities = Capabilities::default();
        assert_eq!(allowed.excess(&less, &host(), true), None);
    }

    #[test]
    fn a_capability_too_many_is_named_with_its_set() {
        let allowed = Allowed::by(&spec(true)).unwrap();
        let with = |change: fn(&mut Capabilities)| {
            let mut found = thread(&allowed);
            change(&mut found.capabilities);
            allowed.excess(&found, &host(), true).unwrap_or_default()
        };
        assert_eq!(with(|sets| sets.bounding |= 1 << 21), "has CAP_SYS_ADMIN in its bounding set");
        assert_eq!(with(|sets| sets.effective |= 1 << 21), "has CAP_SYS_ADMIN in its effective set");
        assert_eq!(with(|sets| sets.ambient |= NET_ADMIN), "has CAP_NET_ADMIN in its ambient set");
        assert_eq!(with(|sets| sets.inheritable |= 1 << 50), "has capabilities 0x4000000000000 in its inheritable set");
    }

    #[test]
    fn a_program_that_may_gain_privileges_may_have_gained_them() {
        let with_more = |no_new_privileges| {
            let allowed = Allowed::by(&spec(no_new_privileges)).unwrap();
            let mut found = thread(&allowed);
            found.capabilities.permitted |= NET_ADMIN;
            allowed.excess(&found, &host(), true)
        };
        assert_eq!(with_more(false), None);
        assert!(with_more(true).is_some());
    }

    #[test]
    fn a_missing_filter_and_new_privileges_are_refused_where_the_specification_has_them() {
        let mut allowed = Allowed::by(&spec(true)).unwrap();
        allowed.needs_filter = true;
        let mut found = thread(&allowed);
        found.seccomp = Some(Seccomp::Disabled);
        assert_eq!(allowed.excess(&found, &host(), true).unwrap(), "has no seccomp filter");
        let mut found = thread(&allowed);
        allowed.has_preparation_only = true;
        assert_eq!(allowed.excess(&found, &host(), true).unwrap(), "has no seccomp filter");
        allowed.has_preparation_only = false;
        found.no_new_privileges = false;
        assert!(allowed.excess(&found, &host(), true).unwrap().contains("no_new_privs"));
        allowed.needs_no_new_privileges = false;
        assert_eq!(allowed.excess(&found, &host(), true), None);
    }

    #[test]
    fn a_process_in_the_hosts_or_a_strangers_namespace_is_refused() {
        let mut allowed = Allowed::by(&spec(true)).unwrap();
        allowed.own = vec![Kind("net")];
        let mut found = thread(&allowed);
        found.namespaces.insert(Kind("net"), 1);
        assert_eq!(allowed.excess(&found, &host(), false).unwrap(), "is in the host's network namespace");
        allowed.own.clear();
        assert_eq!(allowed.excess(&found, &host(), false), None, "a container may be given the host's");
        allowed.joined = vec![(Kind("net"), 5)];
        assert!(allowed.excess(&found, &host(), false).is_some());
        found.namespaces.insert(Kind("net"), 6);
        assert!(allowed.excess(&found, &host(), true).is_some());
        assert_eq!(allowed.excess(&found, &host(), false), None, "a process can make itself another one");
        found.namespaces.insert(Kind("net"), 5);
        assert_eq!(allowed.excess(&found, &host(), true), None);
    }

    #[test]
    fn other_ids_outside_are_refused() {
        let mut allowed = Allowed::by(&spec(true)).unwrap();
        allowed.maps = Some([vec![[0, 100_000, 1000]], vec![[0, 200_000, 1000]]]);
        let mut found = thread(&allowed);
        assert_eq!(allowed.excess(&found, &host(), true), None);
        found.maps[0] = vec![[0, 0, u64::from(u32::MAX)]];
        assert!(allowed.excess(&found, &host(), true).unwrap().contains("ids"));
    }

    #[test]
    fn this_process_is_within_its_own_rights() {
        let own = HostPid::own();
        let found = Of::process(own).unwrap().thread(own, own.raw()).unwrap();
        let mut allowed = Allowed::by(&spec(false)).unwrap();
        (allowed.bounding, allowed.others) = (u64::MAX, u64::MAX);
        assert_eq!(allowed.excess(&found, &host(), true), None);
        allowed.bounding = 0;
        assert_eq!(allowed.check(own).is_err(), found.capabilities.bounding != 0);
    }
}
