//! Guest-physical memory: what is mapped, and what the guest may do with each page of stage 2.
//!
//! A vCPU asks for permission at each store, so a change of permissions needs no change of
//! Unicorn's mappings. What a vCPU may read is mapped into its engine, in which only its own thread
//! makes changes: see [`Memory::readable`].

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::calls::{Code, Outcome, framework, give};
use crate::{machine, vcpus};

pub(crate) const READ: u64 = 1;
pub(crate) const WRITE: u64 = 1 << 1;
pub(crate) const EXEC: u64 = 1 << 2;
const ALL: u64 = READ | WRITE | EXEC;

/// The page size of this host in bytes: the framework demands whole pages of the host.
const HOST_PAGE: usize = 4 << 10;

/// Memory of this process that is mapped into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The guest-physical address.
    pub guest_start: u64,
    /// The address in this process.
    pub host_start: usize,
    /// The size in bytes.
    pub size: u64,
}

struct Region {
    start: u64,
    size: u64,
    host: usize,
    granule: u64,
    /// The permissions of each page.
    pages: Vec<u64>,
    /// Whether an access to the page has been refused before.
    refused: Vec<AtomicBool>,
}

/// Why an access is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Nothing is mapped there, or the page is not in stage 2 yet.
    Translation,
    /// The page is mapped without this permission.
    Permission,
}

/// The mappings, and their version. Each mapping and each change of what is readable is a new one.
pub(crate) struct Memory {
    regions: Vec<Region>,
    pub version: u64,
}

static MEMORY: RwLock<Memory> = RwLock::new(Memory {
    regions: Vec::new(),
    version: 0,
});

pub(crate) fn read() -> RwLockReadGuard<'static, Memory> {
    MEMORY.read().unwrap_or_else(PoisonError::into_inner)
}

fn write() -> RwLockWriteGuard<'static, Memory> {
    MEMORY.write().unwrap_or_else(PoisonError::into_inner)
}

impl Region {
    fn end(&self) -> u64 {
        self.start + self.size
    }

    fn page(&self, address: u64) -> usize {
        ((address - self.start) / self.granule) as usize
    }

    fn mapped(&self) -> Mapped {
        Mapped {
            guest_start: self.start,
            host_start: self.host,
            size: self.size,
        }
    }
}

impl Memory {
    fn region(&self, address: u64) -> Option<&Region> {
        let mut regions = self.regions.iter();
        regions.find(|region| (region.start..region.end()).contains(&address))
    }

    /// Returns whether the guest may access the address in this way.
    ///
    /// The first refusal of a page is one of translation, as on a Mac, where stage 2 has no entry
    /// for a page that was never accessed.
    pub(crate) fn check(&self, address: u64, permission: u64) -> Result<(), Refusal> {
        let region = self.region(address).ok_or(Refusal::Translation)?;
        let page = region.page(address);
        if region.pages[page] & permission != 0 {
            return Ok(());
        }
        match region.refused[page].swap(true, Relaxed) {
            false => Err(Refusal::Translation),
            true => Err(Refusal::Permission),
        }
    }

    /// Returns the instruction at an address.
    pub(crate) fn instruction(&self, address: u64) -> Option<u32> {
        let region = self.region(address)?;
        let host = region.host + (address - region.start) as usize;
        let host = std::ptr::with_exposed_provenance::<u32>(host);
        // SAFETY: the region is mapped in this process, because the framework's caller keeps it
        // mapped until it has called `hv_vm_unmap`. Instructions are aligned.
        Some(unsafe { host.read_volatile() })
    }

    /// Returns the word at an address, which is aligned and mapped.
    pub(crate) fn word(&self, address: u64) -> u64 {
        let word = self.atomic_word(address);
        word.map_or(0, |word| word.load(SeqCst))
    }

    /// Replaces the word at an address, which is aligned and mapped, if it is `old`.
    ///
    /// `hv_vm_protect` waits for the caller's lock, so it returns after the store or refuses it.
    pub(crate) fn update_word(&self, address: u64, old: u64, new: u64) {
        if let Some(word) = self.atomic_word(address) {
            let _ = word.compare_exchange(old, new, SeqCst, SeqCst);
        }
    }

    fn atomic_word(&self, address: u64) -> Option<&AtomicU64> {
        let region = self.region(address)?;
        let host = region.host + (address - region.start) as usize;
        let host = std::ptr::with_exposed_provenance_mut::<u64>(host);
        // SAFETY: as in `instruction`. The walks of all vCPUs access descriptors by this function.
        Some(unsafe { AtomicU64::from_ptr(host) })
    }

    /// Returns the range that the guest may read around an address.
    pub(crate) fn readable_around(&self, address: u64) -> Option<Mapped> {
        let mut readable = self.readable().into_iter();
        readable
            .find(|range| (range.guest_start..range.guest_start + range.size).contains(&address))
    }

    /// Returns the ranges that the guest may read.
    pub(crate) fn readable(&self) -> Vec<Mapped> {
        let mut readable = Vec::new();
        for region in &self.regions {
            let mut at = 0;
            for pages in region.pages.chunk_by(|a, b| a & READ == b & READ) {
                let size = pages.len() as u64 * region.granule;
                if pages[0] & READ != 0 {
                    readable.push(Mapped {
                        guest_start: region.start + at,
                        host_start: region.host + at as usize,
                        size,
                    });
                }
                at += size;
            }
        }
        readable
    }
}

