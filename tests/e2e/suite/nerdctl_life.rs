//! A container's life by `nerdctl`: logs, exec, pause, stats, stop, kill, restart policies.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::events::Events;
use e2e::pty::Pty;
use e2e::target::Shim;
use e2e::{Case, Test, case, cgroup, ensure_eq, ensure_has, eventually, lines, proc};
use serde_json::Value;

use crate::ctr_exit::IDLE;

/// Marks tests as skipped where nerdctl cannot select the target's runtime.
pub(crate) fn nerdctl_cases(cases: Vec<Case>) -> Vec<Case> {
    let reason = "nerdctl passes no options to a runtime of this name, so it cannot choose runc";
    cases.into_iter().map(|case| case.except(Shim::GpusnapRunc, reason)).collect()
}

pub(crate) fn cases() -> Vec<Case> {
    nerdctl_cases(vec![
        case!(logs_have_stdout_and_stderr_apart),
        case!(logs_of_ten_thousand_lines_are_complete),
        case!(logs_follow_until_the_container_ends),
        case!(nerdctl_exec_passes_output_and_exit_code_on),
        case!(nerdctl_exec_it_has_a_terminal_of_its_own),
        case!(nerdctl_exec_detached_runs_on),
        case!(a_paused_container_stands_still_and_refuses_exec),
        case!(stats_show_memory_and_growing_processor_time),
        case!(nerdctl_top_lists_the_processes),
        case!(stop_honours_sigterm),
        case!(stop_kills_what_ignores_sigterm),
        case!(stop_sends_the_signal_that_the_container_asked_for),
        case!(kill_sends_the_signal),
        case!(a_running_container_is_removed_only_by_force),
        case!(a_stopped_container_can_be_started_again),
        case!(nerdctl_restart_gives_a_new_process),
        case!(wait_gives_the_exit_code),
        case!(attach_sees_output_and_detaches),
        case!(a_container_out_of_memory_exits_with_137),
        case!(restart_always_restarts),
        case!(restart_on_failure_gives_up_after_its_count),
        case!(restart_no_does_not_restart),
    ])
}

fn logs_have_stdout_and_stderr_apart(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], &format!("echo to stdout; echo to stderr >&2; {IDLE}"))?;
    eventually("the log to be complete", || {
        let (stdout, stderr) = t.nerdctl().logs(&name)?;
        ensure_eq!(stdout, "to stdout\n");
        ensure_has!(stderr, "to stderr");
        Ok(())
    })
}

fn logs_of_ten_thousand_lines_are_complete(t: &Test) -> Result<()> {
    let name = t.id("c");
    // The container lives on: at its end nerdctl's logger drops all unread output.
    t.nerdctl().start_sh(&name, &[], &format!("seq 1 10000; {IDLE}"))?;
    let expected: String = (1..=10_000).map(|n| format!("{n}\n")).collect();
    eventually("the log to be complete", || {
        let (stdout, _) = t.nerdctl().logs(&name)?;
        ensure!(stdout == expected, "{} lines, the last: {:?}", stdout.lines().count(), stdout.lines().last());
        Ok(())
    })
}

fn logs_follow_until_the_container_ends(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], "for n in one two; do echo $n; while [ ! -e /$n ]; do sleep 0.05; done; done")?;
    let follow = t.nerdctl().cmd(&["logs", "--follow", &name]).spawn()?;
    for line in ["one", "two"] {
        follow.sees(line)?;
        // The last exec may be killed before its end, because init ends on it.
        t.nerdctl().exec(&name, &["touch", &format!("/{line}")]).run()?;
    }
    ensure_eq!(follow.wait()?.text(), "one\ntwo\n");
    Ok(())
}

