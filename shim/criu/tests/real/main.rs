//! The crate against the real CRIU, on real process trees.
//!
//! Needs root, criu and util-linux, and a root filesystem in which CRIU works: the test bed has all
//! of these. Run with `RUN_IN_BED` of the root Makefile, like the runtime's contract suite. The
//! sentences run one after the other, because children belong to the process.

// This crate is nothing but tests, recognized by clippy only in functions marked as such.
#![allow(clippy::unwrap_used, clippy::panic)]

mod causes;
mod faults;
mod life;
mod memory;
mod pages;
#[allow(unsafe_code)]
mod sys;
mod target;
mod world;

use std::process::ExitCode;

use libtest_mimic::Arguments;

fn main() -> ExitCode {
    let own: Vec<String> = std::env::args().skip(1).collect();
    if own.first().is_some_and(|argument| argument == target::TARGET) {
        return target::main(&own[1..]).into();
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let sentences = [life::sentences(), faults::sentences(), causes::sentences(), memory::sentences()];
    let trials = sentences.into_iter().flatten().map(world::Sentence::trial).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
