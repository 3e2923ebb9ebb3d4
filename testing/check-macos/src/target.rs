//! What is compiled for macOS, and how.

pub(crate) const TARGET: &str = "aarch64-apple-darwin";

/// Nothing is run: speed is the compiler's own, not the program's.
pub(crate) const UNOPTIMIZED: [&str; 4] = [
    "--config",
    "profile.dev.opt-level=0",
    // Without any debug information cargo strips executables, with a tool that Debian's rustc comes
    // without.
    "--config",
    "profile.dev.debug=\"line-directives-only\"",
];
