//! Death of containerd or of the shim: containers live on, or are cleaned up.

use std::fs;

use anyhow::{Result, ensure};
use e2e::events::{Events, position};
use e2e::target::{Containerd, Shim, Target};
use e2e::{Case, Test, bed, case, cgroup, ensure_eq, ensure_has, eventually, lines, proc};
use serde_json::{Value, json};

use crate::ctr_exit::IDLE;
use crate::nerdctl_life::nerdctl_cases;

pub(crate) fn cases() -> Vec<Case> {
    let all = vec![
        case!(a_container_survives_containerds_death).alone(),
        case!(an_exec_survives_containerds_death).alone(),
        case!(a_paused_container_survives_containerds_death).alone(),
        case!(a_pod_survives_containerds_death).alone(),
        case!(logs_go_on_after_containerds_death).alone(),
        case!(an_exit_after_containerds_death_is_told).alone(),
        case!(a_container_that_ends_while_containerd_is_away_leaves_nothing).alone(),
        case!(a_shim_that_dies_while_containerd_is_away_is_cleaned_up).alone(),
        case!(a_shim_that_is_killed_is_cleaned_up),
        case!(a_shim_that_is_killed_while_paused_is_cleaned_up),
        case!(a_shim_that_is_killed_with_an_exec_running_is_cleaned_up),
        case!(a_shim_that_is_killed_takes_processes_in_the_hosts_pid_namespace_along),
        case!(a_client_of_a_shim_that_is_killed_is_not_left_hanging),
        case!(a_pod_whose_shim_is_killed_can_be_removed).except_target(
            Target { containerd: Containerd::V2_1, shim: Shim::Stock },
            "containerd 2.1 calls the dead shim's `delete` for the sandbox only: the other containers run on for ever",
        ),
    ];
    let by_nerdctl = nerdctl_cases(vec![case!(a_restart_policy_covers_a_shim_that_is_killed)]);
    all.into_iter().chain(by_nerdctl).collect()
}

/// A container that counts in a file outside, visible without its shim.
struct Counter<'a> {
    test: &'a Test,
    file: String,
}

impl<'a> Counter<'a> {
    const SCRIPT: &'static str = "trap 'exit 9' TERM; i=0; while :; do
        i=$((i+1)); echo $i >/shared/new; mv /shared/new /shared/count; sleep 0.05; done";

    fn start(test: &'a Test, id: &str) -> Result<Self> {
        let folder = test.folder()?.display();
        let mount = format!("type=bind,src={folder},dst=/shared,options=rbind:rw");
        test.ctr().start(id, &["--mount", &mount], &["sh", "-c", Self::SCRIPT])?;
        let counter = Self { test, file: format!("{folder}/count") };
        counter.goes_on()?;
        Ok(counter)
    }

    fn now(&self) -> Result<u64> {
        Ok(fs::read_to_string(&self.file)?.trim().parse()?)
    }

    fn goes_on(&self) -> Result<()> {
        let before = self.now().unwrap_or(0);
        eventually("the counter to go on", || {
            let now = self.now()?;
            ensure!(now > before, "still {now}");
            Ok(())
        })
    }

    fn containerd_dies(&self) -> Result<()> {
        self.test.bed().restart()
    }
}

fn a_container_survives_containerds_death(t: &Test) -> Result<()> {
    let id = t.id("c");
    let counter = Counter::start(t, &id)?;
    let (init, shim) = (t.ctr().pid(&id)?, t.ctr().shim(&id)?);
    for _ in 0..2 {
        counter.containerd_dies()?;
        counter.goes_on()?;
        ensure_eq!(t.ctr().status(&id)?, "RUNNING");
        ensure_eq!((t.ctr().pid(&id)?, t.ctr().shim(&id)?), (init, shim), "init and shim");
        ensure_eq!(t.ctr().exec(&id, &["sh", "-c", "echo hello; exit 5"]).run()?.expect_code(5)?.text(), "hello\n");
    }
    t.ctr().kill(&id, "SIGTERM")?;
    t.ctr().becomes(&id, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&id)?, 9);
    proc::gone(shim)
}

