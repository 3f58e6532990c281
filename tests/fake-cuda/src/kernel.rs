//! Modules, as far as the names in the PTX text, and the kernels with an effect here.

use crate::code::{Code, Result};

/// A kernel by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// `spin(u64 nanoseconds)`: keeps the device busy.
    Spin,
    /// `add_one(u32 *values, u32 count)`
    AddOne,
    /// `fill(u32 *values, u32 count, u32 seed)`: value i becomes `((i ^ seed) * 2654435761 mod 2^32) / 2`.
    Fill,
}

impl Kernel {
    fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "spin" => Self::Spin,
            "add_one" => Self::AddOne,
            "fill" => Self::Fill,
            _ => return None,
        })
    }
}

/// A launch that has not happened yet.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    AddOne { values: u64, count: u32 },
    Fill { values: u64, count: u32, seed: u32 },
}

/// The value written by `fill` at place `index`.
pub(crate) fn pattern(index: u32, seed: u32) -> u32 {
    (index ^ seed).wrapping_mul(2_654_435_761) >> 1
}

/// Names of the entry functions in a PTX text.
pub(crate) fn entries(ptx: &str) -> Result<Vec<String>> {
    if !ptx.contains(".version") || !ptx.contains(".target") {
        return Err(Code::INVALID_IMAGE);
    }
    let mut names = Vec::new();
    for after in ptx.split(".entry").skip(1) {
        let name: String =
            after.trim_start().chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | '$')).collect();
        if name.is_empty() {
            return Err(Code::INVALID_IMAGE);
        }
        names.push(name);
    }
    Ok(names)
}

/// The kernel of that name; a name in the text without an effect here is refused, too.
pub(crate) fn find(names: &[String], name: &str) -> Result<Kernel> {
    if !names.iter().any(|known| known == name) {
        return Err(Code::NOT_FOUND);
    }
    Kernel::from_name(name).ok_or(Code::NOT_SUPPORTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_a_ptx_text_are_found_by_name() {
        let ptx =
            ".version 6.0\n.target sm_50\n.visible .entry spin(.param .u64 a)\n{ ret; }\n.entry other () { ret; }";
        let names = entries(ptx).unwrap();
        assert_eq!(names, ["spin", "other"]);
        assert_eq!(find(&names, "spin"), Ok(Kernel::Spin));
        assert_eq!(find(&names, "other"), Err(Code::NOT_SUPPORTED));
        assert_eq!(find(&names, "add_one"), Err(Code::NOT_FOUND));
        assert_eq!(entries("not PTX"), Err(Code::INVALID_IMAGE));
    }
}
