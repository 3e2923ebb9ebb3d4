//! vCPUs that work at a steady rate in threads of their own, and their pauses.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use kvm_backend::{Vcpu, VcpuState};

use super::super::StopReason;
use super::super::pause;
use super::{ARRIVED, EachVcpu, Smp, WORK, run};
use crate::ledger::{Words, front};

/// The interval at which a vCPU begins to work. It idles when its steps are done.
const TICK: Duration = Duration::from_millis(2);

/// The interval between two signals to a vCPU that is to stop. A single one may arrive just before
/// the vCPU runs, without effect.
const INTERVAL: Duration = Duration::from_micros(50);

/// A machine whose vCPUs work until this is dropped.
#[derive(Debug)]
pub struct Running {
    machine: Arc<Smp>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

/// What the threads of the vCPUs are to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wanted {
    #[default]
    Run,
    Pause,
    End,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, wanted: Wanted) {
        *self.lock() = wanted;
        self.changed.notify_all();
    }

    /// Waits while the vCPUs are paused. Returns whether they are to run.
    fn wait(&self) -> bool {
        let paused = |wanted: &mut Wanted| *wanted == Wanted::Pause;
        let waited = self.changed.wait_while(self.lock(), paused);
        *waited.unwrap_or_else(PoisonError::into_inner) == Wanted::Run
    }

    /// Sleeps for a time, or until the vCPUs are to stop.
    fn sleep(&self, time: Duration) {
        let running = |wanted: &mut Wanted| *wanted == Wanted::Run;
        drop(self.changed.wait_timeout_while(self.lock(), time, running));
    }
}

impl Running {
    /// Starts threads that make each vCPU do `rate` steps a second. A vCPU that is late does not
    /// catch up.
    pub fn start(machine: &Arc<Smp>, rate: u64) -> anyhow::Result<Self> {
        pause::handle_interrupts()?;
        let mut running = Self {
            machine: Arc::clone(machine),
            shared: Arc::default(),
            threads: Vec::new(),
        };
        let steps = (rate as f64 * TICK.as_secs_f64()).ceil() as u64;
        for number in 0..machine.halves.len() {
            let (machine, shared) = (Arc::clone(machine), Arc::clone(&running.shared));
            let thread = thread::Builder::new().name(format!("vcpu {number}"));
            let thread = thread.spawn(move || work(&machine, number, &shared, steps))?;
            running.threads.push(thread);
        }
        Ok(running)
    }

    /// Stops all vCPUs, at arbitrary instructions. They continue when the value is dropped.
    pub fn pause(&self) -> anyhow::Result<Paused<'_>> {
        self.shared.set(Wanted::Pause);
        let mut vcpus = Vec::new();
        for (half, thread) in self.machine.halves.iter().zip(&self.threads) {
            let mut interrupted: Option<Instant> = None;
            let vcpu = loop {
                match half.vcpu.try_lock() {
                    Ok(vcpu) => break vcpu,
                    Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                    Err(TryLockError::WouldBlock) => {}
                }
                if interrupted.is_none_or(|at| at.elapsed() >= INTERVAL) {
                    pause::interrupt(thread).context("failed to interrupt a vCPU")?;
                    interrupted = Some(Instant::now());
                }
                thread::yield_now();
            };
            vcpus.push(vcpu);
        }
        Ok(Paused {
            vcpus,
            running: self,
        })
    }

    /// Returns the number of steps that each vCPU has done.
    pub fn steps(&self) -> EachVcpu<u64> {
        self.machine.steps()
    }

    /// Returns an error if a vCPU has stopped. [`end`](Self::end) returns the reason.
    pub fn check(&self) -> anyhow::Result<()> {
        let stopped = self.threads.iter().any(JoinHandle::is_finished);
        anyhow::ensure!(!stopped, "a vCPU has stopped");
        Ok(())
    }

    /// Ends the work of the vCPUs.
    pub fn end(mut self) -> anyhow::Result<()> {
        self.join()
    }

    fn join(&mut self) -> anyhow::Result<()> {
        self.shared.set(Wanted::End);
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            let ended = ended.unwrap_or_else(|_| Err(anyhow!("the thread of a vCPU panicked")));
            result = result.and(ended);
        }
        result
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

/// Runs a vCPU: `steps` steps each tick.
fn work(machine: &Smp, number: usize, shared: &Shared, steps: u64) -> anyhow::Result<()> {
    let half = &machine.halves[number];
    let mut front = machine.front(half);
    let mut tick = Instant::now();
    front.store(front::ORDER, WORK);
    front.store(front::UNTIL, front.load(front::STEPS));
    while shared.wait() {
        {
            let mut vcpu = half.vcpu();
            // The thread that pauses the vCPUs takes the lock after its request.
            if *shared.lock() != Wanted::Run {
                continue;
            }
            let done = front.load(front::STEPS);
            if done >= front.load(front::UNTIL) {
                front.store(front::UNTIL, done + steps);
            }
            match run(&mut vcpu)? {
                StopReason::Doorbell(ARRIVED) => {}
                StopReason::Doorbell(value) => {
                    anyhow::bail!("the guest rang its doorbell with {value} while it worked")
                }
                StopReason::Interrupted => continue,
            }
        }
        tick = (tick + TICK).max(Instant::now());
        shared.sleep(tick.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// The vCPUs of a machine, which do not run. Dropping it resumes them.
#[derive(Debug)]
pub struct Paused<'r> {
    vcpus: Vec<MutexGuard<'r, Vcpu>>,
    running: &'r Running,
}

impl Paused<'_> {
    /// Returns the number of steps that each vCPU has done.
    pub fn steps(&self) -> EachVcpu<u64> {
        self.running.machine.steps()
    }

    /// Returns the states of all vCPUs.
    pub fn states(&self) -> anyhow::Result<Vec<u8>> {
        let machine = &self.running.machine;
        let paused = machine.vcpus.pause()?;
        let capture = |vcpu: &MutexGuard<'_, Vcpu>| -> anyhow::Result<Vec<u8>> {
            Ok(VcpuState::capture(&machine.msrs, &paused, vcpu)?.to_bytes())
        };
        let states: EachVcpu<Vec<u8>> = match self.vcpus.as_slice() {
            [first, second] => [capture(first)?, capture(second)?],
            other => anyhow::bail!("{} vCPUs are paused, not 2", other.len()),
        };
        Ok(postcard::to_stdvec(&states)?)
    }

    /// Resumes the vCPUs.
    pub fn resume(self) {}
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.running.shared.set(Wanted::Run);
        self.vcpus.clear();
    }
}
