//! Injects rare completions between a pipeline and real queues that write to a real file.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::thread;

use rstest::rstest;

use super::super::chunks::Chunks;
use super::super::error::refused;
use super::super::target::Target;
use super::super::threads::Pool;
use super::super::uring::Ring;
use super::*;

#[derive(Clone, Copy, Debug)]
enum EngineKind {
    Ring,
    Threads,
}

/// The injected result of a request.
#[derive(Clone, Copy, Debug)]
enum Completion {
    Whole,
    /// Only this number of bytes is written.
    Short(usize),
    /// Nothing is written.
    Error(i32),
}

/// A log of the requests in flight.
#[derive(Debug, Default)]
struct Log {
    submitted: usize,
    in_flight: Vec<Range<u64>>,
    copied: usize,
    most: usize,
    most_bytes: u64,
    most_copied: usize,
}

/// A queue that follows `script`, and then forwards to `real`. Scripted completions are returned
/// last, or once there are three of them.
struct Scripted<'t, 'm, Q> {
    real: Q,
    file: &'t std::fs::File,
    script: VecDeque<Completion>,
    decided: VecDeque<(Request<'m>, io::Result<usize>)>,
    log: &'t RefCell<Log>,
}

fn range(request: &Request<'_>) -> Range<u64> {
    request.offset..request.offset + request.memory().len() as u64
}

fn copied(request: &Request<'_>) -> usize {
    match &request.bytes {
        Bytes::Source(_) => 0,
        Bytes::Copy { .. } => 1,
    }
}

impl<'m, Q: Queue<'m>> Queue<'m> for Scripted<'_, 'm, Q> {
    const DEPTH: usize = Q::DEPTH;
    const MIN_LEN: u64 = 0;

    fn submit(&mut self, request: Request<'m>) {
        let mut log = self.log.borrow_mut();
        let blocks = range(&request);
        let meets = |other: &Range<u64>| other.start < blocks.end && blocks.start < other.end;
        assert!(
            !log.in_flight.iter().any(meets),
            "{blocks:?} twice: {log:?}"
        );
        log.in_flight.push(blocks);
        log.submitted += 1;
        log.copied += copied(&request);
        log.most = log.most.max(log.in_flight.len());
        log.most_copied = log.most_copied.max(log.copied);
        let bytes = log.in_flight.iter().map(|one| one.end - one.start).sum();
        log.most_bytes = log.most_bytes.max(bytes);
        let result = match self.script.pop_front() {
            None | Some(Completion::Whole) => return self.real.submit(request),
            Some(Completion::Short(len)) => {
                let part = request.memory().first(len);
                part.write_at(self.file, request.offset)
            }
            Some(Completion::Error(errno)) => Err(io::Error::from_raw_os_error(errno)),
        };
        self.decided.push_back((request, result));
    }

    fn complete(&mut self) -> Option<(Request<'m>, io::Result<usize>)> {
        let done = match self.decided.len() {
            3.. => self.decided.pop_front(),
            _ => self.real.complete().or_else(|| self.decided.pop_front()),
        }?;
        let mut log = self.log.borrow_mut();
        log.in_flight.retain(|one| one.start != done.0.offset);
        log.copied -= copied(&done.0);
        Some(done)
    }
}

const CHUNK: usize = 16 << 10;

/// Returns bytes of which none is zero. All chunks differ.
fn ram(len: usize) -> AlignedBuffer {
    let mut ram = AlignedBuffer::new(len);
    for (at, byte) in ram.bytes_mut().iter_mut().enumerate() {
        *byte = (at.wrapping_mul(31) ^ (at >> 12).wrapping_mul(97)) as u8 | 1;
    }
    ram
}

/// A source that must be copied.
struct Copied<'a>(&'a [u8]);

impl RunSource for Copied<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }
}

