//! The options of `nerdctl run`, as seen by a process inside and by the kernel outside.

use std::fs;

use anyhow::{Result, ensure};
use e2e::pty::Pty;
use e2e::{Case, Skip, Test, case, cgroup, ensure_eq, ensure_has, eventually, lines, proc};

use crate::ctr_exit::IDLE;
use crate::nerdctl_life::nerdctl_cases;

pub(crate) fn cases() -> Vec<Case> {
    nerdctl_cases(vec![
        case!(nerdctl_run_passes_the_exit_code_on),
        case!(nerdctl_run_rm_leaves_no_container),
        case!(nerdctl_run_of_a_program_that_does_not_exist_names_it),
        case!(nerdctl_run_it_has_a_terminal_of_the_clients_size),
        case!(nerdctl_run_i_reads_stdin_to_its_end),
        case!(hostname_environment_and_working_directory_are_as_asked),
        case!(a_user_has_its_ids_and_groups),
        case!(a_user_by_name_is_looked_up_in_the_image),
        case!(a_read_only_root_is_read_only_but_tmpfs_is_not),
        case!(a_tmpfs_has_its_options),
        case!(bind_mounts_are_shared_or_read_only),
        case!(the_shared_memory_has_its_size),
        case!(ulimits_hold_in_init_and_exec),
        case!(sysctls_are_set_in_the_container_alone),
        case!(the_oom_score_holds_in_init_and_exec),
        case!(the_umask_holds_in_init),
        case!(a_device_is_there_and_works),
        case!(namespaces_are_the_containers_own),
        case!(the_hosts_pid_namespace_shows_the_hosts_processes),
        case!(the_hosts_network_is_the_hosts),
        case!(another_containers_namespaces_can_be_joined),
        case!(limits_are_in_the_cgroup),
        case!(update_changes_the_limits_of_a_running_container),
        case!(processors_can_be_chosen),
        case!(the_number_of_processes_is_limited),
        case!(an_init_process_reaps_for_the_container),
        case!(runc_can_be_named_as_the_runtime),
    ])
}

fn nerdctl_run_passes_the_exit_code_on(t: &Test) -> Result<()> {
    for code in [0, 7, 255] {
        t.nerdctl().run(&t.id("c"), &["--rm"], &["sh", "-c", &format!("exit {code}")]).run()?.expect_code(code)?;
    }
    Ok(())
}

fn nerdctl_run_rm_leaves_no_container(t: &Test) -> Result<()> {
    let name = t.id("c");
    ensure_eq!(t.nerdctl().run(&name, &["--rm"], &["echo", "hello"]).ok()?.text(), "hello\n");
    let all = t.nerdctl().cmd(&["ps", "--all", "--format", "{{.Names}}"]).ok()?.text();
    ensure!(!all.contains(&name), "{name} is still in {all}");
    Ok(())
}

fn nerdctl_run_of_a_program_that_does_not_exist_names_it(t: &Test) -> Result<()> {
    let out = t.nerdctl().run(&t.id("c"), &["--rm"], &["no-such-program"]).run()?.expect_failure()?;
    ensure_has!(out.stderr, "no-such-program");
    ensure!(out.stderr.contains("no such file or directory") || out.stderr.contains("not found"), "{out}");
    Ok(())
}

fn nerdctl_run_it_has_a_terminal_of_the_clients_size(t: &Test) -> Result<()> {
    let script = "tty; read word; echo \"<$word>\"; while [ ! -e /go ]; do stty size; sleep 0.05; done; exit 3";
    let name = t.id("c");
    let mut pty = Pty::spawn(&t.nerdctl().run(&name, &["-it", "--rm"], &["sh", "-c", script]), 31, 91)?;
    pty.shows("/dev/pts/0")?;
    pty.types("hello\n")?;
    pty.shows("<hello>")?;
    pty.shows("31 91")?;
    pty.resize(44, 132)?;
    pty.shows("44 132")?;
    // The exec may be killed before its end, because init ends on this.
    t.nerdctl().exec(&name, &["touch", "/go"]).run()?;
    ensure_eq!(pty.wait()?.0, 3);
    Ok(())
}

fn nerdctl_run_i_reads_stdin_to_its_end(t: &Test) -> Result<()> {
    let cmd = t.nerdctl().run(&t.id("c"), &["-i", "--rm"], &["sh", "-c", "wc -c"]);
    ensure_eq!(cmd.stdin_bytes(vec![b'x'; 3_000_000]).ok()?.trimmed(), "3000000");
    Ok(())
}

