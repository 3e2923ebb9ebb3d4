//! `cargo xtask test`: everything that must hold before a change goes in.

mod interleavings;

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use test_machine::{Need, REQUIRE};
use xshell::{Shell, cmd};

use crate::cargo_tool::CARGO_DENY;
use crate::check_macos::CheckMacos;
use crate::fuzz::Fuzz;
use crate::packages::{Install, Package};

/// What the tests use beside the Rust toolchain.
const PACKAGES: [Package; 9] = [
    Package::new("strace", "strace"),
    Package::new("xfsprogs", "mkfs.xfs"),
    Package::new("btrfs-progs", "mkfs.btrfs"),
    Package::new("exfatprogs", "mkfs.exfat"),
    Package::new("exfat-fuse", "mount.exfat-fuse"),
    Package::new("llvm", "llvm-mc"),
    Package::new("qemu-system-arm", "qemu-system-aarch64"),
    Package::new("qemu-system-x86", "qemu-system-x86_64"),
    Package::new("qemu-system-common", "qemu-storage-daemon"),
];

/// Formatting, lints, docs, all tests, the models, the demo: everything that must hold
///
/// As root on Debian it installs what the tests use, and says so. What this machine lacks nevertheless is said before and by every test that
/// is not run for it; with CI=true in the environment, or MEMSNAP_REQUIRE=all, such a test fails.
#[derive(clap::Args)]
pub struct Test {
    #[command(flatten)]
    install: Install,
    /// Only the steps of these names, as the list at the end has them: "interleavings", say
    #[arg(long, value_name = "STEP")]
    only: Vec<String>,
}

impl Test {
    pub fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let ci = sh.var_os("CI").is_some_and(|ci| ci == "true");
        if ci && sh.var_os(REQUIRE).is_none() {
            sh.set_var(REQUIRE, "all");
        }
        self.install.ensure(sh, &PACKAGES, "the tests")?;
        for need in Need::ALL {
            let met = if need.is_met() {
                "yes"
            } else {
                "NO: tests that need it say NOT RUN"
            };
            println!("this machine has {need}: {met}");
        }

        let steps: [(&str, &dyn Fn() -> anyhow::Result<()>); 13] = [
            ("formatting", &|| {
                cmd!(sh, "cargo fmt --all --check").run()?;
                Ok(cmd!(sh, "cargo fmt --manifest-path fuzz/Cargo.toml --check").run()?)
            }),
            ("lints", &|| {
                Ok(cmd!(
                    sh,
                    "cargo clippy --locked --workspace --all-targets --all-features -- -D warnings"
                )
                .run()?)
            }),
            ("documentation", &|| documentation(sh)),
            ("dependencies", &|| dependencies(sh, self.install, ci)),
            ("the oldest compiler", &|| oldest_compiler(sh, ci)),
            ("each crate alone", &|| each_crate_alone(sh)),
            // Before the tests: one of them sees what it finds of code that is broken.
            ("macOS", &|| macos(sh, self.install, ci)),
            ("tests", &|| {
                Ok(cmd!(
                    sh,
                    "cargo test --locked --workspace --all-features --no-fail-fast"
                )
                .run()?)
            }),
            ("benchmarks, each once", &|| {
                // As the tests are built, not once more with all that they use optimised: nothing is timed.
                Ok(cmd!(
                    sh,
                    "cargo test --locked --package benches --benches -- --test"
                )
                .run()?)
            }),
            ("interleavings", &|| interleavings::run(sh)),
            ("fuzzing, for a moment", &|| fuzzing(sh, self.install)),
            ("the demo", &|| demos(sh)),
            ("a guest in QEMU", &|| guest_in_qemu(sh, ci)),
        ];
        let names: Vec<&str> = steps.iter().map(|(name, _)| *name).collect();
        if let Some(unknown) = self
            .only
            .iter()
            .find(|name| !names.contains(&name.as_str()))
        {
            bail!(
                "no step is called {unknown}; there are: {}",
                names.join(", ")
            );
        }
        let wanted = |name: &str| self.only.is_empty() || self.only.iter().any(|only| only == name);
        let mut times = Vec::new();
        for (name, run) in steps.into_iter().filter(|(name, _)| wanted(name)) {
            println!("\n== {name}");
            let start = Instant::now();
            run().with_context(|| format!("{name} failed"))?;
            times.push((name, start.elapsed()));
        }

