//! Which devices a container may use: OCI rules compiled to a BPF program on its cgroup.

use std::os::fd::{AsFd, BorrowedFd};

use guest_protocol::protocols::oci::LinuxDeviceCgroup;
use sys::bpf::{self, Instruction, code, op};

use crate::error::{Context, Error, Result};

// linux/bpf.h
const BPF_DEVCG_DEV_BLOCK: i32 = 1;
const BPF_DEVCG_DEV_CHAR: i32 = 2;
const ACC_MKNOD: u8 = 1;
const ACC_READ: u8 = 2;
const ACC_WRITE: u8 = 4;
const ALL: u8 = ACC_MKNOD | ACC_READ | ACC_WRITE;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `None` is every type.
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: u8,
}

impl Rule {
    const fn char(major: i32, minor: Option<i32>) -> Rule {
        Rule {
            allow: true,
            kind: Some(BPF_DEVCG_DEV_CHAR),
            major: Some(major),
            minor,
            access: ALL,
        }
    }
}

/// A privileged container's one rule.
const EVERYTHING: Rule = Rule {
    allow: true,
    kind: None,
    major: None,
    minor: None,
    access: ALL,
};

/// What every container may use, as with runc: making nodes, and the devices that every image
/// expects.
const DEFAULT: [Rule; 11] = [
    Rule {
        allow: true,
        kind: Some(BPF_DEVCG_DEV_CHAR),
        major: None,
        minor: None,
        access: ACC_MKNOD,
    },
    Rule {
        allow: true,
        kind: Some(BPF_DEVCG_DEV_BLOCK),
        major: None,
        minor: None,
        access: ACC_MKNOD,
    },
    Rule::char(1, Some(3)),
    Rule::char(1, Some(5)),
    Rule::char(1, Some(7)),
    Rule::char(1, Some(8)),
    Rule::char(1, Some(9)),
    Rule::char(5, Some(0)),
    Rule::char(5, Some(1)),
    Rule::char(5, Some(2)),
    Rule::char(136, None),
];

/// Puts the rules in force on a cgroup.
///
/// # Errors
/// A rule of unknown type or access, or the kernel's refusal.
pub fn restrict(cgroup: BorrowedFd<'_>, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let rules = effective(rules)?;
    // Without a single restriction there is nothing to check at each open.
    if rules.last() == Some(&EVERYTHING) {
        return Ok(());
    }
    let program = bpf::load_cgroup_device("devices", &compile(&rules))
        .context(|| "load the device rules".into())?;
    bpf::attach_to_cgroup(cgroup, program.as_fd()).context(|| "attach the device rules".into())
}

/// Whether the rules end in "everything": the container is privileged.
pub fn allow_all(rules: &[LinuxDeviceCgroup]) -> bool {
    rules
        .last()
        .is_some_and(|rule| parse(rule).is_ok_and(|rule| rule == EVERYTHING))
}

/// The sender's rules, then the defaults; the last one that fits decides. A device of the container
/// without a rule is not allowed, as with runc.
fn effective(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let mut all = Vec::with_capacity(rules.len() + DEFAULT.len());
    for rule in rules {
        all.push(parse(rule)?);
    }
    if all.last() == Some(&EVERYTHING) {
        return Ok(all);
    }
    all.extend(DEFAULT);
    Ok(all)
}

fn number(value: i64) -> Result<i32> {
    i32::try_from(value)
        .map_err(|_| Error::Invalid(format!("device number {value} does not exist")))
}

/// −1 is a wildcard. So is major 0, which no device has: on the wire an absent major is 0. Minor 0
/// is a real minor.
fn parse(rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let kind = match rule.Type.as_str() {
        "a" | "" => None,
        "c" => Some(BPF_DEVCG_DEV_CHAR),
        "b" => Some(BPF_DEVCG_DEV_BLOCK),
        other => {
            return Err(Error::Invalid(format!(
                "device rule of unknown type {other:?}"
            )));
        }
    };
    let major = if rule.Major <= 0 || kind.is_none() {
        None
    } else {
        Some(number(rule.Major)?)
    };
    let minor = if rule.Minor < 0 || major.is_none() {
        None
    } else {
        Some(number(rule.Minor)?)
    };
    let mut access = 0;
    for letter in rule.Access.chars() {
        access |= match letter {
            'r' => ACC_READ,
            'w' => ACC_WRITE,
            'm' => ACC_MKNOD,
            _ => {
                return Err(Error::Invalid(format!(
                    "device rule with unknown access {:?}",
                    rule.Access
                )));
            }
        };
    }
    if access == 0 {
        access = ALL;
    }
    Ok(Rule {
        allow: rule.Allow,
        kind,
        major,
        minor,
        access,
    })
}

