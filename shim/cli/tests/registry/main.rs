//! `gpusnap` against Debian's docker-registry, with skopeo beside.
//!
//! `make test-registry` installs both; if they are missing, the tests report so and pass.

// This crate has only tests; clippy recognizes just the functions marked as such.
#![allow(clippy::unwrap_used, clippy::panic)]

mod world;

use world::{Gpusnap, Registry, World, names_of, skopeo};

/// Number of kills of push, and of pull.
const KILLS: u64 = 50;

#[test]
fn what_was_pushed_is_pulled_bit_for_bit_after_the_store_was_wiped() {
    let Some(registry) = Registry::start() else { return };
    let world = World::new();
    let vit = world.publish("default/vit", 12, 0);
    let pushed = world.gpusnap(&["push", "vit", &registry.at("team/vit:warm")]).succeeds();
    assert!(pushed.contains(&vit.short()), "{pushed}");
    let other = World::new();
    let pulled = other.gpusnap(&["pull", &registry.at("team/vit:warm")]).succeeds();
    assert!(pulled.contains(&vit.short()), "{pulled}");
    assert_eq!(other.blobs(), world.blobs());
    assert_eq!(names_of(&other), ["default/vit"]);
    other.gpusnap(&["verify", "vit"]).succeeds();
    other.gpusnap(&["-n", "k8s.io", "pull", &registry.at("team/vit:warm"), "again"]).succeeds();
    assert_eq!(names_of(&other), ["default/vit", "k8s.io/again"]);
}

#[test]
fn a_second_snapshot_moves_only_what_differs() {
    let Some(registry) = Registry::start() else { return };
    let (world, other) = (World::new(), World::new());
    world.publish("default/one", 12, 0);
    world.publish("default/two", 12, 3);
    let target = registry.at("team/vit");
    world.gpusnap(&["push", "one", &format!("{target}:one")]).succeeds();
    other.gpusnap(&["pull", &format!("{target}:one")]).succeeds();
    let before = registry.bytes();
    let pushed = world.gpusnap(&["push", "two", &format!("{target}:two")]).succeeds();
    let more = registry.bytes() - before;
    assert!((3 << 20..4 << 20).contains(&more), "{more} bytes more, {pushed}");
    let pulled = other.gpusnap(&["pull", &format!("{target}:two"), "two"]).succeeds();
    assert!(pulled.contains(": 3.1 MB of 12.5 MB moved"), "{pulled}");
    let again = other.gpusnap(&["pull", &format!("{target}:two"), "two"]).succeeds();
    assert!(again.contains(": 0 B of 12.5 MB moved"), "{again}");
}

#[test]
fn skopeo_moves_a_snapshot_both_ways() {
    let Some(registry) = Registry::start() else { return };
    let (world, other) = (World::new(), World::new());
    let vit = world.publish("default/vit", 4, 0);
    let layout = format!("oci:{}:default/vit", world.store().display());
    let Some(inspected) = skopeo(&["inspect", "--raw", &layout]) else { return };
    assert!(inspected.contains("application/vnd.gpusnap.snapshot.v1+json"), "{inspected}");
    let remote = format!("docker://{}", registry.at("skopeo/vit:1"));
    skopeo(&["copy", "--dest-tls-verify=false", &layout, &remote]);
    other.gpusnap(&["pull", &registry.at("skopeo/vit:1")]).succeeds();
    assert_eq!(other.blobs(), world.blobs());

    world.gpusnap(&["push", "vit", &registry.at("ours/vit:1")]).succeeds();
    let ours = format!("docker://{}", registry.at("ours/vit:1"));
    let remote = skopeo(&["inspect", "--raw", "--tls-verify=false", &ours]);
    assert_eq!(remote.as_deref(), Some(&*inspected));
    let copied = tempfile::tempdir().unwrap();
    let folder = copied.path().join("layout");
    skopeo(&["copy", "--src-tls-verify=false", &ours, &format!("oci:{}:default/copy", folder.display())]);
    let verified = world.gpusnap_at(&folder, &["verify", "copy"]).succeeds();
    assert!(verified.contains("1 snapshots"), "{verified}");
    let listed = world.gpusnap_at(&folder, &["ls"]).succeeds();
    assert!(listed.contains("default/copy") && listed.contains(&vit.short()), "{listed}");
}

#[test]
fn what_is_not_there_and_who_is_not_are_told_apart() {
    let Some(registry) = Registry::start() else { return };
    let world = World::new();
    world.publish("default/vit", 1, 0);
    let missing = world.gpusnap(&["pull", &registry.at("no/such:thing")]).code(3);
    assert!(missing.contains("has no manifest no/such:thing") && missing.lines().count() == 1, "{missing}");
    world.gpusnap(&["push", "nothing", &registry.at("a:b")]).code(3);
    world.gpusnap(&["push", "vit", "nowhere"]).code(2);
    let nobody = world.gpusnap(&["push", "vit", "127.0.0.1:1/a:b"]).code(1);
    assert!(nobody.contains("refused") && nobody.contains("the same command goes on"), "{nobody}");
}

