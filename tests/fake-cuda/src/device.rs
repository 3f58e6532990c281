//! GPUs open in a process: descriptors and mappings of their nodes.

use std::os::fd::{AsFd, OwnedFd};

use crate::code::{Code, Result};
use crate::node;
use crate::sys::memory::{PAGE, Region};

/// Lengths of the mappings of a GPU's node, in pages. As with the real driver, children inherit the
/// mappings.
const MAPPINGS: [usize; 4] = [1, 2, 16, 4];

/// Number of descriptors of a GPU's node, beside one of /dev/nvidiactl.
const DESCRIPTORS: usize = 6;

/// The nodes of one GPU, open and mapped. No allocation: the driver's thread opens them again at a
/// restore.
pub(crate) struct Nodes {
    _descriptors: [OwnedFd; DESCRIPTORS],
    _control: OwnedFd,
    mappings: [Region; MAPPINGS.len()],
}

impl Nodes {
    pub(crate) fn open(minor: u32) -> Result<Self> {
        let descriptor = || node::open_gpu(minor).ok_or(Code::INVALID_DEVICE);
        let descriptors = [descriptor()?, descriptor()?, descriptor()?, descriptor()?, descriptor()?, descriptor()?];
        let control = node::open("nvidiactl").ok_or(Code::NO_DEVICE)?;
        let map = |at: usize| Region::node(descriptors[at].as_fd(), MAPPINGS[at] * PAGE);
        let mappings = [map(0)?, map(1)?, map(2)?, map(3)?];
        Ok(Self { _descriptors: descriptors, _control: control, mappings })
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for mapping in self.mappings {
            mapping.unmap();
        }
    }
}

/// Nodes open from cuInit on.
pub(crate) struct Common {
    _control: OwnedFd,
    /// Absent on some machines.
    _managed: Option<OwnedFd>,
}

impl Common {
    pub(crate) fn open() -> Result<Self> {
        let control = node::open("nvidiactl").ok_or(Code::NO_DEVICE)?;
        Ok(Self { _control: control, _managed: node::open("nvidia-uvm") })
    }
}

/// A GPU known to cuDeviceGet. The place in the list is the ordinal, for ever; a restore on another
/// GPU changes minor number and UUID.
pub(crate) struct Device {
    pub(crate) minor: u32,
    pub(crate) uuid: [u8; 16],
    /// Number of retains of the primary context.
    pub(crate) retained: u32,
    /// Number of live contexts, the primary one included.
    pub(crate) contexts: u32,
    /// Nodes open while there is a context, except while checkpointed.
    pub(crate) nodes: Option<Nodes>,
}
