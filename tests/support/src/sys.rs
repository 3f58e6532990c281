//! Unsafe parts of the tests' programs.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{DELIVERED, VALUES};

/// Functions of this section are called before `main`.
#[used]
// SAFETY: the section holds pointers to functions of this kind, and the C library calls each once, in the first thread.
// What Rust's library sets up before `main` is not needed for what is played.
#[unsafe(link_section = ".init_array")]
static PLAY: extern "C" fn() = play;

extern "C" fn play() {
    super::play();
}

extern "C" fn count(signal: libc::c_int) {
    if let Some(counter) = usize::try_from(signal).ok().and_then(|signal| DELIVERED.get(signal)) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts each delivery of a signal.
pub fn count_signal(signal: libc::c_int) {
    let handler: extern "C" fn(libc::c_int) = count;
    // SAFETY: the handler only adds to a static atomic, which is allowed in a signal handler.
    let before = unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    assert_ne!(before, libc::SIG_ERR, "{}", io::Error::last_os_error());
}

/// Ends the calling thread silently.
pub fn end_thread() -> ! {
    loop {
        // SAFETY: ends this thread only. The program's other threads use nothing that it owns.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
}

/// Sleeps in one system call, restarted by the kernel if necessary. `false` after an interruption.
pub fn sleep_once(milliseconds: i64) -> bool {
    let time = libc::timespec { tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000 };
    // SAFETY: the time lives on this stack until the call returns, and nothing is written.
    unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) == 0 }
}

/// Queues a signal for a process: each real-time one is delivered.
pub fn queue_signal(pid: i32, signal: libc::c_int) -> io::Result<()> {
    let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
    // SAFETY: three numbers for another process.
    let done = unsafe { libc::sigqueue(pid, signal, value) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends a signal to one thread.
pub fn signal_thread(pid: i32, tid: i32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: three numbers. It signals a thread of another process, and touches no memory of this one.
    let done = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Returns whether a signal waits for the process or the calling thread, which blocks the signal.
pub fn is_pending(signal: libc::c_int) -> bool {
    let mut signals = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: a set of signals is written to a place for one.
    let done = unsafe { libc::sigpending(signals.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    // SAFETY: the call has written it, and it is a number's bits even without that.
    unsafe { libc::sigismember(signals.as_ptr(), signal) == 1 }
}

/// Loads a seccomp filter for this process's threads: this action for one system call, the others
/// are allowed.
pub fn filter(number: i64, action: u32) {
    let statement =
        |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, u32::try_from(number).unwrap()),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, action),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: numbers only.
    let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel reads the program, which lives until the call has returned.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// Computes with values in registers, and compares the results with the expected ones.
pub fn compute() -> ! {
    let pattern: [u8; 64] = std::array::from_fn(|at| u8::try_from(at).unwrap_or_default() ^ 0xa5);
    loop {
        VALUES[if is_kept(&pattern) { 0 } else { 7 }].fetch_add(1, Ordering::Relaxed);
    }
}

/// Returns whether vector registers keep a pattern while the program does nothing else for about a
/// millisecond.
#[cfg(target_arch = "x86_64")]
fn is_kept(pattern: &[u8; 64]) -> bool {
    use std::arch::{asm, is_x86_feature_detected};
    let mut kept = [[0_u8; 64]; 2];
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has these instructions. They read the pattern and write the two arrays, of 64 bytes each,
        // and all registers that they use are said, but those from 16 on, which nothing else here is compiled to use.
        unsafe {
            asm!(
                "vmovdqu64 zmm1, [{pattern}]", "vmovdqu64 zmm29, [{pattern}]",
                "2: dec {rounds}", "jnz 2b",
                "vmovdqu64 [{kept}], zmm1", "vmovdqu64 [{kept} + 64], zmm29", "vzeroupper",
                pattern = in(reg) pattern.as_ptr(), kept = in(reg) kept.as_mut_ptr(),
                rounds = inout(reg) 1_000_000_u64 => _, out("xmm1") _, options(nostack),
            );
        }
    } else if is_x86_feature_detected!("avx") {
        // SAFETY: as above, with the first 32 bytes of each.
        unsafe {
            asm!(
                "vmovdqu ymm1, [{pattern}]", "vmovdqu ymm13, [{pattern}]",
                "2: dec {rounds}", "jnz 2b",
                "vmovdqu [{kept}], ymm1", "vmovdqu [{kept} + 64], ymm13", "vzeroupper",
                pattern = in(reg) pattern.as_ptr(), kept = in(reg) kept.as_mut_ptr(),
                rounds = inout(reg) 1_000_000_u64 => _, out("xmm1") _, out("xmm13") _, options(nostack),
            );
        }
        return kept.iter().all(|kept| kept[..32] == pattern[..32]);
    } else {
        // SAFETY: as above, with the first 16 bytes of each.
        unsafe {
            asm!(
                "movdqu xmm1, [{pattern}]", "movdqu xmm13, [{pattern}]",
                "2: dec {rounds}", "jnz 2b",
                "movdqu [{kept}], xmm1", "movdqu [{kept} + 64], xmm13",
                pattern = in(reg) pattern.as_ptr(), kept = in(reg) kept.as_mut_ptr(),
                rounds = inout(reg) 1_000_000_u64 => _, out("xmm1") _, out("xmm13") _, options(nostack),
            );
        }
        return kept.iter().all(|kept| kept[..16] == pattern[..16]);
    }
    kept.iter().all(|kept| kept == pattern)
}

#[cfg(not(target_arch = "x86_64"))]
fn is_kept(pattern: &[u8; 64]) -> bool {
    std::hint::black_box(pattern)[0] == 0xa5
}

/// Maps new memory, for good; `flags` are added to `mmap`'s for private memory.
pub fn map_words(length: u64, flags: libc::c_int) -> &'static [AtomicU64] {
    let length = usize::try_from(length).unwrap();
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0) };
    assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    // SAFETY: it is mapped, aligned and zero, so initialised, and never unmapped; others change it only as atomics can be
    // changed, or behind this process's back, which an atomic allows too.
    unsafe { std::slice::from_raw_parts(address.cast(), length / size_of::<AtomicU64>()) }
}

/// Ends this process at once. Codes from 128 on look like an end by a signal.
pub fn exit(code: libc::c_int) -> ! {
    // SAFETY: ends this process. Nothing of it is used after.
    unsafe { libc::_exit(code) }
}

/// Gives the calling thread a stack for signal handlers; returns the address.
pub fn set_alternate_stack() -> usize {
    let memory = Box::leak(Box::new([0_u8; 65536]));
    let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
    // SAFETY: the memory is leaked, so it is there as long as the thread, and nobody else uses it.
    let done = unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    memory.as_ptr() as usize
}

/// Address of the calling thread's stack for signal handlers.
pub fn alternate_stack() -> usize {
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: nothing is set, and what is written fits: it is of the type that the call fills.
    let done = unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    stack.ss_sp as usize
}
