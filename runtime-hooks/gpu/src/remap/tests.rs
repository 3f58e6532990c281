//! On real processes. Their staging areas are as large as a test can wait for.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use super::*;
use cuda::process::drivers;
use memory::{Layout, Place};
use proc::ProcessIds;
use support::{Program, await_that, soon, wait};
use tracee::hold::Scope;
use tracee::process::{self, RunState};

const MEBIBYTES: u64 = 4;
const CHUNK: usize = 65536;

/// A program with a staging area, and files with what is in it.
struct Staged {
    program: Program,
    range: Range,
    directory: tempfile::TempDir,
    layout: Layout,
    contents: Vec<u8>,
}

fn staged(program: Program) -> Staged {
    let start = program.value(5);
    let range = Range { start, end: start + (MEBIBYTES << 20) };
    let contents = program.bytes(start, usize::try_from(range.len()).unwrap());
    let directory = tempfile::tempdir().unwrap();
    let files: Vec<PathBuf> = ["first", "second"].iter().map(|name| directory.path().join(name)).collect();
    let mut writers: Vec<_> = files.iter().map(|path| (File::create(path).unwrap(), 0)).collect();
    let mut segments: Vec<Segment> = Vec::new();
    for (chunk, address) in contents.chunks(CHUNK).zip((start..).step_by(CHUNK)) {
        // The second half goes to the second file.
        let file = usize::from(address - start >= range.len() / 2);
        let mut place = Place::Zero;
        if chunk.iter().any(|byte| *byte != 0) {
            place = Place::Pack { index: u32::try_from(file).unwrap(), offset: writers[file].1 };
            writers[file].0.write_all(chunk).unwrap();
            writers[file].1 += chunk.len() as u64;
        }
        segments.push(Segment { address, length: CHUNK as u64, place });
    }
    let layout = Layout {
        packs: files,
        processes: vec![ProcessLayout { process: ProcessIds::of(program.pid).unwrap(), segments }],
    };
    Staged { program, range, directory, layout, contents }
}

impl Staged {
    fn play() -> Self {
        staged(Program::play(&format!("staging {MEBIBYTES}")))
    }

    fn remap(&self) -> Result<Vec<Range>, RemapError> {
        let mut hold = Hold::new(drivers);
        hold.take_scope(self.program.pid, Scope::All).unwrap();
        let remapped = remap_in(&mut hold, &self.layout.packs, &self.layout.processes[0], soon());
        hold.let_go().unwrap();
        remapped
    }

    fn descriptors(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.program.pid)).unwrap();
        let mut all: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all
    }

    /// Bytes of the staging area in mappings of files.
    fn in_files(&self) -> u64 {
        let mappings = proc::mappings(self.program.pid).unwrap();
        let ours = |mapping: &&proc::Mapping| mapping.path.starts_with(self.directory.path());
        mappings.iter().filter(ours).map(|mapping| mapping.range.len()).sum()
    }

    /// It has its data and goes on.
    fn assert_unhurt(&self) {
        assert_eq!(self.program.bytes(self.range.start, self.contents.len()), self.contents);
        for counter in [0, 0, 4] {
            self.program.await_progress(counter);
        }
        assert_eq!(self.program.value(7), 0, "the program has seen something else");
        assert_eq!(process::run_state(self.program.pid), RunState::Running);
    }

    fn assert_untouched(&self) {
        assert_eq!(self.in_files(), 0);
        self.assert_unhurt();
    }
}

fn files_take_the_place(mut staged: Staged) {
    let before = staged.descriptors();
    assert_eq!(staged.remap().unwrap(), []);
    assert_eq!(staged.in_files(), staged.range.len() / 4 * 3);
    assert_eq!(staged.descriptors(), before);
    staged.assert_unhurt();
    let files: Vec<_> = staged.layout.packs.iter().map(|file| fs::read(file).unwrap()).collect();
    staged.program.write_line();
    await_that("it has written to each page", || staged.program.value(2) == 1);
    staged.program.await_progress(0);
    let now: Vec<_> = staged.layout.packs.iter().map(|file| fs::read(file).unwrap()).collect();
    assert_eq!(now, files, "what it wrote is its own");
    for page in staged.contents.chunks_mut(4096) {
        let word = u64::from_ne_bytes(page[8..16].try_into().unwrap());
        page[8..16].copy_from_slice(&(word + 1).to_ne_bytes());
    }
    staged.assert_unhurt();
}

