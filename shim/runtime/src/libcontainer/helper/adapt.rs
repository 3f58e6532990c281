//! Specifications for libcontainer: runc's defaults are written out, because libcontainer takes
//! them for absent.
//!
//! | config.json | what libcontainer would do | here |
//! |---|---|---|
//! | no capabilities, or a set left out | leave them as they are: the shim's | none |
//! | a capability that is not known, or that the shim has not | fail | left out |
//! | `noNewPrivileges: false` | load seccomp when it is too late | like absent |
//! | seccomp | load it for the first process only | [`seccomp`](super::seccomp) |
//! | no additional groups | keep the shim's | none |
//! | no HOME | ask the C library, which may load libraries from the container | read from its passwd file |
//! | a mount at a link that leads to nothing | fail | make what it leads to |
//! | `nosymfollow` | fail | `rnosymfollow` |
//! | a working directory that is missing | fail | made |
//! | `rshared` and the like as `rootfsPropagation` | fail | without the `r` |
//! | mount options that need the mount to be there | ignore, or fail | [`fixup`](super::fixup) |
//! | a mount of type `cgroup`, on v1 | look up its own pid in the wrong namespace | [`v1_mounts`](super::v1_mounts) |
//! | a device that is listed twice | fail | the first one |
//! | no rule for all devices | allow all on v1 | forbid what is not allowed |
//! | no `cgroupsPath` | the cgroup `:youki:ID` | the cgroup `/ID`, or `system.slice:gpusnap:ID` |

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use libcontainer::apparmor;
use libcontainer::seccomp::is_notify;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::utils::{validate_spec_for_net_devices, validate_spec_for_new_user_ns};
use libcontainer::validator::Validator;
use oci_spec::runtime::{
    Capabilities, Linux, LinuxBuilder, LinuxCapabilities, LinuxIdMapping, LinuxNamespaceBuilder, LinuxNamespaceType,
    Process, Spec,
};
use proc::{HostPid, Status};
use rustix::fs::OFlags;

use super::devices;
use super::error::{Context, Failure, Result};
use super::id_maps;
use super::program::{Program, words};
use super::rootfs::Root;
use super::seccomp::Filter;
use super::state::read_json;
use crate::Prepare;
use crate::libcontainer::capability;
use crate::spec::drop_unknown_capabilities;

/// Reads and checks a bundle's config.json; the root becomes an absolute path.
pub(super) fn load(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let mut json: serde_json::Value = read_json(&path)?;
    if let Some(process) = json.get_mut("process") {
        drop_unknown_capabilities(process);
    }
    let mut spec: Spec = serde_json::from_value(json).context(|| format!("read {}", path.display()))?;
    if !spec.version().starts_with("1.") {
        return Err(Failure::new(format!("the specification has version {}, where 1.x is known", spec.version())));
    }
    let root = spec.root_mut().as_mut().ok_or_else(|| Failure::new("the specification has no root"))?;
    let path = bundle.join(root.path());
    root.set_path(path.canonicalize().context(|| format!("find the root {}", path.display()))?);
    Ok(spec)
}

/// Runs the checks of libcontainer's builder, and the checks missing there.
pub(super) fn validate(spec: &Spec) -> Result<()> {
    Validator::validate_spec(spec)?;
    let syscall = create_syscall();
    // With several ranges the check only looks for newuidmap.
    if !id_maps::has_several(linux(spec)?) {
        validate_spec_for_new_user_ns(spec, &*syscall)?;
    }
    validate_spec_for_net_devices(spec, &*syscall)?;
    for mount in spec.mounts().iter().flatten() {
        let destination = mount.destination().display();
        if mount.options().iter().flatten().any(|option| option == "tmpcopyup") {
            return Err(Failure::new(format!(
                "the mount at {destination} has tmpcopyup, which libcontainer cannot do"
            )));
        }
        let mapped = mount.uid_mappings().is_some()
            || mount.gid_mappings().is_some()
            || mount.options().iter().flatten().any(|option| option == "idmap" || option == "ridmap");
        if mapped {
            return Err(Failure::new(format!("the mount at {destination} is id-mapped, which libcontainer cannot do")));
        }
    }
    if let Some(label) = spec.process().as_ref().and_then(|process| process.selinux_label().as_deref())
        && !label.is_empty()
        && Path::new("/sys/fs/selinux/enforce").exists()
    {
        return Err(Failure::new("the process has an SELinux label, which libcontainer cannot set"));
    }
    Ok(())
}

