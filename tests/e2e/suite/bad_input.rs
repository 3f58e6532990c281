//! Bad input: clear messages and no leftovers.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::target::{Containerd, Shim, Target};
use e2e::{Case, Cmd, Skip, Test, bed, case, ensure_eq, ensure_has, eventually, proc};
use serde_json::{Value, json};

use crate::ctr_exit::IDLE;

pub(crate) fn cases() -> Vec<Case> {
    let new = Target { containerd: Containerd::V2_4, shim: Shim::Stock };
    let by_hand = "it cannot be started by hand: it wants a protobuf message that only containerd 2.3 and later give";
    let by_toml = "the options of runc's name are no TOML file";
    vec![
        case!(a_spec_without_arguments_is_refused),
        case!(a_root_that_does_not_exist_is_named),
        case!(a_mount_whose_source_does_not_exist_is_named),
        case!(a_file_system_that_does_not_exist_is_refused),
        case!(a_namespace_that_does_not_exist_is_refused),
        case!(a_sysctl_of_the_host_is_refused),
        case!(a_working_directory_that_is_a_file_is_refused),
        case!(a_file_that_is_no_program_is_refused),
        case!(the_shim_refuses_a_bundle_without_a_config).except_target(new, by_hand),
        case!(the_shim_refuses_a_config_that_is_no_json).except_target(new, by_hand),
        case!(a_runtime_program_that_does_not_exist_is_named),
        case!(crun_can_be_chosen),
        case!(options_that_are_no_toml_are_refused).except(Shim::Stock, by_toml).except(Shim::AsRunc, by_toml),
        case!(a_root_that_cannot_be_mounted_is_an_error),
        case!(the_shim_says_its_version),
    ]
}

/// Runs a spec that must fail: returns the message, and checks for leftovers.
fn refused(t: &Test, spec: &Value) -> Result<String> {
    let id = t.id("bad");
    let file = t.file(&format!("{id}.json"), spec.to_string())?;
    let out = t.ctr().run_spec(&id, &["--rm"], &file).run()?.expect_failure()?;
    nothing_left(t, &id)?;
    Ok(out.stderr)
}

/// Waits until no process, mount, cgroup, bundle or runtime state of this container is left, and
/// its id is free.
fn nothing_left(t: &Test, id: &str) -> Result<()> {
    eventually("everything of a refused container to be gone", || {
        let left = bed::leaks()?;
        let left: Vec<&String> = left.iter().filter(|line| line.contains(id)).collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    })?;
    t.ctr().cmd().args(&["container", "rm", id]).run()?;
    t.ctr().run(id, &["--rm"], &["true"]).ok()?;
    Ok(())
}

fn spec(t: &Test) -> Result<Value> {
    t.ctr().spec(&["/bin/sh", "-c", "touch /ran"])
}

fn a_spec_without_arguments_is_refused(t: &Test) -> Result<()> {
    let mut bad = spec(t)?;
    bad["process"]["args"] = json!([]);
    ensure_has!(refused(t, &bad)?, "arg");
    Ok(())
}

fn a_root_that_does_not_exist_is_named(t: &Test) -> Result<()> {
    let mut bad = spec(t)?;
    bad["root"]["path"] = json!("/no/such/root");
    ensure_has!(refused(t, &bad)?, "/no/such/root");
    Ok(())
}

fn a_mount_whose_source_does_not_exist_is_named(t: &Test) -> Result<()> {
    let mut bad = spec(t)?;
    let mount = json!({ "destination": "/mnt", "type": "bind", "source": "/no/such/source", "options": ["rbind"] });
    bad["mounts"].as_array_mut().context("mounts")?.push(mount);
    ensure_has!(refused(t, &bad)?, "/no/such/source");
    Ok(())
}

fn a_file_system_that_does_not_exist_is_refused(t: &Test) -> Result<()> {
    let mut bad = spec(t)?;
    let mount = json!({ "destination": "/mnt", "type": "nosuchfs", "source": "nosuchfs" });
    bad["mounts"].as_array_mut().context("mounts")?.push(mount);
    ensure_has!(refused(t, &bad)?, "/mnt");
    Ok(())
}

fn a_namespace_that_does_not_exist_is_refused(t: &Test) -> Result<()> {
    let mut bad = spec(t)?;
    bad["linux"]["namespaces"].as_array_mut().context("namespaces")?.retain(|n| n["type"] != "network");
    let gone = json!({ "type": "network", "path": "/run/netns/no-such-namespace" });
    bad["linux"]["namespaces"].as_array_mut().context("namespaces")?.push(gone);
    ensure_has!(refused(t, &bad)?, "no-such-namespace");
    Ok(())
}

fn a_sysctl_of_the_host_is_refused(t: &Test) -> Result<()> {
    let before = fs::read_to_string("/proc/sys/vm/swappiness")?;
    let mut bad = spec(t)?;
    bad["linux"]["sysctl"] = json!({ "vm.swappiness": "13" });
    ensure_has!(refused(t, &bad)?, "vm.swappiness");
    ensure_eq!(fs::read_to_string("/proc/sys/vm/swappiness")?, before);
    Ok(())
}

fn a_working_directory_that_is_a_file_is_refused(t: &Test) -> Result<()> {
    let mut bad = spec(t)?;
    bad["process"]["cwd"] = json!("/etc/passwd");
    ensure_has!(refused(t, &bad)?.to_lowercase(), "not a directory");
    Ok(())
}

fn a_file_that_is_no_program_is_refused(t: &Test) -> Result<()> {
    let mut bad = spec(t)?;
    bad["process"]["args"] = json!(["/etc/passwd"]);
    let said = refused(t, &bad)?;
    ensure_has!(said, "/etc/passwd");
    ensure_has!(said.to_lowercase(), "permission denied");
    Ok(())
}

