//! Promises of the OCI runtime spec, tested by specs written by hand. `ctr` takes them on every
//! target, so that the runtimes beyond nerdctl's choice are tested too.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use e2e::target::Shim;
use e2e::{Case, Test, case, cgroup, ensure_eq, ensure_has, lines, proc};
use serde_json::{Value, json};

use crate::ctr_exit::IDLE;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(a_spec_runs_on_its_own_root),
        case!(hooks_run_in_order_and_are_told_the_state),
        case!(a_hook_that_fails_stops_the_container),
        case!(rlimits_capabilities_and_ids_hold_in_init_and_exec),
        case!(ambient_capabilities_serve_an_ordinary_user),
        case!(seccomp_of_the_spec_holds_in_init_and_exec),
        case!(an_unknown_capability_is_ignored),
        case!(mounts_are_made_in_order_with_their_options),
        case!(a_mount_point_behind_a_link_stays_inside_the_root),
        case!(a_file_is_mounted_onto_a_file),
        case!(devices_have_their_owner_and_mode),
        case!(paths_of_the_spec_are_masked_and_read_only),
        case!(a_user_namespace_maps_root).except(
            Shim::GpusnapRunc,
            "ctr cannot send an identity for the streams beside a file of options: `can't unmarshal type runtimeoptions.v1.Options`",
        ),
        case!(a_domain_name_is_set),
        case!(a_cgroup_path_and_its_limits_are_as_asked),
        case!(the_container_sees_its_own_cgroup_read_only),
        case!(a_namespace_given_by_path_is_joined),
        case!(a_spec_without_namespaces_has_the_hosts),
    ]
}

/// The spec with a script as its process.
fn script(t: &Test, script: &str) -> Result<Value> {
    t.ctr().spec(&["/bin/sh", "-c", script])
}

fn add(list: &mut Value, item: Value) -> Result<()> {
    list.as_array_mut().context("a list")?.push(item);
    Ok(())
}

/// Drops a namespace, or gives it a path.
fn set_namespace(spec: &mut Value, kind: &str, path: Option<String>) -> Result<()> {
    let list = spec["linux"]["namespaces"].as_array_mut().context("namespaces")?;
    list.retain(|namespace| namespace["type"] != kind);
    if let Some(path) = path {
        list.push(json!({ "type": kind, "path": path }));
    }
    Ok(())
}

/// Output of a spec's process, and of an exec.
fn init_and_exec(t: &Test, spec: &Value, say: &str) -> Result<[String; 2]> {
    let mut once = spec.clone();
    once["process"]["args"] = json!(["/bin/sh", "-c", say]);
    let mut lasting = spec.clone();
    lasting["process"]["args"] = json!(["/bin/sh", "-c", IDLE]);
    let first = t.ctr().run_value(&once)?.expect_code(0)?.trimmed();
    let id = t.id("c");
    t.ctr().start_value(&id, &lasting)?;
    Ok([first, t.ctr().exec(&id, &["/bin/sh", "-c", say]).ok()?.trimmed()])
}

fn a_spec_runs_on_its_own_root(t: &Test) -> Result<()> {
    let spec = script(t, "echo hello >/from-inside; cat /from-inside; exit 5")?;
    ensure_eq!(t.ctr().run_value(&spec)?.expect_code(5)?.text(), "hello\n");
    let root = spec["root"]["path"].as_str().context("root")?;
    ensure_eq!(fs::read_to_string(format!("{root}/from-inside"))?, "hello\n");
    Ok(())
}