pub(super) fn linux(spec: &Spec) -> Result<&Linux> {
    spec.linux().as_ref().ok_or_else(|| Failure::new("the specification has no section linux"))
}

/// Returns whether the container gets a new namespace of this kind.
pub(super) fn has_new(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| {
        namespace.typ() == kind && namespace.path().as_ref().is_none_or(|path| path.as_os_str().is_empty())
    })
}

fn process(spec: &Spec) -> Result<&Process> {
    spec.process().as_ref().ok_or_else(|| Failure::new("the specification has no process"))
}

/// Returns the cgroup in a specification, or a default.
pub(super) fn cgroup_path(linux: &Linux, systemd: bool, id: &str) -> PathBuf {
    match linux.cgroups_path() {
        Some(path) if !path.as_os_str().is_empty() => path.clone(),
        _ if systemd => format!("system.slice:gpusnap:{id}").into(),
        _ => format!("/{id}").into(),
    }
}

/// Completes the specification of a new container. Returns the last step of the creation.
pub(super) fn for_init(
    spec: &mut Spec,
    cgroup_path: PathBuf,
    prepare: Prepare,
    warnings: &mut Vec<String>,
) -> Result<Program> {
    let mut process = process(spec)?.clone();
    let mut linux = linux(spec)?.clone();
    let rootfs = Root::open(spec.root().as_ref().ok_or_else(|| Failure::new("the specification has no root"))?.path())?;

    complete(&mut process, &rootfs, warnings)?;
    resolve_destinations(spec, &rootfs)?;
    for mount in spec.mounts_mut().iter_mut().flatten() {
        for option in mount.options_mut().iter_mut().flatten() {
            // libcontainer knows only the option that also covers the mounts below.
            if option == "nosymfollow" || option == "symfollow" {
                option.insert(0, 'r');
            }
        }
    }
    make_cwd(spec, &rootfs, process.cwd(), host_root(&linux))?;
    if let Some(propagation) = linux.rootfs_propagation().as_deref() {
        let propagation = match propagation {
            "" => None,
            "rshared" => Some("shared".to_owned()),
            "rslave" => Some("slave".to_owned()),
            "rprivate" => Some("private".to_owned()),
            "runbindable" => Some("unbindable".to_owned()),
            other => Some(other.to_owned()),
        };
        linux.set_rootfs_propagation(propagation);
    }
    linux.set_cgroups_path(Some(cgroup_path));
    devices::complete(linux.resources_mut().get_or_insert_default())?;
    devices::list_once(&mut linux);
    let program =
        Program { seccomp: Filter::take(&mut process, &mut linux, prepare)?, complain: true, stdio: None, hooks: None };
    spec.set_process(Some(process));
    spec.set_linux(Some(linux));
    Ok(program)
}

/// Completes the specification of a restored container. Settings of processes are skipped: restored
/// processes have their own.
pub(super) fn for_restore(spec: &mut Spec, cgroup_path: PathBuf) -> Result<()> {
    let mut linux = linux(spec)?.clone();
    let rootfs = Root::open(spec.root().as_ref().ok_or_else(|| Failure::new("the specification has no root"))?.path())?;
    resolve_destinations(spec, &rootfs)?;
    linux.set_cgroups_path(Some(cgroup_path));
    devices::complete(linux.resources_mut().get_or_insert_default())?;
    spec.set_linux(Some(linux));
    Ok(())
}

/// Follows links to the real places of mounts.
fn resolve_destinations(spec: &mut Spec, rootfs: &Root) -> Result<()> {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let action = || format!("find {} in the container", mount.destination().display());
        let real = rootfs.real_path(mount.destination()).context(action)?;
        mount.set_destination(real);
    }
    Ok(())
}

