//! The memory that a dump takes, and its time as RAM grows.

use std::fs;
use std::io;
use std::time::Instant;

use memory_writer::MemoryWriter;
use page_reader::{GuestMemoryReader, HostMemory, PageReader};
use vm_memory::GuestMemoryMmap;

use crate::Comparison;
use crate::cases::ram::{Content, Ram};

impl Comparison<'_> {
    /// Measures the memory of a dump in addition to the guest's.
    pub fn memory(&mut self) {
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
        let peak = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let seen = std::sync::Arc::clone(&peak);
        let mut writer = MemoryWriter::options()
            .progress(move |_| {
                seen.fetch_max(resident(), std::sync::atomic::Ordering::Relaxed);
                std::ops::ControlFlow::Continue(())
            })
            .open(&dest, ram.size, 16 << 10)
            .unwrap();
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        fs::remove_file(&dest).unwrap();
        let peak = peak.load(std::sync::atomic::Ordering::Relaxed);
        let more = peak.saturating_sub(before) as f64 / f64::from(1 << 20);
        self.figure(
            name,
            format!("{more:.1} MiB in addition to the guest's"),
            "at most 32 MiB",
        );
    }

    /// Measures whether time grows with the number of bytes, and not with RAM that was never
    /// touched.
    pub fn growth(&mut self) {
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
                let name = format!("full dump of {gib} GiB that was never touched");
                self.figure(&name, format!("{:.2} ms", seconds * 1e3), "");
            }
        }
    }

    fn dump(
        &self,
        ram: &dyn PageReader,
        size: u64,
        options: memory_writer::MemoryWriterOptions,
    ) -> f64 {
        let dest = self.place.join("guest.mem");
        let start = Instant::now();
        let mut writer = options.open(&dest, size, 16 << 10).unwrap();
        writer.write_full(ram).unwrap();
        writer.commit().unwrap();
        let seconds = start.elapsed().as_secs_f64();
        fs::remove_file(&dest).unwrap();
        seconds
    }
}

/// Returns the resident size of this process in bytes.
pub fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// A guest with more RAM than the host's memory: the same bytes repeated.
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