fn through<S: RunSource + ?Sized>(
    kind: EngineKind,
    script: &[Completion],
    runs: &[Range<u64>],
    chunk_size: usize,
    source: &S,
) -> (Vec<u8>, Result<u64, WriteError>, Log) {
    let file = tempfile::tempfile().expect("temporary file");
    let target = Target::of(&file).expect("a target");
    let log = RefCell::default();
    let mut report = |_| ControlFlow::Continue(());
    let job = Job {
        file: &file,
        limit: SizeLimit::of(&file).expect("limit"),
        chunks: Chunks::new(runs.iter().cloned(), chunk_size),
        chunk_size,
        source,
        progress: Progress::new(&mut report),
    };
    macro_rules! scripted {
        ($real:expr) => {
            Scripted {
                real: $real,
                file: &file,
                script: script.iter().copied().collect(),
                decided: VecDeque::new(),
                log: &log,
            }
        };
    }
    let result = match kind {
        EngineKind::Ring => {
            let ring = Ring::new(&target.file).expect("a ring");
            super::write(scripted!(ring), target.alignment, job)
        }
        EngineKind::Threads => thread::scope(|scope| {
            let pool = Pool::start(scope, &target.file).expect("threads");
            super::write(scripted!(pool), target.alignment, job)
        }),
    };
    let mut stored = vec![0; file.metadata().expect("metadata").len() as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut stored, 0).expect("read");
    (stored, result, log.into_inner())
}

const LEN: usize = 40 * CHUNK;

#[rstest]
#[case::short(&[Completion::Short(1), Completion::Short(4096), Completion::Whole, Completion::Short(CHUNK - 1)])]
#[case::nothing_written(&[Completion::Short(0), Completion::Whole, Completion::Short(0)])]
#[case::interrupted(&[Completion::Error(libc::EINTR), Completion::Whole, Completion::Error(libc::EINTR)])]
#[case::cancelled_by_the_kernel(&[Completion::Error(libc::ECANCELED)])]
#[case::not_ready(&[Completion::Error(libc::EAGAIN), Completion::Error(libc::EAGAIN)])]
#[case::refused_by_the_file_system(&[Completion::Whole, Completion::Error(libc::EINVAL), Completion::Error(libc::EOPNOTSUPP)])]
#[case::unreadable_for_direct_io(&[Completion::Error(libc::EFAULT)])]
fn rest_of_an_incomplete_request_is_written(
    #[values(EngineKind::Ring, EngineKind::Threads)] kind: EngineKind,
    #[case] script: &[Completion],
    #[values(true, false)] in_place: bool,
) {
    let mut ram = ram(LEN);
    let ram = &ram.bytes_mut()[..LEN];
    let all = [0..LEN as u64];
    let (stored, result, log) = match in_place {
        true => through(kind, script, &all, CHUNK, ram),
        false => through(kind, script, &all, CHUNK, &Copied(ram)),
    };
    assert_eq!(result.expect("written"), LEN as u64);
    assert!(stored == ram);
    assert_eq!(log.submitted, LEN / CHUNK);
}

#[rstest]
fn lowest_failure_in_flight_is_reported(
    #[values(EngineKind::Ring, EngineKind::Threads)] kind: EngineKind,
    #[values(libc::ENOSPC, libc::EDQUOT, libc::EIO, libc::EFBIG)] errno: i32,
) {
    let mut ram = ram(160 * CHUNK);
    let ram = &ram.bytes_mut()[..160 * CHUNK];
    // The end first, so that the first failure, chunk 153, does not have the lowest offset.
    let (middle, end) = (150 * CHUNK as u64, 160 * CHUNK as u64);
    let runs = [middle..end, 0..middle];
    let mut script = [Completion::Whole; 16];
    for failing in [3, 12, 15] {
        script[failing] = Completion::Error(errno);
    }
    let (stored, result, log) = through(kind, &script, &runs, CHUNK, ram);
    let (offset, len, source) = refused(result);
    assert_eq!(source.raw_os_error(), Some(errno));
    assert_eq!((offset, len), (2 * CHUNK as u64, CHUNK));
    assert!(log.in_flight.is_empty() && log.submitted < 100, "{log:?}");
    // Requests in flight were written, each byte once.
    let written = stored.iter().filter(|byte| **byte != 0).count();
    assert_eq!(written, (log.submitted - 3) * CHUNK);
}

