//! Links the unwinder into the library, also for containers without libgcc_s.so.1.

use std::path::PathBuf;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    let folder = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    // The first match for `-lgcc_s`: a linker script that names the static halves instead.
    fs::write(folder.join("libgcc_s.so"), "GROUP ( -lgcc_eh -lgcc -lc )\n")?;
    println!("cargo:rustc-link-search=native={}", folder.display());
    Ok(())
}
