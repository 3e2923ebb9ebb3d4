//! The guest's work rate, seen from outside.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use guests::kvm::smp::Smp;

/// The interval of the samples.
const INTERVAL: Duration = Duration::from_millis(4);

/// The number of steps that all vCPUs had done, at increasing times.
#[derive(Debug, Default)]
pub(super) struct Samples(pub(super) Vec<(Duration, u64)>);

/// A thread that reads the number of steps in the guest's RAM.
#[derive(Debug)]
pub(super) struct Sampler {
    started: Instant,
    end: Sender<()>,
    thread: JoinHandle<Samples>,
}

impl Sampler {
    pub(super) fn start(machine: &Arc<Smp>) -> anyhow::Result<Self> {
        let started = Instant::now();
        let (end, ended) = mpsc::channel();
        let machine = Arc::clone(machine);
        let sample = move || {
            let mut samples = Samples::default();
            loop {
                let steps = machine.steps().iter().sum();
                samples.0.push((started.elapsed(), steps));
                if ended.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return samples;
                }
            }
        };
        let thread = thread::Builder::new().name("sampler".into());
        Ok(Self {
            started,
            end,
            thread: thread.spawn(sample)?,
        })
    }

    /// Returns the time since the start.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn end(self) -> anyhow::Result<Samples> {
        drop(self.end);
        let joined = self.thread.join();
        joined.map_err(|_| anyhow!("the sampler panicked"))
    }
}

impl Samples {
    /// Returns the time of the last sample.
    pub(super) fn end(&self) -> Duration {
        self.0.last().map_or(Duration::ZERO, |(at, _)| *at)
    }

    /// Removes the time between two times.
    pub(super) fn without(self, from: Duration, to: Duration) -> Self {
        let kept = self.0.into_iter().filter(|(at, _)| *at <= from || *at > to);
        let moved = kept.map(|(at, steps)| match at <= from {
            true => (at, steps),
            false => (at - (to - from), steps),
        });
        Self(moved.collect())
    }

    /// Returns the steps per second between two times.
    pub(super) fn rate(&self, from: Duration, to: Duration) -> f64 {
        let time = (to.saturating_sub(from)).as_secs_f64();
        (self.steps_at(to) - self.steps_at(from)) / time.max(1e-9)
    }

    /// Returns the number of steps at a time, on a line between two samples.
    fn steps_at(&self, time: Duration) -> f64 {
        let next = self.0.partition_point(|(at, _)| *at < time);
        match (
            next.checked_sub(1).map(|last| self.0[last]),
            self.0.get(next),
        ) {
            (Some((before, from)), Some(&(after, to))) => {
                let share = (time - before).as_secs_f64() / (after - before).as_secs_f64();
                from as f64 + (to - from) as f64 * share
            }
            (Some((_, steps)), None) | (None, Some(&(_, steps))) => steps as f64,
            (None, None) => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_that_of_the_time_between() {
        let ms = Duration::from_millis;
        let samples = Samples(vec![
            (ms(0), 0),
            (ms(10), 100),
            (ms(20), 100),
            (ms(30), 400),
        ]);
        let rate = |from, to| samples.rate(ms(from), ms(to)).round();
        assert_eq!(rate(0, 10), 10_000.0);
        assert_eq!(rate(10, 20), 0.0);
        assert_eq!(rate(5, 15), 5000.0);
        assert_eq!(rate(20, 60), 7500.0, "nothing is known after the last");
        assert_eq!(samples.end(), ms(30));
        let shorter = samples.without(ms(10), ms(20));
        assert_eq!(shorter.0, [(ms(0), 0), (ms(10), 100), (ms(20), 400)]);
        assert_eq!(Samples::default().rate(ms(0), ms(1)), 0.0);
    }
}
