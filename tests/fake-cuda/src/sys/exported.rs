//! Arguments and results of C functions.

use std::ffi::{CStr, c_char, c_void};

use crate::code::{Code, Result};

/// A C caller's place for a result. The C contract of every function with such an argument: null,
/// or room for a `T`.
#[repr(transparent)]
pub(super) struct Out<T>(*mut T);

/// A C caller's argument; null, or readable.
#[repr(transparent)]
pub(super) struct In<T>(*const T);

/// A C string; null, or ending in NUL.
#[repr(transparent)]
pub(super) struct Text(*const c_char);

impl<T> Out<T> {
    pub(super) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Writes the result; null is an error.
    pub(super) fn set(&self, value: T) -> Result<()> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so by the C contract there is room for a `T`; it need not be aligned.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Reads the caller's value, for arguments that are both.
    pub(super) fn get(&self) -> Option<T>
    where
        T: Copy,
    {
        // SAFETY: not null, so by the C contract it holds a `T`.
        (!self.0.is_null()).then(|| unsafe { self.0.read_unaligned() })
    }

    /// Writes the result at place `at` of an array, long enough by the caller's promise.
    pub(super) fn set_at(&self, at: usize, value: T) -> Result<()> {
        Out(self.0.wrapping_add(at)).set(value)
    }
}

impl Out<c_char> {
    /// Writes a C string into a buffer of `length` bytes; `short` if the buffer is too small.
    pub(super) fn set_text(&self, text: &str, length: usize, short: Code) -> Result<()> {
        let bytes = text.trim_end_matches('\0').as_bytes();
        if bytes.len() >= length {
            return Err(short);
        }
        for (at, byte) in bytes.iter().chain(&[0]).enumerate() {
            self.set_at(at, c_char::from_ne_bytes([*byte]))?;
        }
        Ok(())
    }
}

impl<T: Copy> In<T> {
    pub(super) fn new(pointer: *const T) -> Self {
        Self(pointer)
    }

    pub(super) fn get(&self) -> Option<T> {
        // SAFETY: not null, so by the C contract it holds a `T`.
        (!self.0.is_null()).then(|| unsafe { self.0.read_unaligned() })
    }

    /// The element at place `at` of an array, long enough by the caller's promise.
    pub(super) fn get_at(&self, at: usize) -> Option<T> {
        if self.0.is_null() { None } else { Self(self.0.wrapping_add(at)).get() }
    }
}

impl Text {
    pub(super) fn get(&self) -> Result<&str> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so by the C contract a C string, which the caller keeps for the time of the call.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map_err(|_| Code::INVALID_VALUE)
    }
}

/// A function in a table: nothing but its address.
pub(super) struct Symbol(pub(super) *const c_void);

// SAFETY: an address of code, which every thread may know.
unsafe impl Sync for Symbol {}

/// Defines exported functions with bodies that return a `Result`; with `table NAME` also a list by
/// name.
macro_rules! exports {
    (table $table:ident; $report:path; $($name:ident $arguments:tt $body:block)*) => {
        exports! { $report; $($name $arguments $body)* }
        static $table: &[(&str, Symbol)] = &[$((stringify!($name), Symbol($name as *const c_void))),*];
    };
    ($report:path; $($name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name($($argument: $type),*) -> u32 {
                fn call($($argument: $type),*) -> crate::code::Result<()> {
                    $body
                }
                $report(call($($argument),*))
            }
        )*
    };
}
pub(super) use exports;
