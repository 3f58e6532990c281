//! Archives: a snapshot as a tar of an OCI image layout with nothing else in it.

mod export;
mod import;

use crate::Digest;

pub use self::export::ExportError;
pub use self::import::{Import, ImportError};

const LAYOUT: &str = "oci-layout";
const INDEX: &str = "index.json";

fn blob_path(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
