use std::path::Path;

use proc::{ContainerPid, HostPid};

use super::{device_fds, drivers, is_device, is_instance, is_known_name, touches_gpu};
use support::Program;

#[test]
fn devices_of_the_driver_are_known_by_their_names() {
    for path in
        ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm", "/dev/nvidia-caps/nvidia-cap1", "/dev/nvidia3 (deleted)"]
    {
        assert!(is_device(Path::new(path)), "{path}");
    }
    for path in ["/dev/null", "/usr/lib/libnvidia-ml.so", "", "[heap]", "socket:[42]", "/mnt/dev/nvidia0"] {
        assert!(!is_device(Path::new(path)), "{path}");
    }
}

#[test]
fn threads_of_the_driver_are_known_by_their_names() {
    assert!(is_known_name("cuda00001400006") && is_known_name("cuda-EvtHandlr"));
    for other in ["python3", "CUDA", "", "cuda", "cuda-worker", "cuda0000140000x", "cuda000014000060"] {
        assert!(!is_known_name(other), "{other}");
    }
}

#[test]
fn a_programs_thread_with_a_name_like_the_drivers_is_known_by_the_signals_that_it_takes() {
    let program = Program::play("cuda-threads");
    let threads = proc::threads(program.pid).unwrap();
    let name = |tid: i32| threads.iter().find(|thread| thread.tid == tid).map(|thread| thread.name.as_str());
    let drivers: Vec<_> = drivers(program.pid, &threads).into_iter().map(name).collect();
    assert_eq!(drivers, [Some("cuda0123456789a"), Some("cuda-new-kind")]);
}

#[test]
fn a_process_that_is_gone_has_nothing() {
    // Above the largest pid that there can be.
    let pid = HostPid::new(1 << 23).unwrap();
    assert!(!touches_gpu(pid) && device_fds(pid).is_err());
}

#[test]
fn instances_of_a_divided_gpu_are_known_by_their_nodes() {
    assert!(is_instance(Path::new("/dev/nvidia-caps/nvidia-cap30")));
    for other in ["/dev/nvidia-caps/nvidia-cap1", "/dev/nvidia-caps/nvidia-cap2", "/dev/nvidia0", "/dev/nvidia-caps"] {
        assert!(!is_instance(Path::new(other)), "{other}");
    }
}

#[test]
fn events_that_another_process_shares_are_told_from_own_ones() {
    let is_others = |path: &str| super::is_others_event(std::path::Path::new(path), ContainerPid::new(0x1b4).unwrap());
    assert!(is_others("/dev/shm/cuda.shm.0.1b3.1"));
    assert!(!is_others("/dev/shm/cuda.shm.0.1b4.1"));
    assert!(!is_others("/dev/shm/nccl-1b3"));
    assert!(!is_others("/dev/shm/cuda.shm"));
}
