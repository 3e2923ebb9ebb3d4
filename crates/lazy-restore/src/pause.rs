//! Waits between requests that the kernel refuses for now.

use std::thread;
use std::time::Duration;

/// Repetitions that only let other threads run. The thread in `madvise` that the kernel waits for
/// usually continues at once.
const YIELDS: u32 = 64;
/// The longest pause. The process of that thread may be stopped for any time.
const LONGEST: Duration = Duration::from_millis(1);

/// Pauses of one request, each longer than the one before.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    count: u32,
}

impl Pause {
    /// Lets other threads run, and sleeps after many repetitions.
    pub(crate) fn wait(&mut self) {
        match self.next() {
            Duration::ZERO => thread::yield_now(),
            pause => thread::sleep(pause),
        }
    }

    /// Returns the length of the next pause.
    fn next(&mut self) -> Duration {
        self.count = self.count.saturating_add(1);
        match self.count.checked_sub(YIELDS + 1) {
            None => Duration::ZERO,
            Some(repeated) => LONGEST.min(Duration::from_micros(10 << repeated.min(10))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_millisecond() {
        let mut pause = Pause::default();
        let first: Vec<_> = (0..YIELDS).map(|_| pause.next()).collect();
        assert!(first.iter().all(Duration::is_zero));
        let (short, longer) = (pause.next(), pause.next());
        assert!(Duration::ZERO < short && short < longer);
        assert_eq!((0..100).map(|_| pause.next()).last(), Some(LONGEST));
    }
}
