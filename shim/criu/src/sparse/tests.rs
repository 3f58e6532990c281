use rustix::fs::{MemfdFlags, SeekFrom};

use super::*;

const PAGE: u64 = 4096;

fn sparse(data: &[Range<u64>]) -> Sparse {
    Sparse { device: 0, inode: 0, data: data.to_vec() }
}

#[test]
fn only_the_listed_data_is_found() {
    let file = sparse(&[PAGE..3 * PAGE, 8 * PAGE..9 * PAGE]);
    let data = [0, PAGE, 2 * PAGE + 1, 3 * PAGE, 8 * PAGE, 9 * PAGE].map(|offset| file.data_from(offset));
    let next = Some(8 * PAGE);
    assert_eq!(data, [Some(PAGE), Some(PAGE), Some(2 * PAGE + 1), next, next, None]);
    let holes = [0, PAGE, 2 * PAGE, 3 * PAGE, 8 * PAGE, 9 * PAGE].map(|offset| file.hole_from(offset));
    assert_eq!(holes, [0, 3 * PAGE, 3 * PAGE, 3 * PAGE, 9 * PAGE, 9 * PAGE]);
    assert_eq!(sparse(&[]).data_from(0), None);
}

/// A file in memory, full of data.
fn full(name: &str, bytes: u64) -> File {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    std::io::copy(&mut std::io::Read::take(std::io::repeat(7), bytes), &mut &file).unwrap();
    file
}

fn of(file: &File, data: &[Range<u64>]) -> Sparse {
    let metadata = file.metadata().unwrap();
    Sparse { device: metadata.dev(), inode: metadata.ino(), data: data.to_vec() }
}

/// Answers of the kernel to questions for data and holes at these offsets.
fn seek(file: &File, offsets: &[u64]) -> Vec<[Result<u64, Errno>; 2]> {
    let ask = |from| rustix::fs::seek(file, from);
    offsets.iter().map(|offset| [ask(SeekFrom::Data(*offset)), ask(SeekFrom::Hole(*offset))]).collect()
}

#[test]
fn a_watched_thread_finds_what_is_listed_and_everybody_else_all() {
    let (shown, other) = (full("shown", 10 * PAGE), full("other", 10 * PAGE));
    let files = vec![of(&shown, &[2 * PAGE..4 * PAGE]), of(&shown, &[])];
    let offsets = [0, 3 * PAGE, 5 * PAGE, 10 * PAGE];
    let ask = || (seek(&shown, &offsets), seek(&other, &offsets));
    let (answers, watch) = spawn_watched(files, ask);
    if watch.is_none() {
        eprintln!("skipped: no seccomp filters with a listener here, or no right to make one");
        return;
    }
    let (end, none) = (Ok(10 * PAGE), Err(Errno::NXIO));
    let listed = [[Ok(2 * PAGE), Ok(0)], [Ok(3 * PAGE), Ok(4 * PAGE)], [none, Ok(5 * PAGE)], [none, none]];
    let all = [[Ok(0), end], [Ok(3 * PAGE), end], [Ok(5 * PAGE), end], [none, none]];
    assert_eq!(answers, (listed.to_vec(), all.to_vec()));
    assert_eq!(seek(&shown, &offsets), all);
}

#[test]
fn a_watched_thread_gets_an_error_once_nobody_answers() {
    let file = full("shown", PAGE);
    let (tell, told) = mpsc::channel();
    let files = vec![of(&file, &[])];
    let ask = move || {
        // A thread has the filter of the one that starts it.
        std::thread::spawn(move || {
            told.recv().unwrap();
            seek(&file, &[0])
        })
    };
    let (asking, watch) = spawn_watched(files, ask);
    let is_watched = watch.is_some();
    drop(watch);
    tell.send(()).unwrap();
    let answers = asking.join().unwrap();
    if is_watched {
        assert_eq!(answers, [[Err(Errno::NOSYS), Err(Errno::NOSYS)]]);
    } else {
        eprintln!("skipped: no seccomp filters with a listener here, or no right to make one");
    }
}
