//! RAM in the memory of another process.

mod mapped_file;
mod region;

use std::ffi::OsString;
use std::fs::File;
use std::fs::Metadata;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use mapped_file::files_in;
use page_reader::{PageReader, printable};
use process_memory::{
    ProcessMaps, ProcessMemory, ProcessMemoryError, ProcessRegion, StoppedProcess, Unexamined,
    check_lazy_fill_of_region,
};
use sparse_file::FileIdentity;

use crate::failure::Failure;
use crate::interrupt::NotSuspended;
use crate::print;
use crate::ram_lock;
use crate::session::Session;
use crate::stderr::{self, Kept};
pub use region::Region;

/// The longest time that a process may take to stop, by default.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The number of proposed regions.
const PROPOSED: usize = 8;

/// Regions of a process. The process is stopped from [`hold`](ProcessRam::hold) until drop, unless
/// its guest is paused.
pub struct ProcessRam {
    pid: u32,
    /// The regions as named on the command line.
    named: Vec<Region>,
    live: bool,
    /// The longest time that the process may take to stop.
    patience: Duration,
    regions: Vec<Range<u64>>,
    memory: ProcessMemory,
    /// The files that contain the RAM, as far as they can be opened. No restore can write to them.
    files: Vec<File>,
    /// The process resumes when this is dropped.
    stopped: Option<StoppedProcess>,
    /// Dropped after `stopped`.
    not_suspended: Option<NotSuspended>,
    /// Dropped after `stopped`.
    kept: Option<Kept>,
}

impl ProcessRam {
    /// Finds the regions while the process runs.
    ///
    /// `unknown_file` permits RAM whose file cannot be found.
    pub fn find(
        pid: u32,
        named: &[Region],
        live: bool,
        patience: Duration,
        unknown_file: bool,
    ) -> anyhow::Result<Self> {
        let maps = ProcessMaps::of(pid)?;
        if named.is_empty() {
            let proposed = maps.candidates().into_iter().take(PROPOSED);
            let line = |found: &ProcessRegion| {
                let range = Region::Range(found.addresses.clone());
                format!("\n  --region {range}: {found}")
            };
            let proposed = proposed.map(line).collect();
            return Err(Failure::NoRegion { pid, proposed }.into());
        }
        let regions = find_all(named, &maps)?;
        check_apart(named, &regions)?;
        warn_of_largest(pid, named, &regions);
        warn_of_several(&maps, named, &regions);
        let mut ram = Self {
            pid,
            memory: open(pid, &regions)?,
            named: named.to_vec(),
            live,
            patience,
            regions,
            files: Vec::new(),
            stopped: None,
            not_suspended: None,
            kept: None,
        };
        ram.check_mapped(&maps)?;
        print::check_is_none_of(|metadata, stream| {
            let region = ram.mapping_of(&maps, metadata, stream)?;
            Some(OsString::from_vec(region.name.to_vec()).into())
        })?;
        ram.keep_from_restore(&maps, unknown_file)?;
        let unexamined = ram.check_filled(&maps)?;
        warn_of_unexamined(&format!("the RAM of process {pid}"), &unexamined);
        Ok(ram)
    }

    /// Stops the process, and checks that its RAM is still at the same addresses.
    pub fn hold(&mut self, session: &Session) -> anyhow::Result<()> {
        if !self.live {
            self.kept = Some(Kept::from_now_on());
            let not_suspended = NotSuspended::from_now_on();
            let hold = || "cannot hold back the signals that suspend ramsnap";
            self.not_suspended = Some(not_suspended.with_context(hold)?);
            self.stopped = Some(StoppedProcess::stop_unless(
                self.pid,
                self.patience,
                session.cancel_token(),
            )?);
        }
        // The process id cannot be reused from here on. It may have belonged to another process
        // before.
        let maps = ProcessMaps::of(self.pid)?;
        if find_all(&self.named, &maps)? != self.regions {
            return Err(Failure::RamMoved { pid: self.pid }.into());
        }
        self.memory = open(self.pid, &self.regions)?;
        Ok(())
    }