fn hooks_run_in_order_and_are_told_the_state(t: &Test) -> Result<()> {
    let folder = t.folder()?.display().to_string();
    let mut spec = script(t, "echo container >>/shared/order")?;
    add(
        &mut spec["mounts"],
        json!({ "destination": "/shared", "type": "bind", "source": folder, "options": ["rbind", "rw"] }),
    )?;
    let hook = |kind: &str, shared: &str| {
        let text = format!("echo {kind} >>{shared}/order; cat >{shared}/{kind}.json; hostname >{shared}/{kind}.host");
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", text], "env": ["PATH=/bin:/usr/bin"] }])
    };
    spec["hooks"] = json!({
        "prestart": hook("prestart", &folder),
        "createRuntime": hook("createRuntime", &folder),
        "createContainer": hook("createContainer", &folder),
        // This program is looked up inside the container's root.
        "startContainer": hook("startContainer", "/shared"),
        "poststart": hook("poststart", &folder),
        "poststop": hook("poststop", &folder),
    });
    spec["hostname"] = json!("inside");
    let id = t.id("c");
    let file = t.file("hooks.json", spec.to_string())?;
    t.ctr().run_spec(&id, &["--rm"], &file).ok()?;
    let read = |name: &str| fs::read_to_string(format!("{folder}/{name}")).with_context(|| name.to_owned());
    let text = read("order")?;
    let mut order = lines(&text);
    ensure_eq!(order.len(), 7, "{order:?}");
    // The container runs on at its start, so poststart is on its way beside it.
    order.retain(|line| *line != "poststart");
    ensure_eq!(order, ["prestart", "createRuntime", "createContainer", "startContainer", "container", "poststop"]);
    let expected = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    for (hook, status) in
        expected.into_iter().zip(["creating", "creating", "creating", "created", "running", "stopped"])
    {
        let state: Value = serde_json::from_str(&read(&format!("{hook}.json"))?)?;
        ensure_eq!(state["id"], id.as_str(), "the id that {hook} is told");
        // runc may not know yet that its own start has worked.
        let told = &state["status"];
        ensure!(told == status || (hook == "poststart" && told == "created"), "{hook} is told {told}, not {status}");
        let bundle = state["bundle"].as_str().unwrap_or_default();
        ensure!(bundle.ends_with(&id), "{hook} is told the bundle {bundle:?}");
        // 0 or absent without a process.
        ensure_eq!(state["pid"].as_u64().unwrap_or(0) > 0, status != "stopped", "a pid for {hook}: {state}");
        // createContainer runs in the container's namespaces, before the container has its name.
        if hook != "createContainer" {
            let inside = read(&format!("{hook}.host"))?.trim() == "inside";
            ensure_eq!(inside, hook == "startContainer", "{hook} is inside the container");
        }
    }
    Ok(())
}

fn a_hook_that_fails_stops_the_container(t: &Test) -> Result<()> {
    for kind in ["createRuntime", "createContainer", "startContainer"] {
        let mut spec = script(t, "touch /ran")?;
        spec["hooks"] =
            json!({ kind: [{ "path": "/bin/sh", "args": ["sh", "-c", "echo this hook refuses >&2; exit 3"] }] });
        let out = t.ctr().run_value(&spec)?.expect_failure()?;
        ensure_has!(out.stderr, "hook");
        let root = spec["root"]["path"].as_str().context("root")?;
        ensure!(!fs::exists(format!("{root}/ran"))?, "the container ran after {kind} had failed");
    }
    Ok(())
}

fn rlimits_capabilities_and_ids_hold_in_init_and_exec(t: &Test) -> Result<()> {
    let mut spec = script(t, "")?;
    spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 111, "hard": 222 }]);
    let caps = json!(["CAP_CHOWN", "CAP_KILL"]);
    spec["process"]["capabilities"] = json!({ "bounding": caps, "effective": caps, "permitted": caps });
    spec["process"]["noNewPrivileges"] = json!(true);
    spec["process"]["oomScoreAdj"] = json!(444);
    spec["process"]["user"] = json!({ "uid": 0, "gid": 0, "additionalGids": [7, 8] });
    let say = "ulimit -Sn; ulimit -Hn; id -G; cat /proc/self/oom_score_adj; grep -E '^(Cap|NoNew)' /proc/self/status";
    for text in init_and_exec(t, &spec, say)? {
        let rows = lines(&text);
        ensure_eq!(rows.get(..4), Some(&["111", "222", "0 7 8", "444"][..]));
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            ensure_eq!(proc::status_line(&text, set)?, "0000000000000021", "{set}");
        }
        ensure_eq!(proc::status_line(&text, "NoNewPrivs")?, "1");
    }
    Ok(())
}

