//! Seccomp profiles compiled to programs for the kernel.
//!
//! libseccomp takes 15 ms for the profile of most containers, more than all other work for a
//! process. So programs are kept in files, for later containers and processes. Each file holds the
//! profile for comparison: file names can collide, and a filter must not be another profile's.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall, ScmpVersion};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};
use rustix::fs::MemfdFlags;

use super::error::{Context, Failure, Result};

/// Folder for programs; gone with the next boot, like the kernel.
const FOLDER: &str = "/run/gpusnap/seccomp";
/// Number of programs kept. Nodes have a handful of profiles; with a profile per container, more
/// files would not help.
const KEPT: usize = 64;
/// Largest file: a profile of some ten thousand bytes, and at most 4096 instructions.
const FILE_LIMIT: u64 = 1 << 20;

/// Returns the program for a profile.
pub(super) fn program(profile: &LinuxSeccomp) -> Result<Vec<u64>> {
    let key = key(profile)?;
    let path = Path::new(FOLDER).join(format!("{:016x}", hash(&key)));
    if let Some(program) = recall(&path, &key) {
        return Ok(program);
    }
    let program = compile(profile)?;
    // The next container has to compile the profile too then.
    if let Err(error) = keep(&path, &key, &program) {
        tracing::debug!("cannot keep a seccomp program in {}: {error}", path.display());
    }
    Ok(program)
}

/// Returns all inputs of a program.
fn key(profile: &LinuxSeccomp) -> Result<Vec<u8>> {
    let version = ScmpVersion::current().context(|| "tell the version of libseccomp")?;
    let mut key = format!("{} {version} {}\n", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH).into_bytes();
    serde_json::to_writer(&mut key, profile).context(|| "write down the seccomp profile")?;
    Ok(key)
}

/// Returns the FNV-1a hash for a file's name; the file's contents decide.
fn hash(key: &[u8]) -> u64 {
    key.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Reads a file: the length of the key, the key, the program.
fn recall(path: &Path, key: &[u8]) -> Option<Vec<u64>> {
    let file = File::open(path).ok()?;
    let metadata = file.metadata().ok()?;
    // Only our own files may decide about a container's rights.
    let is_own = metadata.uid() == rustix::process::geteuid().as_raw() && metadata.permissions().mode() & 0o022 == 0;
    if !is_own || !metadata.is_file() || metadata.len() > FILE_LIMIT {
        return None;
    }
    let mut content = Vec::new();
    file.take(FILE_LIMIT).read_to_end(&mut content).ok()?;
    let (length, content) = content.split_at_checked(size_of::<u64>())?;
    let length = usize::try_from(u64::from_ne_bytes(length.try_into().ok()?)).ok()?;
    let (kept, program) = content.split_at_checked(length)?;
    if kept != key {
        return None;
    }
    instructions(program).filter(|program| !program.is_empty())
}

fn keep(path: &Path, key: &[u8], program: &[u64]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let kept: Vec<PathBuf> = fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
    if kept.len() >= KEPT {
        kept.iter().try_for_each(fs::remove_file)?;
    }
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    let length = u64::try_from(key.len()).map_err(io::Error::other)?;
    file.write_all(&length.to_ne_bytes())?;
    file.write_all(key)?;
    program.iter().try_for_each(|instruction| file.write_all(&instruction.to_ne_bytes()))?;
    file.persist(path)?;
    Ok(())
}

fn instructions(bytes: &[u8]) -> Option<Vec<u64>> {
    let (whole, rest) = bytes.as_chunks::<8>();
    rest.is_empty().then(|| whole.iter().map(|&instruction| u64::from_ne_bytes(instruction)).collect())
}

fn compile(profile: &LinuxSeccomp) -> Result<Vec<u64>> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).context(|| "make a seccomp filter")?;
    for &architecture in profile.architectures().iter().flatten() {
        filter
            .add_arch(self::architecture(architecture))
            .context(|| format!("add {architecture:?} to a seccomp filter"))?;
    }
    let mut newest = None;
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        let conditions: Vec<ScmpArgCompare> = rule.args().iter().flatten().map(condition).collect::<Result<_>>()?;
        for name in rule.names() {
            // Unknown to libseccomp: answered like every unknown call.
            let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
            // libseccomp's own numbers, for calls of other architectures, are negative.
            newest = newest.max(u32::try_from(i32::from(syscall)).ok());
            // libseccomp refuses a rule equal to the default.
            if action != default {
                add(&mut filter, action, syscall, rule.args().as_deref(), &conditions)
                    .context(|| format!("add a rule for {name} to a seccomp filter"))?;
            }
        }
    }
    let mut program = newest.filter(|&newest| has_unknowns(profile, newest)).map(unknown).unwrap_or_default();
    let mut file = File::from(
        rustix::fs::memfd_create("gpusnap-seccomp", MemfdFlags::CLOEXEC)
            .context(|| "make a file for a seccomp filter")?,
    );
    filter.export_bpf(&file).context(|| "compile a seccomp filter")?;
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).context(|| "read a seccomp filter")?;
    program.extend(instructions(&bytes).ok_or_else(|| Failure::new("libseccomp made half an instruction"))?);
    Ok(program)
}

