//! A snapshot of the running guest by one method.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use guests::kvm::smp::{EachVcpu, Running, Smp};
use live_snapshot::{LiveSnapshot, Method, Report, UffdTracker};
use memory_writer::{CancelToken, Layout, MemoryWriter};
use page_reader::PageReader;

use super::super::report::Progress;
use super::rate::{Sampler, Samples};
use super::{COPIED, Plan};

/// A snapshot by one method, and what was seen of the guest meanwhile.
#[derive(Debug)]
pub(super) struct Capture {
    pub(super) image: PathBuf,
    pub(super) report: Report,
    pub(super) samples: Samples,
    pub(super) times: Times,
    /// From the request to stop the vCPUs until they were resumed, without the time of the `copy`.
    pub(super) pause: Duration,
    /// The steps that each vCPU had done at the point in time.
    pub(super) steps: EachVcpu<u64>,
    /// The RAM at the point in time, if it is small.
    pub(super) copy: Option<Vec<u8>>,
}

/// The times of the steps of a snapshot, from the start of the samples.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) begun: Duration,
    pub(super) stopped: Duration,
    pub(super) resumed: Duration,
    pub(super) durable: Duration,
}

impl Plan<'_> {
    pub(super) fn capture(
        &self,
        machine: &Arc<Smp>,
        running: &Running,
        method: Method,
        progress: &Progress,
    ) -> anyhow::Result<Capture> {
        let image = self.dir.join(format!("{method}.mem"));
        progress.phase(format!("{method} of the working guest"), self.ram);
        let cancel = CancelToken::new();
        let writer = self.writer(&image, &cancel, progress)?;
        // No page is protected yet, and all are marked.
        let tracker = Arc::new(UffdTracker::start(machine.ram())?);
        let options = LiveSnapshot::options().method(method).cancel(cancel);

        // Written before the pause: to fill new memory takes longer than the copy.
        let mut copy = (self.ram <= COPIED).then(|| vec![1; self.ram as usize]);

        let sampler = Sampler::start(machine)?;
        self.calm(running, progress)?;
        let begun = sampler.now();
        let live = options.begin(&tracker, writer)?;

        let stopped = sampler.now();
        let paused = running.pause()?;
        let steps = paused.steps();
        let state = paused.states()?;
        let copying = sampler.now();
        if let Some(copy) = &mut copy {
            machine.ram().read_at(0, copy)?;
        }
        let copied = sampler.now();
        let mut frozen = live.freeze()?;
        paused.resume();
        let resumed = sampler.now();

        frozen.set_metadata(state)?;
        let report = frozen.commit()?;
        let durable = sampler.now();
        self.calm(running, progress)?;
        let samples = sampler.end()?;
        // The copy is not part of the snapshot.
        let copy_time = copied - copying;
        let (resumed, durable) = (resumed - copy_time, durable - copy_time);
        Ok(Capture {
            image,
            report,
            samples: samples.without(copying, copied),
            times: Times {
                begun,
                stopped,
                resumed,
                durable,
            },
            pause: resumed - stopped,
            steps,
            copy,
        })
    }

    fn writer(
        &self,
        image: &PathBuf,
        cancel: &CancelToken,
        progress: &Progress,
    ) -> anyhow::Result<MemoryWriter> {
        let (progress, cancel) = (progress.clone(), cancel.clone());
        let writer = MemoryWriter::options()
            .layout(Layout::Sealed)
            .cancel(cancel.clone())
            .progress(move |done| {
                if progress.at(done.done).is_err() {
                    cancel.cancel();
                }
                std::ops::ControlFlow::Continue(())
            });
        Ok(writer.open(image, self.ram, guests::ledger::PAGE)?)
    }

    /// Lets each vCPU work for a time, and for a few steps on a busy machine.
    fn calm(&self, running: &Running, progress: &Progress) -> anyhow::Result<()> {
        let goals = running.steps().map(|steps| steps + 10);
        thread::sleep(self.calm);
        while running
            .steps()
            .iter()
            .zip(goals)
            .any(|(done, goal)| *done < goal)
        {
            running.check()?;
            progress.interrupted()?;
            thread::sleep(Duration::from_millis(1));
        }
        progress.interrupted()
    }
}
