//! The driver API in a program, in safe terms. `sys::cuda` adds the C form.

use std::cell::Cell;
use std::thread;
use std::time::Duration;

use crate::code::{Code, Result};
use crate::device::Nodes;
use crate::gate::Pass;
use crate::kernel::{self, Kernel, Work};
use crate::node;
use crate::state::{self, Allocation, Context, Place, State};
use crate::sys::memory::Region;
use crate::sys::os;
use crate::target;

thread_local! {
    /// The context of this thread, 0 for none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Longest list of work: the device does the work at this length, lest the list grow.
const QUEUE: usize = 1024;

/// Begins a call that needs no context.
fn enter() -> Result<Pass<'static>> {
    target::enter()
}

fn ordinal(device: i32) -> Result<usize> {
    usize::try_from(device).map_err(|_| Code::INVALID_DEVICE)
}

/// The device of the current context.
fn current(state: &State) -> Result<usize> {
    if let Some(code) = state.broken {
        return Err(code);
    }
    context(state, CURRENT.get()).map(|context| context.device)
}

fn context(state: &State, handle: usize) -> Result<&Context> {
    let place = handle.checked_sub(1).ok_or(Code::INVALID_CONTEXT)?;
    state.contexts.get(place).filter(|context| context.alive).ok_or(Code::INVALID_CONTEXT)
}

pub(crate) fn device_count() -> Result<i32> {
    let _pass = enter()?;
    i32::try_from(state::lock().devices.len()).map_err(|_| Code::UNKNOWN)
}

pub(crate) fn device(device: i32) -> Result<i32> {
    let _pass = enter()?;
    state::lock().device(ordinal(device)?)?;
    Ok(device)
}

pub(crate) fn device_uuid(device: i32) -> Result<[u8; 16]> {
    let _pass = enter()?;
    Ok(state::lock().device(ordinal(device)?)?.uuid)
}

/// Attributes that programs read first; the rest are 0.
pub(crate) fn device_attribute(attribute: i32, dev: i32) -> Result<i32> {
    device(dev)?;
    Ok(match attribute {
        1 => 1024, // threads in a block
        10 => 32,  // threads in a warp
        16 => 132, // multiprocessors
        41 => 1,   // unified addressing
        75 => node::CAPABILITY.0,
        76 => node::CAPABILITY.1,
        83 => 1, // managed memory
        _ => 0,
    })
}

/// Adds a context on a device; the first opens the device's nodes.
fn add_context(state: &mut State, device: usize, primary: bool) -> Result<usize> {
    let nodes_of = state.device(device)?;
    if nodes_of.nodes.is_none() {
        nodes_of.nodes = Some(Nodes::open(nodes_of.minor)?);
    }
    nodes_of.contexts += 1;
    state.contexts.push(Context { device, primary, alive: true });
    state.publish();
    target::start_event_handler()?;
    Ok(state.contexts.len())
}

fn remove_context(state: &mut State, handle: usize) -> Result<()> {
    let place = handle.checked_sub(1).ok_or(Code::INVALID_CONTEXT)?;
    let context = state.contexts.get_mut(place).filter(|context| context.alive).ok_or(Code::INVALID_CONTEXT)?;
    context.alive = false;
    let device = context.device;
    let device = state.device(device)?;
    device.contexts -= 1;
    if device.contexts == 0 {
        device.nodes = None;
    }
    state.publish();
    Ok(())
}

pub(crate) fn context_create(device: i32) -> Result<usize> {
    let _pass = enter()?;
    let handle = add_context(&mut state::lock(), ordinal(device)?, false)?;
    CURRENT.set(handle);
    Ok(handle)
}

pub(crate) fn context_destroy(handle: usize) -> Result<()> {
    let _pass = enter()?;
    let mut state = state::lock();
    if context(&state, handle)?.primary {
        return Err(Code::INVALID_CONTEXT);
    }
    remove_context(&mut state, handle)?;
    if CURRENT.get() == handle {
        CURRENT.set(0);
    }
    Ok(())
}

pub(crate) fn primary_retain(device: i32) -> Result<usize> {
    let _pass = enter()?;
    let ordinal = ordinal(device)?;
    let mut state = state::lock();
    let found = state.contexts.iter().position(|context| context.primary && context.alive && context.device == ordinal);
    let handle = match found {
        Some(place) => place + 1,
        None => add_context(&mut state, ordinal, true)?,
    };
    state.device(ordinal)?.retained += 1;
    Ok(handle)
}

pub(crate) fn primary_release(device: i32) -> Result<()> {
    let _pass = enter()?;
    let ordinal = ordinal(device)?;
    let mut state = state::lock();
    let of_device = state.device(ordinal)?;
    of_device.retained = of_device.retained.checked_sub(1).ok_or(Code::INVALID_CONTEXT)?;
    if of_device.retained > 0 {
        return Ok(());
    }
    let found = state.contexts.iter().position(|context| context.primary && context.alive && context.device == ordinal);
    remove_context(&mut state, found.map_or(0, |place| place + 1))
}

pub(crate) fn context_set_current(handle: usize) -> Result<()> {
    let _pass = enter()?;
    if handle != 0 {
        context(&state::lock(), handle)?;
    }
    CURRENT.set(handle);
    Ok(())
}

pub(crate) fn context_current() -> Result<usize> {
    let _pass = enter()?;
    Ok(CURRENT.get())
}

