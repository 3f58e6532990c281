//! Exit codes and the life of a task, seen by `ctr`.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::cmd::Running;
use e2e::{Case, Test, case, ensure_eq, ensure_has, eventually, lines, proc};
use serde_json::Value;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(run_returns_the_exit_code_of_init),
        case!(run_of_a_program_that_does_not_exist_names_it),
        case!(a_task_killed_by_sigkill_exits_with_137),
        case!(sigterm_reaches_init_which_chooses_its_exit_code),
        case!(a_signal_by_number_reaches_init),
        case!(exec_returns_its_exit_code),
        case!(exec_of_a_program_that_does_not_exist_names_it_and_spares_init),
        case!(exec_returns_each_of_20_parallel_exit_codes),
        case!(an_exec_that_runs_when_init_exits_ends_with_it),
        case!(an_exec_can_be_killed_alone),
        case!(an_exec_id_in_use_is_refused),
        case!(exec_into_a_stopped_task_is_refused),
        case!(a_second_task_of_the_same_container_is_refused),
        case!(a_signal_to_a_dead_task_is_an_error),
        case!(a_running_task_is_not_deleted_without_force),
        case!(task_ps_lists_init_and_execs),
        case!(task_metrics_show_limits_memory_and_growing_processor_time),
        case!(a_paused_task_stands_still_and_goes_on),
        case!(a_killed_exec_of_a_paused_task_does_not_wake_the_others),
        case!(a_task_that_is_never_at_rest_is_paused_and_killed),
        case!(a_container_can_be_started_again_after_its_task_ended),
        case!(a_short_lived_init_exits_before_anyone_asks),
    ]
}

/// Script that keeps a container idle, and ends at once on SIGTERM.
pub(crate) const IDLE: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

fn run_returns_the_exit_code_of_init(t: &Test) -> Result<()> {
    for code in [0, 1, 42, 127, 255] {
        t.ctr().run(&t.id("c"), &["--rm"], &["sh", "-c", &format!("exit {code}")]).run()?.expect_code(code)?;
    }
    Ok(())
}

fn run_of_a_program_that_does_not_exist_names_it(t: &Test) -> Result<()> {
    for program in ["no-such-program", "/no/such/program"] {
        let id = t.id("c");
        let out = t.ctr().run(&id, &["--rm"], &[program]).run()?.expect_failure()?;
        ensure_has!(out.stderr, program);
        ensure!(out.stderr.contains("no such file or directory") || out.stderr.contains("not found"), "{out}");
        // The attempt leaves nothing: the same id can be used at once.
        t.ctr().run(&id, &["--rm"], &["true"]).ok()?;
    }
    Ok(())
}

fn a_task_killed_by_sigkill_exits_with_137(t: &Test) -> Result<()> {
    let id = t.id("c");
    let client = t.ctr().run(&id, &["--rm"], &["sh", "-c", &format!("echo up; {IDLE}")]).spawn()?;
    client.sees("up")?;
    t.ctr().kill(&id, "SIGKILL")?;
    client.wait()?.expect_code(137)?;
    Ok(())
}

fn sigterm_reaches_init_which_chooses_its_exit_code(t: &Test) -> Result<()> {
    let id = t.id("c");
    let script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done";
    let client = t.ctr().run(&id, &["--rm"], &["sh", "-c", script]).spawn()?;
    client.sees("up")?;
    t.ctr().kill(&id, "SIGTERM")?;
    client.wait()?.expect_code(9)?;
    Ok(())
}

fn a_signal_by_number_reaches_init(t: &Test) -> Result<()> {
    let id = t.id("c");
    // SIGRTMIN+3, whose name is unknown to some clients.
    let script = "trap 'exit 7' 37; echo up; while :; do sleep 0.1; done";
    let client = t.ctr().run(&id, &["--rm"], &["sh", "-c", script]).spawn()?;
    client.sees("up")?;
    t.ctr().kill(&id, "37")?;
    client.wait()?.expect_code(7)?;
    Ok(())
}

fn exec_returns_its_exit_code(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    for code in [0, 1, 42, 127] {
        t.ctr().exec(&id, &["sh", "-c", &format!("exit {code}")]).run()?.expect_code(code)?;
    }
    Ok(())
}

fn exec_of_a_program_that_does_not_exist_names_it_and_spares_init(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    for program in ["no-such-program", "/no/such/program"] {
        let out = t.ctr().exec(&id, &[program]).run()?.expect_failure()?;
        ensure_has!(out.stderr, program);
        ensure!(out.stderr.contains("no such file or directory") || out.stderr.contains("not found"), "{out}");
    }
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    t.ctr().exec(&id, &["true"]).ok()?;
    Ok(())
}

