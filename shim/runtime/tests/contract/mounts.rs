//! Mounts in a container, and visibility between container and host.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capability, LinuxIdMappingBuilder};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::bed::{Bed, sentences};
use crate::container::until;
use crate::spec::{Edit, mount, shell};

sentences![
    a_bind_mount_is_the_hosts_folder,
    a_bind_mount_of_a_file_is_the_hosts_file,
    a_readonly_bind_mount_cannot_be_written,
    a_readonly_bind_mount_can_hold_all_below_it_read_only,
    bind_mounts_have_the_options_they_ask_for,
    a_mount_with_mapped_owners_shows_them_mapped,
    a_tmpfs_has_the_size_and_mode_it_asks_for,
    the_place_of_a_mount_is_made,
    mounts_lie_on_each_other_in_order,
    the_place_of_a_mount_stays_inside_the_root,
    the_hosts_mounts_are_not_seen,
    a_private_mount_does_not_follow_the_host,
    a_slave_mount_follows_the_host,
    a_shared_mount_is_followed_by_the_host,
    file_systems_have_the_options_they_ask_for,
];

fn source(bed: &Bed) -> PathBuf {
    let source = bed.folder().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "host\n").unwrap();
    source
}

async fn a_bind_mount_is_the_hosts_folder(bed: &Bed) {
    let source = source(bed);
    let spec =
        shell("cat /mnt/file; echo container >/mnt/new").with_mount(mount("/mnt", "bind", &source, &["rbind", "rw"]));
    assert_eq!(bed.say(&spec).await, "host\n");
    assert_eq!(fs::read_to_string(source.join("new")).unwrap(), "container\n");
}

async fn a_bind_mount_of_a_file_is_the_hosts_file(bed: &Bed) {
    let file = source(bed).join("file");
    let spec = shell("cat /etc/hostname /etc/missing")
        .with_mount(mount("/etc/hostname", "bind", &file, &["rbind", "ro"]))
        .with_mount(mount("/etc/missing", "bind", &file, &["rbind", "ro"]));
    assert_eq!(bed.say(&spec).await, "host\nhost\n");
}

async fn a_readonly_bind_mount_cannot_be_written(bed: &Bed) {
    let source = source(bed);
    let spec = shell("cat /mnt/file; echo x >/mnt/file").with_mount(mount(
        "/mnt",
        "bind",
        &source,
        &["rbind", "rprivate", "ro"],
    ));
    let ended = bed.run(&spec).await;
    assert_eq!(ended.stdout, "host\n");
    assert!(ended.stderr.contains("Read-only file system"), "{}", ended.stderr);
    assert_eq!(fs::read_to_string(source.join("file")).unwrap(), "host\n");
}

async fn a_readonly_bind_mount_can_hold_all_below_it_read_only(bed: &Bed) {
    let shared = Shared::new(bed);
    for (option, expected) in [("ro", "before\nnew\n"), ("rro", "before\n")] {
        let spec = shell("cat /mnt/before/file; touch /mnt/inner/x && echo written; echo new >>/mnt/before/file; cat /mnt/before/file")
            .with_mount(mount("/mnt", "bind", &shared.place, &["rbind", "rprivate", option]));
        let ended = bed.run(&spec).await;
        assert_eq!(ended.stdout, format!("before\n{expected}"), "{option}: {}", ended.stderr);
        fs::write(shared.place.join("before/file"), "before\n").unwrap();
    }
}

async fn a_mount_with_mapped_owners_shows_them_mapped(bed: &Bed) {
    let features = bed.runtime.features().await.unwrap();
    let extensions = features.linux().as_ref().unwrap().mount_extensions().clone();
    let supported = extensions.and_then(|extensions| extensions.idmap().as_ref().and_then(|idmap| *idmap.enabled()));
    let source = source(bed);
    let mapping = || {
        Some(vec![
            LinuxIdMappingBuilder::default().container_id(0_u32).host_id(5000_u32).size(1000_u32).build().unwrap(),
        ])
    };
    let mut mapped = mount("/mnt", "bind", &source, &["rbind"]);
    mapped.set_uid_mappings(mapping()).set_gid_mappings(mapping());
    let spec = shell("stat -c '%u %g' /mnt/file").with_mount(mapped);
    if supported == Some(true) {
        assert_eq!(bed.say(&spec).await, "5000 5000\n");
    } else {
        // The option must not be ignored.
        bed.refusal(&bed.bundle(&spec)).await;
    }
}

