//! The pause of live snapshots of a KVM guest, compared with stop-and-copy in the same run.

mod bare_handler;
mod guest;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use live_snapshot::{LiveSnapshot, Method, Report, UffdTracker};
use memory_writer::{Layout, MemoryWriter};

use crate::Comparison;
use bare_handler::BareHandler;
use guest::{Guest, Work};

/// The number of pauses that are measured for the worst one.
const PAUSES: usize = 50;

/// The part of the RAM that the guest rewrites in a second: 1 / `HOT`.
const HOT: u64 = 10;

/// What a live snapshot did, as the guest and the host see it.
struct Taken {
    pause: Duration,
    report: Report,
    /// The pages a second that the guest wrote while the image was written.
    rate: f64,
    seconds: f64,
    /// The anonymous memory of this process, in addition to that before.
    memory: u64,
}

impl Comparison<'_> {
    /// Measures the pauses of a guest that rewrites 10 % of its RAM in a second.
    pub fn live(&mut self) {
        for gib in [1, 8] {
            if self.wants(&format!("live snapshot of {gib} GiB")) {
                self.live_of(gib);
            }
        }
    }

    fn live_of(&mut self, gib: u64) {
        let size = gib * self.gib;
        let guest = Guest::start(size, Work::Hot(size / HOT));
        guest.set_paced(false);
        let fastest = self.rate(&guest);
        guest.set_paced(true);
        let untracked = self.rate(&guest);
        let tracker = Arc::new(UffdTracker::start(&guest.ram).unwrap());
        let of = |what: &str| format!("live snapshot of {gib} GiB: {what}");
        let (pauses, limits) = match (self.smoke_test, gib) {
            (true, _) => (2, Limits::of_8_gib()),
            (false, 1) => (PAUSES, Limits::of_1_gib()),
            (false, _) => (PAUSES, Limits::of_8_gib()),
        };

        // By turns, so that a busy moment affects all of them.
        let rounds = if self.smoke_test { 1 } else { 3 };
        let (mut stopped, mut copied, mut precopied) = (Vec::new(), Vec::new(), Vec::new());
        let (mut backgrounds, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let before = self.take(&guest, &tracker, Method::StopAndCopy);
            let background = self.take(&guest, &tracker, Method::CopyOnWrite);
            let after = self.take(&guest, &tracker, Method::StopAndCopy);
            // The disk's own speed changes within minutes.
            let idle = (before.report.freeze + after.report.freeze) / 2;
            backgrounds.push(idle.as_secs_f64() / background.seconds);
            beside.push(self.dump_running(&guest) / background.seconds);
            stopped.extend([before, after]);
            copied.push(background);
            precopied.push(self.take(&guest, &tracker, Method::PreCopy));
        }
        let mut short: Vec<_> = copied.iter().map(|taken| taken.pause).collect();
        while short.len() < pauses {
            short.push(self.pause_only(&guest, &tracker));
        }
        short.sort_unstable();
        let (median, worst) = (short[short.len() / 2], short[short.len() - 1]);
        self.figure(
            &of("pause, copy-on-write"),
            format!("{median:.0?} median, {worst:.0?} worst of {}", short.len()),
            limits.pause,
        );
        let stop = median_of(&stopped, |taken| taken.pause.as_secs_f64());
        self.figure(
            &of("pause, stop-and-copy"),
            format!(
                "{stop:.2} s, {:.0} times that of copy-on-write",
                stop / median.as_secs_f64()
            ),
            limits.ratio,
        );
        let worst = precopied.iter().map(|taken| taken.pause).max();
        self.figure(
            &of("pause, pre-copy"),
            format!(
                "{:.0?} worst of {rounds}, after {:.0} passes",
                worst.unwrap_or_default(),
                median_of(&precopied, |taken| taken.report.passes.len() as f64)
            ),
            limits.precopy,
        );
        let rate = median_of(&copied, |taken| taken.rate / untracked);
        self.figure(
            &of("the guest's speed while it is written"),
            format!("{:.0} %", rate * 100.0),
            "at least 60 %",
        );
        let background = middle(&mut backgrounds);
        self.figure(
            &of("write speed in the background"),
            format!(
                "{background:.2} times that of a dump at rest before and after it, {:.2} times that \
                 of a dump of the RAM as it is while the guest runs",
                middle(&mut beside)
            ),
            "at least 0.8",
        );
        let memory = copied.iter().map(|taken| taken.memory).max().unwrap_or(0);
        let pool = copied.iter().map(|taken| taken.report.pool_peak).max();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        self.figure(
            &of("memory"),
            format!(
                "{:.1} MiB in addition to the guest's, {:.1} MiB of it in the pool",
                mib(memory),
                mib(pool.unwrap_or(0))
            ),
            "the pool of 64 MiB and bitmaps",
        );
        guest.set_paced(false);
        let fast = self.take(&guest, &tracker, Method::CopyOnWrite);
        self.figure(
            &of("a guest that writes as fast as it can"),
            format!(
                "{:.0} % of its speed, {:.0} MiB copied before a write, {:.0} % of the time waited \
                 for the pool",
                fast.rate / fastest * 100.0,
                mib(fast.report.copied_before_write),
                fast.report.pool_waited.as_secs_f64() / fast.seconds * 100.0
            ),
            "",
        );
        drop(tracker);
        drop(guest);
        self.scattered(&of("the speed of a guest that writes pages all over"), size);
    }

    /// Measures a guest that rewrites 10 % of its RAM in a second, at pages all over the RAM.
    fn scattered(&mut self, name: &str, size: u64) {
        let guest = Guest::start(size, Work::Scattered(size / HOT));
        let untracked = self.rate(&guest);
        let rounds = if self.smoke_test { 1 } else { 3 };
        let (mut taken, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let tracker = Arc::new(UffdTracker::start(&guest.ram).unwrap());
            taken.push(self.take(&guest, &tracker, Method::CopyOnWrite));
            drop(tracker);
            let _bare = BareHandler::start(&guest.ram);
            bare.push(self.rate(&guest) / untracked);
        }
        let bare = middle(&mut bare);
        let rate = median_of(&taken, |taken| taken.rate / untracked);
        let waited = median_of(&taken, |taken| {
            taken.report.pool_waited.as_secs_f64() / taken.seconds
        });
        self.figure(
            name,
            format!(
                "{:.0} % while it is written, {:.0} % of the time waited for the pool; {:.0} % with a \
                 bare handler, which copies and writes nothing",
                rate * 100.0,
                waited * 100.0,
                bare * 100.0
            ),
            "60 %, or the speed with a bare handler",
        );
    }

    /// Returns the number of pages a second that the guest writes.
    fn rate(&self, guest: &Guest) -> f64 {
        let moment = if self.smoke_test { 10 } else { 1000 };
        let (before, since) = (guest.pages(), Instant::now());
        thread::sleep(Duration::from_millis(moment));
        (guest.pages() - before) as f64 / since.elapsed().as_secs_f64()
    }

    /// Takes a full snapshot, and measures the guest while it is written.
    fn take(&self, guest: &Guest, tracker: &Arc<UffdTracker>, method: Method) -> Taken {
        // The guest works for a moment.
        let _ = self.rate(guest);
        let memory_before = anonymous();
        let peak = Arc::new(AtomicU64::new(memory_before));
        let seen = Arc::clone(&peak);
        let size = guest.ram.layout().ram_size();
        let writer = MemoryWriter::options()
            .layout(Layout::Sealed)
            .progress(move |_| {
                seen.fetch_max(anonymous(), SeqCst);
                std::ops::ControlFlow::Continue(())
            })
            .open(self.place.join("guest.mem"), size, 4096)
            .unwrap();
        let options = LiveSnapshot::options().method(method);
        let live = options.begin(tracker, writer).unwrap();
        let freeze = guest.freeze(live);
        let (before, since) = (guest.pages(), Instant::now());
        let written = freeze.frozen.write().unwrap();
        let seconds = since.elapsed().as_secs_f64();
        let rate = (guest.pages() - before) as f64 / seconds;
        let report = written.commit().unwrap();
        fs::remove_file(self.place.join("guest.mem")).unwrap();
        Taken {
            pause: freeze.pause,
            report,
            rate,
            seconds,
            memory: peak.load(SeqCst) - memory_before,
        }
    }

    /// Writes the RAM as it is while the guest runs, with neither a point in time nor copies, and
    /// returns the seconds. No live snapshot is faster.
    fn dump_running(&self, guest: &Guest) -> f64 {
        let size = guest.ram.layout().ram_size();
        let path = self.place.join("guest.mem");
        let options = MemoryWriter::options().layout(Layout::Sealed);
        let mut writer = options.open(&path, size, 4096).unwrap();
        let since = Instant::now();
        writer.write_full(&*guest.ram).unwrap();
        let seconds = since.elapsed().as_secs_f64();
        writer.commit().unwrap();
        fs::remove_file(path).unwrap();
        seconds
    }

    /// Begins a snapshot, freezes it, and cancels it a moment later.
    fn pause_only(&self, guest: &Guest, tracker: &Arc<UffdTracker>) -> Duration {
        let size = guest.ram.layout().ram_size();
        let writer = MemoryWriter::options().layout(Layout::Sealed);
        let writer = writer
            .open(self.place.join("guest.mem"), size, 4096)
            .unwrap();
        let live = LiveSnapshot::options().begin(tracker, writer).unwrap();
        let pause = guest.freeze(live).pause;
        let moment = if self.smoke_test { 1 } else { 100 };
        thread::sleep(Duration::from_millis(moment));
        pause
    }
}

/// The limits that the figures are to keep.
struct Limits {
    pause: &'static str,
    ratio: &'static str,
    precopy: &'static str,
}

impl Limits {
    const fn of_1_gib() -> Self {
        Self {
            pause: "at most 1 ms median, 5 ms worst",
            ratio: "at least 200 times",
            precopy: "at most 20 ms",
        }
    }

    const fn of_8_gib() -> Self {
        Self {
            pause: "at most 2 ms median, 10 ms worst",
            ratio: "at least 1000 times",
            precopy: "at most 40 ms",
        }
    }
}

fn median_of(all: &[Taken], value: impl Fn(&Taken) -> f64) -> f64 {
    middle(&mut all.iter().map(value).collect::<Vec<_>>())
}

fn middle(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Returns the resident anonymous memory of this process in bytes, without the RAM of the guest,
/// which is shared.
fn anonymous() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
