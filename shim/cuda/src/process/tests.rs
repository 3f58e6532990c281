use std::path::Path;

use super::{device_fds, is_device, is_drivers, is_instance, touches_gpu};

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
    assert!(is_drivers("cuda00001400006") && is_drivers("cuda-EvtHandlr"));
    assert!(!is_drivers("python3") && !is_drivers("CUDA") && !is_drivers(""));
}

#[test]
fn a_process_that_is_gone_has_nothing() {
    // Above the largest pid that there can be.
    let pid = 1 << 23;
    assert!(!touches_gpu(pid) && device_fds(pid).is_err());
}

#[test]
fn instances_of_a_divided_gpu_are_known_by_their_nodes() {
    assert!(is_instance(Path::new("/dev/nvidia-caps/nvidia-cap30")));
    for other in ["/dev/nvidia-caps/nvidia-cap1", "/dev/nvidia-caps/nvidia-cap2", "/dev/nvidia0", "/dev/nvidia-caps"] {
        assert!(!is_instance(Path::new(other)), "{other}");
    }
}
