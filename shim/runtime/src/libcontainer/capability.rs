//! Numbers of the kernel's capabilities.

use oci_spec::runtime::Capability;

/// All known capabilities, in numeric order (linux/capability.h).
pub(super) const ALL: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// Returns the capability's name in specifications.
pub(super) fn name(capability: Capability) -> String {
    format!("CAP_{capability}")
}

/// Returns the capability's bit in a set of the kernel.
pub(super) fn bit(capability: Capability) -> u64 {
    ALL.iter().position(|known| *known == capability).map_or(0, |number| 1 << number)
}

/// Returns whether a capability is in a set of the kernel.
pub(super) fn is_in(set: u64, capability: Capability) -> bool {
    set & bit(capability) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert!(is_in(1, Capability::Chown));
        assert!(is_in(1 << 21, Capability::SysAdmin));
        assert!(is_in(1 << 40, Capability::CheckpointRestore));
        assert!(!is_in(!(1 << 21), Capability::SysAdmin));
    }

    #[test]
    fn names_are_those_of_specifications() {
        for capability in ALL {
            assert_eq!(serde_json::to_value(capability).unwrap(), name(capability));
        }
    }
}