fn nerdctl_exec_passes_output_and_exit_code_on(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], IDLE)?;
    let out = t.nerdctl().exec(&name, &["sh", "-c", "echo out; echo err >&2; exit 42"]).run()?.expect_failure()?;
    ensure_eq!(out.text(), "out\n");
    ensure_has!(out.stderr, "err\n");
    // nerdctl 2.3.5 itself exits with 1.
    ensure_has!(out.stderr, "exec failed with exit code 42");
    let cmd = t.nerdctl().cmd(&["exec", "-i", &name, "wc", "-c"]);
    ensure_eq!(cmd.stdin_bytes(vec![b'x'; 1_000_000]).ok()?.trimmed(), "1000000");
    let options = ["exec", "--env", "A=b c", "--workdir", "/tmp", &name, "sh", "-c", "echo $A; pwd"];
    ensure_eq!(t.nerdctl().cmd(&options).ok()?.trimmed(), "b c\n/tmp");
    Ok(())
}

fn nerdctl_exec_it_has_a_terminal_of_its_own(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], IDLE)?;
    let script = "tty; while [ ! -e /go ]; do stty size; sleep 0.05; done; exit 6";
    let mut pty = Pty::spawn(&t.nerdctl().cmd(&["exec", "-it", &name, "sh", "-c", script]), 22, 66)?;
    pty.shows("/dev/pts/0")?;
    pty.shows("22 66")?;
    pty.resize(45, 123)?;
    pty.shows("45 123")?;
    t.nerdctl().exec(&name, &["touch", "/go"]).ok()?;
    pty.types("\n")?;
    ensure_has!(pty.wait()?.1, "exec failed with exit code 6");
    Ok(())
}

fn nerdctl_exec_detached_runs_on(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], IDLE)?;
    let script = "while [ ! -e /go ]; do sleep 0.05; done; echo done >/done";
    t.nerdctl().cmd(&["exec", "-d", &name, "sh", "-c", script]).ok()?;
    t.nerdctl().exec(&name, &["touch", "/go"]).ok()?;
    eventually("the exec to do its work", || {
        ensure_eq!(t.nerdctl().exec_prints(&name, "cat /done")?, "done");
        Ok(())
    })
}

fn a_paused_container_stands_still_and_refuses_exec(t: &Test) -> Result<()> {
    let name = t.id("c");
    let volume = format!("{}:/shared", t.folder()?.display());
    let script = "i=0; while :; do i=$((i+1)); echo $i >/shared/new; mv /shared/new /shared/count; sleep 0.02; done";
    t.nerdctl().start_sh(&name, &["--volume", &volume], script)?;
    let count = || -> Result<u64> { Ok(fs::read_to_string(t.folder()?.join("count"))?.trim().parse()?) };
    let grows = |from: u64| {
        eventually("the counter to grow", || {
            let now = count()?;
            ensure!(now > from, "still {now}");
            Ok(())
        })
    };
    grows(0)?;
    t.nerdctl().cmd(&["pause", &name]).ok()?;
    ensure_eq!(t.nerdctl().state(&name, "Status")?, "paused");
    ensure!(cgroup::frozen(t.nerdctl().pid(&name)?)?, "its cgroup is not frozen");
    let before = count()?;
    t.nerdctl().exec(&name, &["true"]).run()?.expect_failure()?;
    ensure_eq!(count()?, before, "the counter while paused");
    t.nerdctl().cmd(&["unpause", &name]).ok()?;
    ensure_eq!(t.nerdctl().state(&name, "Status")?, "running");
    grows(before)
}

fn cpu_nanoseconds(metrics: &Value) -> Result<u64> {
    let v1 = metrics.pointer("/cpu/usage/total").and_then(Value::as_u64);
    let v2 = metrics.pointer("/cpu/usage_usec").and_then(Value::as_u64).map(|us| us * 1000);
    v1.or(v2).with_context(|| format!("no processor time in {metrics}"))
}

fn stats_show_memory_and_growing_processor_time(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &["--memory", "64m"], "while :; do :; done")?;
    eventually("memory in `nerdctl stats`", || {
        let text = t.nerdctl().cmd(&["stats", "--no-stream", "--format", "{{.MemUsage}}", &name]).ok()?.trimmed();
        ensure!(text.ends_with("/ 64MiB"), "{text}");
        ensure!(!text.starts_with("0B"), "{text}");
        Ok(())
    })?;
    let id = t.nerdctl().inspect(&name)?["Id"].as_str().context("Id")?.to_owned();
    let first = cpu_nanoseconds(&t.ctr().metrics(&id)?)?;
    eventually("processor time to grow", || {
        let now = cpu_nanoseconds(&t.ctr().metrics(&id)?)?;
        ensure!(now > first, "still {now}");
        Ok(())
    })
}

