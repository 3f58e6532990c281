use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::noise;
use crate::checksum::Checksum;
use crate::pack::PackWriter;
use crate::{Control, Pack, PackError, VerifyError, verify};

const GOLDEN: &[u8] = include_bytes!("../testdata/pack");

fn append(writer: &mut PackWriter, bytes: &[u8]) {
    writer.append(bytes, Checksum::of_chunks(bytes)).unwrap();
}

/// A chunk, two chunks of zeros, and a page.
fn write(folder: &Path) -> PathBuf {
    let mut writer = PackWriter::create(folder.join("pack")).unwrap();
    append(&mut writer, &noise(65536, 1));
    writer.append_zeros(2);
    append(&mut writer, &noise(4096, 2));
    writer.finish().unwrap().0
}

/// Whether the bytes are a whole pack.
fn is_good(path: &Path, bytes: &[u8]) -> bool {
    std::fs::write(path, bytes).unwrap();
    Pack::open(path).is_ok_and(|pack| verify(&[pack], &Control::new()).is_ok())
}

#[test]
fn a_written_pack_is_good() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path());
    let pack = Pack::open(&path).unwrap();
    assert_eq!(pack.data_length(), 3 * 65536 + 4096);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let control = Control::new();
    verify(&[pack], &control).unwrap();
    assert_eq!(control.done(), 3 * 65536 + 4096);
}

#[test]
fn the_format_does_not_change() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = PackWriter::create(folder.path().join("pack")).unwrap();
    append(&mut writer, &[b"gpusnap ".repeat(512), b"one page".repeat(512)].concat());
    let (path, length) = writer.finish().unwrap();
    assert_eq!(length, 8192);
    assert!(std::fs::read(&path).unwrap() == GOLDEN);
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pack");
    std::fs::write(&path, GOLDEN).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let is_good = || Pack::open(&path).is_ok_and(|pack| verify(&[pack], &Control::new()).is_ok());
    assert!(is_good());
    for (at, byte) in (0..).zip(GOLDEN.iter().copied()) {
        file.write_all_at(&[byte ^ 1 << (at % 8)], at).unwrap();
        assert!(!is_good(), "byte {at}");
        file.write_all_at(&[byte], at).unwrap();
    }
}

#[test]
fn a_damaged_chunk_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path());
    for chunk in 0..4 {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, chunk * 65536 + 77).unwrap();
        file.write_all_at(&[!byte[0]], chunk * 65536 + 77).unwrap();
        let failure = verify(&[Pack::open(&path).unwrap()], &Control::new()).unwrap_err();
        assert!(matches!(failure, VerifyError::Corrupt { chunk: found, .. } if found as u64 == chunk), "{failure}");
        file.write_all_at(&byte, chunk * 65536 + 77).unwrap();
    }
}

#[test]
fn what_is_cut_off_or_goes_on_is_no_pack() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pack");
    for length in (0..GOLDEN.len()).filter(|length| length % 61 == 0 || GOLDEN.len() - length < 100) {
        assert!(!is_good(&path, &GOLDEN[..length]), "{length} bytes");
    }
    assert!(!is_good(&path, &[GOLDEN, &[0]].concat()));
    assert!(!is_good(&path, &[&[0; 4096], GOLDEN].concat()));
}

#[test]
fn lengths_are_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pack");
    let trailer = GOLDEN.len() - 64;
    for (at, number) in [(16, u64::MAX), (16, 1 << 40), (16, 0), (16, 4096), (16, 8191), (24, u64::MAX), (24, 0)] {
        let mut bytes = GOLDEN.to_vec();
        bytes[trailer + at..trailer + at + 8].copy_from_slice(&number.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(Pack::open(&path), Err(PackError::Damaged { .. })), "{number} at {at}");
    }
    // As large as it says, and larger than any pack.
    let mut end = GOLDEN[trailer..].to_vec();
    let data: u64 = 1 << 40;
    end[16..24].copy_from_slice(&data.to_le_bytes());
    end[24..32].copy_from_slice(&(data / 65536).to_le_bytes());
    let file = File::create(&path).unwrap();
    file.write_all_at(&end, data + data / 65536 * 16).unwrap();
    assert!(matches!(Pack::open(&path), Err(PackError::Damaged { .. })));
}

#[test]
fn a_later_version_is_said_to_be_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pack");
    let mut bytes = GOLDEN.to_vec();
    let version = bytes.len() - 56;
    bytes[version] = 2;
    std::fs::write(&path, bytes).unwrap();
    assert!(matches!(Pack::open(&path), Err(PackError::Version { version: 2, .. })));
}

#[test]
fn only_regular_files_are_packs() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path());
    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    assert!(matches!(Pack::open(&link), Err(PackError::Read { .. })));
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    assert!(matches!(Pack::open(&fifo), Err(PackError::Damaged { .. })));
    assert!(matches!(Pack::open(folder.path()), Err(PackError::Damaged { .. })));
}
