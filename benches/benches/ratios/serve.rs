//! The page server: how long a fault takes, and how soon a VM has all of its RAM.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use figures::report;
use lazy_restore::{PageServer, PageServerOptions, SizedReader, VmEnd};
use memory_image::{Chain, VerifiedChain};
use memory_writer::{Layout, MemoryWriter};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use page_client::{Client, Memory};
use page_reader::PageReader;

use crate::cases::{LIMIT, OURS};
use crate::{Comparison, bare, named, named_goals};

const PAGE: u64 = 4096;

/// The bytes that one checksum covers.
const CHUNK: u64 = 1 << 20;

const BARE: &str = "pread and UFFDIO_COPY";
const ON_DEMAND: &str = "on demand";

/// Steps between touched pages: more than one fault fills, so that each access faults.
const STEP: u64 = 17;

impl Comparison<'_> {
    /// Compares with a handler that does nothing but read and copy a page, and with reading the
    /// file.
    pub(crate) fn serve(&mut self) {
        let names = [
            "fault from the page cache, p50",
            "fault from the page cache, p99",
        ];
        let [fill, check] = ["fill all RAM of a VM", "first check, with a working set"];
        let first = "first access of a VM";
        let chunk = "first fault in a chunk, p50";
        let wanted = [names[0], names[1], fill, check, first, chunk];
        if !wanted.into_iter().any(|name| self.wants(name)) {
            return;
        }
        if File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")
            .is_err()
        {
            println!("not run: the page server, as /dev/userfaultfd cannot be opened");
            return;
        }
        let image = self.place.join("served.raw");
        write_image(&image, self.gib);
        let faults = (self.gib / PAGE / STEP).min(10_000);
        let mut times = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
        let mut fills = [Vec::new(), Vec::new()];
        let mut checks = [Vec::new(), Vec::new()];
        let on_demand = || PageServer::options().prefetch(false);
        for _ in 0..self.rounds {
            // Neither contender reads for the other.
            keep(&image);
            let measure = |client: &mut Client| client.measure(0, faults, STEP);
            let ours = self.served(&image, &on_demand(), measure);
            let bare = self.served_bare(&image, measure);
            for (number, found) in [ours, bare].into_iter().enumerate() {
                let [p50, p99] = percentiles(found);
                times[0][number].push(p50);
                times[1][number].push(p99);
            }
            forget(&image);
            fills[0].push(self.fill(&image));
            forget(&image);
            let started = Instant::now();
            bare::read(&image);
            fills[1].push(started.elapsed().as_secs_f64());
            for (number, found) in self.check(&image).into_iter().enumerate() {
                checks[number].push(found);
            }
        }
        let [p50, p99] = times;
        for (name, seconds, goal) in [(names[0], p50, 0.5), (names[1], p99, 0.5)] {
            self.compared(name, PAGE, [OURS, BARE], seconds, &[(BARE, goal)]);
        }
        let gib = self.gib;
        self.compared(fill, gib, [OURS, LIMIT], fills, &[(LIMIT, 0.9)]);
        self.compared(check, gib, [OURS, ON_DEMAND], checks, &[(ON_DEMAND, 3.0)]);
        let sizes = [gib, 64 * gib].map(|size| {
            let seconds = self.first_access(size);
            format!("{:.2} ms for {} MiB", seconds * 1e3, size >> 20)
        });
        self.figure(first, sizes.join(", "), "10 ms");
        std::fs::remove_file(&image).unwrap();
        let [chunk_first, chunk_later] = self.chunks().map(|seconds| seconds * 1e3);
        let text = format!("{chunk_first:.3} ms, {chunk_later:.3} ms for a later one");
        self.figure(chunk, text, "none");
    }

    /// Returns the median times in seconds of the first fault in a chunk of a sealed image, and of
    /// a later one. The image is in the page cache.
    fn chunks(&self) -> [f64; 2] {
        let path = self.place.join("served.mem");
        let ram = vec![0x5a; CHUNK as usize];
        let ram = Repeated(&ram);
        let mut writer = MemoryWriter::options()
            .layout(Layout::Sealed)
            .open(&path, self.gib, PAGE)
            .unwrap();
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        let chain = VerifiedChain::new(Chain::open(&path, PAGE).unwrap());
        let options = PageServer::options().prefetch(false);
        let server = options.source(chain).unwrap();
        let mut client = mapped(server.ram_size());
        let (listener, socket) = self.listener();
        client.connect(&socket);
        let _vm = server.serve(listener.accept().unwrap().0).unwrap();
        let (chunks, step) = (self.gib / CHUNK, CHUNK / PAGE);
        // The middle of each chunk: a page that no fault of the first round has filled.
        let later = step / 2;
        let times = [0, later].map(|first| percentiles(client.measure(first, chunks, step))[0]);
        std::fs::remove_file(&path).unwrap();
        times
    }

    fn compared(
        &mut self,
        name: &str,
        bytes: u64,
        names: [&str; 2],
        seconds: [Vec<f64>; 2],
        goals: &[(&str, f64)],
    ) {
        self.record(report::Case {
            name: name.into(),
            group: "serve".into(),
            bytes,
            contenders: named(names.into_iter(), seconds.into()),
            goals: named_goals(goals),
        });
    }

    fn listener(&self) -> (UnixListener, PathBuf) {
        let path = self.place.join("pages.sock");
        let _ = std::fs::remove_file(&path);
        (UnixListener::bind(&path).unwrap(), path)
    }

    /// Serves a client from the image, and returns what `work` does with it.
    fn served<T>(
        &self,
        image: &Path,
        options: &PageServerOptions,
        work: impl FnOnce(&mut Client) -> T,
    ) -> T {
        let chain = VerifiedChain::new(Chain::open_raw(image, PAGE).unwrap());
        let server = options.source(chain).unwrap();
        let mut client = mapped(server.ram_size());
        let (listener, socket) = self.listener();
        client.connect(&socket);
        let _vm = server.serve(listener.accept().unwrap().0).unwrap();
        work(&mut client)
    }

    fn served_bare<T>(&self, image: &Path, work: impl FnOnce(&mut Client) -> T) -> T {
        let file = File::open(image).unwrap();
        let (listener, socket) = self.listener();
        let mut client = mapped(file.metadata().unwrap().len());
        thread::scope(|scope| {
            scope.spawn(|| page_client::serve_bare(&listener, &file));
            client.connect(&socket);
            let result = work(&mut client);
            client.disconnect();
            result
        })
    }

    /// Returns the seconds until all RAM of a VM is filled.
    fn fill(&self, image: &Path) -> f64 {
        let chain = VerifiedChain::new(Chain::open_raw(image, PAGE).unwrap());
        let server = PageServer::options().source(chain).unwrap();
        let mut client = mapped(server.ram_size());
        let (listener, socket) = self.listener();
        let started = Instant::now();
        client.connect(&socket);
        let vm = server.serve(listener.accept().unwrap().0).unwrap();
        assert!(matches!(vm.wait(), VmEnd::Filled));
        started.elapsed().as_secs_f64()
    }

    /// Returns the seconds until a VM has touched some pages of an image that is not in the page
    /// cache: with a working set of them, and on demand.
    fn check(&self, image: &Path) -> [f64; 2] {
        let pages = (self.gib / PAGE / 64).min(2_000);
        let work = |client: &mut Client| {
            let started = Instant::now();
            client.measure(5, pages, 61);
            started.elapsed().as_secs_f64()
        };
        let recorded = {
            let chain = Chain::open_raw(image, PAGE).unwrap();
            let server = PageServer::options().record(true).source(chain).unwrap();
            let mut client = mapped(server.ram_size());
            let (listener, socket) = self.listener();
            client.connect(&socket);
            let vm = server.serve(listener.accept().unwrap().0).unwrap();
            work(&mut client);
            vm.recorded().unwrap()
        };
        forget(image);
        let with_set = PageServer::options().working_set(recorded);
        let ours = self.served(image, &with_set, work);
        forget(image);
        let on_demand = self.served(image, &PageServer::options().prefetch(false), work);
        [ours, on_demand]
    }

    /// Returns the seconds from the connection of a VM to its first access, for RAM of this size.
    fn first_access(&self, ram_size: u64) -> f64 {
        let source = SizedReader::new(vec![7; PAGE as usize], ram_size);
        let server = PageServer::options()
            .prefetch(false)
            .source(source)
            .unwrap();
        let mut client = mapped(ram_size);
        let (listener, socket) = self.listener();
        let started = Instant::now();
        client.connect(&socket);
        let _vm = server.serve(listener.accept().unwrap().0).unwrap();
        client.measure(0, 1, 1);
        started.elapsed().as_secs_f64()
    }
}

