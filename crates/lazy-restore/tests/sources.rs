//! RAM that is filled from other sources than a chain.
#![cfg(target_os = "linux")]

mod support;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use lazy_restore::{LazyError, LazyRam, RamSegment, RamSource, SizedReader, UserfaultfdError};
use page_reader::{PageReader, PopulatedRanges};
use rstest::rstest;
use support::lazy_images::{MIB, PAGE, on_demand};
use support::regions::{Regions, assert_unreadable, page_at};
use test_images::whole;
use test_machine::needs;

/// A source that reads in its own time, and records what is asked of it.
struct Server {
    ram: Vec<u8>,
    /// Pages that are known to be zeros are those after this offset.
    stored: u64,
    /// The size of a segment in bytes.
    segment: u64,
    delay: Duration,
    fails: Range<u64>,
    panics: bool,
    changed: AtomicBool,
    complete: bool,
    calls: Mutex<Vec<Call>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Read(Range<u64>),
    Ahead(Range<u64>),
}

impl Default for Server {
    fn default() -> Self {
        let page_bytes = |page: u64| [(page % 251) as u8 + 1; PAGE as usize];
        Self {
            ram: (0..MIB / PAGE).flat_map(page_bytes).collect(),
            stored: MIB,
            segment: MIB,
            delay: Duration::ZERO,
            fails: 0..0,
            panics: false,
            changed: AtomicBool::new(false),
            complete: true,
            calls: Mutex::default(),
        }
    }
}

impl Server {
    fn page(&self, page: u64) -> &[u8] {
        &self.ram[(page * PAGE) as usize..][..PAGE as usize]
    }

    fn reads(&self) -> Vec<Range<u64>> {
        let calls = self.calls.lock().unwrap();
        let read = |call: &Call| match call {
            Call::Read(range) => Some(range.clone()),
            Call::Ahead(_) => None,
        };
        calls.iter().filter_map(read).collect()
    }
}

impl PageReader for Server {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        assert!(!self.panics, "on purpose");
        let range = offset..offset + buf.len() as u64;
        self.calls.lock().unwrap().push(Call::Read(range.clone()));
        std::thread::sleep(self.delay);
        if range.start < self.fails.end && self.fails.start < range.end {
            return Err(io::Error::other("connection lost"));
        }
        self.ram.read_at(offset, buf)
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        let stored = range.start..range.end.min(self.stored);
        Box::new(std::iter::once(stored).filter(|range| !range.is_empty()))
    }

    fn check_source(&self) -> io::Result<()> {
        match self.changed.load(Ordering::Relaxed) {
            true => Err(io::Error::other("another guest")),
            false => Ok(()),
        }
    }
}

impl RamSource for Server {
    fn ram_size(&self) -> u64 {
        self.ram.len() as u64
    }

    fn segment(&self, offset: u64, _: Range<u64>) -> RamSegment {
        let start = offset - offset % self.segment;
        match start < self.stored {
            true => RamSegment::stored(start..start + self.segment),
            false => RamSegment::zeros(start..start + self.segment),
        }
    }

    fn read_ahead(&self, range: Range<u64>) {
        self.calls.lock().unwrap().push(Call::Ahead(range));
    }

    fn check_complete(&self) -> io::Result<()> {
        match self.complete {
            true => Ok(()),
            false => Err(io::Error::other("half of it")),
        }
    }
}

fn page(ram: &LazyRam, page: u64) -> io::Result<Vec<u8>> {
    page_at(ram.as_ptr().wrapping_add((page * PAGE) as usize))
}

#[test]
fn slow_source_fills_ram_for_several_threads() {
    needs!(Userfaultfd);
    let source = Arc::new(Server {
        delay: Duration::from_millis(2),
        ..Server::default()
    });
    let ram = LazyRam::options().start(Arc::clone(&source)).unwrap();
    let begin = Barrier::new(4);
    std::thread::scope(|scope| {
        for first in 0..4 {
            let (ram, source, begin) = (&ram, &source, &begin);
            scope.spawn(move || {
                begin.wait();
                for number in (first..MIB / PAGE).step_by(52) {
                    assert!(page(ram, number).unwrap() == source.page(number));
                }
            });
        }
    });
    ram.wait().unwrap();
    assert!(whole(&ram, MIB as usize) == source.ram);
    assert_eq!(ram.progress().done, MIB);
}

