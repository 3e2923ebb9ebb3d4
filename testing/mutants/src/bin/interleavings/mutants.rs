//! The crates that have models, and mutants of their protocols.

/// A crate with models, and the targets that have them.
#[derive(Debug)]
pub(crate) struct Modeled {
    pub(crate) name: &'static str,
    pub(crate) targets: &'static [&'static str],
    /// What is in the names of the models alone.
    pub(crate) filter: &'static str,
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

const LIVE_SNAPSHOT: Modeled = Modeled {
    name: "live-snapshot",
    targets: &["--lib"],
    filter: "interleavings",
};

pub(crate) const CRATES: [Modeled; 4] = [DIRTY_BITMAP, HVF_BACKEND, KVM_BACKEND, LIVE_SNAPSHOT];

/// One line of a crate, made wrong.
pub(crate) struct Mutant {
    pub(crate) what: &'static str,
    pub(crate) of: Modeled,
    pub(crate) file: &'static str,
    pub(crate) right: &'static str,
    pub(crate) wrong: &'static str,
    /// A model that must fail then.
    pub(crate) model: &'static str,
}

pub(crate) const MUTANTS: [Mutant; 27] = [
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
    Mutant {
        what: "a write does not wait for the copy of its page",
        of: LIVE_SNAPSHOT,
        file: "capture.rs",
        right: "                PageState::Copying => self.wait_for_copy(page),
                PageState::Pending => {",
        wrong: "                PageState::Copying => return,
                PageState::Pending => {",
        model: "capture::interleavings::a_read_racing_a_write_has_the_old_bytes",
    },
    Mutant {
        what: "a page is in the pool before its copy is",
        of: LIVE_SNAPSHOT,
        file: "capture.rs",
        right: "                    self.pool.put(page, offset / self.chunk_size(), buffer);
                    self.end_copies(page..page + 1, |_| PageState::Pooled);",
        wrong: "                    self.end_copies(page..page + 1, |_| PageState::Pooled);
                    self.pool.put(page, offset / self.chunk_size(), buffer);",
        model: "capture::interleavings::a_read_racing_a_write_has_the_old_bytes",
    },
    Mutant {
        what: "the end of a copy wakes no thread",
        of: LIVE_SNAPSHOT,
        file: "capture.rs",
        right: "            self.copied.notify_all();",
        wrong: "",
        model: "capture::interleavings::a_read_racing_a_write_has_the_old_bytes",
    },
    Mutant {
        what: "a page is free after its first part was read",
        of: LIVE_SNAPSHOT,
        file: "capture.rs",
        right: "            match end >= (page + 1) * self.page_size {",
        wrong: "            match end > page * self.page_size {",
        model: "capture::interleavings::a_page_that_is_read_in_parts_has_the_old_bytes",
    },
    Mutant {
        what: "a page that leaves the pool wakes no thread",
        of: LIVE_SNAPSHOT,
        file: "pool.rs",
        right: "            drop(state);
            self.freed.notify_one();
        }
        true",
        wrong: "        }
        true",
        model: "capture::interleavings::a_write_that_waits_for_the_pool_continues_after_reads",
    },
    Mutant {
        what: "the end of a capture wakes no thread",
        of: LIVE_SNAPSHOT,
        file: "pool.rs",
        right: "        drop(state);
        self.freed.notify_all();",
        wrong: "        drop(state);",
        model: "capture::interleavings::a_write_that_waits_for_the_pool_continues_after_the_end",
    },
];