fn nerdctl_top_lists_the_processes(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], "sleep 4321 & wait")?;
    eventually("init and its child", || {
        let text = t.nerdctl().cmd(&["top", &name]).ok()?.text();
        ensure_has!(text, "sleep 4321");
        ensure_has!(text, t.nerdctl().pid(&name)?.to_string());
        Ok(())
    })
}

fn stop_honours_sigterm(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done")?;
    t.nerdctl().logs_have(&name, "ready")?;
    t.nerdctl().cmd(&["stop", &name]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 9);
    Ok(())
}

fn stop_kills_what_ignores_sigterm(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], "trap '' TERM; echo ready; while :; do sleep 0.1; done")?;
    t.nerdctl().logs_have(&name, "ready")?;
    t.nerdctl().cmd(&["stop", "--time", "1", &name]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 137);
    Ok(())
}

fn stop_sends_the_signal_that_the_container_asked_for(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(
        &name,
        &["--stop-signal", "USR2"],
        "trap 'exit 12' USR2; echo ready; while :; do sleep 0.1; done",
    )?;
    t.nerdctl().logs_have(&name, "ready")?;
    t.nerdctl().cmd(&["stop", &name]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 12);
    Ok(())
}

fn kill_sends_the_signal(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], "trap 'echo got USR1' USR1; echo ready; while :; do sleep 0.1; done")?;
    t.nerdctl().logs_have(&name, "ready")?;
    t.nerdctl().cmd(&["kill", "--signal", "USR1", &name]).ok()?;
    t.nerdctl().logs_have(&name, "got USR1")?;
    ensure_eq!(t.nerdctl().state(&name, "Status")?, "running");
    t.nerdctl().cmd(&["kill", &name]).ok()?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 137);
    Ok(())
}

fn a_running_container_is_removed_only_by_force(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], IDLE)?;
    let (init, shim) = (t.nerdctl().pid(&name)?, t.nerdctl().shim(&name)?);
    t.nerdctl().cmd(&["rm", &name]).run()?.expect_failure()?;
    ensure_eq!(t.nerdctl().state(&name, "Status")?, "running");
    t.nerdctl().cmd(&["rm", "--force", &name]).ok()?;
    proc::gone(init)?;
    proc::gone(shim)
}

fn a_stopped_container_can_be_started_again(t: &Test) -> Result<()> {
    let name = t.id("c");
    let script = "echo run >>/runs; wc -l </runs; trap 'exit 0' TERM; while :; do sleep 0.1; done";
    t.nerdctl().start_sh(&name, &[], script)?;
    t.nerdctl().logs_have(&name, "1")?;
    for runs in ["2", "3"] {
        t.nerdctl().cmd(&["stop", &name]).ok()?;
        t.nerdctl().becomes(&name, "exited")?;
        t.nerdctl().cmd(&["start", &name]).ok()?;
        // The files and the log are still there.
        t.nerdctl().logs_have(&name, runs)?;
    }
    ensure_eq!(lines(&t.nerdctl().logs(&name)?.0), ["1", "2", "3"]);
    Ok(())
}

fn nerdctl_restart_gives_a_new_process(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], IDLE)?;
    let first = t.nerdctl().pid(&name)?;
    t.nerdctl().cmd(&["restart", "--time", "5", &name]).ok()?;
    t.nerdctl().becomes(&name, "running")?;
    ensure!(t.nerdctl().pid(&name)? != first, "the same process {first}");
    proc::gone(first)
}

fn wait_gives_the_exit_code(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &[], "while [ ! -e /go ]; do sleep 0.05; done; exit 21")?;
    let wait = t.nerdctl().cmd(&["wait", &name]).spawn()?;
    // The exec may be killed before its end, because init ends on this.
    t.nerdctl().exec(&name, &["touch", "/go"]).run()?;
    ensure_eq!(wait.wait()?.expect_code(0)?.trimmed(), "21");
    Ok(())
}

