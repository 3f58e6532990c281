//! Pods by `crictl`, as the kubelet makes them.

use anyhow::{Context, Result, ensure};
use e2e::{Case, Test, case, cgroup, ensure_eq, ensure_has, eventually, lines, proc};
use serde_json::{Value, json};

use crate::ctr_exit::IDLE;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(a_pod_of_two_containers_lives_and_goes),
        case!(both_containers_share_the_pods_network_and_live_in_one_shim),
        case!(a_pod_can_share_its_processes),
        case!(exec_in_a_pod_returns_output_and_exit_code),
        case!(a_streaming_exec_reads_stdin),
        case!(logs_of_a_pods_container_are_complete),
        case!(stats_of_a_pods_container_grow),
        case!(stats_of_a_pod_have_its_containers),
        case!(a_pods_container_exits_with_its_code),
        case!(a_pods_container_out_of_memory_is_oomkilled),
        case!(stop_waits_then_kills),
        case!(a_container_can_be_created_in_a_running_pod_again_and_again),
        case!(limits_of_a_pods_container_can_be_updated),
        case!(the_security_context_is_obeyed),
        case!(a_container_that_cannot_start_says_why),
        case!(a_pod_that_is_removed_leaves_nothing),
        case!(a_container_of_the_hosts_network_sees_it),
    ]
}

fn none() -> Value {
    Value::Null
}

/// The kubelet's request; the protocol's default is one pid namespace for the whole pod.
pub(crate) fn own_processes() -> Value {
    json!({ "linux": { "security_context": { "namespace_options": { "pid": 1 } } } })
}

fn a_pod_of_two_containers_lives_and_goes(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let one = pod.start("one", &format!("echo one is up; {IDLE}"), &none())?;
    let two = pod.start("two", &format!("echo two is up >&2; {IDLE}"), &none())?;
    cri.logs_have(&one, "one is up")?;
    cri.logs_have(&two, "two is up")?;
    let running = cri.cmd(&["ps", "--quiet", "--no-trunc", "--pod", &pod.id]).ok()?.text();
    let mut running = lines(&running);
    running.sort_unstable();
    let mut expected = [one.as_str(), two.as_str()];
    expected.sort_unstable();
    ensure_eq!(running, expected);
    ensure_eq!(cri.exec_prints(&one, "cat /proc/1/comm >/dev/null && echo works")?, "works");
    cri.cmd(&["stop", "--timeout", "5", &one]).ok()?;
    ensure_eq!(cri.exited(&one)?["exitCode"].as_i64().unwrap_or(0), 0);
    // The neighbour has not noticed.
    ensure_eq!(cri.exec_prints(&two, "echo still here")?, "still here");
    cri.cmd(&["rm", &one]).ok()?;
    cri.cmd(&["stopp", &pod.id]).ok()?;
    cri.exited(&two)?;
    cri.cmd(&["rmp", &pod.id]).ok()?;
    let left = cri.cmd(&["pods", "--quiet", "--no-trunc"]).ok()?.text();
    ensure!(!left.contains(&pod.id), "the pod is still in {left}");
    Ok(())
}

fn both_containers_share_the_pods_network_and_live_in_one_shim(t: &Test) -> Result<()> {
    let cri = t.cri();
    let own = own_processes();
    let pod = t.cri().pod(&own)?;
    let (one, two) = (pod.start("one", IDLE, &own)?, pod.start("two", IDLE, &own)?);
    let (pause, one_pid, two_pid) = (pod.pid()?, cri.pid(&one)?, cri.pid(&two)?);
    for kind in ["net", "ipc", "uts"] {
        let shared = proc::namespace(pause, kind)?;
        ensure_eq!(proc::namespace(one_pid, kind)?, shared, "{kind} of the first");
        ensure_eq!(proc::namespace(two_pid, kind)?, shared, "{kind} of the second");
        ensure!(shared != proc::own_namespace(kind)?, "the {kind} namespace is the host's");
    }
    for kind in ["pid", "mnt"] {
        ensure!(proc::namespace(one_pid, kind)? != proc::namespace(two_pid, kind)?, "{kind} is shared");
    }
    let shim = proc::parent(pause)?;
    ensure_has!(proc::cmdline(shim), "containerd-shim");
    ensure_eq!([proc::parent(one_pid)?, proc::parent(two_pid)?], [shim, shim], "the shims");
    let ours = proc::all()
        .into_iter()
        .filter(|pid| proc::cmdline(*pid).contains(&pod.id) && proc::cmdline(*pid).contains("-shim-"));
    ensure_eq!(ours.collect::<Vec<_>>(), [shim], "all shims of the pod");
    Ok(())
}