#[test]
fn the_credentials_of_docker_login_open_a_registry() {
    let Some(registry) = Registry::start_locked() else { return };
    let world = World::new();
    world.publish("default/vit", 1, 0);
    let target = registry.at("cave/vit:1");
    let host = target.split('/').next().unwrap();
    let push = || world.gpusnap(&["push", "vit", &target]);

    let closed = push().code(1);
    assert!(closed.contains(&format!("try `docker login {host}`")), "{closed}");
    // ali:open sesame, in base64
    world.docker_config(&format!(r#"{{"auths":{{"{host}":{{"auth":"YWxpOm9wZW4gc2VzYW1l"}}}}}}"#), "");
    push().succeeds();
    world.docker_config(&format!(r#"{{"auths":{{"{host}":{{"auth":"YWxpOndyb25n"}}}}}}"#), "");
    assert!(push().code(1).contains("try `docker login"));

    let helped = format!(r#"{{"credHelpers":{{"{host}":"cave"}}}}"#);
    world.docker_config(&helped, r#"echo '{"Username":"ali","Secret":"open sesame"}'"#);
    push().succeeds();
    world.docker_config(r#"{"credsStore":"cave"}"#, r#"echo '{"Username":"ali","Secret":"open sesame"}'"#);
    push().succeeds();
    world.docker_config(&helped, "echo locked out >&2; exit 1");
    let helpless = push().code(1);
    assert!(helpless.contains("docker-credential-cave: locked out"), "{helpless}");
    world.docker_config(r#"{"credsStore":"of-nobody"}"#, "");
    assert!(push().code(1).contains("cannot be run"));
    world.docker_config("not JSON", "");
    assert!(push().code(1).contains("config.json"));
}

#[test]
fn killed_at_any_moment_a_pull_leaves_a_clean_store_and_the_next_one_succeeds() {
    let Some(registry) = Registry::start() else { return };
    let source = World::new();
    source.publish("default/vit", 24, 0);
    let target = registry.at("kill/vit:1");
    source.gpusnap(&["push", "vit", &target]).succeeds();
    let whole = World::new().gpusnap(&["pull", &target]).takes();
    let mut killed = 0;
    for round in 0..KILLS {
        let world = World::new();
        let gpusnap = world.gpusnap(&["pull", &target]);
        killed += u64::from(gpusnap.killed_after(whole * u32::try_from(round).unwrap() / 50));
        assert_eq!(world.problems(), Vec::<String>::new(), "round {round}");
        world.gpusnap(&["pull", &target]).succeeds();
        assert_eq!(world.problems(), Vec::<String>::new(), "round {round}");
        assert_eq!(world.blobs(), source.blobs(), "round {round}");
        world.gpusnap(&["prune", "--grace", "0s"]).succeeds();
        assert_eq!(world.garbage(), Vec::<String>::new());
    }
    println!("{killed} of {KILLS} pulls were killed before they were done");
    assert!(killed > KILLS / 2, "{killed}");
}

#[test]
fn killed_at_any_moment_a_push_leaves_a_clean_store_and_the_next_one_succeeds() {
    let Some(registry) = Registry::start() else { return };
    let world = World::new();
    let vit = world.publish("default/vit", 24, 0);
    let whole = world.gpusnap(&["push", "vit", &registry.at("kill/whole:1")]).takes();
    let mut killed = 0;
    for round in 0..KILLS {
        let target = registry.at(&format!("kill/{round}:1"));
        let gpusnap = world.gpusnap(&["push", "vit", &target]);
        killed += u64::from(gpusnap.killed_after(whole * u32::try_from(round).unwrap() / 50));
        assert_eq!(world.problems(), Vec::<String>::new(), "round {round}");
        let pushed = world.gpusnap(&["push", "vit", &target]).succeeds();
        assert!(pushed.contains(&vit.short()), "{pushed}");
    }
    println!("{killed} of {KILLS} pushes were killed before they were done");
    assert!(killed > KILLS / 2, "{killed}");
    let last = World::new();
    last.gpusnap(&["pull", &registry.at("kill/7:1")]).succeeds();
    assert_eq!(last.blobs(), world.blobs());
}

#[test]
fn an_interrupted_pull_says_how_to_go_on_and_leaves_no_draft() {
    let Some(registry) = Registry::start() else { return };
    let source = World::new();
    source.publish("default/vit", 24, 0);
    source.gpusnap(&["push", "vit", &registry.at("a/vit:1")]).succeeds();
    registry.pause();
    let world = World::new();
    let pull: Gpusnap = world.gpusnap(&["pull", &registry.at("a/vit:1")]);
    let said = pull.interrupted_after(std::time::Duration::from_millis(300));
    registry.resume();
    assert!(said.contains("was interrupted: the same command goes on from there"), "{said}");
    assert_eq!(world.drafts(), 0);
    assert_eq!(world.problems(), Vec::<String>::new());
}
