//! Starts a simulated guest whose pages come from a server that takes milliseconds for each reply,
//! and that loses a connection now and then.
//!
//! `cargo run -p ramsnap-lazy-restore --example own_source`

#[cfg(target_os = "linux")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    linux::run()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("LazyRam needs Linux: on this system a chain is mapped (MappedChain) or restored");
}

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::ops::{ControlFlow, Range};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use lazy_restore::{LazyRam, RamSegment, RamSource};
    use page_reader::PageReader;

    const RAM: u64 = 8 << 20;
    /// The server sends this many bytes in one reply.
    const REPLY: u64 = 32 << 10;

    /// A client of the simulated server.
    #[derive(Default)]
    struct Server {
        requests: AtomicU64,
    }

    impl Server {
        fn request(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            thread::sleep(Duration::from_millis(2));
            if self.requests.fetch_add(1, Ordering::Relaxed) % 10 == 9 {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            buf.fill((offset / REPLY) as u8);
            Ok(())
        }
    }

    impl PageReader for Server {
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            let mut at = offset;
            for piece in buf.chunks_mut(REPLY as usize) {
                // An error that is returned makes the page unreadable for good, so the source
                // repeats its requests itself.
                if self.request(at, piece).is_err() {
                    self.request(at, piece)?;
                }
                at += piece.len() as u64;
            }
            Ok(())
        }
    }

    impl RamSource for Server {
        fn ram_size(&self) -> u64 {
            RAM
        }

        /// One fault reads one reply.
        fn segment(&self, offset: u64, _: Range<u64>) -> RamSegment {
            let start = offset - offset % REPLY;
            RamSegment::stored(start..start + REPLY)
        }
    }

    pub(super) fn run() -> Result<(), Box<dyn std::error::Error>> {
        if let Err(error) = lazy_restore::available() {
            println!("not run: {error}");
            return Ok(());
        }
        let begun = Instant::now();
        let ram = LazyRam::options().start(Server::default())?;
        let mut byte = [0];
        ram.read_at(RAM / 2, &mut byte)?; // the guest runs
        println!("the first page after {:?}", begun.elapsed());
        assert_eq!(u64::from(byte[0]), RAM / 2 / REPLY % 256);

        ram.wait_with(&mut |progress| {
            println!("{} of {} KiB", progress.done >> 10, progress.total >> 10);
            ControlFlow::Continue(())
        })?;
        println!("all pages after {:?}", begun.elapsed());
        Ok(())
    }
}
