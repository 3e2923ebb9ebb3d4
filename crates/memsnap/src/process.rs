//! RAM in the memory of another process.

use std::ops::Range;
use std::time::Duration;

use anyhow::Context;
use page_reader::{
    PageReader, ProcessMaps, ProcessMemory, ProcessRegion, StoppedProcess, UnexaminedProcess,
};

use crate::args;
use crate::failure::Failure;
use crate::ram;

/// How long a process may take to stop.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many regions are proposed.
const PROPOSED: usize = 8;

/// Where in a process the RAM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Region {
    /// The mapping whose name is this, or contains it.
    Named(String),
    /// The mapping that this address is in.
    At(u64),
    Range(Range<u64>),
}

impl Region {
    /// `/memfd:ram`, `0x7f0000000000`, or `0x7f0000000000:2GiB`.
    pub fn parse(text: &str) -> Result<Self, String> {
        if !text.starts_with("0x") {
            return Ok(Self::Named(text.to_owned()));
        }
        match text.contains(':') {
            true => args::range(text).map(Self::Range),
            false => args::address(text).map(Self::At),
        }
    }

    fn find(&self, maps: &ProcessMaps) -> anyhow::Result<Range<u64>> {
        match self {
            Self::Named(name) => Ok(maps.named(name)?.addresses.clone()),
            Self::Range(range) => Ok(range.clone()),
            Self::At(address) => match maps.at(*address) {
                Some(region) => Ok(region.addresses.clone()),
                None => Err(Failure::NothingMapped {
                    pid: maps.pid(),
                    address: *address,
                }
                .into()),
            },
        }
    }
}

/// Regions of a process, which stands still meanwhile unless it was told otherwise.
pub struct ProcessRam {
    pid: u32,
    regions: Vec<Range<u64>>,
    memory: ProcessMemory,
    /// Goes on when this is dropped.
    _stopped: Option<StoppedProcess>,
}

impl ProcessRam {
    pub fn open(pid: u32, regions: &[Region], live: bool) -> anyhow::Result<Self> {
        // First of all: its id stays its own from here on.
        let stopped = match live {
            true => None,
            false => Some(StoppedProcess::stop(pid, PATIENCE)?),
        };
        let maps = ProcessMaps::of(pid)?;
        if regions.is_empty() {
            let proposed = maps.candidates().into_iter().take(PROPOSED);
            let proposed = proposed.map(|region| format!("\n  {region}")).collect();
            return Err(Failure::NoRegion { pid, proposed }.into());
        }
        let regions = regions.iter().map(|region| region.find(&maps));
        let regions = regions.collect::<anyhow::Result<Vec<_>>>()?;
        let ranges = regions
            .iter()
            .map(|range| (range.start, range.end - range.start));
        let ram = Self {
            pid,
            memory: ProcessMemory::open(pid, ranges)?,
            regions,
            _stopped: stopped,
        };
        let unexamined = ram.check_filled(&maps)?;
        ram::warn_of_unexamined(&format!("the RAM of process {pid}"), &unexamined);
        Ok(ram)
    }

    pub fn size(&self) -> u64 {
        self.regions
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    pub fn reader(&self) -> &(impl PageReader + Sync) {
        &self.memory
    }

    pub fn check(&self) -> anyhow::Result<()> {
        let maps = ProcessMaps::of(self.pid)?;
        for range in &self.regions {
            let mut at = range.start;
            while at < range.end {
                let Some(region) = maps.at(at) else {
                    let pid = self.pid;
                    return Err(Failure::NothingMapped { pid, address: at }.into());
                };
                at = region.addresses.end;
            }
        }
        // Filling may have begun after the process was opened.
        self.check_filled(&maps).map(drop)
    }

    /// Refuses RAM that another process is still filling: missing pages are read as zeros.
    fn check_filled(&self, maps: &ProcessMaps) -> anyhow::Result<Vec<UnexaminedProcess>> {
        let mut unexamined = Vec::new();
        let mapped = |region: &&ProcessRegion| {
            let addresses = &region.addresses;
            let mut ram = self.regions.iter();
            ram.any(|ram| addresses.start < ram.end && ram.start < addresses.end)
        };
        for region in maps.regions().iter().filter(mapped) {
            let found = region.check_filled();
            let found = found.with_context(|| format!("cannot capture {region}"))?;
            unexamined.extend(found.into_iter().filter(|process| process.pid != self.pid));
        }
        unexamined.sort_by_key(|process| process.pid);
        unexamined.dedup();
        Ok(unexamined)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::name("/memfd:ram", Some(Region::Named("/memfd:ram".into())))]
    #[case::address("0x7f00", Some(Region::At(0x7f00)))]
    #[case::range("0x1000:8KiB", Some(Region::Range(0x1000..0x3000)))]
    #[case::no_number("0xram", None)]
    fn a_region_is_a_name_an_address_or_a_range(#[case] text: &str, #[case] is: Option<Region>) {
        assert_eq!(Region::parse(text).ok(), is);
    }
}
