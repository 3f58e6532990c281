//! Things given to a container, and things kept from it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use oci_spec::runtime::{
    Capability, LinuxDeviceBuilder, LinuxDeviceType, LinuxIdMappingBuilder, LinuxNamespaceType, PosixRlimitBuilder,
    PosixRlimitType, Process, UserBuilder,
};
use runtime::CreateRequest;
use rustix::fs::{FileType, Mode};
use rustix::process::{Pid, Signal};

use crate::bed::{Bed, sentences};
use crate::container::{Pipes, Running};
use crate::spec::{Edit, capabilities, namespace, process, program, shell};
use crate::world::Which;

sentences![
    a_container_has_the_environment_and_folder_it_asks_for,
    a_container_has_the_user_and_groups_it_asks_for,
    a_container_has_the_capabilities_it_asks_for,
    a_container_has_the_limits_it_asks_for,
    a_container_has_the_oom_score_it_asks_for,
    capabilities_that_cannot_be_had_are_left_out_or_refused,
    a_container_is_under_its_seccomp_filter,
    a_container_starts_with_clean_signals_in_a_session_of_its_own,
    a_large_environment_arrives,
    a_container_has_its_host_name,
    a_container_has_its_kernel_parameters,
    a_container_sees_its_own_processes_only,
    a_container_can_share_the_processes_of_another,
    a_container_can_join_the_network_of_another,
    the_containers_of_a_pod_share_what_they_shall,
    a_container_can_be_made_without_pivot_root,
    a_container_can_be_made_without_a_keyring_of_its_own,
    a_container_can_have_its_own_users,
    a_container_has_the_usual_devices,
    a_container_has_the_devices_it_asks_for,
    a_device_that_is_not_allowed_cannot_be_opened,
    masked_paths_show_nothing,
    readonly_paths_cannot_be_written,
    a_readonly_root_cannot_be_written,
    a_container_has_no_descriptors_but_three,
];

async fn a_container_has_the_environment_and_folder_it_asks_for(bed: &Bed) {
    let spec = shell("pwd; echo \"$GREETING\"; cat /proc/self/environ | tr '\\0' '\\n' | grep -c GPUSNAP")
        .with_process(|process| {
            process.set_cwd("/home/user".into());
            process.set_env(Some(["PATH=/bin".to_owned(), "GREETING=a b=c".to_owned()].to_vec()));
        });
    let ended = bed.run(&spec).await;
    assert_eq!(ended.stdout, "/home/user\na b=c\n0\n", "and nothing of ours");
    // A missing folder is made, as runc does.
    let spec = shell("pwd").with_process(|process| {
        process.set_cwd("/home/new".into());
    });
    assert_eq!(bed.say(&spec).await, "/home/new\n");
}

async fn a_container_has_the_user_and_groups_it_asks_for(bed: &Bed) {
    let spec =
        shell("id -u; id -g; id -G; umask; touch /tmp/file; stat -c '%u %g %a' /tmp/file").with_process(|process| {
            let user =
                UserBuilder::default().uid(1000_u32).gid(1001_u32).additional_gids([1001_u32, 2002]).umask(0o077_u32);
            process.set_user(user.build().unwrap());
        });
    assert_eq!(bed.say(&spec).await, "1000\n1001\n1001 2002\n0077\n1000 1001 600\n");
    assert_eq!(bed.say(&shell("umask")).await, "0022\n", "without one it is the usual one");
}

async fn a_container_has_the_capabilities_it_asks_for(bed: &Bed) {
    let spec = shell("grep ^Cap /proc/self/status | tr '\\t' ' '");
    // The fourteen usual ones, by the numbers of linux/capability.h.
    let usual = "00000000a80425fb";
    let none = "0000000000000000";
    let expected = |set: &str| format!("CapInh: {none}\nCapPrm: {set}\nCapEff: {set}\nCapBnd: {set}\nCapAmb: {none}\n");
    assert_eq!(bed.say(&spec).await, expected(usual));
    let spec = spec.with_process(|process| {
        process.set_capabilities(Some(capabilities(&[])));
    });
    assert_eq!(bed.say(&spec).await, expected(none));
    let spec = spec.with_process(|process| {
        process.set_capabilities(Some(capabilities(&[Capability::SysAdmin, Capability::NetAdmin])));
    });
    assert_eq!(bed.say(&spec).await, expected("0000000000201000"));
}

