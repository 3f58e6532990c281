//! CRIU's version, and the minimum.

use std::fmt;

use rust_criu::rust_criu_protobuf::rpc::Criu_version;

/// Minimum of this project. 4.1 is the first to dump an already frozen cgroup, as left by
/// containerd (criu commit 4196268ee). It also records the plugins needed for a restore in an image
/// (5335b35f7), and knows pidfds, held by Python and systemd (1ce408ffa).
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
    /// Returns the version, or `None` for a negative number.
    pub(crate) fn of(answer: &Criu_version) -> Option<Self> {
        Some(Self {
            major: u32::try_from(answer.major_number()).ok()?,
            minor: u32::try_from(answer.minor_number()).ok()?,
            sublevel: u32::try_from(answer.sublevel()).ok()?,
        })
    }

    /// Parses the output of `criu --version`: `Version: 4.2.1`.
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
