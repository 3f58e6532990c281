//! Features of this runtime, declared honestly: containerd's requests depend on them.

use std::collections::HashMap;

use oci_spec::runtime::{
    Apparmor, Arch, Cgroup, Features, IDMap, IntelRdt, LinuxFeature, LinuxNamespaceType, LinuxSeccompAction,
    MountExtensions, NetDevices, Seccomp, Selinux, VERSION,
};

use super::capability;

/// Effective mount options. libcontainer also accepts `sync`, `remount` and others, without effect.
const MOUNT_OPTIONS: [&str; 46] = [
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
];

pub(super) fn features() -> Features {
    let mut features = Features::default();
    features.set_oci_version_min("1.0.0".into());
    features.set_oci_version_max(VERSION.into());
    let hooks = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    features.set_hooks(Some(owned(&hooks)));
    features.set_mount_options(Some(owned(&MOUNT_OPTIONS)));
    features.set_linux(Some(linux()));
    features.set_annotations(Some(HashMap::from([(
        "org.opencontainers.runc.checkpoint.enabled".to_owned(),
        true.to_string(),
    )])));
    features
}

fn linux() -> LinuxFeature {
    let mut cgroup = Cgroup::default();
    cgroup.set_v1(Some(true)).set_v2(Some(true)).set_systemd(Some(true));
    cgroup.set_systemd_user(Some(false)).set_rdma(Some(false));
    let mut apparmor = Apparmor::default();
    apparmor.set_enabled(Some(true));
    let mut selinux = Selinux::default();
    selinux.set_enabled(Some(false));
    let mut intel_rdt = IntelRdt::default();
    intel_rdt.set_enabled(Some(true));
    let mut idmap = IDMap::default();
    idmap.set_enabled(Some(false));
    let mut mount_extensions = MountExtensions::default();
    mount_extensions.set_idmap(Some(idmap));
    let mut net_devices = NetDevices::default();
    net_devices.set_enabled(Some(true));

    let mut linux = LinuxFeature::default();
    linux.set_namespaces(Some(vec![
        LinuxNamespaceType::Cgroup,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Time,
        LinuxNamespaceType::User,
        LinuxNamespaceType::Uts,
    ]));
    linux.set_capabilities(Some(capability::ALL.map(capability::name).to_vec()));
    linux.set_cgroup(Some(cgroup)).set_seccomp(Some(seccomp()));
    linux.set_apparmor(Some(apparmor)).set_selinux(Some(selinux)).set_intel_rdt(Some(intel_rdt));
    linux.set_mount_extensions(Some(mount_extensions)).set_net_devices(Some(net_devices));
    linux
}

fn seccomp() -> Seccomp {
    let flags = [
        "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        "SECCOMP_FILTER_FLAG_TSYNC",
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
    ];
    let operators = [
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ];
    let mut seccomp = Seccomp::default();
    seccomp.set_enabled(Some(true));
    seccomp.set_actions(Some(vec![
        LinuxSeccompAction::ScmpActAllow,
        LinuxSeccompAction::ScmpActErrno,
        LinuxSeccompAction::ScmpActKill,
        LinuxSeccompAction::ScmpActKillProcess,
        LinuxSeccompAction::ScmpActKillThread,
        LinuxSeccompAction::ScmpActLog,
        LinuxSeccompAction::ScmpActNotify,
        LinuxSeccompAction::ScmpActTrace,
        LinuxSeccompAction::ScmpActTrap,
    ]));
    seccomp.set_operators(Some(owned(&operators)));
    seccomp.set_archs(Some(vec![
        Arch::ScmpArchX86,
        Arch::ScmpArchX86_64,
        Arch::ScmpArchX32,
        Arch::ScmpArchArm,
        Arch::ScmpArchAarch64,
        Arch::ScmpArchRiscv64,
    ]));
    seccomp.set_known_flags(Some(owned(&flags)));
    seccomp.set_supported_flags(Some(owned(&flags)));
    seccomp
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_finds_what_it_looks_for() {
        let features = serde_json::to_value(features()).unwrap();
        // Recursive read-only mounts need this option.
        assert!(features["mountOptions"].as_array().unwrap().iter().any(|option| option == "rro"));
        // User namespaces of pods need id-mapped mounts.
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], false);
        assert_eq!(features["annotations"]["org.opencontainers.runc.checkpoint.enabled"], "true");
        assert_eq!(features["linux"]["namespaces"][2], "mount");
        assert_eq!(features["linux"]["seccomp"]["enabled"], true);
    }
}
