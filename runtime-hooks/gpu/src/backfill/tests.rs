//! On real processes, whose staging areas are as large as a test can wait for.

use std::fs::File;
use std::os::unix::fs::FileExt;

use memory::{Draft, Regions, save_processes};

use super::*;
use cuda::process::drivers;
use support::{Program, soon};
use tracee::inject::Injector;
use tracee::process::{self, RunState};

const MEBIBYTES: u64 = 8;

/// A held program whose staging area was saved and is empty.
struct Emptied {
    /// It goes before the program, which could not be reaped otherwise.
    hold: Hold,
    program: Program,
    range: Range,
    contents: Vec<u8>,
    directory: tempfile::TempDir,
    layout: Layout,
}

impl Emptied {
    fn play() -> Self {
        let program = Program::play(&format!("staging {MEBIBYTES}"));
        let (pid, start) = (program.pid, program.value(5));
        let range = Range { start, end: start + (MEBIBYTES << 20) };
        let mut hold = Hold::new(drivers);
        hold.take(pid).unwrap();
        hold.settle(soon()).unwrap();
        let contents = program.bytes(start, usize::try_from(range.len()).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let process = ProcessIds::of(pid).unwrap();
        let draft = Draft { folder: directory.path().to_owned(), prefix: "pack".into() };
        let regions = Regions { process, ranges: vec![range] };
        let saved = save_processes(&[regions], 64 << 10, &draft, &Control::new()).unwrap();
        let segments = saved.table.segments(process.container).to_vec();
        let layout = Layout { packs: saved.packs, processes: vec![ProcessLayout { process, segments }] };
        let mut emptied = Self { hold, program, range, contents, directory, layout };
        let arguments = [range.start, range.len(), argument(libc::MADV_DONTNEED), 0, 0, 0];
        assert_eq!(emptied.inject(libc::SYS_madvise, arguments), 0);
        emptied
    }

    fn inject(&mut self, number: i64, arguments: [u64; 6]) -> i64 {
        let mut injector = Injector::attach(&mut self.hold, self.program.pid, soon()).unwrap();
        let returned = injector.call(number, arguments).unwrap();
        injector.finish().unwrap();
        returned
    }

    fn begin(&mut self) -> Backfill {
        Backfill::begin(&mut self.hold, &self.layout, soon()).unwrap()
    }

    /// Until all is moved that will be.
    fn tick(&mut self, backfill: &mut Backfill) {
        let deadline = soon();
        while !backfill.filling.is_finished() || !(backfill.is_over || backfill.waiting.is_empty()) {
            std::thread::sleep(backfill.tick(&mut self.hold));
            assert!(Instant::now() < deadline, "it does not end");
        }
        backfill.tick(&mut self.hold);
    }

    fn mappings(&self) -> Vec<Mapping> {
        proc::mappings(self.program.pid).unwrap()
    }

    /// Bytes that are mapped from files.
    fn in_files(&self) -> u64 {
        let ours = |mapping: &Mapping| mapping.path.starts_with(self.directory.path());
        self.mappings().into_iter().filter(ours).map(|mapping| mapping.range.len()).sum()
    }

    /// Bytes of writable memory that it has in all.
    fn writable(&self) -> u64 {
        self.mappings().iter().filter(|mapping| mapping.is_writable()).map(|mapping| mapping.range.len()).sum()
    }

    fn assert_goes_on(mut self) {
        self.hold.let_go().unwrap();
        for counter in [0, 0, 4] {
            self.program.await_progress(counter);
        }
        assert_eq!(self.program.value(7), 0, "the program has seen something else");
        assert_eq!(process::run_state(self.program.pid), RunState::Running);
    }
}

#[test]
fn memory_takes_the_place_of_files_and_the_program_sees_no_difference() {
    let mut emptied = Emptied::play();
    let before = emptied.writable();
    let mut backfill = emptied.begin();
    assert_eq!(emptied.in_files(), emptied.range.len() / 4 * 3);
    assert_eq!(emptied.program.bytes(emptied.range.start, emptied.contents.len()), emptied.contents);
    emptied.program.await_progress(4);
    emptied.tick(&mut backfill);
    assert_eq!(emptied.in_files(), 0);
    // The driver's threads run again.
    emptied.program.await_progress(4);
    backfill.finish(&mut emptied.hold, soon()).unwrap();
    assert_eq!(emptied.program.bytes(emptied.range.start, emptied.contents.len()), emptied.contents);
    assert_eq!(emptied.writable(), before, "something is left");
    emptied.assert_goes_on();
}

#[test]
fn memory_that_the_driver_has_taken_back_is_left_alone() {
    let mut emptied = Emptied::play();
    let mut backfill = emptied.begin();
    let (start, length) = (emptied.range.start + (3 << 20), 1 << 20);
    let access = argument(libc::PROT_READ | libc::PROT_WRITE);
    let flags = argument(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let mapped = emptied.inject(libc::SYS_mmap, [start, length, access, flags, argument(-1), 0]);
    assert_eq!(mapped.cast_unsigned(), start);
    emptied.tick(&mut backfill);
    assert!(backfill.is_over);
    backfill.finish(&mut emptied.hold, soon()).unwrap();
    let new = emptied.program.bytes(start, usize::try_from(length).unwrap());
    assert!(new.iter().all(|byte| *byte == 0), "what the driver has mapped is gone");
}

#[test]
fn a_damaged_file_is_found_in_the_end() {
    let mut emptied = Emptied::play();
    let pack = File::options().write(true).open(&emptied.layout.packs[0]).unwrap();
    pack.write_all_at(b"?", 300_000).unwrap();
    let mut backfill = emptied.begin();
    emptied.tick(&mut backfill);
    let error = backfill.finish(&mut emptied.hold, soon()).unwrap_err();
    assert!(phase::chain(&error).contains("is damaged"), "{error}");
    emptied.hold.let_go().unwrap();
}

#[test]
fn segments_lie_in_windows_and_runs() {
    let place = |offset| Place::Pack { index: 0, offset };
    let segment = |address: u64, length: u64| Segment { address, length, place: place(address) };
    let zeros = Segment { address: 0x5000, length: 0x1000, place: Place::Zero };
    let segments =
        vec![segment(WINDOW - 0x2000, 0x4000), segment(WINDOW + 0x2000, 0x1000), segment(0x1000, 0x1000), zeros];
    let windows = Window::of(&ProcessLayout { process: ProcessIds::of(HostPid::own()).unwrap(), segments });
    let runs = |window: &Window| window.runs.iter().map(|run| (run.range.start, run.range.end)).collect::<Vec<_>>();
    assert_eq!(
        windows.iter().map(runs).collect::<Vec<_>>(),
        [vec![(0x1000, 0x2000), (WINDOW - 0x2000, WINDOW)], vec![(WINDOW, WINDOW + 0x3000)],]
    );
    let split = &windows[1].runs[0].segments[0];
    assert_eq!(split.place, place(WINDOW), "the second part is where it was");
    assert_eq!((windows[0].bytes(), windows[0].len()), (0x3000, WINDOW - 0x1000));
}

#[test]
fn what_is_left_elsewhere_is_what_was_not_moved() {
    let run = |start, end, is_moved| Run { range: Range { start, end }, segments: Vec::new(), is_moved };
    let runs = vec![run(0x1000, 0x3000, true), run(0x4000, 0x5000, false), run(0x7000, 0x8000, true)];
    let window = Window { pid: HostPid::own(), runs, elsewhere: Range { start: 0x10_1000, end: 0x10_8000 } };
    assert_eq!(window.rest(), [Range { start: 0x10_3000, end: 0x10_7000 }]);
}