/// Fails every completion of a write of eight requests once, in every possible kind.
#[rstest]
fn any_failed_completion_is_never_counted_as_written(
    #[values(EngineKind::Ring, EngineKind::Threads)] kind: EngineKind,
    #[values(true, false)] in_place: bool,
) {
    use libc::{
        EAGAIN, ECANCELED, EDQUOT, EFAULT, EFBIG, EINTR, EINVAL, EIO, ENOSPC, ENOSYS, ENOTTY,
        EOPNOTSUPP, ESTALE,
    };
    const REQUESTS: usize = 8;
    const SECTOR: usize = 512;
    const LEN: usize = REQUESTS * CHUNK;
    let mut ram = ram(LEN);
    let ram = &ram.bytes_mut()[..LEN];
    let at = |number: usize, step| {
        let mut script = vec![Completion::Whole; number];
        script.push(step);
        let all = [0..LEN as u64];
        match in_place {
            true => through(kind, &script, &all, CHUNK, ram),
            false => through(kind, &script, &all, CHUNK, &Copied(ram)),
        }
    };
    let retried = [EINTR, EAGAIN, ECANCELED, EFAULT].map(Completion::Error);
    let unsupported = [EINVAL, EOPNOTSUPP, ENOSYS, ENOTTY].map(Completion::Error);
    let short = (0..CHUNK).step_by(SECTOR).map(Completion::Short);
    let odd = [1, SECTOR - 1, CHUNK - 1].map(Completion::Short);
    let recoverable: Vec<_> = retried
        .into_iter()
        .chain(unsupported)
        .chain(short)
        .chain(odd)
        .collect();
    for number in 0..REQUESTS {
        for step in &recoverable {
            let (stored, result, _) = at(number, *step);
            assert_eq!(result.expect("written"), LEN as u64, "{number}: {step:?}");
            assert!(stored == ram, "{number}: {step:?}");
        }
        for errno in [EIO, ENOSPC, EDQUOT, ESTALE, EFBIG] {
            let (stored, result, log) = at(number, Completion::Error(errno));
            let offset = number * CHUNK;
            let (at, len, source) = refused(result);
            assert_eq!(source.raw_os_error(), Some(errno));
            assert_eq!((at, len), (offset as u64, CHUNK), "{number}, {errno}");
            assert!(log.in_flight.is_empty(), "{number}, {errno}: {log:?}");
            assert!(stored[..offset] == ram[..offset], "{number}, {errno}");
        }
    }
}

/// [`Scripted`] checks each request against those in flight.
#[rstest]
fn writes_to_one_block_are_never_in_flight_together(
    #[values(EngineKind::Ring, EngineKind::Threads)] kind: EngineKind,
) {
    let mut ram = ram(LEN);
    let ram = &ram.bytes_mut()[..LEN];
    let runs: Vec<_> = (0..200u64)
        .map(|n| n * 7919 % (LEN as u64 - 9000))
        .map(|start| start..start + 9000)
        .chain([0..LEN as u64, 0..LEN as u64])
        .collect();
    let (stored, result, _) = through(kind, &[], &runs, CHUNK, ram);
    result.expect("written");
    assert!(stored == ram);
}

#[rstest]
fn requests_in_flight_are_bounded(
    #[values(EngineKind::Ring, EngineKind::Threads)] kind: EngineKind,
) {
    let mut ram = ram(64 << 20);
    let ram = &ram.bytes_mut()[..64 << 20];
    let (stored, result, log) = through(kind, &[], &[0..64 << 20], 64 << 20, ram);
    result.expect("written");
    assert!(stored == ram);
    assert!(log.most > 1 && log.most_bytes <= IN_FLIGHT, "{log:?}");
    let (stored, result, log) = through(kind, &[], &[0..64 << 20], 1 << 20, &Copied(ram));
    result.expect("written");
    assert!(stored == ram);
    let buffers = log.most_copied * (REQUEST + AlignedBuffer::ALIGNMENT);
    assert!(log.most_copied > 1 && buffers <= BUFFERS, "{log:?}");
}
