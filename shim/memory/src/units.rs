//! Numbers of bytes, as memory and as files count them.

const _: () = assert!(usize::BITS == 64, "addresses of processes and sizes of files are 64 bits wide");

/// A number of bytes as memory counts.
pub(crate) fn bytes(number: u64) -> usize {
    usize::try_from(number).expect("both have 64 bits: asserted above")
}

/// A number of bytes as files count.
pub(crate) fn wide(number: usize) -> u64 {
    u64::try_from(number).expect("both have 64 bits: asserted above")
}