/// Returns whether any memory is mapped.
pub(crate) fn is_mapped() -> bool {
    !read().regions.is_empty()
}

pub(crate) fn mapped() -> Vec<Mapped> {
    read().regions.iter().map(Region::mapped).collect()
}

/// Forgets all mappings.
pub(crate) fn clear() {
    let mut memory = write();
    memory.regions.clear();
    memory.version += 1;
}

/// Returns the range if it is not empty and consists of pages of `granule` bytes.
fn aligned(start: u64, size: usize, granule: u64) -> Result<Range<u64>, Code> {
    let end = start.checked_add(size as u64).ok_or(Code::BAD_ARGUMENT)?;
    if size == 0 || !(start | end).is_multiple_of(granule) {
        return Err(Code::BAD_ARGUMENT);
    }
    Ok(start..end)
}

fn map(host: *mut c_void, start: u64, size: usize, flags: u64) -> Outcome {
    let (granule, bits) = machine::with(|machine| Ok((machine.granule, machine.address_bits)))?;
    let range = aligned(start, size, granule)?;
    let limit = 1_u64.checked_shl(bits).unwrap_or(u64::MAX);
    if flags & !ALL != 0 || range.end > limit || host.is_null() {
        return Err(Code::BAD_ARGUMENT);
    }
    if !host.addr().is_multiple_of(HOST_PAGE) {
        return Err(Code::BAD_ARGUMENT);
    }
    let mut memory = write();
    let overlaps = |region: &Region| region.start < range.end && range.start < region.end();
    if memory.regions.iter().any(overlaps) {
        return Err(Code::ERROR);
    }
    let pages = (size as u64 / granule) as usize;
    memory.regions.push(Region {
        start,
        size: size as u64,
        host: host.expose_provenance(),
        granule,
        pages: vec![flags; pages],
        refused: std::iter::repeat_with(AtomicBool::default)
            .take(pages)
            .collect(),
    });
    memory.version += 1;
    let version = memory.version;
    drop(memory);
    vcpus::follow(version);
    Ok(())
}

/// Apple's header permits any mapped range. Here it is a region as it was mapped.
fn unmap(start: u64, size: usize) -> Outcome {
    let granule = machine::with(|machine| Ok(machine.granule))?;
    let range = aligned(start, size, granule)?;
    let mut memory = write();
    let mut regions = memory.regions.iter();
    let found = regions.position(|region| (region.start..region.end()) == range);
    memory.regions.remove(found.ok_or(Code::BAD_ARGUMENT)?);
    memory.version += 1;
    let version = memory.version;
    drop(memory);
    // The caller may unmap the memory from the process once this returns.
    vcpus::follow(version);
    Ok(())
}

fn protect(start: u64, size: usize, flags: u64) -> Outcome {
    let granule = machine::with(|machine| Ok(machine.granule))?;
    let range = aligned(start, size, granule)?;
    if flags & !ALL != 0 {
        return Err(Code::BAD_ARGUMENT);
    }
    let mut memory = write();
    let region = memory
        .regions
        .iter_mut()
        .find(|region| region.start <= range.start && range.end <= region.end())
        .ok_or(Code::BAD_ARGUMENT)?;
    let pages = region.page(range.start)..region.page(range.end - 1) + 1;
    let pages = &mut region.pages[pages];
    let readable_changes = pages.iter().any(|page| (page ^ flags) & READ != 0);
    pages.fill(flags);
    memory.version += u64::from(readable_changes);
    let version = memory.version;
    drop(memory);
    if readable_changes {
        vcpus::follow(version);
    }
    // A store that was permitted before is in memory once this returns.
    vcpus::finish_stores();
    Ok(())
}

fn pages_of_host(size: usize) -> Result<usize, Code> {
    match size {
        0 => Err(Code::BAD_ARGUMENT),
        size if !size.is_multiple_of(16 << 10) => Err(Code::BAD_ARGUMENT),
        size => Ok(size),
    }
}

framework! {
    fn hv_vm_map(host: *mut c_void, start: u64, size: usize, flags: u64) {
        map(host, start, size, flags)
    }

    fn hv_vm_unmap(start: u64, size: usize) {
        unmap(start, size)
    }

    fn hv_vm_protect(start: u64, size: usize, flags: u64) {
        protect(start, size, flags)
    }

    fn hv_vm_allocate(to: *mut *mut c_void, size: usize, flags: u64) {
        let size = pages_of_host(size)?;
        if flags != 0 {
            return Err(Code::BAD_ARGUMENT);
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel chooses the address.
        let host = unsafe { libc::mmap(std::ptr::null_mut(), size, access, kind, -1, 0) };
        if host == libc::MAP_FAILED {
            return Err(Code::NO_RESOURCES);
        }
        give(to, host)
    }

    fn hv_vm_deallocate(host: *const c_void, size: usize) {
        let size = pages_of_host(size)?;
        let in_use = mapped().into_iter().any(|region| {
            let region = region.host_start..region.host_start + region.size as usize;
            region.start < host.addr() + size && host.addr() < region.end
        });
        if in_use {
            return Err(Code::BUSY);
        }
        // SAFETY: the caller allocated the memory by `hv_vm_allocate`.
        match unsafe { libc::munmap(host.cast_mut(), size) } {
            0 => Ok(()),
            _ => Err(Code::BAD_ARGUMENT),
        }
    }
}
