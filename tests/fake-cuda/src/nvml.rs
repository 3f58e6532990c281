//! The part of NVML about GPUs and their users, in safe terms. `sys::nvml` adds the C form. GPUs
//! are those with a node, even without a permission to open it.

use std::sync::Mutex;
use std::sync::PoisonError;

use crate::caller;
use crate::code::Code;
use crate::node;

/// nvmlReturn_t.
pub(crate) mod result {
    pub(crate) const UNINITIALIZED: u32 = 1;
    pub(crate) const INVALID_ARGUMENT: u32 = 2;
    pub(crate) const NOT_SUPPORTED: u32 = 3;
    pub(crate) const NOT_FOUND: u32 = 6;
    pub(crate) const INSUFFICIENT_SIZE: u32 = 7;
    pub(crate) const DRIVER_NOT_LOADED: u32 = 9;
}

pub(crate) use result::{INSUFFICIENT_SIZE, INVALID_ARGUMENT, NOT_FOUND, NOT_SUPPORTED};

pub(crate) type Result<T> = crate::code::Result<T>;

/// An NVML result as an error. The type is the driver API's; the numbers differ.
pub(crate) fn error(result: u32) -> Code {
    Code(result)
}

/// State between nvmlInit and as many nvmlShutdown: number of uses, and the open control node.
struct Library {
    uses: u32,
    _control: Option<std::os::fd::OwnedFd>,
}

static LIBRARY: Mutex<Option<Library>> = Mutex::new(None);

pub(crate) fn init() -> Result<()> {
    let mut library = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    if node::existing().is_empty() {
        return Err(error(result::DRIVER_NOT_LOADED));
    }
    let library = library.get_or_insert_with(|| Library { uses: 0, _control: node::open("nvidiactl") });
    library.uses += 1;
    Ok(())
}

pub(crate) fn shutdown() -> Result<()> {
    let mut library = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    let open = library.as_mut().ok_or(error(result::UNINITIALIZED))?;
    open.uses -= 1;
    if open.uses == 0 {
        *library = None;
    }
    Ok(())
}

/// Minor numbers of the GPUs, by index.
pub(crate) fn gpus() -> Result<Vec<u32>> {
    let library = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    if library.is_none() {
        return Err(error(result::UNINITIALIZED));
    }
    Ok(node::existing())
}

/// A device's handle is the minor number plus one.
pub(crate) fn minor(handle: usize) -> Result<u32> {
    let minor = handle.checked_sub(1).and_then(|minor| u32::try_from(minor).ok()).ok_or(error(INVALID_ARGUMENT))?;
    if gpus()?.contains(&minor) { Ok(minor) } else { Err(error(INVALID_ARGUMENT)) }
}

pub(crate) fn handle(minor: u32) -> Result<usize> {
    usize::try_from(minor).map(|minor| minor + 1).map_err(|_| error(INVALID_ARGUMENT))
}

pub(crate) fn handle_by_index(index: u32) -> Result<usize> {
    let index = usize::try_from(index).map_err(|_| error(INVALID_ARGUMENT))?;
    handle(*gpus()?.get(index).ok_or(error(INVALID_ARGUMENT))?)
}

pub(crate) fn handle_by_uuid(text: &str) -> Result<usize> {
    let found = gpus()?.into_iter().find(|minor| node::uuid_text(&node::uuid(*minor)) == text);
    handle(found.ok_or(error(NOT_FOUND))?)
}

/// Bus id of a GPU, derived from the minor number.
pub(crate) fn bus(minor: u32) -> u32 {
    0x10 + minor
}

/// Processes with a context on the GPU, and the used memory.
pub(crate) fn processes(handle: usize) -> Result<Vec<(u32, u64)>> {
    let minor = minor(handle)?;
    let users = caller::users().into_iter().filter(|user| user.devices & (1 << minor) != 0);
    Ok(users.map(|user| (user.pid, user.memory)).collect())
}
