//! A work queue that several threads empty.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::thread;

use host_memory::BlockedSignals;

/// More threads increase neither the throughput of a device nor that of the memory.
const MAX_THREADS: usize = 8;

/// Calls `work` for each of `items` on at most `max_threads` threads, and `record` for each result,
/// one at a time, until it fails. The number of threads is the number of processors, at most 8.
///
/// Each thread passes `work` a buffer of its own.
///
/// # Errors
/// Returns the first error of `record`. Results that come after it are dropped.
pub(crate) fn for_each<T, B: Default, R, E: Send>(
    max_threads: usize,
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(T, &mut B) -> R + Sync,
    record: impl FnMut(R) -> Result<(), E> + Send,
) -> Result<(), E> {
    let items = Mutex::new(items);
    let state = Mutex::new((record, None));
    let empty_queue = || {
        let mut buffer = B::default();
        loop {
            let next = items.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(item) = next else { return };
            let result = work(item, &mut buffer);
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let (record, failed) = &mut *state;
            if failed.is_none() {
                *failed = record(result).err();
            }
            if failed.is_some() {
                return;
            }
        }
    };
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    thread::scope(|scope| {
        // A handler may access a page that one of the threads is to provide.
        let blocked = BlockedSignals::new();
        for _ in 1..processors.min(MAX_THREADS).min(max_threads) {
            // With fewer threads the work only takes longer.
            let _ = thread::Builder::new().spawn_scoped(scope, empty_queue);
        }
        drop(blocked);
        empty_queue();
    });
    let (_, failed) = state.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_and_recorded_once() {
        let mut recorded = Vec::new();
        let done = for_each(
            usize::MAX,
            0..1000_u64,
            |item, _: &mut ()| item * item,
            |result| {
                recorded.push(result);
                Ok::<_, ()>(())
            },
        );
        done.unwrap();
        recorded.sort_unstable();
        assert!(recorded.into_iter().eq((0..1000).map(|item| item * item)));
    }

    /// A handler could access memory that such a thread is to provide.
    #[test]
    #[cfg(target_os = "linux")]
    fn only_the_calling_thread_handles_signals() {
        let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let all = std::sync::Barrier::new(processors.min(2));
        let caller = thread::current().id();
        let done = for_each(
            2,
            0..2,
            |_, _: &mut ()| {
                // Each of two threads gets one item.
                all.wait();
                if thread::current().id() != caller {
                    test_machine::assert_this_thread_handles_no_signals();
                }
            },
            Ok::<_, ()>,
        );
        done.unwrap();
    }

    #[test]
    fn nothing_is_recorded_after_the_first_error() {
        let mut recorded = 0;
        let done = for_each(
            usize::MAX,
            0..,
            |_: u64, _: &mut ()| (),
            |()| {
                recorded += 1;
                if recorded == 10 {
                    Err("enough")
                } else {
                    Ok(())
                }
            },
        );
        assert_eq!((done, recorded), (Err("enough"), 10));
    }

    #[test]
    fn buffer_is_kept_between_the_items_of_a_thread() {
        let mut most = 0;
        let done = for_each(
            1,
            0..5,
            |_, uses: &mut u32| {
                *uses += 1;
                *uses
            },
            |uses| {
                most = uses;
                Ok::<_, ()>(())
            },
        );
        assert_eq!((done, most), (Ok(()), 5));
    }
}