/// Adds a rule. All conditions of one rule must hold. libseccomp cannot join several on one
/// argument: as in runc, each becomes a rule then.
fn add(
    filter: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    arguments: Option<&[LinuxSeccompArg]>,
    conditions: &[ScmpArgCompare],
) -> std::result::Result<(), libseccomp::error::SeccompError> {
    let mut indices: Vec<usize> = arguments.into_iter().flatten().map(LinuxSeccompArg::index).collect();
    indices.sort_unstable();
    if conditions.is_empty() {
        filter.add_rule(action, syscall)?;
    } else if indices.is_sorted_by(|a, b| a < b) {
        filter.add_rule_conditional(action, syscall, conditions)?;
    } else {
        for condition in conditions {
            filter.add_rule_conditional(action, syscall, std::slice::from_ref(condition))?;
        }
    }
    Ok(())
}

fn condition(argument: &LinuxSeccompArg) -> Result<ScmpArgCompare> {
    let index = u32::try_from(argument.index()).context(|| "count the arguments of a system call")?;
    let comparison = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
        LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
        LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
        LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
        // Here the first value is the mask, and the second the value to compare.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let value = argument.value_two().unwrap_or_default();
            return Ok(ScmpArgCompare::new(index, ScmpCompareOp::MaskedEqual(argument.value()), value));
        }
    };
    Ok(ScmpArgCompare::new(index, comparison, argument.value()))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = i32::try_from(errno.unwrap_or(libc::EPERM.unsigned_abs())).context(|| "read an errno of a profile")?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(errno).context(|| "read an errno of a profile")?)
        }
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        // Profiles with this action are handled elsewhere, without a program.
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Failure::new("a profile with a listener cannot be compiled here"));
        }
    })
}