fn ambient_capabilities_serve_an_ordinary_user(t: &Test) -> Result<()> {
    let mut spec = script(t, "")?;
    let caps = json!(["CAP_NET_BIND_SERVICE"]);
    spec["process"]["capabilities"] =
        json!({ "bounding": caps, "effective": caps, "permitted": caps, "inheritable": caps, "ambient": caps });
    spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    for text in init_and_exec(t, &spec, "id -u; grep Cap /proc/self/status")? {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure_eq!(proc::status_line(&text, set)?, "0000000000000400", "{set}");
        }
    }
    Ok(())
}

fn seccomp_of_the_spec_holds_in_init_and_exec(t: &Test) -> Result<()> {
    let mut spec = script(t, "")?;
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": ["mkdir", "mkdirat", "a_call_of_the_future"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 },
            { "names": ["rmdir"], "action": "SCMP_ACT_KILL_PROCESS" },
        ],
    });
    let say = "mkdir /x 2>&1; rmdir /tmp; echo rmdir: $?; grep Seccomp: /proc/self/status";
    for text in init_and_exec(t, &spec, say)? {
        ensure_has!(text, "Operation not supported");
        // 128 + SIGSYS
        ensure_has!(text, "rmdir: 159");
        ensure_eq!(proc::status_line(&text, "Seccomp")?, "2");
    }
    Ok(())
}

fn an_unknown_capability_is_ignored(t: &Test) -> Result<()> {
    let mut spec = script(t, "grep CapEff /proc/self/status")?;
    let caps = json!(["CAP_CHOWN", "CAP_OF_THE_FUTURE"]);
    spec["process"]["capabilities"] = json!({ "bounding": caps, "effective": caps, "permitted": caps });
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    ensure_eq!(proc::status_line(&out.text(), "CapEff")?, "0000000000000001");
    Ok(())
}

fn mounts_are_made_in_order_with_their_options(t: &Test) -> Result<()> {
    t.file("content", "outside\n")?;
    let folder = t.folder()?.display().to_string();
    let mut spec = script(
        t,
        "grep -E ' /a| /b' /proc/mounts; cat /a/in/content; touch /a/in/x || touch /a/y && cat /a/y; ls -ld /b",
    )?;
    add(
        &mut spec["mounts"],
        json!({ "destination": "/a", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "noexec", "nodev", "size=64k", "mode=755"] }),
    )?;
    // Below the previous mount, at a place that does not exist yet.
    add(
        &mut spec["mounts"],
        json!({ "destination": "/a/in", "type": "bind", "source": folder, "options": ["rbind", "ro", "nosuid"] }),
    )?;
    add(
        &mut spec["mounts"],
        json!({ "destination": "/b/c/d", "type": "tmpfs", "source": "shm", "options": ["ro", "size=1m"] }),
    )?;
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    let text = out.text();
    let options = |place: &str| -> Result<String> {
        let line = text.lines().find(|line| line.contains(&format!(" {place} ")));
        Ok(line
            .with_context(|| format!("no mount at {place} in {out}"))?
            .split(' ')
            .nth(3)
            .unwrap_or_default()
            .to_owned())
    };
    for (place, wanted) in [("/a", "rw,nosuid,nodev,noexec"), ("/a/in", "ro,nosuid"), ("/b/c/d", "ro")] {
        ensure!(options(place)?.starts_with(wanted), "{place} has {}", options(place)?);
    }
    ensure_has!(options("/a")?, "size=64k");
    ensure_has!(text, "outside");
    ensure_has!(out.stderr, "/a/in/x: Read-only file system");
    Ok(())
}

fn a_mount_point_behind_a_link_stays_inside_the_root(t: &Test) -> Result<()> {
    let mut spec = script(t, "cat /etc/e2e/deep/content; ls -A /etc/e2e")?;
    let root = spec["root"]["path"].as_str().context("root")?.to_owned();
    std::os::unix::fs::symlink("/etc/e2e", format!("{root}/link"))?;
    fs::create_dir_all(format!("{root}/etc/e2e"))?;
    t.file("content", "mounted\n")?;
    add(
        &mut spec["mounts"],
        json!({ "destination": "/link/deep", "type": "bind", "source": t.folder()?, "options": ["rbind", "ro"] }),
    )?;
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    ensure_eq!(out.text(), "mounted\ndeep\n");
    ensure!(!fs::exists("/etc/e2e")?, "a mount point was made on the host");
    Ok(())
}

