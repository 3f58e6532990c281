//! SHA-256 of many files at once.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use sha2::{Digest as _, Sha256};

use crate::Digest;
use crate::folder::FileError;

/// Callback for each finished piece of work, in bytes, from any thread.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

const BUFFER: usize = 1 << 20;
/// Most threads: 64 read memory at its full rate.
const MOST_THREADS: usize = 64;

/// Digests and sizes in bytes of files, with one thread per CPU. Writers of packs compute digests
/// with this function before the publication.
///
/// # Errors
/// The first file that cannot be read.
pub fn hash_files(paths: &[PathBuf], progress: Progress<'_>) -> Result<Vec<(Digest, u64)>, FileError> {
    in_parallel(paths, |path| {
        let read = || hash(&mut File::open(path)?, progress);
        read().map_err(FileError::new("read", path))
    })
}

/// Digest and size of a source, read to the end.
pub(crate) fn hash(source: &mut impl Read, progress: Progress<'_>) -> io::Result<(Digest, u64)> {
    copy(source, &mut io::sink(), progress)
}

/// Copies a source to the end; returns the digest and the size of the copied bytes.
pub(crate) fn copy(
    source: &mut impl Read,
    target: &mut impl io::Write,
    progress: Progress<'_>,
) -> io::Result<(Digest, u64)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; BUFFER];
    let mut size = 0;
    loop {
        let read = match source.read(&mut buffer) {
            Ok(0) => return Ok((<[u8; 32]>::from(hasher.finalize()).into(), size)),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..read]);
        target.write_all(&buffer[..read])?;
        size += read as u64;
        progress(read as u64);
    }
}

/// Calls `work` for each item, with one thread per CPU; results are in the order of the items.
/// After the first failure no new item is begun.
pub(crate) fn in_parallel<I: Sync, T: Send, E: Send>(
    items: &[I],
    work: impl Fn(&I) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS).min(items.len());
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = || {
        let mut done = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { break };
            let result = work(item);
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            done.push((index, result));
        }
        done
    };
    let mut done: Vec<(usize, Result<T, E>)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut done = run();
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn digests_come_in_the_order_of_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let contents: Vec<Vec<u8>> = (0..20_u8).map(|n| vec![n; usize::from(n) * 100_000]).collect();
        let paths: Vec<PathBuf> = contents
            .iter()
            .enumerate()
            .map(|(n, content)| {
                let path = folder.path().join(n.to_string());
                std::fs::write(&path, content).unwrap();
                path
            })
            .collect();
        let told = AtomicU64::new(0);
        let add = |bytes| {
            told.fetch_add(bytes, Ordering::Relaxed);
        };
        let hashed = hash_files(&paths, &add).unwrap();
        let expected: Vec<_> = contents.iter().map(|content| (Digest::of(content), content.len() as u64)).collect();
        assert_eq!(hashed, expected);
        assert_eq!(told.into_inner(), expected.iter().map(|(_, size)| size).sum::<u64>());
        let missing = [paths[0].clone(), folder.path().join("none")];
        assert!(hash_files(&missing, &|_| {}).unwrap_err().is_missing());
    }
}
