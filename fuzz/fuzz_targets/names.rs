//! Input from people and other programs: names, scopes, digests, references, sizes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use snapshot::{Digest, Name, Reference, Scope, parse_size};

fuzz_target!(|text: &str| {
    if let Ok(name) = text.parse::<Name>() {
        assert_eq!(name.to_string(), text, "a name has one form");
        assert!(text.split('/').all(is_file_name), "{text:?}");
        let scope = Scope::new(name.scope().containerd(), name.scope().kubernetes());
        assert_eq!(Name::new(scope.expect("a name's scope is one"), name.name()), Ok(name));
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text, "a digest has one form");
        assert_eq!(Digest::from_hex(&digest.hex()), Ok(digest));
    }
    match text.parse::<Reference>() {
        Ok(Reference::Prefix(prefix)) => assert!(text.ends_with(&prefix) && (6..64).contains(&prefix.len())),
        Ok(reference) => assert!(reference.to_string().parse::<Reference>().is_ok_and(|again| again == reference)),
        Err(error) => assert!(error.to_string().chars().count() < 5000, "little of what was given is shown"),
    }
    if let Ok(size) = parse_size(text) {
        assert_eq!(parse_size(&size.to_string()), Ok(size));
    }
});

/// Returns whether the part can serve as a file name.
fn is_file_name(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !part.is_empty() && part.chars().all(plain) && part.starts_with(|c: char| c.is_ascii_alphanumeric())
}