async fn a_container_has_the_limits_it_asks_for(bed: &Bed) {
    assert_eq!(bed.say(&shell("ulimit -Sn; ulimit -Hn")).await, "1024\n1024\n");
    let spec = shell("ulimit -Sn; ulimit -Hn; ulimit -Hc").with_process(|process| {
        let limit =
            |kind, soft: u64, hard: u64| PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build().unwrap();
        let limits = [limit(PosixRlimitType::RlimitNofile, 64, 512), limit(PosixRlimitType::RlimitCore, 0, 0)];
        process.set_rlimits(Some(limits.to_vec()));
    });
    assert_eq!(bed.say(&spec).await, "64\n512\n0\n");
}

async fn a_container_has_the_oom_score_it_asks_for(bed: &Bed) {
    let spec = shell("cat /proc/self/oom_score_adj").with_process(|process| {
        process.set_oom_score_adj(Some(789));
    });
    assert_eq!(bed.say(&spec).await, "789\n");
    let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_eq!(bed.say(&shell("cat /proc/self/oom_score_adj")).await, own, "without one it is ours");
}

async fn capabilities_that_cannot_be_had_are_left_out_or_refused(bed: &Bed) {
    // As for privileged containers. Inside a container some are missing.
    let features = bed.runtime.features().await.unwrap();
    let names = features.linux().as_ref().unwrap().capabilities().clone().unwrap();
    let all: Vec<Capability> = names.into_iter().map(|name| serde_json::from_value(name.into()).unwrap()).collect();
    let spec = shell("grep ^CapEff /proc/self/status | cut -c9-").with_process(|process| {
        process.set_capabilities(Some(capabilities(&all)));
    });
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let own = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
    let bundle = bed.bundle(&spec);
    match bundle.create().await {
        Ok(running) => {
            bed.runtime.start(&bundle.id).await.unwrap();
            assert_eq!(running.end().await.stdout.trim(), own);
            bundle.delete().await;
        }
        Err(error) => assert!(error.to_string().contains("cap"), "{error}"),
    }
}

async fn a_container_starts_with_clean_signals_in_a_session_of_its_own(bed: &Bed) {
    // Rust programs ignore SIGPIPE, and ignored or blocked signals are inherited.
    let clean = "grep -E '^Sig(Blk|Ign):' /proc/self/status | tr '\\t' ' '";
    let bundle = bed.bundle(&shell(&format!("exec 2>&1; {clean}; echo up; sleep 600")));
    let running = bundle.start().await;
    running.says("up").await;
    assert_eq!(signals(&running.pipes.stdout.so_far()), [("SigBlk", 0), ("SigIgn", 0)]);
    assert_eq!(signals(&bundle.ask(clean).await), [("SigBlk", 0), ("SigIgn", 0)]);
    let exec = bundle.exec(&process(&["sleep", "600"])).await.unwrap();
    for child in [&running.child, &exec.child] {
        let pid = Pid::from_raw(child.pid());
        assert_eq!(rustix::process::getsid(pid).unwrap(), pid.unwrap());
        assert_eq!(rustix::process::getpgid(pid).unwrap(), pid.unwrap());
    }
    exec.child.signal(Signal::KILL).unwrap();
    exec.end().await;
    bundle.kill(running).await;
}

/// Returns sets of signals from `/proc/PID/status`, except signals ignored from this process's
/// start (by nohup or make, say): no runtime changes those. This program itself ignores SIGPIPE,
/// which must not be passed on.
fn signals(status: &str) -> Vec<(&str, u64)> {
    const SIGPIPE: u64 = 1 << 12;
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let inherited = signal_sets(&own).into_iter().find(|(name, _)| *name == "SigIgn").unwrap().1 & !SIGPIPE;
    signal_sets(status).into_iter().map(|(name, set)| (name, set & !inherited)).collect()
}

fn signal_sets(status: &str) -> Vec<(&str, u64)> {
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    let sets = lines.filter(|(name, _)| matches!(*name, "SigBlk" | "SigIgn"));
    sets.map(|(name, set)| (name, u64::from_str_radix(set.trim(), 16).unwrap())).collect()
}

