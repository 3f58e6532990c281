//! Builds CRIU's plugin and a library to preload, which this library carries as bytes.

use std::path::Path;

const NAMES: [&str; 2] = ["devices", "sparse"];

fn main() {
    let folder = std::env::var_os("OUT_DIR").expect("cargo names a folder for results");
    for name in NAMES {
        let source = format!("plugin/{name}.c");
        println!("cargo::rerun-if-changed={source}");
        let library = Path::new(&folder).join(name).with_extension("so");
        let mut command = cc::Build::new().opt_level(2).debug(false).warnings(true).get_compiler().to_command();
        command.args(["-shared", "-fPIC", "-Werror", "-s", "-o"]).arg(&library).arg(&source);
        #[expect(clippy::disallowed_methods, reason = "nobody else waits in a build script")]
        let status = command.status().expect("the C compiler starts");
        assert!(status.success(), "the C compiler cannot build {source}: {status}");
    }
}
