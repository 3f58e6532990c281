//! JSON of the store and of checkpoints: manifest, config, index, pointer.

#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use snapshot::{Config, Digest, Index, Manifest, Pointer};

fuzz_target!(|data: &[u8]| {
    manifest(data);
    config(data);
    index(data);
    pointer(data);
});

fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::parse(data) else { return };
    assert!(manifest.bytes() == data && manifest.digest() == Digest::of(data));
    let sizes: BTreeMap<Digest, u64> = manifest.blobs().map(|blob| (blob.digest, blob.size)).collect();
    assert!(manifest.blobs().all(|blob| sizes[&blob.digest] == blob.size), "a blob has one size");
    let sum = sizes.values().try_fold(data.len() as u64, |sum, size| sum.checked_add(*size));
    assert_eq!(Some(manifest.size()), sum, "sizes are numbers");
}

fn config(data: &[u8]) {
    let Ok(config) = Config::parse(data) else { return };
    let written = config.to_bytes().expect("what was read can be written");
    let mut again = Config::parse(&written).expect("what was written can be read");
    for (again, before) in again.phases.iter_mut().zip(&config.phases) {
        // serde_json reads long fractions with an error in the last bit.
        assert!((again.seconds - before.seconds).abs() <= before.seconds.abs() * 1e-12);
        again.seconds = before.seconds;
    }
    assert_eq!(again, config);
}

fn index(data: &[u8]) {
    let Ok(index) = Index::parse(data) else { return };
    let entries: Vec<_> = index.entries().collect();
    for name in entries.iter().filter_map(|entry| entry.name.as_ref()) {
        assert!(name.to_string().parse().is_ok_and(|again: snapshot::Name| again == *name));
    }
    let written = index.to_bytes().expect("what was read can be written");
    let again = Index::parse(&written).expect("what was written can be read");
    assert_eq!(again.entries().collect::<Vec<_>>(), entries);
    assert!(again.to_bytes().is_ok_and(|bytes| bytes == written), "equal indices have equal bytes");
}

fn pointer(data: &[u8]) {
    let Ok(pointer) = serde_json::from_slice::<Pointer>(data) else { return };
    let store = pointer.store().to_str().expect("a store's path is text");
    assert!(store.starts_with('/') && store.split('/').all(|part| part != ".."), "{store}");
    assert!(!store.chars().any(char::is_control));
    assert!(pointer.registry().is_none_or(|registry| registry.bytes().all(|byte| byte.is_ascii_graphic())));
    let written = serde_json::to_vec(&pointer).expect("what was read can be written");
    assert!(serde_json::from_slice::<Pointer>(&written).is_ok_and(|again| again == pointer));
}
