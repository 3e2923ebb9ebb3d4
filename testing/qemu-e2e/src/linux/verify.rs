//! Checks that a second QEMU resumes where the first one stopped, and that a wrong snapshot is
//! detected.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::chain::{Chain, name, paths, seconds};
use super::console::{Fault, Place};
use super::guest::{PATIENCE, Room};
use super::tool::{LAYOUTS, PAGE, Tool};

/// Rounds that a restored guest must work.
const AFTER: u64 = 8;

/// A guest without its last diff counts as dead once it is silent for this multiple of the time
/// that the correct guest took for [`AFTER`] rounds.
const DEAD: u32 = 2;

/// The files and the console state of a guest that was killed.
pub(super) struct Proof<'a> {
    pub room: &'a Room<'a>,
    /// In each layout.
    pub chains: [Chain; LAYOUTS.len()],
    /// The devices as the last snapshot has them.
    pub devices: String,
    pub place: Place,
}

impl Proof<'_> {
    pub(super) fn carry_out(&self) -> anyhow::Result<()> {
        let mut slowest = Duration::ZERO;
        for chain in &self.chains {
            slowest = slowest.max(self.restored_guest_goes_on(chain)?);
        }
        let newest = self.chains.last().context("there are layouts")?;
        self.corrupted_page_is_detected(newest)?;
        self.missing_diff_is_detected(newest, slowest * DEAD)
    }

    /// Returns the time that the restored guest took to start and to work its rounds.
    fn restored_guest_goes_on(&self, Chain { tool, files }: &Chain) -> anyhow::Result<Duration> {
        let (chain, layout) = (paths(files), tool.layout);
        let start = Instant::now();
        tool.verify(&chain)?;
        let name = format!("restored-{layout}");
        let ram = self.restore(&name, tool, &chain)?;
        if let Some(page) = first_difference(&self.room.file("ram"), &ram)? {
            bail!(
                "not proven: page {page} of the restored RAM is not as the guest left it ({layout})"
            );
        }
        println!(
            "{layout}: {} files verified, merged and restored in {}: the RAM is as the guest left it, byte for byte",
            chain.len(),
            seconds(start.elapsed())
        );
        let start = Instant::now();
        let last = self.goes_on(&name)?;
        let took = start.elapsed();
        let first = self.place.round + 1;
        println!(
            "{layout}: a second QEMU completed rounds {first} to {last}, all files are correct"
        );
        fs::remove_file(ram)?;
        Ok(took)
    }

    /// Merges `chain` and makes a RAM file of it.
    fn restore(&self, ram: &str, tool: &Tool, chain: &[&Path]) -> anyhow::Result<PathBuf> {
        let image = self.room.file(&format!("{ram}.mem"));
        tool.merge(chain, &image)?;
        let ram = self.room.file(ram);
        tool.restore(&image, &ram)?;
        Ok(ram)
    }

    fn goes_on(&self, ram: &str) -> anyhow::Result<u64> {
        let mut guest = self
            .room
            .bring_back(ram, &self.devices, self.place.clone())?;
        guest.work(AFTER)
    }

    /// Returns the fault of a guest whose RAM is wrong. Each of its rounds may take up to `within`.
    fn fault(&self, ram: &str, within: Duration) -> anyhow::Result<Fault> {
        let mut guest = self
            .room
            .bring_back(ram, &self.devices, self.place.clone())?;
        match guest.watch(AFTER, within)? {
            Err(fault) => Ok(fault),
            Ok(_) => bail!("not proven: the guest with {ram} resumes nevertheless"),
        }
    }

    fn corrupted_page_is_detected(&self, Chain { tool, files }: &Chain) -> anyhow::Result<()> {
        let ram = self.restore("corrupted", tool, &paths(files))?;
        let page = corrupt(&ram, self.place.round)?;
        match self.fault("corrupted", PATIENCE)? {
            fault @ Fault::Broken(_) => println!("page {page} corrupted: detected, {fault}"),
            fault => bail!("not proven: page {page} of a file was corrupted, but {fault}"),
        }
        Ok(())
    }

    fn missing_diff_is_detected(
        &self,
        Chain { tool, files }: &Chain,
        dead: Duration,
    ) -> anyhow::Result<()> {
        let (_, older) = files.split_last().context("a chain has a last image")?;
        self.restore("left-out", tool, &paths(older))?;
        let fault = self.fault("left-out", dead)?;
        println!("{} left out: detected, {fault}", name(older.len()));
        Ok(())
    }
}

