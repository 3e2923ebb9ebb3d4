//! How many diffs of a chain are merged.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::left::{Left, Reason};
use crate::catalog::{Catalog, Entry};

/// A file of a chain.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    pub(super) modified: SystemTime,
}

/// The chains of a directory.
pub(super) struct Chains {
    /// Each from a full image up to the first state after which there is no diff or more than one.
    pub(super) chains: Vec<Vec<Link>>,
    /// The diffs after them, and those without a full image.
    pub(super) left: Vec<Left>,
}

impl Chains {
    pub(super) fn of(catalog: &Catalog) -> Self {
        let mut found = Self {
            chains: Vec::new(),
            left: Vec::new(),
        };
        for root in catalog.entries.iter().filter(|entry| !entry.is_diff) {
            found.add(catalog, root);
        }
        found.left.extend(Left::without_full_image(catalog));
        found
    }

    /// Adds the chain from the full image `root` on.
    fn add(&mut self, catalog: &Catalog, root: &Entry) {
        let link = |entry: &Entry| Link {
            path: entry.path.clone(),
            bytes: entry.file_bytes,
            modified: entry.modified,
        };
        let (mut chain, mut seen, mut at) = (vec![link(root)], BTreeSet::new(), root);
        while seen.insert(at.id) {
            let after: Vec<_> = catalog.after(at.id).collect();
            let reason = match &after[..] {
                [] => break,
                _ if !is_one_state(catalog, at) => Reason::SameId,
                [only] if only.is_diff && only.ram_bytes == at.ram_bytes => {
                    at = only;
                    chain.push(link(at));
                    continue;
                }
                [_] => Reason::OtherRam,
                [..] => Reason::SeveralDiffs,
            };
            let left = Left::new(Some(root), &after, reason);
            // Several full images may have the same state.
            if !self.left.iter().any(|it| it.diffs == left.diffs) {
                self.left.push(left);
            }
            break;
        }
        self.chains.push(chain);
    }
}

/// Returns whether `entry` is the only image of its state. The state of a full image is also in a
/// diff that was merged into it and not removed.
fn is_one_state(catalog: &Catalog, entry: &Entry) -> bool {
    let mut others = catalog.with_id(entry.id).filter(|it| it.path != entry.path);
    others.all(|other| !entry.is_diff && other.is_diff)
}

/// Returns how many diffs are merged, so that `keep` files are left.
pub(super) fn by_count(chain: &[Link], keep: u64) -> usize {
    let keep = usize::try_from(keep).unwrap_or(usize::MAX).max(1);
    chain.len().saturating_sub(keep)
}

/// Returns how many diffs were written so long ago. A clock that was set back makes them younger.
pub(super) fn by_age(chain: &[Link], age: Duration) -> usize {
    let now = SystemTime::now();
    let is_old = |link: &&Link| now.duration_since(link.modified).is_ok_and(|it| it >= age);
    chain[1..].iter().take_while(is_old).count()
}

/// Returns how many diffs are merged so that the files have at most `most` bytes. `merged` returns
/// the bytes of a full image with so many diffs merged into it.
pub(super) fn by_size(
    chain: &[Link],
    most: u64,
    merged: impl Fn(usize) -> anyhow::Result<u64>,
) -> anyhow::Result<usize> {
    let sum = |links: &[Link]| links.iter().map(|link| link.bytes).sum::<u64>();
    if sum(chain) <= most {
        return Ok(0);
    }
    // Each merge saves bytes: what one more diff adds to the image is at most its own size.
    let (mut few, mut enough) = (0, chain.len() - 1);
    while few + 1 < enough {
        let middle = few.midpoint(enough);
        match merged(middle)?.saturating_add(sum(&chain[middle + 1..])) <= most {
            true => enough = middle,
            false => few = middle,
        }
    }
    Ok(enough)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn chain(ages: &[u64]) -> Vec<Link> {
        let link = |hours: &u64| Link {
            path: PathBuf::new(),
            bytes: 10,
            modified: SystemTime::now() - Duration::from_secs(hours * 3600),
        };
        ages.iter().map(link).collect()
    }

    #[rstest]
    #[case::shorter(9, 0)]
    #[case::as_long(4, 0)]
    #[case::longer(3, 1)]
    #[case::only_the_full_image(1, 3)]
    fn a_number_of_files_is_kept(#[case] keep: u64, #[case] merged: usize) {
        assert_eq!(by_count(&chain(&[0; 4]), keep), merged);
    }

    /// The age of the full image does not matter: it changes with each merge.
    #[rstest]
    #[case::none(100, 0)]
    #[case::some(40, 2)]
    #[case::all(1, 3)]
    fn diffs_are_merged_up_to_the_first_young_one(#[case] hours: u64, #[case] merged: usize) {
        let age = Duration::from_secs(hours * 3600);
        assert_eq!(by_age(&chain(&[1, 60, 50, 20]), age), merged);
        // An old diff after a young one stays.
        assert_eq!(by_age(&chain(&[1, 0, 50]), Duration::from_secs(3600)), 0);
    }

    /// The merged image grows by 2 bytes a diff.
    #[rstest]
    #[case::fits(40, 0)]
    #[case::one(39, 1)]
    #[case::two(30, 2)]
    #[case::impossible(1, 3)]
    fn diffs_are_merged_until_the_files_fit(#[case] most: u64, #[case] merged: usize) {
        let len = |merged: usize| Ok(10 + 2 * merged as u64);
        assert_eq!(by_size(&chain(&[0; 4]), most, len).unwrap(), merged);
    }
}
