//! Device nodes in images.

use std::collections::BTreeMap;
use std::path::Path;

use proc::ContainerPid;
use tempfile::TempDir;

use crate::tests::formats::file;
use crate::wire::{Reader, Value, fields, first_entry, put_message, put_number};
use crate::{Devices, OpenFiles, replace_devices};

const COMMON: u32 = 0x5456_4319;
const IDS: [u32; 2] = [COMMON, 0x5443_2030];
const FDINFO: [u32; 2] = [COMMON, 0x5621_3732];
pub(super) const FILES: [u32; 2] = [COMMON, 0x5630_3138];
const MM: [u32; 2] = [COMMON, 0x5749_2820];

pub(super) fn numbers(numbers: &[(u32, u64)]) -> Vec<u8> {
    let mut message = vec![];
    numbers.iter().for_each(|(number, value)| put_number(&mut message, *number, *value));
    message
}

fn external(id: u64) -> Vec<u8> {
    let mut external = numbers(&[(1, id)]);
    put_message(&mut external, 5, &numbers(&[(1, 77)]));
    let mut message = numbers(&[(1, 16), (2, id)]);
    put_message(&mut message, 15, &external);
    message
}

pub(super) fn write(folder: &Path, name: &str, magic: &[u32], entries: &[Vec<u8>]) {
    file(&folder.join(name), magic, &entries.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

/// Writes processes 1 and 2: each has descriptor 9, external and of its own; 2 also has descriptor 3, of a regular file,
/// and 10, external. Process 1 has a mapping of a device.
fn images() -> TempDir {
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    for pid in 1..=2 {
        write(path, &format!("ids-{pid}.img"), &IDS, &[numbers(&[(1, 5), (2, pid + 40), (3, 6)])]);
    }
    let fd = |id, kind, number| numbers(&[(1, id), (2, 1), (3, kind), (4, number)]);
    write(path, "fdinfo-41.img", &FDINFO, &[fd(100, 16, 9)]);
    write(path, "fdinfo-42.img", &FDINFO, &[fd(99, 1, 3), fd(101, 16, 9), fd(102, 16, 10)]);
    let regular = numbers(&[(1, 1), (2, 99)]);
    write(path, "files.img", &FILES, &[external(100), regular, external(101), external(102)]);
    let vma = |start, status, flags| {
        numbers(&[(1, start), (2, start + 4096), (3, 0), (4, 8), (5, 1), (6, flags), (7, status), (8, 1)])
    };
    let mm = |vmas: &[Vec<u8>]| {
        let mut mm = numbers(&[(1, 4)]);
        vmas.iter().for_each(|vma| put_message(&mut mm, 14, vma));
        put_number(&mut mm, 15, 1);
        mm
    };
    let device = (1 << 27) | 0x81;
    write(path, "mm-1.img", &MM, &[mm(&[vma(4096, 0x201, 0x22), vma(8192, device, 1), vma(12288, 0x41, 2)])]);
    write(path, "mm-2.img", &MM, &[mm(&[vma(4096, 0x201, 0x22)])]);
    folder
}

fn devices(pid: i32, paths: &[(u32, &str)]) -> Devices {
    let paths = paths.iter().map(|(fd, path)| (*fd, (*path).into()));
    Devices { pid: ContainerPid::new(pid).unwrap(), paths: paths.collect::<BTreeMap<_, _>>() }
}

pub(super) fn number(path: &Path, message: &[u8], wanted: u32) -> Option<u64> {
    let mut found = None;
    fields(path, message, |field| {
        if let (true, Value::Number(value)) = (field.number == wanted, field.value) {
            found = Some(value);
        }
        Ok(())
    })
    .unwrap();
    found
}

pub(super) fn bytes(path: &Path, message: &[u8], wanted: u32) -> Vec<Vec<u8>> {
    let mut found = vec![];
    fields(path, message, |field| {
        if let (true, Value::Bytes(value)) = (field.number == wanted, field.value) {
            found.push(value.to_vec());
        }
        Ok(())
    })
    .unwrap();
    found
}

pub(super) fn entries(path: &Path, magic: &[u32]) -> Vec<Vec<u8>> {
    let mut reader = Reader::open(path, magic).unwrap();
    std::iter::from_fn(|| reader.entry(1 << 20).unwrap()).collect()
}

#[test]
fn a_descriptor_of_a_device_is_opened_by_path_and_one_without_a_path_is_null() {
    let folder = images();
    let images = folder.path();
    replace_devices(images, &[devices(1, &[(9, "/dev/nvidiactl")]), devices(2, &[(9, "/dev/nvidia0")])]).unwrap();
    for (name, kinds) in [("fdinfo-41.img", &[1_u64][..]), ("fdinfo-42.img", &[1, 1, 1])] {
        let path = images.join(name);
        let found: Vec<_> = entries(&path, &FDINFO).iter().map(|entry| number(&path, entry, 3).unwrap()).collect();
        assert_eq!(found, kinds, "{name}");
    }
    let path = images.join("files.img");
    let names: Vec<_> = entries(&path, &FILES)
        .iter()
        .map(|entry| {
            assert_eq!(number(&path, entry, 1), Some(1));
            assert!(bytes(&path, entry, 15).is_empty());
            let regular = bytes(&path, entry, 3).pop().unwrap_or_default();
            let name = bytes(&path, &regular, 6).pop().unwrap_or_default();
            assert!(number(&path, &regular, 3).is_none_or(|position| position == u64::MAX));
            (number(&path, entry, 2).unwrap(), String::from_utf8(name).unwrap())
        })
        .collect();
    let expected = [(100, "/dev/nvidiactl"), (99, ""), (101, "/dev/nvidia0"), (102, "/dev/null")];
    assert_eq!(names, expected.map(|(id, name)| (id, name.to_owned())));
}

#[test]
fn a_mapping_of_a_device_becomes_empty_memory_of_the_same_protection() {
    let folder = images();
    let path = folder.path().join("mm-1.img");
    let other = std::fs::read(folder.path().join("mm-2.img")).unwrap();
    let vmas = |path: &Path| bytes(path, &first_entry(path, &MM, 1 << 20).unwrap(), 14);
    let before = vmas(&path);
    replace_devices(folder.path(), &[devices(1, &[]), devices(2, &[])]).unwrap();
    let after = vmas(&path);
    assert_eq!((&after[0], &after[2], after.len()), (&before[0], &before[2], 3));
    let of = |field| number(&path, &after[1], field).unwrap();
    assert_eq!([of(1), of(2), of(5), of(6), of(7)], [8192, 12288, 1, 0x4022, 0x201]);
    assert_eq!(std::fs::read(folder.path().join("mm-2.img")).unwrap(), other);
}

#[test]
fn images_without_devices_are_left_as_they_are() {
    let folder = images();
    std::fs::remove_file(folder.path().join("mm-1.img")).unwrap();
    replace_devices(folder.path(), &[]).unwrap();
    let error = replace_devices(folder.path(), &[devices(3, &[])]).unwrap_err().to_string();
    assert!(error.contains("ids-3.img"), "{error}");
}

#[test]
fn a_device_of_the_driver_that_is_missing_becomes_null() {
    let folder = images();
    let images = folder.path();
    let paths = [devices(1, &[(9, "/dev/nvidiactl")]), devices(2, &[(9, "/dev/nvidia0"), (10, "/dev/kvm")])];
    replace_devices(images, &paths).unwrap();
    let mut files = OpenFiles::read(images).unwrap();
    files.replace_missing_devices(&|path| path != Path::new("/dev/nvidiactl")).unwrap();
    assert!(files.is_changed());
    files.write(images).unwrap();
    let path = images.join("files.img");
    let name = |entry: &Vec<u8>| bytes(&path, &bytes(&path, entry, 3).pop()?, 6).pop();
    let names: Vec<_> = entries(&path, &FILES).iter().filter_map(name).collect();
    assert_eq!(names, [b"/dev/nvidiactl".to_vec(), b"/dev/null".to_vec(), b"/dev/kvm".to_vec()]);
    let mut files = OpenFiles::read(images).unwrap();
    files.replace_missing_devices(&|_| false).unwrap();
    assert!(!files.is_changed());
}
