//! Restores each image into a new guest, which must be the original at the point in time.

use std::thread;

use anyhow::{Context, anyhow};
use guests::kvm::smp::{self, EachVcpu, Smp, VCPUS};
use guests::ledger::Verdict;
use guests::oracle::Oracle;
use memory_image::Chain;

use super::super::report::Progress;
use super::super::snapshots::joined;
use super::super::verify::{compare, faults};
use super::capture::Capture;

/// The steps of each restored vCPU.
const STEPS: u64 = 1000;

/// The comparisons of all images, in the order in which they were taken.
pub(super) struct Verifier {
    ram: u64,
    /// The ledgers computed without a guest.
    oracles: EachVcpu<Oracle>,
    goals: EachVcpu<u64>,
    pub(super) mismatches: Vec<String>,
    pub(super) steps: u64,
}

impl Verifier {
    pub(super) fn new(ram: u64) -> Self {
        Self {
            ram,
            oracles: std::array::from_fn(|vcpu| Oracle::new(smp::layout(ram), smp::seed(vcpu))),
            goals: [0; VCPUS],
            mismatches: Vec::new(),
            steps: 0,
        }
    }

    /// Restores an image, and records every way in which the guest is not as it should be.
    pub(super) fn verify(&mut self, capture: &Capture, progress: &Progress) -> anyhow::Result<()> {
        let method = capture.report.method;
        progress.phase(format!("restoring the image of {method}"), 0);
        let restored = Smp::new(self.ram)?;
        let chain = Chain::open(&capture.image, guests::ledger::PAGE)?;
        chain.restore_zeroed(&mut &***restored.ram())?;
        let state = chain
            .metadata()
            .context("the image has no state of the vCPUs")?;
        restored.set_states(state)?;
        progress.interrupted()?;

        let mut found = Vec::new();
        if let Some(copy) = &capture.copy {
            found.extend(compare(copy, &**restored.ram(), self.ram, progress)?);
        }
        let begins_at = restored.steps();
        if begins_at != capture.steps {
            found.push(format!(
                "the restored vCPUs are at the steps {begins_at:?}, and were paused at {:?}",
                capture.steps
            ));
        }
        // A ledger that is computed without a guest does not go back.
        for (goal, step) in self.goals.iter_mut().zip(capture.steps) {
            *goal = (step + STEPS).max(*goal);
        }
        progress.phase("the restored guest continues", 0);
        let (ran, expected) = self.expected(|goals| {
            restored.work_until(goals)?;
            restored.check()
        });
        match ran {
            Ok(verdicts) => found.extend(differences(verdicts, expected?)),
            Err(error) => found.push(format!("the restored guest stopped: {error:#}")),
        }
        let done = |(end, start): (&u64, u64)| end.saturating_sub(start);
        self.steps += self.goals.iter().zip(begins_at).map(done).sum::<u64>();
        let of_method = found.into_iter().map(|what| format!("{method}: {what}"));
        self.mismatches.extend(of_method);
        Ok(())
    }

    /// Runs a guest up to the goals, and computes the ledgers there.
    fn expected<T>(
        &mut self,
        run: impl FnOnce(EachVcpu<u64>) -> T,
    ) -> (T, anyhow::Result<EachVcpu<Verdict>>) {
        let goals = self.goals;
        thread::scope(|scope| {
            let [first, second] = &mut self.oracles;
            let first = scope.spawn(move || Ok(first.verdict_at(goals[0])));
            let second = scope.spawn(move || Ok(second.verdict_at(goals[1])));
            let ran = run(goals);
            let (first, second) = (joined(first.join()), joined(second.join()));
            let expected = first.and_then(|first| Ok([first, second?]));
            (
                ran,
                expected.map_err(|error| anyhow!("the ledger was not computed: {error:#}")),
            )
        })
    }
}

/// Returns what the checks of the restored vCPUs found.
fn differences(found: EachVcpu<Verdict>, expected: EachVcpu<Verdict>) -> Vec<String> {
    let mut differences = Vec::new();
    for (vcpu, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        let name = format!("vCPU {vcpu} of the restored");
        differences.extend(faults(&name, found));
        if found.digest != expected.digest {
            differences.push(format!(
                "the digest of {name} guest is {:#018x}, and the ledger computed without a guest has {:#018x}",
                found.digest, expected.digest
            ));
        }
    }
    differences
}
