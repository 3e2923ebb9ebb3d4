//! `cargo xtask check-macos`: type-check every crate for Apple Silicon, on Linux.

use anyhow::bail;
use xshell::{Shell, cmd};

use crate::packages::{Install, Package};

/// A compiler that comes with the standard library's source, so that it can be checked for a target that is not installed.
const PACKAGES: [Package; 3] = [
    Package::new("rustc-web", "/var/lib/dpkg/info/rustc-web.list"),
    Package::new("cargo-web", "/var/lib/dpkg/info/cargo-web.list"),
    Package::new("rust-web-src", "/var/lib/dpkg/info/rust-web-src.list"),
];

/// Type-check every crate, test and example for aarch64-apple-darwin
///
/// On a Mac this is what `cargo check` does. Elsewhere it takes Debian's packages of a Rust toolchain with the standard library's source.
#[derive(clap::Args)]
pub struct CheckMacos {
    #[command(flatten)]
    pub install: Install,
}

impl CheckMacos {
    pub fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if !self
            .install
            .ensure(sh, &PACKAGES, "check-macos")?
            .is_empty()
        {
            bail!("without these packages nothing can be checked for macOS");
        }
        // Debian's cargo takes unstable options only when told that it is a bootstrap; warnings are errors.
        let _env = [
            sh.push_env("RUSTC", "/usr/bin/rustc"),
            sh.push_env("RUSTC_BOOTSTRAP", "1"),
            sh.push_env("RUSTFLAGS", "-Dwarnings"),
            sh.push_env("CARGO_TARGET_DIR", "target/macos"),
        ];
        let target = "aarch64-apple-darwin";
        // No benchmark runs on a Mac yet: its peers are measured against Linux's own interfaces.
        cmd!(
            sh,
            "/usr/bin/cargo check -Zbuild-std=std,panic_unwind --target {target} --workspace --exclude benches
             --all-targets --all-features --locked"
        )
        .run()?;
        Ok(())
    }
}
