//! Files in memory that look sparser to CRIU than they are, by a preloaded library
//! (plugin/sparse.c).
//!
//! Nothing changes for the dumped processes, so nothing has to be undone. A CRIU without the library
//! (linked statically, or with file capabilities) writes all contents: more than necessary, and
//! right.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::process::Command;

use rustix::fs::MemfdFlags;

const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sparse.so"));
/// Variable with the path of the list.
const LIST: &str = "GPUSNAP_SPARSE";

/// A file in memory whose contents are saved elsewhere in part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sparse {
    /// Device of the file, as in `st_dev`.
    pub device: u64,
    /// Inode of the file.
    pub inode: u64,
    /// Data left to CRIU, in bytes of the file: ascending, whole pages, with holes between.
    pub data: Vec<Range<u64>>,
}

/// The library and its list, files in memory of this process, for as long as this value lives.
#[derive(Debug)]
pub(crate) struct Preload {
    library: File,
    list: File,
}

impl Preload {
    /// Makes the library for a list of files.
    ///
    /// # Errors
    /// Fails if the machine allows no executable files in memory.
    pub(crate) fn of(files: &[Sparse]) -> io::Result<Self> {
        let memory = |name, bytes: &[u8]| {
            let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
            file.write_all(bytes).map(|()| file)
        };
        Ok(Self { library: memory("criu-sparse", LIBRARY)?, list: memory("criu-sparse-list", &encode(files))? })
    }

    /// Lets a program load the library.
    pub(crate) fn add_to(&self, command: &mut Command) {
        let path = |file: &File| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        command.env("LD_PRELOAD", path(&self.library)).env(LIST, path(&self.list));
    }
}

fn encode(files: &[Sparse]) -> Vec<u8> {
    let count = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
    let of_file = |Sparse { device, inode, data }: &Sparse| {
        let pieces = data.iter().flat_map(|piece| [piece.start, piece.end]);
        [*device, *inode, count(data.len())].into_iter().chain(pieces).collect::<Vec<u64>>()
    };
    let words = std::iter::once(count(files.len())).chain(files.iter().flat_map(of_file));
    words.flat_map(u64::to_ne_bytes).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::io::Errno;

    use super::*;
    use crate::sys::{DATA, HOLE, seek};

    const PAGE: u64 = 4096;
    /// Variable with the paths of the files that a program asks about.
    const ASK: &str = "GPUSNAP_TEST_ASK";
    const OFFSETS: [u64; 4] = [0, 3 * PAGE, 5 * PAGE, 10 * PAGE];

    /// A file in memory, full of data.
    fn full(name: &str) -> File {
        let mut file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&[7; 10 * 4096]).unwrap();
        file
    }

    fn of(file: &File, data: &[Range<u64>]) -> Sparse {
        let metadata = file.metadata().unwrap();
        Sparse { device: metadata.dev(), inode: metadata.ino(), data: data.to_vec() }
    }

    #[test]
    #[ignore = "asks for the other test"]
    fn asks() {
        let Ok(paths) = std::env::var(ASK) else { return };
        for path in paths.split(' ') {
            let file = File::open(path).unwrap();
            let answer = |offset, whence| {
                seek(&file, offset, whence).map_or_else(|errno| errno.to_string(), |at| at.to_string())
            };
            let answers = OFFSETS.map(|offset| format!("{}/{}", answer(offset, DATA), answer(offset, HOLE)));
            println!("answers {}", answers.join(" "));
        }
        assert!(std::env::var_os("LD_PRELOAD").is_none(), "its children load the library");
    }

    /// Answers to a program with the library, a line for each file.
    fn answers(sparse: &[Sparse], files: &[&File]) -> Vec<String> {
        let paths = files.iter().map(|file| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
        let mut said = tempfile::tempfile().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "--nocapture", "sparse::tests::asks"]);
        command.env(ASK, paths.collect::<Vec<_>>().join(" ")).stdout(said.try_clone().unwrap());
        let preload = Preload::of(sparse).unwrap();
        preload.add_to(&mut command);
        let mut child = command.spawn().unwrap();
        #[expect(clippy::disallowed_methods, reason = "nobody else waits in a test")]
        let status = child.wait().unwrap();
        let mut text = String::new();
        io::Seek::rewind(&mut said).unwrap();
        io::Read::read_to_string(&mut said, &mut text).unwrap();
        assert!(status.success(), "{text}");
        let answers =
            text.lines().filter_map(|line| line.split_once("answers ").map(|(_, answers)| answers.to_owned()));
        answers.collect()
    }

    #[test]
    fn a_program_with_the_library_finds_what_is_listed_and_of_other_files_all() {
        let [first, none, other] = ["first", "none", "other"].map(full);
        let pieces = [2 * PAGE..4 * PAGE, 7 * PAGE..8 * PAGE];
        let sparse = [of(&none, &[]), of(&first, &pieces)];
        let end = Errno::NXIO.to_string();
        let [two, three, four, five, seven, ten] = [2, 3, 4, 5, 7, 10].map(|pages| pages * PAGE);
        assert_eq!(
            answers(&sparse, &[&first, &none, &other]),
            [
                format!("{two}/0 {three}/{four} {seven}/{five} {end}/{end}"),
                format!("{end}/0 {end}/{three} {end}/{five} {end}/{end}"),
                format!("0/{ten} {three}/{ten} {five}/{ten} {end}/{end}"),
            ]
        );
    }
}
