//! Hooks: programs of the host, run by a runtime at points of a container's life.

use std::fs;

use oci_spec::runtime::{Hooks, Spec};

use crate::bed::{Bed, sentences};
use crate::container::Bundle;
use crate::spec::{hook, shell};
use crate::world::Which;

sentences![
    hooks_run_in_order,
    hooks_are_told_of_their_container,
    hooks_run_in_the_namespaces_of_their_kind,
    a_failing_poststop_hook_does_not_keep_a_container,
    a_hook_that_takes_too_long_is_ended,
];

const KINDS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// Adds a hook of each kind, which runs the script given by `script` for the kind's name.
pub(crate) fn with_hooks(mut spec: Spec, script: impl Fn(&str) -> String) -> Spec {
    let one = |kind: &str| Some(vec![hook(&script(kind))]);
    let mut hooks = Hooks::default();
    #[allow(deprecated, reason = "nvidia-container-runtime's own hook is still one of these")]
    hooks.set_prestart(one("prestart"));
    hooks.set_create_runtime(one("createRuntime"));
    hooks.set_create_container(one("createContainer"));
    hooks.set_start_container(one("startContainer"));
    hooks.set_poststart(one("poststart"));
    hooks.set_poststop(one("poststop"));
    spec.set_hooks(Some(hooks));
    spec
}

/// Returns the place of a hook's output: in a folder visible to the host, and to hooks and program
/// inside the container.
fn path(bundle: &Bundle<'_>, kind: &str, name: &str) -> String {
    match kind {
        "startContainer" => format!("/tmp/{name}"),
        _ => format!("{}/tmp/{name}", bundle.rootfs().display()),
    }
}

fn read(bundle: &Bundle<'_>, name: &str) -> String {
    let path = bundle.rootfs().join("tmp").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

async fn hooks_run_in_order(bed: &Bed) {
    let spec = shell("read go; echo program >>/tmp/order");
    let bundle = bed.bundle(&spec);
    bundle.write(&with_hooks(spec, |kind| format!("echo {kind} >>{}", path(&bundle, kind, "order"))));
    let running = bundle.create().await.unwrap();
    let order = || without_known_faults(bed.which, &read(&bundle, "order"));
    assert_eq!(order(), "prestart createRuntime createContainer");
    bed.runtime.start(&bundle.id).await.unwrap();
    running.tell("go");
    running.end().await;
    let poststart = if bed.which == Which::Libcontainer { "poststart " } else { "" };
    let started = format!("prestart createRuntime createContainer startContainer {poststart}program");
    assert_eq!(order(), started);
    bundle.delete().await;
    assert_eq!(order(), format!("{started} poststop"));
    assert_eq!(read(&bundle, "order").matches("poststart").count(), 1);
    bundle.delete().await;
    assert_eq!(read(&bundle, "order").matches("poststop").count(), 1);
}

/// Removes known faults. runc before 1.5 runs poststart hooks at the end of create
/// (opencontainers/runc#1710, #5186), and crun runs them while the startContainer hooks still run
/// (containers/crun#1562).
fn without_known_faults(which: Which, order: &str) -> String {
    let faulty = |kind: &&str| which != Which::Libcontainer && *kind == "poststart";
    order.lines().filter(|kind| !faulty(kind)).collect::<Vec<_>>().join(" ")
}

async fn hooks_are_told_of_their_container(bed: &Bed) {
    let mut spec = shell("echo up; sleep 600");
    spec.set_annotations(Some([("dev.example/key".to_owned(), "value".to_owned())].into()));
    let bundle = bed.bundle(&spec);
    bundle.write(&with_hooks(spec, |kind| format!("echo \"$state\" >{}", path(&bundle, kind, kind))));
    let running = bundle.start().await;
    running.says("up").await;
    let pid = running.child.pid();
    bundle.kill(running).await;
    for kind in KINDS {
        let state: serde_json::Value = serde_json::from_str(&read(&bundle, kind)).unwrap();
        assert_eq!(state["id"], bundle.id.as_str(), "{kind}");
        // crun reports the root as the bundle to the hook inside.
        if kind != "startContainer" {
            assert_eq!(state["bundle"], bundle.folder.to_str().unwrap(), "{kind}");
        }
        assert_eq!(state["annotations"]["dev.example/key"], "value", "{kind}");
        assert!(state["ociVersion"].is_string(), "{kind}");
        // The pid inside is another one, and runc also passes it to hooks before the change of the
        // root.
        if ["prestart", "createRuntime", "poststart"].contains(&kind) {
            assert_eq!(state["pid"], pid, "{kind}");
        }
    }
    let status = |kind| serde_json::from_str::<serde_json::Value>(&read(&bundle, kind)).unwrap()["status"].clone();
    if bed.which != Which::Runc {
        assert_eq!(status("poststart"), "running");
    }
    assert_eq!(status("poststop"), "stopped");
}

async fn hooks_run_in_the_namespaces_of_their_kind(bed: &Bed) {
    let spec = shell("true");
    let bundle = bed.bundle(&spec);
    let script = |kind: &str| format!("readlink /proc/self/ns/uts >{}", path(&bundle, kind, kind));
    bundle.write(&with_hooks(spec, script));
    let running = bundle.create().await.unwrap();
    let of = |pid: i32| format!("{}\n", fs::read_link(format!("/proc/{pid}/ns/uts")).unwrap().display());
    let (inside, outside) = (of(running.child.pid()), of(std::process::id().try_into().unwrap()));
    bed.runtime.start(&bundle.id).await.unwrap();
    running.end().await;
    bundle.delete().await;
    for kind in KINDS {
        let expected = if ["createContainer", "startContainer"].contains(&kind) { &inside } else { &outside };
        assert_eq!(&read(&bundle, kind), expected, "{kind}");
    }
}

async fn a_failing_poststop_hook_does_not_keep_a_container(bed: &Bed) {
    let mut spec = shell("true");
    spec.hooks_mut().get_or_insert_default().set_poststop(Some(vec![hook("exit 7")]));
    let bundle = bed.bundle(&spec);
    bundle.start().await.end().await;
    bundle.delete().await;
}

async fn a_hook_that_takes_too_long_is_ended(bed: &Bed) {
    let mut slow = hook("exec sleep 600");
    slow.set_timeout(Some(1));
    let mut spec = shell("true");
    spec.hooks_mut().get_or_insert_default().set_create_runtime(Some(vec![slow]));
    bed.refusal(&bed.bundle(&spec)).await;
}
