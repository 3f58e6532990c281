//! CRIU's version, and which one is needed.

use std::fmt;

use rust_criu::rust_criu_protobuf::rpc::Criu_version;

/// What containerd's CRI asks for before it checkpoints (its go-criu, `PodCriuVersion`).
pub const CONTAINERD_MINIMUM: Version = Version { major: 3, minor: 16, sublevel: 0 };

/// What this project needs. 4.1 is the first that dumps a tree whose cgroup is frozen already, as containerd leaves it
/// (criu commit 4196268ee), that lists in an image the plugins that a restore needs (5335b35f7), and that knows pidfds,
/// which Python and systemd hold (1ce408ffa).
pub const MINIMUM: Version = Version { major: 4, minor: 1, sublevel: 0 };

/// A version of CRIU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 4 in 4.2.1.
    pub major: u32,
    /// 2 in 4.2.1.
    pub minor: u32,
    /// 1 in 4.2.1, 0 in 4.2.
    pub sublevel: u32,
}

impl Version {
    /// None when a number is negative.
    pub(crate) fn of(answer: &Criu_version) -> Option<Self> {
        Some(Self {
            major: u32::try_from(answer.major_number()).ok()?,
            minor: u32::try_from(answer.minor_number()).ok()?,
            sublevel: u32::try_from(answer.sublevel()).ok()?,
        })
    }

    /// What `criu --version` prints: `Version: 4.2.1`.
    pub(crate) fn in_text(text: &str) -> Option<Self> {
        let version = text.lines().find_map(|line| line.trim().strip_prefix("Version:"))?;
        let mut numbers = version.trim().split('.').map(|number| {
            let digits = number.find(|c: char| !c.is_ascii_digit()).map_or(number, |end| &number[..end]);
            digits.parse().ok()
        });
        Some(Self {
            major: numbers.next()??,
            minor: numbers.next().flatten().unwrap_or(0),
            sublevel: numbers.next().flatten().unwrap_or(0),
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.sublevel != 0 { write!(f, ".{}", self.sublevel) } else { Ok(()) }
    }
}
