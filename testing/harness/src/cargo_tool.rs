//! Rust programs that a task runs: those installed are used, others are downloaded or built.

use std::path::{Path, PathBuf};

use anyhow::Context;
use xshell::{Shell, cmd};

use crate::packages::Install;
use crate::python::Wheel;

/// A program from the Rust registry.
#[derive(Debug)]
pub struct CargoTool {
    /// Of the crate and of the program.
    pub name: &'static str,
    /// What is downloaded or built where there is none.
    pub version: &'static str,
    /// Where the program is published without a need to build it.
    pub wheel: Option<Wheel>,
}

impl CargoTool {
    /// Returns where the program is. `None` where it is missing and may not be installed, which is
    /// printed.
    pub fn ensure(
        &self,
        sh: &Shell,
        install: Install,
        why: &str,
    ) -> anyhow::Result<Option<PathBuf>> {
        let Self { name, version, .. } = self;
        let tools = sh.current_dir().join("target/tools");
        let built = tools.join(format!("{name}-{version}"));
        let program = built.join("bin").join(name);
        let path = sh.var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).map(|dir| dir.join(name));
        if let Some(program) = places
            .chain([program.clone()])
            .find(|place| place.is_file())
        {
            return Ok(Some(program));
        }
        if let Some(program) = self.download(sh, install, &tools, why) {
            return Ok(Some(program));
        }
        if !install.allowed() {
            println!("missing for {why}: {name} {version}, built without --no-install");
            return Ok(None);
        }
        println!("building for {why}: {name} {version}");
        // The build takes minutes, and the program's own work seconds.
        let _quick = sh.push_env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
        let _no_lto = sh.push_env("CARGO_PROFILE_RELEASE_LTO", "off");
        let _units = sh.push_env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        cmd!(
            sh,
            "cargo install --quiet --locked --root {built} {name}@{version}"
        )
        .run()
        .with_context(|| format!("cargo install {name}"))?;
        Ok(Some(program))
    }

    /// Downloads the program. Returns `None` if that fails, because the program can still be built.
    fn download(&self, sh: &Shell, install: Install, tools: &Path, why: &str) -> Option<PathBuf> {
        let wheel = self.wheel.as_ref()?;
        wheel
            .ensure(sh, install, tools, why)
            .unwrap_or_else(|error| {
                println!("{error:#}");
                None
            })
    }
}
