//! Fills each page with its number when it is first touched.

#![allow(unsafe_code)]

#[cfg(target_os = "linux")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::num::NonZeroUsize;
    use std::{ptr, thread};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
    use nix::unistd::{SysconfVar, sysconf};
    use std::os::fd::AsFd;
    use uffd::{Event, FillFlags, Modes, Userfaultfd};

    const PAGES: u64 = 4;
    let page = sysconf(SysconfVar::PAGE_SIZE)?.ok_or("the page size is unknown")? as u64;
    let size = NonZeroUsize::new((PAGES * page) as usize).ok_or("no bytes")?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping, which nothing else uses.
    let memory = unsafe { mmap_anonymous(None, size, access, MapFlags::MAP_PRIVATE) }?;
    let start = memory.expose_provenance().get() as u64;

    let fault = Userfaultfd::options().open()?;
    // SAFETY: the new mapping. Only the loop below fills its pages.
    unsafe { fault.register(start..start + PAGES * page, Modes::MISSING) }?;

    let reader = thread::spawn(move || {
        for index in [2, 0, 3, 1] {
            let at = (start + index * page) as usize;
            // SAFETY: mapped until the process ends, and accessed by raw pointers only.
            let byte = unsafe { ptr::with_exposed_provenance::<u8>(at).read_volatile() };
            println!("page {index} has the byte {byte}");
        }
    });

    for _ in 0..PAGES {
        let mut ready = [PollFd::new(fault.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::NONE)?;
        if let Some(Event::PageFault { address, .. }) = fault.read_event()? {
            println!("fault at {address:#x}");
            let number = ((address - start) / page) as u8;
            let bytes = vec![number; page as usize];
            fault
                .copy_bytes(address, &bytes, FillFlags::empty())
                .complete()?;
        }
    }
    reader.join().map_err(|_| "the reader panicked")?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("userfaultfd requires Linux");
}
