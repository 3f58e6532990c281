//! Effects of a checkpoint on a process, and of the restore.

#[cfg(test)]
mod common;

use std::collections::HashSet;
use std::fs;
use std::thread;
use std::time::Duration;

use common::{CHECKPOINTED, LOCKED, Machine, Mapping, Program, RUNNING};

const MIB: u64 = 1 << 20;

fn checkpoint(machine: &Machine, program: &Program) {
    assert_eq!(machine.call(&format!("lock {}", program.pid())), 0);
    assert_eq!(machine.call(&format!("checkpoint {}", program.pid())), 0);
}

fn restore(machine: &Machine, program: &Program) {
    assert_eq!(machine.call(&format!("restore {}", program.pid())), 0);
    assert_eq!(machine.call(&format!("unlock {}", program.pid())), 0);
}

#[test]
fn memory_of_the_gpu_and_pinned_memory_are_the_same_after_checkpoint_and_restore() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    program.does("pinned 100000");
    for _ in 0..3 {
        program.does("add");
        checkpoint(&machine, &program);
        restore(&machine, &program);
        program.does("check");
    }
}

#[test]
fn a_checkpoint_makes_one_private_mapping_of_the_size_of_all_gpu_memory() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    // 1 MiB and 3 pages less a bit
    program.does("start 0 3000");
    let private = |maps: &[Mapping]| -> HashSet<(u64, u64)> {
        let of = maps.iter().filter(|mapping| mapping.mode == "rw-p" && mapping.name.is_empty());
        of.map(|mapping| (mapping.start, mapping.end)).collect()
    };
    let before = program.maps();
    assert!(before.iter().any(|mapping| mapping.name.starts_with("/memfd:fake-gpu") && mapping.mode == "rw-s"));
    checkpoint(&machine, &program);
    let during = program.maps();
    assert!(!during.iter().any(|mapping| mapping.name.starts_with("/memfd:fake-gpu")));
    let new: Vec<_> = private(&during).difference(&private(&before)).map(|(start, end)| end - start).collect();
    assert_eq!(new, [MIB + 3 * 4096], "{during:?}");
    restore(&machine, &program);
    let after = program.maps();
    assert!(private(&after).is_subset(&private(&before)), "{after:?}");
    program.does("check");
}

#[test]
fn nothing_of_the_nodes_is_left_after_a_checkpoint_and_all_is_back_after_the_restore() {
    let machine = Machine::with_gpus(2);
    let mut program = machine.started("");
    program.does("start 1 1000");
    let before = program.nodes();
    assert!(before.0 >= 6 && before.1 >= 14, "{before:?}");
    checkpoint(&machine, &program);
    assert_eq!(program.nodes(), (0, 0));
    assert_eq!(machine.state(program.pid()), CHECKPOINTED);
    restore(&machine, &program);
    assert_eq!(program.nodes(), before);
    program.does("check");
}

#[test]
fn a_forked_child_is_not_initialized_but_holds_the_nodes() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    let child: u32 = program.gives("fork").parse().unwrap();
    let held = common::nodes(child);
    assert!(held.0 >= 3 && held.1 >= 9, "{held:?}");
    assert_eq!(machine.call(&format!("state {child}")), 3);
    assert_eq!(machine.call(&format!("lock {child}")), 3);
    let names: Vec<_> = common::maps(child).into_iter().map(|mapping| mapping.name).collect();
    assert!(!names.iter().any(|name| name.contains("fake-gpu")), "{names:?}");
    // The parent's actions leave the residue in place.
    checkpoint(&machine, &program);
    assert_eq!(common::nodes(child), held);
    assert_eq!(program.nodes(), (0, 0));
    restore(&machine, &program);
    program.does("check");
    assert_eq!(program.gives("fork-init"), "3");
}

#[test]
fn a_thread_that_reads_driver_memory_dies_of_the_checkpoint() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("poll");
    let pid = program.pid();
    assert_eq!(machine.call(&format!("lock {pid}")), 0);
    assert!(program.is_alive());
    let result = machine.call(&format!("checkpoint {pid}"));
    assert!(matches!(result, 0 | 304), "{result}");
    assert_eq!(program.death(), Some(11));
}

#[test]
fn held_threads_survive_a_checkpoint() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("poll");
    let pid = program.pid();
    program.does("add");
    assert_eq!(machine.call(&format!("lock {pid}")), 0);
    let held = common::sys::hold(pid, |name| !name.starts_with("cuda"));
    assert_eq!(machine.call(&format!("checkpoint {pid}")), 0);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(machine.state(pid), CHECKPOINTED);
    assert_eq!(machine.call(&format!("restore {pid}")), 0);
    assert_eq!(machine.state(pid), LOCKED);
    assert_eq!(machine.call(&format!("unlock {pid}")), 0);
    common::sys::let_go(held);
    program.does("add");
    program.does("check");
}

#[test]
fn a_call_hangs_while_the_driver_s_own_thread_is_held() {
    let machine = Machine::with_gpus(1);
    let program = machine.started("");
    let held = common::sys::hold(program.pid(), |_| true);
    let mut call = machine.begin(&format!("state {}", program.pid()));
    assert!(call.hangs());
    common::sys::let_go(held);
    assert_eq!(call.result(), 0);
}

