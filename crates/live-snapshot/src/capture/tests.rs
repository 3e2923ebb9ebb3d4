//! Tests of captures over memory that is a list of bytes.

use std::sync::Mutex as StdMutex;
use std::thread;

use super::*;
use crate::order::Order;
use memory_writer::PageRun;

const PAGE: u64 = 4096;
const SIZE: u64 = 3 << 20;
const PAGES: u64 = SIZE / PAGE;

/// Memory in which each byte of a page is the page's number, with faults of the platform.
#[derive(Default)]
struct Fake {
    /// The pages that are not protected.
    open: StdMutex<Vec<u64>>,
    /// The pages that are neither protected nor marked.
    lost: StdMutex<Vec<u64>>,
    /// The pages that cannot be read.
    broken: StdMutex<Vec<u64>>,
    copied: StdMutex<Vec<u64>>,
    /// The pages whose bytes are zeros.
    zeros: StdMutex<Range<u64>>,
}

fn pages(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE..range.end.div_ceil(PAGE)
}

impl PageMemory for Fake {
    fn copy(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for page in pages(&(offset..offset + buf.len() as u64)) {
            if self.broken.lock().unwrap().contains(&page) {
                return Err(io::Error::other("a broken page"));
            }
            self.copied.lock().unwrap().push(page);
        }
        let zeros = self.zeros.lock().unwrap();
        for (to, at) in buf.iter_mut().zip(offset..) {
            let page = at / PAGE;
            *to = if zeros.contains(&page) { 0 } else { page as u8 };
        }
        Ok(())
    }

    fn is_protected(&self, range: Range<u64>) -> io::Result<bool> {
        let open = self.open.lock().unwrap();
        Ok(!pages(&range).any(|page| open.contains(&page)))
    }

    fn find_discarded(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        let lost = self.lost.lock().unwrap();
        Ok(pages(&range)
            .find(|page| lost.contains(page))
            .map(|page| page * PAGE))
    }
}

fn capture(pool_pages: usize, when_full: WhenPoolFull) -> (Arc<Capture>, Arc<Fake>) {
    let memory = Arc::new(Fake::default());
    let capture = Capture::new(Arc::clone(&memory) as _, SIZE, PAGE, pool_pages, when_full);
    (Arc::new(capture), memory)
}

fn save(capture: &Capture, pages: Range<u64>) {
    capture.save(pages.start * PAGE..pages.end * PAGE);
}

fn read(capture: &Capture, pages: Range<u64>) -> Result<(), Failure> {
    let mut bytes = vec![0xee; ((pages.end - pages.start) * PAGE) as usize];
    capture.read(pages.start * PAGE, &mut bytes)?;
    let expected = (pages.start * PAGE..pages.end * PAGE).map(|at| (at / PAGE) as u8);
    assert!(bytes.into_iter().eq(expected));
    Ok(())
}

#[test]
fn pages_are_saved_only_after_the_point_in_time() {
    let (capture, memory) = capture(10, WhenPoolFull::Wait);
    capture.add(0..SIZE / 2);
    save(&capture, 0..5);
    assert_eq!(capture.usage(), PoolUsage::default());
    capture.activate();
    save(&capture, 3..5);
    save(&capture, 4..6);
    // Not a page of the image.
    save(&capture, PAGES - 2..PAGES);
    assert_eq!((capture.usage().copied, capture.usage().peak), (3, 3));
    assert_eq!(*memory.copied.lock().unwrap(), [3, 4, 5]);
    read(&capture, 0..8).unwrap();
    save(&capture, 0..8);
    // Each page was copied once.
    let mut copied = memory.copied.lock().unwrap().clone();
    copied.sort_unstable();
    assert_eq!(copied, [0, 1, 2, 3, 4, 5, 6, 7]);
    capture.end();
    save(&capture, 20..30);
    assert_eq!(capture.usage().copied, 3);
}

#[test]
fn parts_of_pages_are_read_in_order() {
    let (capture, _) = capture(10, WhenPoolFull::Wait);
    capture.add(0..SIZE);
    capture.activate();
    save(&capture, 1..2);
    let mut bytes = vec![0xee; 5 * PAGE as usize];
    let mut at = 0;
    // Neither the parts nor the batches end at the ends of pages.
    for len in [1, 4095, 100, 5000, 3000, 8284] {
        let part = &mut bytes[at..at + len];
        capture.read(at as u64, part).unwrap();
        at += len;
    }
    assert_eq!(at as u64, 5 * PAGE);
    assert!(
        bytes
            .iter()
            .enumerate()
            .all(|(at, byte)| u64::from(*byte) == at as u64 / PAGE)
    );
    assert_eq!(
        capture.needed(0..8 * PAGE).collect::<Vec<_>>(),
        [5 * PAGE..8 * PAGE]
    );
}

