//! The driver by its C functions.

use std::ffi::{CStr, CString, c_void};
use std::ptr::{null, null_mut};
use std::time::Duration;

const PTX: &CStr = c".version 6.0\n.target sm_50\n.entry spin() {}\n.entry add_one() {}\n.entry fill() {}\n";
const SEED: u32 = 77;

type Number = u32;
type Init = unsafe extern "C" fn(Number) -> u32;
type OutNumber = unsafe extern "C" fn(*mut i32) -> u32;
type OutHandle = unsafe extern "C" fn(*mut usize, i32) -> u32;
type Handle = unsafe extern "C" fn(usize) -> u32;
type Plain = unsafe extern "C" fn() -> u32;
type Load = unsafe extern "C" fn(*mut usize, *const i8) -> u32;
type Function = unsafe extern "C" fn(*mut usize, usize, *const i8) -> u32;
type Allocate = unsafe extern "C" fn(*mut usize, usize) -> u32;
type Managed = unsafe extern "C" fn(*mut usize, usize, u32) -> u32;
type Read = unsafe extern "C" fn(*mut u32, usize, usize) -> u32;
type Uuid = unsafe extern "C" fn(*mut [u8; 16], i32) -> u32;
type LookUp = unsafe extern "C" fn(*const i8, *mut *const c_void, i32, u64, *mut u32) -> u32;
type Launch = unsafe extern "C" fn(
    usize,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    usize,
    *const *const c_void,
    *const *const c_void,
) -> u32;

pub(crate) struct Program {
    library: libloading::Library,
    spin: usize,
    add_one: usize,
    fill: usize,
    memory: usize,
    words: u32,
    added: u32,
    pinned: Option<(usize, usize)>,
    managed: usize,
}

fn done(code: u32) -> Result<(), u32> {
    if code == 0 { Ok(()) } else { Err(code) }
}

/// A kernel's parameter.
fn parameter<T>(value: &T) -> *const c_void {
    std::ptr::from_ref(value).cast()
}

fn pinned_byte(at: usize) -> u8 {
    (at % 251).to_le_bytes()[0]
}

impl Program {
    pub(crate) fn load() -> Result<Self, String> {
        // SAFETY: the simulated driver does nothing when it is loaded.
        let library = unsafe { libloading::Library::new("libcuda.so.1") }.map_err(|error| error.to_string())?;
        Ok(Self { library, spin: 0, add_one: 0, fill: 0, memory: 0, words: 0, added: 0, pinned: None, managed: 0 })
    }

    /// A function with the signature `F`; 500 without one, as from the driver.
    fn function<F: Copy>(&self, name: &str) -> Result<F, u32> {
        // SAFETY: all callers are below, with the types above, which are cuda.h's.
        unsafe { self.library.get::<F>(name) }.map(|symbol| *symbol).map_err(|_| 500)
    }

    pub(crate) fn init(&self) -> Result<(), u32> {
        let init = self.function::<Init>("cuInit")?;
        // SAFETY: takes a number.
        done(unsafe { init(0) })
    }

    pub(crate) fn count(&self) -> Result<i32, u32> {
        let count = self.function::<OutNumber>("cuDeviceGetCount")?;
        let mut devices = 0;
        // SAFETY: room for the answer.
        done(unsafe { count(&raw mut devices) })?;
        Ok(devices)
    }

    pub(crate) fn uuid(&self, ordinal: u32) -> Result<String, u32> {
        let uuid = self.function::<Uuid>("cuDeviceGetUuid_v2")?;
        let mut bytes = [0; 16];
        // SAFETY: room for the answer.
        done(unsafe { uuid(&raw mut bytes, ordinal.cast_signed()) })?;
        Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
    }

    pub(crate) fn start(&mut self, ordinal: u32, words: u32) -> Result<(), u32> {
        self.init()?;
        let retain = self.function::<OutHandle>("cuDevicePrimaryCtxRetain")?;
        let mut context = 0;
        // SAFETY: room for the answer.
        done(unsafe { retain(&raw mut context, ordinal.cast_signed()) })?;
        let set = self.function::<Handle>("cuCtxSetCurrent")?;
        // SAFETY: a context that the driver gave.
        done(unsafe { set(context) })?;
        let load = self.function::<Load>("cuModuleLoadData")?;
        let mut module = 0;
        // SAFETY: room for the answer, and a C string.
        done(unsafe { load(&raw mut module, PTX.as_ptr().cast()) })?;
        self.spin = self.kernel(module, c"spin")?;
        self.add_one = self.kernel(module, c"add_one")?;
        self.fill = self.kernel(module, c"fill")?;
        let allocate = self.function::<Allocate>("cuMemAlloc_v2")?;
        // SAFETY: room for the answer.
        done(unsafe { allocate(&raw mut self.memory, words as usize * 4) })?;
        self.words = words;
        self.launch(self.fill, &[parameter(&self.memory), parameter(&self.words), parameter(&SEED)])?;
        self.synchronize()
    }

