//! Saves a running KVM guest by pre-copy: most of its RAM is written while it runs, and it pauses
//! for the rest only.
//!
//! `cargo run -p ramsnap-kvm-backend --example precopy`

#[cfg(all(target_os = "linux", target_arch = "x86_64", not(ramsnap_loom)))]
mod guest;

#[cfg(all(target_os = "linux", target_arch = "x86_64", not(ramsnap_loom)))]
fn main() -> Result<(), guest::AnyError> {
    linux::run()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64", not(ramsnap_loom))))]
fn main() {
    println!("this example needs KVM on x86-64");
}

#[cfg(all(target_os = "linux", target_arch = "x86_64", not(ramsnap_loom)))]
mod linux {
    use kvm_backend::Precopy;
    use kvm_backend::dirty_bitmap::TakenBitmap;
    use memory_writer::MemoryWriter;

    use crate::guest::{self, AnyError, Guest, PAGE, RAM};

    /// Live rounds end when one finds at most this many pages.
    const FEW: u64 = 64;
    const MAX_ROUNDS: usize = 8;

    pub(super) fn run() -> Result<(), AnyError> {
        if let Err(error) = kvm_backend::open_kvm() {
            println!("not run: {error}");
            return Ok(());
        }
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("full.mem");
        let guest = Guest::start()?;

        let mut writer = MemoryWriter::open(&path, RAM, PAGE)?;
        // The VMM writes by `GuestRam::write`, which marks the pages. For other host writes, see
        // `DirtyLog::options().mark_host_writes(..)`.
        let mut precopy = Precopy::begin(&guest.log)?;
        // The log was just started, so the first round finds all pages.
        let mut found = precopy.live_round::<AnyError>(|_| Ok(writer.write_full(&*guest.ram)?))?;
        println!("{found} pages while the guest runs");
        for _ in 0..MAX_ROUNDS {
            let before = found;
            found = precopy.live_round::<AnyError>(|pages| {
                writer.write_diff(&*guest.ram, pages)?;
                Ok(())
            })?;
            println!("{found} pages while the guest runs");
            if found <= FEW || found > before / 2 {
                break;
            }
        }
        let mut write = |pages: &TakenBitmap| -> Result<(), AnyError> {
            writer.write_diff(&*guest.ram, pages)?;
            Ok(())
        };
        let copy = precopy.finish(|| guest.pause(), |paused| guest.capture(paused), &mut write)?;
        guest.resume();
        println!("{} pages while it was paused", copy.pages);
        writer.commit_and_release(copy.epoch)?;

        guest::check(&std::fs::read(&path)?, &copy.state)?;
        println!("the image is of one moment");
        Ok(())
    }
}
