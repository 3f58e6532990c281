//! OCI specifications, read with runc's leniency.

use oci_spec::runtime::{Capability, Process};
use serde_json::Value;

/// Parses a process from containerd's Exec request.
///
/// # Errors
/// Fails if the bytes are not JSON, or not a process.
pub fn process_from_json(bytes: &[u8]) -> serde_json::Result<Process> {
    let mut process = serde_json::from_slice(bytes)?;
    drop_unknown_capabilities(&mut process);
    serde_json::from_value(process)
}

/// Removes capabilities unknown to this build from a process, as runc does: a newer client may name
/// those of a newer kernel, and a capability not granted is never too much.
pub(crate) fn drop_unknown_capabilities(process: &mut Value) {
    let Some(sets) = process.get_mut("capabilities").and_then(Value::as_object_mut) else { return };
    for set in sets.values_mut().filter_map(Value::as_array_mut) {
        set.retain(|name| {
            let known = serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !known {
                tracing::warn!("capability {name} is not known and is not granted");
            }
            known
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_capability_is_left_out() {
        let json = r#"{"args":["true"],"cwd":"/","user":{"uid":0,"gid":0},
            "capabilities":{"bounding":["CAP_CHOWN","CAP_OF_THE_FUTURE"],"effective":[]}}"#;
        let process = process_from_json(json.as_bytes()).unwrap();
        let bounding = process.capabilities().as_ref().unwrap().bounding().clone().unwrap();
        assert_eq!(bounding.into_iter().collect::<Vec<_>>(), [Capability::Chown]);
    }

    #[test]
    fn a_process_without_capabilities_is_read_as_it_is() {
        let process = process_from_json(br#"{"args":["true"],"cwd":"/","user":{"uid":1,"gid":2}}"#).unwrap();
        assert_eq!(process.user().uid(), 1);
        assert!(process_from_json(b"{").is_err());
    }
}
