//! Targets of the suite: a containerd with a shim.

use std::fmt;

use anyhow::{Result, bail};

/// Environment variable with the chosen targets: a comma list of `2.1`, `stock`, `2.4/gpusnap`, ...
/// (default: all).
pub const TARGETS: &str = "GPUSNAP_E2E_TARGETS";

/// A version of containerd, as named by the test bed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Containerd {
    /// Debian's 2.1.9.
    V2_1,
    /// 2.4.2, with the protobuf bootstrap protocol.
    V2_4,
}

/// A shim, and the way to select it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shim {
    /// That containerd's own `containerd-shim-runc-v2`: shows that the suite describes runc's
    /// behaviour.
    Stock,
    /// Ours under its own name, with the embedded runtime.
    Gpusnap,
    /// Ours under its own name, with `BinaryName = "runc"`.
    GpusnapRunc,
    /// Ours in the place of `containerd-shim-runc-v2`.
    AsRunc,
}

/// A cell of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The containerd.
    pub containerd: Containerd,
    /// The shim.
    pub shim: Shim,
}

impl Containerd {
    /// Name on the test bed's command line.
    pub fn version(self) -> &'static str {
        match self {
            Self::V2_1 => "2.1",
            Self::V2_4 => "2.4",
        }
    }
}

impl Shim {
    /// Name in [`TARGETS`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Gpusnap => "gpusnap",
            Self::GpusnapRunc => "gpusnap-runc",
            Self::AsRunc => "as-runc",
        }
    }

    /// Returns whether the shim is our binary.
    pub fn is_ours(self) -> bool {
        self != Self::Stock
    }

    /// The runtime name in clients' requests to containerd.
    pub fn runtime(self) -> &'static str {
        match self {
            Self::Stock | Self::AsRunc => "io.containerd.runc.v2",
            Self::Gpusnap | Self::GpusnapRunc => "io.containerd.gpusnap.v2",
        }
    }

    /// The shim's program, derived by containerd from the runtime name.
    pub fn binary(self) -> &'static str {
        match self {
            Self::Stock | Self::AsRunc => "containerd-shim-runc-v2",
            Self::Gpusnap | Self::GpusnapRunc => "containerd-shim-gpusnap-v2",
        }
    }

    /// The CRI's runtime handler.
    pub fn handler(self) -> &'static str {
        match self {
            Self::Stock | Self::AsRunc => "runc",
            Self::Gpusnap => "gpusnap",
            Self::GpusnapRunc => "gpusnap-runc",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.containerd.version(), self.shim.name())
    }
}

impl Target {
    /// Every cell.
    pub fn all() -> Vec<Self> {
        let shims = [Shim::Stock, Shim::Gpusnap, Shim::GpusnapRunc, Shim::AsRunc];
        [Containerd::V2_1, Containerd::V2_4]
            .into_iter()
            .flat_map(|containerd| shims.map(|shim| Self { containerd, shim }))
            .collect()
    }

    /// Cells named by a comma list. A word without a match is an error: a typo must not run
    /// nothing.
    pub fn chosen(list: &str) -> Result<Vec<Self>> {
        let words: Vec<&str> = list.split(',').map(str::trim).filter(|w| !w.is_empty()).collect();
        let fits = |target: &Self, word: &str| {
            word == target.to_string() || word == target.containerd.version() || word == target.shim.name()
        };
        for word in &words {
            if !Self::all().iter().any(|target| fits(target, word)) {
                let names: Vec<String> = Self::all().iter().map(Self::to_string).collect();
                bail!("{TARGETS} names {word:?}, which is none of {}", names.join(", "));
            }
        }
        Ok(Self::all().into_iter().filter(|t| words.is_empty() || words.iter().any(|w| fits(t, w))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &str) -> Vec<String> {
        Target::chosen(list).unwrap().iter().map(Target::to_string).collect()
    }

    #[test]
    fn no_list_means_all_eight() {
        assert_eq!(names("").len(), 8);
    }

    #[test]
    fn a_word_names_a_cell_a_row_or_a_column() {
        assert_eq!(names("2.4/gpusnap"), ["2.4/gpusnap"]);
        assert_eq!(names("stock"), ["2.1/stock", "2.4/stock"]);
        assert_eq!(names("2.1").len(), 4);
        assert_eq!(names("stock, 2.4/as-runc"), ["2.1/stock", "2.4/stock", "2.4/as-runc"]);
    }

    #[test]
    fn a_typo_is_an_error() {
        assert!(Target::chosen("stok").unwrap_err().to_string().contains("stok"));
    }
}