fn architecture(architecture: Arch) -> ScmpArch {
    match architecture {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// Returns whether system calls newer than `newest` get ENOSYS.
///
/// An allowlist refuses everything else. For a system call newer than the profile this is the wrong
/// answer: the C library in the container takes EPERM for a refusal, but would do without after
/// ENOSYS. runc does the same. From number 424 on all architectures have the same numbers.
fn has_unknowns(profile: &LinuxSeccomp, newest: u32) -> bool {
    let refuses = match profile.default_action() {
        LinuxSeccompAction::ScmpActErrno => profile.default_errno_ret() != Some(libc::ENOSYS.unsigned_abs()),
        LinuxSeccompAction::ScmpActKill
        | LinuxSeccompAction::ScmpActKillThread
        | LinuxSeccompAction::ScmpActKillProcess
        | LinuxSeccompAction::ScmpActTrap => true,
        // A tracer knows better, and the others do not refuse.
        LinuxSeccompAction::ScmpActTrace
        | LinuxSeccompAction::ScmpActAllow
        | LinuxSeccompAction::ScmpActLog
        | LinuxSeccompAction::ScmpActNotify => false,
    };
    refuses && newest >= 424
}

/// Returns the beginning of a program: ENOSYS for newer calls, else on to the following code.
fn unknown(newest: u32) -> Vec<u64> {
    vec![
        // The number is the first member of struct seccomp_data.
        instruction(LOAD, 0, 0, 0),
        instruction(AND, 0, 0, !X32),
        instruction(JUMP_IF_GREATER, 0, 1, newest),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
    ]
}

/// Mark of x32 numbers, otherwise equal to those of x86-64.
pub(super) const X32: u32 = 0x4000_0000;
/// BPF_LD | BPF_W | BPF_ABS
pub(super) const LOAD: u16 = 0x20;
/// BPF_ALU | BPF_AND | BPF_K
pub(super) const AND: u16 = 0x54;
/// BPF_JMP | BPF_JEQ | BPF_K
pub(super) const JUMP_IF_EQUAL: u16 = 0x15;
/// BPF_JMP | BPF_JGT | BPF_K
pub(super) const JUMP_IF_GREATER: u16 = 0x25;
/// BPF_JMP | BPF_JGE | BPF_K
pub(super) const JUMP_IF_AT_LEAST: u16 = 0x35;
/// BPF_RET | BPF_K
pub(super) const RETURN: u16 = 0x06;

/// Returns a `struct sock_filter` (linux/filter.h) in memory order. Jumps count the following
/// instructions.
pub(super) fn instruction(code: u16, if_true: u8, if_false: u8, operand: u32) -> u64 {
    let [c0, c1] = code.to_ne_bytes();
    let [k0, k1, k2, k3] = operand.to_ne_bytes();
    u64::from_ne_bytes([c0, c1, if_true, if_false, k0, k1, k2, k3])
}

#[cfg(test)]
pub(super) mod tests {
    use oci_spec::runtime::{LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSyscall, LinuxSyscallBuilder};

    use super::*;

    pub(in super::super) const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | 1;
    const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | 38;

    /// Runs a program as the kernel would, for a system call of this machine.
    fn run(program: &[u64], number: i64, argument: u64) -> u32 {
        let architecture: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };
        run_call(program, architecture, u32::try_from(number).unwrap(), [argument, 0, 0])
    }

    pub(in super::super) fn run_call(program: &[u64], architecture: u32, number: u32, arguments: [u64; 3]) -> u32 {
        let mut data = [0u8; 64];
        data[..4].copy_from_slice(&number.to_ne_bytes());
        data[4..8].copy_from_slice(&architecture.to_ne_bytes());
        for (place, argument) in data[16..].chunks_mut(8).zip(arguments) {
            place.copy_from_slice(&argument.to_ne_bytes());
        }
        let mut accumulator = 0u32;
        let mut next = 0;
        loop {
            let [c0, c1, jt, jf, k0, k1, k2, k3] = program[next].to_ne_bytes();
            let operand = u32::from_ne_bytes([k0, k1, k2, k3]);
            next += 1;
            let mut jump = |condition: bool| next += usize::from(if condition { jt } else { jf });
            match u16::from_ne_bytes([c0, c1]) {
                0x20 => {
                    let at = usize::try_from(operand).unwrap();
                    accumulator = u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
                }
                0x54 => accumulator &= operand,
                0x05 => next += usize::try_from(operand).unwrap(),
                0x15 => jump(accumulator == operand),
                0x25 => jump(accumulator > operand),
                0x35 => jump(accumulator >= operand),
                0x06 => return operand,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn rule(
        action: LinuxSeccompAction,
        names: &[&str],
        arguments: &[(LinuxSeccompOperator, u64, u64)],
    ) -> LinuxSyscall {
        let names = names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let arguments: Vec<LinuxSeccompArg> = arguments
            .iter()
            .map(|&(operator, one, two)| {
                LinuxSeccompArgBuilder::default().index(0_usize).op(operator).value(one).value_two(two).build().unwrap()
            })
            .collect();
        LinuxSyscallBuilder::default().names(names).action(action).args(arguments).build().unwrap()
    }

    fn profile(default: LinuxSeccompAction, rules: Vec<LinuxSyscall>) -> LinuxSeccomp {
        LinuxSeccompBuilder::default()
            .default_action(default)
            .architectures(vec![Arch::ScmpArchNative])
            .syscalls(rules)
            .build()
            .unwrap()
    }

    fn listed(rules: Vec<LinuxSyscall>) -> LinuxSeccomp {
        profile(LinuxSeccompAction::ScmpActErrno, rules)
    }

    #[test]
    fn listed_calls_are_allowed_and_all_others_refused() {
        let program =
            compile(&listed(vec![rule(LinuxSeccompAction::ScmpActAllow, &["read", "no_such"], &[])])).unwrap();
        assert_eq!(run(&program, libc::SYS_read, 0), ALLOW);
        assert_eq!(run(&program, libc::SYS_write, 0), REFUSE);
        assert_eq!(run(&program, libc::SYS_openat2, 0), REFUSE);
    }

    #[test]
    fn a_masked_comparison_masks_by_the_first_value() {
        // containerd's rule against new user namespaces.
        let namespaces = 0x7e02_0000;
        let masked = (LinuxSeccompOperator::ScmpCmpMaskedEq, namespaces, 0);
        let program = compile(&listed(vec![rule(LinuxSeccompAction::ScmpActAllow, &["clone"], &[masked])])).unwrap();
        assert_eq!(run(&program, libc::SYS_clone, 17), ALLOW);
        assert_eq!(run(&program, libc::SYS_clone, 0x1000_0000 | 17), REFUSE);
    }

    #[test]
    fn several_conditions_on_one_argument_are_alternatives() {
        let conditions = [(LinuxSeccompOperator::ScmpCmpEq, 3, 0), (LinuxSeccompOperator::ScmpCmpEq, 5, 0)];
        let program = compile(&listed(vec![rule(LinuxSeccompAction::ScmpActAllow, &["close"], &conditions)])).unwrap();
        assert_eq!([3, 4, 5].map(|argument| run(&program, libc::SYS_close, argument)), [ALLOW, REFUSE, ALLOW]);
    }

    #[test]
    fn what_is_newer_than_the_profile_is_unknown() {
        let program = compile(&listed(vec![rule(LinuxSeccompAction::ScmpActAllow, &["openat2"], &[])])).unwrap();
        assert_eq!(run(&program, libc::SYS_openat2, 0), ALLOW);
        assert_eq!(run(&program, libc::SYS_openat2 + 1, 0), UNKNOWN);
        assert_eq!(run(&program, libc::SYS_read, 0), REFUSE);
        assert_eq!(run(&program, 1 << 29, 0), UNKNOWN);
    }

    #[test]
    fn a_denylist_has_no_unknown_calls() {
        let refused = rule(LinuxSeccompAction::ScmpActErrno, &["openat2"], &[]);
        let program = compile(&profile(LinuxSeccompAction::ScmpActAllow, vec![refused])).unwrap();
        assert_eq!(run(&program, libc::SYS_openat2, 0), REFUSE);
        assert_eq!(run(&program, libc::SYS_openat2 + 1, 0), ALLOW);
    }

    #[test]
    fn a_program_is_recalled_only_for_its_profile() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("folder/name");
        assert_eq!(recall(&path, b"one"), None);
        keep(&path, b"one", &[1, 2, 3]).unwrap();
        assert_eq!(recall(&path, b"one"), Some(vec![1, 2, 3]));
        assert_eq!(recall(&path, b"two"), None);
        // Nor from a file writable for others.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(recall(&path, b"one"), None);
    }

    #[test]
    fn half_a_file_is_no_program() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("name");
        keep(&path, b"one", &[1]).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(recall(&path, b"one"), None, "{length} bytes");
        }
    }

    #[test]
    fn programs_do_not_pile_up() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..KEPT + 3 {
            keep(&folder.path().join(number.to_string()), b"key", &[1]).unwrap();
        }
        assert!(fs::read_dir(folder.path()).unwrap().count() <= KEPT);
    }
}
