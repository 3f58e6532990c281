//! Registers, instructions and signal frames of x86-64.
//!
//! Sizes and offsets are those of the kernel's arch/x86/include/uapi/asm/sigcontext.h and ucontext.h, and of the XSAVE
//! area in Intel's manual, volume 1, chapter 13.

use std::arch::x86_64::__cpuid_count;
use std::io;

use nix::sys::ptrace;
use nix::unistd::Pid;

use super::{Code, Frame};
use crate::hold::sys;

/// Below the stack pointer, what a function may use without saying so.
const RED_ZONE: u64 = 128;

/// `syscall; ret`
const CALL: [u8; 3] = [0x0f, 0x05, 0xc3];

/// `mov $15, %rax; syscall` and `mov $15, %eax; syscall`: what C libraries give the kernel to return from a signal.
const SIGRETURNS: [&[u8]; 2] = [&[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05], &[0xb8, 15, 0, 0, 0, 0x0f, 0x05]];

/// The size of a return address and a `struct ucontext`.
const FRAME: u64 = 8 + 304;

/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`
const FLAGS: u64 = 7;

/// Not a valid mode of an alternate signal stack. The kernel ignores such a one on return, and the thread keeps its own.
const NO_MODE: u64 = 0x70;

/// The code segment of 64-bit programs.
const USER_CS: u64 = 0x33;

/// `FP_XSTATE_MAGIC1` and `FP_XSTATE_MAGIC2`
const MAGICS: [u32; 2] = [0x4650_5853, 0x4650_5845];

/// Place of the kernel's own words in the legacy part of an XSAVE area.
const SOFTWARE: usize = 464;

/// The size of the legacy part of an XSAVE area, and of that with the header.
const LEGACY: usize = 512;
const HEADER: usize = 576;

/// The one part of the state, AMX tiles, for which a thread has room only once it has used it.
const TILES: u64 = 1 << 18;

/// `NT_X86_XSTATE`
const XSTATE: libc::c_int = 0x202;

/// Bytes with room for the largest known XSAVE area, with tiles.
const XSTATE_MAX: usize = 16 * 1024;

/// Returns of the kernel for a system call that is restarted if no handler runs: `ERESTARTSYS`, `ERESTARTNOINTR`,
/// `ERESTARTNOHAND`, `ERESTART_RESTARTBLOCK`.
const RESTARTS: [i64; 4] = [-512, -513, -514, -516];

/// The state of a thread that stands still.
#[derive(Clone, Debug)]
pub(super) struct State {
    registers: libc::user_regs_struct,
    /// An XSAVE area; empty if it cannot be had.
    extended: Vec<u8>,
}

impl State {
    /// Reads it.
    pub(super) fn of(tid: i32) -> io::Result<Self> {
        let registers = ptrace::getregs(Pid::from_raw(tid))?;
        let mut extended = vec![0; XSTATE_MAX];
        let length = sys::register_set(tid, XSTATE, &mut extended).unwrap_or(0);
        extended.truncate(length);
        Ok(Self { registers, extended })
    }

    /// Gives it back to the thread. The extended state has not changed: the kernel keeps it over system calls.
    pub(super) fn put(&self, tid: i32) -> io::Result<()> {
        ptrace::setregs(Pid::from_raw(tid), self.registers)?;
        Ok(())
    }

    /// Whether it is a 64-bit program's.
    pub(super) fn is_native(&self) -> bool {
        self.registers.cs == USER_CS
    }

    /// Whether the thread is in a system call.
    pub(super) fn is_in_syscall(&self) -> bool {
        self.registers.orig_rax.cast_signed() >= 0
    }

    /// The address of the next instruction.
    pub(super) fn instruction(&self) -> u64 {
        self.registers.rip
    }

    /// Lets it go on at another address.
    pub(super) fn jump(&mut self, address: u64) {
        self.registers.rip = address;
    }

    /// The stack pointer.
    pub(super) fn stack(&self) -> u64 {
        self.registers.rsp
    }

    /// Returns an address below which the stack has room for something else.
    pub(super) fn below_stack(&self) -> Option<u64> {
        self.registers.rsp.checked_sub(RED_ZONE)
    }

    /// A frame that ends before `end`, with room for `scratch` bytes in it, that a return from a signal makes this state
    /// of; `mask` are the signals to block.
    pub(super) fn frame(&self, end: u64, sigreturn: u64, mask: u64, scratch: u64) -> Option<Frame> {
        let extended = self.signal_extended()?;
        let state = end.checked_sub(u64::try_from(extended.len()).ok()?)? & !63;
        let scratch = state.checked_sub(scratch)? & !15;
        let start = scratch.checked_sub(FRAME)? & !15;
        let mut bytes = vec![];
        for word in self.words(sigreturn, mask, state) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.resize(usize::try_from(state - start).ok()?, 0);
        bytes.extend(extended);
        Some(Frame { start, scratch, bytes })
    }

    /// A `struct rt_sigframe` as far as it is read: a return address, and a `struct ucontext`.
    fn words(&self, sigreturn: u64, mask: u64, extended: u64) -> Vec<u64> {
        let r = self.resumed();
        // cs, gs, fs and ss, 16 bits each.
        let segments = (r.cs & 0xffff) | (r.ss & 0xffff) << 48;
        let mut words = vec![sigreturn, FLAGS, 0, 0, NO_MODE, 0];
        words.extend([r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]);
        words.extend([r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags]);
        words.extend([segments, 0, 0, 0, 0, extended]);
        words.extend([0; 8]);
        words.push(mask);
        words
    }

    /// The registers with which the thread's program goes on. The kernel would restart an interrupted system call; a
    /// return from a signal does not. A call that it would restart with the rest of its time gets all of it again: what
    /// the kernel knows of the rest is lost by a return from a signal, and a program need not expect EINTR.
    fn resumed(&self) -> libc::user_regs_struct {
        let mut registers = self.registers;
        if self.is_in_syscall() && RESTARTS.contains(&registers.rax.cast_signed()) {
            registers.rax = registers.orig_rax;
            registers.rip = registers.rip.wrapping_sub(2);
        }
        registers
    }

    /// The XSAVE area as a signal frame has it.
    fn signal_extended(&self) -> Option<Vec<u8>> {
        let word = |at: usize| self.extended.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
        let (available, used) = (word(SOFTWARE)?, word(LEGACY)?);
        // A thread without tiles has no room for them, and the kernel refuses to read more than there is room for.
        let features = if used & TILES == 0 { available & !TILES } else { available };
        let size = area_size(features);
        let mut area = self.extended.get(..size)?.to_vec();
        let size = u32::try_from(size).ok()?;
        let mut software = vec![];
        software.extend(MAGICS[0].to_ne_bytes());
        software.extend((size + 4).to_ne_bytes());
        software.extend(features.to_ne_bytes());
        software.extend(size.to_ne_bytes());
        software.resize(LEGACY - SOFTWARE, 0);
        area.get_mut(SOFTWARE..LEGACY)?.copy_from_slice(&software);
        area.extend(MAGICS[1].to_ne_bytes());
        Some(area)
    }

    /// Sets a thread's registers so that it would do nothing but return through the frame.
    pub(super) fn park(&self, tid: i32, code: &Code, stack: u64) -> io::Result<()> {
        let mut registers = self.registers;
        registers.rip = code.call + 2;
        registers.rsp = stack;
        // No system call, so none to restart.
        registers.orig_rax = u64::MAX;
        ptrace::setregs(Pid::from_raw(tid), registers)?;
        Ok(())
    }

    /// Sets a thread's registers so that it makes a system call, and returns through what is at `stack`.
    pub(super) fn call(&self, tid: i32, code: &Code, stack: u64, number: i64, arguments: [u64; 6]) -> io::Result<()> {
        let mut registers = self.registers;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = arguments;
        registers.rax = number.cast_unsigned();
        registers.rip = code.call;
        registers.rsp = stack;
        registers.orig_rax = u64::MAX;
        ptrace::setregs(Pid::from_raw(tid), registers)?;
        Ok(())
    }
}

/// Changes an argument of the system call at whose beginning a thread stands.
pub(crate) fn set_argument(tid: i32, index: usize, value: u64) -> io::Result<()> {
    let mut registers = ptrace::getregs(Pid::from_raw(tid))?;
    let r = &mut registers;
    let mut arguments = [&mut r.rdi, &mut r.rsi, &mut r.rdx, &mut r.r10, &mut r.r8, &mut r.r9];
    **arguments.get_mut(index).ok_or(io::ErrorKind::InvalidInput)? = value;
    ptrace::setregs(Pid::from_raw(tid), registers)?;
    Ok(())
}

/// Returns the result of the system call that a thread has just left.
pub(super) fn result(tid: i32) -> io::Result<i64> {
    Ok(ptrace::getregs(Pid::from_raw(tid))?.rax.cast_signed())
}

/// Returns the place in `text` of a system call that returns right after.
pub(super) fn find_call(text: &[u8]) -> Option<usize> {
    find(text, &CALL)
}

/// Returns the place in `text` of a system call, whatever comes after.
pub(super) fn find_bare_call(text: &[u8]) -> Option<usize> {
    find(text, &CALL[..2])
}

/// Returns the place in `text` where a signal returns.
pub(super) fn find_sigreturn(text: &[u8]) -> Option<usize> {
    SIGRETURNS.into_iter().find_map(|sequence| find(text, sequence))
}

fn find(text: &[u8], sequence: &[u8]) -> Option<usize> {
    text.windows(sequence.len()).position(|window| window == sequence)
}

/// The size of an XSAVE area, not compacted, that has these features.
fn area_size(features: u64) -> usize {
    let end = |feature: u32| {
        // Leaf 13: the size and the offset of each feature above the two of the legacy part.
        let leaf = __cpuid_count(0xd, feature);
        leaf.eax.saturating_add(leaf.ebx) as usize
    };
    (2..63).filter(|feature| features >> feature & 1 == 1).map(end).fold(HEADER, usize::max)
}
