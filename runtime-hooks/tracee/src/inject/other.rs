//! Architectures for which nothing is written yet: nothing is ever found to inject with.

use std::io;

use super::{Code, Frame};

/// The state of a thread that stands still.
#[derive(Clone, Debug)]
pub(super) struct State;

impl State {
    pub(super) fn of(_tid: i32) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn put(&self, _tid: i32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn is_native(&self) -> bool {
        false
    }

    pub(super) fn is_in_syscall(&self) -> bool {
        false
    }

    pub(super) fn instruction(&self) -> u64 {
        0
    }

    pub(super) fn jump(&mut self, _address: u64) {}

    pub(super) fn stack(&self) -> u64 {
        0
    }

    pub(super) fn below_stack(&self) -> Option<u64> {
        None
    }

    pub(super) fn frame(&self, _end: u64, _sigreturn: u64, _mask: u64, _scratch: u64) -> Option<Frame> {
        None
    }

    pub(super) fn park(&self, _tid: i32, _code: &Code, _stack: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn call(&self, _: i32, _: &Code, _stack: u64, _number: i64, _arguments: [u64; 6]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

pub(crate) fn set_argument(_tid: i32, _index: usize, _value: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(super) fn result(_tid: i32) -> io::Result<i64> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(super) fn find_call(_text: &[u8]) -> Option<usize> {
    None
}

pub(super) fn find_bare_call(_text: &[u8]) -> Option<usize> {
    None
}

pub(super) fn find_sigreturn(_text: &[u8]) -> Option<usize> {
    None
}
