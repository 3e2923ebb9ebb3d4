//! What a loss of power leaves on a disk whose writes were logged.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use random::Random;
use scenarios::write_log::{self, Cut, Fate};

use super::state::Cache;

/// Brings `image` from the state it had when logging began to one in which a loss of power may
/// leave it: all writes before the last flush; and of the later ones all, if there is no cache, or
/// else of each by itself all, the first 4 KiB blocks, or nothing.
pub(super) fn cut_power(image: &Path, log: &Path, cache: Cache) -> anyhow::Result<Cut> {
    let entries =
        write_log::read(&File::open(log)?).with_context(|| format!("in {}", log.display()))?;
    let image = File::options().write(true).open(image)?;
    let mut random = Random::new();
    let mut fate = |blocks| match cache {
        Cache::None => Fate::Kept,
        Cache::Volatile => Fate::random(&mut random, blocks),
    };
    let write = |offset, bytes: &[u8]| image.write_all_at(bytes, offset);
    Ok(write_log::apply(&entries, &mut fate, &write)?)
}
