//! Executables for macOS, linked on any system and checked.

use std::ffi::OsStr;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use serde_json::Value;
use xshell::Shell;

use crate::framework::{functions, oldest_macos};
use crate::mach_o::{self, MacOs};
use crate::toolchain::Toolchain;

/// The programs that a selection of packages and features links.
struct Linked {
    /// The arguments of `cargo build`.
    arguments: &'static str,
    /// The oldest macOS that the programs must start on.
    oldest: MacOs,
}

/// Examples with the fewest features. They link every library with code for macOS but
/// `lazy-restore`. hvf-backend looks up the functions of newer systems at run time, so the programs
/// start on the oldest.
const EXAMPLES: Linked = Linked {
    arguments: "--package ramsnap-hvf-backend --example resume --example selftest",
    oldest: MacOs(11, 0),
};

/// The programs that must start without the hypervisor framework: they link no backend.
const WITHOUT_HYPERVISOR: [&str; 3] = ["xtask", "fs-matrix", "ramsnap"];

/// The tool and the programs of `cargo xtask`, and the most that a user of `hvf-backend` can
/// select.
const OTHERS: [Linked; 2] = [
    Linked {
        arguments: "--bin xtask --bin fs-matrix --bin demo --bin ramsnap --example snapshot \
            --features ramsnap-page-reader/serde,ramsnap-page-reader/vm-memory",
        oldest: MacOs(11, 0),
    },
    Linked {
        arguments: "--package ramsnap-hvf-backend --example snapshot --example own_memory \
            --example resume --example selftest --all-features",
        oldest: MacOs(11, 0),
    },
];

/// Links programs and checks them. With `quick`, only [`EXAMPLES`].
pub(crate) fn link(sh: &Shell, toolchain: Toolchain, quick: bool) -> anyhow::Result<()> {
    let since = functions(sh)?;
    let built_for = oldest_macos(sh)?;
    let others = OTHERS.iter().filter(|_| !quick);
    for Linked { arguments, oldest } in std::iter::once(&EXAMPLES).chain(others) {
        let linked = executables(sh, toolchain, arguments)?;
        ensure!(!linked.is_empty(), "cargo build {arguments} linked nothing");
        for path in linked {
            let name = path.display();
            let program = path.file_name().and_then(OsStr::to_str);
            let hypervisor = !program.is_some_and(|name| WITHOUT_HYPERVISOR.contains(&name));
            let bytes = sh.read_binary_file(&path)?;
            let found = mach_o::check(&bytes, hypervisor.then_some(&since))
                .with_context(|| format!("{name} is not a program for macOS"))?;
            ensure!(
                found.built_for == built_for,
                "{name} is built for {}, but rustc builds for {built_for}",
                found.built_for
            );
            ensure!(
                found.calls_need <= *oldest,
                "{name} must run on {oldest}, but calls functions that require {}",
                found.calls_need
            );
            println!(
                "{name}: an executable for arm64, {} functions of the hypervisor framework, all in {oldest}; signed ad hoc (the entitlement \
                 is added by cargo's runner on the Mac)",
                found.calls
            );
        }
    }
    Ok(())
}

/// Builds, and returns the paths of what came out.
fn executables(sh: &Shell, toolchain: Toolchain, what: &str) -> anyhow::Result<Vec<PathBuf>> {
    let what = what.split(' ');
    let messages = toolchain
        .cargo(sh, "build")
        .args(["--locked", "--message-format=json-render-diagnostics"])
        .args(what)
        .read()?;
    let mut paths = Vec::new();
    for message in messages.lines() {
        let message: Value = serde_json::from_str(message)?;
        if let Some(path) = message["executable"].as_str() {
            paths.push(path.into());
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linked_crates_have_the_features_of_the_task_programs() {
        let features = format!("--features {}", harness::FEATURES);
        assert!(OTHERS[0].arguments.ends_with(&features));
    }
}
