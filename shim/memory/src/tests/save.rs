use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{Holder, container, draft, is_root, noise, open, save, targets, threads};
use crate::{
    CHUNK, Control, FileSource, PAGE, Place, SaveError, Saved, Segment, TableError, save_files, save_processes, verify,
};

const MIB: u64 = 1 << 20;

/// What a table says that a process has, from the packs themselves.
fn restored(saved: &Saved, pid: i32) -> Vec<u8> {
    let packs = open(saved);
    verify(&packs, &threads(2)).unwrap();
    let mut memory = Vec::new();
    for Segment { length, place, .. } in saved.table.segments(container(pid)) {
        let mut bytes = vec![0; usize::try_from(*length).unwrap()];
        if let Place::Pack { index, offset } = place {
            packs[usize::try_from(*index).unwrap()].file().read_exact_at(&mut bytes, *offset).unwrap();
        }
        memory.extend(bytes);
    }
    memory
}

/// All packs, byte for byte.
fn contents(saved: &Saved) -> Vec<Vec<u8>> {
    saved.packs.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn memory_is_saved_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let content = noise(3 * MIB + PAGE, 1);
    let holder = Holder::start(3 * MIB + PAGE, &[(0, &content)]);
    let saved = save(&[&holder], folder.path()).unwrap();
    assert_eq!(saved.table.packs(), &[3 * MIB + PAGE]);
    assert!(restored(&saved, 1) == content);
    assert!(holder.memory() == content);
    // Space that was allocated ahead is given back.
    let blocks = std::fs::metadata(&saved.packs[0]).unwrap().blocks();
    assert!(blocks * 512 <= 3 * MIB + 8 * PAGE, "{blocks} blocks");
}

#[test]
fn zeros_are_not_stored() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Holder::start(64 * MIB, &[(20 * MIB, &noise(CHUNK, 1)), (40 * MIB + CHUNK - 1, &[1])]);
    let saved = save(&[&holder], folder.path()).unwrap();
    assert_eq!(saved.table.packs(), &[2 * CHUNK]);
    assert_eq!(saved.table.statistics().zero, 64 * MIB - 2 * CHUNK);
    assert!(restored(&saved, 1) == holder.memory());
    let nothing = Holder::start(MIB, &[]);
    let saved = save(&[&nothing], &folder.path().join("not there")).unwrap();
    assert!(saved.packs.is_empty());
    assert_eq!(saved.table.statistics().zero, MIB);
}

#[test]
fn short_runs_of_zeros_are_holes_if_that_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let gaps = [(2 * CHUNK, [1].as_slice()), (5 * CHUNK, &[2]), (14 * CHUNK, &[3]), (23 * CHUNK, &[4])];
    let holder = Holder::start(32 * CHUNK, &gaps);
    let saved = save_processes(&targets(&[&holder]), 8 * CHUNK, &draft(folder.path()), &threads(1)).unwrap();
    let lengths: Vec<_> = saved.table.segments(container(1)).iter().map(|segment| segment.length / CHUNK).collect();
    // The edges are left out however short they are, and two gaps are long enough.
    assert_eq!(lengths, [2, 4, 8, 1, 8, 1, 8]);
    assert!(restored(&saved, 1) == holder.memory());
}