/// Returns the options of a mount, from the container's own mountinfo.
fn options(mountinfo: &str, place: &str) -> Vec<String> {
    let line = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some(place));
    let line = line.unwrap_or_else(|| panic!("nothing is mounted at {place} in {mountinfo}"));
    line.split(' ').nth(5).unwrap().split(',').map(str::to_owned).collect()
}

async fn bind_mounts_have_the_options_they_ask_for(bed: &Bed) {
    let source = source(bed);
    let spec = shell("cat /proc/self/mountinfo").with_mount(mount(
        "/mnt",
        "bind",
        &source,
        &["rbind", "nosuid", "nodev", "noexec", "ro"],
    ));
    let mountinfo = bed.say(&spec).await;
    for option in ["nosuid", "nodev", "noexec", "ro"] {
        assert!(options(&mountinfo, "/mnt").iter().any(|other| other == option), "{option} in {mountinfo}");
    }
}

async fn a_tmpfs_has_the_size_and_mode_it_asks_for(bed: &Bed) {
    let spec =
        shell("stat -c %a /mnt; dd if=/dev/zero of=/mnt/big bs=1024 count=2000 2>/dev/null; stat -c %s /mnt/big")
            .with_mount(mount("/mnt", "tmpfs", "tmpfs", &["nosuid", "size=1024k", "mode=0711"]));
    assert_eq!(bed.say(&spec).await, "711\n1048576\n");
}

async fn the_place_of_a_mount_is_made(bed: &Bed) {
    let source = source(bed);
    let spec = shell("cat /new/and/deep/file").with_mount(mount("/new/and/deep", "bind", &source, &["rbind", "ro"]));
    assert_eq!(bed.say(&spec).await, "host\n");
}

async fn mounts_lie_on_each_other_in_order(bed: &Bed) {
    let source = source(bed);
    let spec = shell("ls /mnt; cat /mnt/inner/file")
        .with_mount(mount("/mnt", "tmpfs", "tmpfs", &["mode=755"]))
        .with_mount(mount("/mnt/inner", "bind", &source, &["rbind", "ro"]));
    assert_eq!(bed.say(&spec).await, "inner\nhost\n");
}

async fn the_place_of_a_mount_stays_inside_the_root(bed: &Bed) {
    let source = source(bed);
    let outside = bed.folder().join("outside");
    fs::create_dir(&outside).unwrap();
    let spec = shell("cat /link/inner/file; cat /up/inner/file")
        .with_mount(mount("/link/inner", "bind", &source, &["rbind", "ro"]))
        .with_mount(mount("/up/inner", "bind", &source, &["rbind", "ro"]));
    let bundle = bed.bundle(&spec);
    // In the container the first link leads to a folder of this name in its own root.
    std::os::unix::fs::symlink(&outside, bundle.rootfs().join("link")).unwrap();
    std::os::unix::fs::symlink("../../../../../../../../tmp", bundle.rootfs().join("up")).unwrap();
    // crun makes no folders through dangling links.
    match bundle.create().await {
        Ok(running) => {
            bed.runtime.start(&bundle.id).await.unwrap();
            let ended = running.end().await;
            assert_eq!((ended.code, ended.stdout.as_str()), (0, "host\nhost\n"), "{}", ended.stderr);
            bundle.delete().await;
        }
        Err(error) => assert!(error.to_string().contains("link"), "{error}"),
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "the host's folder was touched");
    assert!(!Path::new("/tmp/inner").exists());
}

async fn the_hosts_mounts_are_not_seen(bed: &Bed) {
    let mountinfo = bed.say(&shell("cat /proc/self/mountinfo")).await;
    for line in mountinfo.lines() {
        let place = line.split(' ').nth(4).unwrap();
        let ours = place == "/" || ["/dev", "/proc", "/run", "/sys"].iter().any(|top| place.starts_with(top));
        assert!(ours && !place.contains("gpusnap"), "{line}");
    }
}