/// Returns the specification for a further process of a container: the process in place of the
/// first one, and the namespaces of `init` to join.
pub(super) fn for_exec(
    spec: &mut Spec,
    mut process: Process,
    init: HostPid,
    cgroup_path: PathBuf,
    prepare: Prepare,
    warnings: &mut Vec<String>,
) -> Result<Program> {
    let first = self::process(spec)?;
    // As in runc: settings missing from the new process come from the container.
    if process.capabilities().is_none() {
        process.set_capabilities(first.capabilities().clone());
    }
    if process.rlimits().as_ref().is_none_or(Vec::is_empty) {
        process.set_rlimits(first.rlimits().clone());
    }
    if process.apparmor_profile().as_ref().is_none_or(String::is_empty) {
        process.set_apparmor_profile(first.apparmor_profile().clone());
    }
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(first.oom_score_adj());
    }
    let root = Root::open(&init.path("root"))?;
    complete(&mut process, &root, warnings)?;
    // Checked here, because libcontainer would only report a failed system call. A user other than
    // root may see less.
    if let Err(error) = root.resolve(process.cwd(), OFlags::PATH | OFlags::DIRECTORY)
        && matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
    {
        let cwd = process.cwd().to_string_lossy();
        return Err(Failure::new(format!("chdir to cwd ({cwd:?}) set in config.json failed: {}", words(&error))));
    }

    let container = linux(spec)?;
    let mut namespaces = Vec::new();
    for namespace in container.namespaces().iter().flatten() {
        let path = namespace_of(init, namespace.typ());
        namespaces.push(LinuxNamespaceBuilder::default().typ(namespace.typ()).path(path).build()?);
    }
    // CRIU makes a time namespace for a restored container, though no specification asks for one.
    let has_time = namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Time);
    if !has_time && differs(init, LinuxNamespaceType::Time)? {
        let path = namespace_of(init, LinuxNamespaceType::Time);
        namespaces.push(LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Time).path(path).build()?);
    }
    let mut linux = LinuxBuilder::default().namespaces(namespaces).cgroups_path(cgroup_path).build()?;
    // The builder's own defaults are not those of containers.
    linux.set_devices(None).set_resources(None).set_masked_paths(None).set_readonly_paths(None);
    linux.set_personality(container.personality().clone()).set_seccomp(container.seccomp().clone());
    if let Some(seccomp) = linux.seccomp()
        && is_notify(seccomp)
    {
        return Err(Failure::new(
            "the container's seccomp filter reports to a listener, and libcontainer cannot give it a second process",
        ));
    }
    let program = Program {
        seccomp: Filter::take(&mut process, &mut linux, prepare)?,
        complain: false,
        stdio: None,
        hooks: None,
    };
    spec.set_process(Some(process)).set_linux(Some(linux)).set_hooks(None).set_mounts(None);
    Ok(program)
}

fn namespace_of(pid: HostPid, kind: LinuxNamespaceType) -> PathBuf {
    pid.path(match kind {
        LinuxNamespaceType::Mount => "ns/mnt",
        LinuxNamespaceType::Cgroup => "ns/cgroup",
        LinuxNamespaceType::Uts => "ns/uts",
        LinuxNamespaceType::Ipc => "ns/ipc",
        LinuxNamespaceType::User => "ns/user",
        LinuxNamespaceType::Pid => "ns/pid",
        LinuxNamespaceType::Network => "ns/net",
        LinuxNamespaceType::Time => "ns/time",
    })
}

/// Returns whether a process is in another namespace of this kind than this process. Some kinds
/// need a recent kernel.
fn differs(pid: HostPid, kind: LinuxNamespaceType) -> Result<bool> {
    let link = |pid: HostPid| {
        let path = namespace_of(pid, kind);
        match std::fs::read_link(&path) {
            Ok(link) => Ok(Some(link)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::because(format!("look at {}", path.display()), &error)),
        }
    };
    Ok(link(pid)? != link(HostPid::own())?)
}

/// Fills in settings common to the first and every further process.
fn complete(process: &mut Process, root: &Root, warnings: &mut Vec<String>) -> Result<()> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Failure::new("process.args is empty: there is nothing to run"));
    }
    if !process.cwd().is_absolute() {
        return Err(Failure::new(format!("the working directory {} is not absolute", process.cwd().display())));
    }
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    match process.apparmor_profile().as_deref() {
        None => {}
        Some("") => {
            process.set_apparmor_profile(None);
        }
        Some(profile) if !has_apparmor()? => {
            return Err(Failure::new(format!("the AppArmor profile {profile} is asked for, but AppArmor is not on")));
        }
        Some(_) => {}
    }
    process.set_capabilities(Some(capabilities(process.capabilities().as_ref(), warnings)?));
    let uid = process.user().uid();
    let environment = process.env_mut().get_or_insert_default();
    deduplicate(environment);
    if !environment.iter().any(|variable| variable.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        environment.retain(|variable| variable != "HOME=");
        environment.push(format!("HOME={}", root.home(uid).as_deref().unwrap_or("/")));
    }
    Ok(())
}