    /// Returns whether any of the regions may map the file at `path`.
    pub fn is_mapped_from(&self, path: &Path) -> bool {
        let (Ok(metadata), Ok(file), Ok(maps)) = (
            path.metadata(),
            FileIdentity::at(path),
            ProcessMaps::of(self.pid),
        ) else {
            return false;
        };
        self.mapping_of(&maps, &metadata, &file).is_some()
    }

    /// Returns a mapping in one of the regions, of a file that may be the one of these attributes.
    fn mapping_of<'m>(
        &self,
        maps: &'m ProcessMaps,
        metadata: &Metadata,
        file: &FileIdentity,
    ) -> Option<&'m ProcessRegion> {
        let mut files = files_in(maps, &self.regions).into_iter();
        let mapped = files.find(|mapped| mapped.may_be(self.pid, metadata, file))?;
        Some(mapped.lines[0])
    }

    pub fn size(&self) -> u64 {
        self.regions
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Returns the process and its region, if it is only one.
    pub fn only_region(&self) -> Option<(u32, Range<u64>)> {
        match &self.regions[..] {
            [one] => Some((self.pid, one.clone())),
            _ => None,
        }
    }

    pub fn reader(&self) -> &(impl PageReader + Sync) {
        &self.memory
    }

    pub fn check(&self) -> anyhow::Result<()> {
        let maps = ProcessMaps::of(self.pid)?;
        self.check_mapped(&maps)?;
        // Filling may have begun after the process was opened.
        self.check_filled(&maps).map(drop)
    }

    /// Refuses RAM whose file is being restored to. Unless `unknown_file` is set, also refuses RAM
    /// whose file cannot be found: a restore may be writing to it.
    fn keep_from_restore(&mut self, maps: &ProcessMaps, unknown_file: bool) -> anyhow::Result<()> {
        let pid = self.pid;
        for mapped in files_in(maps, &self.regions) {
            let (files, is_known) = mapped.open(pid);
            for file in files {
                ram_lock::check_not_restored(&file, &format!("the RAM of process {pid}"))?;
                self.files.push(file);
            }
            let name = || printable(&mapped.lines[0].name);
            match (is_known, unknown_file) {
                (true, _) => {}
                (false, true) => stderr::line(&format!(
                    "warning: cannot open the file {} behind the RAM of process {pid}: if `ramsnap restore` \
                     is writing to it, the image has bytes of both states",
                    name()
                )),
                (false, false) => return Err(Failure::UnknownFile { pid, name: name() }.into()),
            }
        }
        Ok(())
    }

    fn check_mapped(&self, maps: &ProcessMaps) -> anyhow::Result<()> {
        for range in &self.regions {
            let end = regions_in(maps, range).last();
            let end = end.map_or(range.start, |region| region.addresses.end);
            if end < range.end {
                let pid = self.pid;
                return Err(Failure::NothingMapped { pid, address: end }.into());
            }
        }
        Ok(())
    }

    /// Refuses RAM that another process is still filling: missing pages are read as zeros.
    fn check_filled(&self, maps: &ProcessMaps) -> anyhow::Result<Unexamined> {
        let mut unexamined = Unexamined::default();
        let mapped = |region: &&ProcessRegion| {
            let addresses = &region.addresses;
            let mut ram = self.regions.iter();
            ram.any(|ram| addresses.start < ram.end && ram.start < addresses.end)
        };
        for region in maps.regions().iter().filter(mapped) {
            let found = check_lazy_fill_of_region(region);
            let found = found.with_context(|| format!("cannot capture {region}"))?;
            unexamined.merge(found);
        }
        unexamined.processes.retain(|it| it.pid != self.pid);
        unexamined.processes.sort_by_key(|it| it.pid);
        Ok(unexamined)
    }
}