#[test]
fn memory_with_a_size_is_a_source() {
    needs!(Userfaultfd);
    let bytes: Vec<u8> = (0..MIB).map(|at| (at / 1000) as u8).collect();
    // The end of the RAM is not that of a page.
    let ram_size = MIB - 100;
    let ram = LazyRam::options().start(SizedReader::new(bytes.clone(), ram_size));
    let ram = ram.unwrap();
    assert_eq!(ram.ram_size(), ram_size);
    ram.wait().unwrap();
    assert!(whole(&ram, ram_size as usize) == bytes[..ram_size as usize]);
}

#[test]
fn adopted_memory_is_filled_from_any_source() {
    needs!(Userfaultfd);
    let source = Arc::new(Server::default());
    let regions = Regions::new(&[MIB / 2, MIB / 2]);
    // SAFETY: as in `Regions::adopt`.
    #[allow(unsafe_code)]
    let ram = unsafe { on_demand().adopt(Arc::clone(&source), regions.0.iter().copied()) };
    let ram = ram.unwrap();
    assert!(regions.page(200 * PAGE).unwrap() == source.page(200));
    ram.wait().unwrap();
    assert!(whole(&ram, MIB as usize) == source.ram);
}

#[rstest]
#[case::on_demand(on_demand())]
#[case::prefetching(LazyRam::options())]
fn error_of_a_source_is_reported_and_its_page_unreadable(
    #[case] options: lazy_restore::LazyRamOptions,
) {
    needs!(Userfaultfd);
    let source = Arc::new(Server {
        fails: 20 * PAGE..21 * PAGE,
        ..Server::default()
    });
    let ram = options.start(Arc::clone(&source)).unwrap();
    assert_unreadable(page(&ram, 20));
    // The pages around it are read alone.
    assert!(page(&ram, 21).unwrap() == source.page(21));
    let error = ram.wait().unwrap_err();
    let LazyError::ReadSource { offset, source } = &*error else {
        panic!("{error:?}");
    };
    assert!(*offset <= 20 * PAGE, "{offset}");
    assert_eq!(source.to_string(), "connection lost");
    assert!(matches!(ram.error(), Some(LazyError::ReadSource { .. })));
    assert_unreadable(page(&ram, 20));
}

#[test]
fn panic_of_a_source_makes_the_memory_inaccessible() {
    needs!(Userfaultfd);
    let source = Server {
        panics: true,
        ..Server::default()
    };
    let ram = on_demand().start(source).unwrap();
    assert_unreadable(page(&ram, 3));
    let error = ram.wait().unwrap_err();
    assert!(
        matches!(*error, LazyError::Userfaultfd(UserfaultfdError::Thread(_))),
        "{error:?}"
    );
}

#[test]
fn source_that_changes_while_ram_is_filled_is_an_error() {
    needs!(Userfaultfd);
    let source = Arc::new(Server::default());
    let ram = on_demand().start(Arc::clone(&source)).unwrap();
    source.changed.store(true, Ordering::Relaxed);
    let error = ram.wait().unwrap_err();
    assert!(
        matches!(&*error, LazyError::Source(why) if why.to_string() == "another guest"),
        "{error:?}"
    );
}

#[rstest]
#[case::changed(Server { changed: AtomicBool::new(true), ..Server::default() })]
#[case::incomplete(Server { complete: false, ..Server::default() })]
fn changed_or_incomplete_source_is_refused(#[case] source: Server) {
    needs!(Userfaultfd);
    let error = on_demand().start(source).unwrap_err();
    assert!(matches!(error, LazyError::Source(_)), "{error:?}");
}

#[test]
fn memory_of_another_size_than_the_source_is_refused() {
    let regions = Regions::new(&[MIB / 2]);
    // SAFETY: as in `Regions::adopt`.
    #[allow(unsafe_code)]
    let adopted = unsafe { on_demand().adopt(Server::default(), regions.0.iter().copied()) };
    assert!(matches!(
        adopted.unwrap_err(),
        LazyError::TargetSize { image: MIB, .. }
    ));
}