#[test]
fn page_that_is_read_again_is_refused() {
    let (capture, _) = capture(10, WhenPoolFull::Wait);
    capture.add(0..SIZE / 2);
    capture.activate();
    read(&capture, 0..2).unwrap();
    let again = read(&capture, 1..3);
    assert!(
        matches!(again, Err(Failure::NotPending { offset: PAGE })),
        "{again:?}"
    );
    // The capture has ended.
    let ended = read(&capture, 10..11);
    assert!(
        matches!(ended, Err(Failure::NotPending { offset: PAGE })),
        "{ended:?}"
    );
    assert!(matches!(
        capture.failure(),
        Some(Failure::NotPending { .. })
    ));
}

#[test]
fn discarded_pages_fail_the_capture() {
    for by_fault in [false, true] {
        let (capture, memory) = capture(10, WhenPoolFull::Wait);
        capture.add(0..SIZE);
        capture.activate();
        memory.open.lock().unwrap().push(7);
        match by_fault {
            true => save(&capture, 7..8),
            false => assert!(read(&capture, 5..6).is_ok() && read(&capture, 6..9).is_err()),
        }
        let failure = capture.failure();
        let expected = if by_fault { 7 } else { 6 } * PAGE;
        let discarded =
            matches!(failure, Some(Failure::Discarded { offset }) if offset == expected);
        assert!(discarded, "{failure:?}");
        // No copy is left in progress: the pages are needed.
        assert_eq!(
            capture.needed(7 * PAGE..9 * PAGE).next(),
            Some(7 * PAGE..9 * PAGE)
        );
        assert_eq!(capture.states.get(7), PageState::Pending);
    }
}

/// A page that is not in the image, or was copied before, may be lost too.
#[test]
fn pages_that_lost_their_mark_fail_the_capture() {
    let (capture, memory) = capture(10, WhenPoolFull::Wait);
    capture.add(0..SIZE / 2);
    memory.lost.lock().unwrap().push(PAGES - 1);
    save(&capture, PAGES - 2..PAGES);
    capture.activate();
    save(&capture, PAGES - 2..PAGES - 1);
    assert!(capture.failure().is_none());
    save(&capture, PAGES - 2..PAGES);
    let failure = capture.failure();
    let lost = matches!(failure, Some(Failure::Discarded { offset }) if offset == SIZE - PAGE);
    assert!(lost, "{failure:?}");
}

#[test]
fn memory_that_cannot_be_read_fails_the_capture() {
    for by_fault in [false, true] {
        let (capture, memory) = capture(2, WhenPoolFull::Wait);
        capture.add(0..SIZE);
        capture.activate();
        memory.broken.lock().unwrap().push(7);
        match by_fault {
            true => save(&capture, 7..8),
            false => assert!(read(&capture, 0..16).is_err()),
        }
        let failure = capture.failure();
        let Some(Failure::Memory { offset, error }) = failure else {
            panic!("{failure:?}");
        };
        assert_eq!(offset, if by_fault { 7 * PAGE } else { 0 });
        assert_eq!(error.to_string(), "a broken page");
        assert_eq!(capture.states.get(7), PageState::Pending);
    }
}

#[test]
fn full_pool_fails_the_capture_if_writes_must_not_wait() {
    let (capture, _) = capture(2, WhenPoolFull::Cancel);
    capture.add(0..SIZE);
    capture.activate();
    save(&capture, 0..2);
    assert!(capture.failure().is_none());
    save(&capture, 2..4);
    assert!(matches!(capture.failure(), Some(Failure::PoolFull)));
    assert!(matches!(read(&capture, 0..1), Err(Failure::PoolFull)));
    assert_eq!(capture.usage().peak, 2);
}

