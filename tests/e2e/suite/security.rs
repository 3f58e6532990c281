//! Security: acts forbidden to a container.

use std::fs::File;
use std::path::Path;

use anyhow::{Result, ensure};
use e2e::target::Shim;
use e2e::{Case, Skip, Test, case, ensure_eq, ensure_has, lines, proc};

use crate::ctr_exit::IDLE;
use crate::nerdctl_life::nerdctl_cases;

pub(crate) fn cases() -> Vec<Case> {
    nerdctl_cases(vec![
        case!(capabilities_are_the_default_ones_in_init_and_exec),
        case!(all_capabilities_can_be_dropped_in_init_and_exec),
        case!(a_capability_can_be_added),
        case!(seccomp_is_on_in_init_and_exec),
        case!(a_syscall_that_the_default_profile_denies_gets_eperm),
        case!(a_profile_of_ones_own_is_obeyed_in_init_and_exec),
        case!(seccomp_can_be_turned_off),
        case!(no_new_privileges_holds_in_init_and_exec),
        case!(sensitive_paths_are_masked),
        case!(kernel_settings_are_read_only),
        case!(a_device_that_was_not_given_cannot_be_opened),
        case!(the_device_list_is_the_default_one),
        case!(a_privileged_container_has_it_all),
    ])
}

const STATUS: &str = "grep -E '^(Cap|Seccomp|NoNewPrivs)' /proc/self/status";

/// Docker's fourteen default capabilities.
const DEFAULT_CAPS: &str = "00000000a80425fb";

/// Output of this script in a started container and in an exec.
fn init_and_exec(t: &Test, options: &[&str], script: &str) -> Result<[String; 2]> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, options, IDLE)?;
    Ok([t.nerdctl().prints(options, script)?, t.nerdctl().exec_prints(&name, script)?])
}

fn capabilities_are_the_default_ones_in_init_and_exec(t: &Test) -> Result<()> {
    for text in init_and_exec(t, &[], STATUS)? {
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            ensure_eq!(proc::status_line(&text, set)?, DEFAULT_CAPS, "{set}");
        }
        for set in ["CapInh", "CapAmb"] {
            ensure_eq!(proc::status_line(&text, set)?, "0000000000000000", "{set}");
        }
    }
    Ok(())
}

fn all_capabilities_can_be_dropped_in_init_and_exec(t: &Test) -> Result<()> {
    for text in init_and_exec(t, &["--cap-drop", "ALL"], STATUS)? {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure_eq!(proc::status_line(&text, set)?, "0000000000000000", "{set}");
        }
    }
    Ok(())
}

fn a_capability_can_be_added(t: &Test) -> Result<()> {
    // CAP_NET_ADMIN is number 12. The network is the container's own.
    let options = ["--cap-drop", "ALL", "--cap-add", "NET_ADMIN"];
    let script = format!("{STATUS}; ip link set lo mtu 1400 && cat /sys/class/net/lo/mtu");
    for text in init_and_exec(t, &options, &script)? {
        ensure_eq!(proc::status_line(&text, "CapEff")?, "0000000000001000");
        ensure_eq!(lines(&text).last().copied(), Some("1400"));
    }
    t.nerdctl().run(&t.id("c"), &["--rm"], &["ip", "link", "set", "lo", "mtu", "1400"]).run()?.expect_failure()?;
    Ok(())
}

fn seccomp_is_on_in_init_and_exec(t: &Test) -> Result<()> {
    for text in init_and_exec(t, &[], STATUS)? {
        ensure_eq!(proc::status_line(&text, "Seccomp")?, "2", "2 means a filter");
    }
    Ok(())
}

/// Needs no capability, so that only seccomp can refuse.
const NEW_USER_NAMESPACE: &str = "unshare -U true 2>&1 && echo allowed || echo refused";

fn a_syscall_that_the_default_profile_denies_gets_eperm(t: &Test) -> Result<()> {
    for text in init_and_exec(t, &[], NEW_USER_NAMESPACE)? {
        ensure_has!(text, "Operation not permitted");
        ensure_has!(text, "refused");
    }
    Ok(())
}

fn seccomp_can_be_turned_off(t: &Test) -> Result<()> {
    let script = format!("{NEW_USER_NAMESPACE}; {STATUS}");
    for text in init_and_exec(t, &["--security-opt", "seccomp=unconfined"], &script)? {
        ensure_has!(text, "allowed");
        ensure_eq!(proc::status_line(&text, "Seccomp_filters")?, of_preparation(t));
    }
    let unprepared = ["--security-opt", "seccomp=unconfined", "--annotation", "gpusnap.dev/prepare=none"];
    for text in init_and_exec(t, &unprepared, &script)? {
        ensure_eq!(proc::status_line(&text, "Seccomp")?, "0");
    }
    Ok(())
}

/// Number of filters in a container without a profile: the preparation's, with which our own name comes.
fn of_preparation(t: &Test) -> &'static str {
    if t.target().shim == Shim::Gpusnap { "1" } else { "0" }
}

