//! The parameters of zstd, which bound the memory of a sender and a receiver.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use zstd::stream::write::Encoder;
use zstd::zstd_safe::CParameter;

/// The largest window of a stream that is received, 8 MiB.
pub(super) const WINDOW_LOG: u32 = 23;
/// The default level of zstd, which is about as fast as a network.
const LEVEL: i32 = 3;
/// The window of a stream that is sent, 1 MiB.
const SENT_WINDOW_LOG: u32 = 20;
/// Bytes that one thread compresses at a time.
const JOB: u32 = 1 << 20;
/// The largest number of threads that compress. With the window and the jobs, it bounds the memory
/// of zstd: for each thread, the input and output of two jobs, and the tables.
const MOST_THREADS: usize = 4;

/// Returns a compressor of `len` bytes, whose memory has a bound that neither the image nor the
/// number of CPUs changes.
pub(super) fn encoder<W: Write>(to: W, len: u64, cpus: usize) -> io::Result<Encoder<'static, W>> {
    let mut stream = Encoder::new(to, LEVEL)?;
    stream.include_checksum(true)?;
    stream.set_pledged_src_size(Some(len))?;
    for parameter in parameters(cpus) {
        stream.set_parameter(parameter)?;
    }
    Ok(stream)
}

fn parameters(cpus: usize) -> Vec<CParameter> {
    let threads = cpus.clamp(1, MOST_THREADS);
    let mut parameters = vec![CParameter::WindowLog(SENT_WINDOW_LOG)];
    // The library starts its threads first, and fails if it cannot.
    if can_start(threads + 1) {
        parameters.push(CParameter::NbWorkers(threads as u32));
        parameters.push(CParameter::JobSize(JOB));
    }
    parameters
}

/// Returns whether this process can start so many more threads at once.
fn can_start(threads: usize) -> bool {
    let (release, wait) = mpsc::channel::<()>();
    let wait = &Mutex::new(wait);
    thread::scope(move |scope| {
        let stand_by = move || {
            let wait = wait.lock().unwrap_or_else(PoisonError::into_inner);
            // Until the other end is dropped.
            let _ = wait.recv();
        };
        let start = |_| thread::Builder::new().spawn_scoped(scope, stand_by).is_ok();
        let all = (0..threads).all(start);
        drop(release);
        all
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::one_cpu(1, 1)]
    #[case::as_many_as_threads(4, 4)]
    #[case::more_than_threads(5, 4)]
    #[case::many(1024, 4)]
    fn the_memory_to_send_does_not_grow_with_the_cpus(#[case] cpus: usize, #[case] threads: u32) {
        let sent = parameters(cpus);
        let memory = |parameter: &CParameter| match parameter {
            CParameter::WindowLog(log) => (0, 1 << log, 0),
            CParameter::JobSize(bytes) => (0, 0, *bytes),
            CParameter::NbWorkers(count) => (*count, 0, 0),
            other => panic!("{other:?}"),
        };
        let found = sent.iter().map(memory).fold((0, 0, 0), |sum, one| {
            (sum.0 + one.0, sum.1 + one.1, sum.2 + one.2)
        });
        assert_eq!(found, (threads, 1 << 20, 1 << 20));
        // The parameters are valid, and a receiver has the window.
        const { assert!(SENT_WINDOW_LOG <= WINDOW_LOG) };
        encoder(io::sink(), 0, cpus).unwrap().finish().unwrap();
    }
}