async fn a_large_environment_arrives(bed: &Bed) {
    let large = |process: &mut Process| {
        let mut environment = process.env().clone().unwrap();
        environment.extend((0..50).map(|number| format!("LARGE_{number}={}", "x".repeat(10_000))));
        process.set_env(Some(environment));
    };
    let script = "env | grep -c ^LARGE_; echo ${#LARGE_49}; sleep 600";
    let bundle = bed.bundle(&shell(script).with_process(large));
    let running = bundle.start().await;
    running.says("50\n10000\n").await;
    let mut process = process(&["/bin/sh", "-c", "echo ${#LARGE_49}"]);
    large(&mut process);
    assert_eq!(bundle.exec(&process).await.unwrap().end().await.stdout, "10000\n");
    bundle.kill(running).await;
}

async fn a_container_is_under_its_seccomp_filter(bed: &Bed) {
    let status = "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status | tr '\\t' ' '";
    let ended = bed.run(&shell(&format!("{status}; hostname other"))).await;
    assert_eq!(ended.stdout, "NoNewPrivs: 1\nSeccomp: 2\n");
    assert!(ended.stderr.contains("Function not implemented"), "{}", ended.stderr);
    // Without no_new_privs the filter is set before privileges are dropped.
    let spec = shell(status).with_process(|process| {
        process.set_no_new_privileges(Some(false));
    });
    assert_eq!(bed.say(&spec).await, "NoNewPrivs: 0\nSeccomp: 2\n");
    let spec = shell(status).with_linux(|linux| {
        linux.set_seccomp(None);
    });
    // The embedded runtime prepares the container by a filter of its own.
    let mode = if bed.which == Which::Libcontainer { 2 } else { 0 };
    assert_eq!(bed.say(&spec).await, format!("NoNewPrivs: 1\nSeccomp: {mode}\n"));
}

async fn a_container_has_its_host_name(bed: &Bed) {
    assert_eq!(bed.say(&shell("hostname")).await, "contract\n");
}

async fn a_container_has_its_kernel_parameters(bed: &Bed) {
    let spec = shell("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced").with_linux(
        |linux| {
            let parameters = [("net.ipv4.ip_unprivileged_port_start", "81"), ("kernel.shm_rmid_forced", "1")];
            linux.set_sysctl(Some(
                parameters
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .into_iter()
                    .collect::<HashMap<_, _>>(),
            ));
        },
    );
    assert_eq!(bed.say(&spec).await, "81\n1\n");
}

async fn a_container_sees_its_own_processes_only(bed: &Bed) {
    let said = bed.say(&shell("echo $$; ls -d /proc/[0-9]* | grep -vx /proc/$$ | grep -c . | head -c 1; echo")).await;
    let (own, others) = said.split_once('\n').unwrap();
    assert_eq!(own, "1");
    // The processes of the pipeline itself.
    assert!(others.trim().parse::<u32>().unwrap() < 5, "{others}");
}

async fn a_container_can_share_the_processes_of_another(bed: &Bed) {
    let first = bed.bundle(&shell("echo up; sleep 600"));
    let running = first.start().await;
    running.says("up").await;
    let path = format!("/proc/{}/ns/pid", running.child.pid());
    let shared = namespace(LinuxNamespaceType::Pid, Some(Path::new(&path)));
    let spec = shell("echo $$; cat /proc/1/cmdline | tr '\\0' ' '; echo; sleep 600")
        .with_namespace(LinuxNamespaceType::Pid, Some(shared));
    let second = bed.bundle(&spec);
    let guest = second.start().await;
    guest.says("sleep 600").await;
    assert!(!guest.pipes.stdout.so_far().starts_with("1\n"), "it is not the first process there");
    assert_eq!(fs::read_link(format!("/proc/{}/ns/pid", guest.child.pid())).unwrap(), fs::read_link(&path).unwrap());
    // The guest's end leaves the host alone, the host's end takes the guest.
    let third = bed.bundle(&spec);
    let short_lived = third.start().await;
    short_lived.says("sleep 600").await;
    third.delete().await;
    assert_eq!(short_lived.end().await.code, 137);
    assert_eq!((running.child.exit(), guest.child.exit()), (None, None));
    running.child.signal(Signal::KILL).unwrap();
    assert_eq!(running.end().await.code, 137);
    assert_eq!(guest.end().await.code, 137);
    second.delete().await;
    first.delete().await;
}

