//! `cargo xtask check-macos`: type-check every crate for Apple Silicon, also on Linux.

use anyhow::bail;
use xshell::{Shell, cmd};

use crate::packages::{Install, Package};

const TARGET: &str = "aarch64-apple-darwin";

/// A compiler that comes with the standard library's source, so that it can be checked for a target that is not installed.
const PACKAGES: [Package; 3] = [
    Package::new("rustc-web", "/var/lib/dpkg/info/rustc-web.list"),
    Package::new("cargo-web", "/var/lib/dpkg/info/cargo-web.list"),
    Package::new("rust-web-src", "/var/lib/dpkg/info/rust-web-src.list"),
];

/// Type-check every crate, test and example for aarch64-apple-darwin
///
/// It takes the target in this toolchain (`rustup target add aarch64-apple-darwin`), or as root Debian's packages of a Rust
/// toolchain with the standard library's source.
#[derive(clap::Args)]
pub struct CheckMacos {
    #[command(flatten)]
    pub install: Install,
}

impl CheckMacos {
    pub fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if !self.check(sh)? {
            bail!("nothing can be checked for macOS: run `rustup target add {TARGET}` first");
        }
        Ok(())
    }

    /// Checks, or says that this machine can't: false.
    pub fn check(self, sh: &Shell) -> anyhow::Result<bool> {
        // Warnings are errors.
        let _env = [
            sh.push_env("RUSTFLAGS", "-Dwarnings"),
            sh.push_env("CARGO_TARGET_DIR", "target/macos"),
        ];
        // No benchmark runs on a Mac yet: its peers are measured against Linux's own interfaces.
        let what = "--workspace --exclude benches --all-targets --all-features --locked".split(' ');
        if has_target(sh)? {
            cmd!(sh, "cargo check --target {TARGET} {what...}").run()?;
            return Ok(true);
        }
        match self.install.ensure(sh, &PACKAGES, "check-macos") {
            Ok(missing) if missing.is_empty() => {}
            Ok(_) => return Ok(false),
            Err(error) => {
                // Debian has them, Ubuntu has not.
                println!("{error:#}");
                return Ok(false);
            }
        }
        // Debian's cargo takes unstable options only when told that it is a bootstrap.
        let _debian = [
            sh.push_env("RUSTC", "/usr/bin/rustc"),
            sh.push_env("RUSTC_BOOTSTRAP", "1"),
        ];
        cmd!(
            sh,
            "/usr/bin/cargo check -Zbuild-std=std,panic_unwind --target {TARGET} {what...}"
        )
        .run()?;
        Ok(true)
    }
}

/// Whether this toolchain has the standard library for macOS.
fn has_target(sh: &Shell) -> anyhow::Result<bool> {
    let libraries = cmd!(sh, "rustc --print target-libdir --target {TARGET}").quiet();
    Ok(sh.path_exists(libraries.read()?))
}
