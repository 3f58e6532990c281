//! Reading packs before they are needed.

use std::num::NonZeroU64;

use rustix::fs::Advice;

use crate::control::Control;
use crate::pack::Pack;

/// Bytes that are asked for at a time: the kernel reads no more ahead for one call than the device's readahead, 128 KiB
/// unless set otherwise.
const STEP: NonZeroU64 = NonZeroU64::new(128 << 10).expect("it is not 0");

/// Has packs read into the page cache, in their order, until `limit` bytes have been asked for. Returns how many were.
///
/// It does not wait for what it asks for, but for room in the device's queue. What is there already costs next to nothing.
pub fn prefetch(packs: &[Pack], limit: u64, control: &Control) -> u64 {
    let mut asked = 0;
    for pack in packs {
        let mut offset = 0;
        while offset < pack.data_length() {
            let length = STEP.get().min(pack.data_length() - offset);
            if asked + length > limit || control.check().is_err() {
                return asked;
            }
            // Advice that is not taken is no harm: it is read later.
            let _ = rustix::fs::fadvise(pack.file(), offset, NonZeroU64::new(length), Advice::WillNeed);
            asked += length;
            offset += length;
            control.add(length);
        }
    }
    asked
}