fn hostname_environment_and_working_directory_are_as_asked(t: &Test) -> Result<()> {
    let options = ["--hostname", "a-name", "--env", "GREETING=hello world", "--workdir", "/made/for/this"];
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &options, IDLE)?;
    let script = "hostname; echo \"$GREETING\"; pwd";
    ensure_eq!(t.nerdctl().exec_prints(&name, script)?, "a-name\nhello world\n/made/for/this");
    ensure_eq!(t.nerdctl().prints(&options, script)?, "a-name\nhello world\n/made/for/this");
    Ok(())
}

fn a_user_has_its_ids_and_groups(t: &Test) -> Result<()> {
    let (name, options) = (t.id("c"), ["--user", "1234:2345", "--group-add", "3456"]);
    let script = "id -u; id -g; id -G; cat /proc/self/status | grep -E '^Cap(Eff|Prm)'; touch /x || echo refused";
    let expected = "1234\n2345\n2345 3456\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nrefused";
    ensure_eq!(t.nerdctl().prints(&options, script)?, expected);
    t.nerdctl().start_sh(&name, &options, IDLE)?;
    ensure_eq!(t.nerdctl().exec_prints(&name, script)?, expected);
    // An exec may have another user.
    ensure_eq!(t.nerdctl().cmd(&["exec", "--user", "0:0", &name, "id", "-u"]).ok()?.trimmed(), "0");
    Ok(())
}

fn a_user_by_name_is_looked_up_in_the_image(t: &Test) -> Result<()> {
    ensure_eq!(t.nerdctl().prints(&["--user", "app"], "id -u; id -g; echo $HOME")?, "1000\n1000\n/home/app");
    t.nerdctl().run(&t.id("c"), &["--rm", "--user", "nobody-knows"], &["id"]).run()?.expect_failure()?;
    Ok(())
}

fn a_read_only_root_is_read_only_but_tmpfs_is_not(t: &Test) -> Result<()> {
    let script = "touch /x 2>&1; touch /tmp/x && echo written; grep ' / ' /proc/mounts | cut -d' ' -f4 | cut -d, -f1";
    let text = t.nerdctl().prints(&["--read-only", "--tmpfs", "/tmp"], script)?;
    ensure_eq!(text, "touch: /x: Read-only file system\nwritten\nro");
    Ok(())
}

fn a_tmpfs_has_its_options(t: &Test) -> Result<()> {
    let script =
        "grep ' /scratch ' /proc/mounts; dd if=/dev/zero of=/scratch/f bs=1k count=2000 2>&1; stat -c %a /scratch";
    let text = t.nerdctl().prints(&["--tmpfs", "/scratch:size=1m,mode=1770"], script)?;
    let (mount, rest) = text.split_once('\n').unwrap_or_default();
    ensure!(["tmpfs", "noexec", "nosuid", "nodev", "size=1024k"].iter().all(|word| mount.contains(word)), "{mount}");
    ensure_has!(rest, "No space left on device");
    ensure!(rest.ends_with("1770"), "{rest}");
    Ok(())
}

fn bind_mounts_are_shared_or_read_only(t: &Test) -> Result<()> {
    t.file("from-outside", "hello from outside\n")?;
    let folder = t.folder()?.display().to_string();
    let (rw, ro) = (format!("{folder}:/rw"), format!("{folder}:/ro:ro"));
    let script = "cat /ro/from-outside; echo hello from inside >/rw/from-inside; touch /ro/x 2>&1";
    let text = t.nerdctl().prints(&["--volume", &rw, "--volume", &ro], script).or_else(|error| {
        // touch fails, and with it the script: the message has its output.
        let text = error.to_string();
        if text.contains("Read-only") { Ok(text) } else { Err(error) }
    })?;
    ensure_has!(text, "hello from outside");
    ensure_has!(text, "touch: /ro/x: Read-only file system");
    ensure_eq!(fs::read_to_string(t.folder()?.join("from-inside"))?, "hello from inside\n");
    Ok(())
}

fn the_shared_memory_has_its_size(t: &Test) -> Result<()> {
    let text = t.nerdctl().prints(&["--shm-size", "3m"], "grep ' /dev/shm ' /proc/mounts")?;
    ensure_has!(text, "size=3072k");
    Ok(())
}

