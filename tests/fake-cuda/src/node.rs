//! The device nodes, and the names of the simulated GPUs.

use std::env;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use crate::control::MAX_DEVICES;
use crate::sys::os;

/// The simulated driver: the release, and the CUDA version as a number.
pub(crate) const DRIVER: &str = "580.159.04\0";
pub(crate) const CUDA_VERSION: i32 = 13_000;

/// Every GPU's name, memory and compute capability.
pub(crate) const NAME: &str = "NVIDIA H100 80GB HBM3 (simulated)\0";
pub(crate) const MEMORY: u64 = 81_559 << 20;
pub(crate) const CAPABILITY: (i32, i32) = (9, 0);

const HOST_FILE: &CStr = c"/run/fake-cuda/host";

/// Folder of the nodes: `FAKE_CUDA_DEV`, or /dev.
fn folder() -> &'static str {
    static FOLDER: OnceLock<String> = OnceLock::new();
    FOLDER.get_or_init(|| env::var("FAKE_CUDA_DEV").unwrap_or_else(|_| "/dev".to_owned()))
}

/// The machine's name in the environment, which moves with the program.
fn host_variable() -> Option<&'static str> {
    static HOST: OnceLock<Option<String>> = OnceLock::new();
    HOST.get_or_init(|| env::var("FAKE_CUDA_HOST").ok()).as_deref()
}

/// Reads the environment while allocating is still harmless.
pub(crate) fn prepare() {
    folder();
    host_variable();
}

/// A path on the stack: the driver's thread must not allocate.
struct PathBuffer {
    bytes: [u8; 512],
    used: usize,
}

impl PathBuffer {
    fn new(parts: &[&str]) -> Option<Self> {
        let mut path = Self { bytes: [0; 512], used: 0 };
        for part in parts {
            let end = path.used + part.len();
            // the last byte stays NUL
            if end >= path.bytes.len() {
                return None;
            }
            path.bytes[path.used..end].copy_from_slice(part.as_bytes());
            path.used = end;
        }
        Some(path)
    }

    fn as_c_str(&self) -> Option<&CStr> {
        CStr::from_bytes_until_nul(&self.bytes).ok()
    }
}

/// A small number's digits.
fn digits(number: u32, buffer: &mut [u8; 10]) -> &str {
    let mut at = buffer.len();
    let mut rest = number;
    loop {
        at -= 1;
        buffer[at] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    str::from_utf8(&buffer[at..]).unwrap_or_default()
}

/// Opens `/dev/NAME`.
pub(crate) fn open(name: &str) -> Option<OwnedFd> {
    os::open(PathBuffer::new(&[folder(), "/", name])?.as_c_str()?, true)
}

/// Opens `/dev/nvidiaMINOR`.
pub(crate) fn open_gpu(minor: u32) -> Option<OwnedFd> {
    let mut buffer = [0; 10];
    os::open(PathBuffer::new(&[folder(), "/nvidia", digits(minor, &mut buffer)])?.as_c_str()?, true)
}

/// Minor numbers of possible nodes.
pub(crate) fn minors() -> impl Iterator<Item = u32> {
    0..u32::try_from(MAX_DEVICES).unwrap_or(0)
}

/// Minor numbers of existing nodes, even of those without access.
pub(crate) fn existing() -> Vec<u32> {
    minors().filter(|minor| Path::new(folder()).join(format!("nvidia{minor}")).exists()).collect()
}

/// The UUID of a GPU of this machine: a function of the machine's name and the minor number. The
/// name is `FAKE_CUDA_HOST`, else the content of /run/fake-cuda/host, else `a`.
pub(crate) fn uuid(minor: u32) -> [u8; 16] {
    let mut buffer = [0; 64];
    if let Some(host) = host_variable() {
        return uuid_on(host.as_bytes(), minor);
    }
    let text = os::open(HOST_FILE, false).map_or(&[][..], |file| os::read(file.as_fd(), &mut buffer)).trim_ascii();
    uuid_on(if text.is_empty() { b"a" } else { text }, minor)
}

fn uuid_on(host: &[u8], minor: u32) -> [u8; 16] {
    // FNV-1a, from two different starts
    let hash = |start: u64| {
        let bytes = host.iter().copied().chain(minor.to_le_bytes());
        bytes.fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    };
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&hash(0xcbf2_9ce4_8422_2325).to_be_bytes());
    uuid[8..].copy_from_slice(&hash(0x6c62_272e_07bb_0142).to_be_bytes());
    uuid
}

/// `GPU-` and the UUID in the usual form.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = "GPU-".to_owned();
    for (at, byte) in uuid.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The GPU of this machine with that UUID.
pub(crate) fn with_uuid(wanted: &[u8; 16]) -> Option<u32> {
    minors().find(|minor| uuid(*minor) == *wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_machines_and_two_minors_never_share_a_uuid() {
        let mut seen: Vec<_> =
            [b"a", b"b"].iter().flat_map(|host| minors().map(|minor| uuid_on(*host, minor))).collect();
        let all = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), all);
        assert!(uuid_text(&seen[0]).starts_with("GPU-"));
        assert_eq!(uuid_text(&[0x12; 16]), "GPU-12121212-1212-1212-1212-121212121212");
    }

    #[test]
    fn numbers_become_digits_without_allocating() {
        let mut buffer = [0; 10];
        assert_eq!(digits(0, &mut buffer), "0");
        assert_eq!(digits(15, &mut buffer), "15");
        assert_eq!(digits(u32::MAX, &mut buffer), "4294967295");
    }
}