/// Flips a byte of each page that begins the first file of `round`. A move of that page may have
/// left a second copy. Returns the first of these pages.
fn corrupt(ram: &Path, round: u64) -> anyhow::Result<u64> {
    let mark = format!("ramsnap round {round} part 1\n");
    let bytes = fs::read(ram)?;
    let pages = (0..).zip(bytes.chunks(PAGE as usize));
    let found: Vec<u64> = pages
        .filter(|(_, bytes)| bytes.starts_with(mark.as_bytes()))
        .map(|(page, _)| page)
        .collect();
    let file = File::options().write(true).open(ram)?;
    for page in &found {
        let at = page * PAGE + PAGE / 2;
        file.write_all_at(&[bytes[at as usize] ^ 1], at)?;
    }
    let first = found.first().copied();
    first.with_context(|| format!("no page of the guest's RAM begins with {mark:?}"))
}

/// The first page in which two files differ.
fn first_difference(one: &Path, other: &Path) -> anyhow::Result<Option<u64>> {
    let (one, other) = (fs::read(one)?, fs::read(other)?);
    if one.len() != other.len() {
        bail!("{} bytes of RAM became {}", one.len(), other.len());
    }
    let mut pages = one.chunks(PAGE as usize).zip(other.chunks(PAGE as usize));
    Ok(pages
        .position(|(one, other)| one != other)
        .map(|page| page as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RAM of four pages, the third of which begins a file of round 7.
    fn ram(dir: &Path) -> PathBuf {
        let mut bytes = vec![0; 4 * PAGE as usize];
        let mark = b"ramsnap round 7 part 1\n";
        bytes[2 * PAGE as usize..][..mark.len()].copy_from_slice(mark);
        let path = dir.join("ram");
        fs::write(&path, bytes).expect("a file");
        path
    }

    #[test]
    fn a_corrupted_page_is_the_first_difference() {
        let dir = tempfile::tempdir().expect("a directory");
        let (ram, copy) = (ram(dir.path()), dir.path().join("copy"));
        fs::copy(&ram, &copy).expect("a copy");
        assert_eq!(first_difference(&ram, &copy).expect("two files"), None);
        assert_eq!(corrupt(&copy, 7).expect("a page"), 2);
        assert_eq!(first_difference(&ram, &copy).expect("two files"), Some(2));
    }

    #[test]
    fn a_moved_page_is_corrupted_at_both_places() {
        let dir = tempfile::tempdir().expect("a directory");
        let ram = ram(dir.path());
        let file = File::options().write(true).open(&ram).expect("a file");
        file.write_all_at(b"ramsnap round 7 part 1\n", 3 * PAGE)
            .expect("a copy");
        let before = fs::read(&ram).expect("a file");
        assert_eq!(corrupt(&ram, 7).expect("a page"), 2);
        let after = fs::read(&ram).expect("a file");
        let pages = before
            .chunks(PAGE as usize)
            .zip(after.chunks(PAGE as usize));
        let differ: Vec<_> = pages.map(|(before, after)| before != after).collect();
        assert_eq!(differ, [false, false, true, true]);
    }

    #[test]
    fn corrupting_without_a_known_page_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let error = corrupt(&ram(dir.path()), 70).expect_err("there is none");
        assert!(error.to_string().starts_with("no page"), "{error}");
    }

    #[test]
    fn ram_of_another_size_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let (ram, short) = (ram(dir.path()), dir.path().join("short"));
        fs::write(&short, [0; PAGE as usize]).expect("a file");
        let error = first_difference(&ram, &short).expect_err("it is shorter");
        assert_eq!(error.to_string(), "16384 bytes of RAM became 4096");
    }
}