fn a_file_is_mounted_onto_a_file(t: &Test) -> Result<()> {
    let file = t.file("content", "mounted file\n")?;
    let mut spec = script(t, "cat /etc/made /etc/passwd; echo x >/etc/passwd || echo refused")?;
    for place in ["/etc/made", "/etc/passwd"] {
        add(
            &mut spec["mounts"],
            json!({ "destination": place, "type": "bind", "source": file, "options": ["bind", "ro"] }),
        )?;
    }
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    ensure_eq!(out.text(), "mounted file\nmounted file\nrefused\n");
    Ok(())
}

fn devices_have_their_owner_and_mode(t: &Test) -> Result<()> {
    let mut spec = script(
        t,
        "stat -c '%F %a %u:%g %t:%T' /dev/some/zero; head -c 2 /dev/some/zero | od -An -tx1; stat -c %a /dev/null",
    )?;
    spec["linux"]["devices"] = json!([{ "path": "/dev/some/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 11, "gid": 12 }]);
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    ensure_eq!(lines(&out.text()), ["character special file 640 11:12 1:5", "00 00", "666"]);
    Ok(())
}

fn paths_of_the_spec_are_masked_and_read_only(t: &Test) -> Result<()> {
    let say = "cat /etc/passwd; ls -A /home; touch /var/x || echo refused; touch /tmp/x && echo written";
    let mut spec = script(t, say)?;
    spec["linux"]["maskedPaths"] = json!(["/etc/passwd", "/home", "/no/such/path"]);
    spec["linux"]["readonlyPaths"] = json!(["/var", "/no/such/path/either"]);
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    ensure_eq!(out.text(), "refused\nwritten\n");
    Ok(())
}

fn a_user_namespace_maps_root(t: &Test) -> Result<()> {
    let mut spec = script(t, IDLE)?;
    add(&mut spec["linux"]["namespaces"], json!({ "type": "user" }))?;
    let map = json!([{ "containerID": 0, "hostID": 200_000, "size": 65_536 }]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    // The mapped root must be able to reach its files.
    let mut folder = std::path::PathBuf::from(spec["root"]["path"].as_str().context("root")?);
    while folder.parent().is_some() {
        let mode = fs::metadata(&folder)?.permissions().mode();
        ensure!(mode & 0o005 == 0o005, "others may not enter {}", folder.display());
        folder.pop();
    }
    let id = t.id("c");
    t.ctr().start_value(&id, &spec)?;
    let init = t.ctr().pid(&id)?;
    ensure!(proc::namespace(init, "user")? != proc::own_namespace("user")?, "the user namespace is the host's");
    ensure_has!(proc::status(init, "Uid")?, "200000");
    ensure_has!(proc::status(init, "Gid")?, "200000");
    ensure_eq!(t.ctr().exec(&id, &["id", "-u"]).ok()?.trimmed(), "0");
    let map = t.ctr().exec(&id, &["cat", "/proc/self/uid_map"]).ok()?.trimmed();
    ensure_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "200000", "65536"]);
    Ok(())
}

fn a_domain_name_is_set(t: &Test) -> Result<()> {
    let mut spec = script(t, "hostname; cat /proc/sys/kernel/domainname")?;
    spec["hostname"] = json!("this-host");
    spec["domainname"] = json!("this.domain");
    ensure_eq!(t.ctr().run_value(&spec)?.expect_code(0)?.trimmed(), "this-host\nthis.domain");
    Ok(())
}

fn a_cgroup_path_and_its_limits_are_as_asked(t: &Test) -> Result<()> {
    let mut spec = script(t, IDLE)?;
    let (parent, name) = (t.id("parent"), "child");
    spec["linux"]["cgroupsPath"] = json!(format!("/{parent}/{name}"));
    let resources = &mut spec["linux"]["resources"];
    resources["memory"] = json!({ "limit": 33_554_432 });
    resources["pids"] = json!({ "limit": 33 });
    resources["cpu"] = json!({ "quota": 30_000, "period": 100_000, "shares": 512 });
    let id = t.id("c");
    t.ctr().start_value(&id, &spec)?;
    let init = t.ctr().pid(&id)?;
    let folder = cgroup::folder(init, "memory")?;
    ensure!(folder.ends_with(format!("{parent}/{name}")), "{}", folder.display());
    ensure_eq!(cgroup::memory_limit(init)?, 33_554_432);
    ensure_eq!(cgroup::pids_limit(init)?, 33);
    ensure_eq!(cgroup::cpu_quota(init)?, (30_000, 100_000));
    t.ctr().remove(&id)?;
    ensure!(!folder.exists(), "{} is left", folder.display());
    // The parent belongs to the test; the container must not remove it.
    for folder in [folder.parent().context("parent")?.to_owned()].into_iter().chain(cgroup::folders_named(&parent)) {
        fs::remove_dir(folder).ok();
    }
    Ok(())
}

fn the_container_sees_its_own_cgroup_read_only(t: &Test) -> Result<()> {
    let say = "grep ' /sys/fs/cgroup' /proc/mounts | cut -d' ' -f2-4;
        mkdir /sys/fs/cgroup/x /sys/fs/cgroup/memory/x 2>/dev/null || echo refused;
        cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || :";
    let mut spec = script(t, say)?;
    let options = ["nosuid", "noexec", "nodev", "relatime", "ro"];
    add(
        &mut spec["mounts"],
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options }),
    )?;
    spec["linux"]["resources"]["memory"] = json!({ "limit": 44_040_192 });
    // On v2 a container sees only its own part through a cgroup namespace, requested by every
    // client there.
    let namespaces = &mut spec["linux"]["namespaces"];
    let has_one = namespaces.as_array().is_some_and(|all| all.iter().any(|one| one["type"] == "cgroup"));
    if cgroup::is_v2() && !has_one {
        add(namespaces, json!({ "type": "cgroup" }))?;
    }
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    let text = out.text();
    ensure_has!(text, "refused");
    // The visible limit is the container's own.
    ensure_eq!(lines(&text).last().copied(), Some("44040192"), "{text}");
    let mounts: Vec<&str> = text.lines().filter(|line| line.starts_with("/sys/fs/cgroup")).collect();
    ensure!(!mounts.is_empty(), "no cgroup mount: {text}");
    for mount in mounts {
        let options = mount.split(' ').nth(2).unwrap_or_default();
        // On v1 the folder of the hierarchies is a tmpfs, left writable by runc.
        if !cgroup::is_v2() && mount.starts_with("/sys/fs/cgroup ") {
            continue;
        }
        ensure!(options.split(',').any(|option| option == "ro"), "{mount}");
    }
    Ok(())
}