        println!("\nall of it passed:");
        for (name, time) in times {
            println!("  {:>4} s  {name}", time.as_secs());
        }
        Ok(())
    }
}

fn documentation(sh: &Shell) -> anyhow::Result<()> {
    let _strict = sh.push_env("RUSTDOCFLAGS", "-D warnings");
    Ok(cmd!(
        sh,
        "cargo doc --locked --workspace --all-features --no-deps"
    )
    .run()?)
}

/// Licences, bans and sources, as deny.toml has them.
fn dependencies(sh: &Shell, install: Install, ci: bool) -> anyhow::Result<()> {
    match CARGO_DENY.ensure(sh, install, "the dependencies")? {
        Some(deny) => Ok(cmd!(sh, "{deny} check licenses bans sources").run()?),
        None if ci => bail!("CI demands cargo-deny"),
        None => {
            println!("NOT RUN: there is no cargo-deny");
            Ok(())
        }
    }
}

/// Builds with the compiler that `rust-version` promises.
fn oldest_compiler(sh: &Shell, ci: bool) -> anyhow::Result<()> {
    let manifest = sh.read_file("Cargo.toml")?;
    let oldest = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = \"")?.strip_suffix('"'))
        .context("Cargo.toml states no rust-version")?;
    let this = cmd!(sh, "rustc --version").quiet().read()?;
    if this.starts_with(&format!("rustc {oldest}.")) {
        println!(
            "{this} is the oldest compiler promised, {oldest}: everything else here is built with it"
        );
        return Ok(());
    }
    let toolchain = format!("{oldest}.0");
    if cmd!(sh, "rustup run {toolchain} rustc --version")
        .quiet()
        .ignore_stderr()
        .read()
        .is_err()
    {
        let lacking = format!("rustup has no toolchain {toolchain}, and this is {this}");
        if ci {
            bail!(lacking);
        }
        println!("NOT RUN: {lacking}");
        return Ok(());
    }
    let _dir = sh.push_env("CARGO_TARGET_DIR", "target/oldest");
    Ok(cmd!(
        sh,
        "rustup run {toolchain} cargo check --locked --workspace --all-targets --all-features"
    )
    .run()?)
}

/// In a workspace, a crate may lean on features that another one turns on.
fn each_crate_alone(sh: &Shell) -> anyhow::Result<()> {
    for dir in sh.read_dir("crates")? {
        let name = dir.file_name().context("a crate's directory has a name")?;
        cmd!(
            sh,
            "cargo check --locked --package {name} --no-default-features"
        )
        .run()?;
    }
    Ok(())
}

fn macos(sh: &Shell, install: Install, ci: bool) -> anyhow::Result<()> {
    let check = CheckMacos {
        install,
        manifest_path: None,
    };
    if ci {
        return check.run(sh);
    }
    check.check(sh)?;
    Ok(())
}

fn fuzzing(sh: &Shell, install: Install) -> anyhow::Result<()> {
    if cfg!(not(all(target_os = "linux", target_arch = "x86_64"))) {
        println!("NOT RUN: fuzzing is for Linux on x86-64");
        return Ok(());
    }
    Fuzz::smoke(install, Duration::from_secs(5)).run(sh)
}

/// The best guest that this machine has, small and, larger, on both sides of the MMIO gap; then the guests for machines that
/// have no better.
fn demos(sh: &Shell) -> anyhow::Result<()> {
    cmd!(sh, "cargo xtask demo").run()?;
    cmd!(sh, "cargo xtask demo --ram 4G --rounds 2").run()?;
    if Need::Userfaultfd.is_met() {
        cmd!(
            sh,
            "cargo xtask demo --guest userfaultfd --ram 64M --rounds 2"
        )
        .run()?;
    }
    cmd!(sh, "cargo xtask demo --guest mprotect --ram 64M --rounds 2").run()?;
    Ok(())
}

fn guest_in_qemu(sh: &Shell, ci: bool) -> anyhow::Result<()> {
    let need = Need::LinuxGuest;
    if need.is_met() {
        return Ok(cmd!(sh, "cargo xtask qemu-e2e").run()?);
    }
    let lacking = format!("this machine has no {need}: that takes QEMU, and Debian for x86-64");
    if ci {
        bail!(lacking);
    }
    println!("NOT RUN: {lacking}");
    Ok(())
}
