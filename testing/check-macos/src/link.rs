//! Executables for macOS, linked on any system by the linker in the Python package `ziglang`, and
//! checked.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use harness::packages::Install;
use harness::python::{Build, Wheel};
use serde_json::Value;
use xshell::{PushEnv, Shell, cmd};

use crate::TARGET;
use crate::mach_o::{self, HYPERVISOR, MacOs};
use crate::toolchain::Toolchain;

/// A fixed version, so that an upgrade is a reviewed change.
const ZIG: Wheel = Wheel {
    package: "ziglang",
    version: "0.17.1",
    program: "ziglang/zig",
    prints_version: "version",
    builds: &[
        Build {
            os: "linux",
            arch: "x86_64",
            sha256: "ea6cc5d87b033cf0aedfbc8f9549a908cae6c50ac31f1698188fa48a74524b54",
        },
        Build {
            os: "linux",
            arch: "aarch64",
            sha256: "b7c5f02fccd40f89b999ee16a1f5ddced56e6182370f8affe494bcf8a28cf07e",
        },
    ],
};

/// The programs that a selection of packages and features links.
struct Linked {
    /// The arguments of `cargo build`.
    arguments: &'static str,
    /// The oldest macOS that the programs must start on.
    oldest: MacOs,
}

/// What `cargo xtask` builds on a Mac, by the selection and the features of all its commands, and
/// the example of the same features. The demo's guest has more than 64 GiB of addresses, which
/// macOS 13 brought.
const PROGRAMS: Linked = Linked {
    arguments: "--bin xtask --bin fs-matrix --bin demo --example snapshot \
        --features ramsnap-page-reader/serde,ramsnap-page-reader/vm-memory",
    oldest: MacOs(13, 0),
};

/// The programs that must start without the hypervisor framework: they link no backend.
const WITHOUT_HYPERVISOR: [&str; 2] = ["xtask", "fs-matrix"];

/// The least and the most that a user of `hvf-backend` can select.
const SELECTIONS: [Linked; 2] = [
    Linked {
        arguments: "--package ramsnap-hvf-backend --example snapshot",
        oldest: MacOs(11, 0),
    },
    Linked {
        arguments: "--package ramsnap-hvf-backend --example snapshot --all-features",
        oldest: MacOs(26, 0),
    },
];

/// The linker and the C compiler for cargo: crates bring some C.
pub(crate) fn env<'sh>(sh: &'sh Shell, dir: &Path) -> Vec<PushEnv<'sh>> {
    if cfg!(target_os = "macos") {
        return Vec::new();
    }
    vec![
        sh.push_env("CARGO_TARGET_AARCH64_APPLE_DARWIN_LINKER", linker(dir)),
        sh.push_env("CC_aarch64_apple_darwin", compiler(dir)),
        sh.push_env("AR_aarch64_apple_darwin", archiver(dir)),
        // Without it, rustc asks Xcode.
        sh.push_env("SDKROOT", sdk(dir)),
        sh.push_env("ZIG_GLOBAL_CACHE_DIR", dir.join("zig-cache")),
        sh.push_env("ZIG_LOCAL_CACHE_DIR", dir.join("zig-cache")),
    ]
}

fn linker(dir: &Path) -> PathBuf {
    dir.join("link-for-macos.sh")
}

fn compiler(dir: &Path) -> PathBuf {
    dir.join("compile-c-for-macos.sh")
}

fn archiver(dir: &Path) -> PathBuf {
    dir.join("archive-for-macos.sh")
}

fn sdk(dir: &Path) -> PathBuf {
    dir.join("sdk")
}

/// Makes what compiles and links ready, or says what is missing: false.
pub(crate) fn prepare(sh: &Shell, install: Install, dir: &Path) -> anyhow::Result<bool> {
    if cfg!(target_os = "macos") {
        return Ok(true);
    }
    let Some(zig) = ZIG.ensure(sh, install, dir, "check-macos")? else {
        return Ok(false);
    };
    write_sdk(sh, &sdk(dir), framework(sh)?.keys())?;
    write_tools(sh, dir, &zig, oldest_macos(sh)?)?;
    Ok(true)
}