fn a_profile_of_ones_own_is_obeyed_in_init_and_exec(t: &Test) -> Result<()> {
    // 95 is EOPNOTSUPP, which mkdir never returns by itself here; sethostname is filtered by its
    // argument.
    let profile = t.file(
        "profile.json",
        r#"{ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 },
            { "names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": [{ "index": 1, "value": 10, "op": "SCMP_CMP_EQ" }] } ] }"#,
    )?;
    let option = format!("seccomp={profile}");
    let script = "mkdir /x 2>&1; kill -USR1 1 2>&1; kill -0 1 && echo kill 0 works";
    for text in init_and_exec(t, &["--security-opt", &option], script)? {
        ensure_has!(text, "can't create directory '/x': Operation not supported");
        ensure_has!(text, "Operation not permitted");
        ensure_has!(text, "kill 0 works");
    }
    Ok(())
}

fn no_new_privileges_holds_in_init_and_exec(t: &Test) -> Result<()> {
    for text in init_and_exec(t, &["--security-opt", "no-new-privileges"], STATUS)? {
        ensure_eq!(proc::status_line(&text, "NoNewPrivs")?, "1");
    }
    for text in init_and_exec(t, &[], STATUS)? {
        ensure_eq!(proc::status_line(&text, "NoNewPrivs")?, "0");
    }
    Ok(())
}

fn sensitive_paths_are_masked(t: &Test) -> Result<()> {
    // Files are covered by /dev/null, folders by an empty read-only tmpfs.
    let script = "for f in /proc/kcore /proc/keys /proc/timer_list /proc/sched_debug /proc/latency_stats; do
          [ ! -e $f ] || { stat -c '%n %t:%T' $f; wc -c <$f; }; done
        for d in /sys/firmware /proc/acpi /proc/scsi /sys/devices/virtual/powercap; do
          [ ! -d $d ] || echo $d $(ls -A $d | wc -l) $(grep \" $d \" /proc/mounts | tail -1 | cut -d' ' -f1,4 | cut -d, -f1); done";
    let text = t.nerdctl().prints(&[], script)?;
    ensure_has!(text, "/proc/keys 1:3\n0");
    for line in lines(&text) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["0"] | [_, "1:3"] | [_, "0", "tmpfs", "ro"] => {}
            _ => anyhow::bail!("not masked: {line:?} in {text}"),
        }
    }
    Ok(())
}

fn kernel_settings_are_read_only(t: &Test) -> Result<()> {
    let script = "for d in /proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger /sys; do
          [ ! -e $d ] || grep \" $d \" /proc/mounts | tail -1 | cut -d' ' -f2,4 | cut -d, -f1; done
        echo 1 2>/dev/null >/proc/sys/kernel/panic || echo refused";
    for text in init_and_exec(t, &[], script)? {
        for path in ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/sys"] {
            // Kernels have different files.
            if !Path::new(path).exists() {
                continue;
            }
            ensure!(lines(&text).contains(&format!("{path} ro").as_str()), "{path} in {text}");
        }
        ensure_has!(text, "refused");
    }
    Ok(())
}

fn a_device_that_was_not_given_cannot_be_opened(t: &Test) -> Result<()> {
    // Making the node is allowed; the device cgroup refuses its opening. A FUSE device opens
    // without any privilege, so nothing else can be the reason.
    if let Err(error) = File::open("/dev/fuse") {
        return Err(Skip::because(format!("this machine has no device to try it with: /dev/fuse: {error}")));
    }
    let script = "mknod /tmp/fuse c 10 229 && (exec 3<>/tmp/fuse) 2>&1 && echo opened";
    for text in init_and_exec(t, &[], &format!("{script} || :"))? {
        ensure_has!(text, "Operation not permitted");
    }
    for text in init_and_exec(t, &["--device", "/dev/fuse"], script)? {
        ensure_eq!(text, "opened");
    }
    Ok(())
}

fn the_device_list_is_the_default_one(t: &Test) -> Result<()> {
    let text = t.nerdctl().prints(&[], "ls /dev")?;
    let expected = [
        "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom",
        "zero",
    ];
    ensure_eq!(lines(&text), expected);
    let script =
        "for d in null zero full random urandom tty; do (exec 3<>/dev/$d) 2>&1 || echo $d; done; echo x >/dev/null";
    let text = t.nerdctl().prints(&[], script)?;
    // Without a terminal the error is another one than a refusal.
    ensure!(!text.contains("not permitted") && !text.contains("denied"), "{text}");
    Ok(())
}

fn a_privileged_container_has_it_all(t: &Test) -> Result<()> {
    let script =
        format!("{STATUS}; mount -t tmpfs none /mnt 2>&1 || mkdir /mnt && mount -t tmpfs none /mnt && echo mounted");
    let text = t.nerdctl().prints(&["--privileged"], &script)?;
    ensure_eq!(proc::status_line(&text, "Seccomp_filters")?, of_preparation(t));
    // The machine's full set: a test machine may lack some.
    ensure_eq!(proc::status_line(&text, "CapEff")?, proc::status(std::process::id(), "CapBnd")?);
    ensure_has!(text, "mounted");
    Ok(())
}
