//! The comparison: every contender by turns, so that a busy moment is everybody's, and the medians' ratios. `cargo xtask bench` runs it.
//!
//! Under `cargo bench -- --test` it does everything once and small.

#![allow(
    unreachable_pub,
    reason = "what a benchmark shares with another is in a module"
)]

mod cases;

use std::fs;
use std::hint::black_box;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use benches::report::{self, Report};
use benches::{Random, place, place_in};
use cases::ram::{Content, Ram};
use cases::{Case, Dirty, LIMIT, OURS, Pattern, SQUIB, diff, full, recycled};
use clap::Parser;
use dirty_bitmap::DirtyBitmap;
use memory_writer::MemoryWriter;
use page_reader::{GuestMemoryReader, HostMemory, PageReader};
use vm_memory::GuestMemoryMmap;

/// Compare with the peers and the limit
#[derive(Parser)]
struct Arguments {
    /// The directory to write to: chooses the file system [default: target/, or MEMSNAP_BENCH_DIR]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// How often each contender runs, at least 5
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Write what was found to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only the cases whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Everything once and small
    #[arg(long)]
    test: bool,
    /// What cargo says
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let (place, file_system) = match &arguments.dir {
        Some(dir) => place_in(dir)?,
        None => place()?,
    };
    let mut comparison = Comparison {
        place: place.path(),
        gib: if arguments.test { 1 << 24 } else { 1 << 30 },
        rounds: if arguments.test {
            1
        } else {
            arguments.rounds.max(5)
        },
        only: &arguments.only,
        trying: arguments.test,
        report: Report::default(),
    };
    comparison.report.rounds = comparison.rounds;
    comparison.report.machine = machine(&file_system);
    comparison.full();
    comparison.diff();
    comparison.bitmap();
    comparison.memory();
    comparison.growth();
    if let Some(path) = &arguments.json {
        let json = serde_json::to_string_pretty(&comparison.report)?;
        fs::write(path, json).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(())
}

fn machine(file_system: &str) -> Vec<(String, String)> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown", |line| line.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    vec![
        ("processor".into(), format!("{model}, {cores} cores")),
        ("kernel".into(), format!("Linux {}", kernel.trim())),
        ("file system".into(), file_system.into()),
    ]
}

struct Comparison<'a> {
    place: &'a Path,
    gib: u64,
    rounds: usize,
    only: &'a str,
    /// Once and small: what is measured then says nothing.
    trying: bool,
    report: Report,
}

