//! Moves device memory into the staging mapping and back, and closes and opens nodes. Runs in the
//! driver's thread, with the gate closed and without allocation: other threads may be held anywhere
//! outside of the driver, as inside malloc.

use crate::code::{Code, Result};
use crate::control::{MAX_DEVICES, Pair};
use crate::device::{Common, Nodes};
use crate::node;
use crate::state::{Allocation, Place, State};
use crate::sys::memory::Region;

fn on_device(allocation: &&Allocation) -> bool {
    matches!(allocation.place, Place::Device(_))
}

/// Moves from LOCKED to CHECKPOINTED. An error leaves everything unchanged.
pub(crate) fn save(state: &mut State) -> Result<()> {
    if state.allocations.iter().any(|allocation| allocation.place == Place::Managed) {
        return Err(Code::NOT_SUPPORTED);
    }
    let total: usize = state.allocations.iter().filter(on_device).map(|allocation| allocation.region.length()).sum();
    // The real driver also makes a mapping for a context without memory: the driver's own device
    // memory is in it.
    let staging = Region::alone(total)?;
    let mut offset = 0;
    for allocation in state.allocations.iter().filter(on_device) {
        let region = allocation.region;
        staging.put(offset, region.address(), region.length())?;
        offset += region.length();
    }
    for allocation in state.allocations.iter().filter(on_device) {
        allocation.region.reserve()?;
    }
    if let Some(memory) = state.driver_memory {
        memory.reserve()?;
    }
    for device in &mut state.devices {
        device.nodes = None;
    }
    state.common = None;
    state.staging = Some(staging);
    Ok(())
}

/// Moves from CHECKPOINTED to LOCKED. An error leaves everything unchanged.
///
/// If `pairs` is empty, every GPU must be found again by its UUID. Otherwise the pairs must name
/// every GPU used by the process (else INVALID_VALUE). A new GPU that is missing on this machine,
/// or has a node that cannot be opened, is INVALID_DEVICE.
pub(crate) fn load(state: &mut State, pairs: &[Pair]) -> Result<()> {
    let staging = state.staging.ok_or(Code::ILLEGAL_STATE)?;
    let common = Common::open()?;
    // MAX_DEVICES of them, on the stack
    let mut opened = [const { None }; MAX_DEVICES];
    for (place, device) in opened.iter_mut().zip(&state.devices) {
        if device.contexts > 0 {
            *place = Some(reopen(&device.uuid, pairs)?);
        }
    }
    if same_gpu_twice(&opened) {
        return Err(Code::INVALID_VALUE);
    }
    if let Err(error) = fill(state, staging) {
        for allocation in state.allocations.iter().filter(on_device) {
            allocation.region.reserve()?;
        }
        return Err(error);
    }
    for (place, device) in opened.iter_mut().zip(&mut state.devices) {
        if let Some((minor, uuid, nodes)) = place.take() {
            (device.minor, device.uuid, device.nodes) = (minor, uuid, Some(nodes));
        } else if let Ok((minor, uuid)) = replacement(&device.uuid, pairs) {
            // Without a context nothing depends on the GPU yet; the next context will notice a
            // missing one.
            (device.minor, device.uuid) = (minor, uuid);
        }
    }
    staging.unmap_alone();
    state.staging = None;
    state.common = Some(common);
    Ok(())
}

/// Restores device memory and all other unmapped memory.
fn fill(state: &State, staging: Region) -> Result<()> {
    let mut offset = 0;
    for allocation in state.allocations.iter().filter(on_device) {
        allocation.region.fill(staging, offset)?;
        offset += allocation.region.length();
    }
    state.driver_memory.map_or(Ok(()), Region::revive)
}

/// A GPU with opened nodes: minor number, UUID, nodes.
type Opened = (u32, [u8; 16], Nodes);

fn same_gpu_twice(opened: &[Option<Opened>]) -> bool {
    let minor = |at: usize| opened[at].as_ref().map(|opened| opened.0);
    (0..opened.len()).any(|at| minor(at).is_some() && (0..at).any(|before| minor(before) == minor(at)))
}

/// The substitute of the GPU with that UUID.
fn replacement(old: &[u8; 16], pairs: &[Pair]) -> Result<(u32, [u8; 16])> {
    let new = match pairs {
        [] => *old,
        _ => pairs.iter().find(|pair| pair.0 == *old).ok_or(Code::INVALID_VALUE)?.1,
    };
    Ok((node::with_uuid(&new).ok_or(Code::INVALID_DEVICE)?, new))
}

fn reopen(old: &[u8; 16], pairs: &[Pair]) -> Result<Opened> {
    let (minor, uuid) = replacement(old, pairs)?;
    Ok((minor, uuid, Nodes::open(minor)?))
}
