//! Builds CRIU's plugin, which the library carries as bytes.

use std::path::Path;

const SOURCE: &str = "plugin/devices.c";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    let folder = std::env::var_os("OUT_DIR").expect("cargo names a folder for results");
    let library = Path::new(&folder).join("devices.so");
    let mut command = cc::Build::new().opt_level(2).debug(false).warnings(true).get_compiler().to_command();
    command.args(["-shared", "-fPIC", "-Werror", "-s", "-o"]).arg(&library).arg(SOURCE);
    let status = command.status().expect("the C compiler starts");
    assert!(status.success(), "the C compiler cannot build {SOURCE}: {status}");
}
