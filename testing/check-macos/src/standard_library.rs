//! The standard library for macOS, built once by a toolchain that comes with its source only.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use harness::debian_rust;
use xshell::{Shell, cmd};

use crate::target::{TARGET, UNOPTIMIZED};

/// `test` is the harness that test targets link.
const BUILD: [&str; 6] = [
    "-Zbuild-std=std,panic_unwind,test",
    // Backtraces take a third of the build, and nothing is run.
    "-Zbuild-std-features=panic-unwind",
    "--config",
    "profile.dev.debug-assertions=false",
    "--config",
    "profile.dev.overflow-checks=false",
];

const MANIFEST: &str = "[package]\nname = \"empty\"\nedition = \"2024\"\n[workspace]\n";

/// Returns a directory for rustc's `--sysroot`. Builds it if `dir` has none of this compiler.
pub(crate) fn sysroot(sh: &Shell, dir: &Path) -> anyhow::Result<PathBuf> {
    let version = cmd!(sh, "/usr/bin/rustc -vV").quiet().read()?;
    let mut key = DefaultHasher::new();
    (version, BUILD, UNOPTIMIZED).hash(&mut key);
    let sysroot = dir.join(format!("sysroot-{:016x}", key.finish()));
    if !sh.path_exists(&sysroot) {
        println!(
            "building the standard library for {TARGET}, once: {}",
            sysroot.display()
        );
        build(sh, dir, &sysroot)?;
    }
    Ok(sysroot)
}

fn build(sh: &Shell, dir: &Path, sysroot: &Path) -> anyhow::Result<()> {
    let own = cmd!(sh, "/usr/bin/rustc --print sysroot").quiet().read()?;
    let source = Path::new(&own).join("lib/rustlib/src/rust/library/std/Cargo.toml");
    ensure!(
        sh.path_exists(&source),
        "this machine can't build the standard library for macOS: {} is missing; install rust-web-src of the version of rustc-web",
        source.display()
    );
    // The sysroot appears under its name when it is complete.
    let unfinished = tempfile::tempdir_in(dir)?;
    let manifest = unfinished.path().join("Cargo.toml");
    sh.write_file(&manifest, MANIFEST)?;
    sh.write_file(unfinished.path().join("src/lib.rs"), "#![no_std]\n")?;
    let _dir = sh.push_env("CARGO_TARGET_DIR", unfinished.path().join("target"));
    let _flags = sh.push_env("CARGO_ENCODED_RUSTFLAGS", "");
    let cargo = debian_rust::CARGO;
    cmd!(
        sh,
        "{cargo} build --manifest-path {manifest} --target {TARGET}"
    )
    .args(UNOPTIMIZED)
    .args(BUILD)
    .run()
    .context("the standard library for macOS can't be built with this toolchain")?;

    let new = unfinished.path().join("sysroot");
    let libraries = sh.create_dir(new.join("lib/rustlib").join(TARGET).join("lib"))?;
    let built = unfinished.path().join("target").join(TARGET);
    for file in sh.read_dir(built.join("debug/deps"))? {
        let name = file.file_name().unwrap_or_default();
        if file.extension().is_some_and(|end| end == "rlib")
            && !name.to_string_lossy().starts_with("libempty-")
        {
            std::fs::rename(&file, libraries.join(name))?;
        }
    }
    std::fs::rename(&new, sysroot)?;
    Ok(())
}