fn a_pod_can_share_its_processes(t: &Test) -> Result<()> {
    let cri = t.cri();
    // 0 is POD: the containers join the pause container's pid namespace.
    let shared = json!({ "linux": { "security_context": { "namespace_options": { "pid": 0 } } } });
    let pod = t.cri().pod(&shared)?;
    let (one, two) = (pod.start("one", "exec sleep 98765", &shared)?, pod.start("two", IDLE, &shared)?);
    ensure_eq!(proc::namespace(cri.pid(&one)?, "pid")?, proc::namespace(pod.pid()?, "pid")?);
    ensure_has!(cri.exec_prints(&two, "ps -o args")?, "sleep 98765");
    // The end of a container ends its processes, although the namespace stays.
    let orphan = cri.exec_prints(&two, "sleep 87654 >/dev/null 2>&1 & echo $!")?;
    let left = proc::all().into_iter().find(|pid| proc::cmdline(*pid) == "sleep 87654").context("the orphan")?;
    ensure!(!orphan.is_empty());
    cri.cmd(&["stop", "--timeout", "5", &two]).ok()?;
    cri.exited(&two)?;
    proc::gone(left)?;
    ensure_eq!(cri.inspect(&one)?["status"]["state"], "CONTAINER_RUNNING");
    Ok(())
}

fn exec_in_a_pod_returns_output_and_exit_code(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let id = pod.start("one", IDLE, &none())?;
    ensure_eq!(cri.exec(&id, "echo fine")?, (0, "fine".to_owned()));
    for code in [1, 42, 127] {
        ensure_eq!(cri.exec(&id, &format!("exit {code}"))?.0, code);
    }
    let out = cri.cmd(&["exec", "--sync", &id, "/no/such/program"]).run()?.expect_failure()?;
    ensure_has!(out.stderr, "/no/such/program");
    Ok(())
}

fn a_streaming_exec_reads_stdin(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let id = pod.start("one", IDLE, &none())?;
    let cmd = cri.cmd(&["exec", "--interactive", &id, "/bin/sh", "-c", "wc -c"]);
    ensure_eq!(cmd.stdin_bytes(vec![b'x'; 2_000_000]).ok()?.trimmed(), "2000000");
    Ok(())
}

fn logs_of_a_pods_container_are_complete(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let id = pod.start("one", "seq 1 10000; echo to stderr >&2", &none())?;
    cri.exited(&id)?;
    let expected: String = (1..=10_000).map(|n| format!("{n}\n")).collect();
    eventually("the log to be complete", || {
        let out = cri.cmd(&["logs", &id]).ok()?;
        ensure!(
            out.text() == expected,
            "{} lines, the last: {:?}",
            out.text().lines().count(),
            out.text().lines().last()
        );
        ensure_has!(out.stderr, "to stderr");
        Ok(())
    })
}

fn stats_of_a_pods_container_grow(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let id = pod.start("one", "while :; do :; done", &none())?;
    let stats = || -> Result<(u64, u64)> {
        let text = cri.cmd(&["stats", "--seconds", "0", "--output", "json", "--id", &id]).ok()?.text();
        let all: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        let number = |path: &str| all.pointer(path).and_then(Value::as_str).and_then(|s| s.parse().ok());
        let cpu = number("/stats/0/cpu/usageCoreNanoSeconds/value").with_context(|| format!("cpu in {text}"))?;
        let memory = number("/stats/0/memory/usageBytes/value").with_context(|| format!("memory in {text}"))?;
        Ok((cpu, memory))
    };
    let (first, memory) = eventually("the first stats", stats)?;
    ensure!(memory > 0, "it uses no memory");
    eventually("processor time to grow", || {
        let now = stats()?.0;
        ensure!(now > first, "still {now}");
        Ok(())
    })
}

fn stats_of_a_pod_have_its_containers(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let id = pod.start("one", IDLE, &none())?;
    eventually("the container in its pod's stats", || {
        let text = cri.cmd(&["statsp", "--output", "json", "--id", &pod.id]).ok()?.text();
        ensure_has!(text, pod.id);
        ensure_has!(text, id);
        Ok(())
    })
}

fn a_pods_container_exits_with_its_code(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    for (code, reason) in [(0, "Completed"), (42, "Error")] {
        let id = pod.start(&format!("exit{code}"), &format!("exit {code}"), &none())?;
        let status = cri.exited(&id)?;
        ensure_eq!(status["exitCode"].as_i64().unwrap_or(0), code);
        ensure_eq!(status["reason"], reason);
    }
    Ok(())
}

fn a_pods_container_out_of_memory_is_oomkilled(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let limit = json!({ "linux": { "resources": { "memory_limit_in_bytes": 16_777_216 } } });
    let id = pod.start("greedy", "exec tail /dev/zero", &limit)?;
    ensure_eq!(cri.exited(&id)?["exitCode"], 137);
    eventually("the reason", || {
        ensure_eq!(cri.inspect(&id)?["status"]["reason"], "OOMKilled");
        Ok(())
    })
}