impl Comparison<'_> {
    fn wants(&self, name: &str) -> bool {
        name.contains(self.only)
    }

    fn full(&mut self) {
        let gib = self.gib;
        let ram = |content| Ram::new(gib, content);
        let skip_zeros = || MemoryWriter::options().skip_zeros(true);
        let skip_untouched = || {
            MemoryWriter::options()
                .skip_zeros(true)
                .skip_untouched(true)
        };
        // Little memory at a time, as a monitor has it: looking for what is untouched takes a walk of it all. Here the others touch all of theirs by reading it.
        {
            let (alone, read) = (ram(Content::Untouched(95)), ram(Content::Untouched(95)));
            let name = "full 1 GiB, 95 % never touched, not read";
            let mut case = skipping(&read, name, skip_untouched);
            case.contenders[0] = skipping(&alone, name, skip_untouched).contenders.remove(0);
            self.run(&case, &[(SQUIB, 25.0)]);
        }
        {
            let (half, zero) = (ram(Content::Zero(50)), ram(Content::Zero(95)));
            let name = "full 1 GiB, half zero, zeros skipped";
            self.run(&skipping(&half, name, skip_zeros), &[]);
            let name = "full 1 GiB, 95 % zero, zeros skipped";
            self.run(&skipping(&zero, name, skip_zeros), &[(SQUIB, 7.0)]);
        }
        let random = ram(Content::Random);
        let case = full(&random, "full 1 GiB, random bytes", MemoryWriter::options);
        self.run(&case, &[(SQUIB, 2.5), (LIMIT, 0.95)]);
        let case = recycled(&random, "full 1 GiB, random bytes, over the previous");
        self.run(&case, &[(SQUIB, 3.5), (LIMIT, 0.9)]);
    }

    fn diff(&mut self) {
        let ram = Ram::new(self.gib, Content::Random);
        let (four, sixteen) = (4 << 10, 16 << 10);
        for (page, pattern, what, goal) in [
            (sixteen, Pattern::Clustered, "16 KiB clustered", 1.7),
            (sixteen, Pattern::Random, "16 KiB random", 1.5),
            (four, Pattern::Random, "4 KiB random", 0.0),
        ] {
            let dirty = Dirty::new(ram.size, page, 100, pattern);
            let case = diff(&ram, &dirty, &format!("diff 1 % of 1 GiB, {what}"));
            let goals = [(SQUIB, goal), (LIMIT, 0.85)];
            self.run(&case, if goal > 0.0 { &goals } else { &[] });
        }
        drop(ram);
        if !self.wants("diff 1 % of 8 GiB, 4 KiB clustered") {
            return;
        }
        let ram = Ram::new(8 * self.gib, Content::Random);
        let dirty = Dirty::new(ram.size, four, 100, Pattern::Clustered);
        let case = diff(&ram, &dirty, "diff 1 % of 8 GiB, 4 KiB clustered");
        self.run(&case, &[(SQUIB, 1.8), (LIMIT, 0.85)]);
    }

    /// By turns, `rounds` times, after once that doesn't count.
    fn run(&mut self, case: &Case<'_>, goals: &[(&str, f64)]) {
        if !self.wants(&case.name) {
            return;
        }
        let mut seconds = vec![Vec::new(); case.contenders.len()];
        for round in 0..=self.rounds {
            for (number, contender) in case.contenders.iter().enumerate() {
                let dest = case.destination(self.place, number);
                let start = Instant::now();
                (contender.run)(&dest);
                if round > 0 {
                    seconds[number].push(start.elapsed().as_secs_f64());
                }
            }
        }
        for number in 0..case.contenders.len() {
            let _ = fs::remove_dir_all(self.place.join(number.to_string()));
        }
        let names = case.contenders.iter().map(|contender| contender.name);
        let found = report::Case {
            name: case.name.clone(),
            group: case.group.into(),
            bytes: case.bytes,
            contenders: named(names, seconds),
            goals: named_goals(goals),
        };
        self.found(found);
    }

    fn found(&mut self, case: report::Case) {
        if self.trying {
            println!("ran: {}", case.name);
            return;
        }
        let ours = case.contenders[0].median() * 1e3;
        print!("{:45} {ours:9.3} ms", case.name);
        for other in &case.contenders[1..] {
            let ratio = other.median() * 1e3 / ours;
            print!("   {ratio:.2} x {}", other.name);
        }
        println!();
        self.report.cases.push(case);
    }

    /// Marking and walking, without any file.
    fn bitmap(&mut self) {
        const PAGE: u64 = 4096;
        let size = 1024 * self.gib;
        let pages = size / PAGE;
        for (what, one_in, goal) in [
            ("1 % random", 100, 25.0),
            ("0.01 % random", 10_000, 300.0),
            ("clean", u64::MAX, 10_000.0),
            ("half", 2, 0.0),
        ] {
            let name = format!("walk a bitmap of 1 TiB, {what}");
            if !self.wants(&name) {
                continue;
            }
            let ours = DirtyBitmap::new(0, size, PAGE).unwrap();
            let squib = squib_snapshot::DirtyBitmap::new(0, size, PAGE).unwrap();
            let mut random = Random(4);
            for _ in 0..pages / one_in {
                let page = random.next_u64() % pages;
                ours.set_dirty_by_index(page).unwrap();
                squib.set_dirty_by_index(page);
            }
            let walk_ours = || {
                let bytes: u64 = ours.runs().map(|run| run.end - run.start).sum();
                black_box(bytes);
            };
            // As its own writer does it: a question a page.
            let walk_squib = || {
                let dirty = (0..pages).filter(|page| squib.is_dirty_by_index(*page));
                black_box(dirty.count());
            };
            self.by_turns(&name, goal, &walk_ours, &walk_squib);
        }
        let size = self.gib;
        let ours = DirtyBitmap::new(0, size, PAGE).unwrap();
        let squib = squib_snapshot::DirtyBitmap::new(0, size, PAGE).unwrap();
        let mut random = Random(3);
        let addresses: Vec<u64> = (0..1 << 20)
            .map(|_| random.next_u64() % (size / PAGE) * PAGE)
            .collect();
        let in_threads = |threads: usize, mark: &(dyn Fn(u64) + Sync)| {
            std::thread::scope(|scope| {
                for part in addresses.chunks(addresses.len() / threads) {
                    scope.spawn(move || part.iter().for_each(|address| mark(*address)));
                }
            });
        };
        for threads in [1, 2] {
            let name = format!("mark a million pages at random, threads: {threads}");
            if self.wants(&name) {
                let mark_ours = || {
                    in_threads(threads, &|address| {
                        black_box(ours.set_dirty(address).unwrap());
                    })
                };
                let mark_squib = || {
                    in_threads(threads, &|address| {
                        black_box(squib.set_dirty(address));
                    })
                };
                self.by_turns(&name, 1.0, &mark_ours, &mark_squib);
            }
        }
    }

    fn by_turns(&mut self, name: &str, goal: f64, ours: &dyn Fn(), squib: &dyn Fn()) {
        let mut seconds = vec![Vec::new(); 2];
        for round in 0..=self.rounds {
            for (number, run) in [ours, squib].into_iter().enumerate() {
                let start = Instant::now();
                run();
                if round > 0 {
                    seconds[number].push(start.elapsed().as_secs_f64());
                }
            }
        }
        let goals = [(SQUIB, goal)];
        let found = report::Case {
            name: name.into(),
            group: "bitmap".into(),
            bytes: 0,
            contenders: named([OURS, SQUIB].into_iter(), seconds),
            goals: named_goals(if goal > 0.0 { &goals } else { &[] }),
        };
        self.found(found);
    }

    /// How much memory a dump takes that is not the guest's.
    fn memory(&mut self) {
        let name = "memory of a full dump of 8 GiB";
        if !self.wants(name) {
            return;
        }
        let ram = Ram::new(self.gib, Content::Random);
        let ram = Repeated {
            ram: ram.reader(),
            size: 8 * self.gib,
        };
        let before = resident();
        let dest = self.place.join("guest.mem");
        let peak = std::sync::atomic::AtomicU64::new(0);
        let tell = std::sync::Arc::new(peak);
        let seen = std::sync::Arc::clone(&tell);
        let mut writer = MemoryWriter::options()
            .progress(move |_| {
                tell.fetch_max(resident(), std::sync::atomic::Ordering::Relaxed);
            })
            .open(&dest, ram.size, 16 << 10)
            .unwrap();
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        fs::remove_file(&dest).unwrap();
        let peak = seen.load(std::sync::atomic::Ordering::Relaxed);
        let more = peak.saturating_sub(before) as f64 / f64::from(1 << 20);
        self.figure(
            name,
            format!("{more:.1} MiB beside the guest's"),
            "at most 32 MiB",
        );
    }

    /// Whether time grows as the bytes do, and not with RAM that was never touched.
    fn growth(&mut self) {
        if self.wants("growth") {
            let ram = Ram::new(self.gib, Content::Random);
            for gib in [1, 8, 32] {
                let ram = Repeated {
                    ram: ram.reader(),
                    size: gib * self.gib,
                };
                let seconds = self.dump(&ram, ram.size, MemoryWriter::options());
                let each = seconds / gib as f64;
                let name = format!("full dump of {gib} GiB");
                self.figure(
                    &name,
                    format!("{seconds:.2} s, {each:.2} s a GiB"),
                    "linear",
                );
            }
            drop(ram);
            for gib in [1, 8, 32] {
                let ram = Ram::new(gib * self.gib, Content::Untouched(100));
                let options = MemoryWriter::options().skip_untouched(true);
                let seconds = self.dump(&ram.reader(), ram.size, options);
                let name = format!("full dump of {gib} GiB that nobody touched");
                self.figure(&name, format!("{:.2} ms", seconds * 1e3), "");
            }
        }
    }

    fn dump(&self, ram: &dyn PageReader, size: u64, options: memory_writer::Options) -> f64 {
        let dest = self.place.join("guest.mem");
        let start = Instant::now();
        let mut writer = options.open(&dest, size, 16 << 10).unwrap();
        writer.write_full(ram).unwrap();
        writer.commit().unwrap();
        let seconds = start.elapsed().as_secs_f64();
        fs::remove_file(&dest).unwrap();
        seconds
    }

    fn figure(&mut self, name: &str, value: String, limit: &str) {
        if self.trying {
            println!("ran: {name}");
            return;
        }
        println!("{name:45} {value}");
        self.report.figures.push((name.into(), value, limit.into()));
    }
}