fn has_apparmor() -> Result<bool> {
    match apparmor::is_enabled() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other.context(|| "look for AppArmor"),
    }
}

/// Keeps the last of several values for a variable, as a shell would; the C library would take the
/// first.
fn deduplicate(environment: &mut Vec<String>) {
    fn name(variable: &str) -> &str {
        variable.split_once('=').map_or(variable, |(name, _)| name)
    }
    let mut seen = HashSet::new();
    let last: Vec<bool> = environment.iter().rev().map(|variable| seen.insert(name(variable).to_owned())).collect();
    let mut last = last.into_iter().rev();
    environment.retain(|_| last.next().unwrap_or(true));
}

/// Returns all five sets, limited to the shim's own capabilities.
fn capabilities(given: Option<&LinuxCapabilities>, warnings: &mut Vec<String>) -> Result<LinuxCapabilities> {
    let own = Status::of(HostPid::own()).context(|| "read this process's capabilities")?;
    let available = own.capabilities().ok_or_else(|| Failure::new("the kernel does not tell capabilities"))?;
    Ok(limited_to(given, available.bounding, warnings))
}

fn limited_to(given: Option<&LinuxCapabilities>, available: u64, warnings: &mut Vec<String>) -> LinuxCapabilities {
    let mut missing = HashSet::new();
    let mut limited = |set: Option<&Capabilities>| -> Option<Capabilities> {
        let (kept, lost): (Capabilities, Capabilities) =
            set.into_iter().flatten().copied().partition(|given| capability::is_in(available, *given));
        missing.extend(lost);
        Some(kept)
    };
    let mut all = LinuxCapabilities::default();
    all.set_bounding(limited(given.and_then(|given| given.bounding().as_ref())));
    all.set_effective(limited(given.and_then(|given| given.effective().as_ref())));
    all.set_permitted(limited(given.and_then(|given| given.permitted().as_ref())));
    all.set_inheritable(limited(given.and_then(|given| given.inheritable().as_ref())));
    all.set_ambient(limited(given.and_then(|given| given.ambient().as_ref())));
    if !missing.is_empty() {
        let mut names: Vec<String> = missing.into_iter().map(capability::name).collect();
        names.sort();
        warnings.push(format!("capabilities that cannot be given, and are left out: {}", names.join(", ")));
    }
    all
}

/// Makes the working directory at its visible place: in the root, or in a host folder mounted over
/// it. A filesystem mounted later is out of reach; libcontainer then reports a missing directory.
fn make_cwd(spec: &Spec, rootfs: &Root, cwd: &Path, owner: (u32, u32)) -> Result<()> {
    let cwd = rootfs.real_path(cwd).context(|| format!("find the working directory {}", cwd.display()))?;
    let over = spec
        .mounts()
        .iter()
        .flatten()
        .rfind(|mount| mount.destination() != Path::new("/") && cwd.starts_with(mount.destination()));
    let Some(mount) = over else { return rootfs.make_directory(&cwd, owner) };
    let is_bind = mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
    match (mount.source(), cwd.strip_prefix(mount.destination())) {
        (Some(source), Ok(rest)) if is_bind && source.is_dir() => Root::open(source)?.make_directory(rest, owner),
        _ => Ok(()),
    }
}

/// Returns the outside ids of root inside.
pub(super) fn host_root(linux: &Linux) -> (u32, u32) {
    (host_id(linux.uid_mappings().as_deref(), 0), host_id(linux.gid_mappings().as_deref(), 0))
}

