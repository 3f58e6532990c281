//! A test and the targets it does not apply to.

use std::fmt;

use anyhow::Result;

use crate::Test;
use crate::target::{Shim, Target};

/// One test of the suite, to be run on every chosen target.
pub struct Case {
    /// A sentence: what holds.
    pub name: &'static str,
    /// Its body.
    pub body: fn(&Test) -> Result<()>,
    /// Whether no other test may run meanwhile.
    pub alone: bool,
    exceptions: Vec<(Except, &'static str)>,
}

/// Which targets an exception is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Except {
    /// One shim on both containerds.
    Shim(Shim),
    /// One cell.
    Target(Target),
}

/// Builds a [`Case`] named like its function.
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

    /// Keeps all other tests away while this one runs: it restarts containerd, or counts what is in the bed.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Skips one shim, and says why.
    #[must_use]
    pub fn except(mut self, shim: Shim, reason: &'static str) -> Self {
        self.exceptions.push((Except::Shim(shim), reason));
        self
    }

    /// Skips one cell, and says why.
    #[must_use]
    pub fn except_target(mut self, target: Target, reason: &'static str) -> Self {
        self.exceptions.push((Except::Target(target), reason));
        self
    }

    /// Why this test does not run on that target, if so.
    pub fn skipped_on(&self, target: Target) -> Option<&'static str> {
        let fits = |except: &Except| match except {
            Except::Shim(shim) => target.shim == *shim,
            Except::Target(cell) => target == *cell,
        };
        self.exceptions.iter().find(|(except, _)| fits(except)).map(|(_, reason)| *reason)
    }
}

/// The error of a test that finds out that it cannot run here.
#[derive(Debug)]
pub struct Skip(pub String);

impl Skip {
    /// As an error, for `return Err(...)`.
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