/// RAM of any size that repeats these bytes, of which requests are aligned parts.
struct Repeated<'b>(&'b [u8]);

impl PageReader for Repeated<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        for (at, byte) in (offset..).zip(buf) {
            *byte = self.0[at as usize % self.0.len()];
        }
        Ok(())
    }
}

fn mapped(ram_size: u64) -> Client {
    let mut client = Client::spawn("page_client");
    client.map(&Memory::private([ram_size]));
    client
}

/// Writes bytes without zeros, and leaves them in the page cache.
fn write_image(path: &Path, len: u64) {
    let mut file = File::create(path).unwrap();
    let piece = vec![0x5a; 1 << 20];
    for _ in 0..len >> 20 {
        file.write_all(&piece).unwrap();
    }
    file.sync_all().unwrap();
}

/// Reads a file into the page cache.
fn keep(path: &Path) {
    std::io::copy(&mut File::open(path).unwrap(), &mut std::io::sink()).unwrap();
}

/// Removes a file from the page cache.
fn forget(path: &Path) {
    let file = File::open(path).unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Returns the median and the 99th percentile in seconds.
fn percentiles(mut nanos: Vec<u64>) -> [f64; 2] {
    nanos.sort_unstable();
    [50, 99].map(|percent| nanos[nanos.len() * percent / 100] as f64 / 1e9)
}
