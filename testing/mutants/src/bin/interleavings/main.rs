//! Runs the loom models of `dirty-bitmap`, `hvf-backend` and `kvm-backend`, and makes mutants of
//! their protocols that the models must detect.
//!
//! Run it by `cargo xtask ci interleavings` and `cargo xtask prove interleavings`.

mod mutants;

use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use harness::interrupt::Interrupt;
use xshell::{Shell, cmd};

use mutants::{CRATES, MUTANTS, Modeled, Mutant};

const LOOM: &str = "--cfg ramsnap_loom";

/// Run the loom models, and check that they detect mutants
#[derive(Parser)]
struct Interleavings {
    /// Only what two preemptions reach, and no mutants: seconds instead of minutes
    #[arg(long)]
    bounded: bool,
}

fn main() -> ExitCode {
    let interleavings = Interleavings::parse();
    harness::run(|sh| {
        let _interrupt = Interrupt::pass_on()?;
        run(sh, interleavings.bounded)
    })
}

/// Runs the models and, without a bound, shows that they detect the mutants.
fn run(sh: &Shell, bounded: bool) -> anyhow::Result<()> {
    let _loom = sh.push_env("RUSTFLAGS", LOOM);
    let thorough = if bounded { "0" } else { "1" };
    let _bound = sh.push_env(test_machine::THOROUGH, thorough);
    {
        let _dir = sh.push_env("CARGO_TARGET_DIR", "target/loom");
        for Modeled {
            name,
            targets,
            filter,
        } in CRATES
        {
            cmd!(
                sh,
                "cargo test --locked --profile loom --package ramsnap-{name} {targets...} -- {filter}"
            )
            .run()?;
        }
    }
    if bounded {
        return Ok(());
    }
    let copy = Copy::make(sh)?;
    for mutant in &MUTANTS {
        copy.kill(mutant)
            .with_context(|| format!("a mutant of {}: {}", mutant.file, mutant.what))?;
        println!("mutant found by {}: {}", mutant.model, mutant.what);
    }
    Ok(())
}

/// The crates, in a workspace of their own, in which the mutants are made.
struct Copy<'a> {
    sh: &'a Shell,
    /// Given back by dropping.
    _dir: xshell::PushDir<'a>,
}

impl<'a> Copy<'a> {
    fn make(sh: &'a Shell) -> anyhow::Result<Self> {
        let to = "target/loom/mutants";
        sh.remove_path(to)?;
        sh.create_dir(to)?;
        // Also the documents that the crates include, and the crates that their tests use.
        cmd!(sh, "cp -R crates docs testing {to}/").quiet().run()?;
        sh.copy_file("Cargo.lock", to)?;
        let manifest = sh.read_file("Cargo.toml")?;
        let manifest = manifest.lines().map(|line| match line {
            line if line.starts_with("members = ") => "members = [\"crates/*\"]\n".into(),
            line if line.starts_with("default-members = ") => String::new(),
            line => format!("{line}\n"),
        });
        let manifest: String = manifest.collect();
        sh.write_file(format!("{to}/Cargo.toml"), manifest)?;
        Ok(Self {
            sh,
            _dir: sh.push_dir(to),
        })
    }

    /// Has the mutant's model fail, and nothing else stop it.
    fn kill(&self, mutant: &Mutant) -> anyhow::Result<()> {
        let (sh, model) = (self.sh, mutant.model);
        let Modeled { name, targets, .. } = mutant.of;
        let file = format!("crates/{name}/src/{}", mutant.file);
        let right = sh.read_file(&file)?;
        ensure!(
            right.matches(mutant.right).count() == 1,
            "the line to change does not occur exactly once"
        );
        sh.write_file(&file, right.replace(mutant.right, mutant.wrong))?;
        let _dir = sh.push_env("CARGO_TARGET_DIR", "..");
        let test = || {
            cmd!(
                sh,
                "cargo test --quiet --profile loom --package ramsnap-{name} {targets...}"
            )
        };
        test()
            .arg("--no-run")
            .quiet()
            .ignore_stderr()
            .run()
            .context("it does not build")?;
        let survived = test()
            .args(["--no-fail-fast", "--", "--exact", model])
            .quiet()
            .ignore_status()
            .ignore_stderr()
            .read()?;
        sh.write_file(&file, right)?;
        // One test of that name, in one of the targets.
        if !survived.contains("0 passed; 1 failed") {
            bail!("{model} does not find it:\n{survived}");
        }
        Ok(())
    }
}
