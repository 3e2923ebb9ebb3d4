//! Tests of the pool.

use std::thread;

use super::*;

const PAGE: usize = 64;

fn pool(limit: usize, when_full: WhenPoolFull) -> Pool {
    Pool::new(PAGE, limit, 100, when_full)
}

fn put(pool: &Pool, page: u64) {
    let mut buffer = pool.take().unwrap();
    buffer.sized(PAGE).fill(page as u8);
    pool.put(page, page / 10, buffer);
}

#[track_caller]
fn assert_reads(pool: &Pool, page: u64, from: usize, len: usize, remove: bool) {
    let mut bytes = vec![0xee; len];
    assert!(pool.read(page, from, &mut bytes, remove));
    assert!(bytes.iter().all(|byte| u64::from(*byte) == page));
}

#[test]
fn pages_are_read_in_parts_and_removed_once() {
    let pool = pool(4, WhenPoolFull::Cancel);
    put(&pool, 5);
    put(&pool, 15);
    assert_reads(&pool, 5, 0, 10, false);
    assert_reads(&pool, 5, 10, PAGE - 10, true);
    assert!(!pool.read(5, 0, &mut [0; 1], true));
    assert_reads(&pool, 15, 0, PAGE, true);
    let usage = pool.usage();
    assert_eq!((usage.copied, usage.peak, usage.waits), (2, 2, 0));
}

#[test]
fn removed_pages_make_room() {
    let pool = pool(2, WhenPoolFull::Cancel);
    put(&pool, 1);
    put(&pool, 2);
    assert_eq!(pool.take().unwrap_err(), NoBuffer::Full);
    assert_reads(&pool, 1, 0, PAGE, true);
    put(&pool, 3);
    assert_eq!(pool.take().unwrap_err(), NoBuffer::Full);
    assert_reads(&pool, 2, 0, PAGE, true);
    let unused = pool.take().unwrap();
    assert_eq!(pool.take().unwrap_err(), NoBuffer::Full);
    pool.give_back(unused);
    put(&pool, 4);
    assert_eq!(pool.usage().peak, 2);
    assert_eq!(pool.usage().copied, 4);
}

#[test]
fn chunks_are_listed_once_in_the_order_of_their_first_page() {
    let pool = pool(10, WhenPoolFull::Wait);
    assert_eq!(pool.next_chunk(), None);
    for page in [70, 999, 71, 0] {
        put(&pool, page);
    }
    assert_eq!(pool.next_chunk(), Some(7));
    put(&pool, 72);
    assert!(pool.list(50));
    assert!(!pool.list(50) && !pool.list(7));
    put(&pool, 500);
    assert_eq!(pool.next_chunk(), Some(99));
    assert_eq!(pool.next_chunk(), Some(0));
    assert_eq!(pool.next_chunk(), None);
}

/// Waits until a thread waits for room.
fn wait_for_waits(pool: &Pool, waits: u64) {
    while pool.usage().waits < waits {
        thread::yield_now();
    }
}

#[test]
fn full_pool_is_waited_for() {
    for when_full in [WhenPoolFull::Wait, WhenPoolFull::Throttle] {
        let pool = pool(2, when_full);
        put(&pool, 1);
        put(&pool, 2);
        thread::scope(|scope| {
            let waiting = [scope.spawn(|| put(&pool, 3)), scope.spawn(|| put(&pool, 4))];
            wait_for_waits(&pool, 2);
            assert_eq!(pool.usage().copied, 2);
            assert_reads(&pool, 1, 0, PAGE, true);
            // A buffer that was not used makes room too.
            assert_reads(&pool, 2, 0, PAGE, true);
            let _ = waiting.map(|one| one.join().unwrap());
        });
        assert_reads(&pool, 3, 0, PAGE, true);
        let usage = pool.usage();
        assert_eq!((usage.copied, usage.peak, usage.waits), (4, 2, 2));
        assert!(usage.waited > Duration::ZERO);
    }
}

#[test]
fn unused_buffer_wakes_a_waiting_thread() {
    let pool = pool(1, WhenPoolFull::Wait);
    let unused = pool.take().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| put(&pool, 3));
        wait_for_waits(&pool, 1);
        pool.give_back(unused);
        waiting.join().unwrap();
    });
}

#[test]
fn end_wakes_all_threads_and_wipes_the_pages() {
    let pool = pool(1, WhenPoolFull::Wait);
    put(&pool, 1);
    thread::scope(|scope| {
        let waiting: [_; 3] = std::array::from_fn(|_| scope.spawn(|| pool.take().map(drop)));
        wait_for_waits(&pool, 3);
        pool.end();
        for one in waiting {
            assert_eq!(one.join().unwrap(), Err(NoBuffer::Ended));
        }
    });
    assert!(!pool.read(1, 0, &mut [0; 1], false));
    assert_eq!(pool.take().map(drop), Err(NoBuffer::Ended));
}

#[test]
fn delay_grows_from_half_of_the_pool_on() {
    let pool = pool(10, WhenPoolFull::Throttle);
    for used in 0..=5 {
        assert_eq!(pool.delay(used), Duration::ZERO, "{used}");
    }
    assert_eq!(pool.delay(6), MAX_DELAY / 5);
    assert_eq!(pool.delay(10), MAX_DELAY);
    // A pool of one page has no half.
    let one = self::pool(1, WhenPoolFull::Throttle);
    assert_eq!((one.delay(0), one.delay(1)), (Duration::ZERO, MAX_DELAY));
}

#[test]
fn only_throttled_writes_are_delayed() {
    for (when_full, is_delayed) in [(WhenPoolFull::Wait, false), (WhenPoolFull::Throttle, true)] {
        let pool = pool(4, when_full);
        for page in 0..4 {
            put(&pool, page);
        }
        assert_eq!(pool.usage().waits, 0);
        // The delays for 2 and 3 pages are 0 and a half of the longest.
        let expected = if is_delayed {
            MAX_DELAY / 2
        } else {
            Duration::ZERO
        };
        assert_eq!(pool.usage().waited, expected);
    }
}
