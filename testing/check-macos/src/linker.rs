//! The linker and the C compiler in the Python package `ziglang`, which work on any system.

use std::path::{Path, PathBuf};

use harness::packages::Install;
use harness::python::{Build, Wheel};
use xshell::{PushEnv, Shell, cmd};

use crate::framework::{functions, oldest_macos};
use crate::mach_o::{HYPERVISOR, MacOs};

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
    write_sdk(sh, &sdk(dir), functions(sh)?.keys())?;
    write_tools(sh, dir, &zig, oldest_macos(sh)?)?;
    Ok(true)
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