async fn a_container_can_join_the_network_of_another(bed: &Bed) {
    let first = bed.bundle(&shell("echo up; sleep 600"));
    let running = first.start().await;
    running.says("up").await;
    let path = format!("/proc/{}/ns/net", running.child.pid());
    let shared = namespace(LinuxNamespaceType::Network, Some(Path::new(&path)));
    let spec = shell("readlink /proc/self/ns/net").with_namespace(LinuxNamespaceType::Network, Some(shared));
    let said = bed.say(&spec).await;
    assert_eq!(Path::new(said.trim()), fs::read_link(&path).unwrap());
    first.kill(running).await;
}

async fn the_containers_of_a_pod_share_what_they_shall(bed: &Bed) {
    let sandbox = bed.bundle(&shell("echo up; sleep 600"));
    let pause = sandbox.start().await;
    pause.says("up").await;
    let shared = [LinuxNamespaceType::Network, LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts];
    let path = |kind| format!("/proc/{}/ns/{kind}", pause.child.pid());
    let mut spec = shell("hostname; for kind in net ipc uts mnt; do readlink /proc/self/ns/$kind; done");
    for kind in shared {
        spec = spec.with_namespace(kind, Some(namespace(kind, Some(Path::new(&path(kind))))));
    }
    // The host name is the sandbox's.
    spec.set_hostname(None);
    let said = bed.say(&spec).await;
    let said: Vec<_> = said.lines().collect();
    assert_eq!(said[0], "contract");
    for (kind, said) in shared.iter().zip(&said[1..]) {
        assert_eq!(Path::new(said), fs::read_link(path(*kind)).unwrap(), "{kind}");
    }
    assert_ne!(Path::new(said[4]), fs::read_link(path(LinuxNamespaceType::Mount)).unwrap());
    sandbox.kill(pause).await;
}

async fn a_container_can_be_made_without_pivot_root(bed: &Bed) {
    let bundle =
        bed.bundle(&shell("cat /etc/hostname; cut -d' ' -f5 /proc/self/mountinfo | grep -c gpusnap; ls /proc/1/root/"));
    let (io, pipes) = Pipes::new();
    let request = CreateRequest { no_pivot_root: true, ..bundle.request(io) };
    let child = bed.runtime.create(request).await.unwrap();
    bed.runtime.start(&bundle.id).await.unwrap();
    let ended = Running { child, pipes }.end().await;
    assert!(ended.stdout.starts_with("lower\n0\nbin\n"), "{ended:?}");
    bundle.delete().await;
}

async fn a_container_can_be_made_without_a_keyring_of_its_own(bed: &Bed) {
    let bundle = bed.bundle(&shell("exit 3"));
    let (io, pipes) = Pipes::new();
    let request = CreateRequest { no_new_keyring: true, ..bundle.request(io) };
    let child = bed.runtime.create(request).await.unwrap();
    bed.runtime.start(&bundle.id).await.unwrap();
    assert_eq!(Running { child, pipes }.end().await.code, 3);
    bundle.delete().await;
}

async fn a_container_can_have_its_own_users(bed: &Bed) {
    let spec = shell("id -u; cat /proc/self/uid_map /proc/self/gid_map; touch /dev/shm/file; stat -c %u /dev/shm/file; echo up; sleep 600")
        .with_namespace(LinuxNamespaceType::User, Some(namespace(LinuxNamespaceType::User, None)))
        .with_linux(|linux| {
            let mapping =
                |host: u32| vec![LinuxIdMappingBuilder::default().container_id(0_u32).host_id(host).size(1000_u32).build().unwrap()];
            linux.set_uid_mappings(Some(mapping(100_000)));
            linux.set_gid_mappings(Some(mapping(200_000)));
        });
    let bundle = bed.bundle(&spec);
    let running = bundle.start().await;
    running.says("up\n").await;
    let words: Vec<String> = running.pipes.stdout.so_far().split_whitespace().map(str::to_owned).collect();
    assert_eq!(words, ["0", "0", "100000", "1000", "0", "200000", "1000", "0", "up"]);
    let owner = |path: String| {
        let data = fs::metadata(path).unwrap();
        (std::os::unix::fs::MetadataExt::uid(&data), std::os::unix::fs::MetadataExt::gid(&data))
    };
    assert_eq!(owner(format!("/proc/{}", running.child.pid())), (100_000, 200_000));
    assert_eq!(bundle.ask("id -u").await, "0\n");
    bundle.kill(running).await;
}