/// A mount of the host, shared with its peers.
struct Shared {
    place: PathBuf,
}

impl Shared {
    fn new(bed: &Bed) -> Self {
        let place = bed.folder().join("shared");
        fs::create_dir(&place).unwrap();
        rustix::mount::mount("tmpfs", &place, "tmpfs", MountFlags::empty(), None).unwrap();
        rustix::mount::mount_change(&place, MountPropagationFlags::SHARED).unwrap();
        let shared = Self { place };
        for name in ["before", "later", "inner"] {
            fs::create_dir(shared.place.join(name)).unwrap();
        }
        shared.mount("before");
        shared
    }

    fn mount(&self, name: &str) {
        let place = self.place.join(name);
        rustix::mount::mount("tmpfs", &place, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(place.join("file"), format!("{name}\n")).unwrap();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.place, UnmountFlags::DETACH);
    }
}

async fn a_private_mount_does_not_follow_the_host(bed: &Bed) {
    let shared = Shared::new(bed);
    let bundle = bed.bundle(&shell("echo up; sleep 600").with_mount(mount(
        "/mnt",
        "bind",
        &shared.place,
        &["rbind", "rprivate"],
    )));
    let running = bundle.start().await;
    running.says("up").await;
    assert_eq!(bundle.ask("cat /mnt/before/file").await, "before\n");
    shared.mount("later");
    assert_eq!(bundle.ask("ls /mnt/later").await, "");
    bundle.kill(running).await;
}

async fn a_slave_mount_follows_the_host(bed: &Bed) {
    let shared = Shared::new(bed);
    let spec = shell("echo up; sleep 600")
        .with_mount(mount("/mnt", "bind", &shared.place, &["rbind", "rslave"]))
        .with_linux(|linux| {
            // As requested by the CRI together with such a mount.
            linux.set_rootfs_propagation(Some("rslave".to_owned()));
        });
    let bundle = bed.bundle(&spec);
    let running = bundle.start().await;
    running.says("up").await;
    shared.mount("later");
    assert_eq!(bundle.ask("cat /mnt/later/file").await, "later\n");
    bundle.ask_as("mount -t tmpfs tmpfs /mnt/inner && touch /mnt/inner/file", &[Capability::SysAdmin]).await;
    assert!(!shared.place.join("inner/file").exists(), "the host follows");
    bundle.kill(running).await;
}

async fn a_shared_mount_is_followed_by_the_host(bed: &Bed) {
    let shared = Shared::new(bed);
    let spec = shell("echo up; sleep 600")
        .with_mount(mount("/mnt", "bind", &shared.place, &["rbind", "rshared"]))
        .with_linux(|linux| {
            // As requested by the CRI together with such a mount.
            linux.set_rootfs_propagation(Some("rshared".to_owned()));
        });
    let bundle = bed.bundle(&spec);
    let running = bundle.start().await;
    running.says("up").await;
    shared.mount("later");
    assert_eq!(bundle.ask("cat /mnt/later/file").await, "later\n");
    bundle.ask_as("mount -t tmpfs tmpfs /mnt/inner && touch /mnt/inner/file", &[Capability::SysAdmin]).await;
    until("the host follows", || shared.place.join("inner/file").exists()).await;
    bundle.kill(running).await;
}

async fn file_systems_have_the_options_they_ask_for(bed: &Bed) {
    let mountinfo = bed.say(&shell("cat /proc/self/mountinfo")).await;
    for (place, expected) in [
        ("/proc", &["nosuid", "noexec", "nodev"][..]),
        ("/dev", &["nosuid"]),
        ("/dev/shm", &["nosuid", "noexec", "nodev"]),
        ("/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        ("/dev/pts", &["nosuid", "noexec"]),
        ("/sys", &["nosuid", "noexec", "nodev", "ro"]),
    ] {
        let options = options(&mountinfo, place);
        for option in expected {
            assert!(options.iter().any(|other| other == option), "{place} lacks {option}: {options:?}");
        }
    }
}
