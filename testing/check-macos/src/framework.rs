//! The functions of the hypervisor framework, and the macOS that programs are for.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;
use xshell::{Shell, cmd};

use crate::mach_o::MacOs;
use crate::target::TARGET;

/// The functions of the hypervisor framework and the macOS that each came with, as `applevisor-sys`
/// declares them: Apple's stub of the framework comes with Xcode only.
pub(crate) fn functions(sh: &Shell) -> anyhow::Result<BTreeMap<String, MacOs>> {
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
pub(crate) fn oldest_macos(sh: &Shell) -> anyhow::Result<MacOs> {
    let said = cmd!(sh, "rustc --print deployment-target --target {TARGET}")
        .quiet()
        .read()?;
    said.split_once('=')
        .and_then(|(_, version)| version.split_once('.'))
        .and_then(|(major, minor)| Some(MacOs(major.parse().ok()?, minor.parse().ok()?)))
        .with_context(|| format!("rustc --print deployment-target printed {said:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