fn ulimits_hold_in_init_and_exec(t: &Test) -> Result<()> {
    let (name, options) = (t.id("c"), ["--ulimit", "nofile=123:456", "--ulimit", "core=0:0"]);
    let script = "ulimit -Sn; ulimit -Hn; ulimit -c";
    ensure_eq!(t.nerdctl().prints(&options, script)?, "123\n456\n0");
    t.nerdctl().start_sh(&name, &options, IDLE)?;
    ensure_eq!(t.nerdctl().exec_prints(&name, script)?, "123\n456\n0");
    Ok(())
}

fn sysctls_are_set_in_the_container_alone(t: &Test) -> Result<()> {
    let options = ["--sysctl", "net.ipv4.ip_default_ttl=77", "--sysctl", "kernel.shm_rmid_forced=1"];
    let script = "cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shm_rmid_forced";
    ensure_eq!(t.nerdctl().prints(&options, script)?, "77\n1");
    ensure_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_default_ttl")?.trim(), "64");
    Ok(())
}

fn the_oom_score_holds_in_init_and_exec(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &["--oom-score-adj", "555"], IDLE)?;
    ensure_eq!(proc::read(t.nerdctl().pid(&name)?, "oom_score_adj")?.trim(), "555");
    ensure_eq!(t.nerdctl().exec_prints(&name, "cat /proc/self/oom_score_adj")?, "555");
    Ok(())
}

fn the_umask_holds_in_init(t: &Test) -> Result<()> {
    ensure_eq!(t.nerdctl().prints(&["--umask", "0027"], "umask; touch /f; stat -c %a /f")?, "0027\n640");
    Ok(())
}

fn a_device_is_there_and_works(t: &Test) -> Result<()> {
    let script = "stat -c %F:%t:%T /dev/mine; head -c 4 /dev/mine | od -An -tx1";
    let text = t.nerdctl().prints(&["--device", "/dev/zero:/dev/mine"], script)?;
    ensure_eq!(lines(&text), ["character special file:1:5", "00 00 00 00"]);
    Ok(())
}

fn namespaces_are_the_containers_own(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], IDLE)?;
    let init = t.nerdctl().pid(&name)?;
    for kind in ["mnt", "uts", "ipc", "pid", "net"] {
        ensure!(proc::namespace(init, kind)? != proc::own_namespace(kind)?, "the {kind} namespace is the host's");
    }
    ensure_eq!(proc::namespace(init, "user")?, proc::own_namespace("user")?);
    ensure_eq!(
        t.nerdctl().exec_prints(&name, "cat /proc/1/comm; ls /proc/1/fd >/dev/null && echo is root")?,
        "sh\nis root"
    );
    // An exec is in all of them.
    let link = "for n in mnt uts ipc pid net; do readlink /proc/self/ns/$n; done";
    let same = ["mnt", "uts", "ipc", "pid", "net"].map(|kind| proc::namespace(init, kind)).into_iter();
    ensure_eq!(lines(&t.nerdctl().exec_prints(&name, link)?), same.collect::<Result<Vec<_>>>()?);
    Ok(())
}

fn the_hosts_pid_namespace_shows_the_hosts_processes(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &["--pid", "host"], IDLE)?;
    let init = t.nerdctl().pid(&name)?;
    ensure_eq!(proc::namespace(init, "pid")?, proc::own_namespace("pid")?);
    let containerd = t.bed().containerd_pid()?;
    ensure_eq!(t.nerdctl().exec_prints(&name, &format!("cat /proc/{containerd}/comm"))?, "containerd");
    // All its leftovers go with it, although no namespace ends.
    let (script, file) = ("sleep 1234567 >/dev/null 2>&1 & echo $! >/left", "cat /left");
    t.nerdctl().exec_prints(&name, script)?;
    let left: u32 = t.nerdctl().exec_prints(&name, file)?.parse()?;
    ensure!(proc::alive(left), "the exec's child has gone too early");
    t.nerdctl().cmd(&["rm", "--force", &name]).ok()?;
    proc::gone(init)?;
    proc::gone(left)
}

fn the_hosts_network_is_the_hosts(t: &Test) -> Result<()> {
    let text = t.nerdctl().prints(&["--net", "host"], "readlink /proc/self/ns/net")?;
    ensure_eq!(text, proc::own_namespace("net")?);
    Ok(())
}