pub(crate) fn context_device() -> Result<i32> {
    let _pass = enter()?;
    let device = current(&state::lock())?;
    i32::try_from(device).map_err(|_| Code::UNKNOWN)
}

/// Waits until the device has done all its work.
fn settled() -> Result<state::Guard> {
    loop {
        let mut state = state::lock();
        current(&state)?;
        if !state.is_busy() {
            state.settle();
            return match state.broken {
                Some(code) => Err(code),
                None => Ok(state),
            };
        }
        let left = Duration::from_nanos(state.busy_until.saturating_sub(os::now()));
        // The mutex must be free meanwhile: other threads' calls do not wait for this device.
        drop(state);
        thread::sleep(left.min(Duration::from_millis(5)));
    }
}

pub(crate) fn synchronize() -> Result<()> {
    let _pass = enter()?;
    settled().map(drop)
}

fn allocate(size: usize, place: Place, state: &mut State) -> Result<u64> {
    if size == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let region = match place {
        Place::Device(device) => {
            if state.used(Some(device)).saturating_add(size as u64) > node::MEMORY {
                return Err(Code::OUT_OF_MEMORY);
            }
            Region::device(size)?
        }
        Place::Managed => Region::anonymous(size)?,
        Place::Pinned => Region::shared(size)?,
    };
    state.allocations.push(Allocation { region, size, place });
    state.publish();
    Ok(region.address() as u64)
}

pub(crate) fn memory_allocate(size: usize) -> Result<u64> {
    let _pass = enter()?;
    let mut state = state::lock();
    let device = current(&state)?;
    allocate(size, Place::Device(device), &mut state)
}

pub(crate) fn memory_allocate_managed(size: usize) -> Result<u64> {
    let _pass = enter()?;
    let mut state = state::lock();
    current(&state)?;
    allocate(size, Place::Managed, &mut state)
}

pub(crate) fn memory_allocate_host(size: usize) -> Result<u64> {
    let _pass = enter()?;
    let mut state = state::lock();
    current(&state)?;
    allocate(size, Place::Pinned, &mut state)
}

/// Frees an allocation on the device or in managed memory, or else pinned memory.
pub(crate) fn memory_free(pointer: u64, pinned: bool) -> Result<()> {
    let _pass = enter()?;
    if pointer == 0 {
        return Ok(());
    }
    let mut state = settled()?;
    let fits = |allocation: &Allocation| {
        allocation.region.address() as u64 == pointer && (allocation.place == Place::Pinned) == pinned
    };
    let found = state.allocations.iter().position(fits).ok_or(Code::INVALID_VALUE)?;
    state.allocations.swap_remove(found).region.unmap();
    state.publish();
    Ok(())
}

pub(crate) fn copy_to_device(to: u64, from: usize, length: usize) -> Result<()> {
    let _pass = enter()?;
    let state = settled()?;
    let (allocation, offset) = state.find(to, length)?;
    allocation.region.put(offset, from, length)
}

pub(crate) fn copy_from_device(to: usize, from: u64, length: usize) -> Result<()> {
    let _pass = enter()?;
    let state = settled()?;
    let (allocation, offset) = state.find(from, length)?;
    allocation.region.get(offset, to, length)
}

pub(crate) fn set_words(to: u64, value: u32, count: usize) -> Result<()> {
    use std::sync::atomic::Ordering::Relaxed;
    let _pass = enter()?;
    let state = settled()?;
    let (allocation, offset) = state.find(to, count.checked_mul(4).ok_or(Code::INVALID_VALUE)?)?;
    for word in allocation.region.words(offset, count)? {
        word.store(value, Relaxed);
    }
    Ok(())
}

/// Free and total bytes of the current device, as if nobody else used it.
pub(crate) fn memory_info() -> Result<(u64, u64)> {
    let _pass = enter()?;
    let state = state::lock();
    let device = current(&state)?;
    Ok((node::MEMORY.saturating_sub(state.used(Some(device))), node::MEMORY))
}

pub(crate) fn module_load(text: &str) -> Result<usize> {
    let _pass = enter()?;
    let names = kernel::entries(text)?;
    let mut state = state::lock();
    current(&state)?;
    state.modules.push(names);
    Ok(state.modules.len())
}

pub(crate) fn module_function(module: usize, name: &str) -> Result<usize> {
    let _pass = enter()?;
    let mut state = state::lock();
    let names = module.checked_sub(1).and_then(|place| state.modules.get(place)).ok_or(Code::INVALID_HANDLE)?;
    let kernel = kernel::find(names, name)?;
    state.functions.push(kernel);
    Ok(state.functions.len())
}

/// The kernel behind a handle, for reading its parameters.
pub(crate) fn function(handle: usize) -> Result<Kernel> {
    let state = state::lock();
    handle.checked_sub(1).and_then(|place| state.functions.get(place)).copied().ok_or(Code::INVALID_HANDLE)
}

/// Work to launch.
#[derive(Clone, Copy)]
pub(crate) enum Launch {
    Spin(u64),
    Work(Work),
}

pub(crate) fn launch(launch: Launch) -> Result<()> {
    let _pass = enter()?;
    let mut state = state::lock();
    current(&state)?;
    match launch {
        Launch::Spin(nanoseconds) => state.busy_until = state.busy_until.max(os::now()).saturating_add(nanoseconds),
        Launch::Work(work) => {
            if state.work.len() >= QUEUE {
                drop(state);
                state = settled()?;
            }
            state.work.push(work);
        }
    }
    Ok(())
}
