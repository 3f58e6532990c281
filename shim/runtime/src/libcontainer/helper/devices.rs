//! Access of a container to devices.
//!
//! On cgroup v1 the kernel keeps a list for each cgroup, written by libcgroups. On v2 the kernel
//! asks a program attached to the cgroup. The program is made here, because libcgroups makes none
//! for systemd's cgroups, and narrows the program at each update. libcgroups also sets the
//! container's limit of locked memory on the way.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxResources};

use super::error::{Context, Failure, Result};
use crate::libcontainer::sys;

// Bits and numbers of `struct bpf_cgroup_dev_ctx` (linux/bpf.h).
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MAKE | READ | WRITE;
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// A rule of several; the last match counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// [`BLOCK`] or [`CHARACTER`].
    kind: i32,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// The rules of a container, and the default without a match.
#[derive(Debug, PartialEq, Eq)]
struct Rules {
    default_allow: bool,
    rules: Vec<Rule>,
}

/// Devices allowed for every container: null, zero, full, random, urandom, tty, console, ptmx, and
/// any terminal.
const EVERYBODYS: [(i32, Option<i32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// Writes out runc's default: no device is allowed without a rule. Otherwise a v1 cgroup would keep
/// its parent's list.
pub(super) fn complete(resources: &mut LinuxResources) -> Result<()> {
    let devices = resources.devices_mut().get_or_insert_default();
    for device in devices.iter_mut() {
        // The kernel's list writes "any" otherwise.
        let any = |number: Option<i64>| number.filter(|&number| number >= 0);
        let (major, minor) = (any(device.major()), any(device.minor()));
        device.set_major(major).set_minor(minor);
    }
    if !devices.first().is_some_and(is_for_all) {
        let nothing = LinuxDeviceCgroupBuilder::default().allow(false).typ(LinuxDeviceType::A).access("rwm").build()?;
        devices.insert(0, nothing);
    }
    Ok(())
}

/// Removes devices at a place already taken by an earlier one.
pub(super) fn list_once(linux: &mut Linux) {
    let mut places = HashSet::new();
    if let Some(devices) = linux.devices_mut() {
        // Compared by components: a path can be written in several ways.
        devices.retain(|device| places.insert(device.path().components().collect::<PathBuf>()));
    }
}

/// Attaches the program for these rules to a v2 cgroup.
pub(super) fn confine(directory: &Path, devices: &[LinuxDeviceCgroup]) -> Result<()> {
    let rules = Rules::new(devices)?;
    if rules == (Rules { default_allow: true, rules: Vec::new() }) {
        return Ok(());
    }
    let action = || format!("confine the devices of {}", directory.display());
    let program = sys::load_device_program(&rules.program()).context(action)?;
    let directory = File::open(directory).context(action)?;
    sys::attach_device_program(directory.as_fd(), program.as_fd()).context(action)
}

fn is_for_all(device: &LinuxDeviceCgroup) -> bool {
    device.typ().unwrap_or_default() == LinuxDeviceType::A
}

impl Rules {
    fn new(devices: &[LinuxDeviceCgroup]) -> Result<Self> {
        let mut all = Self { default_allow: false, rules: Vec::new() };
        for device in devices {
            if is_for_all(device) {
                // As on v1: such a rule covers everything, and the rules before it are forgotten.
                all = Self { default_allow: device.allow(), rules: Vec::new() };
            } else {
                all.rules.extend(Rule::new(device)?);
            }
        }
        if !all.default_allow {
            let rule = |kind, major, minor, access| Rule { allow: true, kind, major, minor, access };
            all.rules.push(rule(CHARACTER, None, None, MAKE));
            all.rules.push(rule(BLOCK, None, None, MAKE));
            all.rules.extend(EVERYBODYS.map(|(major, minor)| rule(CHARACTER, Some(major), minor, ALL)));
        }
        Ok(all)
    }

    /// Returns a program with the result 1 for allowed access.
    fn program(&self) -> Vec<u64> {
        let mut program = vec![
            load(KIND, 0),
            move_register(WANTED, KIND),
            and(KIND, 0xffff),
            shift_right(WANTED, 16),
            load(MAJOR, 4),
            load(MINOR, 8),
        ];
        for rule in self.rules.iter().rev() {
            program.extend(rule.instructions());
        }
        program.extend([move_immediate(RESULT, i32::from(self.default_allow)), exit()]);
        program
    }
}

impl Rule {
    /// Returns the rule, or `None` if it matches nothing.
    fn new(device: &LinuxDeviceCgroup) -> Result<Option<Self>> {
        let invalid = || Failure::new(format!("the device rule {device} makes no sense"));
        let kind = match device.typ().unwrap_or_default() {
            LinuxDeviceType::B => BLOCK,
            LinuxDeviceType::C | LinuxDeviceType::U => CHARACTER,
            LinuxDeviceType::A | LinuxDeviceType::P => return Err(invalid()),
        };
        let number = |number: Option<i64>| number.filter(|&number| number >= 0).map(i32::try_from).transpose();
        let mut access = 0;
        for letter in device.access().as_deref().unwrap_or_default().chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MAKE,
                _ => return Err(invalid()),
            };
        }
        let (Ok(major), Ok(minor)) = (number(device.major()), number(device.minor())) else { return Err(invalid()) };
        Ok((access != 0).then_some(Self { allow: device.allow(), kind, major, minor, access }))
    }

    /// Returns code for the verdict on a match; without a match control passes to the next rule.
    fn instructions(&self) -> Vec<u64> {
        let mut steps = vec![Step::OutUnless(KIND, self.kind)];
        if self.allow && self.access != ALL {
            // A single rule must allow the whole request.
            steps.push(Step::Do(move_register(SCRATCH, WANTED)));
            steps.push(Step::Do(and(SCRATCH, !self.access)));
            steps.push(Step::OutUnless(SCRATCH, 0));
        } else if !self.allow {
            // Any part of the request may be forbidden.
            steps.push(Step::Do(move_register(SCRATCH, WANTED)));
            steps.push(Step::Do(and(SCRATCH, self.access)));
            steps.push(Step::OutIf(SCRATCH, 0));
        }
        steps.extend(self.major.map(|major| Step::OutUnless(MAJOR, major)));
        steps.extend(self.minor.map(|minor| Step::OutUnless(MINOR, minor)));
        steps.push(Step::Do(move_immediate(RESULT, i32::from(self.allow))));
        steps.push(Step::Do(exit()));
        let length = steps.len();
        let distance = |index: usize| i16::try_from(length - index - 1).unwrap_or(i16::MAX);
        let encode = |(index, step)| match step {
            Step::Do(instruction) => instruction,
            Step::OutIf(register, value) => jump_if_equal(register, value, distance(index)),
            Step::OutUnless(register, value) => jump_unless_equal(register, value, distance(index)),
        };
        steps.into_iter().enumerate().map(encode).collect()
    }
}