fn another_containers_namespaces_can_be_joined(t: &Test) -> Result<()> {
    let first = t.id("c");
    t.nerdctl().start_sh(&first, &["--ipc", "shareable"], IDLE)?;
    let (init, from) = (t.nerdctl().pid(&first)?, format!("container:{first}"));
    let options = ["--pid", &from, "--net", &from, "--ipc", &from];
    let text = t.nerdctl().prints(&options, "for n in pid net ipc mnt; do readlink /proc/self/ns/$n; done")?;
    let saw = lines(&text);
    for (at, kind) in ["pid", "net", "ipc"].into_iter().enumerate() {
        ensure_eq!(saw.get(at).copied(), Some(proc::namespace(init, kind)?.as_str()), "the {kind} namespace");
    }
    ensure!(saw.get(3).copied() != Some(proc::namespace(init, "mnt")?.as_str()), "the mnt namespace is shared");
    Ok(())
}

fn limits_are_in_the_cgroup(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &["--memory", "48m", "--cpus", "0.5"], IDLE)?;
    let init = t.nerdctl().pid(&name)?;
    ensure_eq!(cgroup::memory_limit(init)?, 48 << 20);
    let (quota, period) = cgroup::cpu_quota(init)?;
    ensure_eq!(quota * 2, period, "quota and period");
    // An exec has the same limits.
    let exec = t.nerdctl().cmd(&["exec", &name, "sh", "-c", "echo $$ >/pid; exec sleep 1000"]).spawn()?;
    eventually("the exec to be in init's cgroup", || {
        t.nerdctl().exec_prints(&name, "test -s /pid")?;
        let below = proc::children(proc::parent(init)?).into_iter().filter(|pid| *pid != init);
        let sleeper = below.into_iter().find(|pid| proc::cmdline(*pid).starts_with("sleep 1000"));
        let sleeper = sleeper.ok_or_else(|| anyhow::anyhow!("no exec below the shim"))?;
        ensure_eq!(cgroup::folder(sleeper, "memory")?, cgroup::folder(init, "memory")?);
        ensure_eq!(cgroup::folder(sleeper, "cpu")?, cgroup::folder(init, "cpu")?);
        Ok(())
    })?;
    drop(exec);
    Ok(())
}

fn update_changes_the_limits_of_a_running_container(t: &Test) -> Result<()> {
    // Not --cpus, which nerdctl 2.3.5 forgets on update.
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &["--memory", "48m"], IDLE)?;
    let init = t.nerdctl().pid(&name)?;
    t.nerdctl().cmd(&["update", "--memory", "64m", "--cpu-quota", "25000", "--cpu-period", "100000", &name]).ok()?;
    ensure_eq!(cgroup::memory_limit(init)?, 64 << 20);
    ensure_eq!(cgroup::cpu_quota(init)?, (25_000, 100_000));
    ensure_eq!(t.nerdctl().pid(&name)?, init, "the same process");
    Ok(())
}

fn processors_can_be_chosen(t: &Test) -> Result<()> {
    ensure_eq!(
        t.nerdctl().prints(&["--cpuset-cpus", "0"], "grep Cpus_allowed_list /proc/self/status")?,
        "Cpus_allowed_list:\t0"
    );
    Ok(())
}

fn the_number_of_processes_is_limited(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &["--pids-limit", "20"], IDLE)?;
    ensure_eq!(cgroup::pids_limit(t.nerdctl().pid(&name)?)?, 20);
    let script = "i=0; while [ $i -lt 40 ]; do sleep 5 & i=$((i+1)); done";
    let out = t.nerdctl().exec(&name, &["sh", "-c", script]).run()?;
    ensure_has!(out.stderr, "can't fork");
    Ok(())
}

fn an_init_process_reaps_for_the_container(t: &Test) -> Result<()> {
    if t.bed().client("which").arg("tini").run()?.code != 0 {
        return Err(Skip::because("nerdctl's --init wants tini, which the test bed does not have"));
    }
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &["--init"], "(sh -c 'sleep 0.1' &); exec sleep 1000")?;
    let init = t.nerdctl().pid(&name)?;
    eventually("no zombie below init", || {
        ensure!(proc::children(init).into_iter().all(proc::alive), "a zombie");
        Ok(())
    })
}

fn runc_can_be_named_as_the_runtime(t: &Test) -> Result<()> {
    // A name of no shim stands for a runc-like program, run by the shim of runc's name through its
    // options.
    let name = t.id("c");
    t.nerdctl().run(&name, &["--detach", "--runtime", "/usr/sbin/runc"], &["sh", "-c", IDLE]).ok()?;
    let id = t.nerdctl().inspect(&name)?["Id"].as_str().unwrap_or_default().to_owned();
    let list = e2e::Cmd::new("runc").args(&["--root", "/run/containerd/runc/default", "list", "-q"]).ok()?.text();
    ensure_has!(list, id);
    t.nerdctl().exec(&name, &["true"]).ok()?;
    Ok(())
}
