//! Debian's Rust toolchain, with the standard library's source for targets it must be built for.

use crate::packages::Package;
use xshell::{PushEnv, Shell};

/// The oldest compiler of the tests and tools: `rust-version` in their Cargo.toml.
pub const OLDEST_RUST: &str = env!("CARGO_PKG_RUST_VERSION");

/// A compiler, its lints, and the standard library: all of one version, which is at least the
/// workspace's `rust-version`.
pub const PACKAGES: [Package; 4] = [
    package("rustc-web", "/var/lib/dpkg/info/rustc-web.list"),
    package("cargo-web", "/var/lib/dpkg/info/cargo-web.list"),
    package("rust-web-clippy", "/var/lib/dpkg/info/rust-web-clippy.list"),
    package("rust-web-src", "/var/lib/dpkg/info/rust-web-src.list"),
];

const fn package(name: &'static str, shows: &'static str) -> Package {
    Package::new(name, shows).of_family("rust", OLDEST_RUST)
}

/// Its cargo, by the path: another comes first where rustup is.
pub const CARGO: &str = "/usr/bin/cargo";

/// For every command alike.
pub fn env(sh: &Shell) -> [PushEnv<'_>; 4] {
    [
        sh.push_env("CARGO", CARGO),
        sh.push_env("RUSTC", "/usr/bin/rustc"),
        sh.push_env("RUSTDOC", "/usr/bin/rustdoc"),
        // Debian's cargo takes unstable options only as a bootstrap.
        sh.push_env("RUSTC_BOOTSTRAP", "1"),
    ]
}
