//! Files of images, complete and damaged.

use std::path::Path;

use tempfile::TempDir;

use crate::{ImageError, check_pages, inspect, root_pid};

/// Writes the smallest directory that passes for an image: a tree with process 7 as the root.
pub(crate) fn write_image(folder: &Path) {
    file(&folder.join("inventory.img"), &[0x5831_3116], &[&[0x08, 2, 0x50, 1, 0x62, 4, 0x62, 2, b'x', b'y']]);
    file(&folder.join("pstree.img"), &[0x5456_4319, 0x5027_3030], &[&[0x08, 7, 0x10, 0]]);
}

pub(crate) fn file(path: &Path, magic: &[u32], entries: &[&[u8]]) {
    let mut bytes: Vec<u8> = magic.iter().flat_map(|word| word.to_le_bytes()).collect();
    for entry in entries {
        bytes.extend(u32::try_from(entry.len()).unwrap().to_le_bytes());
        bytes.extend(*entry);
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn an_inventory_tells_version_plugins_and_closed_connections() {
    let folder = TempDir::new().unwrap();
    write_image(folder.path());
    let image = inspect(folder.path()).unwrap();
    assert_eq!((image.version, image.plugins, image.tcp_close), (2, Some(vec!["xy".to_owned()]), true));
    assert_eq!(root_pid(folder.path()).unwrap(), Some(7));
}

#[test]
fn a_folder_without_an_image_is_reported_in_one_line() {
    let folder = TempDir::new().unwrap();
    let line = |folder: &Path| inspect(folder).unwrap_err().to_string();
    assert!(line(folder.path()).ends_with("holds no checkpoint: there is no inventory.img"));
    assert!(line(&folder.path().join("none")).ends_with("holds no checkpoint: there is no inventory.img"));
    let inventory = folder.path().join("inventory.img");
    for (bytes, said) in [
        (&b""[..], "it is cut off"),
        (b"\x16\x31", "it is cut off"),
        (b"\x7fELFxxxxxxxx", "it does not begin as CRIU's files do"),
        (b"\x16\x31\x31\x58", "it is cut off"),
        (b"\x16\x31\x31\x58\x05\x00\x00\x00ab", "it is cut off"),
        (b"\x16\x31\x31\x58\xff\xff\xff\xff", "an entry is too long"),
        (b"\x16\x31\x31\x58\x02\x00\x00\x00\x0f\x0f", "an entry is not a message"),
        (b"\x16\x31\x31\x58\x02\x00\x00\x00\x08\x09", "has version 9, and CRIU knows 1 and 2"),
        (b"\x16\x31\x31\x58\x00\x00\x00\x00", "has version 0, and CRIU knows 1 and 2"),
    ] {
        std::fs::write(&inventory, bytes).unwrap();
        assert!(line(folder.path()).ends_with(said), "{said}: {}", line(folder.path()));
    }
    std::fs::remove_file(&inventory).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &inventory).unwrap();
    assert!(matches!(inspect(folder.path()), Err(ImageError::Read { .. })));
    std::fs::remove_file(&inventory).unwrap();
    std::fs::create_dir(&inventory).unwrap();
    assert!(line(folder.path()).ends_with("it is not a regular file"));
}

#[test]
fn pages_that_are_cut_off_are_found_and_those_in_parents_are_not_missed() {
    let folder = TempDir::new().unwrap();
    let page = rustix::param::page_size();
    // File 3; two pages present (flags 4), nine in the parent, one by the old form without flags.
    let entries: [&[u8]; 4] =
        [&[0x08, 3], &[0x08, 1, 0x10, 2, 0x20, 4], &[0x08, 9, 0x10, 9, 0x18, 1, 0x20, 1], &[0x08, 99, 0x10, 1]];
    file(&folder.path().join("pagemap-1.img"), &[0x5456_4319, 0x5608_4025], &entries);
    let pages = folder.path().join("pages-3.img");
    assert!(matches!(check_pages(folder.path()), Err(ImageError::Read { .. })));
    std::fs::write(&pages, vec![0; 3 * page - 1]).unwrap();
    let error = check_pages(folder.path()).unwrap_err();
    assert!(error.to_string().ends_with("pages-3.img is damaged: it is cut off"), "{error}");
    std::fs::write(&pages, vec![0; 3 * page]).unwrap();
    check_pages(folder.path()).unwrap();
}