fn an_exec_survives_containerds_death(t: &Test) -> Result<()> {
    let (id, exec) = (t.id("c"), t.id("x"));
    let counter = Counter::start(t, &id)?;
    let script = "echo $$ >/shared/exec; exec sleep 4321";
    t.ctr().task(&["exec", "--detach", "--exec-id", &exec, &id, "sh", "-c", script]).ok()?;
    let sleeper = eventually("the exec to run", || {
        let child = proc::children(t.ctr().shim(&id)?).into_iter().find(|pid| proc::cmdline(*pid) == "sleep 4321");
        child.ok_or_else(|| anyhow::anyhow!("no child of the shim sleeps"))
    })?;
    counter.containerd_dies()?;
    ensure!(proc::alive(sleeper), "the exec has gone");
    ensure_has!(t.ctr().task(&["ps", &id]).ok()?.text(), exec);
    t.ctr().task(&["kill", "--signal", "SIGKILL", "--exec-id", &exec, &id]).ok()?;
    proc::gone(sleeper)?;
    ensure_eq!(t.ctr().status(&id)?, "RUNNING");
    Ok(())
}

fn a_paused_container_survives_containerds_death(t: &Test) -> Result<()> {
    let id = t.id("c");
    let counter = Counter::start(t, &id)?;
    t.ctr().task(&["pause", &id]).ok()?;
    let before = counter.now()?;
    counter.containerd_dies()?;
    ensure_eq!(t.ctr().status(&id)?, "PAUSED");
    ensure!(cgroup::frozen(t.ctr().pid(&id)?)?, "its cgroup is not frozen");
    ensure_eq!(counter.now()?, before, "the counter while paused");
    t.ctr().task(&["resume", &id]).ok()?;
    counter.goes_on()
}

fn a_pod_survives_containerds_death(t: &Test) -> Result<()> {
    let cri = t.cri();
    let pod = t.cri().pod(&Value::Null)?;
    let script = "i=0; while :; do i=$((i+1)); echo line $i.; sleep 0.05; done";
    let (one, two) = (pod.start("one", script, &Value::Null)?, pod.start("two", IDLE, &Value::Null)?);
    cri.logs_have(&one, "line 3.")?;
    let pids = [cri.pid(&one)?, cri.pid(&two)?];
    t.bed().restart()?;
    let running = eventually("the CRI to know its containers", || {
        let text = cri.cmd(&["ps", "--quiet", "--no-trunc", "--pod", &pod.id]).ok()?.text();
        ensure_eq!(lines(&text).len(), 2);
        Ok(text)
    })?;
    ensure_has!(running, one);
    ensure_eq!([cri.pid(&one)?, cri.pid(&two)?], pids);
    ensure_eq!(cri.exec_prints(&two, "echo hello")?, "hello");
    ensure_eq!(cri.exec(&two, "exit 3")?.0, 3);
    // containerd itself reads the container's output, through FIFOs opened again.
    let text = cri.cmd(&["logs", &one]).ok()?.text();
    let last = lines(&text).last().map(|line| line.replace("line ", "").replace('.', "")).unwrap_or_default();
    cri.logs_have(&one, &format!("line {}.", last.parse::<u64>()? + 5))?;
    // The pod still takes containers.
    let three = pod.start("three", IDLE, &Value::Null)?;
    ensure_eq!(proc::parent(cri.pid(&three)?)?, proc::parent(pids[0])?, "the shim");
    cri.cmd(&["stop", "--timeout", "1", &two]).ok()?;
    cri.exited(&two)?;
    Ok(())
}

fn an_exit_after_containerds_death_is_told(t: &Test) -> Result<()> {
    let id = t.id("c");
    let counter = Counter::start(t, &id)?;
    counter.containerd_dies()?;
    // The shim has to find the new containerd.
    let events = Events::subscribe(t)?;
    t.ctr().exec(&id, &["sh", "-c", "exit 6"]).run()?.expect_code(6)?;
    t.ctr().kill(&id, "SIGTERM")?;
    let told = events.of_task_until(&id, "/tasks/exit")?;
    position(&told, "exec's exit", |event| event.topic == "/tasks/exit" && event.exit_status() == 6)?;
    eventually("init's exit", || {
        position(&events.of_task(&id), "init's exit", |event| event.topic == "/tasks/exit" && event.exit_status() == 9)
    })?;
    Ok(())
}