fn stop_waits_then_kills(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let polite = pod.start("polite", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done", &none())?;
    let stubborn = pod.start("stubborn", "trap '' TERM; echo ready; while :; do sleep 0.1; done", &none())?;
    for (id, code) in [(&polite, 9), (&stubborn, 137)] {
        cri.logs_have(id, "ready")?;
        cri.cmd(&["stop", "--timeout", "2", id]).ok()?;
        ensure_eq!(cri.exited(id)?["exitCode"], code);
    }
    Ok(())
}

fn a_container_can_be_created_in_a_running_pod_again_and_again(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let shim = proc::parent(pod.pid()?)?;
    for attempt in 0..5 {
        let again = json!({ "metadata": { "attempt": attempt } });
        let id = pod.start("one", IDLE, &again)?;
        ensure_eq!(proc::parent(cri.pid(&id)?)?, shim, "the shim of attempt {attempt}");
        cri.cmd(&["rm", "--force", &id]).ok()?;
    }
    ensure!(proc::alive(shim), "the shim went with a container");
    Ok(())
}

fn limits_of_a_pods_container_can_be_updated(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let limit = json!({ "linux": { "resources": { "memory_limit_in_bytes": 50_331_648, "cpu_period": 100_000, "cpu_quota": 50_000 } } });
    let id = pod.start("one", IDLE, &limit)?;
    let init = cri.pid(&id)?;
    ensure_eq!(cgroup::memory_limit(init)?, 48 << 20);
    ensure_eq!(cgroup::cpu_quota(init)?, (50_000, 100_000));
    cri.cmd(&["update", "--memory", "67108864", "--cpu-quota", "25000", "--cpu-period", "100000", &id]).ok()?;
    ensure_eq!(cgroup::memory_limit(init)?, 64 << 20);
    ensure_eq!(cgroup::cpu_quota(init)?, (25_000, 100_000));
    Ok(())
}

fn the_security_context_is_obeyed(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let context = json!({ "linux": { "security_context": {
        "run_as_user": { "value": 1234 }, "run_as_group": { "value": 2345 }, "supplemental_groups": [3456],
        "readonly_rootfs": true, "no_new_privs": true,
        "capabilities": { "drop_capabilities": ["ALL"] },
        "seccomp": { "profile_type": 0 },
        "masked_paths": ["/proc/keys"], "readonly_paths": ["/proc/sys"],
    } } });
    let id = pod.start("one", IDLE, &context)?;
    let text = cri.exec_prints(
        &id,
        "id -u; id -g; id -G; cat /proc/keys; touch /tmp/x 2>&1 || :; grep -E '^(Cap|Sec|NoNew)' /proc/self/status",
    )?;
    ensure_eq!(lines(&text).get(..3), Some(&["1234", "2345", "2345 3456"][..]), "{text}");
    ensure_has!(text, "Read-only file system");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        ensure_eq!(proc::status_line(&text, set)?, "0000000000000000", "{set}");
    }
    ensure_eq!(proc::status_line(&text, "Seccomp")?, "2");
    ensure_eq!(proc::status_line(&text, "NoNewPrivs")?, "1");
    Ok(())
}

fn a_container_that_cannot_start_says_why(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let id = pod.create("one", "", &json!({ "command": ["/no/such/program"] }))?;
    let out = cri.cmd(&["start", &id]).run()?.expect_failure()?;
    ensure_has!(out.stderr, "/no/such/program");
    let status = cri.exited(&id)?;
    ensure_eq!(status["reason"], "StartError");
    ensure_has!(status["message"].as_str().unwrap_or_default(), "/no/such/program");
    // The pod can still be used.
    let id = pod.start("two", IDLE, &none())?;
    ensure_eq!(cri.exec_prints(&id, "echo works")?, "works");
    Ok(())
}

fn a_pod_that_is_removed_leaves_nothing(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&none())?;
    let (one, two) = (pod.start("one", IDLE, &none())?, pod.start("two", "sleep 1000", &none())?);
    let pause = pod.pid()?;
    let pids = [pause, cri.pid(&one)?, cri.pid(&two)?, proc::parent(pause)?];
    cri.cmd(&["rmp", "--force", &pod.id]).ok()?;
    for pid in pids {
        proc::gone(pid)?;
    }
    let left = e2e::bed::leaks()?;
    let left: Vec<_> =
        left.iter().filter(|line| [&pod.id, &one, &two].iter().any(|id| line.contains(id.as_str()))).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

fn a_container_of_the_hosts_network_sees_it(t: &Test) -> Result<()> {
    let cri = t.cri();
    // 2 is NODE.
    let host = json!({ "linux": { "security_context": { "namespace_options": { "network": 2 } } } });
    let pod = t.cri().pod(&host)?;
    let id = pod.start("one", IDLE, &host)?;
    ensure_eq!(cri.exec_prints(&id, "readlink /proc/self/ns/net")?, proc::own_namespace("net")?);
    Ok(())
}
