//! Debian's Rust toolchain, which comes with the standard library's source: for what the library must be built for.

use xshell::{PushEnv, Shell};

use crate::packages::Package;

/// A compiler, its lints, and the standard library.
pub const PACKAGES: [Package; 4] = [
    Package::new("rustc-web", "/var/lib/dpkg/info/rustc-web.list"),
    Package::new("cargo-web", "/var/lib/dpkg/info/cargo-web.list"),
    Package::new("rust-web-clippy", "/var/lib/dpkg/info/rust-web-clippy.list"),
    Package::new("rust-web-src", "/var/lib/dpkg/info/rust-web-src.list"),
];

/// Its cargo, by the path: another comes first where rustup is.
pub const CARGO: &str = "/usr/bin/cargo";

/// For every command alike.
pub fn env(sh: &Shell) -> [PushEnv<'_>; 4] {
    [
        sh.push_env("CARGO", CARGO),
        sh.push_env("RUSTC", "/usr/bin/rustc"),
        sh.push_env("RUSTDOC", "/usr/bin/rustdoc"),
        // Debian's cargo takes unstable options only when told that it is a bootstrap.
        sh.push_env("RUSTC_BOOTSTRAP", "1"),
    ]
}
