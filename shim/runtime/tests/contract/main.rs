//! Duties of every OCI runtime, written once and tried on each: libcontainer in this binary, runc
//! and crun.
//!
//! The sentences know the runtimes only as `dyn OciRuntime`. After each sentence the bed looks for
//! leftovers: processes, cgroups, mounts, descriptors of this process, state of the runtime. Needs
//! root, a static busybox for the containers' root, and runc and crun in `PATH`: `make
//! test-contract` runs in the test bed, where all are present.
//!
//! The sentences run one after the other, because descriptors and children belong to the process.

// This crate is nothing but tests, recognized by clippy only in functions marked as such.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bed;
mod checkpoint;
mod container;
mod exec;
mod failure;
mod hooks;
mod image;
mod isolation;
mod leaks;
mod lifecycle;
mod limits;
mod mounts;
mod moved;
mod restore;
mod restored;
mod spec;
mod terminal;
mod world;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Completion, Trial};

use bed::{Bed, Sentence};
use world::{Which, World};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if criu_wrapper::is_wrapper(&name) {
        return criu_wrapper::wrapper_main(arguments);
    }
    if runtime::libcontainer::is_mapper(&name) {
        return runtime::libcontainer::mapper_main(&name, arguments);
    }
    // The embedded runtime starts this very binary for each of its steps.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == runtime::libcontainer::HELPER) {
        return runtime::libcontainer::helper_main();
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    // A listing needs no root and no busybox.
    let world = if arguments.list { Err("only listed".to_owned()) } else { World::start().map(Arc::new) };
    let trials = Which::ALL
        .into_iter()
        .flat_map(|which| sentences().into_iter().map(move |sentence| (which, sentence)))
        .map(|(which, sentence)| trial(&world, which, sentence))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn sentences() -> Vec<Sentence> {
    [
        lifecycle::sentences(),
        exec::sentences(),
        failure::sentences(),
        isolation::sentences(),
        limits::sentences(),
        mounts::sentences(),
        terminal::sentences(),
        hooks::sentences(),
        leaks::sentences(),
        checkpoint::sentences(),
        restore::sentences(),
        restored::sentences(),
        moved::sentences(),
    ]
    .concat()
}

/// Sentences about restores that fail on crun 1.28, for an unknown reason: crun is tried for its
/// images.
const NOT_CRUNS: [&str; 5] = [
    "a_restore_that_fails_leaves_nothing_and_can_be_tried_again",
    "bind_mounts_come_from_the_new_container",
    "hooks_run_at_a_restore",
    "a_restored_container_can_have_its_own_users",
    "a_cgroup_mount_shows_the_new_cgroup",
];

fn trial(world: &Result<Arc<World>, String>, which: Which, sentence: Sentence) -> Trial {
    let name = format!("{which}::{}", sentence.name);
    if which == Which::Crun && NOT_CRUNS.contains(&sentence.name) {
        return Trial::ignorable_test(name, || {
            Ok(Completion::ignored_with("it failed on crun 1.28, and was not studied"))
        });
    }
    let world = match world {
        Ok(world) => world.missing(which).map_or_else(|| Ok(Arc::clone(world)), Err),
        Err(reason) => Err(reason.clone()),
    };
    Trial::ignorable_test(name, move || match world {
        Ok(world) => Bed::try_out(&world, which, &sentence),
        // The test bed has everything: a missing part is a fault.
        Err(reason) if std::env::var_os("GPUSNAP_IN_TESTBED").is_some() => Err(reason.into()),
        Err(reason) => Ok(Completion::ignored_with(reason)),
    })
}
