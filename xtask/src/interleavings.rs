//! The loom models of `dirty-bitmap`, `hvf-backend` and `kvm-backend`, and mutants of the protocols
//! that each model must detect.

use anyhow::{Context, bail, ensure};
use xshell::{Shell, cmd};

const LOOM: &str = "--cfg ramsnap_loom";

/// How much of what loom can distinguish is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    /// What a few preemptions reach: seconds.
    Preemptions,
    /// Everything: minutes.
    None,
}

/// A crate with models, and the targets that have them.
#[derive(Debug)]
struct Modeled {
    name: &'static str,
    targets: &'static [&'static str],
    /// What is in the names of the models alone.
    filter: &'static str,
}

const DIRTY_BITMAP: Modeled = Modeled {
    name: "dirty-bitmap",
    targets: &[
        "--test",
        "loom",
        "--test",
        "loom_epochs",
        "--test",
        "loom_tracker",
    ],
    filter: "",
};

const HVF_BACKEND: Modeled = Modeled {
    name: "hvf-backend",
    targets: &["--lib"],
    filter: "interleavings",
};

const KVM_BACKEND: Modeled = Modeled {
    name: "kvm-backend",
    targets: &["--lib"],
    filter: "interleavings",
};

/// One line of a crate, made wrong.
struct Mutant {
    what: &'static str,
    of: Modeled,
    file: &'static str,
    right: &'static str,
    wrong: &'static str,
    /// A model that must fail then.
    model: &'static str,
}

