//! Keeps requests in flight in threads, one `pwrite(2)` each.

use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Builder, Scope};

use host_memory::BlockedSignals;

use super::error::{WriteError, unavailable};
use super::job::{Job, Pieces};
use super::options::Engine;
use super::pipeline::{self, Queue, Request};
use super::source::RunSource;
use super::target::Target;

const THREADS: usize = 8;
/// Stack size of a thread, which only makes system calls.
const STACK: usize = 64 << 10;

pub(super) fn write<I: Pieces, S: RunSource + ?Sized>(
    job: Job<'_, '_, I, S>,
) -> Result<u64, WriteError> {
    let target = Target::of(job.file).map_err(unavailable(Engine::Threads))?;
    thread::scope(|scope| {
        let pool = Pool::start(scope, &target.file).map_err(unavailable(Engine::Threads))?;
        pipeline::write(pool, target.alignment, job)
    })
}

type Done<'m> = (Request<'m>, io::Result<usize>);

/// Threads of one scope. They exit after the pool is dropped and its requests are written.
pub(super) struct Pool<'m> {
    todo: Sender<Request<'m>>,
    done: Receiver<Done<'m>>,
    in_flight: usize,
}

impl<'m> Pool<'m> {
    /// Starts the threads.
    ///
    /// # Errors
    /// `EAGAIN` if the process cannot create a single thread.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, 'm>,
        file: &'m File,
    ) -> io::Result<Self> {
        let (todo, to_write) = channel::<Request<'m>>();
        let (written, done) = channel();
        let to_write = Arc::new(Mutex::new(to_write));
        let _blocked = BlockedSignals::new();
        for started in 0..THREADS {
            let (to_write, written) = (Arc::clone(&to_write), written.clone());
            let spawned = Builder::new()
                .name("sparse-file".into())
                .stack_size(STACK)
                .spawn_scoped(scope, move || work(file, &to_write, &written));
            match spawned {
                Ok(_) => {}
                Err(error) if started == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(Self {
            todo,
            done,
            in_flight: 0,
        })
    }
}

fn work<'m>(file: &File, todo: &Mutex<Receiver<Request<'m>>>, done: &Sender<Done<'m>>) {
    loop {
        let next = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(request) = next else { return };
        let result = request.memory().write_at(file, request.offset());
        // The receiver is gone only if the caller is unwinding.
        let _ = done.send((request, result));
    }
}

impl<'m> Queue<'m> for Pool<'m> {
    const DEPTH: usize = 2 * THREADS;
    /// ext4 locks a file while a direct `pwrite` fills a hole, so that threads wait for each other:
    /// scattered runs of 16 to 128 KiB took 1.5 to 4 times as long as through the page cache. (The
    /// requests of a ring release the lock at once.)
    const MIN_LEN: u64 = 256 << 10;

    fn submit(&mut self, request: Request<'m>) {
        self.todo.send(request).expect("threads wait for requests");
        self.in_flight += 1;
    }

    fn complete(&mut self) -> Option<Done<'m>> {
        self.in_flight = self.in_flight.checked_sub(1)?;
        Some(self.done.recv().expect("a thread answers each request"))
    }
}
