//! Seccomp filters in images.

use tempfile::TempDir;

use crate::filters;
use crate::tests::formats::file;
use crate::wire::{put_message, put_number};

#[test]
fn the_programs_of_all_filters_are_found() {
    let folder = TempDir::new().unwrap();
    assert!(filters(folder.path()).unwrap().is_empty());
    let mut entry = vec![];
    for program in [&b"first program"[..], b"second"] {
        let mut filter = vec![];
        put_message(&mut filter, 1, program);
        put_number(&mut filter, 2, 0);
        put_message(&mut entry, 1, &filter);
    }
    let path = folder.path().join("seccomp.img");
    file(&path, &[0x5456_4319, 0x6441_3049], &[&entry]);
    assert_eq!(filters(folder.path()).unwrap(), [b"first program".to_vec(), b"second".to_vec()]);
    file(&path, &[0x5456_4319, 0], &[&entry]);
    assert!(filters(folder.path()).is_err());
}
