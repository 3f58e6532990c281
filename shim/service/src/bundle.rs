//! Reading a bundle's config.json.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::BundleError;

/// Largest specification: containerd's limit for messages.
const LIMIT: u64 = 16 << 20;

/// Reads the specification in `bundle`, as far as `T` has fields.
pub(crate) fn read_config<T: DeserializeOwned>(bundle: &Path) -> Result<T, BundleError> {
    let path = bundle.join("config.json");
    let mut bytes = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(LIMIT + 1).read_to_end(&mut bytes));
    let read = read.and_then(|_| match u64::try_from(bytes.len()) {
        Ok(..=LIMIT) => Ok(()),
        _ => Err(std::io::Error::other("larger than 16 MiB")),
    });
    if let Err(source) = read {
        return Err(BundleError::File { action: "read", path, source });
    }
    serde_json::from_slice(&bytes).map_err(|source| BundleError::Spec { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain;

    #[test]
    fn a_config_without_end_is_refused() {
        let bundle = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/zero", bundle.path().join("config.json")).unwrap();
        let error = read_config::<serde_json::Value>(bundle.path()).unwrap_err();
        assert!(chain(&error).contains("larger than 16 MiB"), "{}", chain(&error));
    }

    #[test]
    fn a_config_is_read_as_far_as_it_is_asked_for() {
        #[derive(serde::Deserialize)]
        struct Part {
            hostname: String,
        }
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), r#"{"ociVersion":"1.2.0","hostname":"h"}"#).unwrap();
        assert_eq!(read_config::<Part>(bundle.path()).unwrap().hostname, "h");
    }
}