const MUTANTS: [Mutant; 21] = [
    Mutant {
        what: "a marker does not look again after marking",
        of: DIRTY_BITMAP,
        file: "marks.rs",
        right: "        // After a rebuild in between, the mark may have missed the sweep of its table.
        let now = self.generation();",
        wrong: "        let now = generation;",
        model: "a_mark_racing_a_rebuild_to_finer_pages_is_kept",
    },
    Mutant {
        what: "a marker looks again without ordering",
        of: DIRTY_BITMAP,
        file: "marks.rs",
        right: "TableGeneration(self.current.load(Ordering::Acquire))",
        wrong: "TableGeneration(self.current.load(Ordering::Relaxed))",
        model: "a_mark_racing_a_rebuild_to_finer_pages_is_kept",
    },
    Mutant {
        what: "what is published has no count",
        of: DIRTY_BITMAP,
        file: "marks.rs",
        right: "Self(((self.0 >> 8) + 1) << 8 | u64::from(shift))",
        wrong: "Self(u64::from(shift))",
        model: "a_mark_racing_two_rebuilds_is_kept",
    },
    Mutant {
        what: "a page that shows as marked is not marked again",
        of: DIRTY_BITMAP,
        file: "table.rs",
        right: "        let was_clean = self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits;",
        wrong: "        if self.words[word].load(Ordering::Acquire) & bits == bits {
            return false;
        }
        let was_clean = self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits;",
        model: "a_repeated_mark_racing_a_drain_is_kept",
    },
    Mutant {
        what: "the summary is marked before the page",
        of: DIRTY_BITMAP,
        file: "table.rs",
        right: "        let was_clean = self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits;
        set_summary_bit(&self.summary, word, was_clean)",
        wrong: "        set_summary_bit(&self.summary, word, false);
        self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits",
        model: "a_mark_racing_a_drain_is_kept",
    },
    Mutant {
        what: "a fault marks before it unprotects the page",
        of: DIRTY_BITMAP,
        file: "tracker.rs",
        right: "            let unprotected = protection.unprotect(range.clone());",
        wrong: "            self.bitmap.marks.mark_offsets(offsets.clone());
            let unprotected = protection.unprotect(range.clone());
            return unprotected
                .map(|()| range.clone())
                .map_err(|source| FaultError::Unprotect { range, source });",
        model: "a_fault_racing_a_checkpoint_is_kept",
    },
    Mutant {
        what: "a checkpoint protects before it takes the marks",
        of: DIRTY_BITMAP,
        file: "tracker.rs",
        right: "        let epoch =
            Epoch::begin_any_kind(Arc::clone(&self.bitmap)).map_err(CheckpointError::Epoch)?;
        self.protect_taken(epoch.bitmap().runs(), protection)?;",
        wrong: "        self.protect_taken(self.bitmap.runs(), protection)?;
        let epoch =
            Epoch::begin_any_kind(Arc::clone(&self.bitmap)).map_err(CheckpointError::Epoch)?;",
        model: "a_fault_racing_a_checkpoint_is_kept",
    },
    Mutant {
        what: "an epoch adds marks to its own after it has let others at them",
        of: DIRTY_BITMAP,
        file: "epoch.rs",
        right: "        self.taken.marks.add(&extension.marks);
        drop(epochs);",
        wrong: "        drop(epochs);
        self.taken.marks.add(&extension.marks);",
        model: "a_reclaim_racing_a_save_loses_no_mark",
    },
    Mutant {
        what: "a reclaimed epoch is released",
        of: DIRTY_BITMAP,
        file: "epoch.rs",
        right: "        if !epochs.is_open(&self.taken) {
            return Err(EpochReclaimed);
        }
        // Restore",
        wrong: "        // Restore",
        model: "a_reclaim_racing_a_save_loses_no_mark",
    },
    Mutant {
        what: "an epoch whose save commits is reclaimed",
        of: DIRTY_BITMAP,
        file: "epoch.rs",
        right: "        if epochs.committing {",
        wrong: "        if false {",
        model: "a_commit_racing_a_reclaim_loses_no_page",
    },
    Mutant {
        what: "a reclaimed epoch is committed",
        of: DIRTY_BITMAP,
        file: "epoch.rs",
        right: "        if !self.is_open(taken) {
            return Err(EpochReclaimed);
        }
        self.committing = true;",
        wrong: "        self.committing = self.is_open(taken);",
        model: "a_commit_racing_a_reclaim_loses_no_page",
    },
    Mutant {
        what: "an epoch gets a bitmap that one before it has not dropped",
        of: DIRTY_BITMAP,
        file: "epoch.rs",
        right: "Arc::get_mut(bitmap).is_some() && bitmap",
        wrong: "bitmap",
        model: "a_release_racing_the_next_epoch_mixes_no_marks",
    },
    Mutant {
        what: "a vCPU leaves the guest without ordering",
        of: HVF_BACKEND,
        file: "tracker/vcpus.rs",
        right: "self.0.0.fetch_sub(1, Ordering::Release);",
        wrong: "self.0.0.fetch_sub(1, Ordering::Relaxed);",
        model: "tracker::vcpus::interleavings::a_vcpu_and_two_checkpoints_exclude_each_other",
    },
    Mutant {
        what: "a checkpoint lets vCPUs in without ordering",
        of: HVF_BACKEND,
        file: "tracker/vcpus.rs",
        right: "self.0.0.store(0, Ordering::Release);",
        wrong: "self.0.0.store(0, Ordering::Relaxed);",
        model: "tracker::vcpus::interleavings::a_vcpu_and_two_checkpoints_exclude_each_other",
    },
    Mutant {
        what: "a checkpoint stops a guest that another has stopped",
        of: HVF_BACKEND,
        file: "tracker/vcpus.rs",
        right: "                Err(CLOSED) => yield_now(),",
        wrong: "                Err(CLOSED) => return Ok(Stopped(self)),",
        model: "tracker::vcpus::interleavings::checkpoints_of_two_threads_exclude_each_other",
    },
    Mutant {
        what: "a pause counts the vCPUs of each state by a scan of its own",
        of: KVM_BACKEND,
        file: "linux/vcpus/run_states.rs",
        right: "            match state.load(Ordering::Acquire) {
                IDLE => {}
                RUNNING => running += 1,
                _ => pending += 1,
            }",
        wrong: "            running += usize::from(state.load(Ordering::Acquire) == RUNNING);
        }
        for state in &set.states {
            pending += usize::from(matches!(state.load(Ordering::Acquire), PENDING | ADOPTED));",
        model: "linux::vcpus::run_states::interleavings::a_vcpu_against_two_pauses",
    },
    Mutant {
        what: "an idle vCPU enters the guest without the lock",
        of: KVM_BACKEND,
        file: "linux/vcpus/run_states.rs",
        right: "        if self.word.load(Ordering::Relaxed) == PENDING {",
        wrong: "        if self.word.load(Ordering::Relaxed) != ADOPTED {",
        model: "linux::vcpus::run_states::interleavings::a_vcpu_against_two_pauses",
    },
    Mutant {
        what: "a vCPU has completed its I/O without ordering",
        of: KVM_BACKEND,
        file: "linux/vcpus/run_states.rs",
        right: "        self.word.0.store(IDLE, Ordering::Release);",
        wrong: "        self.word.0.store(IDLE, Ordering::Relaxed);",
        model: "linux::vcpus::run_states::interleavings::a_vcpu_against_two_pauses",
    },
    Mutant {
        what: "a pause loads the states without ordering",
        of: KVM_BACKEND,
        file: "linux/vcpus/run_states.rs",
        right: "            match state.load(Ordering::Acquire) {",
        wrong: "            match state.load(Ordering::Relaxed) {",
        model: "linux::vcpus::run_states::interleavings::a_vcpu_against_two_pauses",
    },
    Mutant {
        what: "a vCPU that waits for the end of a pause does not look again",
        of: KVM_BACKEND,
        file: "linux/vcpus/run_states.rs",
        right: "        while set.paused {",
        wrong: "        if set.paused {",
        model: "linux::vcpus::run_states::interleavings::a_vcpu_that_waits_against_the_next_pause",
    },
    Mutant {
        what: "an adopted vCPU completes its I/O without the lock",
        of: KVM_BACKEND,
        file: "linux/vcpus/run_states.rs",
        right: "                let set = self.all.lock_released();
                self.word.0.store(PENDING, Ordering::Relaxed);
                drop(set);",
        wrong: "                self.word.0.store(PENDING, Ordering::Relaxed);",
        model: "linux::vcpus::run_states::interleavings::a_vcpu_adopted_during_a_pause",
    },
];

/// Runs the models and, without a bound, shows that they detect the mutants.
pub(crate) fn run(sh: &Shell, bound: Bound) -> anyhow::Result<()> {
    let _loom = sh.push_env("RUSTFLAGS", LOOM);
    let thorough = match bound {
        Bound::Preemptions => "0",
        Bound::None => "1",
    };
    let _bound = sh.push_env(test_machine::THOROUGH, thorough);
    {
        let _dir = sh.push_env("CARGO_TARGET_DIR", "target/loom");
        for Modeled {
            name,
            targets,
            filter,
        } in [DIRTY_BITMAP, HVF_BACKEND, KVM_BACKEND]
        {
            cmd!(
                sh,
                "cargo test --locked --profile loom --package ramsnap-{name} {targets...} -- {filter}"
            )
            .run()?;
        }
    }
    if bound == Bound::Preemptions {
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