#[test]
fn chunks_with_saved_pages_come_first_and_each_page_once() {
    let (capture, _) = capture(100, WhenPoolFull::Wait);
    let chunk = capture.chunk_size();
    // The second page of each chunk is not in the image.
    for start in [0, chunk, 2 * chunk] {
        capture.add(start..start + PAGE);
        capture.add(start + 2 * PAGE..start + chunk);
    }
    capture.activate();
    let mut order = Order::new(&capture, SIZE);
    let chunk_runs = |index: u64| {
        let start = index * chunk;
        [
            PageRun::Data(start..start + PAGE),
            PageRun::Zeros(start + PAGE..start + 2 * PAGE),
            PageRun::Data(start + 2 * PAGE..start + chunk),
        ]
    };
    let mut next = || {
        let runs: [_; 3] = std::array::from_fn(|_| order.next().unwrap());
        runs
    };
    let in_chunk = |index: u64| save(&capture, (index * chunk / PAGE)..(index * chunk / PAGE + 1));
    in_chunk(2);
    assert_eq!(next(), chunk_runs(2));
    assert_eq!(next(), chunk_runs(0));
    // Chunk 0 is being written.
    in_chunk(0);
    in_chunk(1);
    assert_eq!(next(), chunk_runs(1));
    assert_eq!(order.next(), None);
}

#[test]
fn order_of_data_has_no_zeros_and_ends_with_the_ram() {
    let (capture, _) = capture(100, WhenPoolFull::Wait);
    capture.add(SIZE - PAGE..SIZE);
    capture.add(5 * PAGE..6 * PAGE);
    capture.activate();
    let order = Order::new(&capture, SIZE);
    assert_eq!(
        order.data().collect::<Vec<_>>(),
        [5 * PAGE..6 * PAGE, SIZE - PAGE..SIZE]
    );
    let all = Order::new(&self::capture(1, WhenPoolFull::Wait).0, SIZE - PAGE);
    let chunk = capture.chunk_size();
    let zeros = [0..chunk, chunk..2 * chunk, 2 * chunk..SIZE - PAGE];
    assert_eq!(all.collect::<Vec<_>>(), zeros.map(PageRun::Zeros));
}

/// Faults and the sweep, which wait for each other's pages and for a pool of two pages.
#[test]
fn faults_and_the_sweep_copy_each_page_once() {
    let (capture, memory) = capture(2, WhenPoolFull::Wait);
    capture.add(0..SIZE);
    capture.activate();
    thread::scope(|scope| {
        for start in [0, 1] {
            let capture = &capture;
            scope.spawn(move || {
                for page in (start..PAGES).rev().step_by(2) {
                    save(capture, page..page + 1);
                }
            });
        }
        for run in Order::new(&capture, SIZE).data() {
            read(&capture, pages(&run)).unwrap();
        }
    });
    let mut copied = memory.copied.lock().unwrap().clone();
    copied.sort_unstable();
    assert!(copied.into_iter().eq(0..PAGES));
    assert!(capture.usage().peak <= 2);
    assert_eq!(capture.needed(0..SIZE).next(), None);
}

/// Eight pages are a block of zeros.
#[test]
fn blocks_of_zeros_are_freed() {
    let (capture, memory) = capture(4, WhenPoolFull::Wait);
    *memory.zeros.lock().unwrap() = 3..43;
    capture.add(PAGE..64 * PAGE);
    capture.activate();
    // Its bytes in memory may be newer than those in the pool.
    save(&capture, 17..18);
    let mut order = Order::new(&capture, SIZE).find_zeros();
    let chunk = capture.chunk_size();
    let of = |pages: Range<u64>| pages.start * PAGE..pages.end * PAGE;
    let expected = [
        PageRun::Zeros(of(0..1)),
        PageRun::Data(of(1..8)),
        PageRun::Zeros(of(8..16)),
        PageRun::Data(of(16..24)),
        PageRun::Zeros(of(24..40)),
        PageRun::Data(of(40..64)),
        PageRun::Zeros(of(64..chunk / PAGE)),
    ];
    for run in expected {
        assert_eq!(order.next(), Some(run));
    }
    // A write to a freed page is not copied.
    save(&capture, 8..9);
    assert_eq!(capture.usage().copied, 1);
    let needed: Vec<_> = capture.needed(0..SIZE).collect();
    assert_eq!(needed, [of(1..8), of(16..24), of(40..64)]);
}

#[test]
fn zeros_of_discarded_pages_are_not_freed() {
    let (capture, memory) = capture(4, WhenPoolFull::Wait);
    *memory.zeros.lock().unwrap() = 0..16;
    memory.open.lock().unwrap().push(9);
    capture.add(0..16 * PAGE);
    capture.activate();
    let mut order = Order::new(&capture, SIZE).find_zeros();
    assert_eq!(order.next(), Some(PageRun::Zeros(0..8 * PAGE)));
    assert_eq!(order.next(), Some(PageRun::Data(8 * PAGE..16 * PAGE)));
    let mut bytes = vec![0; 8 * PAGE as usize];
    let failure = capture.read(8 * PAGE, &mut bytes).unwrap_err();
    assert!(matches!(failure, Failure::Discarded { .. }), "{failure:?}");
}
