//! The sanitizers, and how each is run.

use clap::ValueEnum;
use harness::debian_rust;
use xshell::{Cmd, PushEnv, Shell, cmd};

const SYMBOLIZER: &str = "/usr/bin/llvm-symbolizer-22";

/// For a target that is named, flags don't reach build scripts and macros, which run without the
/// sanitizer.
const TARGET: &str = "x86_64-unknown-linux-gnu";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sanitizer {
    /// Data races
    Thread,
    /// Use after free, out of bounds
    Address,
}

/// A deliberate memory error, and what the sanitizer reports for it.
pub(super) struct Mutant {
    pub(super) name: &'static str,
    pub(super) found_as: &'static str,
}

impl Sanitizer {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Thread => "thread",
            Self::Address => "address",
        }
    }

    /// For every command alike.
    pub(super) fn env(self, sh: &Shell) -> Vec<PushEnv<'_>> {
        let name = self.name();
        let mut env = vec![sh.push_env("CARGO_TARGET_DIR", format!("target/sanitize/{name}"))];
        let flags = format!("-Zsanitizer={name}");
        // Allocations that are too large to be had are tested, too; reports are counted, and the
        // tests go on.
        let options = "allocator_may_return_null=1:exitcode=66";
        match self {
            Self::Thread => {
                env.extend(debian_rust::env(sh));
                let clang = "-Zexternal-clangrt -Clinker=clang-22 -Clink-arg=-fsanitize=thread";
                env.push(sh.push_env("RUSTFLAGS", format!("{flags} {clang}")));
                let suppressed = "testing/sanitizers/src/sanitize/thread.supp";
                let suppressed = sh.current_dir().join(suppressed);
                let suppressed = suppressed.display();
                let options = format!(
                    "{options}:external_symbolizer_path={SYMBOLIZER}:suppressions={suppressed}"
                );
                env.push(sh.push_env("TSAN_OPTIONS", options));
            }
            Self::Address => {
                // The sanitizer is in every toolchain; the flag for it is not stable.
                env.push(sh.push_env("RUSTC_BOOTSTRAP", "1"));
                env.push(sh.push_env("RUSTFLAGS", flags));
                env.push(sh.push_env("ASAN_SYMBOLIZER_PATH", SYMBOLIZER));
                // Leaks can't be looked for under strace, which tests use; `cargo xtask soak`
                // counts what is held.
                env.push(sh.push_env("ASAN_OPTIONS", format!("{options}:detect_leaks=0")));
            }
        }
        env
    }

    pub(super) fn cargo<'sh>(self, sh: &'sh Shell, command: &str) -> Cmd<'sh> {
        match self {
            Self::Thread => {
                let cargo = debian_rust::CARGO;
                cmd!(
                    sh,
                    "{cargo} {command} --locked --target {TARGET} -Zbuild-std"
                )
            }
            Self::Address => cmd!(sh, "cargo {command} --locked --target {TARGET}"),
        }
    }

    pub(super) fn mutants(self) -> &'static [Mutant] {
        match self {
            Self::Thread => &[Mutant {
                name: "race",
                found_as: "WARNING: ThreadSanitizer: data race",
            }],
            Self::Address => &[
                Mutant {
                    name: "use-after-free",
                    found_as: "ERROR: AddressSanitizer: heap-use-after-free",
                },
                Mutant {
                    name: "out-of-bounds",
                    found_as: "ERROR: AddressSanitizer: heap-buffer-overflow",
                },
            ],
        }
    }

    /// What every report of it begins with.
    pub(super) fn report(self) -> &'static str {
        match self {
            Self::Thread => "WARNING: ThreadSanitizer:",
            Self::Address => "ERROR: AddressSanitizer:",
        }
    }
}
