//! Logs, images and cgroup lists.

use std::path::Path;

use crate::log;
use crate::options::{CgroupRoot, CgroupRoots, External, Namespace};
use crate::version::Version;

/// Writes the smallest directory that passes for an image: a tree with process 7 as the root.
pub(super) fn write_image(folder: &Path) {
    file(&folder.join("inventory.img"), &[0x5831_3116], &[&[0x08, 2, 0x50, 1, 0x62, 4, 0x62, 2, b'x', b'y']]);
    file(&folder.join("pstree.img"), &[0x5456_4319, 0x5027_3030], &[&[0x08, 7, 0x10, 0]]);
}

pub(super) fn file(path: &Path, magic: &[u32], entries: &[&[u8]]) {
    let mut bytes: Vec<u8> = magic.iter().flat_map(|word| word.to_le_bytes()).collect();
    for entry in entries {
        bytes.extend(u32::try_from(entry.len()).unwrap().to_le_bytes());
        bytes.extend(*entry);
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn the_first_errors_of_a_log_are_kept_without_their_places() {
    let text = "(00.000001) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                (00.000002) Warn  (criu/x.c:1): Error is not what this is\n\
                (00.000003) pie: 9: Error (criu/pie/restorer.c:1): Can't restore\n\
                (00.000004) pie: 9: Error (criu/pie/restorer.c:1): Can't restore\n\
                (00.000005) Error (criu/cr-restore.c:2317): Restoring FAILED.\n";
    assert_eq!(log::errors(text.as_bytes()), ["Can't restore", "Restoring FAILED."]);
    let many: String = (0..100).map(|number| format!("Error (x.c:1): {number}\n")).collect();
    assert_eq!(log::errors(many.as_bytes()).len(), 5);
    let long = format!("Error (x.c:1): {}", "y".repeat(1 << 20));
    assert!(log::errors(long.as_bytes())[0].len() < 2048);
}

#[test]
fn errors_get_the_object_that_a_line_before_names() {
    let text = "(00.1) inet: \tCollected: ino 0xa1 family AF_INET    type SOCK_STREAM    port     5000 state TCP_ESTABLISHED  src_addr 127.0.0.1\n\
                (00.1) inet: \tCollected: ino 0xa2 family AF_INET    type SOCK_STREAM    port       22 state TCP_ESTABLISHED  src_addr 10.0.0.1\n\
                (00.2) sockets: Searching for socket 0xa1 family 2\n\
                (00.2) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.\n";
    let errors = log::errors(text.as_bytes());
    assert!(errors[0].ends_with("[127.0.0.1 port 5000]"), "{errors:?}");
    assert!(log::cause(&errors).unwrap().contains("connection (127.0.0.1 port 5000),"));
    let text = "(00.1) No core-1.img image\n(00.1) Error (criu/protobuf.c:72): Unexpected EOF on (empty-image)\n";
    assert_eq!(log::cause(&log::errors(text.as_bytes())).unwrap(), "the image file core-1.img is missing");
}

#[test]
fn the_version_is_read_from_what_criu_prints() {
    let version = |text| Version::in_text(text).map(|version| version.to_string());
    assert_eq!(version("Version: 4.2.1\nGitID: x\n").unwrap(), "4.2.1");
    assert_eq!(version("warning\nVersion: 3.8").unwrap(), "3.8");
    assert_eq!(version("Version: 4.3-dev").unwrap(), "4.3");
    assert_eq!(version("no such thing"), None);
}

#[test]
fn causes_name_their_object() {
    let cause = |error: &str| log::cause(&["Can't open kmsg".to_owned(), error.to_owned()]);
    for (error, said) in [
        ("Missing required plugin: cuda_plugin", "the image was made with CRIU's plugin cuda_plugin, which is"),
        ("Unsupported mapping found 00007f00-00007f01", "maps something at 00007f00-00007f01 that CRIU cannot dump"),
        (
            "File tmp/x has bad size 34 (expect 8)",
            "the file tmp/x has changed since the dump: its size is 34 (expect 8)",
        ),
        ("mnt: No mapping for 12:/data mountpoint", "the image has a mount (12:/data) for which the restore has no"),
        ("Can't dump file 7 of that type [20666] (chr 195:255)", "7 of that type [20666] (chr 195:255)"),
        ("Magic doesn't match for core-1.img", "the image file core-1.img is damaged"),
    ] {
        let found = cause(error).unwrap();
        assert!(found.contains(said), "{found}");
    }
    assert_eq!(cause("something new"), None);
}

#[test]
fn cgroup_roots_are_those_of_proc() {
    let root = |controller: &str, path: &str| CgroupRoot { controller: controller.to_owned(), path: path.to_owned() };
    let roots = CgroupRoots::parse("4:cpu,cpuacct:/a:b\n1:name=systemd:/\n0::/init\n");
    assert_eq!(roots, [root("cpu", "/a:b"), root("cpuacct", "/a:b"), root("name=systemd", "/"), root("", "/init")]);
}

#[test]
fn an_external_file_is_named_by_its_mount_and_inode() {
    let file = tempfile::tempfile().unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
    let notation = External::of_file(&file).unwrap().notation();
    let mount = notation.strip_prefix("file[").unwrap().strip_suffix(&format!(":{inode:x}]")).unwrap();
    let mount = u64::from_str_radix(mount, 16).unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(mounts.lines().any(|line| line.starts_with(&format!("{mount} "))), "{notation}");
}

#[test]
fn external_namespaces_have_runcs_keys() {
    let external = External::Namespace { kind: Namespace::Pid, inode: 5 };
    assert_eq!(external.notation(), "pid[5]:extRootPidNS");
    assert_eq!(Namespace::Network.external_key(), "extRootNetNS");
}
