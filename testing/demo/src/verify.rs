//! Checks that the restored guest is identical to the original, and continues like it.

use std::thread;

use guests::guest::Guest;
use guests::ledger::{Layout, NO_PAGE, PAGE, Verdict};
use page_reader::PageReader;

use super::SPELL;
use super::oracle;
use super::report::Progress;
use super::snapshots::joined;

/// Bytes compared at a time.
const CHUNK: u64 = 1 << 20;

/// What was compared, and every way in which it was not equal.
#[derive(Debug, Default)]
pub(crate) struct Proof {
    pub mismatches: Vec<String>,
    /// Steps that both guests did after the restore.
    pub steps: u64,
    /// The digest that all reached.
    pub digest: u64,
}

/// Compares the RAMs of two guests that are paused at the same instant, byte by byte.
pub(crate) fn compare(
    original: &impl PageReader,
    restored: &impl PageReader,
    ram: u64,
    progress: &Progress,
) -> anyhow::Result<Vec<String>> {
    progress.phase("comparing every byte of both RAMs", ram);
    let (mut ours, mut theirs) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let (mut pages, mut first) = (0_u64, None);
    for start in (0..ram).step_by(CHUNK as usize) {
        let len = CHUNK.min(ram - start) as usize;
        original.read_at(start, &mut ours[..len])?;
        restored.read_at(start, &mut theirs[..len])?;
        if ours[..len] != theirs[..len] {
            let both = ours[..len]
                .chunks(PAGE as usize)
                .zip(theirs[..len].chunks(PAGE as usize));
            for (number, _) in both.enumerate().filter(|(_, (a, b))| a != b) {
                pages += 1;
                first.get_or_insert(start + number as u64 * PAGE);
            }
        }
        progress.at(start)?;
    }
    let differs = |first| {
        format!(
            "{pages} pages of the restored RAM differ from the original's, the first at offset {first:#x}"
        )
    };
    Ok(first.map(differs).into_iter().collect())
}

/// Has both guests go on for as many steps as the original has done, and check their ledgers.
pub(crate) fn go_on(
    original: &mut dyn Guest,
    restored: &mut dyn Guest,
    layout: Layout,
    progress: &Progress,
) -> anyhow::Result<Proof> {
    let done = original.steps();
    let goal = 2 * done;
    progress.phase("both guests go on, and check themselves", 0);
    let (original, restored, oracle) = thread::scope(|scope| {
        let original = scope.spawn(|| finish(original, goal, progress));
        let oracle = scope.spawn(|| oracle::verdict(layout, goal));
        let restored = finish(restored, goal, progress);
        (
            joined(original.join()),
            restored,
            joined(oracle.join().map(Ok)),
        )
    });
    let (original, restored, oracle) = (original?, restored?, oracle?);
    let mut mismatches = Vec::new();
    for (name, verdict) in [("original", original), ("restored", restored)] {
        mismatches.extend(faults(name, verdict));
        if verdict.digest != oracle.digest {
            mismatches.push(format!(
                "the {name} guest's digest is {:#018x}, and the ledger computed without a guest has {:#018x}",
                verdict.digest, oracle.digest
            ));
        }
    }
    Ok(Proof {
        mismatches,
        steps: goal - done,
        digest: oracle.digest,
    })
}

fn finish(guest: &mut dyn Guest, goal: u64, progress: &Progress) -> anyhow::Result<Verdict> {
    while guest.steps() < goal {
        guest.work_until(goal.min(guest.steps() + SPELL))?;
        progress.interrupted()?;
    }
    guest.check()
}

/// What a guest's own check found.
pub(crate) fn faults(name: &str, verdict: Verdict) -> Option<String> {
    match verdict {
        Verdict { faults: 0, .. } => None,
        Verdict {
            faults,
            first_fault: NO_PAGE,
            ..
        } => Some(format!(
            "the {name} guest found {faults} faults, the first that its registers and its RAM are of different steps"
        )),
        Verdict {
            faults,
            first_fault,
            ..
        } => Some(format!(
            "the {name} guest found {faults} stale or torn pages, the first number {first_fault} of its ledger"
        )),
    }
}
