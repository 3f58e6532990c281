//! A seccomp filter of gpusnap's own, for containers that may be saved.
//!
//! Some system calls make what CRIU cannot save, though programs do without: most kernels lack them or
//! have them switched off, so every program has another way. The filter answers them as such a kernel
//! does ([ADR 20](../../../../../docs/adr/0020-containers-are-prepared-by-a-filter.md)):
//!
//! | call | answer | made otherwise | users, and their other way |
//! |---|---|---|---|
//! | `io_uring_setup`, `_enter`, `_register` | ENOSYS | rings that CRIU refuses | libuv (Node, uvloop, TCPStore of torch), .NET: epoll and threads |
//! | `socket(.., IPPROTO_MPTCP)` | EPROTONOSUPPORT | a socket that CRIU refuses | every Go server since 1.24: TCP |
//! | `memfd_secret` | ENOSYS | memory that CRIU cannot read | off by default before Linux 6.5: mlock |
//!
//! The filter is one of its own beside the container's profile, loaded first. Of several answers the
//! kernel takes the strictest, so that the profile's refusals stay as they are.

use super::filter::{AND, JUMP_IF_AT_LEAST, JUMP_IF_EQUAL, JUMP_IF_GREATER, LOAD, RETURN, X32, instruction};

/// Calls of io_uring, with the same numbers on all architectures since Linux 5.1.
const IO_URING: (u32, u32) = (425, 427);
/// Likewise, since Linux 5.14.
const MEMFD_SECRET: u32 = 447;
/// The number of `socket`, and the architecture with that number: AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64 of
/// linux/audit.h.
const SOCKET: u32 = if cfg!(target_arch = "x86_64") { 41 } else { 198 };
const ARCHITECTURE: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };

/// Places in `struct seccomp_data` (linux/seccomp.h). Both architectures are little-endian.
const NUMBER: u32 = 0;
const AT_ARCHITECTURE: u32 = 4;
const THIRD_ARGUMENT: u32 = 32;

/// Returns the program. Most calls pass after four comparisons; the kernel remembers calls that pass
/// whatever their arguments are (Linux 5.11), and then does not run it.
pub(super) fn program() -> Vec<u64> {
    let answer = |errno: i32| instruction(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno.unsigned_abs());
    let mptcp = libc::IPPROTO_MPTCP.unsigned_abs();
    vec![
        instruction(LOAD, 0, 0, NUMBER),
        instruction(AND, 0, 0, !X32),
        instruction(JUMP_IF_EQUAL, 3, 0, SOCKET),
        instruction(JUMP_IF_EQUAL, 8, 0, MEMFD_SECRET),
        instruction(JUMP_IF_AT_LEAST, 0, 5, IO_URING.0),
        instruction(JUMP_IF_GREATER, 4, 6, IO_URING.1),
        // socket
        instruction(LOAD, 0, 0, AT_ARCHITECTURE),
        instruction(JUMP_IF_EQUAL, 0, 2, ARCHITECTURE),
        instruction(LOAD, 0, 0, THIRD_ARGUMENT),
        instruction(JUMP_IF_EQUAL, 1, 0, mptcp),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        answer(libc::EPROTONOSUPPORT),
        answer(libc::ENOSYS),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::filter::tests::{ALLOW, run_call};
    use super::*;

    fn run(number: i64, arguments: [u64; 3]) -> u32 {
        run_call(&program(), ARCHITECTURE, u32::try_from(number).unwrap(), arguments)
    }

    const TCP: u64 = 6;
    const MPTCP: u64 = 262;
    const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | 38;
    const NO_PROTOCOL: u32 = libc::SECCOMP_RET_ERRNO | 93;

    #[test]
    fn calls_that_make_what_cannot_be_saved_are_unknown_to_the_container() {
        for number in [425, 426, 427, 447] {
            assert_eq!(run(number, [0; 3]), UNKNOWN, "{number}");
            assert_eq!(run(number | 0x4000_0000, [0; 3]), UNKNOWN, "x32 {number}");
            // Of a 32-bit program.
            assert_eq!(run_call(&program(), 0x4000_0003, u32::try_from(number).unwrap(), [0; 3]), UNKNOWN, "{number}");
        }
    }

    #[test]
    fn all_other_calls_pass() {
        for number in (0..=500).filter(|number| !matches!(number, 425..=427 | 447)) {
            assert_eq!(run(number, [2, 1, TCP]), ALLOW, "{number}");
        }
    }

    #[test]
    fn sockets_of_mptcp_are_refused_as_by_a_kernel_without_it() {
        assert_eq!(run(libc::SYS_socket, [2, 1, MPTCP]), NO_PROTOCOL);
        assert_eq!(run(libc::SYS_socket, [10, 1, MPTCP]), NO_PROTOCOL);
        assert_eq!(run(libc::SYS_socket, [2, 1, TCP]), ALLOW);
        // The number means another call there.
        assert_eq!(run_call(&program(), 0x4000_0003, SOCKET, [2, 1, MPTCP]), ALLOW);
    }
}