/// The UUID of a GPU in the form for `cuda-call restore`.
fn uuid(program: &mut Program, ordinal: u32) -> String {
    program.gives(&format!("uuid {ordinal}"))
}

#[test]
fn pairs_move_a_process_to_another_gpu() {
    let machine = Machine::with_gpus(2);
    let mut program = machine.started("");
    let (old, new) = (uuid(&mut program, 0), uuid(&mut program, 1));
    checkpoint(&machine, &program);
    assert_eq!(machine.call(&format!("restore {} {old}={new} {new}={old}", program.pid())), 0);
    assert_eq!(machine.call(&format!("unlock {}", program.pid())), 0);
    let names: HashSet<_> = program.maps().into_iter().map(|mapping| mapping.name).collect();
    assert!(names.contains(machine.node("nvidia1").to_str().unwrap()), "{names:?}");
    assert!(!names.contains(machine.node("nvidia0").to_str().unwrap()), "{names:?}");
    program.does("add");
    program.does("check");
    assert_eq!(uuid(&mut program, 0), new);
}

#[test]
fn pairs_must_name_every_gpu_in_use_and_gpus_that_exist() {
    let machine = Machine::with_gpus(2);
    let mut program = machine.started("");
    program.does("start 1 1000");
    let pid = program.pid();
    let (first, second) = (uuid(&mut program, 0), uuid(&mut program, 1));
    let nobody = "GPU-00000000-0000-0000-0000-000000000001";
    checkpoint(&machine, &program);
    let restore = |pairs: &str| machine.call(&format!("restore {pid} {pairs}"));
    assert_eq!(restore(&format!("{first}={first}")), 1);
    assert_eq!(restore(&format!("{first}={second} {second}={second}")), 1);
    assert_eq!(restore(&format!("{first}={first} {second}={nobody}")), 101);
    assert_eq!(machine.state(pid), CHECKPOINTED);
    assert_eq!(program.nodes(), (0, 0));
    assert_eq!(restore(&format!("{first}={second} {second}={first}")), 0);
    assert_eq!(machine.call(&format!("unlock {pid}")), 0);
    program.does("check");
}

#[test]
fn a_gpu_that_is_gone_fails_the_restore_until_it_is_back() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.started("");
    checkpoint(&machine, &program);
    fs::rename(machine.node("nvidia0"), machine.node("away")).unwrap();
    assert_eq!(machine.call(&format!("restore {}", program.pid())), 101);
    assert_eq!(machine.state(program.pid()), CHECKPOINTED);
    fs::rename(machine.node("away"), machine.node("nvidia0")).unwrap();
    restore(&machine, &program);
    program.does("check");
}

#[test]
fn nvml_lists_who_has_a_context_and_is_not_checkpointed() {
    let machine = Machine::with_gpus(2);
    let mut program = machine.program(&[]);
    let pid = program.pid();
    let list = || machine.begin("gpus").output();
    let on = |gpu: &str, list: &str| list.lines().any(|line| line.contains(gpu) && line.contains(&pid.to_string()));
    assert!(!list().contains(&pid.to_string()));
    program.does("start 1 1000");
    let now = list();
    assert!(on("minor=1", &now) && !on("minor=0", &now), "{now}");
    assert_eq!(machine.call(&format!("lock {pid}")), 0);
    assert!(on("minor=1", &list()));
    assert_eq!(machine.call(&format!("checkpoint {pid}")), 0);
    assert!(!list().contains(&pid.to_string()));
    restore(&machine, &program);
    assert!(on("minor=1", &list()));
    assert_eq!(machine.state(pid), RUNNING);
}

#[test]
fn a_machine_without_gpus_has_no_cuda() {
    let machine = Machine::with_gpus(0);
    let mut program = machine.program(&[]);
    assert_eq!(program.ask("init"), "error 100");
    assert_eq!(program.ask("count"), "error 3");
    assert_eq!(machine.call(&format!("state {}", program.pid())), 3);
}

#[test]
fn functions_are_found_by_their_names_without_versions() {
    let machine = Machine::with_gpus(1);
    let mut program = machine.program(&[]);
    for name in ["cuInit", "cuMemAlloc", "cuGetProcAddress", "cuDeviceGetUuid", "cuCheckpointProcessLock"] {
        assert_eq!(program.gives(&format!("lookup {name} 13000")), "0 0 true", "{name}");
    }
    assert_eq!(program.gives("lookup cuCheckpointOperationComplete 13040"), "500 1 false");
    assert_eq!(program.gives("lookup cuCheckpointProcessLock 12000"), "500 2 false");
}

#[test]
fn the_uuid_depends_on_the_machine() {
    let machine = Machine::with_gpus(1);
    let mut uuids = ["a", "b"].map(|host| {
        let mut program = machine.program(&[("FAKE_CUDA_HOST", host)]);
        program.does("init");
        uuid(&mut program, 0)
    });
    assert_ne!(uuids[0], uuids[1]);
    let mut program = machine.program(&[("FAKE_CUDA_HOST", "a")]);
    program.does("init");
    uuids[1] = uuid(&mut program, 0);
    assert_eq!(uuids[0], uuids[1]);
}