fn attach_sees_output_and_detaches(t: &Test) -> Result<()> {
    let name = t.id("c");
    let run = t.nerdctl().run(&name, &["-it"], &["sh", "-c", "while read word; do echo \"<$word>\"; done"]);
    for (client, word) in [(run, "first"), (t.nerdctl().cmd(&["attach", &name]), "second")] {
        let mut pty = Pty::spawn(&client, 24, 80)?;
        // The client does not report that it is attached, so type until the first answer.
        eventually("an answer", || {
            pty.types(&format!("{word}\n"))?;
            ensure_has!(pty.screen(), format!("<{word}>"));
            Ok(())
        })?;
        pty.types("\u{10}\u{11}")?;
        pty.wait()?;
        ensure_eq!(t.nerdctl().state(&name, "Status")?, "running");
    }
    Ok(())
}

fn a_container_out_of_memory_exits_with_137(t: &Test) -> Result<()> {
    let (name, events) = (t.id("c"), Events::subscribe(t)?);
    let volume = format!("{}:/shared", t.folder()?.display());
    // runc's own start needs memory too, and Debian's shim reports nothing from before its watch
    // begins.
    let script = "while [ ! -e /shared/go ]; do sleep 0.05; done; exec tail /dev/zero";
    t.nerdctl().start_sh(&name, &["--memory", "64m", "--volume", &volume], script)?;
    fs::write(t.folder()?.join("go"), "")?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 137);
    let id = t.nerdctl().inspect(&name)?["Id"].as_str().context("Id")?.to_owned();
    events.of_task_until(&id, "/tasks/oom")?;
    Ok(())
}

fn restart_always_restarts(t: &Test) -> Result<()> {
    let name = t.id("c");
    let volume = format!("{}:/shared", t.folder()?.display());
    let script = "echo run >>/shared/runs; while [ ! -e /shared/go ]; do sleep 0.05; done; rm /shared/go; exit 0";
    t.nerdctl().start_sh(&name, &["--restart", "always", "--volume", &volume], script)?;
    let first = t.nerdctl().pid(&name)?;
    fs::write(t.folder()?.join("go"), "")?;
    // containerd looks every ten seconds.
    eventually("a second run", || {
        ensure_eq!(fs::read_to_string(t.folder()?.join("runs"))?.lines().count(), 2);
        ensure!(t.nerdctl().pid(&name)? != first, "the same process");
        Ok(())
    })?;
    t.nerdctl().exec(&name, &["true"]).ok()?;
    Ok(())
}

fn restart_on_failure_gives_up_after_its_count(t: &Test) -> Result<()> {
    let name = t.id("c");
    let volume = format!("{}:/shared", t.folder()?.display());
    let options = ["--restart", "on-failure:2", "--volume", &volume];
    t.nerdctl().start_sh(&name, &options, "echo run >>/shared/runs; exit 1")?;
    let runs = || -> Result<usize> { Ok(fs::read_to_string(t.folder()?.join("runs"))?.lines().count()) };
    eventually("three runs", || {
        ensure_eq!(runs()?, 3);
        Ok(())
    })?;
    ensure_eq!(t.nerdctl().exit_code(&name)?, 1);
    Ok(())
}

fn restart_no_does_not_restart(t: &Test) -> Result<()> {
    let (again, once) = (t.id("c"), t.id("c"));
    let volume = format!("{}:/shared", t.folder()?.display());
    let script = |file: &str| format!("echo run >>/shared/{file}; exit 1");
    t.nerdctl().start_sh(&once, &["--restart", "no", "--volume", &volume], &script("once"))?;
    t.nerdctl().start_sh(&again, &["--restart", "always", "--volume", &volume], &script("again"))?;
    // Once the other container has been restarted twice, the monitor has seen this one too.
    let runs = |file: &str| -> Result<usize> { Ok(fs::read_to_string(t.folder()?.join(file))?.lines().count()) };
    eventually("three runs of the other", || {
        ensure!(runs("again")? >= 3, "{} runs", runs("again")?);
        Ok(())
    })?;
    ensure_eq!(runs("once")?, 1);
    Ok(())
}