#[test]
fn files_take_the_place_of_memory_and_the_program_sees_no_difference() {
    files_take_the_place(Staged::play());
}

#[test]
fn files_take_the_place_of_memory_of_a_process_that_cannot_see_them() {
    files_take_the_place(staged(Program::play_apart(&format!("staging {MEBIBYTES}"))));
}

#[test]
fn what_is_in_files_already_is_refused() {
    let staged = Staged::play();
    staged.remap().unwrap();
    let error = staged.remap().unwrap_err();
    assert!(error.to_string().contains("it is not private anonymous memory"), "{error}");
    staged.assert_unhurt();
}

#[test]
fn files_with_something_else_are_refused_and_nothing_changes() {
    let mut staged = Staged::play();
    let [first, second] = [0, 1].map(|file| staged.layout.packs[file].clone());
    staged.layout.packs.reverse();
    assert!(matches!(staged.remap().unwrap_err(), RemapError::Differs { .. }));
    staged.assert_untouched();
    staged.layout.packs = vec![first.clone(), second];
    File::options().write(true).open(&first).unwrap().set_len(CHUNK as u64).unwrap();
    assert!(staged.remap().unwrap_err().to_string().contains("its file is too short"));
    staged.assert_untouched();
    fs::remove_file(first).unwrap();
    assert!(matches!(staged.remap().unwrap_err(), RemapError::File { .. }));
    staged.assert_untouched();
}

#[test]
fn memory_with_something_else_than_zeros_is_refused() {
    let mut staged = Staged::play();
    staged.layout.processes[0].segments[0].place = Place::Zero;
    assert!(
        matches!(staged.remap().unwrap_err(), RemapError::Differs { address, .. } if address == staged.range.start)
    );
    staged.assert_untouched();
}

#[test]
fn a_process_without_a_free_descriptor_keeps_its_memory() {
    let staged = staged(Program::play(&format!("staging-full {MEBIBYTES}")));
    assert!(matches!(staged.remap().unwrap_err(), RemapError::Call { .. }));
    staged.assert_untouched();
}

#[test]
fn a_process_that_is_not_held_is_refused() {
    let staged = Staged::play();
    let error =
        remap_in(&mut Hold::new(drivers), &staged.layout.packs, &staged.layout.processes[0], soon()).unwrap_err();
    assert!(matches!(error, RemapError::Inject { .. }), "{error}");
    staged.assert_untouched();
}

/// Swaps as a file says, and dies before the step of this number.
#[test]
#[ignore = "a role in another test"]
fn remaps() {
    let Some(argument) = support::role() else { return };
    let (step, file) = argument.split_once(' ').unwrap();
    let layout: Layout = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    tracee::steps::die_at(step.parse().unwrap());
    let mut hold = Hold::new(drivers);
    hold.take_scope(layout.processes[0].process.host, Scope::All).unwrap();
    assert_eq!(remap_in(&mut hold, &layout.packs, &layout.processes[0], soon()).unwrap(), []);
    hold.let_go().unwrap();
    support::exit(0);
}

/// Lets swappers die before each of their steps until one gets through.
#[test]
fn one_that_dies_at_any_step_leaves_the_process_its_data() {
    let mut staged = Staged::play();
    let segments = std::mem::take(&mut staged.layout.processes[0].segments);
    // One of zeros, and two of each file.
    staged.layout.processes[0].segments = [0, 1, 3, 40, 41].map(|index| segments[index]).to_vec();
    let plan = staged.directory.path().join("plan");
    for step in 1.. {
        fs::write(&plan, serde_json::to_vec(&staged.layout).unwrap()).unwrap();
        let code = wait(&mut support::spawn_role("remap::tests::remaps", &format!("{step} {}", plan.display())));
        let pid = staged.program.pid;
        await_that("it is let go", || !matches!(process::run_state(pid), RunState::Traced(_)));
        staged.assert_unhurt();
        if code == Some(0) {
            assert!(step > 40, "there are only {step} steps");
            break;
        }
        assert_eq!(code, None, "at step {step}");
        // The next one is to begin anew.
        if staged.in_files() > 0 {
            let again = Staged::play();
            let old = std::mem::replace(&mut staged.range, again.range);
            let process = &mut staged.layout.processes[0];
            process.process = ProcessIds::of(again.program.pid).unwrap();
            for segment in &mut process.segments {
                segment.address = segment.address - old.start + again.range.start;
            }
            staged.program = again.program;
        }
    }
}