async fn a_container_has_the_usual_devices(bed: &Bed) {
    let script = "
        for device in null zero full random urandom tty; do test -c /dev/$device || echo no $device; done
        for link in fd stdin stdout stderr ptmx; do test -L /dev/$link || echo no $link; done
        echo gone >/dev/null && head -c 2 /dev/zero | tr '\\0' 0 && head -c 1 /dev/urandom >/dev/null && echo && echo err >/dev/stdout
        test -w /dev/pts/ptmx || echo no ptmx";
    assert_eq!(bed.say(&shell(script)).await, "00\nerr\n");
}

async fn a_container_has_the_devices_it_asks_for(bed: &Bed) {
    let spec = shell("stat -c '%F %t %T %a %u %g' /dev/mine /dev/deep/er; head -c 1 /dev/mine | tr '\\0' 0")
        .with_linux(|linux| {
            let device = |path: &str| {
                // Number of /dev/zero.
                LinuxDeviceBuilder::default()
                    .path(path)
                    .typ(LinuxDeviceType::C)
                    .major(1)
                    .minor(5)
                    .file_mode(0o640_u32)
                    .uid(1000_u32)
                    .gid(1001_u32)
                    .build()
                    .unwrap()
            };
            linux.set_devices(Some(vec![device("/dev/mine"), device("/dev/deep/er")]));
        });
    let line = "character special file 1 5 640 1000 1001\n";
    assert_eq!(bed.say(&spec).await, format!("{line}{line}0"));
}

async fn a_device_that_is_not_allowed_cannot_be_opened(bed: &Bed) {
    let bundle = bed.bundle(&program(&["sh", "-c", "cat /mnt/allowed; head -c 1 /mnt/kmsg"]));
    let make = |name: &str, minor| {
        let device = rustix::fs::makedev(1, minor);
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            bundle.rootfs().join("mnt").join(name),
            FileType::CharacterDevice,
            mode,
            device,
        )
        .unwrap();
    };
    // /dev/null, and /dev/kmsg, missing from the rules.
    make("allowed", 3);
    make("kmsg", 11);
    let ended = bundle.start().await.end().await;
    assert_eq!(ended.stdout, "");
    assert!(ended.stderr.contains("kmsg: Operation not permitted"), "{}", ended.stderr);
    assert!(!ended.stderr.contains("allowed"), "{}", ended.stderr);
    bundle.delete().await;
}

async fn masked_paths_show_nothing(bed: &Bed) {
    let spec = shell("cat /proc/keys /proc/timer_list; ls /sys/firmware; cat /etc/hostname").with_linux(|linux| {
        linux.masked_paths_mut().as_mut().unwrap().extend(["/etc/hostname".to_owned(), "/nosuch".to_owned()]);
    });
    assert_eq!(bed.say(&spec).await, "");
}

async fn readonly_paths_cannot_be_written(bed: &Bed) {
    let spec = shell("echo 1 >/proc/sys/kernel/domainname; echo x >/etc/hostname; cat /etc/hostname; touch /etc/new")
        .with_linux(|linux| {
            linux.readonly_paths_mut().as_mut().unwrap().extend(["/etc".to_owned(), "/nosuch".to_owned()]);
        });
    let ended = bed.run(&spec).await;
    assert_eq!(ended.stdout, "lower\n");
    assert_eq!(ended.stderr.matches("Read-only file system").count(), 3, "{}", ended.stderr);
}

async fn a_readonly_root_cannot_be_written(bed: &Bed) {
    let mut spec =
        shell("touch /new /etc/new; echo still >/dev/shm/file; echo here >/run/file; cat /dev/shm/file /run/file");
    let mut root = spec.root().clone().unwrap();
    root.set_readonly(Some(true));
    spec.set_root(Some(root));
    let ended = bed.run(&spec).await;
    assert_eq!(ended.stdout, "still\nhere\n");
    assert_eq!(ended.stderr.matches("Read-only file system").count(), 2, "{}", ended.stderr);
}

async fn a_container_has_no_descriptors_but_three(bed: &Bed) {
    // ls itself has the listed folder open as well.
    let said = bed.say(&program(&["ls", "/proc/self/fd"])).await;
    assert_eq!(said.lines().count(), 4, "{said}");
}
