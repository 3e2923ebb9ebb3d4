//! Programs from crates.io that a task runs: used where they are, built where they are not.

use std::path::PathBuf;

use anyhow::Context;
use xshell::{Shell, cmd};

use crate::packages::Install;

/// A program that `cargo install` builds.
pub struct CargoTool {
    /// Of the crate and of the program.
    pub name: &'static str,
    /// What is built where there is none.
    pub version: &'static str,
}

impl CargoTool {
    /// Where the program is. `None` where it is not and may not be built, which was said.
    pub fn ensure(
        &self,
        sh: &Shell,
        install: Install,
        why: &str,
    ) -> anyhow::Result<Option<PathBuf>> {
        let Self { name, version } = self;
        let root = sh.current_dir().join("target/tools");
        let own = root.join("bin").join(name);
        let path = sh.var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).map(|dir| dir.join(name));
        if let Some(program) = places
            .chain([own.clone()])
            .find(|program| program.is_file())
        {
            return Ok(Some(program));
        }
        if !install.allowed() {
            println!("missing for {why}: {name} (without --no-install it is built)");
            return Ok(None);
        }
        println!("building for {why}: {name} {version}");
        // As fast to build as can be: what it does here takes a second, or is others' work.
        let _quick = sh.push_env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
        let _no_lto = sh.push_env("CARGO_PROFILE_RELEASE_LTO", "off");
        let _units = sh.push_env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        cmd!(
            sh,
            "cargo install --quiet --locked --root {root} {name}@{version}"
        )
        .run()
        .with_context(|| format!("cargo install {name}"))?;
        Ok(Some(own))
    }
}