/// The program: r2 device type, r3 access, r4 major, r5 minor; each rule in turn from the last,
/// then "no".
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        op(code::LOAD_WORD, 0x12, 0, 0),
        op(code::AND_32, 0x02, 0, 0xffff),
        op(code::LOAD_WORD, 0x13, 0, 0),
        op(code::RIGHT_SHIFT_32, 0x03, 0, 16),
        op(code::LOAD_WORD, 0x14, 4, 0),
        op(code::LOAD_WORD, 0x15, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // What the rule asks, as pairs of instructions that leave the rule when they do not fit.
        let mut tests: Vec<Vec<Instruction>> = Vec::new();
        if let Some(kind) = rule.kind {
            tests.push(vec![op(code::JUMP_NOT_EQUAL, 0x02, 0, kind)]);
        }
        if rule.access != ALL {
            let copy = op(code::MOVE_REGISTER_32, 0x31, 0, 0);
            tests.push(if rule.allow {
                // All that is asked for must be in the rule …
                vec![
                    copy,
                    op(code::AND_32, 0x01, 0, i32::from(!rule.access & ALL)),
                    op(code::JUMP_NOT_EQUAL, 0x01, 0, 0),
                ]
            } else {
                // … but a denial of a part denies the whole.
                vec![
                    copy,
                    op(code::AND_32, 0x01, 0, i32::from(rule.access)),
                    op(code::JUMP_EQUAL, 0x01, 0, 0),
                ]
            });
        }
        if let Some(major) = rule.major {
            tests.push(vec![op(code::JUMP_NOT_EQUAL, 0x04, 0, major)]);
        }
        if let Some(minor) = rule.minor {
            tests.push(vec![op(code::JUMP_NOT_EQUAL, 0x05, 0, minor)]);
        }
        let mut body: Vec<Instruction> = tests.concat();
        let length = body.len();
        for (index, instruction) in body.iter_mut().enumerate() {
            if matches!(instruction.code, code::JUMP_NOT_EQUAL | code::JUMP_EQUAL) {
                // Over the rest of the tests and the two instructions of the verdict.
                instruction.offset = i16::try_from(length - index - 1 + 2).unwrap_or(i16::MAX);
            }
        }
        program.extend(body);
        program.extend([
            op(code::MOVE_32, 0x00, 0, i32::from(rule.allow)),
            op(code::EXIT, 0, 0, 0),
        ]);
        // The kernel refuses a program with instructions that nothing reaches.
        if length == 0 {
            return program;
        }
    }
    program.extend([op(code::MOVE_32, 0x00, 0, 0), op(code::EXIT, 0, 0, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, to see what it says of one access.
    fn allowed(rules: &[Rule], kind: i32, access: u8, major: i32, minor: i32) -> bool {
        let program = compile(rules);
        let mut registers = [0_i64; 11];
        let context = [(i32::from(access) << 16) | kind, major, minor];
        let mut at = 0;
        loop {
            let instruction = program[at];
            let (to, from) = (
                usize::from(instruction.registers & 15),
                usize::from(instruction.registers >> 4),
            );
            let immediate = i64::from(instruction.immediate);
            at += 1;
            match instruction.code {
                0x61 => {
                    registers[to] =
                        i64::from(context[usize::try_from(instruction.offset / 4).unwrap()])
                }
                0x54 => registers[to] &= immediate,
                0x74 => registers[to] >>= immediate,
                0xbc => registers[to] = registers[from],
                0xb4 => registers[to] = immediate,
                0x55 if registers[to] != immediate => {
                    at += usize::try_from(instruction.offset).unwrap()
                }
                0x15 if registers[to] == immediate => {
                    at += usize::try_from(instruction.offset).unwrap()
                }
                0x55 | 0x15 => {}
                0x95 => return registers[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
        LinuxDeviceCgroup {
            Allow: allow,
            Type: kind.into(),
            Major: major,
            Minor: minor,
            Access: access.into(),
            ..Default::default()
        }
    }

    const CHAR: i32 = BPF_DEVCG_DEV_CHAR;
    const BLOCK: i32 = BPF_DEVCG_DEV_BLOCK;

    #[test]
    fn a_container_gets_the_usual_devices_and_no_disk() {
        let rules = effective(&[rule(false, "a", -1, -1, "rwm")]).unwrap();
        assert!(allowed(&rules, CHAR, ACC_READ | ACC_WRITE, 1, 3));
        assert!(allowed(&rules, CHAR, ACC_READ, 136, 7));
        assert!(allowed(&rules, BLOCK, ACC_MKNOD, 254, 0));
        assert!(!allowed(&rules, BLOCK, ACC_READ, 254, 0));
        assert!(!allowed(&rules, BLOCK, ACC_READ | ACC_MKNOD, 254, 0));
        assert!(!allowed(&rules, CHAR, ACC_READ, 1, 1));
        assert_eq!(effective(&[]).unwrap(), DEFAULT);
    }

    #[test]
    fn the_last_rule_that_fits_decides() {
        let rules = [
            rule(true, "c", 10, -1, "rw"),
            rule(false, "c", 10, 200, "w"),
        ];
        let rules = effective(&rules).unwrap();
        assert!(allowed(&rules, CHAR, ACC_READ | ACC_WRITE, 10, 229));
        assert!(allowed(&rules, CHAR, ACC_READ, 10, 200));
        assert!(!allowed(&rules, CHAR, ACC_READ | ACC_WRITE, 10, 200));
    }

    #[test]
    fn a_privileged_container_may_use_everything() {
        let rules = effective(&[rule(true, "a", -1, -1, "rwm")]).unwrap();
        assert!(allowed(&rules, BLOCK, ALL, 254, 0));
        assert_eq!(rules.len(), 1);
    }

    #[test]
    fn minor_zero_is_a_device_and_major_zero_is_all() {
        let rules = effective(&[rule(true, "b", 8, 0, "r"), rule(true, "c", 0, 0, "r")]).unwrap();
        assert!(allowed(&rules, BLOCK, ACC_READ, 8, 0));
        assert!(!allowed(&rules, BLOCK, ACC_READ, 8, 1));
        assert!(allowed(&rules, CHAR, ACC_READ, 1, 1));
    }

    #[test]
    fn unknown_types_and_accesses_are_refused() {
        assert!(parse(&rule(true, "x", 1, 1, "r")).is_err());
        assert!(parse(&rule(true, "c", 1, 1, "rx")).is_err());
    }
}
