//! A test, with exceptions: targets without the test.

use std::fmt;

use anyhow::Result;

use crate::Test;
use crate::target::{Shim, Target};

/// A test of the suite, run on every chosen target.
pub struct Case {
    /// The tested sentence.
    pub name: &'static str,
    /// The test's body.
    pub body: fn(&Test) -> Result<()>,
    /// True if no other test may run meanwhile.
    pub alone: bool,
    exceptions: Vec<(Except, &'static str)>,
}

/// Targets of an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Except {
    /// A shim on both containerds.
    Shim(Shim),
    /// A single cell.
    Target(Target),
}

/// Builds a [`Case`] with the function's name.
#[macro_export]
macro_rules! case {
    ($body:ident) => {
        $crate::Case::new(stringify!($body), $body)
    };
}

impl Case {
    /// A test that applies to every target.
    pub fn new(name: &'static str, body: fn(&Test) -> Result<()>) -> Self {
        Self { name, body, alone: false, exceptions: vec![] }
    }

    /// Keeps all other tests away meanwhile: this test restarts containerd, or counts leftovers in
    /// the bed.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Skips one shim, with the reason.
    #[must_use]
    pub fn except(mut self, shim: Shim, reason: &'static str) -> Self {
        self.exceptions.push((Except::Shim(shim), reason));
        self
    }

    /// Skips one cell, with the reason.
    #[must_use]
    pub fn except_target(mut self, target: Target, reason: &'static str) -> Self {
        self.exceptions.push((Except::Target(target), reason));
        self
    }

    /// The reason if this test is skipped on that target.
    pub fn skipped_on(&self, target: Target) -> Option<&'static str> {
        let fits = |except: &Except| match except {
            Except::Shim(shim) => target.shim == *shim,
            Except::Target(cell) => target == *cell,
        };
        self.exceptions.iter().find(|(except, _)| fits(except)).map(|(_, reason)| *reason)
    }
}

/// Error of a test that cannot run here.
#[derive(Debug)]
pub struct Skip(pub String);

impl Skip {
    /// Makes an error for `return Err(...)`.
    pub fn because(reason: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Self(reason.into()))
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}
