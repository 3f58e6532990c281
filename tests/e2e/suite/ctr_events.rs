//! containerd's events about tasks, and their order.

use anyhow::{Result, ensure};
use e2e::events::{Event, Events, position, topics};
use e2e::target::Shim;
use e2e::{Case, Test, case, ensure_eq, eventually};

use crate::ctr_exit::IDLE;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(a_tasks_life_is_told_in_order),
        case!(a_deleted_task_is_told)
            .except(Shim::Stock, "runc's shim is shut down right after Delete and often loses this event"),
        case!(an_execs_life_is_told_in_order),
        case!(execs_exit_before_init_does),
        case!(pause_and_resume_are_told),
        case!(a_program_that_does_not_exist_is_never_told_as_started),
        case!(running_out_of_memory_is_told),
    ]
}

fn a_tasks_life_is_told_in_order(t: &Test) -> Result<()> {
    let (id, events) = (t.id("c"), Events::subscribe(t)?);
    t.ctr().run(&id, &["--rm"], &["sh", "-c", "exit 3"]).run()?.expect_code(3)?;
    let mut told = events.of_task_until(&id, "/tasks/exit")?;
    told.retain(|event| event.topic != "/tasks/delete");
    ensure_eq!(topics(&told), ["create", "start", "exit"]);
    let pid = |event: &Event| event.body["pid"].clone();
    ensure!(pid(&told[0]).as_u64().is_some_and(|pid| pid > 0), "no pid in {:?}", told[0]);
    for event in &told {
        ensure_eq!(pid(event), pid(&told[0]), "the pid of {event:?}");
    }
    ensure_eq!(told[2].exit_status(), 3);
    ensure_eq!(told[2].field("id"), id);
    ensure!(
        told[2].body["exited_at"]["seconds"].as_u64().is_some() || told[2].body["exited_at"].is_string(),
        "when? {told:?}"
    );
    Ok(())
}

fn a_deleted_task_is_told(t: &Test) -> Result<()> {
    let (id, events) = (t.id("c"), Events::subscribe(t)?);
    t.ctr().run(&id, &["--rm"], &["sh", "-c", "exit 3"]).run()?.expect_code(3)?;
    let told = events.of_task_until(&id, "/tasks/delete")?;
    ensure_eq!(topics(&told), ["create", "start", "exit", "delete"]);
    ensure_eq!((told[3].exit_status(), &told[3].body["pid"]), (3, &told[0].body["pid"]));
    Ok(())
}

fn an_execs_life_is_told_in_order(t: &Test) -> Result<()> {
    let (id, exec, events) = (t.id("c"), t.id("x"), Events::subscribe(t)?);
    t.ctr().start_sh(&id, IDLE)?;
    t.ctr().exec_as(&id, &exec, &["sh", "-c", "exit 6"]).run()?.expect_code(6)?;
    let told = events.of_task_until(&id, "/tasks/exit")?;
    ensure_eq!(topics(&told), ["create", "start", "exec-added", "exec-started", "exit"]);
    ensure_eq!(told[2].field("exec_id"), exec);
    ensure_eq!(told[3].field("exec_id"), exec);
    ensure_eq!((told[4].field("id"), told[4].exit_status()), (exec.as_str(), 6));
    ensure_eq!(told[3].body["pid"], told[4].body["pid"], "started and ended");
    Ok(())
}

fn execs_exit_before_init_does(t: &Test) -> Result<()> {
    let (id, events) = (t.id("c"), Events::subscribe(t)?);
    t.ctr().start_sh(&id, IDLE)?;
    let execs: Vec<String> = (0..5).map(|_| t.id("x")).collect();
    let mut clients = Vec::new();
    for exec in &execs {
        let client = t.ctr().exec_as(&id, exec, &["sh", "-c", "echo up; sleep 1000"]).spawn()?;
        client.sees("up")?;
        clients.push(client);
    }
    t.ctr().kill(&id, "SIGKILL")?;
    let is_exit = |event: &Event, of: &str| event.topic == "/tasks/exit" && event.field("id") == of;
    let told = eventually("six exits", || {
        let told = events.of_task(&id);
        ensure!(topics(&told).iter().filter(|topic| **topic == "exit").count() == 6, "so far: {:?}", topics(&told));
        Ok(told)
    })?;
    let init = position(&told, "exit of init", |event| is_exit(event, &id))?;
    for exec in &execs {
        let at = position(&told, "exit of an exec", |event| is_exit(event, exec))?;
        ensure!(at < init, "{exec} at {at}, init at {init}: {told:?}");
        ensure_eq!(told[at].exit_status(), 137);
    }
    for client in clients {
        client.wait()?.expect_code(137)?;
    }
    Ok(())
}

fn pause_and_resume_are_told(t: &Test) -> Result<()> {
    let (id, events) = (t.id("c"), Events::subscribe(t)?);
    t.ctr().start_sh(&id, IDLE)?;
    t.ctr().task(&["pause", &id]).ok()?;
    t.ctr().task(&["resume", &id]).ok()?;
    let told = events.of_task_until(&id, "/tasks/resumed")?;
    ensure_eq!(topics(&told), ["create", "start", "paused", "resumed"]);
    Ok(())
}

fn a_program_that_does_not_exist_is_never_told_as_started(t: &Test) -> Result<()> {
    let (id, events) = (t.id("c"), Events::subscribe(t)?);
    t.ctr().run(&id, &["--rm"], &["no-such-program"]).run()?.expect_failure()?;
    // Events of a later task show that those of the first have all arrived.
    let later = t.id("c");
    t.ctr().run(&later, &["--rm"], &["true"]).ok()?;
    events.of_task_until(&later, "/tasks/exit")?;
    let told = events.of_task(&id);
    ensure!(!topics(&told).contains(&"start"), "{told:?}");
    Ok(())
}

fn running_out_of_memory_is_told(t: &Test) -> Result<()> {
    let (id, events) = (t.id("c"), Events::subscribe(t)?);
    // `tail` keeps the last line, and /dev/zero has but one.
    t.ctr().start(&id, &["--memory-limit", "16777216"], &["tail", "/dev/zero"])?;
    let told = events.of_task_until(&id, "/tasks/exit")?;
    let exit = position(&told, "exit", |event| event.topic == "/tasks/exit")?;
    ensure_eq!(told[exit].exit_status(), 137);
    events.of_task_until(&id, "/tasks/oom")?;
    Ok(())
}
