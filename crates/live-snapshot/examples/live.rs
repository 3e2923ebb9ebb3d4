//! Takes a snapshot of a guest that keeps working, and shows its pause and its work rate. The vCPUs
//! are threads, so it runs without KVM. The image must have exactly the state at the pause.
//!
//! `cargo run -p ramsnap-live-snapshot --example live`

#[cfg(all(target_os = "linux", not(ramsnap_loom)))]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    use std::sync::{Arc, RwLock};
    use std::thread::{sleep, spawn};
    use std::time::{Duration, Instant};

    use guest_ram::GuestRam;
    use live_snapshot::{LiveSnapshot, Method, UffdTracker};
    use memory_image::Chain;
    use memory_writer::MemoryWriter;
    use page_reader::RamLayout;

    const RAM: u64 = 256 << 20;
    const PAGE: u64 = 4096;
    const VCPUS: u64 = 2;
    /// Each vCPU writes numbered entries to the pages of its half of the RAM in turn.
    const PAGES: u64 = RAM / PAGE / VCPUS;
    let offset_of = |vcpu: u64, entry: u64| (vcpu * PAGES + entry % PAGES) * PAGE;

    let ram: Arc<GuestRam> = Arc::new(GuestRam::new(RamLayout::single(0, RAM)?)?);
    for entry in 0..PAGES {
        for vcpu in 0..VCPUS {
            ram.write_at(offset_of(vcpu, entry), &entry.to_ne_bytes())?;
        }
    }
    // The vCPUs run until the process ends. They hold `running` for reading while they work.
    let running = Arc::new(RwLock::new(()));
    let newest: Arc<[AtomicU64; VCPUS as usize]> = Arc::new([PAGES - 1, PAGES - 1].map(Into::into));
    for vcpu in 0..VCPUS {
        let (ram, running, newest) = (ram.clone(), running.clone(), newest.clone());
        spawn(move || {
            loop {
                let guard = running.read().unwrap();
                for _ in 0..16 {
                    let entry = newest[vcpu as usize].load(SeqCst) + 1;
                    let bytes = entry.to_ne_bytes();
                    ram.write_at(offset_of(vcpu, entry), &bytes).unwrap();
                    newest[vcpu as usize].store(entry, SeqCst);
                }
                drop(guard);
                sleep(Duration::from_millis(1));
            }
        });
    }
    let entries = || newest.each_ref().map(|entry| entry.load(SeqCst));
    let show_rate = |when: &str, began: Instant, before: [u64; VCPUS as usize]| {
        let count = entries().iter().sum::<u64>() - before.iter().sum::<u64>();
        let rate = count as f64 / began.elapsed().as_secs_f64();
        println!("{when}: {rate:.0} entries per second");
    };
    let calm = |when: &str| {
        let (began, before) = (Instant::now(), entries());
        sleep(Duration::from_millis(500));
        show_rate(when, began, before);
    };

    let dir = tempfile::tempdir()?;
    let image = dir.path().join("live.mem");
    let tracker = Arc::new(UffdTracker::start(&ram)?);
    calm("before");
    let writer = MemoryWriter::open(&image, RAM, PAGE)?;
    let options = LiveSnapshot::options().method(Method::CopyOnWrite);
    let live = options.begin(&tracker, writer)?; // while the guest runs

    let stopping = Instant::now();
    let paused = running.write().unwrap();
    let frozen_at = entries();
    let frozen = live.freeze()?;
    drop(paused);
    println!("pause: {} µs", stopping.elapsed().as_micros());

    let (began, before) = (Instant::now(), entries());
    let report = frozen.commit()?; // while the guest runs
    show_rate("during", began, before);
    println!("copied before write: {} bytes", report.copied_before_write);
    calm("after");

    let mut restored = vec![0; RAM as usize];
    Chain::open_raw(&image, PAGE)?.restore(&mut restored)?;
    for (vcpu, newest) in (0..).zip(frozen_at) {
        for entry in newest + 1 - PAGES..=newest {
            let at = offset_of(vcpu, entry) as usize;
            assert_eq!(restored[at..at + 8], entry.to_ne_bytes(), "vCPU {vcpu}");
        }
    }
    println!("verified: the image has the entries up to {frozen_at:?}, and no later ones");
    Ok(())
}

#[cfg(not(all(target_os = "linux", not(ramsnap_loom))))]
fn main() {
    println!("UffdTracker needs Linux");
}