#[test]
fn source_bounds_what_one_fault_reads() {
    needs!(Userfaultfd);
    let source = Arc::new(Server {
        segment: 2 * PAGE,
        stored: MIB / 2,
        ..Server::default()
    });
    let ram = on_demand().start(Arc::clone(&source)).unwrap();
    assert!(page(&ram, 5).unwrap() == source.page(5));
    assert!(page(&ram, 4).unwrap() == source.page(4));
    assert!(page(&ram, 200).unwrap() == [0; PAGE as usize]);
    assert_eq!(source.reads(), [4 * PAGE..6 * PAGE]);
    assert_eq!(ram.faults(), 2);
}

#[test]
fn option_bounds_what_one_fault_reads() {
    needs!(Userfaultfd);
    let source = Arc::new(Server::default());
    let options = on_demand().fault_around(4 * PAGE);
    let ram = options.start(Arc::clone(&source)).unwrap();
    assert!(page(&ram, 5).unwrap() == source.page(5));
    assert_eq!(source.reads(), [4 * PAGE..8 * PAGE]);
}

#[test]
fn zeros_of_a_source_are_never_read() {
    needs!(Userfaultfd);
    let source = Arc::new(Server {
        stored: MIB / 4,
        ..Server::default()
    });
    let ram = on_demand().start(Arc::clone(&source)).unwrap();
    assert_eq!(ram.progress().total, MIB / 4);
    ram.wait().unwrap();
    assert!(source.reads().iter().all(|read| read.end <= MIB / 4));
    assert!(page(&ram, 200).unwrap() == [0; PAGE as usize]);
}

#[test]
fn prefetcher_announces_ranges_before_it_reads_them() {
    needs!(Userfaultfd);
    let source = Arc::new(Server::default());
    let ram = on_demand().start(Arc::clone(&source)).unwrap();
    ram.wait().unwrap();
    let calls = source.calls.lock().unwrap().clone();
    let mut announced = 0;
    for call in calls {
        match call {
            Call::Ahead(range) => announced = announced.max(range.end),
            Call::Read(range) => assert!(range.end <= announced, "{range:?}"),
        }
    }
    assert!(announced >= MIB);
}

#[test]
fn source_without_ram_is_an_error() {
    let error = LazyRam::options()
        .start(SizedReader::new(Vec::new(), 0))
        .unwrap_err();
    assert!(matches!(error, LazyError::NoRam), "{error:?}");
    // SAFETY: there is no memory.
    #[allow(unsafe_code)]
    let adopted = unsafe { LazyRam::options().adopt(SizedReader::new(Vec::new(), 0), []) };
    assert!(matches!(adopted, Err(LazyError::NoRam)), "{adopted:?}");
}

/// A source that reports its third page before its first one.
struct Descending;

impl PageReader for Descending {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(7);
        Ok(())
    }

    fn populated(&self, _: Range<u64>) -> PopulatedRanges<'_> {
        Box::new([2 * PAGE..3 * PAGE, 0..PAGE].into_iter())
    }
}

impl RamSource for Descending {
    fn ram_size(&self) -> u64 {
        MIB
    }
}

#[rstest]
#[case::in_order(false)]
#[case::working_set(true)]
fn source_with_descending_ranges_is_an_error(#[case] with_working_set: bool) {
    needs!(Userfaultfd);
    let mut options = LazyRam::options();
    if with_working_set {
        let recording = LazyRam::options().record(true);
        let recorded = recording.start(Server::default()).unwrap();
        for touched in 0..3 {
            page(&recorded, touched).unwrap();
        }
        assert_eq!(recorded.recorded().runs().count(), 1);
        options = options.working_set(recorded.recorded());
    }
    let ram = options.start(Descending).unwrap();
    let error = ram.wait().unwrap_err();
    assert!(
        error.to_string().contains("ranges must ascend"),
        "{error:?}"
    );
}
