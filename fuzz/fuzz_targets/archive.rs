//! The import of a snapshot from a tar archive.

#![no_main]

use std::sync::LazyLock;

use gpusnap_fuzz::{parts, sha256};
use libfuzzer_sys::fuzz_target;
use snapshot::{IfInUse, Import, Reference, Snapshot, Store};
use tar::EntryType;

const BLOCK: usize = 512;

/// The store of all inputs; each input's content is removed again. `run` removes the store.
static STORE: LazyLock<Store> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder can be made").keep();
    Store::open(&folder.join("store")).expect("a new store can be made")
});

fuzz_target!(|data: &[u8]| {
    // A zero begins the parts of an archive; any other byte begins an archive.
    let archive = if let Some((0, data)) = data.split_first() { composed(data) } else { with_checksums(data) };
    if let Ok(imported) = STORE.import(&*archive, Import::default(), &|_| {}) {
        check(imported);
    }
    assert!(STORE.list().expect("the store is whole").is_empty(), "nothing of it is in the store");
});

fn check(imported: Snapshot) {
    let report = STORE.verify(None, None, &|_| {}).expect("the store can be read");
    assert!(report.problems.is_empty() && report.snapshots == 1, "{:?}", report.problems);
    let archive = exported(&imported);
    let again = STORE.import(&*archive, Import::default(), &|_| {}).expect("what was exported can be imported");
    assert_eq!((again.digest(), again.names()), (imported.digest(), imported.names()));
    assert!(exported(&again) == archive, "equal snapshots give equal archives");
    let reference = Reference::Digest(imported.digest());
    drop((imported, again));
    STORE.remove(&reference, IfInUse::Refuse).expect("nobody uses it");
}

fn exported(snapshot: &Snapshot) -> Vec<u8> {
    let mut bytes = Vec::new();
    snapshot.export(snapshot.names().first(), &mut bytes, &|_| {}).expect("what is in the store can be exported");
    bytes
}

/// An archive with right checksums in all headers: no mutation finds them.
fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    let mut at = 0;
    while let Some(block) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<BLOCK>()) {
        at += BLOCK;
        if block.iter().any(|byte| *byte != 0) {
            let mut header = tar::Header::from_byte_slice(block).clone();
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
            let size = header.entry_size().ok().and_then(|size| usize::try_from(size).ok()).unwrap_or_default();
            at = at.saturating_add(size.checked_next_multiple_of(BLOCK).unwrap_or(usize::MAX));
        }
    }
    bytes
}

/// An archive of parts, with the digest of part N for `%dN` and its size for `%sN`: no mutation
/// finds digests either.
fn composed(data: &[u8]) -> Vec<u8> {
    let mut contents: Vec<Vec<u8>> = vec![];
    let mut archive = tar::Builder::new(Vec::new());
    for (kind, part) in parts(data) {
        let content = filled_in(part, &contents);
        let (path, content) = match kind % 8 {
            0 => ("oci-layout".to_owned(), &*content),
            1 => ("index.json".to_owned(), &*content),
            // A path and the content.
            4..8 => {
                let end = content.iter().position(|byte| *byte == b'\n').unwrap_or(content.len());
                let (path, content) = content.split_at(end);
                (String::from_utf8_lossy(path).into_owned(), content.get(1..).unwrap_or_default())
            }
            _ => (format!("blobs/sha256/{}", sha256(&content)), &*content),
        };
        let kind = match kind % 8 {
            5 => EntryType::XHeader,
            6 => EntryType::Directory,
            7 => EntryType::new(kind >> 3),
            _ => EntryType::Regular,
        };
        let mut header = tar::Header::new_ustar();
        let name = &mut header.as_old_mut().name;
        name.iter_mut().zip(path.bytes()).for_each(|(place, byte)| *place = byte);
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).expect("memory can be written");
        contents.push(content.to_vec());
    }
    archive.into_inner().expect("memory can be written")
}

fn filled_in(part: &[u8], before: &[Vec<u8>]) -> Vec<u8> {
    let mut filled = vec![];
    let mut rest = part;
    while let Some((first, after)) = rest.split_first() {
        let found = match rest {
            [b'%', what @ (b'd' | b's'), digit @ b'0'..=b'9', ..] => {
                before.get(usize::from(digit - b'0')).map(|content| match what {
                    b'd' => format!("sha256:{}", sha256(content)),
                    _ => content.len().to_string(),
                })
            }
            _ => None,
        };
        match found {
            Some(text) => {
                filled.extend(text.bytes());
                rest = &rest[3..];
            }
            None => {
                filled.push(*first);
                rest = after;
            }
        }
    }
    filled
}