#[test]
fn a_pack_does_not_depend_on_what_is_in_others() {
    let folder = tempfile::tempdir().unwrap();
    let (end, window) = (noise(CHUNK, 7), 256 * MIB);
    let first = Holder::start(window + 2 * CHUNK, &[(CHUNK, &noise(CHUNK, 1)), (window + CHUNK, &end)]);
    let second = Holder::start(window + 2 * CHUNK, &[(window + CHUNK, &end)]);
    let saved = save(&[&first, &second], folder.path()).unwrap();
    let packs = contents(&saved);
    assert_eq!(packs.len(), 3);
    assert!(packs[0] != packs[1] && packs[1] == packs[2]);
    let names: Vec<_> = saved.packs.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["pack-000000", "pack-000001", "pack-000003"]);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let source = tempfile::tempfile().unwrap();
    source.write_all_at(&noise(3 * MIB, 1), 0).unwrap();
    source.write_all_at(&noise(3 * MIB, 1), 4 * MIB).unwrap();
    let path = Path::new("pages");
    let pieces = [(0, 1, 0x1_0000), (MIB, 1, 0x5000_3000), (3 * MIB, 2, 0x3000)];
    let sources = pieces.map(|(offset, pid, address)| FileSource {
        file: &source,
        path,
        offset,
        pid: container(pid),
        address,
        length: 2 * MIB + 5 * PAGE,
    });
    let holders: Vec<_> = (1..6)
        .map(|seed| Holder::start(5 * MIB, &[(0, &noise(MIB, seed)), (3 * MIB, &noise(MIB + PAGE, seed))]))
        .collect();
    let targets = targets(&holders.iter().collect::<Vec<_>>());
    let mut all = Vec::new();
    for number in [1, 2, 7] {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = save_files(&sources, &draft(folder.path()), &threads(number)).unwrap();
        let processes = save_processes(&targets, CHUNK, &draft(other.path()), &threads(number)).unwrap();
        all.push((contents(&files), files.table, contents(&processes), processes.table));
    }
    assert!(all.iter().all(|one| *one == all[0]));
}

#[test]
fn memory_of_forked_processes_is_stored_once() {
    let folder = tempfile::tempdir().unwrap();
    let source = tempfile::tempfile().unwrap();
    let content = noise(MIB, 1);
    source.write_all_at(&content, 0).unwrap();
    // Of the second one a page was written to, and of the third there is more.
    source.write_all_at(&content, MIB).unwrap();
    source.write_all_at(&[42], MIB + 3 * CHUNK + 17).unwrap();
    source.write_all_at(&noise(5 * PAGE, 2), 3 * MIB - 5 * PAGE).unwrap();
    source.write_all_at(&content, 3 * MIB).unwrap();
    let base = 0x7000_0000;
    let of = |pid, offset, address, length| FileSource {
        file: &source,
        path: Path::new("pages"),
        offset,
        pid: container(pid),
        address,
        length,
    };
    let sources = [
        of(1, 0, base, MIB),
        of(2, MIB, base, MIB),
        of(3, 3 * MIB - 5 * PAGE, base - 5 * PAGE, MIB + 5 * PAGE),
        // All zero.
        of(3, 2 * MIB, base + 2 * MIB, 2 * CHUNK),
    ];
    let control = threads(2);
    let saved = save_files(&sources, &draft(folder.path()), &control).unwrap();
    let statistics = saved.table.statistics();
    assert_eq!(statistics.memory, control.done());
    assert_eq!(statistics.shared, 2 * MIB - CHUNK);
    assert_eq!(statistics.zero, 2 * CHUNK);
    assert_eq!(statistics.stored, MIB + 2 * CHUNK);
    for (pid, source) in [(1, &sources[0]), (2, &sources[1]), (3, &sources[2])] {
        let mut expected = vec![0; usize::try_from(source.length).unwrap()];
        source.file.read_exact_at(&mut expected, source.offset).unwrap();
        assert!(restored(&saved, pid).starts_with(&expected), "process {pid}");
    }
}

#[test]
fn short_pieces_share_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let source = tempfile::tempfile().unwrap();
    let content = noise(40 * PAGE, 1);
    source.write_all_at(&content, 0).unwrap();
    // Ten runs of four pages, each over the edge of a chunk: 1 page before it, 3 after.
    let sources: Vec<_> = (0..10)
        .map(|run| FileSource {
            file: &source,
            path: Path::new("pages"),
            offset: run * 4 * PAGE,
            pid: container(1),
            address: (run + 1) * MIB - PAGE,
            length: 4 * PAGE,
        })
        .collect();
    let saved = save_files(&sources, &draft(folder.path()), &threads(2)).unwrap();
    assert_eq!(saved.table.packs(), &[3 * CHUNK]);
    assert!(restored(&saved, 1) == content);
}