fn a_namespace_given_by_path_is_joined(t: &Test) -> Result<()> {
    let id = t.id("c");
    t.ctr().start_sh(&id, IDLE)?;
    let init = t.ctr().pid(&id)?;
    let mut spec = script(t, "for n in net ipc uts pid; do readlink /proc/self/ns/$n; done")?;
    for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts"), ("pid", "pid")] {
        set_namespace(&mut spec, kind, Some(format!("/proc/{init}/ns/{file}")))?;
    }
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    let same = ["net", "ipc", "uts", "pid"].map(|kind| proc::namespace(init, kind)).into_iter();
    ensure_eq!(lines(&out.text()), same.collect::<Result<Vec<_>>>()?);
    Ok(())
}

fn a_spec_without_namespaces_has_the_hosts(t: &Test) -> Result<()> {
    let mut spec = script(t, "for n in net ipc uts pid; do readlink /proc/self/ns/$n; done")?;
    for kind in ["network", "ipc", "uts", "pid"] {
        set_namespace(&mut spec, kind, None)?;
    }
    // A name would be the host's.
    spec["hostname"] = json!("");
    let out = t.ctr().run_value(&spec)?.expect_code(0)?;
    let same = ["net", "ipc", "uts", "pid"].map(proc::own_namespace).into_iter();
    ensure_eq!(lines(&out.text()), same.collect::<Result<Vec<_>>>()?);
    Ok(())
}
