//! The models of `dirty-bitmap` under loom, and that they can fail: each step of the protocols, left out or out of order, is found by the
//! model named for it.

use anyhow::{Context, bail, ensure};
use xshell::{Shell, cmd};

const LOOM: &str = "--cfg memsnap_loom";

/// One line of the crate, made wrong.
struct Mutant {
    what: &'static str,
    file: &'static str,
    right: &'static str,
    wrong: &'static str,
    /// A model that must fail then.
    model: &'static str,
}

const MUTANTS: [Mutant; 7] = [
    Mutant {
        what: "a marker does not look again after marking",
        file: "bitmap.rs",
        right: "        // Rebuilt since: the mark may have come after the sweep of the table it went to.
        let now = self.published();",
        wrong: "        let now = published;",
        model: "a_mark_against_a_rebuild_to_finer_pages",
    },
    Mutant {
        what: "a marker looks again without ordering",
        file: "bitmap.rs",
        right: "Published(self.current.load(Ordering::Acquire))",
        wrong: "Published(self.current.load(Ordering::Relaxed))",
        model: "a_mark_against_a_rebuild_to_finer_pages",
    },
    Mutant {
        what: "what is published has no count",
        file: "bitmap.rs",
        right: "Self(((self.0 >> 8) + 1) << 8 | u64::from(shift))",
        wrong: "Self(u64::from(shift))",
        model: "a_mark_against_a_rebuild_there_and_back_again",
    },
    Mutant {
        what: "a page that shows as marked is not marked again",
        file: "table.rs",
        right: "        let was_clean = self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits;",
        wrong: "        if self.words[word].load(Ordering::Acquire) & bits == bits {
            return false;
        }
        let was_clean = self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits;",
        model: "a_page_that_is_already_marked_is_written_again_against_a_drain",
    },
    Mutant {
        what: "the summary is marked before the page",
        file: "table.rs",
        right: "        let was_clean = self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits;
        name(&self.summary, word, was_clean)",
        wrong: "        name(&self.summary, word, false);
        self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits",
        model: "a_mark_against_a_drain",
    },
    Mutant {
        what: "a fault marks before it lifts the protection",
        file: "tracker.rs",
        right: "            let lifted = protection.lift(range.clone());",
        wrong: "            self.bitmap
                .mark_offsets(range.start - start..range.end - start);
            let lifted = protection.lift(range.clone());
            return lifted
                .map(|()| range.clone())
                .map_err(|source| FaultError::Lift { range, source });",
        model: "a_fault_against_a_checkpoint",
    },
    Mutant {
        what: "a checkpoint protects before it takes the marks",
        file: "tracker.rs",
        right:
            "        let epoch = Epoch::begin(Arc::clone(&self.bitmap)).map_err(ArmError::Epoch)?;
        self.end_interval(epoch.bitmap(), protection)?;",
        wrong: "        self.end_interval(&self.bitmap, protection)?;
        let epoch = Epoch::begin(Arc::clone(&self.bitmap)).map_err(ArmError::Epoch)?;",
        model: "a_fault_against_a_checkpoint",
    },
];

pub fn run(sh: &Shell) -> anyhow::Result<()> {
    let _loom = sh.push_env("RUSTFLAGS", LOOM);
    {
        let _dir = sh.push_env("CARGO_TARGET_DIR", "target/loom");
        cmd!(
            sh,
            "cargo test --locked --release --package dirty-bitmap --test loom --test loom_tracker"
        )
        .run()?;
    }
    let copy = Copy::make(sh)?;
    for mutant in &MUTANTS {
        copy.kill(mutant)
            .with_context(|| format!("a mutant of {}: {}", mutant.file, mutant.what))?;
        println!("mutant found by {}: {}", mutant.model, mutant.what);
    }
    Ok(())
}

/// The crate, in a workspace of its own, to be spoilt.
struct Copy<'a> {
    sh: &'a Shell,
    /// Given back by dropping.
    _dir: xshell::PushDir<'a>,
}

impl<'a> Copy<'a> {
    fn make(sh: &'a Shell) -> anyhow::Result<Self> {
        let to = "target/loom/mutants";
        sh.remove_path(to)?;
        sh.create_dir(format!("{to}/crates"))?;
        cmd!(sh, "cp -R crates/dirty-bitmap {to}/crates/")
            .quiet()
            .run()?;
        sh.copy_file("Cargo.lock", to)?;
        let manifest = sh.read_file("Cargo.toml")?;
        let members = r#"members = ["crates/*", "xtask", "benches"]"#;
        ensure!(manifest.contains(members), "Cargo.toml has other members");
        let manifest = manifest.replace(members, r#"members = ["crates/*"]"#);
        sh.write_file(format!("{to}/Cargo.toml"), manifest)?;
        Ok(Self {
            sh,
            _dir: sh.push_dir(to),
        })
    }

    /// Has the mutant's model fail, and nothing else stop it.
    fn kill(&self, mutant: &Mutant) -> anyhow::Result<()> {
        let (sh, model) = (self.sh, mutant.model);
        let file = format!("crates/dirty-bitmap/src/{}", mutant.file);
        let right = sh.read_file(&file)?;
        ensure!(
            right.matches(mutant.right).count() == 1,
            "the line to spoil is not there, or not once"
        );
        sh.write_file(&file, right.replace(mutant.right, mutant.wrong))?;
        let _dir = sh.push_env("CARGO_TARGET_DIR", "..");
        let test = "--quiet --release --package dirty-bitmap --test loom --test loom_tracker";
        let test = || test.split(' ');
        let build = test();
        cmd!(sh, "cargo test {build...} --no-run")
            .quiet()
            .ignore_stderr()
            .run()
            .context("it does not build")?;
        let test = test();
        let survived = cmd!(sh, "cargo test {test...} --no-fail-fast -- --exact {model}")
            .quiet()
            .ignore_status()
            .ignore_stderr()
            .read()?;
        sh.write_file(&file, right)?;
        // One test of that name, in one of the two files.
        if !survived.contains("0 passed; 1 failed") {
            bail!("{model} does not find it:\n{survived}");
        }
        Ok(())
    }
}