/// Links programs and checks them. With `quick`, those of one selection of features.
pub(crate) fn link(sh: &Shell, toolchain: Toolchain, quick: bool) -> anyhow::Result<()> {
    let since = framework(sh)?;
    let built_for = oldest_macos(sh)?;
    let selections = SELECTIONS.iter().filter(|_| !quick);
    for Linked { arguments, oldest } in std::iter::once(&PROGRAMS).chain(selections) {
        let linked = executables(sh, toolchain, arguments)?;
        ensure!(!linked.is_empty(), "cargo build {arguments} linked nothing");
        for path in linked {
            let name = path.display();
            let program = path.file_name().and_then(OsStr::to_str);
            let hypervisor = !program.is_some_and(|name| WITHOUT_HYPERVISOR.contains(&name));
            let bytes = sh.read_binary_file(&path)?;
            let found = mach_o::check(&bytes, hypervisor.then_some(&since))
                .with_context(|| format!("{name} is no program for macOS"))?;
            ensure!(
                found.built_for == built_for,
                "{name} says that it is for {}, and rustc builds for {built_for}",
                found.built_for
            );
            ensure!(
                found.calls_need <= *oldest,
                "{name} must start on {oldest}, and calls what came with {}",
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

/// The functions of the hypervisor framework and the macOS that each came with, as `applevisor-sys`
/// declares them: Apple's stub of the framework comes with Xcode only.
fn framework(sh: &Shell) -> anyhow::Result<BTreeMap<String, MacOs>> {
    let metadata = cmd!(
        sh,
        "cargo metadata --locked --format-version 1 --filter-platform {TARGET}"
    );
    let metadata: Value = serde_json::from_str(&metadata.quiet().read()?)?;
    let manifest = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "applevisor-sys")
        .and_then(|package| package["manifest_path"].as_str())
        .context("nothing depends on applevisor-sys")?;
    let source = sh.read_file(Path::new(manifest).with_file_name("src/lib.rs"))?;
    let functions = declared(&source);
    ensure!(!functions.is_empty(), "no function found beside {manifest}");
    Ok(functions)
}

/// `pub fn hv_…`, each below the feature that it takes, if it takes one.
fn declared(source: &str) -> BTreeMap<String, MacOs> {
    // The first for Apple silicon.
    const FIRST: MacOs = MacOs(11, 0);
    let mut functions = BTreeMap::new();
    let mut since = FIRST;
    for line in source.lines().map(str::trim) {
        if let Some(version) = line
            .strip_prefix("#[cfg(feature = \"macos-")
            .and_then(|rest| rest.strip_suffix("\")]")?.split_once('-'))
            .and_then(|(major, minor)| Some(MacOs(major.parse().ok()?, minor.parse().ok()?)))
        {
            since = version;
        } else if !line.starts_with("#[") && !line.starts_with("//") {
            if let Some((name, _)) = line
                .strip_prefix("pub fn ")
                .and_then(|rest| rest.split_once('('))
                .filter(|(name, _)| name.starts_with("hv_"))
            {
                functions.insert(name.to_owned(), since);
            }
            since = FIRST;
        }
    }
    functions
}

/// What `LC_BUILD_VERSION` will say.
fn oldest_macos(sh: &Shell) -> anyhow::Result<MacOs> {
    let said = cmd!(sh, "rustc --print deployment-target --target {TARGET}")
        .quiet()
        .read()?;
    said.split_once('=')
        .and_then(|(_, version)| version.split_once('.'))
        .and_then(|(major, minor)| Some(MacOs(major.parse().ok()?, minor.parse().ok()?)))
        .with_context(|| format!("rustc --print deployment-target says {said:?}"))
}

/// Stubs of the two libraries that the linker has none of.
fn write_sdk<'a>(
    sh: &Shell,
    sdk: &Path,
    functions: impl Iterator<Item = &'a String>,
) -> anyhow::Result<()> {
    let symbols: Vec<String> = functions.map(|name| format!("_{name}")).collect();
    let exports = format!(
        "exports:\n  - targets: [ arm64-macos ]\n    symbols: [ {} ]\n",
        symbols.join(", ")
    );
    sh.write_file(
        sdk.join("System/Library/Frameworks/Hypervisor.framework/Hypervisor.tbd"),
        stub(HYPERVISOR, &exports),
    )?;
    // The libc crate asks for it, and nothing of it is called.
    sh.write_file(
        sdk.join("usr/lib/libiconv.tbd"),
        stub("/usr/lib/libiconv.2.dylib", ""),
    )?;
    Ok(())
}

fn stub(name: &str, exports: &str) -> String {
    format!(
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '{name}'\n{exports}...\n"
    )
}

/// `zig cc` goes by its own option where a macOS toolchain goes by `-mmacosx-version-min`,
/// `--target` or `-arch`.
fn write_tools(sh: &Shell, dir: &Path, zig: &Path, oldest: MacOs) -> anyhow::Result<()> {
    let (zig, sdk, MacOs(major, minor)) = (zig.display(), sdk(dir), oldest);
    let sdk = sdk.display();
    let cc = format!("'{zig}' cc -target aarch64-macos.{major}.{minor}");
    let tools = [
        (
            linker(dir),
            format!("exec {cc} -F'{sdk}/System/Library/Frameworks' -L'{sdk}/usr/lib' \"$@\""),
        ),
        (
            compiler(dir),
            format!(
                "for word do\n\
                 shift\n\
                 case $word in\n\
                 --target=* | -mmacosx-version-min=* | -arch | arm64) ;;\n\
                 *) set -- \"$@\" \"$word\" ;;\n\
                 esac\n\
                 done\n\
                 exec {cc} \"$@\""
            ),
        ),
        (archiver(dir), format!("exec '{zig}' ar \"$@\"")),
    ];
    for (path, script) in tools {
        sh.write_file(&path, format!("#!/bin/sh\n{script}\n"))?;
        cmd!(sh, "chmod +x {path}").quiet().run()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_has_the_features_of_the_programs_that_tasks_run() {
        let features = format!("--features {}", harness::FEATURES);
        assert!(PROGRAMS.arguments.ends_with(&features));
    }

    #[test]
    fn a_function_came_with_the_macos_of_the_feature_above_it() {
        let source = "
            #[cfg(feature = \"macos-26-0\")]
            pub enum hv_granule_t {}
            /// Words.
            pub fn hv_vm_create() -> i32;
            /// Words.
            #[cfg(feature = \"macos-12-1\")]
            pub fn hv_vm_allocate(
                len: usize,
            ) -> i32;
            pub fn other();
            pub fn hv_vm_map() -> i32;";
        let found: Vec<_> = declared(source).into_iter().collect();
        assert_eq!(
            found,
            [
                ("hv_vm_allocate".to_owned(), MacOs(12, 1)),
                ("hv_vm_create".to_owned(), MacOs(11, 0)),
                ("hv_vm_map".to_owned(), MacOs(11, 0)),
            ]
        );
    }
}