#[test]
fn files_that_are_short_or_said_to_overlap_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let source = tempfile::tempfile().unwrap();
    source.write_all_at(&noise(MIB, 1), 0).unwrap();
    let of = |offset, address, length| FileSource {
        file: &source,
        path: Path::new("pages"),
        offset,
        pid: container(3),
        address,
        length,
    };
    let run = |sources: &[FileSource<'_>]| {
        let folder = tempfile::tempdir_in(folder.path()).unwrap();
        save_files(sources, &draft(folder.path()), &threads(2)).unwrap_err()
    };
    let error = run(&[of(PAGE, 0x10000, MIB)]);
    assert!(matches!(error, SaveError::Source { pid, .. } if pid == container(3)), "{error}");
    let error = run(&[of(0, 0x10000, 8192), of(0, 0x11000, 8192)]);
    assert!(
        matches!(error, SaveError::Table(TableError::Segment { pid, address: 0x11000, .. }) if pid == container(3)),
        "{error}"
    );
    for wrong in [of(0, 1, PAGE), of(0, 0x1000, 1), of(0, u64::MAX - 4095, PAGE), of(u64::MAX, 0x1000, PAGE)] {
        let error = run(&[wrong]);
        assert!(matches!(error, SaveError::Range { pid, .. } if pid == container(3)), "{error}");
    }
}

#[test]
fn a_hole_in_the_memory_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Holder::start(MIB, &[(0, &noise(MIB, 1))]);
    let mut targets = targets(&[&holder]);
    // Nothing is mapped at the end of the user's address space.
    let end = (1 << 47) - 2 * PAGE;
    targets[0].ranges.push(proc::Range { start: end, end: end + PAGE });
    let error = save_processes(&targets, CHUNK, &draft(folder.path()), &threads(2)).unwrap_err();
    assert!(matches!(error, SaveError::Unmapped { pid, address } if pid == holder.pid && address == end), "{error}");
}

#[test]
fn a_process_that_ended_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (lives, ended) = (Holder::start(MIB, &[]), Holder::start(MIB, &[]));
    ended.kill();
    nix::sys::wait::waitid(
        nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(ended.pid.raw())),
        nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT,
    )
    .unwrap();
    let error = save(&[&lives, &ended], folder.path()).unwrap_err();
    assert!(matches!(error, SaveError::Gone { pid, .. } if pid == ended.pid), "{error}");
}

#[test]
fn a_process_that_is_killed_meanwhile_ends_the_save_and_nothing_else() {
    let content = noise(16 * MIB, 1);
    for round in 0..8 {
        let folder = tempfile::tempdir().unwrap();
        let holder = Holder::start(16 * MIB, &[(0, &content)]);
        let control = threads(2);
        let result = std::thread::scope(|scope| {
            let save = scope.spawn(|| save_processes(&targets(&[&holder]), CHUNK, &draft(folder.path()), &control));
            while control.done() < round * 2 * MIB && !save.is_finished() {
                std::hint::spin_loop();
            }
            holder.kill();
            save.join().unwrap()
        });
        match result {
            Ok(saved) => assert!(restored(&saved, 1) == content),
            Err(error) => assert!(matches!(error, SaveError::Gone { pid, .. } if pid == holder.pid), "{error}"),
        }
    }
}

#[test]
fn a_full_disk_is_said_to_be_one() {
    if !is_root() {
        eprintln!("skipped: only root can make a small filesystem");
        return;
    }
    let holder = Holder::start(4 * MIB, &[(0, &noise(4 * MIB, 1))]);
    let folder = tempfile::tempdir().unwrap();
    // In a thread of its own, whose mounts nobody else sees.
    let error = std::thread::scope(|scope| {
        let save = || {
            use nix::mount::{MsFlags, mount};
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS | nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            mount(Some("none"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
            super::save(&[&holder], folder.path()).unwrap_err()
        };
        scope.spawn(save).join().unwrap()
    });
    assert!(matches!(error, SaveError::Full { .. }), "{error}");
}

#[test]
fn a_file_of_a_packs_name_is_not_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Holder::start(CHUNK, &[(0, &[1])]);
    File::create(folder.path().join("pack-000000")).unwrap();
    let error = save(&[&holder], folder.path()).unwrap_err();
    assert!(matches!(error, SaveError::Create { .. }), "{error}");
}

#[test]
fn a_save_can_be_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Holder::start(MIB, &[(0, &[1])]);
    let control = Control::new();
    control.cancel();
    let error = save_processes(&targets(&[&holder]), CHUNK, &draft(folder.path()), &control).unwrap_err();
    assert!(matches!(error, SaveError::Cancelled), "{error}");
}