    fn kernel(&self, module: usize, name: &CStr) -> Result<usize, u32> {
        let get = self.function::<Function>("cuModuleGetFunction")?;
        let mut function = 0;
        // SAFETY: room for the answer, a module that the driver gave, a C string.
        done(unsafe { get(&raw mut function, module, name.as_ptr().cast()) })?;
        Ok(function)
    }

    fn launch(&self, function: usize, parameters: &[*const c_void]) -> Result<(), u32> {
        let launch = self.function::<Launch>("cuLaunchKernel")?;
        // SAFETY: as many parameters as the kernel has, each a pointer to a value that lives until the call is done.
        done(unsafe { launch(function, 1, 1, 1, 1, 1, 1, 0, 0, parameters.as_ptr(), null()) })
    }

    pub(crate) fn synchronize(&self) -> Result<(), u32> {
        let synchronize = self.function::<Plain>("cuCtxSynchronize")?;
        // SAFETY: takes nothing.
        done(unsafe { synchronize() })
    }

    pub(crate) fn add(&mut self) -> Result<(), u32> {
        self.launch(self.add_one, &[parameter(&self.memory), parameter(&self.words)])?;
        self.added += 1;
        self.synchronize()
    }

    pub(crate) fn spin(&self, time: Duration) -> Result<(), u32> {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.launch(self.spin, &[parameter(&nanoseconds)])
    }

    /// Checks all memory; returns a description of the first fault.
    pub(crate) fn check(&self) -> Result<Option<String>, u32> {
        let mut values = vec![0_u32; self.words as usize];
        let read = self.function::<Read>("cuMemcpyDtoH_v2")?;
        // SAFETY: as much room as is copied.
        done(unsafe { read(values.as_mut_ptr(), self.memory, values.len() * 4) })?;
        for (index, value) in (0_u32..).zip(&values) {
            let expected = ((index ^ SEED).wrapping_mul(2_654_435_761) >> 1) + self.added;
            if *value != expected {
                return Ok(Some(format!("value {index} is {value} and not {expected}")));
            }
        }
        if let Some((address, length)) = self.pinned {
            // SAFETY: allocated by the driver with that length, written by `pinned`, never freed.
            let bytes = unsafe { std::slice::from_raw_parts(std::ptr::without_provenance::<u8>(address), length) };
            if let Some(at) = bytes.iter().enumerate().position(|(at, byte)| *byte != pinned_byte(at)) {
                return Ok(Some(format!("pinned byte {at}")));
            }
        }
        Ok(None)
    }

    pub(crate) fn pinned(&mut self, length: u32) -> Result<(), u32> {
        let allocate = self.function::<Allocate>("cuMemAllocHost_v2")?;
        let (mut address, length) = (0, length as usize);
        // SAFETY: room for the answer.
        done(unsafe { allocate(&raw mut address, length) })?;
        let first = std::ptr::without_provenance_mut::<u8>(address);
        for at in 0..length {
            // SAFETY: inside of what was just allocated.
            unsafe { first.wrapping_add(at).write(pinned_byte(at)) };
        }
        self.pinned = Some((address, length));
        Ok(())
    }

    pub(crate) fn managed(&mut self) -> Result<(), u32> {
        let allocate = self.function::<Managed>("cuMemAllocManaged")?;
        // SAFETY: room for the answer.
        done(unsafe { allocate(&raw mut self.managed, 4096, 1) })
    }

    pub(crate) fn unmanaged(&mut self) -> Result<(), u32> {
        let free = self.function::<Handle>("cuMemFree_v2")?;
        // SAFETY: a pointer that the driver gave; nothing else uses it.
        done(unsafe { free(self.managed) })
    }

    /// The result, the status, and whether there is an address.
    pub(crate) fn look_up(&self, name: &str, version: u32) -> String {
        let (Ok(look_up), Ok(name)) = (self.function::<LookUp>("cuGetProcAddress_v2"), CString::new(name)) else {
            return "no cuGetProcAddress".to_owned();
        };
        let (mut address, mut status) = (null(), u32::MAX);
        // SAFETY: a C string and room for the answers.
        let code =
            unsafe { look_up(name.as_ptr().cast(), &raw mut address, version.cast_signed(), 0, &raw mut status) };
        format!("{code} {status} {}", !address.is_null())
    }

    /// The result of cuInit in a child of fork.
    pub(crate) fn init_in_child(&self) -> i32 {
        // SAFETY: this program has one thread that could hold a lock.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let code = self.init().err().unwrap_or(0);
            // SAFETY: ends the child without what the parent registered.
            unsafe { libc::_exit(code.cast_signed()) };
        }
        let mut status = 0;
        // SAFETY: room for the status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        libc::WEXITSTATUS(status)
    }
}

/// Forks an idle child that ends with its parent.
pub(crate) fn fork_sleeper() -> i32 {
    // SAFETY: this program has one thread that could hold a lock.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: asks for a signal when the parent ends.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        loop {
            // SAFETY: waits.
            unsafe { libc::poll(null_mut(), 0, 1000) };
        }
    }
    child
}