/// Returns the outside id of an id inside.
pub(super) fn host_id(mappings: Option<&[LinuxIdMapping]>, id: u32) -> u32 {
    let found = mappings.into_iter().flatten().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id())?;
        (offset < mapping.size()).then(|| mapping.host_id().checked_add(offset))?
    });
    found.unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use oci_spec::runtime::{
        Capability, LinuxIdMappingBuilder, LinuxNamespace, LinuxSeccompAction, LinuxSeccompBuilder,
        LinuxSyscallBuilder, MountBuilder, RootBuilder, SpecBuilder,
    };
    use tempfile::TempDir;

    use super::*;

    /// Returns a minimal specification, as read from Go's JSON, and its root.
    fn container() -> (TempDir, Spec) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/passwd"), "me:x:7:7::/home/me:/bin/sh\n").unwrap();
        let process: Process = serde_json::from_str(
            r#"{"args":["true"],"cwd":"/work","user":{"uid":7,"gid":7},"env":["A=1","PATH=/bin","A=2"]}"#,
        )
        .unwrap();
        let mut linux = LinuxBuilder::default().build().unwrap();
        linux.set_namespaces(None).set_resources(None).set_devices(None);
        linux.set_masked_paths(None).set_readonly_paths(None);
        let mut spec = SpecBuilder::default()
            .root(RootBuilder::default().path(root.path()).build().unwrap())
            .process(process)
            .linux(linux)
            .mounts(Vec::new())
            .build()
            .unwrap();
        spec.set_hostname(None);
        (root, spec)
    }

    fn own_pid() -> HostPid {
        HostPid::own()
    }

    fn mount(destination: &str, options: &[&str]) -> oci_spec::runtime::Mount {
        let options = options.iter().map(|&option| option.to_owned()).collect::<Vec<_>>();
        MountBuilder::default().destination(destination).typ("bind").source("/").options(options).build().unwrap()
    }

    #[test]
    fn a_first_process_gets_what_runc_takes_for_granted() {
        let (root, mut spec) = container();
        spec.process_mut().as_mut().unwrap().set_no_new_privileges(Some(false));
        spec.linux_mut().as_mut().unwrap().set_rootfs_propagation(Some("rslave".into()));
        let program = for_init(&mut spec, "/c".into(), Prepare::Nothing, &mut Vec::new()).unwrap();
        assert!(program.seccomp.is_none() && program.complain);
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.env().as_ref().unwrap(), &["PATH=/bin", "A=2", "HOME=/home/me"]);
        assert_eq!(process.no_new_privileges(), None);
        let capabilities = process.capabilities().as_ref().unwrap();
        for set in [capabilities.bounding(), capabilities.effective(), capabilities.permitted()] {
            assert_eq!(set, &Some(Capabilities::new()));
        }
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("slave"));
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/c")));
        assert!(!linux.resources().as_ref().unwrap().devices().as_ref().unwrap()[0].allow());
        assert!(root.path().join("work").is_dir());
    }

    #[test]
    fn a_capability_that_cannot_be_given_is_left_out_with_a_warning() {
        let mut given = LinuxCapabilities::default();
        given.set_bounding(None).set_permitted(None).set_inheritable(None).set_ambient(None);
        given.set_effective(Some([Capability::Chown].into()));
        let mut warnings = Vec::new();
        let limited = limited_to(Some(&given), 0, &mut warnings);
        assert_eq!(limited.effective(), &Some(Capabilities::new()));
        assert!(warnings[0].ends_with("CAP_CHOWN"), "{warnings:?}");
    }

    #[test]
    fn a_mount_is_where_the_roots_links_lead() {
        let (root, mut spec) = container();
        std::os::unix::fs::symlink("/run", root.path().join("var")).unwrap();
        spec.set_mounts(Some(vec![mount("/var/secret", &["rbind", "nosymfollow"])]));
        for_init(&mut spec, "/c".into(), Prepare::Nothing, &mut Vec::new()).unwrap();
        let mount = &spec.mounts().as_ref().unwrap()[0];
        assert_eq!(mount.destination(), Path::new("/run/secret"));
        assert_eq!(mount.options().as_ref().unwrap(), &["rbind", "rnosymfollow"]);
    }

    #[test]
    fn a_working_directory_in_a_volume_is_made_in_the_volume() {
        let (root, mut spec) = container();
        let volume = tempfile::tempdir().unwrap();
        let mut volumes = mount("/work", &["rbind"]);
        volumes.set_source(Some(volume.path().to_owned()));
        spec.set_mounts(Some(vec![volumes]));
        spec.process_mut().as_mut().unwrap().set_cwd("/work/a/b".into());
        for_init(&mut spec, "/c".into(), Prepare::Nothing, &mut Vec::new()).unwrap();
        assert!(volume.path().join("a/b").is_dir());
        assert!(!root.path().join("work").exists());
    }

    #[test]
    fn a_process_that_cannot_be_started_is_refused() {
        let refusal = |change: fn(&mut Process)| {
            let (_root, mut spec) = container();
            change(spec.process_mut().as_mut().unwrap());
            for_init(&mut spec, "/c".into(), Prepare::Nothing, &mut Vec::new()).unwrap_err().to_string()
        };
        let without_arguments = refusal(|process| {
            process.set_args(Some(Vec::new()));
        });
        assert!(without_arguments.contains("args is empty"), "{without_arguments}");
        let adrift = refusal(|process| {
            process.set_cwd("work".into());
        });
        assert!(adrift.contains("not absolute"), "{adrift}");
    }

    #[test]
    fn what_libcontainer_would_ignore_is_refused() {
        let (_root, mut spec) = container();
        validate(&spec).unwrap();
        for option in ["idmap", "ridmap", "tmpcopyup"] {
            spec.set_mounts(Some(vec![mount("/x", &["rbind", option])]));
            let message = validate(&spec).unwrap_err().to_string();
            assert!(message.contains("/x") && message.contains("cannot"), "{message}");
        }
    }

    #[test]
    fn a_further_process_joins_the_first_and_inherits_missing_settings() {
        let (_root, mut spec) = container();
        let first = spec.process_mut().as_mut().unwrap();
        first.set_oom_score_adj(Some(5)).set_apparmor_profile(None);
        let namespace: LinuxNamespace =
            serde_json::from_str(r#"{"type":"network","path":"/var/run/netns/x"}"#).unwrap();
        spec.linux_mut().as_mut().unwrap().set_namespaces(Some(vec![namespace]));
        let process: Process =
            serde_json::from_str(r#"{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0},"env":["HOME=/x"]}"#).unwrap();
        for_exec(&mut spec, process, own_pid(), "/c/d".into(), Prepare::Nothing, &mut Vec::new()).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.oom_score_adj(), Some(5));
        assert_eq!(process.env().as_ref().unwrap(), &["HOME=/x"]);
        let linux = spec.linux().as_ref().unwrap();
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert_eq!(namespaces.len(), 1);
        assert_eq!(namespaces[0].path(), &Some(format!("/proc/{}/ns/net", own_pid()).into()));
        assert_eq!((linux.resources(), linux.masked_paths(), linux.seccomp()), (&None, &None, &None));
    }

    #[test]
    fn a_further_process_is_confined_like_the_first() {
        let (_root, mut spec) = container();
        let seccomp = |action| {
            let rule = LinuxSyscallBuilder::default().names(vec!["read".to_owned()]).action(action).build().unwrap();
            LinuxSeccompBuilder::default().syscalls(vec![rule]).build().unwrap()
        };
        let mut exec = |action| {
            spec.linux_mut().as_mut().unwrap().set_seccomp(Some(seccomp(action)));
            let process = spec.process().clone().unwrap();
            let mut spec = spec.clone();
            let mut process = process;
            process.set_cwd("/".into());
            for_exec(&mut spec, process, own_pid(), "/c".into(), Prepare::Nothing, &mut Vec::new())
        };
        assert!(exec(LinuxSeccompAction::ScmpActAllow).unwrap().seccomp.is_some());
        assert!(exec(LinuxSeccompAction::ScmpActNotify).unwrap_err().to_string().contains("listener"));
    }

    #[test]
    fn a_missing_working_directory_is_told_in_runcs_words() {
        let (_root, mut spec) = container();
        let mut process = spec.process().clone().unwrap();
        process.set_cwd("/no/such/directory".into());
        let failure =
            for_exec(&mut spec, process, own_pid(), "/c".into(), Prepare::Nothing, &mut Vec::new()).unwrap_err();
        let expected = r#"chdir to cwd ("/no/such/directory") set in config.json failed: no such file or directory"#;
        assert_eq!(failure.to_string(), expected);
    }

    #[test]
    fn ids_inside_are_mapped_outside() {
        let mapping = |inside, outside, size| {
            LinuxIdMappingBuilder::default().container_id(inside).host_id(outside).size(size).build().unwrap()
        };
        let mappings = [mapping(0_u32, 1000_u32, 1_u32), mapping(1, 100_000, 10)];
        assert_eq!(host_id(Some(&mappings), 0), 1000);
        assert_eq!(host_id(Some(&mappings), 10), 100_009);
        assert_eq!(host_id(Some(&mappings), 11), 11);
        assert_eq!(host_id(None, 5), 5);
    }

    #[test]
    fn a_container_without_a_cgroup_path_gets_one() {
        let mut linux = Linux::default();
        linux.set_cgroups_path(None);
        assert_eq!(cgroup_path(&linux, false, "x"), Path::new("/x"));
        assert_eq!(cgroup_path(&linux, true, "x"), Path::new("system.slice:gpusnap:x"));
        linux.set_cgroups_path(Some("/a/b".into()));
        assert_eq!(cgroup_path(&linux, false, "x"), Path::new("/a/b"));
    }
}