fn logs_go_on_after_containerds_death(t: &Test) -> Result<()> {
    // Not by nerdctl: its logger ends when it loses containerd.
    let (to_file, to_logger) = (t.id("c"), t.id("c"));
    let (file, copy) = (t.folder()?.join("file"), t.folder()?.join("copy"));
    let logger = t.script("logger", "trap '' TERM\ncat <&3 >$2 5>&- &\nexec 5>&-\nwait\n")?;
    let uris = [format!("file://{}", file.display()), format!("binary://{logger}?to={}", copy.display())];
    let script = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done";
    for (id, uri) in [&to_file, &to_logger].into_iter().zip(&uris) {
        t.ctr().run(id, &["--detach", "--log-uri", uri], &["sh", "-c", script]).ok()?;
    }
    let logs = [file, copy];
    let count = |log| -> Result<usize> { Ok(fs::read_to_string(log)?.lines().count()) };
    let both_reach = |goal: usize| {
        eventually("both logs to grow", || {
            for log in &logs {
                ensure!(count(log)? >= goal, "{} lines in {}", count(log)?, log.display());
            }
            Ok(())
        })
    };
    both_reach(3)?;
    t.bed().restart()?;
    both_reach(count(&logs[0])?.max(count(&logs[1])?) + 5)?;
    for log in &logs {
        let text = fs::read_to_string(log)?;
        for (at, line) in (1..).zip(lines(&text)) {
            ensure_eq!(line, format!("line {at}"), "in {}", log.display());
        }
    }
    Ok(())
}

/// Waits until no process, mount, cgroup, bundle or runtime state has one of these names.
fn nothing_left(ids: &[&str]) -> Result<()> {
    eventually("everything to be cleaned up", || {
        let left = bed::leaks()?;
        let left: Vec<&String> = left.iter().filter(|line| ids.iter().any(|id| line.contains(id))).collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    })
}

/// Expects a stopped task or none after the shim's death, and a container that can be removed and
/// made again.
fn usable_again(t: &Test, id: &str) -> Result<()> {
    eventually("the task to be stopped or gone", || {
        let text = t.ctr().task(&["ls"]).ok()?.text();
        let row = text.lines().find(|line| line.contains(id)).unwrap_or("gone");
        ensure!(row == "gone" || row.contains("STOPPED"), "{row}");
        Ok(())
    })?;
    t.ctr().task(&["rm", id]).run()?;
    t.ctr().cmd().args(&["container", "rm", id]).ok()?;
    nothing_left(&[id])?;
    t.ctr().run(id, &["--rm"], &["sh", "-c", "exit 4"]).run()?.expect_code(4)?;
    Ok(())
}

fn a_container_that_ends_while_containerd_is_away_leaves_nothing(t: &Test) -> Result<()> {
    let id = t.id("c");
    Counter::start(t, &id)?;
    let (init, shim) = (t.ctr().pid(&id)?, t.ctr().shim(&id)?);
    t.bed().kill_containerd()?;
    proc::kill(init)?;
    proc::gone(init)?;
    t.bed().start()?;
    // containerd takes a shim without processes for a leak and removes it.
    proc::gone(shim)?;
    usable_again(t, &id)
}

fn a_shim_that_dies_while_containerd_is_away_is_cleaned_up(t: &Test) -> Result<()> {
    let id = t.id("c");
    Counter::start(t, &id)?;
    let (init, shim) = (t.ctr().pid(&id)?, t.ctr().shim(&id)?);
    t.bed().kill_containerd()?;
    proc::kill(shim)?;
    proc::gone(shim)?;
    t.bed().start()?;
    proc::gone(init)?;
    usable_again(t, &id)
}

fn a_shim_that_is_killed_is_cleaned_up(t: &Test) -> Result<()> {
    let (id, events) = (t.id("c"), Events::subscribe(t)?);
    Counter::start(t, &id)?;
    let (init, shim) = (t.ctr().pid(&id)?, t.ctr().shim(&id)?);
    proc::kill(shim)?;
    proc::gone(init)?;
    // containerd reports the exit in the shim's place, from the answer of the shim's `delete`.
    let told = events.of_task_until(&id, "/tasks/exit")?;
    let exit = &told[position(&told, "exit", |event| event.topic == "/tasks/exit")?];
    ensure_eq!((exit.exit_status(), exit.body["pid"].as_u64()), (137, Some(u64::from(init))), "status and pid");
    usable_again(t, &id)
}

