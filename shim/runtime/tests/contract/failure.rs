//! Failed creations, without leftovers: no process, cgroup, mount, descriptor or state.

use std::fs;
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;

use crate::bed::{Bed, sentences};
use crate::container::assert_says_missing;
use crate::spec::{Edit, hook, mount, namespace, program, shell};

sentences![
    a_container_with_a_missing_program_is_refused,
    a_container_with_a_missing_root_is_refused,
    a_container_with_a_malformed_configuration_is_refused,
    a_container_without_a_configuration_is_refused,
    a_container_with_a_missing_mount_source_is_refused,
    a_container_that_joins_a_missing_namespace_is_refused,
    a_container_whose_hook_fails_is_refused,
    a_second_container_with_the_same_id_is_refused_and_the_first_goes_on,
    a_container_that_cannot_be_created_can_be_created_later,
];

async fn a_container_with_a_missing_program_is_refused(bed: &Bed) {
    for name in ["nosuch", "/bin/nosuch"] {
        let error = bed.refusal(&bed.bundle(&program(&[name, "argument"]))).await;
        assert_says_missing(&error, name);
    }
}

async fn a_container_with_a_missing_root_is_refused(bed: &Bed) {
    let mut spec = shell("true");
    let mut root = spec.root().clone().unwrap();
    root.set_path("nosuch".into());
    spec.set_root(Some(root));
    let bundle = bed.bundle(&spec);
    let error = bed.refusal(&bundle).await;
    assert!(error.contains("nosuch"), "{error}");
}

async fn a_container_with_a_malformed_configuration_is_refused(bed: &Bed) {
    let bundle = bed.bundle(&shell("true"));
    for malformed in ["", "{", "[]", "{\"ociVersion\": 7}"] {
        fs::write(bundle.folder.join("config.json"), malformed).unwrap();
        bed.refusal(&bundle).await;
    }
}

async fn a_container_without_a_configuration_is_refused(bed: &Bed) {
    let bundle = bed.bundle(&shell("true"));
    fs::remove_file(bundle.folder.join("config.json")).unwrap();
    let error = bed.refusal(&bundle).await;
    assert!(error.contains("config.json"), "{error}");
}

async fn a_container_with_a_missing_mount_source_is_refused(bed: &Bed) {
    let spec = shell("true").with_mount(mount("/mnt", "bind", "/nosuch/source", &["rbind", "rw"]));
    let error = bed.refusal(&bed.bundle(&spec)).await;
    assert!(error.contains("/nosuch"), "{error}");
}

async fn a_container_that_joins_a_missing_namespace_is_refused(bed: &Bed) {
    let missing = namespace(LinuxNamespaceType::Network, Some(Path::new("/run/netns/nosuch")));
    let spec = shell("true").with_namespace(LinuxNamespaceType::Network, Some(missing));
    let error = bed.refusal(&bed.bundle(&spec)).await;
    assert!(error.contains("/run/netns/nosuch"), "{error}");
}

async fn a_container_whose_hook_fails_is_refused(bed: &Bed) {
    for kind in ["createRuntime", "createContainer"] {
        let mut spec = shell("true");
        let failing = vec![hook("exit 9")];
        let hooks = spec.hooks_mut().get_or_insert_default();
        match kind {
            "createRuntime" => hooks.set_create_runtime(Some(failing)),
            // This hook runs in the container's mount namespace, still with the host's root.
            _ => hooks.set_create_container(Some(failing)),
        };
        let error = bed.refusal(&bed.bundle(&spec)).await;
        assert!(error.contains('9') || error.contains("hook"), "{kind}: {error}");
    }
}

async fn a_second_container_with_the_same_id_is_refused_and_the_first_goes_on(bed: &Bed) {
    let bundle = bed.bundle(&shell("echo up; sleep 600"));
    let running = bundle.start().await;
    running.says("up").await;
    let error = bundle.create().await.err().unwrap().to_string();
    assert!(error.contains("exist"), "{error}");
    assert!(error.contains(&bundle.id), "{error}");
    assert_eq!(running.child.exit(), None);
    assert_eq!(bundle.ask("echo on").await, "on\n");
    bundle.kill(running).await;
}

async fn a_container_that_cannot_be_created_can_be_created_later(bed: &Bed) {
    let bundle = bed.bundle(&program(&["nosuch"]));
    bed.refusal(&bundle).await;
    bundle.write(&shell("echo now"));
    assert_eq!(bundle.start().await.end().await.stdout, "now\n");
    bundle.delete().await;
}