fn exec_returns_each_of_20_parallel_exit_codes(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    // Each exec waits for a file, so that all run at once; then all exit together.
    let script = |code: i32| format!("echo up; while [ ! -e /go ]; do sleep 0.05; done; echo bye {code}; exit {code}");
    let started = (1..=20).map(|code| t.ctr().exec(&id, &["sh", "-c", &script(code)]).spawn());
    let clients = started.collect::<Result<Vec<Running>>>()?;
    for client in &clients {
        client.sees("up")?;
    }
    t.ctr().exec(&id, &["touch", "/go"]).ok()?;
    for (client, code) in clients.into_iter().zip(1..) {
        let out = client.wait()?.expect_code(code)?;
        ensure_eq!(out.text(), format!("up\nbye {code}\n"));
    }
    Ok(())
}

fn an_exec_that_runs_when_init_exits_ends_with_it(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let client = t.ctr().exec(&id, &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    client.sees("up")?;
    t.ctr().kill(&id, "SIGTERM")?;
    // The kernel kills a pid namespace with its init.
    client.wait()?.expect_code(137)?;
    t.ctr().becomes(&id, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&id)?, 0, "init's own exit code");
    Ok(())
}

fn an_exec_can_be_killed_alone(t: &Test) -> Result<()> {
    let (id, exec) = (t.id("c"), t.id("x"));
    t.ctr().start_sh(&id, IDLE)?;
    let client = t.ctr().exec_as(&id, &exec, &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
    client.sees("up")?;
    t.ctr().task(&["kill", "--signal", "SIGKILL", "--exec-id", &exec, &id]).ok()?;
    client.wait()?.expect_code(137)?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    Ok(())
}

fn an_exec_id_in_use_is_refused(t: &Test) -> Result<()> {
    let (id, exec) = (t.id("c"), t.id("x"));
    t.ctr().start_sh(&id, IDLE)?;
    let first = t.ctr().exec_as(&id, &exec, &["sh", "-c", "echo up; read line; exit 5"]).spawn()?;
    first.sees("up")?;
    let second = t.ctr().exec_as(&id, &exec, &["true"]).run()?.expect_failure()?;
    // The code is AlreadyExists; ctr shows only the words.
    ensure_has!(second.stderr, "exists");
    // The refusal has not touched the first exec.
    let mut first = first;
    first.write(b"\n")?;
    first.wait()?.expect_code(5)?;
    Ok(())
}

fn exec_into_a_stopped_task_is_refused(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start(&id, &[], &["true"])?;
    t.ctr().becomes(&id, "STOPPED")?;
    t.ctr().exec(&id, &["true"]).run()?.expect_failure()?;
    Ok(())
}

fn a_second_task_of_the_same_container_is_refused(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let container = t.ctr().run(&id, &["--detach", "--null-io"], &["true"]).run()?.expect_failure()?;
    ensure_has!(container.stderr, "already exists");
    let task = t.ctr().task(&["start", "--detach", "--null-io", &id]).run()?.expect_failure()?;
    ensure_has!(task.stderr, "already exists");
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    Ok(())
}

fn a_signal_to_a_dead_task_is_an_error(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start(&id, &[], &["true"])?;
    t.ctr().becomes(&id, "STOPPED")?;
    let out = t.ctr().task(&["kill", "--signal", "SIGTERM", &id]).run()?.expect_failure()?;
    ensure_has!(out.stderr, "finished");
    let exec = t.ctr().task(&["kill", "--signal", "SIGTERM", "--exec-id", "never-was", &id]).run()?.expect_failure()?;
    ensure_has!(exec.stderr, "never-was");
    Ok(())
}

fn a_running_task_is_not_deleted_without_force(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    t.ctr().task(&["rm", &id]).run()?.expect_failure()?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    let init = t.ctr().pid(&id)?;
    t.ctr().remove(&id)?;
    proc::gone(init)
}

fn task_ps_lists_init_and_execs(t: &Test) -> Result<()> {
    let (id, exec) = (t.id("c"), t.id("x"));
    t.ctr().start_sh(&id, IDLE)?;
    let client = t.ctr().exec_as(&id, &exec, &["sh", "-c", "echo up; read line"]).spawn()?;
    client.sees("up")?;
    let text = t.ctr().task(&["ps", &id]).ok()?.text();
    let init = t.ctr().pid(&id)?.to_string();
    ensure!(lines(&text).iter().any(|line| line.split_whitespace().next() == Some(&init)), "no {init} in {text}");
    // The exec's row has the exec's id.
    let row = lines(&text).into_iter().find(|line| line.contains(&exec));
    ensure!(row.is_some(), "no {exec} in {text}");
    Ok(())
}

fn task_metrics_show_limits_memory_and_growing_processor_time(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start(&id, &["--memory-limit", "50331648"], &["sh", "-c", "while :; do :; done"])?;
    let first = t.ctr().metrics(&id)?;
    // cgroup v2 has other names for the same values.
    let number = |metrics: &Value, v1: &str, v2: &str| {
        let value = metrics.pointer(v1).or(metrics.pointer(v2)).and_then(Value::as_u64);
        value.with_context(|| format!("neither {v1} nor {v2} in {metrics}"))
    };
    ensure_eq!(number(&first, "/memory/usage/limit", "/memory/usage_limit")?, 50_331_648);
    ensure!(number(&first, "/memory/usage/usage", "/memory/usage")? > 0, "it uses no memory");
    ensure_eq!(number(&first, "/pids/current", "/pids/current")?, 1);
    let cpu = |metrics: &Value| number(metrics, "/cpu/usage/total", "/cpu/usage_usec");
    eventually("processor time to grow", || {
        let now = t.ctr().metrics(&id)?;
        ensure!(cpu(&now)? > cpu(&first)?, "{now}");
        Ok(())
    })
}

fn a_paused_task_stands_still_and_goes_on(t: &Test) -> Result<()> {
    let id = t.id("c");
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", t.folder()?.display());
    let script = "i=0; while :; do i=$((i+1)); echo $i >/shared/new; mv /shared/new /shared/count; sleep 0.02; done";
    t.ctr().start(&id, &["--mount", &mount], &["sh", "-c", script])?;
    let count = || -> Result<u64> { Ok(fs::read_to_string(t.folder()?.join("count"))?.trim().parse()?) };
    let grows = |from: u64| {
        eventually("the counter to grow", || {
            let now = count()?;
            ensure!(now > from, "still {now}");
            Ok(())
        })
    };
    grows(0)?;
    t.ctr().task(&["pause", &id]).ok()?;
    ensure_eq!(t.ctr().status(&id)?, "PAUSED");
    ensure!(e2e::cgroup::frozen(t.ctr().pid(&id)?)?, "its cgroup is not frozen");
    let before = count()?;
    let refused = t.ctr().exec(&id, &["true"]).run()?.expect_failure()?;
    ensure_has!(refused.stderr, "paused");
    ensure_eq!(count()?, before, "the counter while paused");
    t.ctr().task(&["resume", &id]).ok()?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    grows(before)
}

fn a_killed_exec_of_a_paused_task_does_not_wake_the_others(t: &Test) -> Result<()> {
    let (id, exec) = (t.id("c"), t.id("x"));
    t.ctr().start_sh(&id, IDLE)?;
    let client = t.ctr().exec_as(&id, &exec, &["sh", "-c", "echo up; read line"]).spawn()?;
    client.sees("up")?;
    t.ctr().task(&["pause", &id]).ok()?;
    t.ctr().task(&["kill", "--signal", "SIGKILL", "--exec-id", &exec, &id]).ok()?;
    ensure_eq!(t.ctr().status(&id)?, "PAUSED");
    ensure!(e2e::cgroup::frozen(t.ctr().pid(&id)?)?, "its cgroup is not frozen any more");
    t.ctr().task(&["resume", &id]).ok()?;
    client.wait()?.expect_code(137)?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    Ok(())
}

fn a_task_that_is_never_at_rest_is_paused_and_killed(t: &Test) -> Result<()> {
    let id = t.id("c");
    // The vforked child waits for a writer of the pipe before its exec; the parent waits for the
    // exec.
    let program = "import os
os.mkfifo('/pipe')
os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, '/pipe', os.O_RDONLY, 0)])";
    t.ctr().start_python(&id, &[], program)?;
    let init = t.ctr().pid(&id)?;
    eventually("a child", || {
        ensure!(!proc::children(init).is_empty(), "there is none");
        Ok(())
    })?;
    t.ctr().task(&["pause", &id]).ok()?;
    ensure_eq!(t.ctr().status(&id)?, "PAUSED");
    ensure!(e2e::cgroup::frozen(init)?, "its cgroup is not frozen");
    t.ctr().task(&["resume", &id]).ok()?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    let pause = t.ctr().task(&["pause", &id]).spawn()?;
    eventually("it to be frozen", || {
        ensure!(e2e::cgroup::frozen(init)?, "it is not");
        Ok(())
    })?;
    t.ctr().kill(&id, "SIGKILL")?;
    // The pause may come too late.
    pause.wait()?;
    t.ctr().becomes(&id, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&id)?, 137);
    Ok(())
}

fn a_container_can_be_started_again_after_its_task_ended(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start(&id, &[], &["sh", "-c", "exit 4"])?;
    for _ in 0..3 {
        t.ctr().becomes(&id, "STOPPED")?;
        ensure_eq!(t.ctr().delete_task(&id)?, 4);
        t.ctr().task(&["start", "--detach", "--null-io", &id]).ok()?;
    }
    Ok(())
}

fn a_short_lived_init_exits_before_anyone_asks(t: &Test) -> Result<()> {
    // The exit may come before Start has answered, and must be reported all the same.
    for _ in 0..10 {
        let id = t.id("c");
        t.ctr().start(&id, &[], &["sh", "-c", "exit 3"])?;
        t.ctr().becomes(&id, "STOPPED")?;
        ensure_eq!(t.ctr().delete_task(&id)?, 3);
    }
    Ok(())
}