fn a_shim_that_is_killed_while_paused_is_cleaned_up(t: &Test) -> Result<()> {
    let id = t.id("c");
    Counter::start(t, &id)?;
    let (init, shim) = (t.ctr().pid(&id)?, t.ctr().shim(&id)?);
    t.ctr().task(&["pause", &id]).ok()?;
    proc::kill(shim)?;
    proc::gone(init)?;
    usable_again(t, &id)
}

fn a_shim_that_is_killed_with_an_exec_running_is_cleaned_up(t: &Test) -> Result<()> {
    let id = t.id("c");
    Counter::start(t, &id)?;
    let (init, shim) = (t.ctr().pid(&id)?, t.ctr().shim(&id)?);
    let client = t.ctr().exec(&id, &["sh", "-c", "echo running; sleep 1000"]).spawn()?;
    client.sees("running")?;
    let processes = proc::children(shim);
    ensure!(processes.len() == 2 && processes.contains(&init), "{processes:?} below the shim");
    proc::kill(shim)?;
    for pid in processes {
        proc::gone(pid)?;
    }
    drop(client);
    usable_again(t, &id)
}

fn a_shim_that_is_killed_takes_processes_in_the_hosts_pid_namespace_along(t: &Test) -> Result<()> {
    let id = t.id("c");
    let pids = format!("pid:/proc/{}/ns/pid", std::process::id());
    t.ctr().start(&id, &["--with-ns", &pids], &["sh", "-c", "(sleep 7654 &); exec sleep 6543"])?;
    let shim = t.ctr().shim(&id)?;
    let processes = eventually("both processes", || {
        let children = proc::children(shim);
        ensure_eq!(children.len(), 2);
        Ok(children)
    })?;
    proc::kill(shim)?;
    for pid in processes {
        proc::gone(pid)?;
    }
    usable_again(t, &id)
}

fn a_client_of_a_shim_that_is_killed_is_not_left_hanging(t: &Test) -> Result<()> {
    let id = t.id("c");
    let client = t.ctr().run(&id, &[], &["sh", "-c", &format!("echo running; {IDLE}")]).spawn()?;
    client.sees("running")?;
    proc::kill(t.ctr().shim(&id)?)?;
    client.wait()?.expect_failure()?;
    usable_again(t, &id)
}

fn a_pod_whose_shim_is_killed_can_be_removed(t: &Test) -> Result<()> {
    let cri = t.cri();
    let own = json!({ "linux": { "security_context": { "namespace_options": { "pid": 1 } } } });
    let pod = t.cri().pod(&own)?;
    let (one, two) = (pod.start("one", IDLE, &own)?, pod.start("two", IDLE, &own)?);
    let pause = pod.pid()?;
    let pids = [pause, cri.pid(&one)?, cri.pid(&two)?];
    proc::kill(proc::parent(pause)?)?;
    for pid in pids {
        proc::gone(pid)?;
    }
    for id in [&one, &two] {
        cri.exited(id)?;
    }
    cri.cmd(&["stopp", &pod.id]).ok()?;
    cri.cmd(&["rmp", &pod.id]).ok()?;
    nothing_left(&[&pod.id, &one, &two])
}

fn a_restart_policy_covers_a_shim_that_is_killed(t: &Test) -> Result<()> {
    let name = t.id("c");
    t.nerdctl().start_sh(&name, &["--restart", "always"], IDLE)?;
    let (init, shim) = (t.nerdctl().pid(&name)?, t.nerdctl().shim(&name)?);
    proc::kill(shim)?;
    proc::gone(init)?;
    eventually("a new process", || {
        let pid = t.nerdctl().pid(&name)?;
        ensure!(pid != init, "the old one");
        Ok(())
    })?;
    t.nerdctl().exec(&name, &["true"]).ok()?;
    Ok(())
}
