//! What this runtime supports, told honestly.

use oci_spec::runtime::Features;

pub(super) fn features() -> Features {
    Features::default()
}
