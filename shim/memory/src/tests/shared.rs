use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use proc::ProcessIds;
use rustix::fs::MemfdFlags;

use super::{Holder, draft, is_root, noise, open, threads};
use crate::{CHUNK, Destination, PAGE, SaveError, Shared, fill, save_together};

const MIB: u64 = 1 << 20;

fn memory(bytes: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("shared", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn shared_memory_is_saved_once_and_filled_through_one_process() {
    if !is_root() {
        return eprintln!("skipped: only root may open what others have mapped");
    }
    // Zeros in 5 MiB, and two holes: the one is a hole again, and the rest of a chunk stays behind.
    let file = memory(16 * MIB);
    file.write_all_at(&noise(4 * MIB, 1), MIB).unwrap();
    file.write_all_at(&vec![0; 5 << 20], 5 * MIB).unwrap();
    file.write_all_at(&noise(2 * MIB + PAGE, 2), 12 * MIB).unwrap();
    let (upper, all) = (Holder::sharing(&file, 8 * MIB, 8 * MIB), Holder::sharing(&file, 0, 16 * MIB));
    let shared = Shared::find(&[upper.ids(1), all.ids(2)], 4 * CHUNK).unwrap();
    let [found] = shared.files.as_slice() else { panic!("{shared:?}") };
    let metadata = file.metadata().unwrap();
    assert_eq!((found.device, found.inode), (metadata.dev(), metadata.ino()));
    assert_eq!(found.left, std::slice::from_ref(&(14 * MIB..14 * MIB + PAGE)));
    assert_eq!(shared.bytes(), 11 * MIB);

    let folder = tempfile::tempdir().unwrap();
    let saved = save_together(&shared.regions, &draft(folder.path()), &threads(2)).unwrap();
    assert_eq!(saved.table.statistics().stored, 6 * MIB);
    assert_eq!(saved.table.statistics().zero, 5 * MIB);

    let expected = {
        let mut bytes = contents(&file);
        let tail = usize::try_from(14 * MIB).unwrap();
        bytes[tail..tail + 4096].fill(0);
        bytes
    };
    file.set_len(0).unwrap();
    file.set_len(16 * MIB).unwrap();
    let processes: [ProcessIds; 2] = [all.ids(2), upper.ids(1)];
    let into = Destination { processes: &processes, ready: &|_| () };
    fill(&saved.table, &open(&saved), &into, &threads(2)).unwrap();
    assert!(contents(&file) == expected);
    assert_eq!(file.metadata().unwrap().blocks() * 512, 6 * MIB, "holes and zeros have no memory");
    assert!(upper.memory() == expected[8 << 20..]);
}

#[test]
fn memory_that_nobody_can_write_to_or_that_is_small_is_left() {
    let small = memory(MIB - PAGE);
    small.write_all_at(&noise(MIB - PAGE, 1), 0).unwrap();
    let private = Holder::start(4 * MIB, &[(0, &noise(4 * MIB, 2))]);
    let holder = Holder::sharing(&small, 0, MIB - PAGE);
    assert_eq!(Shared::find(&[holder.ids(1), private.ids(2)], CHUNK).unwrap(), Shared::default());
}

#[test]
fn ranges_that_make_no_pack_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Holder::start(4 * MIB, &[]);
    let mut regions = super::targets(&[&holder]);
    regions[0].ranges[0].end -= PAGE;
    let refused = save_together(&regions, &draft(folder.path()), &threads(1)).unwrap_err();
    assert!(matches!(refused, SaveError::Range { .. }), "{refused}");
}