fn named<'a>(
    names: impl Iterator<Item = &'a str>,
    seconds: Vec<Vec<f64>>,
) -> Vec<report::Contender> {
    names
        .zip(seconds)
        .map(|(name, seconds)| report::Contender {
            name: name.into(),
            seconds,
        })
        .collect()
}

fn named_goals(goals: &[(&str, f64)]) -> Vec<(String, f64)> {
    goals
        .iter()
        .map(|(name, goal)| ((*name).into(), *goal))
        .collect()
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// More RAM than there is memory: the same bytes again and again.
struct Repeated<'a> {
    ram: GuestMemoryReader<&'a GuestMemoryMmap>,
    size: u64,
}

impl PageReader for Repeated<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let memory = self.host_memory(at, buf.len() - done);
            let memory = memory.ok_or(io::ErrorKind::UnexpectedEof)?;
            memory.copy_to(&mut buf[done..done + memory.len()]);
            done += memory.len();
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let left = usize::try_from(self.size.checked_sub(offset)?).ok()?;
        let size = self.ram.layout().ram_size();
        self.ram.host_memory(offset % size, len.min(left))
    }
}

/// A full dump without the limit's: what it does not write is not its case.
fn skipping<'a>(ram: &'a Ram, name: &str, options: fn() -> memory_writer::Options) -> Case<'a> {
    let mut case = full(ram, name, options);
    case.contenders.retain(|contender| contender.name != LIMIT);
    case
}