/// An instruction of a rule. Jumps lead behind the rule.
enum Step {
    Do(u64),
    OutIf(u8, i32),
    OutUnless(u8, i32),
}

// Registers. The kernel passes the context in the second and takes the result from the first.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// Returns a `struct bpf_insn` (linux/bpf.h) for a little-endian machine, the only supported kind.
const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    let [o0, o1] = offset.to_le_bytes();
    let [i0, i1, i2, i3] = immediate.to_le_bytes();
    u64::from_le_bytes([code, to | from << 4, o0, o1, i0, i1, i2, i3])
}

/// Loads a word of the context. Leaves the upper half of the register zero, like all code here.
fn load(to: u8, offset: i16) -> u64 {
    instruction(0x61, to, CONTEXT, offset, 0)
}

fn move_register(to: u8, from: u8) -> u64 {
    instruction(0xbc, to, from, 0, 0)
}

fn move_immediate(to: u8, value: i32) -> u64 {
    instruction(0xb4, to, 0, 0, value)
}

fn and(register: u8, value: i32) -> u64 {
    instruction(0x54, register, 0, 0, value)
}

fn shift_right(register: u8, bits: i32) -> u64 {
    instruction(0x74, register, 0, 0, bits)
}

fn jump_if_equal(register: u8, value: i32, distance: i16) -> u64 {
    instruction(0x15, register, 0, distance, value)
}

fn jump_unless_equal(register: u8, value: i32, distance: i16) -> u64 {
    instruction(0x55, register, 0, distance, value)
}

