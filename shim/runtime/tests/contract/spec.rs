//! Specifications like those of containerd and nerdctl.

use std::collections::HashSet;
use std::path::Path;

use oci_spec::runtime::{
    Arch, Capability, Hook, HookBuilder, Linux, LinuxBuilder, LinuxCapabilities, LinuxCapabilitiesBuilder,
    LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxNamespace, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResourcesBuilder, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompBuilder,
    LinuxSyscallBuilder, Mount, MountBuilder, PosixRlimitBuilder, PosixRlimitType, Process, ProcessBuilder,
    RootBuilder, Spec, SpecBuilder, UserBuilder,
};

/// Returns a container that runs a shell script.
pub(crate) fn shell(script: &str) -> Spec {
    program(&["/bin/sh", "-c", script])
}

/// Returns a container that runs a program. The bundle decides about its cgroup.
pub(crate) fn program(arguments: &[&str]) -> Spec {
    SpecBuilder::default()
        .version("1.2.0")
        .root(RootBuilder::default().path("rootfs").readonly(false).build().unwrap())
        .process(process(arguments))
        .hostname("contract")
        .mounts(mounts())
        .linux(linux())
        .build()
        .unwrap()
}

/// Returns a process as requested by containerd's clients, by default and for exec.
pub(crate) fn process(arguments: &[&str]) -> Process {
    ProcessBuilder::default()
        .terminal(false)
        .user(UserBuilder::default().uid(0_u32).gid(0_u32).build().unwrap())
        .args(arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
        .env(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(), "HOME=/".to_owned()])
        .cwd("/")
        .capabilities(capabilities(&DEFAULT_CAPABILITIES))
        .rlimits([PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(1024_u64)
            .hard(1024_u64)
            .build()
            .unwrap()])
        .no_new_privileges(true)
        .build()
        .unwrap()
}

/// Docker's original default, now everybody's.
pub(crate) const DEFAULT_CAPABILITIES: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

pub(crate) fn capabilities(set: &[Capability]) -> LinuxCapabilities {
    let set: HashSet<Capability> = set.iter().copied().collect();
    LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .permitted(set.clone())
        .effective(set)
        .inheritable(HashSet::new())
        .ambient(HashSet::new())
        .build()
        .unwrap()
}

pub(crate) fn mount(destination: &str, kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Mount {
    MountBuilder::default()
        .destination(destination)
        .typ(kind)
        .source(source.as_ref())
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()
        .unwrap()
}

fn mounts() -> Vec<Mount> {
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]),
        mount("/run", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
    ]
}

fn linux() -> Linux {
    LinuxBuilder::default()
        .namespaces(
            [
                LinuxNamespaceType::Pid,
                LinuxNamespaceType::Ipc,
                LinuxNamespaceType::Uts,
                LinuxNamespaceType::Mount,
                LinuxNamespaceType::Network,
                LinuxNamespaceType::Cgroup,
            ]
            .map(|kind| namespace(kind, None)),
        )
        .masked_paths(
            [
                "/proc/acpi",
                "/proc/asound",
                "/proc/kcore",
                "/proc/keys",
                "/proc/latency_stats",
                "/proc/timer_list",
                "/proc/timer_stats",
                "/proc/sched_debug",
                "/sys/firmware",
                "/proc/scsi",
            ]
            .map(str::to_owned),
        )
        .readonly_paths(["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"].map(str::to_owned))
        .resources(LinuxResourcesBuilder::default().devices(device_rules()).build().unwrap())
        .seccomp(seccomp())
        .build()
        .unwrap()
}

pub(crate) fn namespace(kind: LinuxNamespaceType, path: Option<&Path>) -> LinuxNamespace {
    let builder = LinuxNamespaceBuilder::default().typ(kind);
    match path {
        Some(path) => builder.path(path),
        None => builder,
    }
    .build()
    .unwrap()
}

/// Returns rules that forbid all devices except the usual ones. Major and minor numbers are from
/// Documentation/admin-guide/devices.txt.
fn device_rules() -> Vec<LinuxDeviceCgroup> {
    let mut rules = vec![LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build().unwrap()];
    // null, zero, full, random, urandom, tty, ptmx.
    let usual = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];
    rules.extend(usual.map(|(major, minor)| device_rule(major, Some(minor))));
    // /dev/pts/*.
    rules.push(device_rule(136, None));
    rules
}

pub(crate) fn device_rule(major: i64, minor: Option<i64>) -> LinuxDeviceCgroup {
    let builder = LinuxDeviceCgroupBuilder::default().allow(true).typ(LinuxDeviceType::C).major(major).access("rwm");
    match minor {
        Some(minor) => builder.minor(minor),
        None => builder,
    }
    .build()
    .unwrap()
}

/// ENOSYS: a process without capabilities gets another error, so the filter's answer can be
/// recognized.
const FORBIDDEN_ERRNO: u32 = 38;

/// Architectures as in containerd's list, including those of other programs that the kernel runs.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: [Arch; 3] = [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: [Arch; 2] = [Arch::ScmpArchAarch64, Arch::ScmpArchArm];

/// Returns a filter that forbids two system calls; the real profile has the same shape, the other
/// way round.
fn seccomp() -> LinuxSeccomp {
    let forbidden = LinuxSyscallBuilder::default()
        .names(["sethostname", "setdomainname"].map(str::to_owned))
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(FORBIDDEN_ERRNO)
        .build()
        .unwrap();
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActAllow)
        .architectures(ARCHITECTURES.to_vec())
        .syscalls([forbidden])
        .build()
        .unwrap()
}

/// Returns a hook that runs a shell script, with the container's state in `$state`. The hook always
/// reads the state: crun dies of SIGPIPE otherwise.
pub(crate) fn hook(script: &str) -> Hook {
    HookBuilder::default()
        .path("/bin/sh")
        .args(["sh", "-c", &format!("state=$(cat); {script}")].map(str::to_owned).to_vec())
        .env(["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()])
        .build()
        .unwrap()
}

/// Short ways to the parts of a specification that sentences change.
pub(crate) trait Edit: Sized {
    /// Returns the specification with the process changed.
    fn with_process(self, change: impl FnOnce(&mut Process)) -> Self;
    /// Returns the specification with the Linux part changed.
    fn with_linux(self, change: impl FnOnce(&mut Linux)) -> Self;
    /// Returns the specification with one more mount, or another one at its destination.
    fn with_mount(self, mount: Mount) -> Self;
    /// Returns the specification with other namespaces of one kind: `None` for the host's.
    fn with_namespace(self, kind: LinuxNamespaceType, namespace: Option<LinuxNamespace>) -> Self;
}

impl Edit for Spec {
    fn with_process(mut self, change: impl FnOnce(&mut Process)) -> Self {
        change(self.process_mut().as_mut().unwrap());
        self
    }

    fn with_linux(mut self, change: impl FnOnce(&mut Linux)) -> Self {
        change(self.linux_mut().as_mut().unwrap());
        self
    }

    fn with_mount(mut self, mount: Mount) -> Self {
        let mounts = self.mounts_mut().as_mut().unwrap();
        mounts.retain(|other| other.destination() != mount.destination());
        mounts.push(mount);
        self
    }

    fn with_namespace(self, kind: LinuxNamespaceType, namespace: Option<LinuxNamespace>) -> Self {
        self.with_linux(|linux| {
            let namespaces = linux.namespaces_mut().as_mut().unwrap();
            namespaces.retain(|namespace| namespace.typ() != kind);
            namespaces.extend(namespace);
        })
    }
}