fn find_all(named: &[Region], maps: &ProcessMaps) -> anyhow::Result<Vec<Range<u64>>> {
    named.iter().map(|region| region.find(maps)).collect()
}

/// Warns that the largest mapping may be more than the RAM: the kernel joins adjacent mappings of
/// memory without a file.
fn warn_of_largest(pid: u32, named: &[Region], regions: &[Range<u64>]) {
    for (named, region) in named.iter().zip(regions) {
        if *named == Region::Largest {
            let range = Region::Range(region.clone());
            stderr::line(&format!(
                "warning: the largest mapping of process {pid} is --region {range}: if its RAM is only \
                 a part of this, give the ADDRESS:SIZE of the part"
            ));
        }
    }
}

/// Warns of a range that spans several mappings: the kernel puts those of different files side by
/// side, so a size that is too large takes bytes of the next one. Parts of one mapping that the
/// kernel has split are no surprise.
fn warn_of_several(maps: &ProcessMaps, named: &[Region], regions: &[Range<u64>]) {
    for (named, range) in named.iter().zip(regions) {
        let is_one = maps
            .around(range.start)
            .is_some_and(|whole| whole.end >= range.end);
        if !matches!(named, Region::Range(_)) || is_one {
            continue;
        }
        let mapped: Vec<_> = regions_in(maps, range).collect();
        let line = |region: &&ProcessRegion| {
            let (start, end) = (region.addresses.start, region.addresses.end);
            let name = match region.name.is_empty() {
                true => "no file".to_owned(),
                false => printable(&region.name),
            };
            format!("{start:#x}..{end:#x} ({name})")
        };
        let more = match mapped.len().saturating_sub(PROPOSED) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        if mapped.len() < 2 {
            // A part of one mapping, or the error says that nothing is mapped there.
            continue;
        }
        let listed: Vec<_> = mapped.iter().take(PROPOSED).map(line).collect();
        stderr::line(&format!(
            "warning: --region {named} spans {} mappings of process {}: {}{more}; if the RAM is in one of them, \
             give its addresses",
            mapped.len(),
            maps.pid(),
            listed.join(", ")
        ));
    }
}

/// Refuses RAM that is named twice.
fn check_apart(named: &[Region], regions: &[Range<u64>]) -> Result<(), Failure> {
    for (index, later) in regions.iter().enumerate() {
        let overlaps = |it: &Range<u64>| it.start < later.end && later.start < it.end;
        if let Some(earlier) = regions[..index].iter().position(overlaps) {
            return Err(Failure::RegionTwice {
                one: named[earlier].to_string(),
                other: named[index].to_string(),
            });
        }
    }
    Ok(())
}

fn open(pid: u32, regions: &[Range<u64>]) -> Result<ProcessMemory, ProcessMemoryError> {
    let ranges = regions
        .iter()
        .map(|range| (range.start, range.end - range.start));
    ProcessMemory::open(pid, ranges)
}

/// Returns the mappings that contain `range`, up to the first gap.
fn regions_in<'m>(
    maps: &'m ProcessMaps,
    range: &Range<u64>,
) -> impl Iterator<Item = &'m ProcessRegion> {
    let (mut at, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        let region = (at < end).then(|| maps.at(at))??;
        at = region.addresses.end;
        Some(region)
    })
}

/// Warns of processes that may be filling the RAM and could not be examined.
pub fn warn_of_unexamined(ram: &str, unexamined: &Unexamined) {
    if unexamined.is_empty() {
        return;
    }
    let advice = match unexamined.hidden.is_empty() {
        true => "",
        false => "; to examine all processes, run ramsnap as root outside of containers",
    };
    stderr::line(&format!(
        "warning: could not examine {unexamined}: if one of these is still filling {ram} by userfaultfd, missing pages \
         are saved as zeros{advice}"
    ));
}
