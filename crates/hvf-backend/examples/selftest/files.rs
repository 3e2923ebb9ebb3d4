//! Which holes the file system reports, and which memory the kernel reports as touched.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr;

use guest_ram::Mapping;
use hvf_backend::{PAGE_SIZE, guest_ram};
use sparse_file::{Extent, ExtentKind, extents, reported_extents};

use crate::report::{Measured, Outcome, Step, ensure};

pub(crate) const STEPS: [Step; 4] = [
    Step {
        name: "copied-file",
        shows: "no hole is used where a file that was copied (`fs::copy`) has data",
        run: copied_file,
    },
    Step {
        name: "mapped-file",
        shows: "no hole is used where data was written through a mapping",
        run: mapped_file,
    },
    Step {
        name: "gaps",
        shows: "how large a gap between written pages must be to become a hole",
        run: gaps,
    },
    Step {
        name: "page-queries",
        shows: "the kernel reports which pages of memory were touched",
        run: page_queries,
    },
];

const SIZE: u64 = 64 << 20;
const WRITTEN: [u64; 4] = [0, 8 << 20, 33 << 20, SIZE - PAGE_SIZE];

/// Returns a new file in the temporary directory.
fn new_file(dir: &tempfile::TempDir) -> io::Result<File> {
    let path = dir.path().join("file");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    file.set_len(SIZE)?;
    Ok(file)
}

/// Returns how many of the pages are in holes.
fn in_holes(listed: impl Iterator<Item = io::Result<Extent>>, pages: &[u64]) -> io::Result<usize> {
    let mut count = 0;
    for extent in listed {
        let extent = extent?;
        let inside = pages.iter().filter(|page| extent.range.contains(page));
        if extent.kind == ExtentKind::Hole {
            count += inside.count();
        }
    }
    Ok(count)
}

/// Reports what is listed of the file, which has data in these pages.
fn check(measured: &mut Measured, when: &str, file: &File, pages: &[u64]) -> Outcome {
    let reported = reported_extents(file)?;
    measured.add(
        format!("{when}: source"),
        format!("{:?}", reported.source()),
    );
    let wrong = in_holes(reported, pages)?;
    measured.add(format!("{when}: data in reported holes"), wrong);
    let blocks = file.metadata()?.blocks() * 512;
    measured.add(format!("{when}: bytes allocated"), blocks);
    let wrong = in_holes(extents(file)?, pages)?;
    ensure(wrong == 0, || {
        format!("{when}: {wrong} pages of data are in holes that would be used")
    })
}

fn copied_file(measured: &mut Measured) -> Outcome {
    let dir = tempfile::tempdir()?;
    let file = new_file(&dir)?;
    for page in WRITTEN {
        file.write_all_at(&[7; PAGE_SIZE as usize], page)?;
    }
    file.sync_all()?;
    check(measured, "written", &file, &WRITTEN)?;
    let copy = dir.path().join("copy");
    fs::copy(dir.path().join("file"), &copy)?;
    check(measured, "copied", &File::open(copy)?, &WRITTEN)
}

fn mapped_file(measured: &mut Measured) -> Outcome {
    let dir = tempfile::tempdir()?;
    let file = new_file(&dir)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping of a file that is not truncated.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            SIZE as usize,
            access,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    for page in WRITTEN {
        // SAFETY: the address is in the mapping.
        unsafe { start.cast::<u8>().add(page as usize).write_volatile(7) };
    }
    let written = check(measured, "written", &file, &WRITTEN);
    // SAFETY: the range is the mapping.
    let synced = match unsafe { libc::msync(start, SIZE as usize, libc::MS_SYNC) } {
        0 => check(measured, "synchronized", &file, &WRITTEN),
        _ => Err(io::Error::last_os_error().into()),
    };
    // SAFETY: the mapping is not used any more.
    unsafe { libc::munmap(start, SIZE as usize) };
    written?;
    synced?;
    check(measured, "unmapped", &file, &WRITTEN)
}

fn gaps(measured: &mut Measured) -> Outcome {
    for mib in [16, 32, 64] {
        let dir = tempfile::tempdir()?;
        let file = new_file(&dir)?;
        let second = PAGE_SIZE + (mib << 20);
        file.set_len(second + PAGE_SIZE)?;
        for page in [0, second] {
            file.write_all_at(&[7; PAGE_SIZE as usize], page)?;
        }
        file.sync_all()?;
        let listed = reported_extents(&file)?.collect::<io::Result<Vec<_>>>()?;
        let holes = listed
            .iter()
            .filter(|extent| extent.kind == ExtentKind::Hole);
        let bytes: u64 = holes.map(|hole| hole.range.end - hole.range.start).sum();
        measured.add(format!("gap of {mib} MiB: bytes of holes"), bytes);
        check(measured, &format!("gap of {mib} MiB"), &file, &[0, second])?;
    }
    Ok(())
}

// libSystem, <mach/mach_vm.h> and <mach/mach_init.h>
unsafe extern "C" {
    static mach_task_self_: u32;

    fn mach_vm_page_range_query(
        task: u32,
        address: u64,
        size: u64,
        dispositions: u64,
        count: *mut u64,
    ) -> c_int;
}

/// `VM_PAGE_QUERY_PAGE_PRESENT` and `VM_PAGE_QUERY_PAGE_PAGED_OUT` of <mach/vm_statistics.h>: the
/// page has contents.
const TOUCHED: c_int = 0x1 | 0x10;

fn query(memory: &Mapping) -> Result<Vec<c_int>, String> {
    let size = memory.len() as u64;
    let mut count = size / PAGE_SIZE;
    let mut dispositions: Vec<c_int> = vec![0; count as usize];
    // SAFETY: the memory is mapped, and the vector has room for a number for each page.
    let code = unsafe {
        mach_vm_page_range_query(
            mach_task_self_,
            memory.start().as_ptr().expose_provenance() as u64,
            size,
            dispositions.as_mut_ptr().expose_provenance() as u64,
            &raw mut count,
        )
    };
    match code {
        0 if count == size / PAGE_SIZE => Ok(dispositions),
        0 => Err(format!(
            "mach_vm_page_range_query answered for {count} pages"
        )),
        code => Err(format!("mach_vm_page_range_query failed with {code}")),
    }
}

fn page_queries(measured: &mut Measured) -> Outcome {
    let pages = 1024;
    let memory = Mapping::anonymous(pages * PAGE_SIZE as usize)?;
    let touched = [1, 2, 700];
    for page in touched {
        memory.store(page * PAGE_SIZE as usize, b"touched");
    }
    let found = query(&memory)?;
    measured.add("disposition of a touched page", found[touched[0]]);
    measured.add("disposition of an untouched page", found[0]);
    let listed = |found: &[c_int]| -> Vec<usize> {
        let touched = |page: &usize| found[*page] & TOUCHED != 0;
        (0..pages).filter(touched).collect()
    };
    ensure(listed(&found) == touched, || {
        format!("the touched pages are {:?}", listed(&found))
    })?;
    let mut byte = [0];
    memory
        .host_memory(10 * PAGE_SIZE as usize, 1)
        .copy_to(&mut byte);
    let read = query(&memory)?[10] & TOUCHED != 0;
    measured.add("reading untouched memory touches it", read);
    Ok(())
}