fn exit() -> u64 {
    instruction(0x95, 0, 0, 0, 0)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder};

    use super::*;

    /// Runs a program as the kernel would.
    fn run(program: &[u64], context: [i32; 3]) -> i32 {
        let mut registers = [0i32; 7];
        let mut next = 0;
        loop {
            let [code, operands, o0, o1, i0, i1, i2, i3] = program[next].to_le_bytes();
            let (to, from) = (usize::from(operands & 0xf), usize::from(operands >> 4));
            let offset = usize::try_from(i16::from_le_bytes([o0, o1])).unwrap();
            let immediate = i32::from_le_bytes([i0, i1, i2, i3]);
            next += 1;
            match code {
                0x61 => registers[to] = context[offset / 4],
                0xbc => registers[to] = registers[from],
                0xb4 => registers[to] = immediate,
                0x54 => registers[to] &= immediate,
                0x74 => registers[to] >>= immediate,
                0x15 if registers[to] == immediate => next += offset,
                0x55 if registers[to] != immediate => next += offset,
                0x15 | 0x55 => {}
                0x95 => return registers[0],
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn rule(allow: bool, text: &str) -> LinuxDeviceCgroup {
        let mut fields = text.split(' ');
        let kind = match fields.next().unwrap() {
            "a" => LinuxDeviceType::A,
            "b" => LinuxDeviceType::B,
            "c" => LinuxDeviceType::C,
            _ => LinuxDeviceType::P,
        };
        let mut device = LinuxDeviceCgroup::default();
        device.set_allow(allow).set_typ(Some(kind));
        device.set_major(fields.next().unwrap().parse().ok()).set_minor(fields.next().unwrap().parse().ok());
        device.set_access(fields.next().map(str::to_owned));
        device
    }

    fn allows(rules: &[LinuxDeviceCgroup], kind: i32, major: i32, minor: i32, wanted: i32) -> bool {
        run(&Rules::new(rules).unwrap().program(), [wanted << 16 | kind, major, minor]) == 1
    }

    #[test]
    fn a_container_may_use_what_it_is_given_and_what_everybody_has() {
        let rules = [rule(false, "a * * rwm"), rule(true, "c 195 * rw"), rule(true, "b 7 3 r")];
        assert!(allows(&rules, CHARACTER, 195, 255, READ | WRITE));
        assert!(!allows(&rules, CHARACTER, 195, 255, READ | MAKE));
        assert!(!allows(&rules, BLOCK, 195, 0, READ));
        assert!(allows(&rules, BLOCK, 7, 3, READ));
        assert!(!allows(&rules, BLOCK, 7, 3, READ | WRITE));
        assert!(!allows(&rules, BLOCK, 7, 4, READ));
        assert!(allows(&rules, CHARACTER, 1, 3, READ | WRITE));
        assert!(allows(&rules, CHARACTER, 136, 9, READ));
        assert!(!allows(&rules, CHARACTER, 1, 1, READ));
        // Such a device may be made, but not opened.
        assert!(allows(&rules, BLOCK, 254, 0, MAKE));
        assert!(!allows(&rules, BLOCK, 254, 0, READ));
    }

    #[test]
    fn the_last_rule_that_matches_counts() {
        let rules = [rule(true, "c 10 * rwm"), rule(false, "c 10 200 w")];
        assert!(allows(&rules, CHARACTER, 10, 229, READ | WRITE));
        assert!(allows(&rules, CHARACTER, 10, 200, READ));
        assert!(!allows(&rules, CHARACTER, 10, 200, READ | WRITE));
    }

    #[test]
    fn a_rule_for_all_makes_those_before_it_void() {
        let rules = [rule(true, "c 10 200 rwm"), rule(false, "a * * rwm")];
        assert!(!allows(&rules, CHARACTER, 10, 200, READ));
        let rules = [rule(false, "a * * rwm"), rule(true, "a * * rwm"), rule(false, "c 10 200 rwm")];
        assert!(allows(&rules, BLOCK, 254, 0, READ));
        assert!(!allows(&rules, CHARACTER, 10, 200, READ));
    }

    #[test]
    fn without_rules_only_everybodys_devices_are_allowed() {
        assert!(!allows(&[], BLOCK, 254, 0, READ));
        assert!(allows(&[], CHARACTER, 1, 5, READ));
    }

    #[test]
    fn nonsense_is_refused() {
        for rules in [rule(true, "p 1 1 r"), rule(true, "c 1 1 x"), rule(true, "c 99999999999 1 r")] {
            Rules::new(&[rules]).unwrap_err();
        }
        assert_eq!(Rules::new(&[rule(true, "c 1 1")]).unwrap(), Rules::new(&[]).unwrap());
    }

    #[test]
    fn of_two_devices_for_one_place_the_first_is_made() {
        let device = |path: &str, minor: i64| {
            LinuxDeviceBuilder::default().path(path).typ(LinuxDeviceType::C).major(195).minor(minor).build().unwrap()
        };
        let mut linux = Linux::default();
        linux.set_devices(Some(vec![
            device("/dev/a", 0),
            device("/dev/b", 1),
            device("/dev//a", 2),
            device("/dev/b", 1),
        ]));
        list_once(&mut linux);
        let left: Vec<i64> = linux.devices().iter().flatten().map(LinuxDevice::minor).collect();
        assert_eq!(left, [0, 1]);
        linux.set_devices(None);
        list_once(&mut linux);
        assert_eq!(linux.devices(), &None);
    }

    #[test]
    fn devices_without_a_rule_are_forbidden() {
        let mut resources = LinuxResources::default();
        resources.set_devices(Some(vec![rule(true, "c -1 -1 r")]));
        complete(&mut resources).unwrap();
        complete(&mut resources).unwrap();
        let devices: Vec<String> = resources.devices().iter().flatten().map(ToString::to_string).collect();
        assert_eq!(devices, ["a *:* rwm", "c *:* r"]);
        resources.set_devices(None);
        complete(&mut resources).unwrap();
        assert!(!resources.devices().as_ref().unwrap()[0].allow());
    }
}
