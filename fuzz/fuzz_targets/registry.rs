//! Input from registries and from docker's configuration.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use registry::{Target, credentials, fuzzing};

/// Folder of docker's configuration; `run` makes it, without any helper in reach.
static DOCKER: LazyLock<Option<PathBuf>> = LazyLock::new(|| std::env::var_os("DOCKER_CONFIG").map(PathBuf::from));

fuzz_target!(|data: &[u8]| {
    if let Some(said) = fuzzing::said(data) {
        assert!(!said.is_empty() && said.chars().count() <= 201 && !said.contains(char::is_control), "{said:?}");
    }
    if let Some(wait) = fuzzing::seconds(data) {
        assert_eq!(wait.subsec_nanos(), 0);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let line = fuzzing::one_line(text);
        assert_eq!(fuzzing::one_line(&line).trim_end_matches('…'), line.trim_end_matches('…'));
        target(text);
    }
    if let Some(folder) = &*DOCKER {
        std::fs::write(folder.join("config.json"), data).expect("the folder can be written to");
        for registry in ["registry.example", "localhost:5000", "index.docker.io"] {
            drop(credentials(registry));
        }
    }
});

fn target(text: &str) {
    let Ok(target) = Target::parse(text, false) else { return };
    let written = target.to_string();
    let again = Target::parse(&written, false).unwrap_or_else(|error| panic!("{written:?}: {error}"));
    assert_eq!((again.registry(), again.to_string()), (target.registry(), written));
    let (host, _) = text.split_once('/').expect("a target has a registry");
    assert!(target.registry() == host || target.registry() == "index.docker.io", "nobody else is asked");
    assert!(!target.short_name().is_empty());
}