/// Runs `start` of the target's shim in a bundle with this config, as containerd does. The call
/// must fail, and leave no shim.
fn start_is_refused(t: &Test, config: Option<&str>) -> Result<String> {
    let id = t.id("bundle");
    let bundle = t.folder()?.join(&id);
    fs::create_dir_all(&bundle)?;
    if let Some(config) = config {
        fs::write(bundle.join("config.json"), config)?;
    }
    let address = t.bed().address();
    let shim = t.bed().shim_binary()?.to_string_lossy().into_owned();
    let script = "cd \"$1\" && shift && exec \"$@\" start </dev/null";
    let args = [&bundle.to_string_lossy(), shim.as_str(), "-namespace", "default", "-id", &id, "-address", &address];
    let cmd = Cmd::new("sh").args(&["-c", script, "sh"]).args(&args);
    let out = cmd.env("TTRPC_ADDRESS", format!("{address}.ttrpc")).timeout(Duration::from_secs(30)).run()?;
    let left = proc::all().into_iter().filter(|pid| proc::cmdline(*pid).contains(&id)).collect::<Vec<_>>();
    for pid in &left {
        proc::kill(*pid)?;
    }
    ensure!(left.is_empty(), "left shims {left:?} for the config {config:?}: {out}");
    let out = out.expect_failure()?;
    ensure!(!out.stderr.contains("panic"), "{out}");
    Ok(format!("{}{}", out.text(), out.stderr))
}

fn the_shim_refuses_a_bundle_without_a_config(t: &Test) -> Result<()> {
    ensure_has!(start_is_refused(t, None)?, "config.json");
    Ok(())
}

fn the_shim_refuses_a_config_that_is_no_json(t: &Test) -> Result<()> {
    for config in ["", "{", "[1,2]", "{\"annotations\": 3}", "\u{0}\u{1}\u{2}"] {
        start_is_refused(t, Some(config))?;
    }
    Ok(())
}

/// `ctr run` with another runtime program than the target's.
fn with_program(t: &Test, id: &str, program: &str, options: &[&str], argv: &[&str]) -> Result<Cmd> {
    let toml = t.file("options.toml", format!("BinaryName = \"{program}\"\n"))?;
    let chosen = match t.target().shim {
        Shim::Stock | Shim::AsRunc => ["--runc-binary", program],
        Shim::Gpusnap | Shim::GpusnapRunc => ["--runtime-config-path", &toml],
    };
    Ok(t.ctr().run_by(t.target().shim.runtime(), id, &[&chosen[..], options].concat(), argv))
}

fn a_runtime_program_that_does_not_exist_is_named(t: &Test) -> Result<()> {
    let id = t.id("c");
    let out = with_program(t, &id, "no-such-runtime", &["--rm"], &["true"])?.run()?.expect_failure()?;
    ensure_has!(out.stderr, "no-such-runtime");
    nothing_left(t, &id)
}

fn crun_can_be_chosen(t: &Test) -> Result<()> {
    if Cmd::new("crun").arg("--version").run().is_err() {
        return Err(Skip::because("the test bed has no crun"));
    }
    let id = t.id("c");
    let out = with_program(t, &id, "crun", &["--detach", "--null-io"], &["sh", "-c", IDLE])?.run()?;
    if out.stderr.contains("cgroups in hybrid mode not supported") {
        return Err(Skip::because("crun does not support this machine's hybrid cgroups"));
    }
    out.expect_code(0)?;
    ensure_eq!(t.ctr().exec(&id, &["sh", "-c", "echo hello; exit 3"]).run()?.expect_code(3)?.text(), "hello\n");
    t.ctr().task(&["pause", &id]).ok()?;
    t.ctr().task(&["resume", &id]).ok()?;
    t.ctr().kill(&id, "SIGKILL")?;
    t.ctr().becomes(&id, "STOPPED")?;
    ensure_eq!(t.ctr().delete_task(&id)?, 137);
    Ok(())
}

fn options_that_are_no_toml_are_refused(t: &Test) -> Result<()> {
    let (id, toml) = (t.id("c"), t.file("options.toml", "BinaryName = [this is no TOML")?);
    let options = ["--rm", "--runtime-config-path", &toml];
    let out = t.ctr().run_by(t.target().shim.runtime(), &id, &options, &["true"]).run()?.expect_failure()?;
    ensure_has!(out.stderr.to_lowercase(), "toml");
    nothing_left(t, &id)
}

fn a_root_that_cannot_be_mounted_is_an_error(t: &Test) -> Result<()> {
    let id = t.id("c");
    let ctr = t.ctr();
    ctr.create(&id, &["true"])?;
    // The snapshot loses its work folder behind containerd's back; overlayfs needs one.
    let mounts = ctr.cmd().args(&["snapshot", "mounts", "/mnt", &id]).ok()?.text();
    let work = mounts.split([',', ' ']).find_map(|option| option.strip_prefix("workdir="));
    let work = work.with_context(|| format!("no workdir in {mounts}"))?.trim();
    fs::remove_dir_all(work).with_context(|| work.to_owned())?;
    let out = ctr.task(&["start", "--detach", "--null-io", &id]).run()?.expect_failure()?;
    ensure_has!(out.stderr, "mount");
    ctr.cmd().args(&["container", "rm", &id]).ok()?;
    nothing_left(t, &id)
}

fn the_shim_says_its_version(t: &Test) -> Result<()> {
    let shim = t.bed().shim_binary()?.to_string_lossy().into_owned();
    let out = Cmd::new(shim.as_str()).arg("-v").stdin_null().ok()?;
    let name = shim.rsplit('/').next().unwrap_or_default();
    ensure_has!(out.text(), name);
    ensure_has!(out.text(), "Version:");
    Ok(())
}
