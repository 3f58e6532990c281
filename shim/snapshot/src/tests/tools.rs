//! Other tools and the store.

use std::process::{Command, Stdio};

use super::*;

/// Runs skopeo; reports and returns `None` if skopeo is missing.
fn skopeo(arguments: &[&str]) -> Option<bool> {
    let mut command = Command::new("skopeo");
    let child = match command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("skipped: skopeo cannot be run: {error}");
            return None;
        }
    };
    let pid = rustix::process::Pid::from_child(&child);
    let (_, status) = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap().unwrap();
    Some(status.exit_status() == Some(0))
}

#[test]
fn skopeo_reads_a_snapshot_and_what_it_copies_is_one() {
    let world = World::new();
    let digest = world.publish("k8s.io/team-a/vit.2", &[b"one", &[7; 100_000]]).digest();
    let root = world.store.root().to_str().unwrap();
    let source = format!("oci:{root}:k8s.io/team-a/vit.2");
    let other = tempfile::tempdir().unwrap();
    let copied = format!("oci:{}:default/copied", other.path().to_str().unwrap());
    let Some(read) = skopeo(&["inspect", "--raw", &source]) else { return };
    assert!(read, "skopeo inspect --raw {source}");
    assert_eq!(skopeo(&["--insecure-policy", "copy", &source, &copied]), Some(true));
    let store = Store::open(other.path()).unwrap();
    assert_eq!(store.open_snapshot(&reference("default/copied")).unwrap().digest(), digest);
    assert_eq!(problems(&store), [""; 0]);

    let archive = other.path().with_extension("tar");
    let target = format!("oci-archive:{}:default/archived", archive.to_str().unwrap());
    assert_eq!(skopeo(&["--insecure-policy", "copy", &source, &target]), Some(true));
    let elsewhere = World::new();
    let file = std::fs::File::open(&archive).unwrap();
    let imported = elsewhere.store.import(file, crate::Import::default(), &|_| {}).unwrap();
    assert_eq!((imported.digest(), imported.names()), (digest, &[name("default/archived")][..]));
    std::fs::remove_file(archive).unwrap();

    let exported = other.path().with_extension("exported.tar");
    let file = std::fs::File::create(&exported).unwrap();
    imported.export(Some(&name("default/archived")), file, &|_| {}).unwrap();
    let back = format!("oci-archive:{}", exported.to_str().unwrap());
    let read = skopeo(&["inspect", "--raw", &back]);
    std::fs::remove_file(exported).unwrap();
    assert_eq!(read, Some(true));
}
